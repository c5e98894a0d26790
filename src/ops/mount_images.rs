//! Checks of the image files before a mount: the cluster size of a raw base, and whether the host's file system suits
//! the images.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use nix::sys::statfs::{EXT4_SUPER_MAGIC, fstatfs};

use crate::bail;
use crate::device::Level;
use crate::error::{IoContext, Kind, Result};
use crate::format::header;
use crate::fs::mounts;
use crate::image::open::{self, Access};
use crate::report;
use crate::sys::inode_flags;
use crate::units::ClusterSize;

/// Skips the test whether images on ext4 are mapped by extents.
const SKIP_EXTENTS: &str = "PLOOP_SKIP_EXT4_EXTENTS_CHECK";

/// The cluster of a raw base: as given, else the largest from 1 MiB to 32 KiB that divides the file.
pub fn raw_cluster(level: &Level, given: Option<ClusterSize>) -> Result<ClusterSize> {
    let shown = level.path.display();
    let read = || {
        let (file, _) = open::reopen(&level.fd, Access::default())?;
        let mut head = [0; header::SIZE];
        let n = file.read_at(&mut head, 0)?;
        Ok((header::has_signature(&head[..n]), file.metadata()?.len()))
    };
    let (signed, len) = std::io::Result::ctx(read(), Kind::Open, || format!("cannot read {shown}"))?;
    if signed {
        bail!(
            Param,
            "{shown} begins with the signature of a ploop1 image; as a raw disk its content would be nonsense: leave out -f raw"
        );
    }
    if let Some(cluster) = given {
        return Ok(cluster);
    }
    let fits = (6..=11).rev().map(|shift| ClusterSize::from_sectors(1 << shift));
    match fits.flatten().find(|c| len.is_multiple_of(c.bytes()) && len > 0) {
        Some(cluster) => Ok(cluster),
        None => bail!(Param, "{shown}: no cluster size from 32 KiB to 1 MiB divides its {len} bytes; name one with -b"),
    }
}

/// Whether the host's file system suits the images.
pub fn host_checks(levels: &[Level]) -> Result<()> {
    if std::env::var_os(SKIP_EXTENTS).is_some() {
        return Ok(());
    }
    let table = mounts::read().unwrap_or_default();
    for level in levels {
        let (file, _) = open::reopen(&level.fd, Access::default())
            .ctx(Kind::Open, || format!("cannot open {}", level.path.display()))?;
        if !fstatfs(&file).is_ok_and(|s| s.filesystem_type() == EXT4_SUPER_MAGIC) {
            continue;
        }
        check_extents(&file, &level.path)?;
        let dev = file.metadata().map(|m| m.dev()).unwrap_or_default();
        if table.iter().any(|m| m.dev == dev && m.options.split(',').any(|o| o == "data=writeback")) {
            report::warn(format_args!(
                "{} lies on a file system mounted with data=writeback: after a power cut it can have old data",
                level.path.display()
            ));
        }
    }
    Ok(())
}

fn check_extents(file: &File, path: &Path) -> Result<()> {
    match inode_flags::get(file.as_fd()) {
        Ok(flags) if flags & inode_flags::EXTENTS == 0 => bail!(
            Mount,
            "{} is not mapped by extents (an ext3 file system turned ext4?): copy the file, so that it is; {SKIP_EXTENTS}=1 skips this test",
            path.display()
        ),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn level(path: &Path) -> Level {
        Level { path: path.to_owned(), raw: true, fd: open::open_level(path, None).unwrap() }
    }

    #[test]
    fn raw_clusters() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raw");
        let cluster = |len: u64, given| {
            fs::write(&path, []).unwrap();
            fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len).unwrap();
            raw_cluster(&level(&path), given).map(ClusterSize::bytes).map_err(|e| e.kind())
        };
        assert_eq!(cluster(8 << 20, None), Ok(1 << 20));
        assert_eq!(cluster(3 << 19, None), Ok(1 << 19));
        assert_eq!(cluster(32 << 10, None), Ok(32 << 10));
        assert_eq!(cluster((32 << 10) + 512, None), Err(Kind::Param));
        assert_eq!(cluster(0, None), Err(Kind::Param));
        assert_eq!(cluster(512, ClusterSize::from_sectors(64).ok()), Ok(32 << 10));
        fs::write(&path, "WithouFreSpacExt and more of it, until a header is full of something else").unwrap();
        let e = raw_cluster(&level(&path), None).unwrap_err();
        assert!(e.to_string().contains("signature"), "{e}");
    }
}

//! Checks of the image files before a mount: the cluster size of a raw base, and whether the host's file system suits
//! the images.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{EXT4_SUPER_MAGIC, fstatfs};

use super::image_set;
use crate::bail;
use crate::device::Level;
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::guid::Guid;
use crate::format::header::{self, Header};
use crate::fs::mounts;
use crate::image::open::{self, Access};
use crate::image::scan;
use crate::report;
use crate::sys::file_id::FileId;
use crate::sys::folder::Folder;
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

/// An image on which deltas stand, as the descriptor beside it says.
#[derive(Debug)]
pub struct Frozen {
    descriptor: PathBuf,
    guid: Guid,
    deltas: usize,
}

/// Whether the descriptor beside an image says that deltas stand on it.
pub fn frozen(top: &Level) -> Result<Option<Frozen>> {
    let file = FileId::of(&top.fd).ctx(Kind::Fstat, || format!("cannot look at {}", top.path.display()))?;
    let Some((descriptor, disk, guid)) = image_set::named_beside(&top.path, file) else { return Ok(None) };
    let deltas = disk.children(&guid).len();
    Ok((deltas > 0).then_some(Frozen { descriptor, guid, deltas }))
}

/// Refuses to write to an image on which deltas stand, unless the user insists; says so of a look at one.
pub fn refuse_frozen(top: &Level, read_only: bool, force: bool) -> Result<()> {
    let shown = top.path.display();
    let Some(Frozen { descriptor, guid, deltas }) = frozen(top)? else {
        if force && !read_only {
            bail!(Param, "--force looks at an image that may be in use elsewhere: only read-only (-r)");
        }
        return Ok(());
    };
    let descriptor = descriptor.display();
    match (read_only, force) {
        (true, _) => report::say(
            0,
            format_args!(
                "{shown} is snapshot {guid} of {descriptor}; newer deltas exist, and what they have is not shown"
            ),
        ),
        (false, true) => report::warn(format_args!(
            "{shown} is snapshot {guid} of {descriptor}: what is written to it changes what stands on it"
        )),
        (false, false) => bail!(
            Param,
            "image {shown} is snapshot {guid} of {descriptor}, and {deltas} delta(s) stand on it: what is written to it \
             would change and damage them; mount the disk (ploop mount {descriptor}), or look at this image without writing \
             (ploop mount -r {shown}); --force writes to it all the same"
        ),
    }
    Ok(())
}

/// Levels whose files end before their last clusters, with how many of these are missing and there.
fn cut_off(levels: &[Level]) -> Vec<(&Level, u64, u64)> {
    let one = |level: &Level| -> Result<(u64, u64)> {
        let (file, _) =
            open::reopen(&level.fd, Access::default()).ctx(Kind::Open, || level.path.display().to_string())?;
        let mut head = [0; header::SIZE];
        file.read_exact_at(&mut head, 0).ctx(Kind::Read, || level.path.display().to_string())?;
        let header = Header::parse(&head)?;
        header.check_layout()?;
        let len = file.metadata().ctx(Kind::Fstat, || level.path.display().to_string())?.len();
        scan::cut_off(&file, &header, len)
    };
    // What is wrong otherwise the server reports.
    let found =
        levels.iter().filter(|l| !l.raw).filter_map(|l| one(l).ok().map(|(missing, there)| (l, missing, there)));
    found.filter(|(_, missing, _)| *missing > 0).collect()
}

/// Says which images are cut off, before what is there is shown.
pub fn tell_cut_off(levels: &[Level]) {
    for (level, missing, there) in cut_off(levels) {
        report::warn(format_args!(
            "image {} is cut off: {missing} clusters of the disk lie behind its end, and reading them fails; {there} are there",
            level.path.display()
        ));
    }
}

/// Refuses an image whose file ends before its last clusters. `Format`.
pub fn refuse_cut_off(path: &Path, dir: &Folder) -> Result<()> {
    let level = Level { path: path.to_owned(), raw: false, fd: open::open_level(path, Some(dir))? };
    let levels = std::slice::from_ref(&level);
    match cut_off(levels).first() {
        Some((_, missing, _)) => {
            let text = format!("image {}: {missing} clusters of the disk lie behind its end", path.display());
            Err(advise(&Error::new(Kind::Format, text), levels))
        }
        None => Ok(()),
    }
}

/// Adds to the error of an attach what can be done about images that are cut off.
pub fn advise_cut_off(e: Error, levels: &[Level]) -> Error {
    match e.kind() == Kind::Format && !cut_off(levels).is_empty() {
        true => advise(&e, levels),
        false => e,
    }
}

fn advise(e: &Error, levels: &[Level]) -> Error {
    let files: Vec<String> = levels.iter().map(|l| l.path.display().to_string()).collect();
    let files = files.join(" ");
    Error::new(
        e.kind(),
        format!(
            "{e}; the file was cut off, restore it from a backup; to read what is there: ploop mount -r --force {files}"
        ),
    )
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
    use crate::descriptor::{Descriptor, ImageMode};
    use crate::format::header::Version;
    use crate::ops::snapshot::{self, SnapshotParams};
    use crate::ops::testkit::{self, g, make_disk, small};
    use std::fs;

    fn level(path: &Path) -> Level {
        Level { path: path.to_owned(), raw: true, fd: open::open_level(path, None).unwrap() }
    }

    #[test]
    fn a_frozen_base_is_not_written_to_by_its_name() {
        let dir = testkit::folder();
        let dd = make_disk(dir.path(), Version::V2, ImageMode::Expanded, small(), 20);
        let base = dd.with_file_name("root.hdd");
        let look =
            |read_only, force| refuse_frozen(&level(&base), read_only, force).map_err(|e| (e.kind(), e.to_string()));
        // Nothing stands on it yet.
        look(false, false).unwrap();
        assert_eq!(look(false, true).unwrap_err().0, Kind::Param);
        let params = SnapshotParams { guid: g(1), snap_dir: None, temporary: false };
        snapshot::create(&dd, "", &params).unwrap();
        let (kind, text) = look(false, false).unwrap_err();
        assert_eq!(kind, Kind::Param);
        assert!(text.contains(&format!("ploop mount {}", dd.display())) && text.contains("--force"), "{text}");
        look(true, false).unwrap();
        look(false, true).unwrap();
        let top = Descriptor::read(&dd).unwrap().images[1].file.clone();
        refuse_frozen(&level(&top), false, false).unwrap();
        // Under another name it is the same file.
        fs::hard_link(&base, dd.with_file_name("other")).unwrap();
        assert!(refuse_frozen(&level(&dd.with_file_name("other")), false, false).is_err());
        fs::write(&dd, "<broken").unwrap();
        look(false, false).unwrap();
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

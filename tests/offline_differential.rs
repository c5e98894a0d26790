//! Conversions and restored descriptors against Debian's `ploop` 1.15: the same bytes come out, but for what is listed here.
//! Where it is not installed the tests are skipped, which fails in CI.
//!
//! Differences: the classic leaves the flag that says "empty" in a preallocated image, and makes a piece of a cluster at the
//! end of the file part of the disk; it cannot convert to version 2, nor restore the descriptor of such an image,
//! without its kernel module.

#[path = "common/mod.rs"]
mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ploop::descriptor::{Descriptor, ImageMode};
use ploop::format::header::Version;
use ploop::image::content::Piece;
use ploop::image::create::{Params, build};
use ploop::ops::{check, convert, restore};
use ploop::units::ClusterSize;

const PLOOP: &str = "/usr/sbin/ploop";
const CLUSTERS: u64 = 300;

fn disk(dir: &Path, version: Version) -> PathBuf {
    let cluster = ClusterSize::from_sectors(64).unwrap();
    let params = Params { version, cluster, sectors: CLUSTERS * 64, mode: ImageMode::Expanded };
    let image = dir.join("root.hds");
    let data: Vec<u8> = (0..5 * 32768u32).map(|i| (i / 512) as u8 | 1).collect();
    let pieces =
        [Piece::bytes(0, &data[..100]), Piece::bytes(7 * 32768, &data), Piece::bytes(299 * 32768, &data[..512])];
    build(&image, &params, &pieces, &mut |_, _| Ok(())).unwrap();
    restore::restore_descriptor(dir, &image, false, None).unwrap();
    dir.join("DiskDescriptor.xml")
}

/// Exit code of the classic; it copies about 4 KiB behind its arguments, which must be there to copy.
fn classic(dd: &Path, args: &[&str]) -> i32 {
    let mut command = Command::new(PLOOP);
    command.arg(args[0]).args(&args[1..]).arg(dd).env("PADDING", "x".repeat(9000));
    let out = command.output().unwrap();
    print!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    out.status.code().unwrap_or(-1)
}

fn mode(dd: &Path) -> ImageMode {
    Descriptor::read(dd).unwrap().mode
}

#[test]
fn conversions_make_what_the_classic_makes() {
    if !common::skip::program(PLOOP) {
        return;
    }
    for version in [Version::V1, Version::V2] {
        for (format, to) in
            [("raw", ImageMode::Raw), ("preallocated", ImageMode::Preallocated), ("expanded", ImageMode::Expanded)]
        {
            let (theirs, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let (t, o) = (disk(theirs.path(), version), disk(ours.path(), version));
            assert_eq!(classic(&t, &["convert", "-f", format]), 0, "{format}");
            convert::convert_disk(&o, to).unwrap();
            assert_eq!(mode(&o), mode(&t), "{format}");
            let bytes = |dir: &Path| {
                let mut bytes = fs::read(dir.join("root.hds")).unwrap();
                if to == ImageMode::Preallocated {
                    // m_Flags.
                    bytes[52] = 0;
                }
                bytes
            };
            assert!(bytes(theirs.path()) == bytes(ours.path()), "{format}, version {}", version.number());
            assert_eq!(classic(&o, &["check"]), 0, "their check of what we made: {format}");
            check::check_disk(&t, None).unwrap();
            // From raw nothing is converted, by either.
            if to == ImageMode::Raw {
                for format in ["raw", "expanded", "preallocated"] {
                    assert_eq!(classic(&t, &["convert", "-f", format]), 38);
                }
                assert_eq!(convert::convert_disk(&o, ImageMode::Expanded).unwrap_err().code(), 38);
            }
        }
    }
}

#[test]
fn versions_change_as_with_the_classic() {
    if !common::skip::program(PLOOP) {
        return;
    }
    let (theirs, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (t, o) = (disk(theirs.path(), Version::V2), disk(ours.path(), Version::V2));
    let image = |dir: &Path| fs::read(dir.join("root.hds")).unwrap();
    assert_eq!(classic(&t, &["convert", "-v", "1"]), 0);
    convert::change_version(&o, Version::V1).unwrap();
    assert!(image(theirs.path()) == image(ours.path()));
    let names = |dir: &Path| fs::read_dir(dir).unwrap().count();
    assert!(names(ours.path()) <= names(theirs.path()));
    assert_eq!(classic(&o, &["check"]), 0);
    let made_1 = image(ours.path());
    convert::change_version(&o, Version::V2).unwrap();
    if classic(&t, &["convert", "-v", "2"]) == 0 {
        assert!(image(theirs.path()) == image(ours.path()));
    } else {
        assert!(image(theirs.path()) == made_1, "refused, and unchanged");
    }
    // An interrupted conversion of ours, as far as the classic's check can say: busy.
    let file = File::options().write(true).open(ours.path().join("root.hds")).unwrap();
    file.write_all_at(&0x746F_6E59u32.to_le_bytes(), 44).unwrap();
    file.write_all_at(&2u32.to_le_bytes(), 52).unwrap();
    assert_eq!(classic(&o, &["check"]), 17);
    assert_eq!(check::check_disk(&o, None).unwrap_err().code(), 17);
}

/// Where the image lies, seen from the descriptor's folder, and what it is: the same descriptor is made, or it is refused with
/// the same status.
#[test]
fn descriptors_are_restored_as_by_the_classic() {
    if !common::skip::program(PLOOP) {
        return;
    }
    let size = |kib: u64| kib << 10;
    for (bytes, raw, cluster) in [
        (0, false, None),
        (size(4096), true, None),
        (size(96), true, None),
        (size(40), true, None),
        (size(4096), true, Some(64)),
        (size(96), true, Some(2048)),
    ] {
        let top = tempfile::tempdir().unwrap();
        let folder = top.path().canonicalize().unwrap();
        let image = folder.join("root.hds");
        match raw {
            true => fs::write(&image, vec![1; bytes as usize]).unwrap(),
            false => {
                disk(&folder, Version::V1);
                fs::remove_file(folder.join("DiskDescriptor.xml")).unwrap();
            }
        }
        let descriptor = folder.join("DiskDescriptor.xml");
        let sectors = cluster.map(|c: u64| c.to_string());
        let mut args = vec!["restore-descriptor"];
        args.extend(raw.then_some(["-f", "raw"]).into_iter().flatten());
        args.extend(sectors.iter().flat_map(|s| ["-b", s]));
        args.push(folder.to_str().unwrap());
        let what = format!("{args:?}, {bytes} bytes");
        let theirs = classic(&image, &args);
        let made = fs::read(&descriptor).ok();
        let _ = fs::remove_file(&descriptor);
        let cluster = cluster.map(|c| ClusterSize::from_sectors(c).unwrap());
        let ours = restore::restore_descriptor(&folder, &image, raw, cluster).map_or_else(|e| e.code(), |()| 0);
        assert_eq!(ours, theirs, "{what}");
        assert!(fs::read(&descriptor).ok() == made, "{what}");
    }
}

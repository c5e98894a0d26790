//! Conversions against Debian's `ploop` 1.15: the same bytes come out, but for what is listed here. Where it is not installed
//! the test is skipped, which fails in CI.
//!
//! Differences: the classic leaves the flag that says "empty" in a preallocated image, and makes a piece of a cluster at the
//! end of the file part of the disk; it cannot convert to version 2 without its kernel module.

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

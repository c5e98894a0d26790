//! New disks: judged by other programs, safe from whatever is in the way, whole after an interruption.

#[path = "common/mod.rs"]
mod common;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ploop::descriptor::ImageMode;
use ploop::error::Kind;
use ploop::format::header::Version;
use ploop::fs::mkfs::{FsType, Inodes};
use ploop::ops::create::{CreateParams, FsParams, create_image};
use ploop::report::cancel;
use ploop::units::ClusterSize;

fn params(image: PathBuf) -> CreateParams {
    CreateParams {
        image,
        sectors: 300 << 11,
        cluster: ClusterSize::DEFAULT,
        version: Version::V2,
        mode: ImageMode::Expanded,
        fs: Some(FsParams { fstype: FsType::Ext4, block_size: 0, lazy: true, inodes: Inodes::Usual }),
        without_partition: false,
    }
}

/// Runs a program; false if it is not installed and the test may be skipped.
fn judged(program: &str, args: &[&str]) -> bool {
    // Debian's 1.15 copies 4 KiB from where its argument stands: with a small environment it dies of that.
    let padding = "x".repeat(5000);
    let run = Command::new(program).args(args).env("PADDING", padding).stdin(Stdio::null()).output();
    match run {
        Ok(o) => {
            let text = String::from_utf8_lossy(&o.stdout).into_owned() + &String::from_utf8_lossy(&o.stderr);
            assert!(o.status.success(), "{program} {args:?}: {}\n{text}", o.status);
            true
        }
        Err(e) => {
            common::skip::skip(&format!("{program}: {e}"));
            false
        }
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut all: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    all.sort();
    all
}

#[test]
fn other_programs_accept_them() {
    let cluster = |sectors| ClusterSize::from_sectors(sectors).unwrap();
    let mb64 = cluster(131_072);
    let p = params(PathBuf::new());
    let ext3 = Some(FsParams { fstype: FsType::Ext3, block_size: 1024, lazy: false, inodes: Inodes::PerBytes(65536) });
    let cases = [
        p.clone(),
        CreateParams { version: Version::V1, cluster: cluster(64), ..p.clone() },
        CreateParams { mode: ImageMode::Preallocated, ..p.clone() },
        CreateParams { mode: ImageMode::Preallocated, version: Version::V1, cluster: mb64, ..p.clone() },
        CreateParams { mode: ImageMode::Raw, fs: ext3, ..p.clone() },
        CreateParams { without_partition: true, ..p.clone() },
        CreateParams { fs: ext3, sectors: 40 << 11, ..p.clone() },
        CreateParams { fs: None, ..p },
    ];
    for case in cases {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let image = dir.path().join("root.hdd");
        let case = CreateParams { image: image.clone(), ..case };
        create_image(&case).unwrap_or_else(|e| panic!("{case:?}: {e}"));
        assert_eq!(names(dir.path()), ["DiskDescriptor.xml", "root.hdd"], "{case:?}");
        let meta = fs::metadata(&image).unwrap();
        assert_eq!((meta.mode() & 0o777, meta.nlink()), (0o600, 1));

        let file = image.to_str().unwrap();
        let bs = case.cluster.sectors().to_string();
        let raw = dir.path().join("raw");
        match case.mode {
            ImageMode::Raw => {
                judged("ploop", &["check", "-f", "-r", "-R", "-b", &bs, file]);
                fs::copy(&image, &raw).unwrap();
            }
            _ => {
                judged("ploop", &["check", "-f", "-r", "-c", file]);
                if !judged("qemu-img", &["check", "-f", "parallels", file]) {
                    continue;
                }
                let to = raw.to_str().unwrap();
                judged("qemu-img", &["convert", "-f", "parallels", "-O", "raw", file, to]);
            }
        }
        if case.fs.is_some() {
            let offset = if case.without_partition { 0 } else { case.cluster.bytes() };
            let with_offset = format!("{}?offset={offset}", raw.display());
            judged("e2fsck", &["-fn", &with_offset]);
        }
    }
}

#[test]
fn what_is_in_the_way_stays() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("root.hdd");
    fs::write(&image, "precious").unwrap();
    assert_eq!(create_image(&params(image.clone())).unwrap_err().kind(), Kind::Param);
    assert_eq!(fs::read(&image).unwrap(), b"precious");
    assert_eq!(names(dir.path()), ["root.hdd"]);

    let dd = dir.path().join("DiskDescriptor.xml");
    fs::write(&dd, "mine").unwrap();
    let other = dir.path().join("other.hdd");
    assert_eq!(create_image(&params(other)).unwrap_err().kind(), Kind::Param);
    assert_eq!(fs::read(&dd).unwrap(), b"mine");
    assert_eq!(names(dir.path()), ["DiskDescriptor.xml", "root.hdd"]);
    assert_eq!(create_image(&params(dd)).unwrap_err().kind(), Kind::Param);

    let nowhere = dir.path().join("no/root.hdd");
    assert_eq!(create_image(&params(nowhere)).unwrap_err().kind(), Kind::Creat);
}

#[test]
fn sizes_out_of_range() {
    let dir = tempfile::tempdir().unwrap();
    let p = params(dir.path().join("root.hdd"));
    for case in [
        CreateParams { sectors: 0, ..p.clone() },
        CreateParams { sectors: 2 << 11, ..p.clone() },
        CreateParams { sectors: (16 << 31) + 1, ..p.clone() },
        CreateParams { sectors: 1 << 32, version: Version::V1, fs: None, ..p.clone() },
        CreateParams { sectors: u64::MAX, fs: None, ..p.clone() },
    ] {
        assert_eq!(create_image(&case).unwrap_err().kind(), Kind::Param, "{case:?}");
    }
    let tiny = CreateParams { sectors: 3 << 11, ..p };
    assert_eq!(create_image(&tiny).unwrap_err().kind(), Kind::Mkfs);
    assert!(names(dir.path()).is_empty());
}

#[test]
fn a_leftover_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let scratch = dir.path().join(".ploop-init");
    fs::create_dir_all(scratch.join("root")).unwrap();
    for name in ["image", "fs", "lock", "root/.balloon-c3a5ae3d-ce7f-43c4-a1ea-c61e2b4504e8"] {
        fs::write(scratch.join(name), "half").unwrap();
    }
    create_image(&params(dir.path().join("root.hdd"))).unwrap();
    assert_eq!(names(dir.path()), ["DiskDescriptor.xml", "root.hdd"]);
}

/// Interrupted when the image has its name and the descriptor is not there yet: the same creation completes it, no
/// other one touches it.
#[test]
fn the_last_step_is_completed() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("root.hdd");
    let p = CreateParams { fs: None, ..params(image.clone()) };
    create_image(&p).unwrap();
    let dd = dir.path().join("DiskDescriptor.xml");
    let descriptor = fs::read(&dd).unwrap();
    fs::remove_file(&dd).unwrap();
    let scratch = dir.path().join(".ploop-init");
    fs::create_dir(&scratch).unwrap();
    fs::hard_link(&image, scratch.join("image")).unwrap();
    let inode = fs::metadata(&image).unwrap().ino();

    let larger = CreateParams { sectors: 400 << 11, ..p.clone() };
    assert_eq!(create_image(&larger).unwrap_err().kind(), Kind::Param);
    assert_eq!(fs::metadata(&image).unwrap().ino(), inode);
    create_image(&p).unwrap();
    assert_eq!(fs::metadata(&image).unwrap().ino(), inode);
    assert_eq!(fs::read(&dd).unwrap(), descriptor);
    assert_eq!(names(dir.path()), ["DiskDescriptor.xml", "root.hdd"]);
}

#[test]
fn a_cancelled_creation_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("root.hdd");
    for fs in [None, params(image.clone()).fs] {
        let p = CreateParams { fs, ..params(image.clone()) };
        let _operation = cancel::begin();
        cancel::request();
        let e = create_image(&p).unwrap_err();
        assert!(e.to_string().contains("cancelled"), "{e}");
        assert!(names(dir.path()).is_empty());
        cancel::clear();
        create_image(&p).unwrap();
        fs::remove_file(&image).unwrap();
        fs::remove_file(dir.path().join("DiskDescriptor.xml")).unwrap();
    }
}

/// The balloon file and the partition table are where OpenVZ looks for them.
#[test]
fn partition_at_the_first_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("root.hdd");
    let p = CreateParams {
        mode: ImageMode::Raw,
        cluster: ClusterSize::from_sectors(128).unwrap(),
        ..params(image.clone())
    };
    create_image(&p).unwrap();
    let file = fs::File::open(&image).unwrap();
    let mut magic = [0; 2];
    file.read_exact_at(&mut magic, 128 * 512 + 1024 + 56).unwrap();
    assert_eq!(magic, [0x53, 0xEF]);
    let mut signature = [0; 8];
    for at in [512, file.metadata().unwrap().len() - 512] {
        file.read_exact_at(&mut signature, at).unwrap();
        assert_eq!(&signature, b"EFI PART");
    }
}

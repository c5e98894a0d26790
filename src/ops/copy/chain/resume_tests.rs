//! What of an interrupted try counts, and what does not.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::incoming::MAX_OLD;
use super::kept::Kept;
use super::stream::Kind as What;
use super::tests::{check, disk_of, kept, made, names, received, sent};
use crate::descriptor::ImageMode;
use crate::error::Kind;
use crate::ops::testkit::{self, small};
use crate::sys::store::record;

#[test]
fn nothing_of_a_file_whose_sync_failed_is_kept() {
    let (_source, dd) = disk_of(ImageMode::Expanded, small());
    let whole = sent(&dd, false, Kept::default()).unwrap();
    let mut failed = 0;
    for step in 0.. {
        let dir = testkit::folder();
        let target = dir.path().canonicalize().unwrap().join("target");
        let recorder = record::start(dir.path(), Some((step, libc::EIO)));
        let result = received(&target, &whole);
        if step >= recorder.0.begun() {
            break;
        }
        let Some(file) = recorder.0.failed_sync() else { continue };
        drop(recorder);
        let name = file.file_name().unwrap().to_str().unwrap();
        // The descriptor is written anew by each try.
        if super::names::check(name).is_err() || !name.starts_with("root.hdd") {
            continue;
        }
        let e = result.unwrap_err();
        assert!(e.kind() == Kind::Fsync && e.to_string().contains("is dropped"), "step {step}: {e}");
        assert!(kept(&target).take(name).is_empty(), "step {step}: blocks of {name} are kept");
        assert_eq!(file.metadata().unwrap().len(), 0, "step {step}: {name}");
        received(&target, &sent(&dd, false, kept(&target)).unwrap()).unwrap();
        check(&dd, &target);
        failed += 1;
    }
    assert!(failed >= 3, "{failed} syncs of images failed");
}

#[test]
fn a_sync_that_fails_beside_the_stream_leaves_nothing_either() {
    let dir = testkit::folder();
    let target = dir.path().canonicalize().unwrap().join("target");
    let stream =
        made(&[(What::File, 0, 0, 0, b"root.hdd"), (What::Data, 0, 0, 5, b"12345"), (What::Sync, 0, 0, 0, b"")]);
    let mut failed = false;
    for step in 0..8 {
        let recorder = record::start(dir.path(), Some((step, libc::EIO)));
        received(&target, &stream).unwrap_err();
        let sync = recorder.0.failed_sync().filter(|file| file.ends_with("root.hdd"));
        drop(recorder);
        if let Some(file) = sync {
            assert_eq!(file.metadata().unwrap().len(), 0);
            failed = true;
        }
    }
    assert!(failed);
}

#[test]
fn a_huge_file_of_an_earlier_try_takes_no_memory() {
    let (_source, dd) = disk_of(ImageMode::Expanded, small());
    // A file system with files of such a length.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let target = dir.path().canonicalize().unwrap().join("target");
    let whole = sent(&dd, false, Kept::default()).unwrap();
    received(&target, &whole[..whole.len() - 1]).unwrap_err();
    let half = dir.path().join("target.receiving");
    for name in names(&half).iter().filter(|name| name.starts_with("root.hdd")) {
        let file = File::options().write(true).open(half.join(name)).unwrap();
        file.write_all_at(b"left", 40 << 20).unwrap();
        file.set_len(MAX_OLD + 1).unwrap();
    }
    assert!(kept(&target).take("root.hdd").is_empty());
    received(&target, &whole).unwrap();
    check(&dd, &target);
}

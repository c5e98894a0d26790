//! What of an interrupted try counts, and what does not.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use super::half::MARKER;
use super::incoming::MAX_OLD;
use super::kept::Kept;
use super::receive::{list_kept, receive};
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
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        return crate::testing::skip::skip_on_this_file_system("no /dev/shm");
    };
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

#[test]
fn a_receiver_that_waits_for_its_sender_leaves_the_folder_to_the_list() {
    let (dir, dd) = disk_of(ImageMode::Expanded, small());
    let target = dir.path().canonicalize().unwrap().join("target");
    let whole = sent(&dd, false, Kept::default()).unwrap();
    received(&target, &whole[..whole.len() - 1]).unwrap_err();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let lister = File::open(dir.path().join("target.receiving")).unwrap();
    lister.lock().unwrap();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(&target, theirs.as_fd()));
        // Longer than it takes to begin.
        std::thread::sleep(std::time::Duration::from_millis(200));
        let mut none = Vec::new();
        list_kept(&target, &mut none).unwrap_err();
        assert!(none.is_empty(), "a list that fails has a first line");
        drop(lister);
        let list = kept(&target);
        ours.write_all(&sent(&dd, false, list).unwrap()).unwrap();
        drop(ours);
        assert!(receiver.join().unwrap().unwrap().kept > 0);
    });
    check(&dd, &target);
}

#[test]
fn a_disk_that_was_given_the_name_of_a_half_stays() {
    let (dir, dd) = disk_of(ImageMode::Expanded, small());
    let root = dir.path().canonicalize().unwrap();
    let [target, half] = ["target", "target.receiving"].map(|name| root.join(name));
    let whole = sent(&dd, false, Kept::default()).unwrap();
    let refused = |word: &str| {
        let e = received(&target, &whole).unwrap_err();
        assert!(e.kind() == Kind::Creat && e.to_string().contains(word), "{e}");
        let e = list_kept(&target, &mut Vec::new()).unwrap_err();
        assert!(e.to_string().contains(word), "{e}");
    };
    // One that was received: no mark is left in it.
    received(&target, &whole).unwrap();
    std::fs::rename(&target, &half).unwrap();
    let before = names(&half);
    refused("it is a disk");
    assert_eq!(names(&half), before);
    std::fs::remove_file(half.join("DiskDescriptor.xml")).unwrap();
    refused(MARKER);
    // A folder of a receiver, with an image that is in use.
    std::fs::write(half.join(MARKER), "").unwrap();
    let image = File::options().read(true).write(true).open(half.join("root.hdd")).unwrap();
    image.lock().unwrap();
    let len = image.metadata().unwrap().len();
    let e = received(&target, &whole).unwrap_err();
    assert!(e.kind() == Kind::Busy && image.metadata().unwrap().len() == len, "{e}");
    drop(image);
    received(&target, &whole).unwrap();
    check(&dd, &target);
    // A folder in which nothing is yet, and one of a receiver that got nothing.
    std::fs::remove_dir_all(&target).unwrap();
    std::fs::create_dir(&half).unwrap();
    received(&target, &whole).unwrap();
    std::fs::remove_dir_all(&target).unwrap();
    received(&target, &made(&[(What::Data, 0, 0, 5, b"12345")])).unwrap_err();
    assert_eq!(names(&root), ["source"]);
}

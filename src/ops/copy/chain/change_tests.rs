//! Disks that change while they are sent, and where their stream goes.

use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;

use super::kept::Kept;
use super::send::send;
use super::tests::{disk, received};
use crate::descriptor::{Descriptor, FILE_NAME, ImageMode};
use crate::error::Kind;
use crate::ops::copy::send::Stop;
use crate::ops::snapshot;
use crate::ops::switch::{SwitchParams, switch};
use crate::ops::testkit::{self, g};
use crate::sys::store::record;

#[test]
fn an_image_that_goes_while_another_is_sent_is_left_out() {
    let (dir, dd) = disk(ImageMode::Preallocated);
    // The image of the second snapshot is a frozen leaf then.
    switch(&dd, "", &SwitchParams { guid: g(1), guid_old: None, keep_top: false, no_new_top: false }).unwrap();
    let before = Descriptor::read(&dd).unwrap();
    let base = before.images[0].guid;
    assert!(base == g(1) && before.images.iter().any(|i| i.guid == g(2)), "{before:?}");
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut stream = vec![0; 1000];
    std::thread::scope(|scope| {
        let dd = &dd;
        let sender = scope.spawn(move || send(dd, theirs.into(), false, Kept::default(), Stop::default()));
        // The first image is larger than what the socket holds: it is under way, and the second one's turn has not come.
        ours.read_exact(&mut stream).unwrap();
        snapshot::delete(dd, &g(2)).unwrap();
        ours.read_to_end(&mut stream).unwrap();
        sender.join().unwrap().unwrap();
    });
    let target = dir.path().canonicalize().unwrap().join("target");
    received(&target, &stream).unwrap();
    let [there, here] = [target.join(FILE_NAME), dd].map(|path| Descriptor::read(&path).unwrap());
    assert_eq!((there.snapshots, there.images.len()), (here.snapshots, here.images.len()));
    assert!(here.images.len() < before.images.len());
}

#[test]
fn a_disk_that_is_sent_to_a_file_is_durable_there() {
    let (_source, dd) = disk(ImageMode::Expanded);
    let dir = testkit::folder();
    let path = dir.path().canonicalize().unwrap().join("stream");
    let recorder = record::start(dir.path(), Some((0, libc::EIO)));
    let into = |file: File| send(&dd, file.into(), false, Kept::default(), Stop::default());
    let e = into(File::create(&path).unwrap()).unwrap_err();
    assert!(e.kind() == Kind::Fsync && recorder.0.failed_sync() == Some(path.clone()), "{e}");
    drop(recorder);
    into(File::create(&path).unwrap()).unwrap();
}

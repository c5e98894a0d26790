//! Streams that a sender, or something else, may send.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::wire::{self, Packet};
use super::{Received, receive};
use crate::error::{Kind, Result};
use crate::sys::store::record::{self, Thing};

fn data(offset: u64, bytes: &[u8]) -> Vec<u8> {
    let mut packet = wire::head(Packet::Data { offset, len: bytes.len() as u32 }).to_vec();
    packet.extend_from_slice(bytes);
    packet
}

fn sync() -> Vec<u8> {
    [&wire::head(Packet::Sync)[..], b"With"].concat()
}

fn end() -> Vec<u8> {
    wire::head(Packet::End).to_vec()
}

/// Receives a stream that is this and no more; the answers.
fn receive_stream(file: &Path, stream: &[u8]) -> (Result<Received>, Vec<u8>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (mut answers, feedback) = UnixStream::pair().unwrap();
    let result = std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut ours = ours;
            // A receiver that has seen enough closes its end.
            let _ = ours.write_all(stream);
        });
        let result = receive(file, theirs.as_fd(), Some(feedback.as_fd()));
        drop(theirs);
        result
    });
    drop(feedback);
    let mut answered = Vec::new();
    answers.read_to_end(&mut answered).unwrap();
    (result, answered)
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().canonicalize().unwrap().join("root.hds");
    (dir, file)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Two syncs, a packet over another, a hole.
fn usual() -> (Vec<u8>, Vec<u8>) {
    let stream = [
        data(0, &[1; 4096]),
        data(1 << 20, &[2; 8192]),
        sync(),
        data(1024, &[3; 5]),
        data(4096, &[4; 512]),
        sync(),
        data(0, &[5; 512]),
        end(),
    ];
    let mut want = vec![0; (1 << 20) + 8192];
    want[..4096].fill(1);
    want[1 << 20..].fill(2);
    want[1024..1029].fill(3);
    want[4096..4608].fill(4);
    want[..512].fill(5);
    (stream.concat(), want)
}

#[test]
fn a_copy_is_received() {
    let (dir, file) = folder();
    let (stream, want) = usual();
    let (received, answers) = receive_stream(&file, &stream);
    assert_eq!(received.unwrap(), Received { bytes: 4096 + 8192 + 5 + 512 + 512, syncs: 2 });
    assert_eq!(answers, b"SUCCESS\nSUCCESS\n");
    assert_eq!(std::fs::read(&file).unwrap(), want);
    let meta = file.metadata().unwrap();
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    assert!(meta.blocks() * 512 < 1 << 19, "holes stay holes: {} blocks", meta.blocks());
    assert_eq!(names(dir.path()), ["root.hds"]);
}

#[test]
fn a_stream_of_nothing_is_an_empty_file() {
    let (_dir, file) = folder();
    assert_eq!(receive_stream(&file, &end()).0.unwrap(), Received::default());
    assert_eq!(file.metadata().unwrap().len(), 0);
}

#[test]
fn a_stream_that_ends_anywhere_leaves_nothing() {
    let (dir, file) = folder();
    let stream = [data(0, &[1; 40]), sync(), data(7, &[2; 9]), end()].concat();
    for len in 0..stream.len() {
        let e = receive_stream(&file, &stream[..len]).0.unwrap_err();
        assert_eq!(e.kind(), Kind::Read, "{len}: {e}");
        assert!(names(dir.path()).is_empty(), "{len}: {:?}", names(dir.path()));
    }
}

#[test]
fn a_stream_of_something_else_leaves_nothing() {
    let (dir, file) = folder();
    let good = data(0, &[1; 512]);
    for len in [wire::MAX_PAYLOAD + 1, u32::MAX] {
        let mut bad = wire::head(Packet::Data { offset: 0, len: 512 });
        bad[4..8].copy_from_slice(&len.to_ne_bytes());
        let e = receive_stream(&file, &[&good[..], &bad].concat()).0.unwrap_err();
        assert_eq!(e.kind(), Kind::Protocol, "{e}");
    }
    let e = receive_stream(&file, &[&good[..], b"GET / HTTP/1.1\r\n\r\n"].concat()).0.unwrap_err();
    assert!(e.kind() == Kind::Protocol && e.to_string().contains("where a packet begins"), "{e}");
    assert!(names(dir.path()).is_empty());
}

#[test]
fn only_pipes_and_sockets_are_taken() {
    let (dir, file) = folder();
    let plain = std::fs::File::create_new(dir.path().join("stream")).unwrap();
    plain.write_all_at(&end(), 0).unwrap();
    assert_eq!(receive(&file, plain.as_fd(), None).unwrap_err().kind(), Kind::Param);
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(&end()).unwrap();
    assert_eq!(receive(&file, reader.as_fd(), Some(plain.as_fd())).unwrap_err().kind(), Kind::Param);
    receive(&file, reader.as_fd(), None).unwrap();
    assert_eq!(names(dir.path()), ["root.hds", "stream"]);
}

#[test]
fn what_exists_stays() {
    let (dir, file) = folder();
    std::fs::write(&file, b"mine").unwrap();
    let (e, _) = receive_stream(&file, &usual().0);
    assert_eq!(e.unwrap_err().kind(), Kind::Creat);
    assert_eq!(receive_stream(Path::new("/dev/null"), &end()).0.unwrap_err().kind(), Kind::Creat);
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");
    // A dangling link is a name that is taken.
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    assert_eq!(receive_stream(&link, &end()).0.unwrap_err().kind(), Kind::Creat);
    assert_eq!(names(dir.path()), ["link", "root.hds"]);
}

#[test]
fn what_a_killed_receiver_left_is_removed_and_a_running_one_is_not_disturbed() {
    let (dir, file) = folder();
    let left = dir.path().join("root.hds.receiving");
    std::fs::write(&left, b"half").unwrap();
    let holder = std::fs::File::open(&left).unwrap();
    holder.lock().unwrap();
    let e = receive_stream(&file, &end()).0.unwrap_err();
    assert!(e.kind() == Kind::Creat && e.to_string().contains("another process"), "{e}");
    assert_eq!(std::fs::read(&left).unwrap(), b"half");
    drop(holder);
    let (stream, want) = usual();
    receive_stream(&file, &stream).0.unwrap();
    assert_eq!(std::fs::read(&file).unwrap(), want);
    assert_eq!(names(dir.path()), ["root.hds"]);
    // No file of a receiver has this name.
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&left).unwrap();
    assert_eq!(receive_stream(&file, &end()).0.unwrap_err().kind(), Kind::Creat);
    assert_eq!(names(dir.path()), ["root.hds.receiving"]);
}

/// What has the name is whole, whatever a kill or a power cut leaves; with syncs taken away this test must fail.
fn worst_of_all_crashes(ignored: Option<Thing>) -> std::result::Result<usize, String> {
    let (stream, want) = usual();
    let (dir, file) = folder();
    let recorder = record::start(dir.path(), None);
    if let Some(thing) = ignored {
        recorder.0.ignore_syncs(thing);
    }
    receive_stream(&file, &stream).0.unwrap();
    let steps = recorder.0.steps();
    for at in 0..=steps {
        for kind in 0..4 {
            let after = tempfile::tempdir().unwrap();
            recorder.0.crash(at, after.path(), &mut |thing, _| match kind {
                0 => true,
                1 => false,
                2 => thing == Thing::Name,
                _ => thing == Thing::Data,
            });
            match std::fs::read(after.path().join("root.hds")) {
                Ok(got) if got != want => return Err(format!("step {at} of {steps}: the file is not whole")),
                Err(_) if at == steps => return Err("the copy is gone though it was said to be done".into()),
                _ => {}
            }
        }
    }
    Ok(steps)
}

#[test]
fn crashes_of_a_receiver() {
    assert!(worst_of_all_crashes(None).unwrap() > 10);
    worst_of_all_crashes(Some(Thing::Data)).unwrap_err();
    worst_of_all_crashes(Some(Thing::Name)).unwrap_err();
}

#[test]
fn a_failing_step_is_an_error_and_leaves_nothing_under_the_name() {
    let (stream, _) = usual();
    for step in 0.. {
        let (dir, file) = folder();
        let recorder = record::start(dir.path(), Some((step, libc::EIO)));
        let (result, answers) = receive_stream(&file, &stream);
        let over = recorder.0.begun() <= step;
        drop(recorder);
        if over {
            assert!(step > 10 && result.is_ok(), "{step}");
            return;
        }
        // The last step makes the name durable: all of it is there by then.
        assert!(result.is_err(), "{step}");
        assert!(names(dir.path()).iter().all(|n| n != "root.hds.receiving"), "{step}: {:?}", names(dir.path()));
        let whole = std::fs::read(&file).is_ok_and(|got| got == usual().1);
        assert!(whole || !file.exists(), "{step}");
        // A failed sync was said to be one.
        assert!(answers.chunks(8).all(|a| a == wire::SUCCESS || a == wire::FAILURE));
    }
}

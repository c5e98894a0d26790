//! What is left when supervisor and worker of a device are both killed: writes that were answered and not flushed, and
//! syncs that have failed.

mod device_common;

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use device_common::*;
use ploop::Kind;
use ploop::device::{self, AttachSpec, Device, NewLevel, SwitchSpec};
use ploop::ops::check::{CheckOptions, check_image};
use ploop::ops::merge::merge_files;
use ploop::server::proto::Marked;
use ploop::server::{runtime, shm};
use ploop::sys::aligned::AlignedBuf;
use ploop::sys::file_id::FileId;

const BLOCK: usize = 4096;

/// Kills supervisor and worker; the worker is stopped first, so that it has no time for a new supervisor.
fn kill_both(device: &Device) {
    let record = record(device.name());
    let pid = nix::unistd::Pid::from_raw(record.worker.pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    kill(record.supervisor);
    kill(record.worker);
}

/// Writes a block past the page cache, without a flush.
fn write_unflushed(node: &Path, at: u64, seed: u64) {
    let mut buf = AlignedBuf::new(BLOCK);
    buf.copy_from_slice(&pattern(seed, BLOCK));
    let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(node).unwrap();
    file.write_all_at(&buf, at).unwrap();
}

/// Blocks in clusters of their own, each of which the device has as new. Then supervisor and worker are killed, and what
/// is left of the device is removed.
fn left_unflushed(t: &Bench, image: &Path) -> FileId {
    let device = t.attach(image).unwrap();
    (0..20).for_each(|n| write_unflushed(device.node(), n << 20, n + 1));
    kill_both(&device);
    device::clean(device.name()).unwrap();
    t.assert_gone(&device);
    FileId::at(image).unwrap()
}

fn waits(top: FileId) -> bool {
    device::unflushed(&[top]).unwrap().is_some()
}

#[test]
fn both_killed_before_a_flush() {
    let Some(t) = Bench::new("both_killed_before_a_flush") else { return };
    let image = t.image("a.hdd", "64M");
    let top = left_unflushed(&t, &image);
    assert!(waits(top));
    let shown = ploop::ops::doctor::devices();
    assert!(
        shown.iter().any(|f| f.text.contains(&image.display().to_string()) && f.text.contains("wait")),
        "{shown:?}"
    );
    // The file alone is older than what was answered.
    let e = check_image(&image, &CheckOptions { drop_inuse: true, ..CheckOptions::default() }).unwrap_err();
    assert!(e.kind() == Kind::Busy && e.to_string().contains("ploop mount"), "{e}");
    let e = merge_files(&[t.image("b.hdd", "64M"), image.clone()], false, None).unwrap_err();
    assert!(e.kind() == Kind::Busy && e.to_string().contains("ploop mount"), "{e}");
    // Read only it is shown as it is, and nothing is lost by that.
    let device = device::attach(AttachSpec { read_only: true, marked: Marked::Recover, ..t.spec(&image) }).unwrap();
    device::detach(device.name()).unwrap();
    // As a level of another chain it is refused.
    let mut other = t.spec(&image);
    other.levels.splice(..0, t.spec(&t.image("base.hdd", "64M")).levels);
    let e = device::attach(other).unwrap_err();
    assert!(e.kind() == Kind::Busy && e.to_string().contains("20 changes"), "{e}");
    assert!(waits(top));
    // Killed again, before and after what was written anew is flushed.
    for round in 1..=2 {
        let device = t.attach(&image).unwrap();
        assert!(!waits(top));
        for n in 0..20 {
            assert_eq!(read_at(device.node(), n << 20, BLOCK), pattern(n + 1, BLOCK), "round {round}, block {n}");
        }
        write_unflushed(device.node(), (20 + round) << 20, 20 + round);
        if round == 2 {
            OpenOptions::new().write(true).open(device.node()).unwrap().sync_all().unwrap();
        }
        kill_both(&device);
    }
    let mut spec = t.spec(&image);
    spec.marked = Marked::Recover;
    let device = device::attach(spec).unwrap();
    for n in (0..20).chain(21..23) {
        let seed = if n < 20 { n + 1 } else { n };
        assert_eq!(read_at(device.node(), n << 20, BLOCK), pattern(seed, BLOCK), "block {n}");
    }
    device::detach(device.name()).unwrap();
    t.assert_gone(&device);
    t.sound(&image);
}

#[test]
fn changes_of_an_image_that_was_closed_since_are_dropped() {
    let Some(t) = Bench::new("changes_of_an_image_that_was_closed_since_are_dropped") else { return };
    let image = t.image("a.hdd", "64M");
    let top = left_unflushed(&t, &image);
    // As another program's check leaves it.
    OpenOptions::new().write(true).open(&image).unwrap().write_all_at(&[0; 4], 44).unwrap();
    let device = t.attach(&image).unwrap();
    assert!(!waits(top));
    assert_eq!(read_at(device.node(), 0, BLOCK), vec![0; BLOCK]);
    device::detach(device.name()).unwrap();
    t.sound(&image);
}

#[test]
fn a_failed_sync_stays_failed_when_both_are_killed() {
    let Some(t) = Bench::new("a_failed_sync_stays_failed_when_both_are_killed") else { return };
    let image = t.image("a.hdd", "64M");
    let flush = |device: &Device| OpenOptions::new().write(true).open(device.node()).and_then(|f| f.sync_all());
    let device = t.attach(&image).unwrap();
    write_unflushed(device.node(), 0, 1);
    flush(&device).unwrap();
    kill_both(&device);
    // As a worker leaves it whose sync has failed.
    let memory = runtime::device_dir(device.name()).join(runtime::MEMORY);
    shm::open_file(&memory).unwrap().1.set_failed();
    let device = t.attach(&image).unwrap();
    assert_eq!(read_at(device.node(), 0, BLOCK), pattern(1, BLOCK));
    write_unflushed(device.node(), 1 << 20, 2);
    let fails = |after: &str| {
        for _ in 0..2 {
            assert_eq!(flush(&device).unwrap_err().raw_os_error(), Some(libc::EIO), "after {after}");
        }
    };
    fails("the mount");
    let worker = record(device.name()).worker;
    kill(worker);
    within(20, "another worker", || {
        let r = record(device.name());
        (r.worker != worker && runtime::alive(r.worker)).then_some(())
    });
    fails("the worker's death");
    let supervisor = record(device.name()).supervisor;
    kill(supervisor);
    within(20, "another supervisor", || {
        let r = record(device.name());
        (r.supervisor != supervisor && runtime::alive(r.supervisor)).then_some(())
    });
    fails("the supervisor's death");
    // Nothing that needs a flush of the chain begins.
    assert_eq!(device::reload(device.name()).unwrap_err().kind(), Kind::Fsync);
    fails("a reload");
    let top = t.image("top.hdd", "64M");
    let fd = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&top).unwrap();
    let new = NewLevel::File { path: top, raw: false, fd: fd.into() };
    let spec = SwitchSpec { levels: vec![NewLevel::Kept(0), new], commit: None, linger: 0 };
    assert_eq!(device::switch(&device, &spec, &mut |_| {}).unwrap_err().kind(), Kind::Fsync);
    assert_eq!(record(device.name()).levels.len(), 1);
    fails("a change of the chain");
    // It is told when the device ends, and is over with that.
    assert_eq!(device::detach(device.name()).unwrap_err().kind(), Kind::Fsync);
    t.assert_gone(&device);
    assert!(!waits(FileId::at(&image).unwrap()));
    let device = device::attach(AttachSpec { marked: Marked::Recover, ..t.spec(&image) }).unwrap();
    assert_eq!(read_at(device.node(), 0, BLOCK), pattern(1, BLOCK));
    flush(&device).unwrap();
    device::detach(device.name()).unwrap();
    t.sound(&image);
}

//! Flushes on a full host file system, or under a quota that is used up: they wait for the space that a BAT page or a
//! sync needs, and nothing is lost. The file systems that allocate for a rewrite: XFS after a reflink copy, and btrfs.

mod device_common;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;

use device_common::*;
use ploop::device::{self, Device, State};
use ploop::server::runtime;
use ploop::sys::aligned::AlignedBuf;

const MIB: u64 = 1 << 20;

/// A small file system of its own, in a file.
struct Host(PathBuf);

impl Host {
    fn new(t: &Bench, kind: &str, size: &str) -> Host {
        let (file, folder) = (t.dir.path().join(format!("{kind}.fs")), t.dir.path().join(kind));
        run(Command::new("truncate").args(["-s", size]).arg(&file));
        run(Command::new(format!("mkfs.{kind}")).arg("-q").arg(&file));
        fs::create_dir(&folder).expect("folder");
        run(Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&folder));
        Host(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Takes all the space there is, to the last block.
    fn fill(&self) {
        let ballast = |n| File::create(self.path(&format!("ballast{n}"))).expect("ballast");
        for (ballast, step) in [(ballast(0), 16 * MIB), (ballast(1), MIB), (ballast(2), 4096)] {
            let block = vec![0xBA; step as usize];
            let mut at = 0;
            while ballast.write_all_at(&block, at).and_then(|()| ballast.sync_data()).is_ok() {
                at += step;
            }
        }
    }

    fn make_room(&self) {
        for n in 0..3 {
            fs::remove_file(self.path(&format!("ballast{n}"))).expect("ballast");
        }
        run(Command::new("sync").arg("-f").arg(&self.0));
    }
}

impl Drop for Host {
    /// After a failure threads of the test may still wait for space.
    fn drop(&mut self) {
        for n in 0..3 {
            let _ = fs::remove_file(self.path(&format!("ballast{n}")));
        }
        let _ = output(Command::new("btrfs").args(["quota", "disable"]).arg(&self.0));
        for device in device::list().unwrap_or_default().iter().filter(|d| d.top().starts_with(&self.0)) {
            let log = runtime::device_dir(device.name()).join(runtime::LOG);
            eprintln!("{}: {:?}, {}", device.name(), device.state, fs::read_to_string(log).unwrap_or_default());
            pause(2000);
            let _ = device::detach(device.name());
        }
        let _ = output(Command::new("umount").arg(&self.0));
    }
}

fn image(path: &Path) {
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "parallels", "-o", "cluster_size=65536"])
        .arg(path)
        .arg("64M"));
}

fn reflink(from: &Path, to: &Path) {
    run(Command::new("cp").arg("--reflink=always").arg(from).arg(to));
}

fn write(node: &Path, at: u64, seed: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(node)?;
    let mut buf = AlignedBuf::new(65536);
    buf.copy_from_slice(&pattern(seed, 65536));
    file.write_all_at(&buf, at)?;
    file.sync_data()
}

fn is_there(node: &Path, at: u64, seed: u64) -> bool {
    read_at(node, at, 65536) == pattern(seed, 65536)
}

fn state(device: &Device) -> Option<State> {
    device::by_node(&device.node().to_string_lossy()).expect("state").map(|d| d.state)
}

fn begin(node: &Path, at: u64, seed: u64) -> JoinHandle<io::Result<()>> {
    let node = node.to_owned();
    std::thread::spawn(move || write(&node, at, seed))
}

/// Ends the device, and looks at what a new one of the same image has.
fn again(t: &Bench, device: Device, image: &Path, wanted: &[(u64, u64)]) {
    device::detach(device.name()).expect("detach");
    t.sound(image);
    let device = t.attach(image).expect("attach again");
    for (at, seed) in wanted {
        assert!(is_there(device.node(), *at, *seed), "what was flushed at {at} is gone");
    }
    device::detach(device.name()).expect("detach again");
}

/// The BAT of an image that shares its blocks with a copy has its own ones from the attach on.
#[test]
fn a_flush_into_a_reflink_copied_image_needs_no_space_on_a_full_xfs() {
    let Some(t) = Bench::new("a_flush_into_a_reflink_copied_image_needs_no_space_on_a_full_xfs") else { return };
    let host = Host::new(&t, "xfs", "320M");
    let top = host.path("top");
    image(&top);
    reflink(&top, &host.path("copy"));
    let device = t.attach(&top).expect("attach");
    // Takes space ahead.
    write(device.node(), 0, 1).expect("first write");
    host.fill();
    write(device.node(), MIB, 2).expect("write with a full host");
    assert_eq!(state(&device), Some(State::Running));
    host.make_room();
    again(&t, device, &top, &[(0, 1), (MIB, 2)]);
}

/// A copy that is made while the disk runs shares the BAT anew: the flush waits.
#[test]
fn a_flush_waits_for_the_space_of_a_bat_page_on_a_full_xfs() {
    let Some(t) = Bench::new("a_flush_waits_for_the_space_of_a_bat_page_on_a_full_xfs") else { return };
    let host = Host::new(&t, "xfs", "320M");
    let top = host.path("top");
    image(&top);
    let device = t.attach(&top).expect("attach");
    write(device.node(), 0, 1).expect("first write");
    reflink(&top, &host.path("copy"));
    host.fill();
    let writer = begin(device.node(), MIB, 2);
    within(20, "the state no-space", || (state(&device) == Some(State::NoSpace)).then_some(()));
    pause(1500);
    assert!(!writer.is_finished(), "a flush was answered without space for its BAT page");
    host.make_room();
    writer.join().expect("writer").expect("a flush that waited");
    within(10, "the state running", || (state(&device) == Some(State::Running)).then_some(()));
    again(&t, device, &top, &[(0, 1), (MIB, 2)]);
}

/// btrfs allocates for each rewrite, and at each commit.
#[test]
fn flushes_wait_on_a_full_btrfs_and_under_a_used_up_quota() {
    let Some(t) = Bench::new("flushes_wait_on_a_full_btrfs_and_under_a_used_up_quota") else { return };
    let host = Host::new(&t, "btrfs", "256M");
    for quota in [false, true] {
        let folder = host.path(if quota { "limited" } else { "free" });
        run(Command::new("btrfs").args(["subvolume", "create"]).arg(&folder));
        if quota {
            run(Command::new("btrfs").args(["quota", "enable"]).arg(&host.0));
        }
        let top = folder.join("top");
        image(&top);
        let device = t.attach(&top).expect("attach");
        write(device.node(), 0, 1).expect("first write");
        // Through the subvolume itself the limit could not be raised again: that takes a transaction under the limit.
        let id = run(Command::new("btrfs").args(["inspect-internal", "rootid"]).arg(&folder));
        let group = format!("0/{}", id.trim());
        let limit = |size: &str| run(Command::new("btrfs").args(["qgroup", "limit", size, &group]).arg(&host.0));
        match quota {
            true => drop(limit("1M")),
            false => host.fill(),
        }
        let writers: Vec<_> = (1..24).map(|i| begin(device.node(), i * MIB, i + 1)).collect();
        within(30, "the state no-space", || (state(&device) == Some(State::NoSpace)).then_some(()));
        pause(1500);
        assert!(writers.iter().any(|w| !w.is_finished()), "nothing waits for space");
        match quota {
            true => drop(limit("none")),
            false => host.make_room(),
        }
        for writer in writers {
            writer.join().expect("writer").expect("a write and a flush that waited");
        }
        within(10, "the state running", || (state(&device) == Some(State::Running)).then_some(()));
        let wanted: Vec<(u64, u64)> = (0..24).map(|i| (i * MIB, i + 1)).collect();
        again(&t, device, &top, &wanted);
    }
}

/// Operations that find no space end with a message that says so, leave no file behind, and the disk as it was.
#[test]
fn operations_on_a_full_host_leave_the_disk_as_it_was() {
    let Some(t) = Bench::new("operations_on_a_full_host_leave_the_disk_as_it_was") else { return };
    if !common::skip::program("mkfs.ext4") {
        return;
    }
    let host = Host::new(&t, "ext4", "160M");
    let ploop = |args: &[&str]| {
        let mut command = Command::new("timeout");
        command.arg("60").arg(env!("CARGO_BIN_EXE_ploop")).args(args);
        output(&mut command)
    };
    let right = |args: &[&str]| {
        let out = ploop(args);
        assert!(out.status.success(), "{args:?}: {out:?}");
    };
    let (image, dd, mnt) = (host.path("root.hds"), host.path("DiskDescriptor.xml"), t.dir.path().join("mnt"));
    let node = format!("/dev/ploop-test-{}-full-host", std::process::id());
    let [image, dd] = [image.to_str().unwrap(), dd.to_str().unwrap()];
    let mount = || right(&["mount", "-d", &node, dd]);
    fs::create_dir(&mnt).unwrap();
    right(&["init", "-s", "64m", "-t", "none", "-b", "64", image]);
    mount();
    for i in 0..24 {
        write(Path::new(&node), i * 2 * MIB, i).unwrap();
    }
    right(&["snapshot", dd]);
    for i in 0..8 {
        write(Path::new(&node), i * 3 * MIB, 100 + i).unwrap();
    }
    let content = || {
        let out = output(Command::new("sha256sum").stdin(File::open(&node).unwrap()));
        String::from_utf8(out.stdout).unwrap()
    };
    let names = || {
        let mut names: Vec<_> = fs::read_dir(&host.0).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = content();
    fs::create_dir(host.path("sub")).unwrap();
    host.fill();
    let files = names();
    let full = |args: &[&str]| {
        let out = ploop(args);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && out.status.code() != Some(124), "{args:?}: {out:?}");
        assert!(said.contains("No space left"), "{args:?}: {said}");
        assert_eq!(names(), files, "{args:?}");
    };
    let beside = host.path("beside");
    let beside = beside.to_str().unwrap();
    full(&["snapshot", dd]);
    full(&["snapshot", "-d", &node, beside]);
    full(&["copy", "-s", &node, "-d", beside]);
    let sub = host.path("sub");
    full(&["init", "-s", "32m", "-t", "none", "-f", "preallocated", sub.join("root.hds").to_str().unwrap()]);
    assert_eq!(fs::read_dir(&sub).unwrap().count(), 0);
    full(&["grow", "-s", "40g", dd]);
    assert_eq!(content(), before);

    right(&["umount", dd]);
    // What the device has freed is used up, too.
    host.fill();
    full(&["snapshot", dd]);
    full(&["convert", "-f", "preallocated", dd]);
    full(&["convert", "-f", "raw", dd]);
    full(&["grow", "-s", "40g", dd]);
    full(&["snapshot-merge", "-A", "-n", beside, dd]);
    right(&["check", dd]);
    mount();
    assert_eq!(content(), before);
    // With room again nothing is in the way.
    host.make_room();
    right(&["grow", "-s", "4g", dd]);
    right(&["snapshot-merge", "-A", dd]);
    right(&["umount", dd]);
    right(&["check", dd]);
}

//! Errors of the file underneath: EIO, ENOSPC and short transfers at each operation in turn, below a real device.
//!
//! `PLOOP_TEST=full` tries every operation of the scene with every fault; otherwise some of them are taken
//! (`FAULTS_AT=N` tries that one alone).

#[path = "../device_common/mod.rs"]
mod device_common;
mod disk;
mod file;

use std::path::Path;
use std::time::Duration;

use device_common::{Bench, within};
use disk::{CLUSTER, MAPPED, User};
use file::{Fault, FaultyFile};
use ploop::chain::Marked;
use ploop::device::{self, Device, State};
use ploop::image::check::{CheckOptions, check_file};

/// Not a test by itself: the process that serves a faulty file.
#[test]
fn served() {
    file::serve_if_asked();
}

/// How a scene went.
struct Seen {
    log: String,
    hit: bool,
    /// Errors that the user of the device saw, and the state in which the device was before it was detached.
    errors: Vec<String>,
    state: Option<State>,
    attach: Result<(), String>,
    detach: Result<(), String>,
}

fn attach(t: &Bench, file: &FaultyFile, base: Option<&Path>) -> ploop::Result<Device> {
    let mut spec = t.spec(&file.0.path);
    if let Some(base) = base {
        spec.levels.splice(..0, t.spec(base).levels);
    }
    spec.marked = Marked::Recover;
    device::attach(spec)
}

/// Attaches, writes to old and new clusters, flushes, zeroes, overwrites, reads, detaches; with the fault at operation
/// `at`. Whatever happens, what the user was told must be true.
fn scene(t: &Bench, name: &str, delta: bool, at: usize, fault: Fault) -> Seen {
    let real = t.dir.path().join(format!("{name}.real"));
    let path = t.dir.path().join(name);
    disk::make(&real, delta);
    let base = t.dir.path().join("base");
    disk::make(&base, false);
    let base = delta.then_some(base.as_path());
    let mut file = FaultyFile::mount(&path, &real);
    file.arm(at, fault);
    let mut seen =
        Seen { log: String::new(), hit: false, errors: Vec::new(), state: None, attach: Ok(()), detach: Ok(()) };
    let user = match attach(t, &file, base) {
        Err(e) => {
            seen.attach = Err(e.to_string());
            None
        }
        Ok(device) => {
            let mut user = User::new(device.node());
            let per = CLUSTER / disk::BLOCK;
            // Of old clusters, of new ones in two rows, all over again after a flush.
            for (i, block) in [0, 1, 9, per * 100, per * 100 + 3, per * 700].into_iter().enumerate() {
                user.write(block, 0x81 + i as u8);
            }
            user.flush();
            user.read_all();
            user.zero(u64::from(MAPPED) - 1);
            user.zero(100);
            user.write(per * 700 + 1, 0x91);
            user.write(per * 1500, 0x92);
            user.flush();
            user.write(per * 100 + 1, 0x93);
            user.write(0, 0x94);
            user.read_all();
            user.flush();
            user.read_all();
            seen.state = device::by_node(&device.node().to_string_lossy()).ok().flatten().map(|d| d.state);
            seen.errors = std::mem::take(&mut user.errors);
            let node = device.node().to_owned();
            let user = user.done();
            seen.detach = device::detach(device.name()).map_err(|e| e.to_string());
            assert!(device::by_node(&node.to_string_lossy()).expect("list").is_none(), "{name}: still there");
            Some(user)
        }
    };
    seen.log = file.log();
    seen.hit = file.was_hit();
    drop(file);
    // Where the very last write fails, the one that clears the mark, it can have arrived: all else had by then.
    let clean = seen.attach.is_ok() && (seen.detach.is_ok() || !disk::is_marked(&real));
    if seen.detach.is_ok() && seen.attach.is_ok() {
        assert!(!disk::is_marked(&real), "{name}: detached well, and the image is marked");
    } else if clean {
        let at_the_end = seen.hit && seen.log.rfind('t').is_none_or(|cut| at > cut);
        assert!(at_the_end, "{name}: not closed cleanly ({:?}), and the mark is gone", seen.detach);
    }
    let options =
        CheckOptions { force: true, check: true, drop_inuse: true, repair_sparse: true, ..CheckOptions::default() };
    if let Err(e) = check_file(&real, None, &options) {
        panic!("{name}: afterwards check says {e}");
    }
    if let Some(user) = user {
        let chain: Vec<&Path> = [Some(real.as_path()), base].into_iter().flatten().collect();
        user.compare(&chain, !clean);
    }
    seen
}

/// What rule there is for a fault of an operation of this kind.
fn judge(what: &str, kind: char, fault: Fault, seen: &Seen) {
    let quiet = seen.attach.is_ok() && seen.detach.is_ok() && seen.errors.is_empty();
    let told = || {
        format!(
            "{what}: attach {:?}, errors {:?}, state {:?}, detach {:?}",
            seen.attach, seen.errors, seen.state, seen.detach
        )
    };
    match (fault, kind) {
        // Gone on with. (Of a write that is short FUSE makes EIO unless it is a synchronous one.)
        (Fault::Short, 'r') => assert!(quiet, "{}", told()),
        (Fault::NoSpace, 'w' | 'a') if seen.attach.is_ok() => {
            // A zeroing may be refused for want of space; nothing else is.
            let other = seen.errors.iter().any(|e| !e.starts_with("zero"));
            assert!(!other && seen.detach.is_ok(), "{}", told());
        }
        // A BAT write waits for space, one that sets or clears the mark is refused.
        (Fault::NoSpace, 'b') => {
            assert!(seen.errors.is_empty() && seen.state != Some(State::Failed), "{}", told());
        }
        // A failed sync or BAT write is final: all flushes after it fail, and so does closing.
        (_, 's' | 'b') if seen.attach.is_ok() && seen.errors.iter().any(|e| e.starts_with("flush")) => {
            assert_eq!(seen.state, Some(State::Failed), "{}", told());
            assert!(seen.detach.is_err(), "{}", told());
        }
        (Fault::Eio | Fault::NoSpace, 's' | 'b') => assert!(!quiet, "it goes unnoticed: {}", told()),
        (Fault::Eio | Fault::Short, 'w' | 't') => {
            // Some of it is only for other programs' comfort (completing an image); of all else somebody is told.
            let noticed = !quiet;
            assert!(noticed || seen.hit, "{}", told());
        }
        _ => {}
    }
}

#[test]
fn each_operation_fails_once() {
    let Some(t) = Bench::new("each_operation_fails_once") else { return };
    each(&t, false);
}

/// With an image below, so that clusters are copied up.
#[test]
fn each_operation_of_a_delta_fails_once() {
    let Some(t) = Bench::new("each_operation_of_a_delta_fails_once") else { return };
    each(&t, true);
}

fn each(t: &Bench, delta: bool) {
    let none = scene(t, "none", delta, usize::MAX - 1, Fault::Eio);
    assert!(
        none.attach.is_ok() && none.detach.is_ok() && none.errors.is_empty(),
        "{:?} {:?} {:?}",
        none.attach,
        none.errors,
        none.detach
    );
    let log = none.log.clone();
    println!("{} operations without a fault: {log}", log.len());
    let only: Option<usize> = std::env::var("FAULTS_AT").ok().and_then(|s| s.parse().ok());
    let full = std::env::var("PLOOP_TEST").as_deref() == Ok("full");
    let mut tried = std::collections::BTreeMap::new();
    for fault in [Fault::Eio, Fault::NoSpace, Fault::Short] {
        let fits = |kind: char| match fault {
            Fault::Eio => true,
            Fault::NoSpace => matches!(kind, 'w' | 'b' | 'a' | 'z' | 's'),
            Fault::Short => matches!(kind, 'r' | 'w' | 'b'),
        };
        // In the reduced run each kind of operation a few times, spread over the scene.
        let mut places: Vec<usize> = Vec::new();
        for kind in ['r', 'w', 'b', 's', 'a', 't', 'z'] {
            let all: Vec<usize> =
                log.chars().enumerate().filter(|(_, k)| *k == kind && fits(kind)).map(|(i, _)| i).collect();
            let step = if full { 1 } else { all.len().div_ceil(4).max(1) };
            places.extend(all.iter().step_by(step));
        }
        for at in places.into_iter().filter(|at| only.is_none_or(|o| o == *at)) {
            let name = format!("{fault:?}-{at}").to_lowercase();
            let seen = scene(t, &name, delta, at, fault);
            if !seen.hit {
                // The order of what happens at the same time is not always the same.
                continue;
            }
            let kind = seen.log.chars().nth(at).unwrap_or('?');
            judge(&format!("{fault:?} at operation {at} ({kind}) of {}", seen.log), kind, fault, &seen);
            *tried.entry((format!("{fault:?}"), kind)).or_insert(0) += 1;
        }
    }
    println!("faults that happened, by kind of operation: {tried:?}");
}

#[test]
fn a_full_host_holds_writes_and_shows_it() {
    let Some(t) = Bench::new("a_full_host_holds_writes_and_shows_it") else { return };
    let (real, path) = (t.dir.path().join("full.real"), t.dir.path().join("full"));
    disk::make(&real, false);
    let mount = t.dir.path().join("fs");
    // Ends after the file, so that nothing waits for it when the test fails.
    let unmount = Unmount(mount.clone());
    let mut file = FaultyFile::mount(&path, &real);
    let device = attach(&t, &file, None).expect("attach");
    let node = device.node().to_owned();
    std::fs::create_dir(&mount).expect("folder");
    device_common::run(std::process::Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&node));
    device_common::run(std::process::Command::new("mount").arg(&node).arg(&mount));
    std::fs::write(mount.join("before"), vec![1; 1 << 20]).expect("write");
    file.full(true);
    let target = mount.join("during");
    let writer = std::thread::spawn(move || -> std::io::Result<()> {
        let f = std::fs::File::create(&target)?;
        for i in 0..24u8 {
            std::os::unix::fs::FileExt::write_all_at(&f, &vec![i; 1 << 20], u64::from(i) << 20)?;
        }
        f.sync_all()
    });
    let state = || device::by_node(&node.to_string_lossy()).ok().flatten().map(|d| d.state);
    within(30, "the state no-space", || (state() == Some(State::NoSpace)).then_some(()));
    assert!(!writer.is_finished(), "a write did not wait");
    // What is there already can be read meanwhile.
    let read = std::fs::read(mount.join("before")).expect("read while others wait");
    assert!(read.iter().all(|b| *b == 1));
    std::thread::sleep(Duration::from_secs(2));
    assert!(!writer.is_finished(), "a write did not wait");
    file.full(false);
    writer.join().expect("writer").expect("writes that waited go on");
    within(10, "the state running", || (state() == Some(State::Running)).then_some(()));
    let now = std::fs::read(mount.join("during")).expect("read");
    assert!(now.chunks(1 << 20).enumerate().all(|(i, c)| c.iter().all(|b| *b == i as u8)));
    drop(unmount);
    device_common::run(std::process::Command::new("fsck.ext4").args(["-f", "-n"]).arg(&node));
    device::detach(device.name()).expect("detach");
    drop(file);
    assert!(!disk::is_marked(&real));
    // A FUSE file does not tell where its holes are, so that they are left.
    let options = CheckOptions { force: true, check: true, repair_sparse: true, ..CheckOptions::default() };
    check_file(&real, None, &options).expect("check");
}

struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = device_common::output(std::process::Command::new("umount").arg(&self.0));
    }
}

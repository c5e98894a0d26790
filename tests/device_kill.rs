//! Devices whose processes are killed.

mod device_common;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use device_common::load::{Load, check_lanes, kill_process};
use device_common::*;
use ploop::Kind;
use ploop::device::{self, State, served};
use ploop::server::runtime;

/// Rewrites blocks and reads them back until told to stop; returns how many it wrote.
fn writer(node: &Path, lane: u64, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<std::io::Result<u64>> {
    let file = OpenOptions::new().read(true).write(true).open(node).unwrap();
    let stop = stop.clone();
    std::thread::spawn(move || {
        let mut n = 0;
        while !stop.load(Ordering::Relaxed) {
            let data = pattern(lane << 32 | n, 64 << 10);
            let at = (lane * 16 + n % 16) * (64 << 10);
            file.write_all_at(&data, at)?;
            if n % 7 == 0 {
                file.sync_all()?;
            }
            let mut back = vec![0; data.len()];
            file.read_exact_at(&mut back, at)?;
            assert_eq!(back, data, "lane {lane} write {n}");
            n += 1;
        }
        file.sync_all()?;
        Ok(n)
    })
}

#[test]
fn worker_killed_under_load() {
    let Some(t) = Bench::new("worker_killed_under_load") else { return };
    kill_workers(&t);
}

#[test]
fn worker_killed_under_load_with_slots() {
    let Some(t) = Bench::with_slots("worker_killed_under_load_with_slots") else { return };
    kill_workers(&t);
}

fn kill_workers(t: &Bench) {
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    assert!(!t.slots || served::record(&device).slots);
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..3).map(|lane| writer(device.node(), lane, &stop)).collect();
    let mut worker = served::record(&device).worker;
    let rounds = count(12, 12, 100);
    for i in 0..rounds {
        pause(30 + 37 * (i % 5));
        kill(worker);
        worker = within(20, "another worker", || {
            let r = record(device.name());
            (r.worker != worker && runtime::alive(r.worker)).then_some(r.worker)
        });
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        assert!(writer.join().unwrap().unwrap() > 0);
    }
    assert_eq!(record(device.name()).supervisor, served::record(&device).supervisor);
    device::detach(device.name()).unwrap();
    t.assert_gone(&device);
    t.sound(&image);
}

/// Whoever takes over dies, too, somewhere on the way.
#[test]
fn successors_killed_with_slots() {
    let Some(t) = Bench::with_slots("successors_killed_with_slots") else { return };
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    let load = Load::start(device.node());
    let rounds = count(12, 40, 150);
    let supervisor = served::record(&device).supervisor;
    let mut worker = served::record(&device).worker;
    for round in 0..rounds {
        pause(20 + 13 * (round % 4));
        kill_process(worker);
        // More deaths in a row would only make the supervisor wait longer.
        for death in 0..3 {
            worker = busy_within("a successor", || next_worker(supervisor, worker));
            std::thread::sleep(std::time::Duration::from_micros((round * 7919 + death * 10_007) % 30_000));
            kill_process(worker);
        }
        let last = worker;
        worker = within(20, "another worker", || {
            let r = record(device.name());
            (r.worker != last && runtime::alive(r.worker)).then_some(r.worker)
        });
    }
    let lanes = load.end();
    check_lanes(device.node(), &lanes);
    println!("{} kills", rounds * 4);
    assert_eq!(record(device.name()).supervisor, supervisor);
    device::detach(device.name()).unwrap();
    t.assert_gone(&device);
    t.sound(&image);
}

#[test]
fn supervisor_killed_alone() {
    let Some(t) = Bench::new("supervisor_killed_alone") else { return };
    kill_supervisors(&t);
}

#[test]
fn supervisor_killed_alone_with_slots() {
    let Some(t) = Bench::with_slots("supervisor_killed_alone_with_slots") else { return };
    kill_supervisors(&t);
}

fn kill_supervisors(t: &Bench) {
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writing = writer(device.node(), 0, &stop);
    let mut supervisor = served::record(&device).supervisor;
    for _ in 0..3 {
        kill(supervisor);
        supervisor = within(20, "another supervisor", || {
            let r = record(device.name());
            (r.supervisor != supervisor && runtime::alive(r.supervisor)).then_some(r.supervisor)
        });
        // The worker is the same one and goes on.
        assert_eq!(record(device.name()).worker, served::record(&device).worker);
    }
    let found =
        within(5, "an answer", || device::by_node(device.name()).unwrap().filter(|d| d.state == State::Running));
    assert_eq!(served::record(&found).diskseq, served::record(&device).diskseq);
    // The new one can do what the old one could: replace a worker, follow the nodes, end the device.
    kill(served::record(&found).worker);
    within(20, "another worker", || Some(record(device.name()).worker).filter(|w| *w != served::record(&found).worker));
    pause(100);
    stop.store(true, Ordering::Relaxed);
    writing.join().unwrap().unwrap();
    device::detach(device.name()).unwrap();
    t.assert_gone(&found);
    t.sound(&image);
}

#[test]
fn both_killed() {
    let Some(t) = Bench::new("both_killed") else { return };
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    let data = pattern(9, 1 << 20);
    write_at(device.node(), 0, &data);
    // Stopped first, so that the worker has no time for a new supervisor.
    let pid = nix::unistd::Pid::from_raw(served::record(&device).worker.pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    kill(served::record(&device).supervisor);
    kill(served::record(&device).worker);
    let file = OpenOptions::new().write(true).open(device.node()).unwrap();
    let e = file.write_all_at(&data, 8 << 20).and_then(|()| file.sync_all()).unwrap_err();
    assert_eq!(e.raw_os_error(), Some(libc::EIO));
    drop(file);
    let dead = device::by_node(device.name()).unwrap().unwrap();
    assert_eq!(dead.state, State::Dead);

    // The next attach cleans up; the image is marked in use, which a list of files refuses.
    let e = t.attach(&image).unwrap_err();
    assert_eq!(e.kind(), Kind::InUse, "{e}");
    assert!(device::by_node(device.name()).unwrap().is_none() || record(device.name()) != *served::record(&dead));
    assert!(!runtime::backing_is_ours(served::record(&dead)));
    let mut spec = t.spec(&image);
    spec.marked = ploop::server::proto::Marked::Recover;
    let device = device::attach(spec).unwrap();
    assert_eq!(read_at(device.node(), 0, data.len()), data);
    device::detach(device.name()).unwrap();
    t.assert_gone(&device);
    t.sound(&image);
}

#[test]
fn no_worker_can_serve() {
    let Some(t) = Bench::new("no_worker_can_serve") else { return };
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    write_at(device.node(), 0, &pattern(3, 4096));
    // An image that a new worker cannot open: its header is gone.
    let mut header = vec![0; 64];
    let file = OpenOptions::new().read(true).write(true).open(&image).unwrap();
    file.read_exact_at(&mut header, 0).unwrap();
    file.write_all_at(&[0xaa; 64], 0).unwrap();
    kill(served::record(&device).worker);
    let failed =
        within(20, "state failed", || device::by_node(device.name()).unwrap().filter(|d| d.state == State::Failed));
    assert_eq!(failed.state.as_str(), "failed");
    let e = device::detach(device.name()).unwrap_err();
    assert_eq!(e.kind(), Kind::Device, "{e}");
    // I/O waits until the device is given up, and fails then.
    let waiting = Arc::new(AtomicU64::new(0));
    let (node, done) = (device.node().to_path_buf(), waiting.clone());
    let thread = std::thread::spawn(move || {
        let file = OpenOptions::new().write(true).open(node).unwrap();
        let result = file.write_all_at(&[1; 4096], 8192).and_then(|()| file.sync_all());
        done.store(1, Ordering::Relaxed);
        result
    });
    pause(500);
    assert_eq!(waiting.load(Ordering::Relaxed), 0);
    device::abort(device.name()).unwrap();
    assert_eq!(thread.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
    device::clean(device.name()).unwrap();
    t.assert_gone(&device);
    file.write_all_at(&header, 0).unwrap();
}

#[test]
fn mounted_and_dead() {
    let Some(t) = Bench::new("mounted_and_dead") else { return };
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    run(Command::new("mkfs.ext4").arg("-q").arg(device.node()));
    let target = t.dir.path().join("mnt");
    fs::create_dir(&target).unwrap();
    run(Command::new("mount").arg(device.node()).arg(&target));
    let e = device::detach(device.name()).unwrap_err();
    assert_eq!(e.kind(), Kind::DevIoc, "{e}");
    assert!(e.to_string().contains("mounted"), "{e}");
    // Nothing changed: node and device are as they were.
    assert!(device.node().exists() && runtime::backing_is_ours(served::record(&device)));
    fs::write(target.join("file"), "content").unwrap();

    let pid = nix::unistd::Pid::from_raw(served::record(&device).worker.pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    kill(served::record(&device).supervisor);
    kill(served::record(&device).worker);
    let e = device::clean(device.name()).unwrap_err();
    assert_eq!(e.kind(), Kind::DevIoc, "{e}");
    assert!(runtime::device_dir(device.name()).exists());
    let _ = output(Command::new("umount").arg(&target));
    device::clean(device.name()).unwrap();
    t.assert_gone(&device);
}

/// The record of the attach under way for this image, if it has come so far.
fn starting(image: &Path) -> Option<ploop::server::proto::DeviceRecord> {
    let names = runtime::names().ok()?;
    let records = names.iter().filter_map(|n| runtime::read_record(&runtime::device_dir(n)).ok().flatten());
    records.into_iter().find(|r| r.levels[0].path == image)
}

#[test]
fn killed_while_attaching() {
    let Some(t) = Bench::new("killed_while_attaching") else { return };
    let image = t.image("a.hdd", "64M");
    let rounds = count(24, 24, 200);
    let (mut failed, mut devices) = (0, 0);
    let mut seen = std::collections::BTreeSet::new();
    for round in 0..rounds {
        let attaching = std::thread::scope(|s| {
            let attaching = s.spawn(|| {
                let mut spec = t.spec(&image);
                spec.marked = ploop::server::proto::Marked::Recover;
                device::attach(spec)
            });
            let record = within(10, "a record", || starting(&image));
            pause(round * 11 % 170);
            let record = starting(&image).unwrap_or(record);
            seen.insert(record.backing.clone());
            // Either or both, also when nothing of them is left to kill.
            for (which, id) in [record.supervisor, record.worker].into_iter().enumerate() {
                if (round + 1) % 3 != which as u64 && runtime::alive(id) {
                    let pid = nix::unistd::Pid::from_raw(id.pid);
                    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
                }
            }
            attaching.join().unwrap()
        });
        match attaching {
            Ok(device) => {
                devices += 1;
                let e = device::detach(device.name());
                println!("round {round}: {e:?}");
            }
            Err(e) => {
                failed += 1;
                println!("round {round}: {e}");
            }
        }
        // What is left cleans itself up or is cleaned.
        within(20, "the end", || match starting(&image) {
            Some(record) => {
                let _ = device::clean(&record.name);
                None
            }
            None => Some(()),
        });
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(" - fuse ploop") || device::list().unwrap().iter().any(|d| d.top() != image));
    }
    println!("{failed} attaches failed, {devices} devices");
    // Loop devices that were made are gone, unless another test has one of the number now.
    for backing in seen.iter().filter(|b| !b.is_empty()) {
        let used = || device::list().unwrap().iter().any(|d| d.disk == *backing);
        within(10, backing, || (!runtime::is_bound(backing) || used()).then_some(()));
    }
    let mut spec = t.spec(&image);
    spec.marked = ploop::server::proto::Marked::Recover;
    let device = device::attach(spec).unwrap();
    device::detach(device.name()).unwrap();
    t.assert_gone(&device);
    t.sound(&image);
}

#[test]
fn worker_that_hangs_while_attaching() {
    let Some(t) = Bench::new("worker_that_hangs_while_attaching") else { return };
    if !count(false, false, true) {
        // The time limits of an attach are minutes.
        return;
    }
    let image = t.image("a.hdd", "64M");
    let freeze = |id: ploop::server::proto::ProcessId| {
        let pid = nix::unistd::Pid::from_raw(id.pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    };
    let bound = || starting(&image).filter(|r| !r.backing.is_empty() && r.state == "starting");
    // Once: another worker completes what the hanging one did not.
    let device = std::thread::scope(|s| {
        let attaching = s.spawn(|| t.attach(&image));
        let record = busy_within("a loop device", bound);
        freeze(record.worker);
        attaching.join().unwrap().unwrap()
    });
    write_at(device.node(), 0, &pattern(1, 4096));
    device::detach(device.name()).unwrap();
    t.assert_gone(&device);
    // Every time: the attach fails within its limits and nothing is left.
    let e = std::thread::scope(|s| {
        let attaching = s.spawn(|| t.attach(&image));
        let record = busy_within("a loop device", bound);
        freeze(record.worker);
        let next = within(100, "another worker", || {
            starting(&image).map(|r| r.worker).filter(|w| *w != record.worker && runtime::alive(*w))
        });
        freeze(next);
        attaching.join().unwrap().unwrap_err()
    });
    println!("{e}");
    assert_eq!(e.kind(), Kind::Loop);
    assert!(starting(&image).is_none());
    let loops = run(Command::new("losetup").args(["-l", "-n", "-O", "NAME,BACK-FILE"]));
    assert!(!loops.contains(image.to_str().unwrap()), "{loops}");
}

/// Like `within`, for what lasts only a moment.
fn busy_within<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(std::time::Instant::now() < end, "{what}: not in time");
    }
}

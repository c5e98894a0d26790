//! A running device changes its chain or its program, whoever dies meanwhile.

mod device_common;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use device_common::load::*;
use device_common::*;
use ploop::device::{self, CommitFile, Device, State, SwitchSpec, served};
use ploop::error::Kind;
use ploop::format::header::Version;
use ploop::image::check::read_header;
use ploop::image::create::create_delta;
use ploop::server::proto::{ChainSwitch, Command, CommitNames, LevelName, Marked, SwitchLevel};
use ploop::server::{control, runtime};
use ploop::sys::file_id::FileId;
use ploop::units::ClusterSize;

#[test]
fn a_chain_grows_under_load() {
    let Some(t) = Bench::new("a_chain_grows_under_load") else { return };
    grow(&t);
}

#[test]
fn a_chain_grows_under_load_with_slots() {
    let Some(t) = Bench::with_slots("a_chain_grows_under_load_with_slots") else { return };
    grow(&t);
}

fn grow(t: &Bench) {
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    let load = Load::start(device.node());
    let mut files = vec![image];
    let mut pauses = Vec::new();
    for i in 0..8 {
        pause(60 + 31 * i);
        let path = new_delta(t, &files[0], &format!("d{i}"));
        let running = now(&device);
        let start = Instant::now();
        let mut served = None;
        let spec = SwitchSpec { levels: with_new_top(&running, &path), commit: None, linger: 0 };
        device::switch(&running, &spec, &mut |warning| {
            assert_eq!(warning, None);
            served = Some(start.elapsed());
        })
        .unwrap();
        pauses.push(served.unwrap());
        // The former top is closed and does not change any more.
        let old = &files.last().unwrap().clone();
        assert_eq!(read_header(old, None).unwrap().in_use, 0);
        let frozen = fs::read(old).unwrap();
        let mtime = fs::metadata(old).unwrap().mtime_nsec();
        files.push(path);
        pause(50);
        assert!(fs::read(old).unwrap() == frozen && fs::metadata(old).unwrap().mtime_nsec() == mtime);
        t.sound_delta(old);
        assert_eq!(record(device.name()).levels.len(), files.len());
    }
    let lanes = load.end();
    check_lanes(device.node(), &lanes);
    println!("{} changes of the chain, asked for until served: {pauses:?}", pauses.len());
    device::detach(device.name()).unwrap();
    t.assert_gone(&device);
    let again = attach_chain(t, &files, Marked::Refuse);
    check_lanes(again.node(), &lanes);
    // The way back: the same chain without a level below, which holds nothing that is not above it, cannot be told from
    // here; but a chain that is not running is refused.
    let mut stale = now(&again);
    stale.images[0].id.ino += 1;
    let path = new_delta(t, &files[0], "never");
    let spec = SwitchSpec { levels: with_new_top(&stale, &path), commit: None, linger: 0 };
    let e = device::switch(&stale, &spec, &mut |_| panic!("served")).unwrap_err();
    assert_eq!(e.kind(), Kind::Param, "{e}");
    device::detach(again.name()).unwrap();
    t.assert_gone(&again);
}

#[test]
fn reload_under_load() {
    let Some(t) = Bench::new("reload_under_load") else { return };
    reload(&t);
}

#[test]
fn reload_under_load_with_slots() {
    let Some(t) = Bench::with_slots("reload_under_load_with_slots") else { return };
    reload(&t);
}

fn reload(t: &Bench) {
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    let load = Load::start(device.node());
    for _ in 0..4 {
        let before = settled(device.name());
        device::reload(device.name()).unwrap();
        let after = settled(device.name());
        // The supervisor replaces its program and stays: at no moment is there none.
        assert!(after.worker != before.worker && after.supervisor == before.supervisor);
        assert!(!runtime::alive(before.worker) && runtime::alive(before.supervisor));
        let mode = std::fs::read(format!("/proc/{}/cmdline", after.supervisor.pid)).unwrap();
        assert!(mode.starts_with(b"ploop-server\0resumed\0"));
        assert_eq!(after.levels, before.levels);
    }
    let lanes = load.end();
    check_lanes(device.node(), &lanes);
    device::detach(device.name()).unwrap();
    t.assert_gone(&now_or(&device));
    t.sound(&image);
}

/// An unknown command and an older program are refused by name, and the device goes on.
#[test]
fn what_is_unknown_is_refused_by_name() {
    let Some(t) = Bench::new("what_is_unknown_is_refused_by_name") else { return };
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    let before = settled(device.name());
    let dir = runtime::device_dir(device.name());
    let limit = Duration::from_secs(10);
    let asked = control::send_command(&dir, &"Grow", &[], limit).unwrap();
    let e = control::next_answer(&asked, &dir, limit).unwrap_err();
    assert!(e.kind() == Kind::Param && e.to_string().contains("Grow"), "{e}");
    // A program that does not know the mode `version`, as those of the first version.
    let old = path_fd(Path::new("/bin/true"));
    let (answer, _) = control::ask_with(&dir, &Command::Reload { token: 7 }, &[old.as_fd()], limit).unwrap();
    let e = answer.into_result().unwrap_err();
    assert!(e.kind() == Kind::Param && e.to_string().contains("version 1"), "{e}");
    assert_eq!(settled(device.name()), before);
    device::detach(device.name()).unwrap();
    t.assert_gone(&device);
}

#[test]
fn what_cannot_be_served_changes_nothing() {
    let Some(t) = Bench::new("what_cannot_be_served_changes_nothing") else { return };
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    let load = Load::start(device.node());
    let try_file = |path: &Path| {
        let spec = SwitchSpec { levels: with_new_top(&now(&device), path), commit: None, linger: 0 };
        let e = device::switch(&now(&device), &spec, &mut |_| panic!("served")).unwrap_err();
        assert_eq!(settled(device.name()).levels, served::record(&device).levels);
        e
    };
    // Another cluster size, another version, no image at all, an image that somebody else has open.
    let cluster = ClusterSize::from_sectors(64).unwrap();
    let path = t.dir.path().join("small");
    create_delta(&path, Version::V2, cluster, 131072).unwrap();
    println!("{}", try_file(&path));
    let path = t.dir.path().join("nonsense");
    fs::write(&path, [7; 8192]).unwrap();
    println!("{}", try_file(&path));
    let path = new_delta(&t, &image, "locked");
    let lock = File::open(&path).unwrap();
    ploop::sys::file_lock::exclusive(&lock, false).unwrap();
    let e = try_file(&path);
    assert_eq!(e.kind(), Kind::InUse, "{e}");
    drop(lock);
    // A descriptor that cannot be renamed, because it is not there any more.
    let (dd, tmp) = (t.dir.path().join("dd"), t.dir.path().join("dd.tmp"));
    fs::write(&dd, "old").unwrap();
    fs::write(&tmp, "new").unwrap();
    let commit = CommitFile::open(&tmp, &dd).unwrap();
    fs::remove_file(&tmp).unwrap();
    let running = now(&device);
    let spec = SwitchSpec { levels: with_new_top(&running, &path), commit: Some(commit), linger: 0 };
    let e = device::switch(&running, &spec, &mut |_| panic!("served")).unwrap_err();
    assert_eq!(e.kind(), Kind::Rename, "{e}");
    assert_eq!(fs::read(&dd).unwrap(), b"old");
    assert_eq!(read_header(&path, None).unwrap().in_use, 0);
    let lanes = load.end();
    check_lanes(device.node(), &lanes);
    device::detach(device.name()).unwrap();
    t.assert_gone(&now_or(&device));
    t.sound(&image);
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Victim {
    Worker,
    Successor,
    Supervisor,
    SupervisorAndSuccessor,
    Caller,
}

/// Every step is drawn out, and somebody is killed at each of them.
#[test]
fn killed_at_each_step() {
    let Some(t) = Bench::new("killed_at_each_step") else { return };
    use Victim::*;
    let step = count(120, 40, 20);
    kill_at_each_step(&t, &[Worker, Successor, Supervisor, SupervisorAndSuccessor, Caller], step);
}

/// With both of the new chain the requests that they had end: see below.
#[test]
fn killed_at_each_step_with_slots() {
    let Some(t) = Bench::with_slots("killed_at_each_step_with_slots") else { return };
    use Victim::*;
    let step = count(200, 60, 20);
    kill_at_each_step(&t, &[Worker, Successor, Supervisor, Caller], step);
}

fn kill_at_each_step(t: &Bench, victims: &[Victim], step: usize) {
    use Victim::*;
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    let load = Load::start(device.node());
    let mut files = vec![image.clone()];
    let dd = t.dir.path().join("dd");
    fs::write(&dd, "0").unwrap();
    let (mut made, mut refused, mut kills, mut late) = (0, 0, 0, 0);
    for victim in victims.iter().copied() {
        for offset in (5..480).step_by(step) {
            let before = settled(device.name());
            let running = now(&device);
            let path = new_delta(t, &files[0], &format!("d-{victim:?}-{offset}"));
            let tmp = t.dir.path().join("dd.tmp");
            fs::write(&tmp, path.to_str().unwrap()).unwrap();
            let commit = CommitFile::open(&tmp, &dd).unwrap();
            let result = std::thread::scope(|s| {
                let asked = s.spawn(|| match victim {
                    Caller => abandoned(&running, &path, &tmp, &dd, offset as u64),
                    _ => {
                        let levels = with_new_top(&running, &path);
                        let commit = Some(CommitFile::open(&tmp, &dd).unwrap());
                        device::switch(&running, &SwitchSpec { levels, commit, linger: 60 }, &mut |_| {})
                    }
                });
                pause(offset as u64);
                let next = next_worker(before.supervisor, before.worker);
                match (victim, next) {
                    (Worker, _) => kill_process(before.worker),
                    (Supervisor, _) => kill_process(before.supervisor),
                    (Successor, Some(next)) => kill_process(next),
                    (SupervisorAndSuccessor, Some(next)) => {
                        kill_process(before.supervisor);
                        // It may just have ended the retired worker: without that one the disk would be lost.
                        pause(2);
                        match runtime::alive(before.worker) {
                            true => kill_process(next),
                            false => late += 1,
                        }
                    }
                    (Caller, _) => {}
                    _ => late += 1,
                }
                kills += 1;
                asked.join().unwrap()
            });
            let after = settled(device.name());
            let committed = within(30, "an end", || {
                let r = settled(device.name());
                let committed = commit.is_committed().unwrap();
                // Without its caller the change is made all the same.
                let ended = committed || victim != Caller;
                (ended && committed == r.levels.iter().any(|l| l.path == path)).then_some(committed)
            });
            println!("{victim:?} killed after {offset} ms: {result:?}, committed: {committed}");
            match victim {
                Caller => {}
                _ => assert_eq!(result.is_ok(), committed, "{result:?}"),
            }
            match committed {
                true => {
                    made += 1;
                    assert_eq!(fs::read_to_string(&dd).unwrap(), path.to_str().unwrap());
                    // Finished by whoever serves now.
                    let old = &files.last().unwrap().clone();
                    within(30, "an unmarked former top", || {
                        (read_header(old, None).unwrap().in_use == 0).then_some(())
                    });
                    files.push(path);
                }
                false => refused += 1,
            }
            assert_eq!(after.diskseq, served::record(&device).diskseq);
            if files.len() > 120 {
                break;
            }
        }
    }
    let lanes = load.end();
    check_lanes(device.node(), &lanes);
    println!("{kills} kills ({late} found nobody): {made} changes made, {refused} not");
    let running = now(&device);
    assert_eq!(running.state, State::Running);
    device::detach(device.name()).unwrap();
    t.assert_gone(&running);
    for file in &files {
        t.sound_delta(file);
    }
    let again = attach_chain(t, &files, Marked::Refuse);
    check_lanes(again.node(), &lanes);
    device::detach(again.name()).unwrap();
    t.assert_gone(&again);
}

/// The supervisor and the worker of the new chain die at once. Until that worker served, the retired one has another
/// supervisor go on; after that the requests that it had read are lost with both, so the device ends, and nobody waits
/// for ever.
#[test]
fn both_of_the_new_chain_killed_with_slots() {
    let Some(t) = Bench::with_slots("both_of_the_new_chain_killed_with_slots") else { return };
    let step = count(60, 40, 10);
    let (mut dead, mut alive) = (0, 0);
    for offset in (5..500).step_by(step) {
        let image = t.image(&format!("a{offset}.hdd"), "64M");
        let device = t.attach(&image).unwrap();
        let before = settled(device.name());
        let stop = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..LANES).map(|lane| writer(device.node(), lane, &stop)).collect();
        let path = new_delta(&t, &image, &format!("d{offset}"));
        let mut retired = false;
        let spec = SwitchSpec { levels: with_new_top(&device, &path), commit: None, linger: 60 };
        std::thread::scope(|s| {
            let asked = s.spawn(|| device::switch(&device, &spec, &mut |_| {}));
            pause(offset as u64);
            let next = next_worker(before.supervisor, before.worker);
            kill_process(before.supervisor);
            next.into_iter().for_each(kill_process);
            retired = runtime::alive(before.worker);
            let _ = asked.join().unwrap();
        });
        let state = within(30, "an end", || {
            let d = device::by_node(device.name()).unwrap()?;
            let settled =
                served::record(&d).supervisor != before.supervisor && runtime::alive(served::record(&d).worker);
            (d.state == State::Dead || d.state == State::Running && settled).then_some(d.state)
        });
        stop.store(true, Ordering::Relaxed);
        let results: Vec<_> = writers.into_iter().map(|w| w.join().unwrap()).collect();
        println!("killed after {offset} ms, the retired worker there: {retired}: {state:?}");
        let running = now(&device);
        match state {
            State::Dead => {
                dead += u32::from(retired);
                assert!(results.iter().all(Result::is_err));
                device::clean(device.name()).unwrap();
            }
            _ => {
                alive += 1;
                let lanes: Vec<_> = results.into_iter().map(Result::unwrap).collect();
                check_lanes(device.node(), &lanes);
                device::detach(device.name()).unwrap();
            }
        }
        t.assert_gone(&running);
        let again = attach_chain(&t, &[image, path], Marked::Recover);
        device::detach(again.name()).unwrap();
        t.assert_gone(&again);
    }
    println!("{alive} devices went on, {dead} were ended");
    assert!(alive > 0);
}

/// Asks for a change and dies before the answer.
fn abandoned(running: &Device, path: &Path, tmp: &Path, dd: &Path, limit: u64) -> ploop::Result<()> {
    let name = |i: &device::Image| LevelName { path: i.path.clone(), raw: i.raw };
    let kept = running.images.iter().enumerate();
    let mut levels: Vec<SwitchLevel> =
        kept.map(|(i, image)| SwitchLevel { name: name(image), id: image.id, from: Some(i) }).collect();
    let meta = fs::metadata(path).unwrap();
    let name = LevelName { path: path.into(), raw: false };
    levels.push(SwitchLevel { name, id: FileId::from(&meta), from: None });
    let names = CommitNames { tmp: tmp.file_name().unwrap().into(), name: dd.file_name().unwrap().into() };
    let swap = ChainSwitch {
        levels,
        expected: running.ids(),
        commit: Some(names),
        token: meta.ino() << 8 | 1,
        ask: false,
        grow: None,
        linger: 60,
        // As a client of a version without roles.
        roles: Vec::new(),
    };
    let fds = [path_fd(path), path_fd(dd.parent().unwrap()), path_fd(tmp)];
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let dir = runtime::device_dir(running.name());
    let asked = control::ask_with(&dir, &Command::Switch(swap), &fds, Duration::from_millis(limit));
    asked.map(drop)
}

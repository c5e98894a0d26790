//! The writable top of a running device is merged into the level below, whoever dies meanwhile.

mod device_common;

use std::path::{Path, PathBuf};
use std::time::Instant;

use device_common::load::*;
use device_common::*;
use ploop::device::merge::{Watch, merge_top};
use ploop::device::{self, CommitFile, Device};
use ploop::error::Kind;
use ploop::image::check::read_header;
use ploop::server::proto::Marked;

/// Lets it run; may cancel, or kill.
struct Meanwhile<F: FnMut(u64, u64) -> bool>(F, bool);

impl<F: FnMut(u64, u64) -> bool> Watch for Meanwhile<F> {
    fn progress(&mut self, seen: u64, all: u64) {
        assert!(seen <= all);
        self.1 |= (self.0)(seen, all);
    }

    fn cancelled(&mut self) -> bool {
        self.1
    }
}

fn quietly() -> Meanwhile<fn(u64, u64) -> bool> {
    Meanwhile(|_, _| false, false)
}

/// A chain of a base and a top, both with data.
fn chain(t: &Bench, size: &str) -> (Vec<PathBuf>, Device) {
    let base = t.image("base", size);
    let device = t.attach(&base).unwrap();
    for i in 0..24 {
        write_at(device.node(), i * (2 << 20) + 4096, &pattern(1000 + i, 300_000));
    }
    device::detach(device.name()).unwrap();
    let top = new_delta(t, &base, "top");
    let files = vec![base, top];
    let device = attach_chain(t, &files, Marked::Refuse);
    for i in (0..24).step_by(3) {
        write_at(device.node(), i * (2 << 20) + 100_000, &pattern(2000 + i, 400_000));
    }
    (files, device)
}

/// What [`chain`] wrote outside of the lanes.
fn check_chain(node: &Path) {
    let lanes = LANES * SLOTS * BLOCK;
    for i in 0..24u64 {
        let at = i * (2 << 20);
        if at < lanes {
            continue;
        }
        if i % 3 == 0 {
            assert!(read_at(node, at + 100_000, 400_000) == pattern(2000 + i, 400_000), "top {i}");
            assert!(read_at(node, at + 4096, 95_904) == pattern(1000 + i, 300_000)[..95_904], "below the top {i}");
        } else {
            assert!(read_at(node, at + 4096, 300_000) == pattern(1000 + i, 300_000), "base {i}");
        }
    }
}

#[test]
fn merged_under_load() {
    let Some(t) = Bench::new("merged_under_load") else { return };
    let (files, device) = chain(&t, "64M");
    let load = Load::start(device.node());
    let (dd, tmp) = (t.dir.path().join("dd"), t.dir.path().join("dd.tmp"));
    std::fs::write(&dd, "old").unwrap();
    std::fs::write(&tmp, "new").unwrap();
    let commit = CommitFile::open(&tmp, &dd).unwrap();
    let start = Instant::now();
    let warning = merge_top(&now(&device), Some(&commit), &mut quietly()).unwrap();
    println!("merged 64 MiB under load in {:?}", start.elapsed());
    assert_eq!(warning, None);
    assert_eq!(std::fs::read(&dd).unwrap(), b"new");
    let after = settled(device.name());
    assert_eq!(after.levels.len(), 1);
    pause(200);
    let lanes = load.end();
    check_lanes(device.node(), &lanes);
    check_chain(device.node());
    device::detach(device.name()).unwrap();
    t.assert_gone(&now_or(&device));
    t.sound(&files[0]);
    let again = t.attach(&files[0]).unwrap();
    check_lanes(again.node(), &lanes);
    check_chain(again.node());
    device::detach(again.name()).unwrap();
}

#[test]
fn merged_whoever_dies() {
    let Some(t) = Bench::new("merged_whoever_dies") else { return };
    let rounds = count(6, 12, 40);
    let (mut files, device) = chain(&t, "64M");
    let load = Load::start(device.node());
    let (mut merged, mut refused) = (0, 0);
    for round in 0..rounds {
        let before = settled(device.name());
        let running = now(&device);
        let victim = if round % 2 == 0 { before.worker } else { before.supervisor };
        let result = std::thread::scope(|s| {
            let asked = s.spawn(|| merge_top(&running, None, &mut quietly()));
            pause(17 * round % 300);
            kill_process(victim);
            asked.join().unwrap()
        });
        let after = settled(device.name());
        match result {
            Ok(_) => merged += 1,
            Err(e) => {
                println!("round {round}: {}", e.error);
                refused += 1;
                assert_eq!(after.levels.len(), 2, "round {round}");
            }
        }
        within(60, "the end of the merge", || {
            let r = settled(device.name());
            (r.levels.len() == 1 || refused > 0).then_some(())
        });
        let levels = settled(device.name()).levels.len();
        if levels == 1 {
            // Another top for the next round.
            let path = new_delta(&t, &files[0], &format!("top-{round}"));
            let running = now(&device);
            let spec = device::SwitchSpec { levels: with_new_top(&running, &path), commit: None, linger: 0 };
            device::switch(&running, &spec, &mut |_| {}).unwrap();
            files[1] = path;
        }
    }
    println!("{rounds} merges with somebody killed: {merged} made, {refused} refused");
    assert!(merged * 2 > rounds, "most are made");
    let lanes = load.end();
    check_lanes(device.node(), &lanes);
    check_chain(device.node());
    device::detach(device.name()).unwrap();
    let again = attach_chain(&t, &files, Marked::Recover);
    check_lanes(again.node(), &lanes);
    check_chain(again.node());
    device::detach(again.name()).unwrap();
    t.assert_gone(&again);
}

#[test]
fn cancelled_and_closed_merges_spoil_nothing() {
    let Some(t) = Bench::new("cancelled_and_closed_merges_spoil_nothing") else { return };
    let (files, device) = chain(&t, "64G");
    let load = Load::start(device.node());
    // Much in the top, so that there is time.
    for i in 0..600 {
        write_at(device.node(), (1 << 30) + i * (1 << 20), &pattern(i, 4096));
    }
    let mut seen = 0;
    let mut cancel = Meanwhile(
        |at, _| {
            seen += 1;
            at < 64 << 10
        },
        false,
    );
    let e = merge_top(&now(&device), None, &mut cancel).unwrap_err();
    assert!(e.error.kind() == Kind::Abort && !e.untouched, "{e:?}");
    let after = settled(device.name());
    assert_eq!(after.levels.len(), 2);
    within(10, "the target to be released", || (read_header(&files[0], None).unwrap().in_use == 0).then_some(()));
    // Somebody who only reads the base keeps it from being changed.
    let reader = device::attach(ploop::device::AttachSpec { read_only: true, ..t.spec(&files[0]) }).unwrap();
    let e = merge_top(&now(&device), None, &mut quietly()).unwrap_err();
    assert!(e.error.kind() == Kind::Busy && e.untouched, "{e:?}");
    device::detach(reader.name()).unwrap();
    let lanes = load.end();
    // Unmounted in the middle of it.
    std::thread::scope(|s| {
        let running = now(&device);
        let asked = s.spawn(move || merge_top(&running, None, &mut quietly()));
        pause(150);
        device::detach(device.name()).unwrap();
        let _ = asked.join().unwrap();
    });
    t.assert_gone(&now_or(&device));
    files.iter().for_each(|f| t.sound_delta(f));
    let again = attach_chain(&t, &files, Marked::Refuse);
    check_lanes(again.node(), &lanes);
    check_chain(again.node());
    let warning = merge_top(&now(&again), None, &mut quietly()).unwrap();
    assert_eq!(warning, None);
    check_lanes(again.node(), &lanes);
    check_chain(again.node());
    for i in 0..600 {
        assert!(read_at(again.node(), (1 << 30) + i * (1 << 20), 4096) == pattern(i, 4096));
    }
    device::detach(again.name()).unwrap();
    t.assert_gone(&again);
    t.sound(&files[0]);
}

/// A small file system in a file, unmounted whatever happens.
struct Small(PathBuf);

impl Small {
    fn new(t: &Bench, size: u64) -> Small {
        let (file, dir) = (t.dir.path().join("host.img"), t.dir.path().join("host"));
        std::fs::File::create(&file).unwrap().set_len(size).unwrap();
        run(std::process::Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&file));
        std::fs::create_dir(&dir).unwrap();
        run(std::process::Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&dir));
        Small(dir)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        for device in device::list().unwrap_or_default().iter().filter(|d| d.top().starts_with(&self.0)) {
            let _ = device::detach(device.name());
        }
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn without_space_the_disk_goes_on_and_the_merge_comes_later() {
    let Some(t) = Bench::new("without_space_the_disk_goes_on_and_the_merge_comes_later") else { return };
    let host = Small::new(&t, 400 << 20);
    let base = host.0.join("base");
    std::fs::copy(t.image("base", "200M"), &base).unwrap();
    let top = host.0.join("top");
    let header = read_header(&base, None).unwrap();
    ploop::image::create::create_delta(&top, header.version, header.cluster, header.sectors).unwrap();
    let device = attach_chain(&t, &[base.clone(), top], Marked::Refuse);
    for i in 0..100 {
        write_at(device.node(), i << 20, &pattern(i, 1 << 20));
    }
    // Room for some of what is to be merged, with what the top has taken ahead.
    let filler = host.0.join("filler");
    let free = nix::sys::statvfs::statvfs(&host.0).unwrap();
    let free = free.blocks_free() * free.fragment_size();
    assert!(free > 20 << 20, "{free} bytes are free");
    std::fs::write(&filler, vec![1; free as usize - (10 << 20)]).unwrap();
    let e = merge_top(&now(&device), None, &mut quietly()).unwrap_err();
    assert!(!e.untouched, "{e:?}");
    assert_eq!(settled(device.name()).levels.len(), 2);
    write_at(device.node(), 5 << 20, &pattern(905, 1 << 20));
    within(20, "the target to be released", || (read_header(&base, None).unwrap().in_use == 0).then_some(()));
    std::fs::remove_file(&filler).unwrap();
    merge_top(&now(&device), None, &mut quietly()).unwrap();
    for i in 0..100 {
        let seed = if i == 5 { 905 } else { i };
        assert!(read_at(device.node(), i << 20, 1 << 20) == pattern(seed, 1 << 20), "cluster {i}");
    }
    device::detach(device.name()).unwrap();
    t.assert_gone(&now_or(&device));
    t.sound(&base);
}

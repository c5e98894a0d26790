//! The whole host loses power: its ext4, in which the images and the descriptor of a running disk lie, is on tape, while
//! snapshots are taken, deleted and merged and a writer goes on. After a cut at any place the host's file system is mounted
//! again, the disk by its descriptor: all that was flushed is in it, each snapshot is whole or not there, and those that a
//! command had answered for are there.
//!
//! `PLOOP_TEST=full` cuts at 150 places, `ci` at 12, otherwise 8.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use crate::device_common::common::rng::Rng;
use crate::device_common::{Bench, count, output, pattern, run};
use crate::tape::{Event, Taped, play};
use crate::{BLOCK, apply};
use ploop::descriptor::Descriptor;
use ploop::format::guid::Guid;
use ploop::sys::aligned::AlignedBuf;

/// Blocks that are written between operations, and those that a writer rewrites all the time; each in a cluster with others.
const CALM: u64 = 48;
const BUSY: u64 = 16;
const SPREAD: u64 = 40 << 10;

fn ploop() -> Command {
    Command::new(env!("CARGO_BIN_EXE_ploop"))
}

fn data(block: u64, number: u64) -> Vec<u8> {
    if number == 0 { vec![0; BLOCK as usize] } else { pattern(block << 40 | number, BLOCK as usize) }
}

/// A file system on a loop device over a file, with a disk in it.
struct Host<'a> {
    device: String,
    dir: &'a Path,
}

impl<'a> Host<'a> {
    fn new(file: &Path, dir: &'a Path, make: bool) -> Host<'a> {
        let device = run(Command::new("losetup").args(["-f", "--show"]).arg(file)).trim().to_owned();
        let host = Host { device, dir };
        if make {
            run(Command::new("mkfs.ext4")
                .args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
                .arg(&host.device));
        }
        run(Command::new("mount").args(["-t", "ext4"]).arg(&host.device).arg(dir));
        host
    }

    fn dd(&self) -> PathBuf {
        self.dir.join("disk/DiskDescriptor.xml")
    }
}

impl Drop for Host<'_> {
    fn drop(&mut self) {
        let _ = output(ploop().args(["umount", "-c", "old"]).arg(self.dd()));
        let _ = output(ploop().arg("umount").arg(self.dd()));
        let _ = output(Command::new("umount").arg(self.dir));
        let _ = output(Command::new("losetup").arg("-d").arg(&self.device));
    }
}

/// What a block held when: by mark.
#[derive(Default)]
struct Story {
    mark: u64,
    /// Mark -> (block, number of its write), durable from then on.
    flushed: BTreeMap<u64, (u64, u64)>,
    /// Content of the calm blocks of each snapshot; its GUID.
    shots: HashMap<Guid, Vec<u64>>,
    /// Mark from which on it is there, and that from which on it may be gone.
    taken: HashMap<Guid, u64>,
    going: HashMap<Guid, u64>,
}

struct Life<'a> {
    taped: Mutex<&'a mut Taped>,
    story: Mutex<Story>,
}

impl Life<'_> {
    fn story(&self) -> MutexGuard<'_, Story> {
        self.story.lock().expect("nobody fails with it")
    }

    /// What `what` notes down is so from the next place on the tape on.
    fn mark(&self, what: impl FnOnce(&mut Story, u64)) {
        let mut taped = self.taped.lock().expect("nobody fails with it");
        let mut story = self.story();
        story.mark += 1;
        let mark = story.mark;
        taped.mark(mark);
        what(&mut story, mark);
    }
}

fn open(node: &str) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(node).expect("the device")
}

fn write(file: &File, block: u64, number: u64) {
    let mut buf = AlignedBuf::new(BLOCK as usize);
    buf.copy_from_slice(&data(block, number));
    file.write_all_at(&buf, block * SPREAD / BLOCK * BLOCK).expect("write");
}

/// Which write a block holds, of those up to `newest`.
fn read(file: &File, block: u64, newest: u64) -> Option<u64> {
    let mut buf = AlignedBuf::new(BLOCK as usize);
    file.read_exact_at(&mut buf, block * SPREAD / BLOCK * BLOCK).expect("read");
    (0..=newest).rev().find(|n| data(block, *n)[..] == buf[..])
}

fn node_of(said: &str) -> String {
    let at = said.find("dev=").unwrap_or_else(|| panic!("no device in {said}"));
    said[at + 4..].split(|c: char| c.is_whitespace() || c == ',').next().unwrap_or_default().to_owned()
}

/// Operations in any order, while a writer goes on.
fn live(taped: &mut Taped, host: &Host, rng: &mut Rng, rounds: u64) -> Story {
    let dd = host.dd();
    fs::create_dir(dd.parent().expect("a folder")).expect("folder");
    run(ploop().args(["init", "-s", "16m", "-b", "128", "-t", "none"]).arg(dd.with_file_name("root.hdd")));
    let node = node_of(&run(ploop().arg("mount").arg(&dd)));
    let life = Life { taped: Mutex::new(taped), story: Mutex::default() };
    life.mark(|_, _| ());
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let busy = s.spawn(|| {
            let file = open(&node);
            let mut number = 0;
            while !stop.load(Ordering::Relaxed) {
                number += 1;
                let block = CALM + number * 5 % BUSY;
                write(&file, block, number);
                if number % 3 == 0 {
                    file.sync_data().expect("sync");
                    life.mark(|story, mark| _ = story.flushed.insert(mark, (block, number)));
                }
                std::thread::sleep(std::time::Duration::from_millis(3));
            }
        });
        let file = open(&node);
        let mut calm = vec![0; CALM as usize];
        let mut known: Vec<Guid> = Vec::new();
        for number in 1..=rounds {
            let changed: Vec<u64> = (0..1 + rng.below(6)).map(|_| rng.below(CALM)).collect();
            for block in &changed {
                write(&file, *block, number);
                calm[*block as usize] = number;
            }
            file.sync_data().expect("sync");
            for block in changed {
                life.mark(|story, mark| _ = story.flushed.insert(mark, (block, number)));
            }
            // Each kind at the beginning, then as it comes.
            let kind = [0, 0, 0, 3, 0, 5].get(number as usize - 1).copied().unwrap_or_else(|| rng.below(6));
            match kind {
                0..=2 => {
                    let guid = Guid::generate();
                    life.story().shots.insert(guid, calm.clone());
                    run(ploop().args(["snapshot", "-u", &guid.to_string()]).arg(&dd));
                    life.mark(|story, mark| _ = story.taken.insert(guid, mark));
                    known.push(guid);
                }
                3 | 4 if !known.is_empty() => {
                    let guid = known.remove(rng.below(known.len() as u64) as usize);
                    life.mark(|story, mark| _ = story.going.insert(guid, mark));
                    run(ploop().args(["snapshot-delete", "-u", &guid.to_string()]).arg(&dd));
                }
                5 if known.len() > 2 => {
                    for guid in known.drain(..) {
                        life.mark(|story, mark| _ = story.going.insert(guid, mark));
                    }
                    run(ploop().args(["snapshot-merge", "-A"]).arg(&dd));
                }
                _ => {}
            }
        }
        stop.store(true, Ordering::Relaxed);
        busy.join().expect("the writer");
    });
    life.story.into_inner().expect("nobody fails with it")
}

/// Looks at the disk after a cut.
fn examine(host: &Host, story: &Story, mark: u64, what: &str) -> usize {
    let dd = host.dd();
    let node = node_of(&run(ploop().arg("mount").arg(&dd)));
    let file = open(&node);
    let mut least = BTreeMap::new();
    for (block, number) in story.flushed.range(..=mark).map(|(_, v)| *v) {
        least.insert(block, number);
    }
    let newest = story.flushed.values().map(|v| v.1).max().unwrap_or(0) + 3;
    for block in 0..CALM + BUSY {
        let least = least.get(&block).copied().unwrap_or(0);
        let found = read(&file, block, newest);
        assert!(found.is_some_and(|n| n >= least), "{what}: block {block} holds write {found:?}, {least} was flushed");
    }
    drop(file);
    let disk = Descriptor::read(&dd).unwrap_or_else(|e| panic!("{what}: {e}"));
    for (guid, taken) in &story.taken {
        let kept = *taken <= mark && story.going.get(guid).is_none_or(|going| *going > mark);
        let there = disk.snapshot(guid).is_some_and(|s| !s.temporary);
        assert!(there || !kept, "{what}: snapshot {guid} is lost: {:?}", disk.snapshots);
    }
    let mut seen = 0;
    for snapshot in disk.snapshots.iter().filter(|s| !s.temporary) {
        let Some(calm) = story.shots.get(&snapshot.guid) else { continue };
        let said = run(ploop().args(["mount", "-r", "-c", "old", "-u", &snapshot.guid.to_string()]).arg(&dd));
        let file = File::open(node_of(&said)).expect("the device");
        for (block, number) in calm.iter().enumerate() {
            let mut buf = vec![0; BLOCK as usize];
            file.read_exact_at(&mut buf, block as u64 * SPREAD / BLOCK * BLOCK).expect("read");
            assert!(
                buf == data(block as u64, *number),
                "{what}: snapshot {}: block {block} is not write {number}",
                snapshot.guid
            );
        }
        drop(file);
        run(ploop().args(["umount", "-c", "old"]).arg(&dd));
        seen += 1;
    }
    run(ploop().arg("umount").arg(&dd));
    let checked = run(ploop().arg("check").arg(&dd));
    assert!(!checked.contains("rror"), "{what}: {checked}");
    seen
}

#[test]
fn online_operations_survive_the_hosts_power_cut() {
    let Some(t) = Bench::new("online_operations_survive_the_hosts_power_cut") else { return };
    // Full: at every change in turn, in a life with each kind of operation.
    let (rounds, cuts) = count((40, Some(12)), (40, Some(8)), (6, None));
    let seed = crate::seeded();
    let mut rng = Rng::new(seed.0);
    let dir = t.dir.path().canonicalize().expect("folder");
    let mnt = dir.join("host");
    fs::create_dir(&mnt).expect("mount point");
    let (real, tape, start, cut) = (dir.join("real"), dir.join("tape"), dir.join("start"), dir.join("cut"));
    for path in [&real, &start] {
        File::create(path).and_then(|f| f.set_len(512 << 20)).expect("file");
    }
    let mut taped = Taped::mount(&dir.join("taped"), &real, &tape);
    let path = taped.0.path.clone();
    let host = Host::new(&path, &mnt, true);
    let story = live(&mut taped, &host, &mut rng, rounds);
    drop(host);
    // The tape is written out.
    taped.mark(u64::MAX);
    drop(taped);
    let events = play(&tape);
    let first = events.iter().position(|e| matches!(e, Event::Mark(1))).expect("the first mark");
    let last = events.iter().position(|e| matches!(e, Event::Mark(n) if *n == story.mark)).expect("the last mark");
    let changes: Vec<usize> = (first..=last).filter(|e| !matches!(events[*e], Event::Mark(_) | Event::Sync)).collect();
    let mut places: Vec<usize> = match cuts {
        Some(cuts) => (0..cuts).map(|_| changes[rng.below(changes.len() as u64) as usize]).collect(),
        None => changes,
    };
    places.sort_unstable();
    let cuts = places.len();
    println!("{} events on tape, {} marks, {} snapshots; {cuts} cuts", events.len(), story.mark, story.taken.len());
    let (mut at, mut mark, mut lost, mut seen) = (0, 0, 0, 0);
    let mut since: Vec<usize> = Vec::new();
    for (i, place) in places.into_iter().enumerate() {
        let durable = OpenOptions::new().read(true).write(true).open(&start).expect("host");
        while at <= place {
            match &events[at] {
                Event::Sync => since.drain(..).for_each(|e| apply(&durable, &events[e], 0, &mut || true)),
                Event::Mark(n) => mark = *n,
                _ => since.push(at),
            }
            at += 1;
        }
        run(Command::new("cp").args(["--reflink=auto", "--sparse=always"]).arg(&start).arg(&cut));
        let file = OpenOptions::new().read(true).write(true).open(&cut).expect("host");
        let mode = rng.below(4);
        for e in &since {
            let whole = rng.below(2) == 0;
            apply(&file, &events[*e], 0, &mut || match mode {
                0 => false,
                1 => true,
                2 => whole,
                _ => rng.below(2) == 0,
            });
        }
        lost += since.len();
        drop(file);
        let host = Host::new(&cut, &mnt, false);
        seen += examine(&host, &story, mark, &format!("cut {i} at event {place}, mode {mode}, mark {mark}"));
        drop(host);
        fs::remove_file(&cut).expect("remove");
    }
    println!("{cuts} cuts, {lost} changes at stake in them, {seen} snapshots looked at: nothing lost");
}

//! Power cuts: everything that a device wrote to its image is on tape, in order, with its syncs. After a cut at any place
//! the image holds all that a sync covered and anything of the rest; what the file system in the disk has called durable
//! must be there.
//!
//! `PLOOP_TEST=full` cuts at 500 places, `ci` at 50, otherwise 20. `PLOOP_SEED=N` repeats a run's choices.

#[path = "../device_common/mod.rs"]
mod device_common;
mod host;
mod tape;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use device_common::common::{self, rng::Rng, seed::Seed};
use device_common::{Bench, count, pattern, run};
use ploop::chain::Marked;
use ploop::device::{self, Device};
use ploop::format::header::Version;
use ploop::image::check::{CheckOptions, check_file};
use ploop::image::create::create_delta;
use ploop::units::ClusterSize;
use tape::{Event, Taped, play};

/// Not a test by itself: the process that serves the file.
#[test]
fn served() {
    tape::serve_if_asked();
}

const BLOCK: u64 = 4096;
/// The data of an image begins here at the earliest.
const BAT: u64 = 64 << 10;
/// Blocks of the file that is rewritten in place.
const SLOTS: u64 = 512;

/// Each run makes new choices unless a seed is asked for.
fn seeded() -> Seed {
    let seed = common::seed::one(Some("POWERCUT_SEED"), common::seed::fresh());
    println!("PLOOP_SEED={}", seed.0);
    seed
}

/// A mounted file system, unmounted at the end whatever it is.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn new(device: &Device, dir: &'a Path) -> Mounted<'a> {
        run(Command::new("mount").args(["-t", "ext4"]).arg(device.node()).arg(dir));
        Mounted(dir)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        // A child that another test starts has our files open for a moment.
        for _ in 0..100 {
            if Command::new("umount").arg(self.0).status().is_ok_and(|s| s.success()) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
}

/// What was durable when: by mark.
#[derive(Default)]
struct Story {
    /// Mark -> file that was whole from then on.
    files: BTreeMap<u64, u64>,
    /// Mark -> (slot, number of its write).
    slots: BTreeMap<u64, (u64, u64)>,
    removed: BTreeMap<u64, u64>,
}

fn file_len(n: u64) -> usize {
    (n * 7919 % 300_000) as usize + 1
}

/// Each sector names its write, since one that was not synced may be torn.
fn slot_data(slot: u64, number: u64) -> Vec<u8> {
    let mut data = pattern(slot << 40 | number, BLOCK as usize);
    data.chunks_mut(512).for_each(|sector| sector[..8].copy_from_slice(&number.to_le_bytes()));
    data
}

/// Files made and synced, blocks rewritten and synced, files removed: on a disk whose image is on tape.
fn live(t: &Bench, taped: &mut Taped, dir: &Path, rng: &mut Rng, rounds: u64) -> Story {
    let mut spec = t.spec(&taped.0.path);
    spec.marked = Marked::Recover;
    let device = device::attach(spec).expect("attach");
    run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(device.node()));
    let mut story = Story::default();
    {
        let _mounted = Mounted::new(&device, dir);
        let slots = OpenOptions::new().create_new(true).read(true).write(true).open(dir.join("slots")).expect("slots");
        for slot in 0..SLOTS {
            slots.write_all_at(&slot_data(slot, 0), slot * BLOCK).expect("slot");
        }
        slots.sync_all().expect("sync");
        File::open(dir).and_then(|d| d.sync_all()).expect("sync");
        taped.mark(0);
        let mut mark = 0;
        for n in 1..=rounds {
            match rng.below(5) {
                0 | 1 => {
                    let path = dir.join(format!("f{n}"));
                    fs::write(&path, pattern(n, file_len(n))).expect("file");
                    File::open(&path).and_then(|f| f.sync_all()).expect("sync");
                    File::open(dir).and_then(|d| d.sync_all()).expect("sync");
                    mark += 1;
                    taped.mark(mark);
                    story.files.insert(mark, n);
                }
                2 | 3 => {
                    let mut written = Vec::new();
                    for _ in 0..1 + rng.below(12) {
                        let slot = rng.below(SLOTS);
                        slots.write_all_at(&slot_data(slot, n), slot * BLOCK).expect("slot");
                        written.push(slot);
                    }
                    if rng.below(3) > 0 {
                        slots.sync_data().expect("sync");
                        for slot in written {
                            mark += 1;
                            taped.mark(mark);
                            story.slots.insert(mark, (slot, n));
                        }
                    }
                }
                _ => {
                    // Room that is given back and used again.
                    let known: Vec<u64> = story.files.values().copied().collect();
                    let gone: Vec<u64> = story.removed.values().copied().collect();
                    if let Some(old) = known.into_iter().find(|f| !gone.contains(f) && n > f + 20) {
                        mark += 1;
                        // From before the removal nothing is promised of it.
                        taped.mark(mark);
                        story.removed.insert(mark, old);
                        fs::remove_file(dir.join(format!("f{old}"))).expect("remove");
                        if rng.below(2) == 0 {
                            run(Command::new("fstrim").arg(dir));
                        }
                    }
                }
            }
        }
    }
    device::detach(device.name()).expect("detach");
    story
}

/// The file's durable content, and what came since.
struct Disk {
    image: PathBuf,
    since: Vec<usize>,
}

/// `torn`: where the blocks begin that are written whole.
fn apply(file: &File, event: &Event, torn: u64, keep: &mut dyn FnMut() -> bool) {
    match event {
        Event::Write { at, data } => {
            // Header and BAT are torn anywhere; of the disk's blocks file systems expect that they are written whole.
            let unit = if *at < torn { 512 } else { BLOCK - at % BLOCK };
            let (first, rest) = data.split_at((unit as usize).min(data.len()));
            let rest = rest.chunks(if *at < torn { 512 } else { BLOCK as usize });
            let mut to = *at;
            for part in std::iter::once(first).chain(rest) {
                if keep() {
                    file.write_all_at(part, to).expect("write");
                }
                to += part.len() as u64;
            }
        }
        Event::Zero { at, len } => {
            let end = file.metadata().expect("length").len();
            if at + len > end && keep() {
                file.set_len(at + len).expect("length");
            }
            let mut from = *at;
            while from < (at + len).min(file.metadata().expect("length").len()) {
                let n = (at + len - from).min(1 << 20);
                if keep() {
                    file.write_all_at(&vec![0; n as usize], from).expect("zero");
                }
                from += n;
            }
        }
        Event::Length(len) => {
            if keep() {
                file.set_len(*len).expect("length");
            }
        }
        Event::Sync | Event::Mark(_) => {}
    }
}

/// Looks at the disk after a cut: all that was durable by `mark` is there.
fn examine(t: &Bench, image: &Path, dir: &Path, story: &Story, mark: u64, what: &str) {
    let options =
        CheckOptions { force: true, check: true, drop_inuse: true, repair_sparse: true, ..CheckOptions::default() };
    let mut spec = t.spec(image);
    spec.marked = Marked::Recover;
    let device = device::attach(spec).unwrap_or_else(|e| panic!("{what}: {e}"));
    {
        let _mounted = Mounted::new(&device, dir);
        for (_, n) in story.files.range(..=mark) {
            if story.removed.range(..=mark).any(|(_, gone)| gone == n) {
                continue;
            }
            let path = dir.join(format!("f{n}"));
            let got = fs::read(&path).unwrap_or_else(|e| panic!("{what}: file {n}: {e}"));
            assert!(got == pattern(*n, file_len(*n)), "{what}: file {n} has other content");
        }
        let slots = File::open(dir.join("slots")).unwrap_or_else(|e| panic!("{what}: slots: {e}"));
        let mut least: BTreeMap<u64, u64> = BTreeMap::new();
        for (slot, number) in story.slots.range(..=mark).map(|(_, v)| *v) {
            least.insert(slot, number);
        }
        for slot in 0..SLOTS {
            let mut data = vec![0; BLOCK as usize];
            slots.read_exact_at(&mut data, slot * BLOCK).expect("slot");
            let least = least.get(&slot).copied().unwrap_or(0);
            for (i, sector) in data.chunks(512).enumerate() {
                let number = u64::from_le_bytes(sector[..8].try_into().expect("8 bytes"));
                assert!(number >= least, "{what}: slot {slot} has write {number}, {least} was durable");
                let written = &slot_data(slot, number)[i * 512..(i + 1) * 512];
                assert!(sector == written, "{what}: slot {slot} was never written so (write {number})");
            }
        }
    }
    run(Command::new("e2fsck").args(["-f", "-n"]).arg(device.node()));
    device::detach(device.name()).unwrap_or_else(|e| panic!("{what}: {e}"));
    check_file(image, None, &options).unwrap_or_else(|e| panic!("{what}: afterwards check says {e}"));
}

#[test]
fn what_was_synced_survives_a_power_cut() {
    let Some(t) = Bench::new("what_was_synced_survives_a_power_cut") else { return };
    let cuts = count(50, 20, 500);
    let seed = seeded();
    let mut rng = Rng::new(seed.0);
    let dir = t.dir.path().join("mnt");
    fs::create_dir(&dir).expect("mount point");
    let (real, tape, start) = (t.dir.path().join("real"), t.dir.path().join("tape"), t.dir.path().join("start"));
    let cluster = ClusterSize::from_sectors(rng.below(2) * 448 + 64).expect("cluster size");
    create_delta(&real, Version::V2, cluster, 400 << 11).expect("image");
    fs::copy(&real, &start).expect("copy");
    let mut taped = Taped::mount(&t.dir.path().join("taped"), &real, &tape);
    let story = live(&t, &mut taped, &dir, &mut rng, 150);
    // The tape is written out.
    taped.mark(u64::MAX);
    drop(taped);
    let events = play(&tape);
    let first = events.iter().position(|e| matches!(e, Event::Mark(0))).expect("the first mark");
    let mut places: Vec<usize> = (0..cuts).map(|_| first + rng.below((events.len() - first) as u64) as usize).collect();
    places.sort_unstable();
    let syncs = events.iter().filter(|e| matches!(e, Event::Sync)).count();
    println!(
        "{} events on tape, {syncs} syncs, {} files and {} blocks called durable; {cuts} cuts",
        events.len(),
        story.files.len(),
        story.slots.len()
    );
    let mut disk = Disk { image: start, since: Vec::new() };
    let (mut at, mut mark, mut lost) = (0, 0, 0);
    for (i, place) in places.into_iter().enumerate() {
        let durable = OpenOptions::new().read(true).write(true).open(&disk.image).expect("image");
        while at <= place {
            match &events[at] {
                Event::Sync => disk.since.drain(..).for_each(|e| apply(&durable, &events[e], BAT, &mut || true)),
                Event::Mark(n) => mark = *n,
                _ => disk.since.push(at),
            }
            at += 1;
        }
        let cut = t.dir.path().join("cut");
        run(Command::new("cp").args(["--reflink=auto", "--sparse=always"]).arg(&disk.image).arg(&cut));
        let file = OpenOptions::new().read(true).write(true).open(&cut).expect("image");
        // Whole operations, or parts of them; none; all.
        let mode = rng.below(4);
        for e in &disk.since {
            let whole = rng.below(2) == 0;
            apply(&file, &events[*e], BAT, &mut || match mode {
                0 => false,
                1 => true,
                2 => whole,
                _ => rng.below(2) == 0,
            });
        }
        lost += disk.since.len();
        drop(file);
        examine(&t, &cut, &dir, &story, mark, &format!("cut {i} at event {place}, mode {mode}, mark {mark}"));
        fs::remove_file(&cut).expect("remove");
    }
    println!("{cuts} cuts, {lost} changes at stake in them: nothing lost");
}

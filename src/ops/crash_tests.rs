//! Every operation stopped at each of its steps, by a kill and by power cuts that leave any part of what was not synced;
//! then the disk is opened again. What was there is there, the operation is finished or undone, and can be done again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::check::check_disk;
use super::compact::compact_disk;
use super::grow::grow_disk;
use super::merge::{MergeParams, merge_snapshot};
use super::replace::{Which, replace};
use super::snapshot::{self, SnapshotParams};
use super::switch::{SwitchParams, switch};
use super::testkit::{content, files, g, make_disk, put, sizes, small};
use super::{merge_temporary, recovery};
use crate::descriptor::{Descriptor, FILE_NAME, ImageMode, LockedDescriptor};
use crate::error::{Kind, Result};
use crate::format::guid::{self, Guid};
use crate::format::header::Version;
use crate::image::grow::grow;
use crate::image::target::Target;
use crate::sys::store::record::{self, Thing};
use crate::testing::rng::Rng;

/// Contents by snapshot.
type Disk = BTreeMap<String, BTreeMap<u32, u8>>;

/// Of the snapshots that are to stay.
fn all_content(dd: &Path) -> Disk {
    let d = Descriptor::read(dd).unwrap();
    let kept = d.snapshots.iter().filter(|s| !s.temporary);
    kept.map(|s| (s.guid.to_string(), content(dd, &s.guid))).collect()
}

/// A folder in memory where there is one: syncs cost nothing there.
fn folder() -> tempfile::TempDir {
    match Path::new("/dev/shm").is_dir() {
        true => tempfile::tempdir_in("/dev/shm").unwrap(),
        false => tempfile::tempdir().unwrap(),
    }
}

fn copy(from: &Path) -> (tempfile::TempDir, PathBuf) {
    let dir = folder();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let dd = dir.path().canonicalize().unwrap().join(FILE_NAME);
    (dir, dd)
}

/// What a mount does before it takes the disk.
fn open_again(dd: &Path) {
    let mut disk = LockedDescriptor::open(dd).unwrap();
    let top = disk.top;
    recovery::before_mount(&mut disk, &top, false).unwrap();
    merge_temporary::merge_unused(&mut disk).unwrap();
}

struct Case<'a> {
    name: &'a str,
    /// The content can be read after recovery only: the operation rewrites BATs in place.
    rewrites: bool,
    /// Contents before and after.
    before: Disk,
    after: Disk,
    act: &'a dyn Fn(&Path) -> Result<()>,
}

impl Case<'_> {
    /// The content is that of before or after, of every snapshot that is still to stay.
    fn check_content(&self, dd: &Path, when: &str) {
        let d = Descriptor::read(dd).unwrap_or_else(|e| panic!("{} {when}: {e}", self.name));
        d.check_tree().unwrap();
        for (guid, now) in all_content(dd) {
            let fits = [&self.before, &self.after].iter().any(|side| side.get(&guid) == Some(&now));
            assert!(fits, "{} {when}: {guid} shows {now:?}", self.name);
        }
        let top = guid::TOP.to_string();
        assert!(all_content(dd).contains_key(&top), "{} {when}: no top", self.name);
    }

    /// After opening it again the disk is as before or as after, whole.
    fn check_whole(&self, dd: &Path, when: &str) {
        let now = all_content(dd);
        assert!(now == self.before || now == self.after, "{} {when}: {now:?}", self.name);
        let d = Descriptor::read(dd).unwrap();
        let marks = |side: &Disk| d.snapshots.iter().all(|s| side.contains_key(&s.guid.to_string()) || s.temporary);
        assert!(marks(&self.before) || marks(&self.after));
        check_disk(dd, None).unwrap_or_else(|e| panic!("{} {when}: {e}", self.name));
        for snapshot in &d.snapshots {
            check_disk(dd, Some(&snapshot.guid)).unwrap_or_else(|e| panic!("{} {when}: {e}", self.name));
        }
        let (image, descriptor) = sizes(dd);
        // A raw file that an interrupted grow left longer than the descriptor says does no harm: the next one corrects that.
        let raw = d.is_raw(d.image(&guid::TOP).unwrap());
        assert!(image == descriptor || raw && image > descriptor, "{} {when}: {image} {descriptor}", self.name);
    }

    fn examine(&self, dir: &Path, when: &str) {
        let dd = dir.canonicalize().unwrap().join(FILE_NAME);
        if !self.rewrites {
            self.check_content(&dd, when);
        }
        open_again(&dd);
        self.check_content(&dd, when);
        self.check_whole(&dd, when);
        // Once more, from there.
        match (self.act)(&dd) {
            Ok(()) => {}
            Err(e) if matches!(e.kind(), Kind::Param | Kind::NoSnap) => {}
            Err(e) => panic!("{} {when}, again: {e}", self.name),
        }
        assert_eq!(all_content(&dd), self.after, "{} {when}, again", self.name);
        check_disk(&dd, None).unwrap();
    }
}

/// Runs the operation on copies of the folder; returns how many points were tried and how many crashes were simulated.
pub(super) fn crashes(name: &str, from: &Path, act: &dyn Fn(&Path) -> Result<()>) -> (usize, usize) {
    crashes_without(None, name, from, act)
}

/// The same without the syncs of files or folders.
pub(super) fn crashes_without(
    syncs: Option<Thing>,
    name: &str,
    from: &Path,
    act: &dyn Fn(&Path) -> Result<()>,
) -> (usize, usize) {
    let (whole, dd) = copy(from);
    let before = all_content(&dd);
    act(&dd).unwrap_or_else(|e| panic!("{name}: {e}"));
    let after = all_content(&dd);
    check_disk(&dd, None).unwrap();
    let left = files(&dd);
    drop(whole);
    let rewrites = name.starts_with("version");
    let case = Case { name, rewrites, before, after, act };

    let (live, dd) = copy(from);
    let guard = record::start(live.path(), None);
    if let Some(thing) = syncs {
        guard.0.ignore_syncs(thing);
    }
    act(&dd).unwrap();
    let mut made = 0;
    let steps = guard.0.steps();
    let mut coins = Rng::new(steps as u64);
    for at in 0..=steps {
        let mut try_one = |kind: &str, choose: &mut dyn FnMut(Thing, usize) -> bool| {
            let dir = folder();
            guard.0.crash(at, dir.path(), choose);
            case.examine(dir.path(), &format!("stopped after step {at} of {steps} ({kind})"));
            made += 1;
        };
        try_one("kill", &mut |_, _| true);
        try_one("power cut, nothing more", &mut |_, _| false);
        try_one("power cut, the last step alone", &mut |_, step| step + 1 == at);
        if full() {
            try_one("power cut, names only", &mut |t, _| t == Thing::Name);
            try_one("power cut, data only", &mut |t, _| t == Thing::Data);
        }
        for n in 0..if full() { 4 } else { 1 } {
            let seed = coins.next();
            let mut coins = Rng::new(seed);
            try_one(&format!("power cut {n}, seed {seed:#x}"), &mut |_, _| coins.coin());
        }
    }
    let begun = guard.0.begun();
    drop(guard);

    // Each step failing by itself; the other steps still work.
    for at in 0..begun {
        for errno in [libc::ENOSPC, libc::EIO] {
            if !full() && (errno == libc::EIO) != (at % 4 == 0) {
                continue;
            }
            let (dir, dd) = copy(from);
            let guard = record::start(dir.path(), Some((at, errno)));
            let result = act(&dd);
            let failed_folder = guard.0.failed_folder();
            drop(guard);
            let when = format!("{name}: step {at} of {begun} failing with {errno}: {result:?}");
            if !rewrites {
                case.check_content(&dd, &when);
            }
            let named: Vec<String> = (Descriptor::read(&dd).unwrap().images.iter())
                .map(|i| i.file.file_name().unwrap().to_string_lossy().into_owned())
                .collect();
            let extra = files(&dd).into_iter().filter(|f| !named.contains(f)).count();
            // One file that could not be removed may stay; all of them if it is not known what is durable.
            let unknown = failed_folder || result.as_ref().is_err_and(|e| e.kind() == Kind::Fsync);
            assert!(unknown || extra <= 1 + left.len().saturating_sub(named.len()), "{when}: {:?}", files(&dd));
            case.examine(dir.path(), &when);
            made += 1;
        }
    }
    (steps + 1 + begun, made)
}

pub(super) fn base(version: Version, mode: ImageMode) -> (tempfile::TempDir, PathBuf) {
    let dir = folder();
    let dd = make_disk(dir.path(), version, mode, small(), 12);
    (dir, dd)
}

pub(super) fn take(dd: &Path, n: u32) -> Result<()> {
    snapshot::create(dd, "", &SnapshotParams { guid: g(n), snap_dir: None, temporary: false })
}

/// base 1 <- 2 <- 3 <- top, with clusters of their own and shared ones, zeroes among them.
pub(super) fn chain(version: Version, mode: ImageMode) -> (tempfile::TempDir, PathBuf) {
    let (dir, dd) = base(version, mode);
    for n in 1..=3 {
        put(&dd, &guid::TOP, 0, n as u8);
        put(&dd, &guid::TOP, n, n as u8 + 10);
        put(&dd, &guid::TOP, n + 4, if n == 2 { 0 } else { 30 });
        take(&dd, n).unwrap();
    }
    put(&dd, &guid::TOP, 0, 99);
    put(&dd, &guid::TOP, 5, 0);
    put(&dd, &guid::TOP, 11, 98);
    (dir, dd)
}

fn merge(dd: &Path, guid: Option<Guid>, guid2: Option<Guid>, all: bool) -> Result<()> {
    merge_snapshot(dd, "", &MergeParams { guid, guid2, all, new_delta: None })
}

/// All kinds of disks in a full run, else the one that the test is about.
pub(super) fn kinds(one: ImageMode) -> Vec<(Version, ImageMode)> {
    let all = [(Version::V1, ImageMode::Expanded), (Version::V2, ImageMode::Expanded), (Version::V2, ImageMode::Raw)];
    all.into_iter().filter(|(version, mode)| full() || (*version == Version::V2 && *mode == one)).collect()
}

pub(super) fn full() -> bool {
    std::env::var("PLOOP_TEST").is_ok_and(|v| v == "full")
}

pub(super) fn told(name: &str, (points, made): (usize, usize)) {
    println!("{name}: {points} points, {made} crashes");
}

#[test]
fn crashes_of_snapshots() {
    for (version, mode) in kinds(ImageMode::Expanded) {
        let (dir, _dd) = chain(version, mode);
        told("snapshot", crashes("snapshot", dir.path(), &|dd| take(dd, 9)));
    }
}

#[test]
fn missing_syncs_are_found() {
    let to = SwitchParams { guid: g(2), guid_old: None, keep_top: false, no_new_top: false };
    let (dir, _dd) = chain(Version::V2, ImageMode::Expanded);
    for thing in [Thing::Name, Thing::Data] {
        let tried = || crashes_without(Some(thing), "switch", dir.path(), &|dd| switch(dd, "", &to));
        assert!(std::panic::catch_unwind(tried).is_err(), "{thing:?}: never synced, and no crash loses anything");
    }
}

#[test]
fn crashes_of_switches() {
    let to = |n| SwitchParams { guid: g(n), guid_old: None, keep_top: false, no_new_top: false };
    for (version, mode) in kinds(ImageMode::Expanded) {
        let (dir, dd) = chain(version, mode);
        told("switch", crashes("switch", dir.path(), &|dd| switch(dd, "", &to(2))));
        let keep = SwitchParams { keep_top: true, guid_old: Some(g(8)), ..to(2) };
        told("switch, top kept", crashes("switch, top kept", dir.path(), &|dd| switch(dd, "", &keep)));
        switch(&dd, "", &to(2)).unwrap();
        let same = SwitchParams { no_new_top: true, ..to(3) };
        told("switch, no new top", crashes("switch, no new top", dir.path(), &|dd| switch(dd, "", &same)));
    }
}

#[test]
fn crashes_of_deletes() {
    for (version, mode) in kinds(ImageMode::Expanded) {
        let (dir, dd) = chain(version, mode);
        told("delete a middle one", crashes("delete 2", dir.path(), &|dd| snapshot::delete(dd, &g(2))));
        told("delete the base", crashes("delete 1", dir.path(), &|dd| snapshot::delete(dd, &g(1))));
        // Deleting the top twice deletes another one.
        let once = |dd: &Path| match Descriptor::read(dd)?.images.len() {
            4 => snapshot::delete_top(dd),
            _ => Ok(()),
        };
        told("delete the top", crashes("delete top", dir.path(), &once));
        let keep = SwitchParams { guid: g(2), guid_old: Some(g(8)), keep_top: true, no_new_top: false };
        switch(&dd, "", &keep).unwrap();
        told("delete one with children", crashes("delete branched", dir.path(), &|dd| snapshot::delete(dd, &g(2))));
        snapshot::delete(&dd, &g(2)).unwrap();
        told("delete a leaf", crashes("delete leaf", dir.path(), &|dd| snapshot::delete(dd, &g(8))));
    }
}

#[test]
fn crashes_of_merges() {
    for (version, mode) in kinds(ImageMode::Expanded) {
        let (dir, _dd) = chain(version, mode);
        // Merging once more would merge the next one.
        let down = |images: usize| {
            move |dd: &Path| match Descriptor::read(dd)?.images.len() {
                n if n > images => merge(dd, None, None, false),
                _ => Ok(()),
            }
        };
        told("merge the top", crashes("merge top", dir.path(), &down(3)));
        told("merge all", crashes("merge all", dir.path(), &|dd| merge(dd, None, None, true)));
        told("merge a range", crashes("merge 3..1", dir.path(), &|dd| merge(dd, Some(g(3)), Some(g(1)), false)));
    }
}

/// The commit's own sync of the folder, and the one before files are removed: where either fails, all files are there.
#[test]
fn nothing_is_removed_before_the_new_descriptor_is_durable() {
    let (from, _) = chain(Version::V2, ImageMode::Expanded);
    let named =
        |dd: &Path| -> Vec<PathBuf> { Descriptor::read(dd).unwrap().images.iter().map(|i| i.file.clone()).collect() };
    let mut kept = 0;
    for at in 0..200 {
        let (dir, dd) = copy(from.path());
        let before = named(&dd);
        let guard = record::start(dir.path(), Some((at, libc::EIO)));
        let _ = merge(&dd, None, None, true);
        let (over, folder) = (guard.0.begun() <= at, guard.0.failed_folder());
        drop(guard);
        if over {
            break;
        }
        kept += usize::from(folder && named(&dd).len() < before.len() && before.iter().all(|f| f.exists()));
    }
    assert!(kept >= 2, "{kept}");
}

#[test]
fn crashes_of_merges_into_a_new_file() {
    for (version, mode) in kinds(ImageMode::Expanded) {
        let (dir, _dd) = chain(version, mode);
        let into_new = |dd: &Path| {
            let new_delta = Some(dd.with_file_name("merged"));
            match Descriptor::read(dd)?.images.len() {
                1 => Ok(()),
                _ => {
                    // After a crash behind its rename the file is whole, but the merge cannot know that.
                    let _ = std::fs::remove_file(dd.with_file_name("merged"));
                    merge_snapshot(dd, "", &MergeParams { all: true, new_delta, ..Default::default() })
                }
            }
        };
        told("merge into a new file", crashes("merge new", dir.path(), &into_new));
    }
}

#[test]
fn crashes_of_replacing() {
    for keep_name in [false, true] {
        let (dir, dd) = chain(Version::V2, ImageMode::Expanded);
        let old = Descriptor::read(&dd).unwrap().image(&g(2)).unwrap().file.clone();
        std::fs::copy(old, dd.with_file_name("copy")).unwrap();
        // In a copy of the folder the files have other inode numbers: the image is found by its name.
        let act = |dd: &Path| match dd.with_file_name("copy") {
            new if new.exists() => replace(dd, "", &Which::Guid(g(2)), &new, keep_name),
            _ => Ok(()),
        };
        told("replace", crashes("replace", dir.path(), &act));
    }
}

#[test]
fn crashes_of_grows() {
    for (version, mode) in kinds(ImageMode::Expanded) {
        let (dir, dd) = base(version, mode);
        for c in 0..4 {
            put(&dd, &guid::TOP, c, c as u8 + 1);
        }
        if mode != ImageMode::Raw {
            take(&dd, 1).unwrap();
            put(&dd, &guid::TOP, 2, 77);
        }
        // A table of two clusters: data clusters move.
        let clusters = if mode == ImageMode::Raw { 14 } else { 8200 };
        let act = |dd: &Path| grow_disk(dd, clusters * 64);
        told("grow", crashes("grow", dir.path(), &act));
        let e = grow_disk(&dd, 64).unwrap_err();
        assert_eq!(e.kind(), Kind::Param, "{e}");
    }
}

#[test]
fn crashes_of_compacting() {
    for (version, mode) in kinds(ImageMode::Expanded) {
        if mode == ImageMode::Raw {
            continue;
        }
        let (dir, dd) = base(version, mode);
        put(&dd, &guid::TOP, 1, 1);
        take(&dd, 1).unwrap();
        // Zeroes over a lower cluster, zeroes over nothing, and data that move.
        for (cluster, fill) in [(1, 0), (2, 0), (3, 0), (4, 4), (5, 0), (6, 6), (7, 7)] {
            put(&dd, &guid::TOP, cluster, fill);
        }
        let act = |dd: &Path| compact_disk(dd, false).map(drop);
        told("compact", crashes("compact", dir.path(), &act));
        let done = compact_disk(&dd, false).unwrap();
        assert_eq!((done.packed.freed, done.packed.moved), (3, 2));
        assert_eq!(compact_disk(&dd, false).unwrap().packed, Default::default());
    }
}

#[test]
fn crashes_of_merges_that_grow() {
    for (version, mode) in kinds(ImageMode::Expanded) {
        let (dir, dd) = base(version, mode);
        for c in 0..4 {
            put(&dd, &guid::TOP, c, c as u8 + 1);
        }
        take(&dd, 1).unwrap();
        put(&dd, &guid::TOP, 2, 77);
        let top = Descriptor::read(&dd).unwrap().image(&guid::TOP).unwrap().file.clone();
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&top).unwrap();
        let mut target = Target::open(&file, &top).unwrap();
        target.mark().unwrap();
        let clusters = if mode == ImageMode::Raw { 14 } else { 8200 };
        grow(&mut target, clusters * 64).unwrap();
        target.close(false).unwrap();
        drop(file);
        put(&dd, &guid::TOP, clusters as u32 - 1, 5);
        let mut d = Descriptor::read(&dd).unwrap();
        d.size_sectors = clusters * 64;
        d.commit(&dd).unwrap();
        told("merge and grow", crashes("merge and grow", dir.path(), &|dd| merge(dd, None, None, true)));
    }
}

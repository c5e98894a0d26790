//! Snapshots, switches, deletes and merges of disks that do not run, by their content.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::check::check_disk;
use super::merge::{MergeParams, merge_files, merge_snapshot};
use super::mount::{self, MountParams};
use super::replace::{Which, replace};
use super::snapshot::{self, SnapshotParams};
use super::snapshot_list::{self, ListParams};
use super::switch::{SwitchParams, switch};
use super::testkit::{self, content, files, g, make_disk, map, put, sizes, small};
use crate::descriptor::{Descriptor, ImageMode, LockedDescriptor};
use crate::error::Kind;
use crate::format::guid::{self, Guid};
use crate::format::header::{self, Version};
use crate::image::grow::grow;
use crate::image::merge::{Merge, MergeLevel, MergeOptions};
use crate::image::target::Target;
use crate::sys::store::record;

const KINDS: [(Version, ImageMode); 4] = [
    (Version::V1, ImageMode::Expanded),
    (Version::V2, ImageMode::Expanded),
    (Version::V2, ImageMode::Preallocated),
    (Version::V2, ImageMode::Raw),
];

fn disk(kind: (Version, ImageMode)) -> (tempfile::TempDir, PathBuf) {
    let dir = testkit::folder();
    let dd = make_disk(dir.path(), kind.0, kind.1, small(), 40);
    (dir, dd)
}

fn snap(dd: &Path, n: u32) {
    snapshot::create(dd, "", &SnapshotParams { guid: g(n), snap_dir: None, temporary: false }).unwrap();
}

fn merge(dd: &Path, guid: Option<Guid>, guid2: Option<Guid>) -> Result<(), Kind> {
    merge_snapshot(dd, "", &MergeParams { guid, guid2, ..Default::default() }).map_err(|e| e.kind())
}

fn to(n: u32) -> SwitchParams {
    SwitchParams { guid: g(n), guid_old: None, keep_top: false, no_new_top: false }
}

fn mark(path: &Path) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&header::IN_USE.to_le_bytes(), 44).unwrap();
}

#[test]
fn snapshots_freeze_what_was_there() {
    for kind in KINDS {
        let (_dir, dd) = disk(kind);
        put(&dd, &guid::TOP, 3, 1);
        snap(&dd, 1);
        put(&dd, &guid::TOP, 3, 2);
        put(&dd, &guid::TOP, 39, 7);
        snap(&dd, 2);
        put(&dd, &guid::TOP, 3, 0);
        assert_eq!(content(&dd, &g(1)), map(&[(3, 1)]));
        assert_eq!(content(&dd, &g(2)), map(&[(3, 2), (39, 7)]));
        assert_eq!(content(&dd, &guid::TOP), map(&[(39, 7)]));
        assert_eq!(sizes(&dd), (40, 40));
        check_disk(&dd, None).unwrap();
    }
}

#[test]
fn one_snapshot_is_merged_into_its_parent() {
    for kind in KINDS {
        let (_dir, dd) = disk(kind);
        put(&dd, &guid::TOP, 3, 1);
        put(&dd, &guid::TOP, 4, 1);
        snap(&dd, 1);
        put(&dd, &guid::TOP, 3, 2);
        put(&dd, &guid::TOP, 5, 2);
        snap(&dd, 2);
        put(&dd, &guid::TOP, 5, 0);
        put(&dd, &guid::TOP, 6, 3);
        let want = content(&dd, &guid::TOP);
        merge(&dd, Some(g(2)), None).unwrap();
        assert_eq!(content(&dd, &g(2)), map(&[(3, 2), (4, 1), (5, 2)]));
        assert_eq!(content(&dd, &guid::TOP), want);
        merge(&dd, None, None).unwrap();
        assert_eq!(content(&dd, &guid::TOP), want);
        assert_eq!(files(&dd), ["root.hdd"]);
        check_disk(&dd, None).unwrap();
        assert_eq!(merge(&dd, None, None), Err(Kind::Param));
    }
}

#[test]
fn ranges_and_everything() {
    for kind in KINDS {
        for range in [(None, None), (Some(guid::TOP), Some(g(2))), (Some(g(4)), Some(g(1)))] {
            let (_dir, dd) = disk(kind);
            for n in 1..6 {
                for c in 0..8 {
                    put(&dd, &guid::TOP, c * n % 40, n as u8);
                }
                snap(&dd, n);
            }
            put(&dd, &guid::TOP, 20, 99);
            let before: Vec<_> = [g(4), g(5), guid::TOP].iter().map(|g| content(&dd, g)).collect();
            match range {
                (None, _) => merge_snapshot(&dd, "", &MergeParams { all: true, ..Default::default() }).unwrap(),
                (guid, guid2) => merge(&dd, guid, guid2).unwrap(),
            }
            let d = Descriptor::read(&dd).unwrap();
            for (guid, content_before) in [g(4), g(5), guid::TOP].iter().zip(before) {
                if d.snapshot(guid).is_some() {
                    assert_eq!(content(&dd, guid), content_before, "{kind:?} {range:?} {guid}");
                }
            }
            assert_eq!(files(&dd).len(), d.images.len());
            assert!(d.snapshots.iter().all(|s| !s.temporary));
            check_disk(&dd, None).unwrap();
        }
    }
}

#[test]
fn merging_into_a_new_file() {
    for kind in KINDS {
        for into_base in [true, false] {
            let (dir, dd) = disk(kind);
            put(&dd, &guid::TOP, 3, 1);
            snap(&dd, 1);
            put(&dd, &guid::TOP, 3, 2);
            snap(&dd, 2);
            put(&dd, &guid::TOP, 3, 0);
            put(&dd, &guid::TOP, 9, 4);
            let want = content(&dd, &guid::TOP);
            let new = dir.path().join("merged.hdd");
            let params = MergeParams { all: into_base, new_delta: Some(new.clone()), ..Default::default() };
            std::fs::write(&new, "x").unwrap();
            assert_eq!(merge_snapshot(&dd, "", &params).unwrap_err().kind(), Kind::Param);
            std::fs::remove_file(&new).unwrap();
            merge_snapshot(&dd, "", &params).unwrap();
            assert_eq!(content(&dd, &guid::TOP), want, "{kind:?}");
            let kept: &[&str] = if into_base { &["merged.hdd"] } else { &["merged.hdd", "root.hdd"] };
            assert_eq!(files(&dd), kept);
            check_disk(&dd, None).unwrap();
        }
    }
}

#[test]
fn switching_and_deleting() {
    for kind in KINDS {
        let (_dir, dd) = disk(kind);
        put(&dd, &guid::TOP, 3, 1);
        snap(&dd, 1);
        put(&dd, &guid::TOP, 3, 2);
        snap(&dd, 2);
        put(&dd, &guid::TOP, 3, 3);
        switch(&dd, "", &to(1)).unwrap();
        assert_eq!(content(&dd, &guid::TOP), map(&[(3, 1)]));
        put(&dd, &guid::TOP, 4, 4);
        let keep = SwitchParams { guid_old: Some(g(3)), keep_top: true, ..to(2) };
        switch(&dd, "", &keep).unwrap();
        assert_eq!(content(&dd, &g(3)), map(&[(3, 1), (4, 4)]));
        assert_eq!(content(&dd, &guid::TOP), map(&[(3, 2)]));
        // A middle one with several children stays until one is left.
        snapshot::delete(&dd, &g(1)).unwrap();
        assert!(Descriptor::read(&dd).unwrap().snapshot(&g(1)).unwrap().temporary);
        snapshot::delete(&dd, &g(3)).unwrap();
        let d = Descriptor::read(&dd).unwrap();
        assert!(d.snapshot(&g(1)).is_none());
        assert_eq!(content(&dd, &g(2)), map(&[(3, 2)]));
        switch(&dd, "", &SwitchParams { no_new_top: true, ..to(2) }).unwrap();
        assert_eq!(content(&dd, &guid::TOP), map(&[(3, 2)]));
        assert_eq!(files(&dd), ["root.hdd"]);
        check_disk(&dd, None).unwrap();
        for (guid, kind) in [(g(9), Kind::NoSnap), (guid::TOP, Kind::Param)] {
            assert_eq!(snapshot::delete(&dd, &guid).unwrap_err().kind(), kind);
        }
        assert_eq!(switch(&dd, "", &to(9)).unwrap_err().kind(), Kind::NoSnap);
    }
}

#[test]
fn marks_of_crashes_are_cleared_and_content_stays() {
    let (_dir, dd) = disk(KINDS[1]);
    put(&dd, &guid::TOP, 3, 1);
    snap(&dd, 1);
    put(&dd, &guid::TOP, 4, 1);
    let d = Descriptor::read(&dd).unwrap();
    for image in &d.images {
        mark(&image.file);
    }
    snap(&dd, 2);
    assert_eq!(content(&dd, &guid::TOP), map(&[(3, 1), (4, 1)]));
    for image in &Descriptor::read(&dd).unwrap().images {
        assert_eq!(crate::image::check::read_header(&image.file, None).unwrap().in_use, 0);
        mark(&image.file);
    }
    merge_snapshot(&dd, "", &MergeParams { all: true, ..Default::default() }).unwrap();
    assert_eq!(content(&dd, &guid::TOP), map(&[(3, 1), (4, 1)]));
}

#[test]
fn the_target_grows_and_makes_room_for_a_longer_table() {
    for kind in KINDS {
        let (_dir, dd) = disk(kind);
        for c in 0..6 {
            put(&dd, &guid::TOP, c, c as u8 + 1);
        }
        snap(&dd, 1);
        put(&dd, &guid::TOP, 2, 77);
        // The top grows to a table of two clusters.
        let top = Descriptor::read(&dd).unwrap().image(&guid::TOP).unwrap().file.clone();
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&top).unwrap();
        let mut target = Target::open(&file, &top).unwrap();
        target.mark().unwrap();
        grow(&mut target, 9000 * 64).unwrap();
        target.close(false).unwrap();
        drop(file);
        put(&dd, &guid::TOP, 8999, 5);
        let want = content(&dd, &guid::TOP);
        assert_eq!(want.len(), 7);
        merge(&dd, None, None).unwrap();
        assert_eq!(content(&dd, &guid::TOP), want);
        assert_eq!(sizes(&dd), (9000, 9000));
        check_disk(&dd, None).unwrap();
    }
}

#[test]
fn a_raw_base_of_any_length_keeps_its_end() {
    let (_dir, dd) = disk(KINDS[3]);
    let base = Descriptor::read(&dd).unwrap().image(&guid::TOP).unwrap().file.clone();
    let sectors = 40 * 64 + 3;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&base).unwrap();
    file.set_len(sectors * 512).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[9; 3 * 512], 40 * 64 * 512).unwrap();
    let size = |dd: &Path| {
        let disk = Descriptor::read(dd).unwrap();
        let top = disk.image(&guid::TOP).unwrap();
        match disk.is_raw(top) {
            true => disk.size_sectors,
            false => crate::image::check::read_header(&top.file, None).unwrap().sectors,
        }
    };
    put(&dd, &guid::TOP, 3, 1);
    for n in [1, 2] {
        snap(&dd, n);
        assert_eq!((size(&dd), Descriptor::read(&dd).unwrap().size_sectors), (sectors, sectors));
    }
    put(&dd, &guid::TOP, 3, 2);
    put(&dd, &guid::TOP, 39, 4);
    merge(&dd, Some(g(2)), None).unwrap();
    assert_eq!(size(&dd), sectors);
    merge(&dd, None, None).unwrap();
    assert_eq!(file.metadata().unwrap().len(), sectors * 512);
    let mut end = [0; 3 * 512];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut end, 40 * 64 * 512).unwrap();
    assert_eq!(end, [9; 3 * 512]);
    assert_eq!(content(&dd, &guid::TOP), map(&[(3, 2), (39, 4), (40, 9)]));
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_changes() {
    let (_dir, dd) = disk(KINDS[1]);
    snap(&dd, 1);
    snap(&dd, 2);
    let d = Descriptor::read(&dd).unwrap();
    let before = std::fs::read(&dd).unwrap();
    // Another version and another cluster size below.
    let other = testkit::folder();
    let v1 = make_disk(other.path(), Version::V1, ImageMode::Expanded, small(), 40).with_file_name("root.hdd");
    let base = &d.images[0].file;
    let keep = base.with_extension("keep");
    std::fs::rename(base, &keep).unwrap();
    std::fs::copy(&v1, base).unwrap();
    assert_eq!(merge(&dd, Some(g(2)), None), Err(Kind::Format));
    std::fs::remove_file(base).unwrap();
    assert_eq!(merge(&dd, Some(g(2)), None), Err(Kind::Open), "missing");
    std::fs::rename(&keep, base).unwrap();
    assert_eq!(std::fs::read(&dd).unwrap(), before);
    // A branch.
    switch(&dd, "", &SwitchParams { keep_top: true, ..to(1) }).unwrap();
    assert_eq!(merge(&dd, Some(g(2)), None), Err(Kind::Param));
    assert_eq!(merge(&dd, None, Some(g(1))), Err(Kind::Param));
    assert_eq!(merge(&dd, Some(g(9)), None), Err(Kind::NoSnap));
    // Another process writes to it.
    let file = std::fs::File::open(&d.images[1].file).unwrap();
    let _lock = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive).unwrap();
    assert_eq!(snapshot::delete(&dd, &g(2)).map_err(|e| e.kind()), Err(Kind::Busy));
}

#[test]
fn a_single_image_has_nothing_to_merge() {
    let (_dir, dd) = disk(KINDS[0]);
    let error = merge_snapshot(&dd, "", &MergeParams { all: true, ..MergeParams::default() }).unwrap_err();
    assert!(error.kind() == Kind::Param && error.to_string().contains("single image"), "{error}");
}

#[test]
fn files_are_merged_by_name() {
    for kind in KINDS {
        let (_dir, dd) = disk(kind);
        put(&dd, &guid::TOP, 3, 1);
        snap(&dd, 1);
        put(&dd, &guid::TOP, 3, 2);
        snap(&dd, 2);
        put(&dd, &guid::TOP, 4, 3);
        let d = Descriptor::read(&dd).unwrap();
        let mut images: Vec<PathBuf> = d.chain(&guid::TOP).unwrap().iter().map(|i| i.file.clone()).collect();
        images.reverse();
        let raw = kind.1 == ImageMode::Raw;
        merge_files(&images, raw, None).unwrap();
        assert_eq!(content(&dd, &g(1)), map(&[(3, 2), (4, 3)]));
        assert_eq!(files(&dd).len(), 3);
        if !raw {
            mark(&images[2]);
            assert_eq!(merge_files(&images, raw, None).unwrap_err().kind(), Kind::Open);
            assert_eq!(merge_files(&images, true, None).unwrap_err().kind(), Kind::Param);
        }
        let twice = [images[0].clone(), images[0].clone()];
        let xml = [images[0].clone(), dd.clone()];
        assert_eq!(merge_files(&xml, false, None).unwrap_err().kind(), Kind::Open, "a descriptor is no image");
        assert_eq!(merge_files(&twice, false, None).unwrap_err().kind(), Kind::Param);
    }
}

#[test]
fn a_cancelled_merge_is_finished_by_the_next_one() {
    for kind in [KINDS[0], KINDS[1], KINDS[3]] {
        for (after, untouched) in [(0, true), (3, false)] {
            let (_dir, dd) = disk(kind);
            for c in 0..8 {
                put(&dd, &guid::TOP, c, 1);
            }
            snap(&dd, 1);
            for c in 2..16 {
                put(&dd, &guid::TOP, c, 2);
            }
            let want = content(&dd, &guid::TOP);
            let below = content(&dd, &g(1));
            let d = Descriptor::read(&dd).unwrap();
            let (low, top) = (&d.images[0], &d.images[1]);
            let target = std::fs::OpenOptions::new().read(true).write(true).open(&low.file).unwrap();
            let source = std::fs::File::open(&top.file).unwrap();
            let target = MergeLevel { file: &target, name: &low.file, raw: d.is_raw(low) };
            let merge = Merge::prepare(&[MergeLevel { file: &source, name: &top.file, raw: false }], target, Some(&[]))
                .unwrap();
            let size = small().bytes();
            let mut progress = |done: u64, _| match done >= after * size {
                true => Err(crate::error::Error::new(Kind::Sys, "cancelled")),
                false => Ok(()),
            };
            let mut options =
                MergeOptions { progress: &mut progress, stay_marked: false, batch: 2 * size, reflink: true };
            let failed = merge.run(&mut options).unwrap_err();
            assert_eq!((failed.error.kind(), failed.untouched), (Kind::Sys, untouched));
            assert_eq!(content(&dd, &guid::TOP), want);
            if untouched {
                assert_eq!(content(&dd, &g(1)), below);
            }
            check_disk(&dd, None).unwrap();
            merge_snapshot(&dd, "", &MergeParams::default()).unwrap();
            assert_eq!(content(&dd, &guid::TOP), want);
            check_disk(&dd, None).unwrap();
        }
    }
}

#[test]
fn a_half_merged_snapshot_is_shown_and_refused_until_the_merge_is_finished() {
    let mut seen = 0;
    // Each step of the merge fails once.
    for step in 0..100 {
        let (dir, dd) = disk(KINDS[1]);
        for (n, fill) in [(1, 1), (2, 2)] {
            for c in 0..8 {
                put(&dd, &guid::TOP, c + n, fill);
            }
            snap(&dd, n);
        }
        let want = content(&dd, &guid::TOP);
        let recorder = record::start(dir.path(), Some((step, libc::EIO)));
        let merged = merge(&dd, Some(g(2)), None);
        let all_done = recorder.0.begun() <= step;
        drop(recorder);
        let rows = snapshot_list::snapshots(&dd, &ListParams::default()).unwrap();
        let marked: Vec<Guid> = rows.iter().filter(|r| r.half_merged).map(|r| r.guid).collect();
        assert_eq!(content(&dd, &guid::TOP), want);
        if all_done {
            assert!(merged.is_ok() && seen > 2 && marked.is_empty(), "{seen} steps, {marked:?}");
            return;
        }
        // Nothing was changed yet, or another way was found.
        if marked.is_empty() {
            continue;
        }
        assert!(merged.is_err());
        seen += 1;
        assert_eq!(marked, [g(1)]);
        let way_out = format!("snapshot-merge -u {} -U {} {}", g(2), g(1), dd.display());
        let refused = |e: crate::error::Error| {
            assert!(e.kind() == Kind::Param && e.to_string().contains(&way_out), "{e}");
        };
        let look = MountParams { read_only: true, guid: Some(g(1).to_string()), ..Default::default() };
        refused(mount::mount_locked(&LockedDescriptor::open(&dd).unwrap(), "", &look).unwrap_err());
        refused(switch(&dd, "", &to(1)).unwrap_err());
        let copy = dir.path().join("copy");
        std::fs::copy(dd.with_file_name("root.hdd"), &copy).unwrap();
        refused(replace(&dd, "", &Which::Guid(g(1)), &copy, false).unwrap_err());
        std::fs::remove_file(copy).unwrap();
        merge(&dd, Some(g(2)), Some(g(1))).unwrap();
        assert_eq!(content(&dd, &guid::TOP), want);
        assert!(snapshot_list::snapshots(&dd, &ListParams::default()).unwrap().iter().all(|r| !r.half_merged));
    }
    panic!("no merge came to its end");
}

#[test]
fn files_are_not_merged_into_one_on_which_another_delta_stands() {
    let (_dir, dd) = disk(KINDS[1]);
    snap(&dd, 1);
    snap(&dd, 2);
    switch(&dd, "", &SwitchParams { keep_top: true, guid_old: Some(g(3)), ..to(1) }).unwrap();
    let d = Descriptor::read(&dd).unwrap();
    let file = |guid: &Guid| d.image(guid).unwrap().file.clone();
    let e = merge_files(&[file(&g(2)), file(&g(1))], false, None).unwrap_err();
    assert!(e.kind() == Kind::Param && e.to_string().contains(&file(&guid::TOP).display().to_string()), "{e}");
    merge_files(&[file(&g(3)), file(&g(2))], false, None).unwrap();
}

#[test]
fn nothing_is_merged_into_a_file_of_several_names() {
    let (dir, dd) = disk(KINDS[1]);
    snap(&dd, 1);
    std::fs::hard_link(dd.with_file_name("root.hdd"), dir.path().join("clone")).unwrap();
    assert_eq!(merge(&dd, None, None), Err(Kind::Busy));
    assert!(!Descriptor::read(&dd).unwrap().snapshots.iter().any(|s| s.temporary));
    let params = MergeParams { new_delta: Some(dir.path().join("new")), ..Default::default() };
    merge_snapshot(&dd, "", &params).unwrap();
    assert_eq!(files(&dd), ["clone", "new"]);
}

#[test]
fn leftovers_of_other_programs_are_finished_or_removed() {
    let (dir, dd) = disk(KINDS[1]);
    put(&dd, &guid::TOP, 3, 1);
    snap(&dd, 1);
    put(&dd, &guid::TOP, 4, 2);
    let want = content(&dd, &guid::TOP);
    let tmp = dd.with_file_name("DiskDescriptor.xml.tmp");
    // A store that did not get to its end.
    for text in [&b"half"[..], &std::fs::read(&dd).unwrap()] {
        std::fs::write(&tmp, text).unwrap();
        snap(&dd, 2);
        assert!(!tmp.exists());
        merge(&dd, None, None).unwrap();
    }
    // A merge into a new file whose old files went before the descriptor without them was stored.
    let old = std::fs::read(&dd).unwrap();
    let params = MergeParams { new_delta: Some(dir.path().join("merged")), ..Default::default() };
    merge_snapshot(&dd, "", &params).unwrap();
    std::fs::rename(&dd, &tmp).unwrap();
    std::fs::write(&dd, old).unwrap();
    snap(&dd, 5);
    assert!(!tmp.exists());
    assert_eq!(content(&dd, &guid::TOP), want);
    assert_eq!(Descriptor::read(&dd).unwrap().images.len(), 2);
    // But not one of another disk, or one that lacks files itself.
    let whole = std::fs::read(&dd).unwrap();
    std::fs::write(&tmp, &whole).unwrap();
    std::fs::rename(dir.path().join("merged"), dir.path().join("elsewhere")).unwrap();
    let e = snapshot::create(&dd, "", &SnapshotParams { guid: g(6), snap_dir: None, temporary: false }).unwrap_err();
    assert_eq!(e.kind(), Kind::Open);
    assert!(e.to_string().contains("merged"), "{e}");
    assert_eq!(std::fs::read(&dd).unwrap(), whole);
}

//! Disks that are sent and received, whole, in part, damaged, and by a sender that means harm.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use super::half::MARKER;
use super::kept::Kept;
use super::receive::{Arrived, list_kept, receive};
use super::send::send;
use super::stream::{self, Kind as What, Record};
use crate::descriptor::{Descriptor, FILE_NAME, ImageMode};
use crate::error::{Kind, Result};
use crate::format::guid;
use crate::format::header::Version;
use crate::ops::copy::send::Stop;
use crate::ops::snapshot::{self, SnapshotParams};
use crate::ops::testkit::{self, content, g, make_disk, map, put, small};
use crate::sys::store::record::{self, Thing};
use crate::units::ClusterSize;

/// Two snapshots of a disk with large clusters, so that there are several blocks.
pub(super) fn disk(mode: ImageMode) -> (tempfile::TempDir, PathBuf) {
    disk_of(mode, ClusterSize::from_sectors(1024).unwrap())
}

pub(super) fn disk_of(mode: ImageMode, cluster: ClusterSize) -> (tempfile::TempDir, PathBuf) {
    let dir = testkit::folder();
    let source = dir.path().join("source");
    std::fs::create_dir(&source).unwrap();
    let dd = make_disk(&source, Version::V2, mode, cluster, 12);
    for (n, cluster) in [(1, 3), (2, 7)] {
        put(&dd, &guid::TOP, cluster, n as u8);
        put(&dd, &guid::TOP, 9, 10 + n as u8);
        snapshot::create(&dd, "", &SnapshotParams { guid: g(n), snap_dir: None, temporary: false }).unwrap();
    }
    put(&dd, &guid::TOP, 5, 30);
    (dir, dd)
}

pub(super) fn sent(dd: &Path, compress: bool, kept: Kept) -> Result<Vec<u8>> {
    let mut file = tempfile::tempfile().unwrap();
    send(dd, file.try_clone().unwrap().into(), compress, kept, Stop::default())?;
    let mut stream = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut stream).unwrap();
    Ok(stream)
}

pub(super) fn received(dir: &Path, bytes: &[u8]) -> Result<Arrived> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    receive(dir, file.as_fd())
}

pub(super) fn kept(dir: &Path) -> Kept {
    let mut list = Vec::new();
    list_kept(dir, &mut list).unwrap();
    Kept::read(&list[..]).unwrap()
}

pub(super) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The copy has the same tree, and files of the same bytes.
pub(super) fn check(source: &Path, dir: &Path) {
    let [a, b] = [source.to_owned(), dir.join(FILE_NAME)].map(|path| Descriptor::read(&path).unwrap());
    assert_eq!((&a.snapshots, a.top, a.size_sectors, a.mode), (&b.snapshots, b.top, b.size_sectors, b.mode));
    for (a, b) in a.images.iter().zip(&b.images) {
        assert_eq!((a.guid, a.file.file_name()), (b.guid, b.file.file_name()));
        assert!(std::fs::read(&a.file).unwrap() == std::fs::read(&b.file).unwrap(), "{} differs", a.file.display());
    }
    for guid in [g(1), g(2), guid::TOP] {
        assert_eq!(content(source, &guid), content(&dir.join(FILE_NAME), &guid));
    }
    assert_eq!(content(source, &guid::TOP), map(&[(3, 1), (5, 30), (7, 2), (9, 12)]));
}

/// The records of a stream: where each begins, and where its head says that the payload ends.
fn records(bytes: &[u8]) -> Vec<(usize, usize, Record)> {
    let mut at = stream::START;
    let mut all = Vec::new();
    while at < bytes.len() {
        let record = Record::parse(bytes[at..at + stream::HEAD].try_into().unwrap()).unwrap();
        let end = at + stream::HEAD + record.payload as usize;
        all.push((at, end, record));
        at = end;
    }
    all
}

#[test]
fn a_disk_arrives_with_its_snapshots() {
    for mode in [ImageMode::Expanded, ImageMode::Preallocated, ImageMode::Raw] {
        let (dir, dd) = disk(mode);
        let target = dir.path().canonicalize().unwrap().join("target");
        let plain = sent(&dd, false, Kept::default()).unwrap();
        received(&target, &plain).unwrap();
        check(&dd, &target);
        assert_eq!(names(dir.path()), ["source", "target"]);
        let packed = sent(&dd, true, Kept::default()).unwrap();
        received(&dir.path().join("second"), &packed).unwrap();
        check(&dd, &dir.path().join("second"));
        assert!(packed.len() * 4 < plain.len(), "{} bytes packed of {}", packed.len(), plain.len());
        let order: Vec<What> = records(&plain).iter().map(|(.., r)| r.kind).filter(|k| *k != What::Data).collect();
        assert_eq!(order.last(), Some(&What::End));
        let e = received(&target, &plain).unwrap_err();
        assert!(e.kind() == Kind::Creat && e.to_string().contains("exists"), "{e}");
    }
}

#[test]
fn what_is_sparse_stays_sparse() {
    let (dir, dd) = disk(ImageMode::Raw);
    let base = dd.with_file_name("root.hdd");
    let target = dir.path().join("target");
    received(&target, &sent(&dd, false, Kept::default()).unwrap()).unwrap();
    let blocks = |path: &Path| path.metadata().unwrap().blocks();
    let (had, has) = (blocks(&base), blocks(&target.join("root.hdd")));
    assert!(has <= had + 16, "{has} blocks, the source has {had}");
}

#[test]
fn a_stream_that_is_cut_leaves_what_the_next_one_uses() {
    let (dir, dd) = disk(ImageMode::Expanded);
    let target = dir.path().canonicalize().unwrap().join("target");
    let whole = sent(&dd, false, Kept::default()).unwrap();
    let all = records(&whole);
    for (n, (start, end, _)) in all.iter().enumerate() {
        let cut = [*start, *start + 7, *end - 1][n % 3];
        let e = received(&target, &whole[..cut]).unwrap_err();
        assert!(e.kind() == Kind::Read && !target.exists(), "{cut}: {e}");
        if n % 4 != 0 {
            continue;
        }
        let again = sent(&dd, false, kept(&target)).unwrap();
        let arrived = received(&target, &again).unwrap();
        check(&dd, &target);
        let data: u64 = all[..n].iter().filter(|(.., r)| r.kind == What::Data).map(|(.., r)| r.bytes).sum();
        assert!(n < 6 || arrived.kept > 0 && again.len() < whole.len(), "{n}: {data} bytes had come, {arrived:?}");
        std::fs::remove_dir_all(&target).unwrap();
    }
}

#[test]
fn what_an_earlier_try_has_left_counts_only_where_it_is_the_same() {
    let (dir, dd) = disk(ImageMode::Expanded);
    let target = dir.path().canonicalize().unwrap().join("target");
    let half = dir.path().join("target.receiving");
    let whole = sent(&dd, false, Kept::default()).unwrap();
    let cut = whole.len() - 1;
    let left = || {
        received(&target, &whole[..cut]).unwrap_err();
        for name in names(&half) {
            let file = File::options().write(true).open(half.join(name)).unwrap();
            file.write_all_at(&[0xee; 5000], (1 << 20) + 300).unwrap();
            file.write_all_at(&[0xee; 100], 40 << 20).unwrap();
        }
        std::fs::write(half.join("another"), "file").unwrap();
    };
    // Nothing of it is believed when the sender has no list.
    left();
    received(&target, &whole).unwrap();
    check(&dd, &target);
    assert!(!target.join("another").exists());
    std::fs::remove_dir_all(&target).unwrap();
    // With a list, blocks that differ are sent.
    left();
    let again = sent(&dd, false, kept(&target)).unwrap();
    let arrived = received(&target, &again).unwrap();
    assert!(arrived.kept > 0, "{arrived:?}");
    check(&dd, &target);
    std::fs::remove_dir_all(&target).unwrap();
    // A list of what is no longer there.
    received(&target, &whole[..cut]).unwrap_err();
    let list = kept(&target);
    left();
    let e = received(&target, &sent(&dd, false, list).unwrap()).unwrap_err();
    assert!(e.kind() == Kind::Protocol && e.to_string().contains("--kept") && !target.exists(), "{e}");
}

#[test]
fn a_changed_byte_anywhere_is_noticed() {
    let (dir, dd) = disk(ImageMode::Expanded);
    let target = dir.path().canonicalize().unwrap().join("target");
    let whole = sent(&dd, true, Kept::default()).unwrap();
    let step = whole.len() / 40;
    let last = records(&whole).last().unwrap().0;
    let swapped = {
        let all = records(&whole);
        let [a, b] = [&all[1], &all[2]];
        [&whole[..a.0], &whole[b.0..b.1], &whole[a.0..a.1], &whole[b.1..]].concat()
    };
    assert!(received(&target, &swapped).is_err() && !target.exists());
    for at in (0..whole.len()).step_by(step).chain((last..last + 70).step_by(9)) {
        let mut bad = whole.clone();
        bad[at] ^= 0x10;
        let e = received(&target, &bad).unwrap_err();
        assert!(matches!(e.kind(), Kind::Protocol | Kind::Read), "byte {at}: {e}");
        assert!(!target.exists(), "byte {at}");
    }
}

/// Kind, file, offset, bytes, payload.
pub(super) type Made<'a> = (What, u32, u64, u64, &'a [u8]);

/// A stream of such records, as a sender makes it that means harm.
pub(super) fn made(records: &[Made]) -> Vec<u8> {
    let mut out = stream::start().to_vec();
    for (number, (kind, file, offset, bytes, payload)) in records.iter().enumerate() {
        let record = Record { kind: *kind, file: *file, offset: *offset, bytes: *bytes, payload: payload.len() as u32 };
        out.extend(record.head(number as u64, payload));
        out.extend(*payload);
    }
    out
}

#[test]
fn a_sender_that_means_harm_gets_nothing() {
    let dir = testkit::folder();
    let root = dir.path().canonicalize().unwrap();
    let target = root.join("target");
    std::fs::write(root.join("victim"), "mine").unwrap();
    let (source, dd) = disk(ImageMode::Expanded);
    let xml = std::fs::read_to_string(&dd).unwrap();
    let outside = xml.replace("root.hdd</File>", "/etc/passwd</File>");
    let up = xml.replace("root.hdd</File>", "../victim</File>");
    let packed = zstd::bulk::compress(&[0; 1 << 20], 1).unwrap();
    let file = (What::File, 0, 0, 0, &b"a"[..]);
    let data = (What::Data, 0, 0, 5, &b"12345"[..]);
    let streams: &[&[Made]] = &[
        &[(What::File, 0, 0, 0, b"../victim")],
        &[(What::File, 0, 0, 0, b"/etc/passwd")],
        &[(What::File, 0, 0, 0, FILE_NAME.as_bytes())],
        &[(What::File, 0, 0, 0, b"\xff")],
        &[(What::File, 1, 0, 0, b"a")],
        &[data],
        &[file, (What::Data, 1, 0, 5, b"12345")],
        // More than was said, less, and no frame.
        &[file, (What::Packed, 0, 0, 1000, &packed)],
        &[file, (What::Packed, 0, 0, 1 << 20, &packed[..packed.len() - 3])],
        &[file, (What::Packed, 0, 0, 1000, b"no frame")],
        &[file, (What::Same, 0, 0, 5, &[1; 32])],
        &[file, (What::Close, 0, 0, 0, b""), data],
        &[file, data, (What::End, 0, 2, 5, b"<no xml")],
        &[file, data, (What::End, 0, 2, 6, xml.as_bytes())],
        &[file, data, (What::End, 0, 1, 5, xml.as_bytes())],
        &[file, data, (What::End, 0, 2, 5, xml.as_bytes())],
        &[(What::End, 0, 0, 0, outside.as_bytes())],
        &[(What::End, 0, 0, 0, up.as_bytes())],
    ];
    for (n, records) in streams.iter().enumerate() {
        let e = received(&target, &made(records)).unwrap_err();
        assert!(e.kind() == Kind::Protocol, "{n}: {:?} {e}", e.kind());
        assert!(!target.exists(), "{n}");
    }
    // A file that is no image, under the name of one.
    let mut fake = sent(&dd, false, Kept::default()).unwrap();
    let all = records(&fake);
    let number = all.iter().position(|(.., r)| r.kind == What::Data && r.offset == 0).unwrap();
    let (start, end, record) = all[number];
    let payload = vec![0x55; end - start - stream::HEAD];
    fake[start..start + stream::HEAD].copy_from_slice(&record.head(number as u64, &payload));
    fake[start + stream::HEAD..end].copy_from_slice(&payload);
    let e = received(&target, &fake).unwrap_err();
    assert!(e.kind() == Kind::Protocol && !target.exists(), "{e}");
    assert_eq!(std::fs::read_to_string(root.join("victim")).unwrap(), "mine");
    drop(source);
}

#[test]
fn what_is_in_the_way_stays() {
    let (dir, dd) = disk(ImageMode::Expanded);
    let root = dir.path().canonicalize().unwrap();
    let target = root.join("target");
    let whole = sent(&dd, false, Kept::default()).unwrap();
    symlink("nowhere", &target).unwrap();
    assert_eq!(received(&target, &whole).unwrap_err().kind(), Kind::Creat);
    std::fs::remove_file(&target).unwrap();
    // A link, a file, and a folder with a link, where the half is to be.
    let half = root.join("target.receiving");
    std::fs::create_dir(root.join("other")).unwrap();
    symlink("other", &half).unwrap();
    assert_eq!(received(&target, &whole).unwrap_err().kind(), Kind::Creat);
    std::fs::remove_file(&half).unwrap();
    std::fs::write(&half, "mine").unwrap();
    assert_eq!(received(&target, &whole).unwrap_err().kind(), Kind::Creat);
    std::fs::remove_file(&half).unwrap();
    std::fs::create_dir(&half).unwrap();
    std::fs::write(half.join(MARKER), "").unwrap();
    std::fs::write(root.join("other/victim"), "mine").unwrap();
    symlink("../other/victim", half.join("root.hdd")).unwrap();
    assert_eq!(received(&target, &whole).unwrap_err().kind(), Kind::Creat);
    std::fs::remove_file(half.join("root.hdd")).unwrap();
    std::fs::hard_link(root.join("other/victim"), half.join("root.hdd")).unwrap();
    assert_eq!(received(&target, &whole).unwrap_err().kind(), Kind::Creat);
    assert_eq!(std::fs::read_to_string(root.join("other/victim")).unwrap(), "mine");
    std::fs::remove_dir_all(&half).unwrap();
    // Another receiver.
    std::fs::create_dir(&half).unwrap();
    let holder = File::open(&half).unwrap();
    holder.lock().unwrap();
    let e = received(&target, &whole).unwrap_err();
    assert!(e.kind() == Kind::Creat && e.to_string().contains("another process"), "{e}");
    drop(holder);
    received(&target, &whole).unwrap();
    check(&dd, &target);
}

#[test]
fn a_disk_that_cannot_be_sent_whole_is_refused() {
    let (_dir, dd) = disk(ImageMode::Expanded);
    let disk = Descriptor::read(&dd).unwrap();
    let refused = |kind: Kind, word: &str| {
        let e = sent(&dd, false, Kept::default()).map(|s| s.len()).unwrap_err();
        assert!(e.kind() == kind && e.to_string().contains(word), "{:?} {e}", e.kind());
    };
    let top = disk.image(&disk.top).unwrap().file.clone();
    let file = File::options().read(true).write(true).open(&top).unwrap();
    file.lock().unwrap();
    refused(Kind::Busy, "in use");
    drop(file);
    let file = File::options().read(true).write(true).open(&top).unwrap();
    file.write_all_at(&crate::format::header::IN_USE.to_le_bytes(), 44).unwrap();
    refused(Kind::InUse, "marked in use");
    file.write_all_at(&[0; 4], 44).unwrap();
    let mut spoiled = disk.clone();
    spoiled.mark_spoiled(&[g(1)]);
    spoiled.commit(&dd).unwrap();
    refused(Kind::Param, "half merged");
    disk.commit(&dd).unwrap();
    sent(&dd, false, Kept::default()).unwrap();
}

/// What has the name is whole, whatever a kill or a power cut leaves; with syncs taken away this test must fail.
fn worst_of_all_crashes(ignored: Option<Thing>) -> std::result::Result<usize, String> {
    let (source, dd) = disk_of(ImageMode::Expanded, small());
    let whole = sent(&dd, true, Kept::default()).unwrap();
    let dir = testkit::folder();
    let recorder = record::start(dir.path(), None);
    if let Some(thing) = ignored {
        recorder.0.ignore_syncs(thing);
    }
    received(&dir.path().canonicalize().unwrap().join("target"), &whole).unwrap();
    let steps = recorder.0.steps();
    for at in 0..=steps {
        for kind in 0..4 {
            let after = testkit::folder();
            recorder.0.crash(at, after.path(), &mut |thing, _| match kind {
                0 => true,
                1 => false,
                2 => thing == Thing::Name,
                _ => thing == Thing::Data,
            });
            let target = after.path().join("target");
            if !target.exists() {
                if at == steps {
                    return Err("the disk is gone though it was said to be received".into());
                }
                continue;
            }
            let same = |name: &String| {
                let [a, b] = [source.path().join("source"), target.clone()].map(|dir| std::fs::read(dir.join(name)));
                a.is_ok_and(|a| b.is_ok_and(|b| a == b))
            };
            let files = names(&source.path().join("source"));
            if !files.iter().filter(|name| !name.ends_with(".lck")).all(same) {
                return Err(format!("step {at} of {steps}: the disk is not whole: {:?}", names(&target)));
            }
        }
    }
    Ok(steps)
}

#[test]
fn crashes_of_a_receiver_of_a_disk() {
    assert!(worst_of_all_crashes(None).unwrap() > 10);
    worst_of_all_crashes(Some(Thing::Data)).unwrap_err();
    worst_of_all_crashes(Some(Thing::Name)).unwrap_err();
}

#[test]
fn a_step_that_fails_leaves_no_disk_under_the_name() {
    let (_dir, dd) = disk_of(ImageMode::Expanded, small());
    let whole = sent(&dd, true, Kept::default()).unwrap();
    for step in 0.. {
        let dir = testkit::folder();
        let target = dir.path().canonicalize().unwrap().join("target");
        let recorder = record::start(dir.path(), Some((step, libc::EIO)));
        let result = received(&target, &whole);
        if step >= recorder.0.begun() {
            result.unwrap();
            return;
        }
        // Writeback of the last name may fail when the disk has it.
        let last = recorder.0.failed_folder() && target.join(FILE_NAME).exists();
        assert!(result.is_err() && (last || !target.exists()), "step {step}");
        drop(recorder);
        if !last {
            received(&target, &whole).unwrap();
            check(&dd, &target);
        }
    }
}

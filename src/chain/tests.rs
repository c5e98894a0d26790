use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::error::Kind;
use crate::format::bat;
use crate::format::header::{self, Header};

mod large;
mod target;

const BS: u32 = 64;
const CLUSTER: u64 = 32768;

/// An image made by hand: `entries` are (cluster, host cluster), each host cluster filled with the cluster's number
/// plus one.
struct Maker {
    version: Version,
    cluster: ClusterSize,
    clusters: u64,
    entries: Vec<(u32, u32)>,
    /// Bytes behind the last cluster.
    tail: u64,
    header: fn(&mut Header),
}

impl Default for Maker {
    fn default() -> Self {
        Maker {
            version: Version::V2,
            cluster: ClusterSize::from_sectors(u64::from(BS)).unwrap(),
            clusters: 100,
            entries: vec![],
            tail: 0,
            header: |_| {},
        }
    }
}

impl Maker {
    fn make(&self, path: &Path) -> PathBuf {
        let mut h = Header::new(self.version, self.cluster, self.clusters * u64::from(self.cluster.sectors())).unwrap();
        let size = self.cluster.bytes();
        let l1 = h.first_data();
        if !self.entries.is_empty() {
            h.flags = 0;
        }
        (self.header)(&mut h);
        let f = OpenOptions::new().write(true).create(true).truncate(true).open(path).unwrap();
        f.write_all_at(&vec![0; (u64::from(l1) * size) as usize], 0).unwrap();
        f.write_all_at(&h.encode(), 0).unwrap();
        let mut end = l1;
        for &(c, host_cluster) in &self.entries {
            let entry = bat::encode(self.version, self.cluster, host_cluster).unwrap();
            f.write_all_at(&entry.to_le_bytes(), bat::entry_offset(c)).unwrap();
            f.write_all_at(&vec![c as u8 + 1; size as usize], u64::from(host_cluster) * size).unwrap();
            end = end.max(host_cluster + 1);
        }
        f.set_len(u64::from(end) * size + self.tail).unwrap();
        path.to_owned()
    }
}

fn level(path: &Path, write: bool) -> LevelFile {
    let file = OpenOptions::new().read(true).write(write).open(path).unwrap();
    LevelFile { file, name: path.to_owned(), raw: false, direct: false }
}

fn writable() -> OpenOptions_ {
    OpenOptions_ { writable: true, ..OpenOptions_::default() }
}

// The name clashes with the standard library's.
type OpenOptions_ = super::OpenOptions;

fn dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn header_of(path: &Path) -> Header {
    Header::parse(&std::fs::read(path).unwrap()).unwrap()
}

/// Opens a chain that must be refused, and makes sure that no file changed.
fn refused(paths: &[&Path], raw: &[usize], options: &OpenOptions_) -> crate::Error {
    let before: Vec<_> =
        paths.iter().map(|p| (std::fs::read(p).unwrap(), std::fs::metadata(p).unwrap().mtime_nsec())).collect();
    let mut levels: Vec<_> = paths.iter().map(|p| level(p, true)).collect();
    for &i in raw {
        levels[i].raw = true;
    }
    let e = open(&levels, options).unwrap_err();
    for (p, (bytes, time)) in paths.iter().zip(before) {
        assert!(std::fs::read(p).unwrap() == bytes, "{} changed", p.display());
        assert_eq!(std::fs::metadata(p).unwrap().mtime_nsec(), time);
    }
    e
}

#[test]
fn opened_for_writing_and_closed() {
    let d = dir();
    for version in [Version::V1, Version::V2] {
        let p = Maker {
            version,
            entries: vec![(0, 3), (7, 1), (99, 6)],
            tail: 3 * CLUSTER + 100,
            header: |h| (h.extension, h.flags) = (12345, header::FLAG_EMPTY),
            ..Maker::default()
        }
        .make(&d.path().join("a"));
        let top = level(&p, true);
        let chain = open(std::slice::from_ref(&top), &writable()).unwrap();
        assert_eq!(chain.version, Some(version));
        assert_eq!(chain.device_bytes, 100 * CLUSTER);
        assert_eq!(chain.cluster.bytes(), CLUSTER);
        assert!(!chain.was_marked);
        assert_eq!(chain.alloc.end, 7);
        assert_eq!(chain.alloc.free, [2..3, 4..6]);
        assert_eq!(chain.alloc.ahead, 2048);
        assert_eq!(chain.alloc.limit, if version == Version::V1 { 1 << 26 } else { u32::MAX });
        let h = header_of(&p);
        assert_eq!((h.in_use, h.flags, h.extension), (header::IN_USE, 0, 0));
        assert_eq!(chain.header, h.encode());
        assert_eq!(std::fs::metadata(&p).unwrap().len(), 7 * CLUSTER);
        let LevelConfig::Ploop { v1, clusters, first_data, file_clusters } = chain.levels[0] else { panic!() };
        assert_eq!((v1, clusters, first_data, file_clusters), (version == Version::V1, 100, 1, 7));
        // The rest of the first block stayed.
        assert_eq!(std::fs::read(&p).unwrap()[64 + 28] as u32, if version == Version::V1 { BS } else { 1 });

        // Allocated ahead and not used: cut again.
        top.file.set_len(50 * CLUSTER).unwrap();
        close(&top, &chain, 9).unwrap();
        let h = header_of(&p);
        assert_eq!((h.in_use, h.flags, h.extension), (0, 0, 0));
        assert_eq!(std::fs::metadata(&p).unwrap().len(), 9 * CLUSTER);
    }
}

#[test]
fn an_image_without_data_is_flagged_empty_when_closed() {
    let d = dir();
    let p = Maker::default().make(&d.path().join("a"));
    let top = level(&p, true);
    let chain = open(std::slice::from_ref(&top), &writable()).unwrap();
    assert_eq!(header_of(&p).flags, 0);
    assert_eq!((chain.alloc.end, chain.alloc.free.len()), (1, 0));
    close(&top, &chain, 1).unwrap();
    assert_eq!(header_of(&p).flags, header::FLAG_EMPTY);
    // Never cut into the table, never past what is there.
    assert_eq!(close(&top, &chain, 0).unwrap_err().kind(), Kind::Param);
    assert_eq!(close(&top, &chain, 5).unwrap_err().kind(), Kind::Format);
}

#[test]
fn unsound_entries() {
    let d = dir();
    let p = d.path().join("a");
    let v1 = || Maker { version: Version::V1, ..Maker::default() };
    let with = |maker: Maker, at: u32, entry: u32| {
        maker.make(&p);
        let f = OpenOptions::new().write(true).open(&p).unwrap();
        f.write_all_at(&entry.to_le_bytes(), bat::entry_offset(at)).unwrap();
        for options in [writable(), OpenOptions_::default()] {
            let e = refused(&[&p], &[], &options);
            assert_eq!(e.kind(), Kind::Format, "{e}");
            assert!(e.to_string().contains(&format!("cluster {at} (offset {}) is {entry}", 64 + 4 * at)), "{e}");
        }
    };
    let entries = vec![(1, 1), (2, 2)];
    with(Maker { entries: entries.clone(), ..Maker::default() }, 5, 3);
    with(Maker { entries: entries.clone(), tail: CLUSTER - 1, ..Maker::default() }, 5, 3);
    with(Maker { entries: entries.clone(), ..Maker::default() }, 5, u32::MAX);
    with(Maker { entries: entries.clone(), ..Maker::default() }, 5, 2);
    with(Maker { clusters: 9000, entries: vec![(1, 2)], ..Maker::default() }, 8999, 1);
    with(Maker { entries: entries.clone(), ..v1() }, 5, 65);
    with(Maker { entries: entries.clone(), ..v1() }, 5, 3 * 64);
    with(Maker { entries, ..v1() }, 5, 128);
}

#[test]
fn slots_behind_the_disk_keep_their_clusters() {
    let d = dir();
    let p = Maker { entries: vec![(1, 1), (200, 3), (8175, 70)], ..Maker::default() }.make(&d.path().join("a"));
    // One points outside: it must not matter.
    let f = OpenOptions::new().write(true).open(&p).unwrap();
    f.write_all_at(&9999u32.to_le_bytes(), bat::entry_offset(300)).unwrap();
    let chain = open(&[level(&p, true)], &writable()).unwrap();
    assert_eq!(chain.alloc.end, 71);
    assert_eq!(chain.alloc.free, [2..3, 4..70]);
}

#[test]
fn marks_on_the_top() {
    let d = dir();
    let maker = Maker { entries: vec![(1, 1)], tail: 5, header: |h| h.in_use = header::IN_USE, ..Maker::default() };
    let p = maker.make(&d.path().join("a"));
    let marked = |m: Marked| OpenOptions_ { marked: m, ..OpenOptions_::default() };
    let e = refused(&[&p], &[], &writable());
    assert_eq!(e.kind(), Kind::InUse);
    assert_eq!(refused(&[&p], &[], &marked(Marked::Refuse)).kind(), Kind::InUse);
    let both = OpenOptions_ { writable: true, ..marked(Marked::Ignore) };
    assert_eq!(refused(&[&p], &[], &both).kind(), Kind::Param);
    // Read-only: not a byte, no time.
    let before = std::fs::read(&p).unwrap();
    for m in [Marked::Recover, Marked::Ignore] {
        let chain = open(&[level(&p, false)], &marked(m)).unwrap();
        assert!(chain.was_marked);
        assert_eq!(std::fs::read(&p).unwrap(), before);
    }
    let top = level(&p, true);
    let chain = open(std::slice::from_ref(&top), &OpenOptions_ { writable: true, ..marked(Marked::Recover) }).unwrap();
    assert!(chain.was_marked);
    assert_eq!(std::fs::metadata(&p).unwrap().len(), 2 * CLUSTER);
    close(&top, &chain, 2).unwrap();
    assert_eq!(header_of(&p).in_use, 0);
    // Undocumented values count as marks, "v2.1" does not.
    for (word, is_mark) in [(1u32, true), (0x1234, true), (header::CLOSED_V21, false)] {
        OpenOptions::new().write(true).open(&p).unwrap().write_all_at(&word.to_le_bytes(), 44).unwrap();
        assert_eq!(open(&[level(&p, false)], &OpenOptions_::default()).is_err(), is_mark, "{word:#x}");
    }
    let top = level(&p, true);
    open(std::slice::from_ref(&top), &writable()).unwrap();
    assert_eq!(header_of(&p).in_use, header::IN_USE);
}

#[test]
fn a_format_extension_is_dropped_by_writers_only() {
    let d = dir();
    let maker = Maker {
        entries: vec![(1, 1)],
        tail: 2 * CLUSTER,
        header: |h| (h.in_use, h.extension) = (header::CLOSED_V21, 3 * 64),
        ..Maker::default()
    };
    let p = maker.make(&d.path().join("a"));
    let before = std::fs::read(&p).unwrap();
    open(&[level(&p, false)], &OpenOptions_::default()).unwrap();
    assert_eq!(std::fs::read(&p).unwrap(), before);
    let chain = open(&[level(&p, true)], &writable()).unwrap();
    assert!(!chain.was_marked);
    let h = header_of(&p);
    assert_eq!((h.in_use, h.extension), (header::IN_USE, 0));
    assert_eq!(std::fs::metadata(&p).unwrap().len(), 2 * CLUSTER);
}

#[test]
fn interrupted_conversions_are_refused() {
    let d = dir();
    let p = Maker { header: |h| h.flags |= header::FLAG_CONVERT, ..Maker::default() }.make(&d.path().join("a"));
    assert_eq!(refused(&[&p], &[], &writable()).kind(), Kind::Busy);
}

#[test]
fn rules_between_levels() {
    let d = dir();
    let path = |n: &str| d.path().join(n);
    let small = Maker { clusters: 50, entries: vec![(3, 1)], ..Maker::default() }.make(&path("small"));
    let large = Maker { clusters: 100, entries: vec![(99, 1)], ..Maker::default() }.make(&path("large"));
    let v1 = Maker { version: Version::V1, ..Maker::default() }.make(&path("v1"));
    let big = Maker { cluster: ClusterSize::from_sectors(128).unwrap(), ..Maker::default() }.make(&path("big"));
    let marked = Maker { header: |h| h.in_use = header::IN_USE, ..Maker::default() }.make(&path("marked"));
    let chain = open(&[level(&small, false), level(&large, true)], &writable()).unwrap();
    assert_eq!(chain.device_bytes, 100 * CLUSTER);
    let clusters: Vec<u32> = chain
        .levels
        .iter()
        .map(|l| match l {
            LevelConfig::Ploop { clusters, .. } => *clusters,
            LevelConfig::Raw { .. } => 0,
        })
        .collect();
    assert_eq!(clusters, [50, 100]);
    assert_eq!(header_of(&small).in_use, 0);
    close(&level(&large, true), &chain, 2).unwrap();

    assert_eq!(refused(&[&large, &small], &[], &writable()).kind(), Kind::Param);
    assert_eq!(refused(&[&v1, &large], &[], &writable()).kind(), Kind::Format);
    assert_eq!(refused(&[&large, &big], &[], &writable()).kind(), Kind::Param);
    // A mark below the top: a crash while tops were switched leaves it.
    assert_eq!(refused(&[&marked, &large], &[], &writable()).kind(), Kind::InUse);
    let recover = OpenOptions_ { marked: Marked::Recover, ..OpenOptions_::default() };
    assert!(!open(&[level(&marked, false), level(&large, false)], &recover).unwrap().was_marked);
    assert_eq!(open(&[], &writable()).unwrap_err().kind(), Kind::Param);
}

#[test]
fn raw_bases() {
    let d = dir();
    let raw = d.path().join("raw");
    std::fs::write(&raw, vec![7; 10 * CLUSTER as usize + 1000]).unwrap();
    let delta = Maker { clusters: 11, entries: vec![(2, 1)], ..Maker::default() }.make(&d.path().join("delta"));
    let short = Maker { clusters: 10, ..Maker::default() }.make(&d.path().join("short"));
    let as_raw = |write| LevelFile { raw: true, ..level(&raw, write) };
    let chain = open(&[as_raw(false), level(&delta, true)], &writable()).unwrap();
    assert!(matches!(chain.levels[0], LevelConfig::Raw { bytes } if bytes == 10 * CLUSTER + 512));
    assert_eq!(refused(&[&raw, &short], &[0], &writable()).kind(), Kind::Param);
    assert_eq!(refused(&[&delta, &raw], &[1], &writable()).kind(), Kind::Param);
    // Alone it needs its cluster size, takes no mark and is never cut.
    assert_eq!(refused(&[&raw], &[0], &writable()).kind(), Kind::Param);
    let options = OpenOptions_ { raw_cluster: Some(ClusterSize::DEFAULT), ..writable() };
    let top = as_raw(true);
    let chain = open(std::slice::from_ref(&top), &options).unwrap();
    assert_eq!((chain.version, chain.device_bytes), (None, 10 * CLUSTER + 512));
    close(&top, &chain, 0).unwrap();
    assert!(std::fs::read(&raw).unwrap() == vec![7; 10 * CLUSTER as usize + 1000]);
    // A ploop1 image is never served as raw, and a raw one never as ploop1.
    assert_eq!(refused(&[&delta], &[0], &options).kind(), Kind::Param);
    assert_eq!(refused(&[&raw], &[], &writable()).kind(), Kind::Format);
}

#[test]
fn as_many_levels_as_allowed() {
    let d = dir();
    let paths: Vec<PathBuf> = (0..=127u32)
        .map(|i| Maker { entries: vec![(i % 100, 1)], ..Maker::default() }.make(&d.path().join(i.to_string())))
        .collect();
    let levels: Vec<_> = paths.iter().map(|p| level(p, true)).collect();
    assert_eq!(open(&levels[..127], &writable()).unwrap().levels.len(), 127);
    assert_eq!(open(&levels, &writable()).unwrap_err().kind(), Kind::Param);
}

#[test]
fn short_and_wild_files() {
    let d = dir();
    let p = d.path().join("a");
    // Shorter than a header's block.
    for len in [0, 63, 4095] {
        Maker::default().make(&p);
        File::options().write(true).open(&p).unwrap().set_len(len).unwrap();
        assert_eq!(refused(&[&p], &[], &writable()).kind(), Kind::Open);
    }
    // 2^32 - 1 clusters by the header, 16 GiB of table: the file has 32 KiB.
    let mut h = Header::new(Version::V2, ClusterSize::from_sectors(64).unwrap(), 64 * (u64::from(u32::MAX))).unwrap();
    let mut bytes = vec![0; CLUSTER as usize];
    bytes[..64].copy_from_slice(&h.encode());
    std::fs::write(&p, &bytes).unwrap();
    let e = refused(&[&p], &[], &writable());
    assert_eq!(e.kind(), Kind::Format);
    assert!(e.to_string().contains("32768 bytes"), "{e}");
    // The table cut in the middle.
    h = Header::new(Version::V2, ClusterSize::from_sectors(64).unwrap(), 64 * 9000).unwrap();
    bytes[..64].copy_from_slice(&h.encode());
    bytes.resize(CLUSTER as usize + 4096, 0);
    std::fs::write(&p, &bytes).unwrap();
    assert_eq!(refused(&[&p], &[], &writable()).kind(), Kind::Format);
    // A file of 8 TiB that is one hole but for an entry at its end costs neither memory nor time.
    let clusters = 16u64 << 20;
    h = Header::new(Version::V2, ClusterSize::DEFAULT, 2048 * clusters).unwrap();
    let f = File::options().write(true).read(true).open(&p).unwrap();
    f.set_len(8 << 40).unwrap();
    f.write_all_at(&h.encode(), 0).unwrap();
    let last = (8u32 << 20) - 1;
    f.write_all_at(&last.to_le_bytes(), bat::entry_offset(clusters as u32 - 1)).unwrap();
    let chain = open(&[level(&p, false)], &OpenOptions_::default()).unwrap();
    assert_eq!(chain.levels.len(), 1);
}

#[test]
fn takeovers() {
    let d = dir();
    let maker = Maker {
        entries: vec![(1, 1), (2, 2), (3, 5)],
        tail: 5 * CLUSTER,
        header: |h| h.in_use = header::IN_USE,
        ..Maker::default()
    };
    let p = maker.make(&d.path().join("a"));
    // Cluster 4 got a host cluster that is not durable, 3 was dropped, 1 is durable as carried.
    let carried = vec![(7, 4, 8), (9, 3, 0), (11, 1, 1)];
    let options = OpenOptions_ { carried: Some(carried), ..writable() };
    let chain = open(&[level(&p, true)], &options).unwrap();
    let got: Vec<_> = chain.carried.iter().map(|c| (c.slot, c.cluster, c.host_cluster, c.durable)).collect();
    assert_eq!(got, [(7, 4, 8, 0), (9, 3, 0, 5), (11, 1, 1, 1)]);
    assert_eq!(chain.alloc.end, 9);
    assert_eq!(chain.alloc.free, [3..5, 6..8]);
    assert_eq!(std::fs::metadata(&p).unwrap().len(), 9 * CLUSTER);
    // A host cluster outside the file, in the table, or of another cluster; a cluster that is not there.
    for bad in [(0, 4, 9), (0, 4, 0x7fff_ffff), (0, 4, 2), (0, 100, 8)] {
        let e = refused(&[&p], &[], &OpenOptions_ { carried: Some(vec![bad]), ..writable() });
        assert_eq!(e.kind(), Kind::Protocol, "{e}");
    }
    // Another process has closed the image meanwhile.
    File::options().write(true).open(&p).unwrap().write_all_at(&[0; 4], 44).unwrap();
    assert_eq!(refused(&[&p], &[], &OpenOptions_ { carried: Some(vec![]), ..writable() }).kind(), Kind::Protocol);
}

#[test]
fn disks_that_end_inside_a_cluster() {
    let d = dir();
    let p = Maker { entries: vec![(99, 1)], header: |h| h.sectors -= 1, ..Maker::default() }.make(&d.path().join("a"));
    let chain = open(&[level(&p, true)], &writable()).unwrap();
    assert_eq!(chain.device_bytes, 100 * CLUSTER - 512);
    assert!(matches!(chain.levels[0], LevelConfig::Ploop { clusters: 100, .. }));
}

/// Over O_DIRECT where the file system takes it: offsets, lengths and buffers must be aligned.
#[test]
fn direct_io() {
    use std::os::unix::fs::OpenOptionsExt;
    let d = dir();
    let maker = Maker { clusters: 9000, entries: vec![(8990, 3), (0, 5)], tail: CLUSTER + 777, ..Maker::default() };
    let p = maker.make(&d.path().join("a"));
    let raw = d.path().join("raw");
    std::fs::write(&raw, vec![7; 1000]).unwrap();
    let direct = |p: &Path, raw| {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(p).ok()?;
        Some(LevelFile { file, name: p.to_owned(), raw, direct: true })
    };
    let (Some(base), Some(top)) = (direct(&raw, true), direct(&p, false)) else {
        crate::testing::skip::skip_on_this_file_system("no O_DIRECT here");
        return;
    };
    let levels = [base, top];
    let chain = open(&levels, &writable()).unwrap();
    assert!(matches!(chain.levels[0], LevelConfig::Raw { bytes: 512 }));
    assert_eq!(chain.alloc.end, 6);
    levels[1].file.set_len(20 * CLUSTER).unwrap();
    close(&levels[1], &chain, 10).unwrap();
    assert_eq!(header_of(&p).in_use, 0);
    let align = crate::sys::statx::direct_align(&levels[1].file).unwrap();
    assert!(align.is_none_or(|a| a.offset as usize <= crate::sys::aligned::ALIGN));
    let bytes = std::fs::read(&p).unwrap();
    assert!(bytes[3 * CLUSTER as usize..4 * CLUSTER as usize].iter().all(|b| *b == 8990u32 as u8 + 1));
    assert!(bytes[6 * CLUSTER as usize..].iter().all(|b| *b == 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damaged_images_open_or_fail(
        at in prop_oneof![0usize..64, 64usize..600],
        value in any::<u32>(),
        small in 0u32..8,
        use_small in any::<bool>(),
        v1 in any::<bool>(),
        write in any::<bool>(),
    ) {
        let d = dir();
        let version = if v1 { Version::V1 } else { Version::V2 };
        let p = Maker { version, entries: vec![(0, 3), (7, 1)], ..Maker::default() }.make(&d.path().join("a"));
        let word = if use_small { small } else { value };
        File::options().write(true).open(&p).unwrap().write_all_at(&word.to_le_bytes(), at as u64).unwrap();
        let before = std::fs::read(&p).unwrap();
        let options = OpenOptions_ { writable: write, marked: Marked::Recover, ..OpenOptions_::default() };
        let opened = open(&[level(&p, write)], &options);
        let after = std::fs::read(&p).unwrap();
        if !write || opened.is_err() {
            prop_assert!(before == after);
        } else {
            // Nothing but the header changes, and nothing that is named goes.
            prop_assert!(before[64..after.len()] == after[64..]);
        }
        if let Ok(chain) = opened && write {
            let mut free = 0;
            for r in &chain.alloc.free {
                prop_assert!(r.start < r.end && r.end < chain.alloc.end);
                free += r.end - r.start;
            }
            prop_assert!(free < chain.alloc.end);
        }
    }
}

#[test]
fn an_image_that_would_fill_the_host_is_opened_for_reading_alone() {
    let d = dir();
    // The file is all holes.
    let p = Maker { entries: vec![(0, 20_000)], ..Maker::default() }.make(&d.path().join("a"));
    let e = open(&[level(&p, true)], &writable()).unwrap_err();
    assert_eq!(e.kind(), Kind::Format);
    assert!(e.to_string().contains("/a: its data reach to cluster 20001") && e.to_string().contains("check -S"), "{e}");
    assert!(!header_of_file(&p).is_marked());
    let chain = open(&[level(&p, false)], &OpenOptions_::default()).unwrap();
    assert_eq!(chain.device_bytes, 100 * CLUSTER);
}

fn header_of_file(path: &Path) -> Header {
    let mut head = [0; header::SIZE];
    OpenOptions::new().read(true).open(path).unwrap().read_exact_at(&mut head, 0).unwrap();
    Header::parse(&head).unwrap()
}

//! The target of a merge on real files, with the engine in between.

use super::*;
use crate::engine::Engine;
use crate::engine::api::{
    Action, BAT_PAGE, BackgroundConfig, BackgroundWork, Buf, Config, Event, ReqId, Request, RequestKind, Shared,
    SyncState,
};
use crate::format::bat;
use crate::sys::store::record;

struct Table;

impl Shared for Table {
    fn slots(&self) -> usize {
        64
    }
    fn load(&self, _: usize) -> u64 {
        Self::FREE
    }
    fn store(&self, _: usize, _: u64) {}
    fn set_sync_state(&self, _: SyncState) {}
    fn sync_state(&self) -> SyncState {
        SyncState::Idle
    }
    fn progress(&self, _: usize) -> u64 {
        0
    }
    fn set_progress(&self, _: usize, _: u64) {}
}

/// Opens the chain for a merge, lets the engine run until top and target agree, writes into it, closes and finishes.
fn merge(levels: &[LevelFile], writes: &[(u64, u8)]) -> Chain {
    let mut chain = open(levels, &OpenOptions_ { raw_cluster: cluster(), ..writable() }).unwrap();
    let target = open_target(levels, &mut chain, (0, 1), 4 * CLUSTER).unwrap();
    let pages = used_pages(levels, &chain, 1..=1).unwrap();
    let work = BackgroundWork::MergeTop { target, pages };
    let config = Config {
        cluster_shift: chain.cluster.shift(),
        device_bytes: chain.device_bytes,
        levels: chain.levels.clone(),
        writable: true,
        header: chain.header,
        alloc: chain.alloc.clone(),
        bounces: 2,
        bounce_bytes: CLUSTER as u32,
        map_pages: 8,
        bat_age: 5,
        failed: false,
        background: Some(BackgroundConfig { work }),
    };
    let mut engine = Engine::new(config, vec![], Table);
    // Requests carry no bytes here: the executor knows them by the request.
    let request = |(i, (cluster, _)): (usize, &(u64, u8))| {
        let (id, kind) = (ReqId(i as u32), RequestKind::Write);
        Request { id, kind, offset: cluster * CLUSTER, len: CLUSTER }
    };
    let mut events: Vec<Request> = writes.iter().enumerate().map(request).collect();
    let mut bounces = vec![vec![0u8; CLUSTER as usize]; 2];
    let (mut merged, mut closed) = (false, None);
    let mut queue = Vec::new();
    engine.step(Event::Tick, &mut queue);
    while closed.is_none() {
        if queue.is_empty() {
            assert!(merged, "the merge does not end by itself");
            match events.pop() {
                Some(r) => engine.step(Event::Request(r), &mut queue),
                None => engine.step(Event::Close, &mut queue),
            }
            continue;
        }
        let done = |op| Event::Done { op, result: Ok(()) };
        let mut next = Vec::new();
        match queue.remove(0) {
            Action::Read { op, level, file_off, len, to: Buf::Bounce { id, off } } => {
                let buf = &mut bounces[usize::from(id.0)][off as usize..(u64::from(off) + len) as usize];
                levels[usize::from(level)].file.read_exact_at(buf, file_off).unwrap();
                engine.step(done(op), &mut next);
            }
            Action::Write { op, level, file_off, len, from } => {
                let data = match from {
                    Buf::Bounce { id, off } => {
                        bounces[usize::from(id.0)][off as usize..(u64::from(off) + len) as usize].to_vec()
                    }
                    Buf::Request { req, .. } => vec![writes[req.0 as usize].1; len as usize],
                };
                levels[usize::from(level)].file.write_all_at(&data, file_off).unwrap();
                engine.step(done(op), &mut next);
            }
            Action::ReadBat { op, level, page, len } => {
                let mut buf = vec![0; len as usize];
                levels[usize::from(level)].file.read_exact_at(&mut buf, u64::from(page) * BAT_PAGE as u64).unwrap();
                engine.step(Event::BatRead { op, result: Ok(&buf) }, &mut next);
            }
            Action::WriteBat { op, level, page, data } => {
                levels[usize::from(level)].file.write_all_at(&data[..], u64::from(page) * BAT_PAGE as u64).unwrap();
                engine.step(done(op), &mut next);
            }
            Action::Fallocate { op, level, file_off, len } => {
                levels[usize::from(level)].file.set_len(file_off + len).unwrap();
                engine.step(done(op), &mut next);
            }
            Action::Sync { op, .. } => engine.step(done(op), &mut next),
            Action::Reply { result, .. } => result.unwrap(),
            Action::BackgroundDone { result } => {
                result.unwrap();
                merged = true;
            }
            Action::Closed { result } => closed = Some(result),
            other => panic!("{other:?} was not expected"),
        }
        queue.append(&mut next);
    }
    closed.unwrap().unwrap();
    chain
}

fn cluster() -> Option<ClusterSize> {
    ClusterSize::from_sectors(u64::from(BS)).ok()
}

fn first_byte(path: &Path, version: Version, c: u32) -> Option<u8> {
    let bytes = std::fs::read(path).unwrap();
    let at = bat::entry_offset(c) as usize;
    let entry = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let at = u64::from(entry) * if version == Version::V1 { 512 } else { CLUSTER };
    (entry != 0).then(|| bytes[at as usize])
}

#[test]
fn a_smaller_target_takes_all_and_becomes_the_top() {
    for version in [Version::V1, Version::V2] {
        let dir = dir();
        let base = Maker { version, clusters: 60, entries: vec![(3, 1), (4, 3)], ..Maker::default() };
        let top = Maker { version, entries: vec![(4, 2), (90, 1)], ..Maker::default() };
        let (base, top) = (base.make(&dir.path().join("base")), top.make(&dir.path().join("top")));
        let levels = [level(&base, true), level(&top, true)];
        let chain = merge(&levels, &[(5, 77), (90, 78)]);
        drop(levels);
        assert_eq!(chain.device_bytes, 100 * CLUSTER);
        assert!(header_of(&base).is_marked());
        // The target alone is the disk now.
        let alone = [level(&base, true)];
        let again = open(&alone, &OpenOptions_ { marked: Marked::Recover, ..writable() }).unwrap();
        assert_eq!(again.device_bytes, chain.device_bytes);
        close(&alone[0], &again, again.alloc.end).unwrap();
        let got: Vec<_> = [3, 4, 5, 6, 90].iter().map(|c| first_byte(&base, version, *c)).collect();
        assert_eq!(got, [Some(4), Some(5), Some(77), None, Some(78)]);
        assert!(!header_of(&base).is_marked());
    }
}

#[test]
fn entries_behind_the_old_disk_do_not_become_data() {
    for version in [Version::V1, Version::V2] {
        let dir = dir();
        // Left behind the disk by an older program, within the disk of the top.
        let base = Maker { version, clusters: 60, entries: vec![(3, 1), (60, 3), (70, 2)], ..Maker::default() };
        let top = Maker { version, entries: vec![(4, 2), (90, 1)], ..Maker::default() };
        let (base, top) = (base.make(&dir.path().join("base")), top.make(&dir.path().join("top")));
        let levels = [level(&base, true), level(&top, true)];
        let chain = merge(&levels, &[(5, 77)]);
        drop(levels);
        assert_eq!(chain.device_bytes, 100 * CLUSTER);
        let got: Vec<_> = [3, 4, 5, 60, 70, 90].iter().map(|c| first_byte(&base, version, *c)).collect();
        assert_eq!(got, [Some(4), Some(5), Some(77), None, None, Some(91)]);
        // The host clusters that they named are allocated anew.
        let alone = [level(&base, true)];
        let again = open(&alone, &OpenOptions_ { marked: Marked::Recover, ..writable() }).unwrap();
        assert_eq!(again.alloc.free, []);
    }
}

/// Whatever of the steps before a power cut is durable: no entry from behind the old disk becomes data.
#[test]
fn a_target_that_grows_survives_a_power_cut() {
    let dir = dir();
    // On another page of the BAT than the header.
    let base = Maker { clusters: 1100, entries: vec![(3, 1), (1150, 3), (1200, 2)], ..Maker::default() };
    let top = Maker { clusters: 1300, ..Maker::default() };
    let (base, top) = (base.make(&dir.path().join("base")), top.make(&dir.path().join("top")));
    let guard = record::start(dir.path(), None);
    let levels = [level(&base, true), level(&top, true)];
    let mut chain = open(&levels, &writable()).unwrap();
    open_target(&levels, &mut chain, (0, 1), 4 * CLUSTER).unwrap();
    assert!(guard.0.steps() >= 8, "{}", guard.0.steps());
    for at in 0..=guard.0.steps() {
        for durable in 0..8 {
            let left = self::dir();
            guard.0.crash(at, left.path(), &mut |_, step| durable >> (step % 3) & 1 == 1);
            let base = left.path().join("base");
            let got: Vec<_> = [3, 1150, 1200].iter().map(|c| first_byte(&base, Version::V2, *c)).collect();
            let header = header_of(&base);
            match header.clusters() {
                // The entries are behind the disk, whether they are still there or not.
                1100 => assert_eq!(got[0], Some(4), "after step {at}"),
                _ => assert_eq!((got, header.is_marked()), (vec![Some(4), None, None], true), "after step {at}"),
            }
        }
    }
}

#[test]
fn a_raw_target_takes_all() {
    let dir = dir();
    let base = dir.path().join("base");
    std::fs::write(&base, vec![9u8; 50 * CLUSTER as usize]).unwrap();
    let top = Maker { entries: vec![(4, 2), (90, 1)], ..Maker::default() }.make(&dir.path().join("top"));
    let mut levels = [level(&base, true), level(&top, true)];
    levels[0].raw = true;
    merge(&levels, &[(5, 77)]);
    let bytes = std::fs::read(&base).unwrap();
    assert_eq!(bytes.len() as u64, 100 * CLUSTER);
    let got: Vec<u8> = [3, 4, 5, 49, 50, 90, 99].iter().map(|c| bytes[c * CLUSTER as usize]).collect();
    assert_eq!(got, [9, 5, 77, 9, 0, 91, 0]);
}

/// One cluster of table has 8176 entries here: a larger disk needs the cluster that has the first data.
#[test]
fn data_in_the_way_of_a_longer_table_moves_whatever_a_power_cut_leaves() {
    let dir = dir();
    let base = Maker { clusters: 8000, entries: vec![(3, 1), (4, 3)], ..Maker::default() };
    let top = Maker { clusters: 8200, entries: vec![(5, 2)], ..Maker::default() };
    let (base, top) = (base.make(&dir.path().join("base")), top.make(&dir.path().join("top")));
    let guard = record::start(dir.path(), None);
    let levels = [level(&base, true), level(&top, true)];
    let mut chain = open(&levels, &writable()).unwrap();
    open_target(&levels, &mut chain, (0, 1), CLUSTER).unwrap();
    let steps = guard.0.steps();
    let mut grown = 0;
    for at in 0..=steps {
        for durable in 0..8 {
            let left = self::dir();
            guard.0.crash(at, left.path(), &mut |_, step| durable >> (step % 3) & 1 == 1);
            let base = left.path().join("base");
            let got: Vec<_> = [3, 4, 6].iter().map(|c| first_byte(&base, Version::V2, *c)).collect();
            let header = header_of(&base);
            assert_eq!(got, [Some(4), Some(5), None], "after step {at} of {steps}");
            assert!([8000, 8200].contains(&header.clusters()));
            grown += usize::from(header.clusters() == 8200 && header.first_data() == 2 && header.is_marked());
        }
    }
    assert!(grown > 0);
}

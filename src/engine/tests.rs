//! Unit tests of the engine over files in memory; the simulation under tests/sim does the heavy work.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::api::*;
use super::*;

mod background;
mod full_host;
mod give_back;

const CLUSTER: u64 = 32 * 1024;

struct Table(Mutex<(Vec<u64>, SyncState)>, Mutex<Vec<u64>>, AtomicU64);

impl Shared for Table {
    fn slots(&self) -> usize {
        self.0.lock().unwrap().0.len()
    }
    fn load(&self, slot: usize) -> u64 {
        self.0.lock().unwrap().0[slot]
    }
    fn store(&self, slot: usize, value: u64) {
        self.0.lock().unwrap().0[slot] = value;
    }
    fn set_sync_state(&self, state: SyncState) {
        self.0.lock().unwrap().1 = state;
    }
    fn sync_state(&self) -> SyncState {
        self.0.lock().unwrap().1
    }
    fn progress(&self, word: usize) -> u64 {
        self.1.lock().unwrap()[word]
    }
    fn set_progress(&self, word: usize, value: u64) {
        self.1.lock().unwrap()[word] = value;
    }
    fn file_limit(&self) -> u64 {
        self.2.load(Relaxed)
    }
}

/// An engine, its files and buffers; operations are carried out when `run` is called, oldest first.
struct Rig {
    engine: Engine<Table>,
    files: Vec<Vec<u8>>,
    buffers: HashMap<ReqId, Vec<u8>>,
    bounces: Vec<Vec<u8>>,
    queue: VecDeque<Action>,
    replies: HashMap<ReqId, Result<(), Errno>>,
    log: Vec<&'static str>,
    closed: Option<Result<(), Errno>>,
    merged: Option<Result<(), Errno>>,
    given: Option<Result<GivenBack, Errno>>,
    next: u32,
    no_space: bool,
    /// BAT writes or syncs fail with this errno.
    bat_error: Option<Errno>,
    sync_error: Option<Errno>,
    /// Files can share data.
    shares: bool,
}

fn image(clusters: u32, data: &[(u32, u8)]) -> (LevelConfig, Vec<u8>) {
    let mut file = vec![0u8; CLUSTER as usize];
    for (i, (cluster, byte)) in data.iter().enumerate() {
        let at = 64 + 4 * *cluster as usize;
        file[at..at + 4].copy_from_slice(&(i as u32 + 1).to_le_bytes());
        file.extend(std::iter::repeat_n(*byte, CLUSTER as usize));
    }
    let file_clusters = (file.len() as u64 / CLUSTER) as u32;
    (LevelConfig::Ploop { v1: false, clusters, first_data: 1, file_clusters }, file)
}

fn rig(levels: Vec<(LevelConfig, Vec<u8>)>, clusters: u64) -> Rig {
    let (configs, files): (Vec<_>, Vec<_>) = levels.into_iter().unzip();
    let end = (files.last().unwrap().len() as u64 / CLUSTER) as u32;
    let config = Config {
        cluster_shift: 15,
        device_bytes: clusters * CLUSTER,
        levels: configs,
        writable: true,
        header: [7; 64],
        alloc: AllocConfig { end, free: vec![], ahead: 4, limit: u32::MAX },
        bounces: 1,
        bounce_bytes: 8192,
        map_pages: 4,
        bat_age: 5,
        failed: false,
        background: None,
    };
    over(config, files)
}

fn over(config: Config, files: Vec<Vec<u8>>) -> Rig {
    let table = Table(
        Mutex::new((vec![Table::FREE; 16], SyncState::Idle)),
        Mutex::new(vec![0; PROGRESS_WORDS]),
        AtomicU64::new(0),
    );
    Rig {
        engine: Engine::new(config, vec![], table),
        files,
        buffers: HashMap::new(),
        bounces: vec![vec![0xEE; 8192]],
        queue: VecDeque::new(),
        replies: HashMap::new(),
        log: Vec::new(),
        closed: None,
        merged: None,
        given: None,
        next: 0,
        no_space: false,
        bat_error: None,
        sync_error: None,
        shares: false,
    }
}

impl Rig {
    fn event(&mut self, event: Event<'_>) {
        let mut out = Vec::new();
        self.engine.step(event, &mut out);
        for action in out {
            match action {
                Action::Reply { req, result } => assert!(self.replies.insert(req, result).is_none()),
                Action::ZeroFill { req, off, len } => {
                    self.buffers.get_mut(&req).unwrap()[off as usize..(off + len) as usize].fill(0)
                }
                Action::Overlay { bounce, at, from, len } => {
                    let (at, len) = (at as usize, len as usize);
                    let bytes = match from {
                        Some((req, off)) => self.buffers[&req][off as usize..off as usize + len].to_vec(),
                        None => vec![0; len],
                    };
                    self.bounces[bounce.0 as usize][at..at + len].copy_from_slice(&bytes);
                }
                Action::BackgroundDone { result } => self.merged = Some(result),
                Action::GaveBack { result } => self.given = Some(result),
                Action::Closed { result } => self.closed = Some(result),
                other => self.queue.push_back(other),
            }
        }
    }

    fn one(&mut self) -> bool {
        self.any(0)
    }

    /// Carries out the operation that stands at `at` in the queue.
    fn any(&mut self, at: usize) -> bool {
        let Some(action) = self.queue.remove(at) else { return false };
        let ok = |op| Event::Done { op, result: Ok(()) };
        match action {
            Action::Read { op, level, file_off, len, to } => {
                let bytes = self.files[level as usize][file_off as usize..(file_off + len) as usize].to_vec();
                self.slice(to, len).copy_from_slice(&bytes);
                self.event(ok(op));
            }
            Action::Write { op, level, file_off, len, from } => {
                self.log.push("write");
                let bytes = self.slice(from, len).to_vec();
                self.files[level as usize][file_off as usize..(file_off + len) as usize].copy_from_slice(&bytes);
                self.event(ok(op));
            }
            Action::ReadBat { op, level, page, len } => {
                let at = page as usize * BAT_PAGE;
                let bytes = self.files[level as usize][at..at + len as usize].to_vec();
                self.event(Event::BatRead { op, result: Ok(&bytes) });
            }
            Action::WriteBat { op, .. } if self.bat_error.is_some() => {
                let result = self.bat_error.map_or(Ok(()), Err);
                self.event(Event::Done { op, result });
            }
            Action::WriteBat { op, level, page, data } => {
                self.log.push("bat");
                let at = page as usize * BAT_PAGE;
                self.files[level as usize][at..at + BAT_PAGE].copy_from_slice(&data[..]);
                self.event(ok(op));
            }
            Action::Fallocate { op, .. } if self.no_space => self.event(Event::Done { op, result: Err(28) }),
            Action::Fallocate { op, level, file_off, len } => {
                let file = &mut self.files[level as usize];
                assert!(file_off as usize >= file.len(), "grows at the end");
                file.resize((file_off + len) as usize, 0);
                self.event(ok(op));
            }
            Action::ZeroRange { op, level, file_off, len } => {
                self.log.push("zero");
                self.files[level as usize][file_off as usize..(file_off + len) as usize].fill(0);
                self.event(ok(op));
            }
            Action::Truncate { op, len, .. } => {
                self.log.push("cut");
                self.files.last_mut().unwrap().truncate(len as usize);
                self.event(ok(op));
            }
            Action::Sync { op, .. } => {
                self.log.push("sync");
                let result = self.sync_error.map_or(Ok(()), Err);
                self.event(Event::Done { op, result });
            }
            Action::Clone { op, .. } if !self.shares => self.event(Event::Done { op, result: Err(95) }),
            Action::Clone { op, from, from_off, level, file_off, len } => {
                let bytes = self.files[from as usize][from_off as usize..(from_off + len) as usize].to_vec();
                self.files[level as usize][file_off as usize..(file_off + len) as usize].copy_from_slice(&bytes);
                self.event(ok(op));
            }
            _ => unreachable!(),
        }
        true
    }

    fn run(&mut self) {
        while self.one() {}
    }

    fn slice(&mut self, buf: Buf, len: u64) -> &mut [u8] {
        match buf {
            Buf::Request { req, off } => &mut self.buffers.get_mut(&req).unwrap()[off as usize..(off + len) as usize],
            Buf::Bounce { id, off } => &mut self.bounces[id.0 as usize][off as usize..(u64::from(off) + len) as usize],
        }
    }

    fn submit(&mut self, kind: RequestKind, offset: u64, len: u64, fill: u8) -> ReqId {
        let id = ReqId(self.next);
        self.next += 1;
        self.buffers.insert(id, vec![fill; if kind == RequestKind::Zero { 0 } else { len as usize }]);
        self.event(Event::Request(Request { id, kind, offset, len }));
        id
    }

    fn write(&mut self, offset: u64, len: u64, fill: u8) {
        let id = self.submit(RequestKind::Write, offset, len, fill);
        self.run();
        assert_eq!(self.replies[&id], Ok(()));
    }

    fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        let id = self.submit(RequestKind::Read, offset, len, 0xDD);
        self.run();
        assert_eq!(self.replies[&id], Ok(()));
        self.buffers.remove(&id).unwrap()
    }

    fn flush(&mut self) -> Result<(), Errno> {
        let id = self.submit(RequestKind::Flush, 0, 0, 0);
        self.run();
        self.replies[&id]
    }

    fn entry(&self, cluster: usize) -> u32 {
        let at = 64 + 4 * cluster;
        u32::from_le_bytes(self.files.last().unwrap()[at..at + 4].try_into().unwrap())
    }
}

#[test]
fn a_fresh_write_reads_back_and_its_entry_follows_the_data() {
    let mut r = rig(vec![image(10, &[])], 10);
    r.write(5 * CLUSTER + 512, 1024, 1);
    let back = r.read(5 * CLUSTER, 2048);
    assert!(back[..512].iter().all(|b| *b == 0) && back[512..1536].iter().all(|b| *b == 1));
    assert_eq!(r.entry(5), 0, "no entry before a flush");
    r.log.clear();
    assert_eq!(r.flush(), Ok(()));
    assert_eq!(r.log, ["sync", "bat", "sync"]);
    assert_eq!(r.entry(5), 1);
    assert_eq!(&r.files[0][..64], &[7; 64]);
    r.log.clear();
    assert_eq!(r.flush(), Ok(()));
    assert_eq!(r.log, ["sync"], "nothing changed: one sync");
}

#[test]
fn a_partial_write_copies_the_lower_cluster_up() {
    let mut r = rig(vec![image(10, &[(3, 9)]), image(10, &[])], 10);
    let before = r.files[0].clone();
    r.write(3 * CLUSTER + 8704, 20_000 / 512 * 512, 4);
    let back = r.read(3 * CLUSTER, CLUSTER);
    let end = 8704 + 20_000 / 512 * 512;
    for (i, b) in back.iter().enumerate() {
        assert_eq!(*b, if (8704..end).contains(&i) { 4 } else { 9 }, "byte {i}");
    }
    assert_eq!(r.files[0], before, "lower levels never change");
    assert_eq!(r.engine.status().copied_up, 1);
}

#[test]
fn zeroing_hides_lower_data_and_frees_what_is_only_in_the_top() {
    let mut r = rig(vec![image(10, &[(3, 9)]), image(10, &[(4, 8)])], 10);
    let id = r.submit(RequestKind::Zero, 2 * CLUSTER + 512, 2 * CLUSTER, 0);
    r.run();
    assert_eq!(r.replies[&id], Ok(()));
    assert!(r.read(2 * CLUSTER, 2 * CLUSTER).iter().all(|b| *b == 0));
    let rest = r.read(4 * CLUSTER, 2 * CLUSTER);
    assert_eq!(rest[0], 0);
    assert_eq!(rest[512], 8);
    let id = r.submit(RequestKind::Zero, 4 * CLUSTER, CLUSTER, 0);
    r.run();
    assert_eq!(r.replies[&id], Ok(()));
    assert_eq!(r.engine.status().free, 0, "not reused before the cleared entry is durable");
    assert_eq!(r.flush(), Ok(()));
    assert_eq!(r.entry(4), 0);
    assert!(r.read(4 * CLUSTER, CLUSTER).iter().all(|b| *b == 0));
    r.write(6 * CLUSTER, 512, 3);
    assert_eq!(r.read(6 * CLUSTER, 1024)[512..], [0; 512], "a reused cluster is zeroed first");
}

#[test]
fn a_failed_sync_is_final() {
    let mut r = rig(vec![image(10, &[])], 10);
    r.write(0, 512, 1);
    r.sync_error = Some(5);
    assert_eq!(r.flush(), Err(5));
    r.sync_error = None;
    assert_eq!(r.flush(), Err(5));
    assert_eq!(r.entry(0), 0);
    r.event(Event::Close);
    r.run();
    assert_eq!(r.closed, Some(Err(5)));
}

#[test]
fn writes_wait_for_space_and_zeroings_do_not() {
    let mut r = rig(vec![image(10, &[(3, 9)]), image(10, &[])], 10);
    r.no_space = true;
    let write = r.submit(RequestKind::Write, 0, 512, 1);
    let zero = r.submit(RequestKind::Zero, 3 * CLUSTER, CLUSTER, 0);
    r.run();
    assert_eq!(r.replies.get(&write), None);
    assert_eq!(r.replies[&zero], Err(28));
    assert!(r.engine.status().no_space);
    assert!(r.read(3 * CLUSTER, 512).iter().all(|b| *b == 9));
    r.no_space = false;
    r.event(Event::Tick);
    r.run();
    assert_eq!(r.replies[&write], Ok(()));
    assert!(!r.engine.status().no_space);
}

#[test]
fn waiting_for_space_has_an_end() {
    for by_command in [false, true] {
        let mut r = rig(vec![image(10, &[])], 10);
        r.no_space = true;
        r.engine.set_enospc_limit((!by_command).then_some(3));
        let write = r.submit(RequestKind::Write, 0, 512, 1);
        r.run();
        for _ in 0..2 {
            r.event(Event::Tick);
            r.run();
            assert_eq!(r.replies.get(&write), None);
        }
        r.event(if by_command { Event::WaitForSpace(false) } else { Event::Tick });
        r.run();
        assert_eq!(r.replies[&write], Err(28));
        // The next one waits again, or fails at once while the device is being stopped.
        r.event(Event::Tick);
        let next = r.submit(RequestKind::Write, 0, 512, 1);
        r.run();
        assert_eq!(r.replies.get(&next), by_command.then_some(&Err(28)));
        r.no_space = false;
        r.event(Event::WaitForSpace(true));
        r.event(Event::Tick);
        r.run();
        r.write(0, 512, 2);
    }
}

#[test]
fn closing_makes_all_durable() {
    let mut r = rig(vec![image(2000, &[])], 2000);
    for c in [0, 900, 1007, 1008, 1999] {
        r.write(c * CLUSTER, CLUSTER, 5);
    }
    r.event(Event::Close);
    r.run();
    assert_eq!(r.closed, Some(Ok(())));
    assert!(r.engine.is_idle());
    for c in [0, 900, 1007, 1008, 1999] {
        assert_ne!(r.entry(c), 0);
    }
    assert_eq!(r.engine.status().alloc_end, 6);
}

#[test]
fn a_small_table_only_slows_down() {
    let mut r = rig(vec![image(200, &[])], 200);
    for c in 0..200 {
        r.submit(RequestKind::Write, c * CLUSTER, 512, c as u8 + 1);
    }
    r.run();
    assert!((0..200).all(|i| r.replies[&ReqId(i)] == Ok(())));
    for c in 0..200 {
        assert_eq!(r.read(c * CLUSTER, 1024)[511..513], [c as u8 + 1, 0]);
    }
}

//! The engine on real files, one operation after the other, in the order of a seed.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use ploop::chain::{Chain, LevelFile};
use ploop::engine::Engine;
use ploop::engine::api::*;

use crate::mutate::Rng;

/// The table that a successor would find, in memory.
#[derive(Clone)]
struct Slots(Arc<Mutex<(Vec<u64>, SyncState)>>);

impl Slots {
    fn with<T>(&self, f: impl FnOnce(&mut (Vec<u64>, SyncState)) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

impl Shared for Slots {
    fn slots(&self) -> usize {
        self.with(|s| s.0.len())
    }
    fn load(&self, slot: usize) -> u64 {
        self.with(|s| s.0[slot])
    }
    fn store(&self, slot: usize, value: u64) {
        self.with(|s| s.0[slot] = value);
    }
    fn set_sync_state(&self, state: SyncState) {
        self.with(|s| s.1 = state);
    }
    fn sync_state(&self) -> SyncState {
        self.with(|s| s.1)
    }
    /// This engine does no background work.
    fn progress(&self, _: usize) -> u64 {
        0
    }
    fn set_progress(&self, _: usize, _: u64) {}
}

const BOUNCE: usize = 64 * 1024;

pub struct Drive<'a> {
    engine: Engine<Slots>,
    files: &'a [LevelFile],
    cluster: u64,
    buffers: HashMap<ReqId, Vec<u8>>,
    bounces: Vec<Vec<u8>>,
    replies: HashMap<ReqId, Result<(), Errno>>,
    pending: Vec<Action>,
    closed: Option<Result<(), Errno>>,
    next: u32,
    steps: u64,
}

impl<'a> Drive<'a> {
    pub fn new(chain: &Chain, files: &'a [LevelFile], writable: bool) -> Drive<'a> {
        let slots = Slots(Arc::new(Mutex::new((vec![Slots::FREE; 16], SyncState::Idle))));
        let config = Config {
            cluster_shift: chain.cluster.shift(),
            device_bytes: chain.device_bytes,
            levels: chain.levels.clone(),
            writable,
            header: chain.header,
            alloc: AllocConfig { ahead: 2, ..chain.alloc.clone() },
            bounces: 2,
            bounce_bytes: BOUNCE as u32,
            map_pages: 2,
            bat_age: 5,
            failed: false,
            background: None,
        };
        Drive {
            engine: Engine::new(config, Vec::new(), slots),
            files,
            cluster: chain.cluster.bytes(),
            buffers: HashMap::new(),
            bounces: vec![vec![0; BOUNCE]; 2],
            replies: HashMap::new(),
            pending: Vec::new(),
            closed: None,
            next: 0,
            steps: 0,
        }
    }

    /// Sends a request; a write's bytes in `data`, a read's length in its.
    pub fn send(&mut self, kind: RequestKind, offset: u64, data: Vec<u8>) -> ReqId {
        let id = ReqId(self.next);
        self.next += 1;
        let len = if kind == RequestKind::Flush { 0 } else { data.len() as u64 };
        self.buffers.insert(id, data);
        self.feed(Event::Request(Request { id, kind, offset, len }));
        id
    }

    /// A request and its end.
    pub fn now(&mut self, kind: RequestKind, offset: u64, data: Vec<u8>, rng: &mut Rng) -> Result<Vec<u8>, Errno> {
        let id = self.send(kind, offset, data);
        self.settle(rng);
        let data = self.buffers.remove(&id).unwrap_or_default();
        self.replies.remove(&id).expect("every request is answered").map(|()| data)
    }

    /// How a request ended that all has settled for.
    pub fn end_of(&mut self, id: ReqId) -> (Result<(), Errno>, Vec<u8>) {
        let data = self.buffers.remove(&id).unwrap_or_default();
        (self.replies.remove(&id).expect("every request is answered"), data)
    }

    /// Closes the engine; answers the end of the file in clusters.
    pub fn close(mut self, rng: &mut Rng) -> Result<u32, Errno> {
        self.feed(Event::Close);
        self.settle(rng);
        self.closed.expect("Close is answered").map(|()| self.engine.status().alloc_end)
    }

    fn feed(&mut self, event: Event<'_>) {
        self.steps += 1;
        assert!(self.steps < 1_000_000, "the engine does not come to rest");
        let mut actions = Vec::new();
        self.engine.step(event, &mut actions);
        for action in actions {
            match action {
                Action::Reply { req, result } => {
                    assert!(self.replies.insert(req, result).is_none(), "{req:?} is answered twice");
                }
                Action::ZeroFill { req, off, len } => {
                    let buffer = self.buffers.get_mut(&req).expect("buffer");
                    buffer[off as usize..(off + len) as usize].fill(0);
                }
                Action::Overlay { bounce, at, from, len } => {
                    let bytes = match from {
                        None => vec![0; len as usize],
                        Some((req, off)) => self.buffers[&req][off as usize..off as usize + len as usize].to_vec(),
                    };
                    let to = at as usize..at as usize + len as usize;
                    self.bounces[bounce.0 as usize][to].copy_from_slice(&bytes);
                }
                Action::Closed { result } => self.closed = Some(result),
                other => self.pending.push(other),
            }
        }
    }

    /// Carries out all operations, in any order, and time goes on.
    pub fn settle(&mut self, rng: &mut Rng) {
        while !self.pending.is_empty() {
            let action = self.pending.swap_remove(rng.index(self.pending.len()));
            self.perform(action);
        }
    }

    pub fn tick(&mut self) {
        self.feed(Event::Tick);
    }

    fn file(&self, level: u8) -> &'a File {
        &self.files[level as usize].file
    }

    fn perform(&mut self, action: Action) {
        let top = (self.files.len() - 1) as u8;
        let end = |r: std::io::Result<()>| r.map_err(|e| e.raw_os_error().unwrap_or(5));
        match action {
            Action::Read { op, level, file_off, len, to } => {
                let mut bytes = vec![0; len as usize];
                let result = end(self.file(level).read_exact_at(&mut bytes, file_off));
                let to = match to {
                    Buf::Request { req, off } => &mut self.buffers.get_mut(&req).expect("buffer")[off as usize..],
                    Buf::Bounce { id, off } => &mut self.bounces[id.0 as usize][off as usize..],
                };
                to[..bytes.len()].copy_from_slice(&bytes);
                self.feed(Event::Done { op, result });
            }
            Action::Write { op, level, file_off, len, from } => {
                let bytes = match from {
                    Buf::Request { req, off } => &self.buffers[&req][off as usize..],
                    Buf::Bounce { id, off } => &self.bounces[id.0 as usize][off as usize..],
                };
                assert!(file_off >= self.cluster || self.files[level as usize].raw, "data over the header");
                let result = end(self.file(level).write_all_at(&bytes[..len as usize], file_off));
                self.feed(Event::Done { op, result });
            }
            Action::ReadBat { op, level, page, len } => {
                let mut bytes = vec![0; len as usize];
                let read = end(self.file(level).read_exact_at(&mut bytes, u64::from(page) * 4096));
                self.feed(Event::BatRead { op, result: read.map(|()| &bytes[..]) });
            }
            Action::WriteBat { op, page, data, .. } => {
                let result = end(self.file(top).write_all_at(&data[..], u64::from(page) * 4096));
                self.feed(Event::Done { op, result });
            }
            Action::Fallocate { op, level, file_off, len } => {
                let file = self.file(level);
                // What an image may grow to is the host's business; here it is not to fill the disk.
                let result = if file_off + len > 1 << 30 {
                    Err(27)
                } else {
                    end(file.metadata().and_then(|m| file.set_len(m.len().max(file_off + len))))
                };
                self.feed(Event::Done { op, result });
            }
            Action::ZeroRange { op, level, file_off, len } => {
                let result = end(self.file(level).write_all_at(&vec![0; len as usize], file_off));
                self.feed(Event::Done { op, result });
            }
            Action::Sync { op, .. } => self.feed(Event::Done { op, result: Ok(()) }),
            other => panic!("{other:?} is not to be carried out"),
        }
    }
}

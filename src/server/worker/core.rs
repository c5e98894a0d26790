//! What all threads of the worker share: the engine, the requests, the buffers, and how actions are carried out.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::Ordering::{AcqRel, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

use crate::chain::LevelFile;
use crate::engine::Engine;
use crate::engine::api::{Action, BAT_PAGE, BackgroundControl, Buf, Errno, Event, GiveBackConfig, GivenBack};
use crate::engine::api::{OpId, ReqId, Request, Status, TrackControl, Tracked};
use crate::server::remote_error::RemoteError;
use crate::server::shm::{RequestKey, Shm};
use crate::server::transport::{Geometry, KernelRequest, Queue, Reply};
use crate::server::unflushed;
use crate::sys::arena::Span;
use crate::sys::host;

use super::locked;
use super::log::Log;
use super::memory::{BufId, Memory, REQUESTS};
use super::pool::Pool;
use super::queue::{Inbox, Jobs};
use super::request::{EngineRequest, ReplyKind};
use super::request_journal::RequestJournal;

/// I/O threads of a worker.
pub const THREADS: usize = 2;
/// The thread numbers of those that do no I/O by ring, for [`Core::step`].
pub const SYNC_THREAD: usize = THREADS;
pub const AUX_THREAD: usize = THREADS + 1;
pub const MAIN_THREAD: usize = THREADS + 2;
pub const BACKGROUND_THREAD: usize = THREADS + 3;

/// The flush that the supervisor asked for; no request of the kernel's.
pub const OWN_FLUSH: ReqId = ReqId(REQUESTS as u32);

/// What other threads report to the main thread.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Notice {
    Flushed(Result<(), Errno>),
    /// See `Action::BackgroundDone`.
    Merged(Result<(), Errno>),
    GaveBack(Result<GivenBack, Errno>),
    /// See `Action::Tracked`.
    Tracked(bool, Result<Tracked, Errno>),
    Closed(Result<(), Errno>),
    /// An I/O thread reads no more requests; those that it had read are known to the engine.
    Quiet,
    /// The former top is complete, or not: [`Core::finished`].
    Finished,
}

/// Work for the threads that wait in the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AuxJob {
    Fallocate {
        op: OpId,
        level: u8,
        file_off: u64,
        len: u64,
    },
    ZeroRange {
        op: OpId,
        level: u8,
        file_off: u64,
        len: u64,
    },
    Clone {
        op: OpId,
        from: u8,
        from_off: u64,
        level: u8,
        file_off: u64,
        len: u64,
    },
    Truncate {
        op: OpId,
        level: u8,
        len: u64,
    },
    Sync {
        op: OpId,
        level: u8,
    },
    /// Adds the buffers that load needs.
    AddBuffers,
}

/// An event for the engine.
#[derive(Clone, Copy, Debug)]
pub enum Pending {
    Request(Request),
    Done {
        op: OpId,
        result: Result<(), Errno>,
    },
    /// A page of a BAT, in the arena.
    Bat {
        op: OpId,
        result: Result<Span, Errno>,
    },
    Tick,
    HoldForSpace(bool),
    GiveBack(GiveBackConfig),
    Track(TrackControl),
    Background(BackgroundControl),
    Close,
}

/// A request in flight. One thread at a time has to do with it: the one that reads it, then, by way of the engine's
/// lock, the one that answers it.
#[derive(Debug, Default)]
struct Slot {
    unique: AtomicU64,
    offset: AtomicU64,
    len: AtomicU64,
    code: AtomicU32,
    /// [`RESENT_FLAG`], [`ReplyKind`] and buffer.
    how: AtomicU32,
}

/// An earlier worker had the request.
const RESENT_FLAG: u32 = 1 << 31;

/// The thread that carries actions out.
pub trait IoSubmitter {
    /// Starts `Read`, `Write`, `ReadBat` or `WriteBat`.
    fn start(&mut self, core: &Core, action: Action);
    /// A request was answered.
    fn free(&mut self, core: &Core, buf: BufId, request: u32);
}

pub struct Core {
    pub queue: Queue,
    pub memory: Memory,
    pub pool: Pool,
    slots: Box<[Slot]>,
    /// Where a successor finds the requests, if the kernel does not give them out again.
    pub journal: Option<RequestJournal>,
    pub engine: Mutex<Engine<Shm>>,
    pub inboxes: [Inbox<Action>; THREADS],
    pub syncs: Jobs<OpId>,
    pub aux: Jobs<AuxJob>,
    /// What background work does to files other than the top: no request waits behind it.
    pub background: Jobs<AuxJob>,
    pub notices: Inbox<Notice>,
    /// Base first.
    pub levels: Vec<LevelFile>,
    /// Other open descriptions of the top's file, on which the kernel reports failed write-back.
    pub witnesses: Vec<OwnedFd>,
    pub geometry: Geometry,
    pub cluster_bytes: u64,
    pub writable: bool,
    /// The block device is gone: no more requests for data.
    pub closing: AtomicBool,
    /// Another worker is to read the requests from now on.
    pub retiring: AtomicBool,
    /// How finishing the former top ended, with or without an error; none: not yet, or there is none.
    pub finished: Mutex<Option<Option<RemoteError>>>,
    /// An I/O thread stopped reading requests for want of buffers.
    pub starving: AtomicBool,
    /// A request was read since the main thread has last looked.
    pub active: AtomicBool,
    /// The background thread has the order to add buffers.
    pub adding: AtomicBool,
    pub shm: Shm,
    pub log: Log,
}

/// What a [`Core`] is made of.
pub struct CoreConfig {
    pub queue: Queue,
    pub memory: Memory,
    pub journal: Option<RequestJournal>,
    pub engine: Engine<Shm>,
    pub levels: Vec<LevelFile>,
    pub witnesses: Vec<OwnedFd>,
    pub geometry: Geometry,
    pub cluster_bytes: u64,
    pub writable: bool,
    pub shm: Shm,
    pub log: Log,
}

impl Core {
    pub fn new(p: CoreConfig) -> std::io::Result<Core> {
        Ok(Core {
            queue: p.queue,
            memory: p.memory,
            pool: Pool::new(),
            slots: (0..REQUESTS).map(|_| Slot::default()).collect(),
            journal: p.journal,
            engine: Mutex::new(p.engine),
            inboxes: [Inbox::new()?, Inbox::new()?],
            syncs: Jobs::new(),
            aux: Jobs::new(),
            background: Jobs::new(),
            notices: Inbox::new()?,
            levels: p.levels,
            witnesses: p.witnesses,
            geometry: p.geometry,
            cluster_bytes: p.cluster_bytes,
            writable: p.writable,
            closing: AtomicBool::new(false),
            retiring: AtomicBool::new(false),
            finished: Mutex::new(None),
            starving: AtomicBool::new(false),
            active: AtomicBool::new(false),
            adding: AtomicBool::new(false),
            shm: p.shm,
            log: p.log,
        })
    }

    fn is_top(&self, level: u8) -> bool {
        usize::from(level) + 1 == self.levels.len()
    }

    /// The file that is written.
    pub fn top(&self) -> &LevelFile {
        &self.levels[self.levels.len() - 1]
    }

    /// Remembers a request until it is answered. Its data are in `buf` by now.
    pub fn register(&self, id: u32, from: &KernelRequest, request: &EngineRequest, buf: BufId) {
        let slot = &self.slots[id as usize];
        slot.unique.store(from.unique, Relaxed);
        slot.offset.store(request.offset, Relaxed);
        slot.len.store(request.len, Relaxed);
        slot.code.store(from.code, Relaxed);
        let resent = if request.resent { RESENT_FLAG } else { 0 };
        slot.how.store(resent | (request.answer as u32) << 16 | u32::from(buf.raw()), Relaxed);
        if let Some(journal) = &self.journal {
            journal.moved(id, buf);
        }
    }

    /// Answers a request with an error, for which nothing was done.
    pub fn refuse(&self, id: u32, unique: u64, errno: Errno) {
        if let Some(journal) = &self.journal {
            journal.done(id, Err(errno));
        }
        self.send(unique, Reply::Error(errno));
    }

    /// A request has its answer, or needs none.
    pub fn forget(&self, id: u32) {
        if let Some(journal) = &self.journal {
            journal.clear(id);
        }
    }

    /// No request is unanswered, as far as there is a table of them.
    pub fn all_answered(&self) -> bool {
        self.journal.as_ref().is_none_or(RequestJournal::is_empty)
    }

    fn key(&self, id: ReqId) -> Option<RequestKey> {
        let slot = self.slots.get(id.0 as usize)?;
        let (offset, len) = (slot.offset.load(Relaxed), slot.len.load(Relaxed));
        Some(self.request_key(slot.unique.load(Relaxed), slot.code.load(Relaxed), offset, len))
    }

    /// What a request is known by after a worker's exit.
    pub fn request_key(&self, unique: u64, code: u32, offset: u64, len: u64) -> RequestKey {
        RequestKey::new(self.queue.stable_id(unique), code, offset, len)
    }

    /// Where the bytes of an operation are.
    pub fn span(&self, buf: Buf, len: u64) -> Span {
        let (whole, off) = match buf {
            Buf::Request { req, off } => (self.request_span(req), off as usize),
            Buf::Bounce { id, off } => (self.memory.bounce(id), off as usize),
        };
        whole.part(off, len as usize)
    }

    fn request_span(&self, req: ReqId) -> Span {
        let slot = &self.slots[req.0 as usize];
        let whole = self.memory.buffer(BufId::from_raw(slot.how.load(Relaxed) as u16));
        whole.part(0, slot.len.load(Relaxed) as usize)
    }

    /// Feeds the engine everything in `pending` and appends its actions to `actions`, those that take effect at once
    /// being done. Nothing is left in `pending`.
    pub fn step(&self, thread: usize, pending: &mut Vec<Pending>, actions: &mut Vec<Action>) {
        let mut page = [0; BAT_PAGE];
        let first = actions.len();
        let mut engine = locked(&self.engine);
        for p in pending.drain(..) {
            match p {
                Pending::Request(r) => {
                    self.shm.mark(thread, self.key(r.id));
                    engine.step(Event::Request(r), actions);
                    self.shm.mark(thread, None);
                }
                Pending::Done { op, result } => engine.step(Event::Done { op, result }, actions),
                Pending::Bat { op, result: Ok(span) } => {
                    let page = &mut page[..span.len];
                    self.memory.arena.get(span, page);
                    engine.step(Event::BatRead { op, result: Ok(page) }, actions);
                }
                Pending::Bat { op, result: Err(e) } => engine.step(Event::BatRead { op, result: Err(e) }, actions),
                Pending::Tick => engine.step(Event::Tick, actions),
                Pending::HoldForSpace(hold) => engine.step(Event::WaitForSpace(hold), actions),
                Pending::GiveBack(config) => engine.step(Event::GiveBack(config), actions),
                Pending::Track(control) => engine.step(Event::Track(control), actions),
                Pending::Background(control) => engine.step(Event::Background(control), actions),
                Pending::Close => engine.step(Event::Close, actions),
            }
        }
        // Another thread may get the order to answer the request, or to write the bounce buffer, as soon as the lock is
        // free.
        for i in first..actions.len() {
            match actions[i] {
                Action::ZeroFill { req, off, len } if !answered_next(&actions[i + 1..], req) => {
                    self.zero_fill(req, off, len);
                    actions[i] = Action::ZeroFill { req, off, len: 0 };
                }
                Action::Overlay { bounce, at, from, len } => {
                    let to = self.memory.bounce(bounce).part(at as usize, len as usize);
                    match from {
                        Some((req, off)) => {
                            self.memory.arena.copy(self.request_span(req).part(off as usize, len as usize), to);
                        }
                        None => self.memory.arena.zero(to),
                    }
                }
                _ => {}
            }
        }
    }

    fn zero_fill(&self, req: ReqId, off: u64, len: u64) {
        self.memory.arena.zero(self.request_span(req).part(off as usize, len as usize));
    }

    /// Carries out what [`step`](Self::step) left to be done.
    pub fn execute(&self, actions: &mut Vec<Action>, submitter: &mut impl IoSubmitter) {
        for action in actions.drain(..) {
            match action {
                Action::Reply { req, result } => self.reply(req, result, submitter),
                Action::ZeroFill { len: 0, .. } | Action::Overlay { .. } => {}
                Action::ZeroFill { req, off, len } => self.zero_fill(req, off, len),
                Action::Read { .. } | Action::Write { .. } | Action::ReadBat { .. } | Action::WriteBat { .. } => {
                    submitter.start(self, action);
                }
                Action::Fallocate { op, level, file_off, len } if !self.is_top(level) => {
                    self.background.push(AuxJob::Fallocate { op, level, file_off, len });
                }
                Action::Fallocate { op, level, file_off, len } => {
                    self.aux.push(AuxJob::Fallocate { op, level, file_off, len });
                }
                Action::ZeroRange { op, level, file_off, len } => {
                    self.aux.push(AuxJob::ZeroRange { op, level, file_off, len });
                }
                Action::Truncate { op, level, len } => self.aux.push(AuxJob::Truncate { op, level, len }),
                Action::Sync { op, level } if self.is_top(level) => self.syncs.push(op),
                Action::Sync { op, level } => self.background.push(AuxJob::Sync { op, level }),
                Action::Clone { op, from, from_off, level, file_off, len } => {
                    self.background.push(AuxJob::Clone { op, from, from_off, level, file_off, len });
                }
                Action::BackgroundDone { result } => self.notices.push(Notice::Merged(result)),
                Action::GaveBack { result } => self.notices.push(Notice::GaveBack(result)),
                Action::Tracked { begun, result } => self.notices.push(Notice::Tracked(begun, result)),
                Action::Closed { result } => self.notices.push(Notice::Closed(result)),
            }
        }
    }

    fn reply(&self, req: ReqId, result: Result<(), Errno>, submitter: &mut impl IoSubmitter) {
        if req == OWN_FLUSH {
            self.notices.push(Notice::Flushed(result));
            return;
        }
        let slot = &self.slots[req.0 as usize];
        let unique = slot.unique.load(Relaxed);
        let how = slot.how.load(Relaxed);
        let len = slot.len.load(Relaxed);
        let buf = BufId::from_raw(how as u16);
        let read = (how & !RESENT_FLAG) >> 16 == ReplyKind::Read as u32;
        // A read may be executed twice, and its data are not kept.
        if let Some(journal) = self.journal.as_ref().filter(|_| !read) {
            journal.done(req.0, result);
        }
        self.send(
            unique,
            match result {
                Ok(()) if read => Reply::Data(self.memory.buffer(buf).part(0, len as usize)),
                Ok(()) if (how & !RESENT_FLAG) >> 16 == ReplyKind::Write as u32 => Reply::Written(len as u32),
                Ok(()) => Reply::Done,
                Err(e) => Reply::Error(e),
            },
        );
        self.forget(req.0);
        if how & RESENT_FLAG != 0
            && let Some(key) = self.key(req)
        {
            self.shm.clear_poison(key);
        }
        submitter.free(self, buf, req.0);
    }

    /// Sends an answer.
    pub fn send(&self, unique: u64, reply: Reply) {
        self.sent(unique, self.queue.reply(&self.memory.arena, unique, reply));
    }

    /// Has the queue answer a request.
    pub fn answer_own(&self, request: &KernelRequest) {
        self.sent(request.unique, self.queue.answer_own(request, &self.geometry));
    }

    fn sent(&self, unique: u64, result: std::io::Result<()>) {
        if let Err(e) = result {
            self.log.line(format!("the answer to request {unique} was refused: {e}"));
        }
    }

    /// For threads other than the I/O threads: a request was answered.
    pub fn give(&self, buf: BufId, request: u32) {
        self.pool.give(buf, request);
        if self.starving.swap(false, AcqRel) {
            self.inboxes[0].ring();
        }
    }

    /// An I/O thread lacks buffers: more are wanted, if the device has not all yet that load may take.
    pub fn want_buffers(&self) {
        if self.pool.is_small() && !self.adding.swap(true, AcqRel) {
            self.background.push(AuxJob::AddBuffers);
        }
    }

    /// Carries out [`AuxJob::AddBuffers`].
    pub fn add_buffers(&self) {
        if let Err(e) = self.pool.add_for_load(&self.memory) {
            self.log.line(format!("no memory for more requests: {e}; the device goes on with what it has"));
        }
        self.adding.store(false, Release);
        self.inboxes.iter().for_each(Inbox::ring);
    }

    /// For a device that takes over what this one may leave: the top's content is not older than this.
    pub fn note_changed(&self) {
        if self.writable
            && !host::is_simulated()
            && let Ok(meta) = self.top().file.metadata()
        {
            self.shm.note_changed(unflushed::changed_at(&meta));
        }
    }

    pub fn status(&self) -> Status {
        locked(&self.engine).status()
    }

    /// Feeds the engine one event, from a thread without a ring.
    pub fn submit_event(&self, thread: usize, event: Pending) {
        let mut pending = vec![event];
        let mut actions = Vec::new();
        self.step(thread, &mut pending, &mut actions);
        self.execute(&mut actions, &mut DeferToIoThread);
    }
}

/// The answer follows in the same batch, so that no other thread can send it.
fn answered_next(rest: &[Action], req: ReqId) -> bool {
    rest.iter()
        .find(|a| !matches!(a, Action::ZeroFill { req: r, .. } if *r == req))
        .is_some_and(|a| matches!(a, Action::Reply { req: r, .. } if *r == req))
}

/// IoSubmitter of a thread without a ring: the I/O threads do it.
pub struct DeferToIoThread;

impl IoSubmitter for DeferToIoThread {
    fn start(&mut self, core: &Core, action: Action) {
        core.inboxes[0].push(action);
    }

    fn free(&mut self, core: &Core, buf: BufId, request: u32) {
        core.give(buf, request);
    }
}

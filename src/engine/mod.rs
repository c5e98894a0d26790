#![forbid(unsafe_code)]
//! The I/O engine: read, write, zero, flush, allocation, copy-on-write.
//!
//! The engine has no threads, clocks or files: its caller, a worker or the simulation, feeds it events and carries out
//! its actions ([`api`]). The rules that it keeps:
//!
//! - Data before entry: a BAT page written by a flush has only entries whose data writes had completed before that
//!   flush's data sync began; a later change keeps its last durable value in it ([`pending`], [`flush`]).
//! - A flush joins only a cycle that starts after it arrived.
//! - No host cluster is allocated twice: it is reused when neither the durable BAT nor a page on its way to the disk
//!   names it and nothing is in flight on it ([`pending`], [`space`]).
//! - An entry is published when the whole cluster's content is right: a host cluster allocated in this run and never
//!   written reads as zero; any other is zeroed, copied up or wholly written first ([`cluster_op`]).
//! - A failed sync or BAT write is final: the engine begins no more cycles, and every flush fails. One that found no
//!   space is not: it is repeated, and nothing that depends on it is answered before ([`flush`]).
//!
//! A read or write of mapped clusters takes one lookup in the [`map`] and one file operation. Merges and
//! giving space back work on the same clusters meanwhile ([`background`]).

pub mod api;
mod background;
pub mod breach;
mod cluster_op;
mod flush;
mod io;
mod map;
mod pending;
mod request;
mod space;
#[cfg(test)]
mod tests;
mod track;

use std::collections::VecDeque;

use api::{Action, BounceId, Carried, Config, Errno, Event, LevelConfig, OpId, ReqId, Request, RequestKind};
use api::{Shared, Status, SyncState};
use background::{Background, BackgroundOp};
#[allow(unused_imports)] // the simulation compiles this as a part of itself
pub use background::{BackgroundState, pages::PageSet};
use breach::{Breach, breaks};
use cluster_op::ClusterOp;
use flush::FlushCycle;
use io::Io;
use map::{Map, MapEntry};
use pending::PendingUpdates;
use request::{Fragment, IntMap, Req, Slab};
use space::Space;
use track::Tracking;

/// A file operation in flight.
enum Op {
    Io(Io),
    /// Part of filling a page of the map.
    Bat {
        page: u32,
        level: u8,
    },
    /// Step of the cluster operation that has locked this cluster.
    Cluster {
        cluster: u32,
    },
    /// The top's file grows.
    Grow,
    /// The top's file is cut; it had so many clusters.
    Cut {
        old_end: u32,
    },
    Background(BackgroundOp),
    Sync,
    BatWrite {
        page: u32,
    },
}

/// The engine of one device.
pub struct Engine<S: Shared> {
    config: Config,
    top: u8,
    /// The top is a raw file: nothing to allocate, no BAT.
    raw_top: bool,
    map: Map,
    pending: PendingUpdates<S>,
    space: Space,
    cycle: FlushCycle,
    reqs: IntMap<ReqId, Req>,
    ops: Slab<Op>,
    cluster_ops: IntMap<u32, ClusterOp>,
    /// Fragments to be worked on in this step.
    ready: VecDeque<Fragment>,
    /// Operations that found no space: each is repeated at the next tick.
    waiting_for_space: Vec<OpId>,
    bounces: Vec<BounceId>,
    bounce_wait: VecDeque<u32>,
    /// Fragments that wait for a slot of the shared table.
    slot_wait: Vec<Fragment>,
    /// Ticks after which writes do not wait for space any longer.
    enospc_limit: Option<u32>,
    /// Ticks for which an operation has waited for space.
    waited: u32,
    wait_for_space: bool,
    closing: bool,
    closed: bool,
    background: Option<Background>,
    /// Background work has more to do in this step.
    more_background: bool,
    /// Of a copy that is made of the top's file; none: there is none.
    tracking: Option<Tracking>,
    stats: Status,
}

/// ENOSPC, EDQUOT, EIO, EBUSY, EROFS, EINVAL, EFBIG, ECANCELED.
const NO_SPACE: Errno = 28;
const QUOTA: Errno = 122;
const IO: Errno = 5;
const BUSY: Errno = 16;
const READ_ONLY: Errno = 30;
const INVALID: Errno = 22;
const TOO_BIG: Errno = 27;
const CANCELED: Errno = 125;

/// Bytes of a sector, in which the limit of the file counts.
const SECTOR: u64 = 512;

impl<S: Shared> Engine<S> {
    /// An engine over an opened chain. `carried`: the updates in the shared table of a worker that exited; they are not
    /// on disk.
    pub fn new(config: Config, carried: Vec<Carried>, shared: S) -> Self {
        let clusters = config.device_bytes.div_ceil(1 << config.cluster_shift);
        let top = config.levels.len().saturating_sub(1) as u8;
        let raw_top = matches!(config.levels.last(), Some(LevelConfig::Raw { .. }));
        shared.set_sync_state(if config.failed { SyncState::Failed } else { SyncState::Idle });
        let background = config
            .background
            .as_ref()
            .map(|b| Background::new(b, &config.levels, clusters, config.cluster_shift, &shared));
        Engine {
            top,
            raw_top,
            map: Map::new(clusters, config.map_pages),
            pending: PendingUpdates::new(shared, &carried),
            space: Space::new(&config.alloc),
            cycle: FlushCycle::new(config.failed),
            reqs: IntMap::default(),
            ops: Slab::new(),
            cluster_ops: IntMap::default(),
            ready: VecDeque::new(),
            waiting_for_space: Vec::new(),
            bounces: (0..config.bounces).rev().map(BounceId).collect(),
            bounce_wait: VecDeque::new(),
            slot_wait: Vec::new(),
            enospc_limit: None,
            waited: 0,
            wait_for_space: true,
            closing: false,
            closed: false,
            background,
            more_background: false,
            tracking: None,
            stats: Status::default(),
            config,
        }
    }

    /// Writes that find no space wait for so many ticks, then fail; `None`, the default: without limit.
    pub fn set_enospc_limit(&mut self, ticks: Option<u32>) {
        self.enospc_limit = ticks;
    }

    /// Handles an event and appends the actions for the caller to `out`.
    pub fn step(&mut self, event: Event<'_>, out: &mut Vec<Action>) {
        self.space.set_cap(self.file_cap());
        match event {
            Event::Request(r) => self.accept(r, out),
            Event::Done { op, result } => self.done(op, result, out),
            Event::BatRead { op, result } => self.bat_read(op, result, out),
            Event::Tick => self.tick(out),
            Event::WaitForSpace(allowed) => self.set_wait_for_space(allowed, out),
            Event::Background(control) => self.control_background(control, out),
            Event::GiveBack(config) => self.begin_give_back(config, out),
            Event::Track(control) => self.track(control, out),
            Event::Close => self.close(out),
        }
        loop {
            while let Some(fragment) = self.ready.pop_front() {
                self.process(fragment, out);
            }
            self.advance_space(out);
            self.advance_background(out);
            self.advance_cycle(out);
            if !self.slot_wait.is_empty() && self.pending.has_free_slot() {
                self.ready.extend(std::mem::take(&mut self.slot_wait));
            }
            if self.ready.is_empty() && !std::mem::take(&mut self.more_background) {
                break;
            }
        }
        self.advance_close(out);
    }

    /// State of the engine.
    pub fn status(&self) -> Status {
        Status {
            no_space: self.space.no_space && !self.space.waiters.is_empty()
                || !self.waiting_for_space.is_empty()
                || self.cycle.starved,
            failed: self.cycle.failed,
            alloc_end: self.space.end(),
            free: self.space.free_below_end(),
            dirty: self.pending.len() as u32,
            background_seen: self.background_progress().0,
            background_copied: self.background_progress().1,
            requests: (self.reqs.len() + self.cycle.flushes()) as u32,
            ..self.stats
        }
    }

    /// A sync or BAT write failed: flushes fail until the device is closed.
    pub fn is_failed(&self) -> bool {
        self.cycle.failed
    }

    /// Nothing is in flight, waiting or changed.
    pub fn is_idle(&self) -> bool {
        self.reqs.is_empty() && self.ops.is_empty() && self.cluster_ops.is_empty() && self.pending.len() == 0
    }

    fn accept(&mut self, r: Request, out: &mut Vec<Action>) {
        let refuse = if r.kind == RequestKind::Flush {
            None
        } else if r.offset.checked_add(r.len).is_none_or(|end| end > self.config.device_bytes) {
            Some(INVALID)
        } else if r.kind != RequestKind::Read && !self.config.writable {
            Some(READ_ONLY)
        } else {
            None
        };
        if let Some(errno) = refuse {
            out.push(Action::Reply { req: r.id, result: Err(errno) });
            return;
        }
        self.background_gives_way();
        match r.kind {
            RequestKind::Read => self.stats.reads += 1,
            RequestKind::Write => self.stats.writes += 1,
            RequestKind::Zero => self.stats.zeroes += 1,
            RequestKind::Flush => self.stats.flushes += 1,
        }
        if r.kind == RequestKind::Flush {
            self.accept_flush(r.id, out);
            return;
        }
        self.reqs.insert(r.id, Req { kind: r.kind, offset: r.offset, pending: 1, error: None });
        self.ready.push_back(Fragment { req: r.id, off: r.offset, len: r.len });
    }

    /// One pending part of a request is over.
    fn part_done(&mut self, req: ReqId, result: Result<(), Errno>, out: &mut Vec<Action>) {
        let Some(r) = self.reqs.get_mut(&req) else { return };
        if let Err(errno) = result {
            r.error.get_or_insert(errno);
        }
        r.pending -= 1;
        if r.pending == 0 {
            let result = r.error.map_or(Ok(()), Err);
            self.reqs.remove(&req);
            out.push(Action::Reply { req, result });
        }
    }

    fn start(&mut self, op: Op) -> OpId {
        if breaks(Breach::TrackIssued) {
            self.note_written(&op);
        }
        OpId(self.ops.insert(op))
    }

    fn done(&mut self, op: OpId, result: Result<(), Errno>, out: &mut Vec<Action>) {
        // A quota that is used up is a file system that is full.
        let result = match result {
            Err(QUOTA) if !breaks(Breach::QuotaIsFinal) => Err(NO_SPACE),
            other => other,
        };
        if result == Err(NO_SPACE) && self.defer_for_space(op, out) {
            return;
        }
        let op = self.ops.remove(op.0);
        if let Some(op) = op.as_ref().filter(|_| !breaks(Breach::TrackIssued)) {
            self.note_written(op);
        }
        match op {
            Some(Op::Io(io)) => self.io_done(io, result, out),
            Some(Op::Cluster { cluster }) => self.step_done(cluster, result, out),
            Some(Op::Grow) => self.grow_done(result, out),
            Some(Op::Cut { old_end }) => self.cut_done(old_end, result, out),
            Some(Op::Background(op)) => self.background_op_done(op, result, out),
            Some(Op::Sync) => self.sync_done(result, out),
            Some(Op::BatWrite { .. }) => self.bat_written(result, out),
            Some(Op::Bat { page, level }) => self.page_part(page, level, Err(result.err().unwrap_or(IO)), out),
            None => {}
        }
    }

    /// Whether a flush that finds no space may wait.
    fn flush_may_wait(&self) -> bool {
        self.wait_for_space && self.enospc_limit.is_none_or(|p| self.waited < p)
    }

    /// Whether a write that finds no space may wait.
    fn may_wait_for_space(&self) -> bool {
        self.flush_may_wait() && !self.closing
    }

    /// An operation that found no space waits for the next tick if that is allowed. False: the operation fails.
    fn defer_for_space(&mut self, op: OpId, out: &mut Vec<Action>) -> bool {
        let waits = match self.ops.get(op.0) {
            Some(Op::Sync | Op::BatWrite { .. }) => return self.defer_flush(op, out),
            _ if !self.may_wait_for_space() => None,
            Some(Op::Io(io)) if io.is_write() && io.level() == self.top => Some((io.clusters(), false)),
            Some(&Op::Cluster { cluster }) if self.cluster_ops.get(&cluster).is_some_and(ClusterOp::may_wait) => {
                Some((cluster..cluster + 1, true))
            }
            _ => None,
        };
        let Some((clusters, locked)) = waits else { return false };
        if matches!(self.ops.get(op.0), Some(Op::Io(io)) if io.is_half()) {
            // Other writes to the same sectors would wait with it.
            self.abort_background(NO_SPACE, out);
        }
        self.waiting_for_space.push(op);
        // Zeroings do not wait with it: over a write in place they are done another way, else they fail without space.
        for cluster in clusters {
            if locked {
                self.refuse_zeroings(cluster, out);
            } else {
                self.write_waits_for_space(cluster);
            }
        }
        self.refuse_starved_zeroings(out);
        true
    }

    /// A write to the cluster waits for space.
    fn is_waiting_for_space(&self, cluster: u32) -> bool {
        self.waiting_for_space.iter().any(|op| match self.ops.get(op.0) {
            Some(Op::Io(io)) => io.clusters().contains(&cluster),
            Some(Op::Cluster { cluster: c }) => *c == cluster,
            _ => false,
        })
    }

    fn tick(&mut self, out: &mut Vec<Action>) {
        let waiting = !self.waiting_for_space.is_empty() || !self.space.waiters.is_empty() || self.cycle.starved;
        self.waited = if waiting { self.waited + 1 } else { 0 };
        for op in std::mem::take(&mut self.waiting_for_space) {
            match self.ops.get(op.0) {
                Some(Op::Io(io)) => out.push(io.action(op)),
                Some(&Op::Cluster { cluster }) => self.repeat_step(cluster, op, out),
                _ => self.repeat_flush_op(op, out),
            }
        }
        self.retry_space();
        self.tick_background();
        self.cycle.age(self.pending.len() > 0);
    }

    fn close(&mut self, out: &mut Vec<Action>) {
        self.closing = true;
        self.close_background(out);
        self.let_waiting_fail(out);
    }

    fn set_wait_for_space(&mut self, allowed: bool, out: &mut Vec<Action>) {
        self.wait_for_space = allowed;
        if !allowed {
            self.let_waiting_fail(out);
        }
    }

    /// Writes that wait for space fail with ENOSPC. Growing the file is tried once more for fragments that wait for
    /// that, and so are syncs and BAT writes.
    fn let_waiting_fail(&mut self, out: &mut Vec<Action>) {
        for op in std::mem::take(&mut self.waiting_for_space) {
            match self.ops.get(op.0) {
                Some(Op::Sync | Op::BatWrite { .. }) => self.repeat_flush_op(op, out),
                _ => self.done(op, Err(NO_SPACE), out),
            }
        }
        self.retry_space();
    }

    fn retry_space(&mut self) {
        self.space.blocked = false;
        self.ready.extend(std::mem::take(&mut self.space.waiters));
    }

    fn advance_space(&mut self, out: &mut Vec<Action>) {
        if !self.config.writable || self.raw_top {
            return;
        }
        // A cycle may free clusters: writes that the file has no room for wait for its end.
        let may_free = self.cycle.is_hopeful() && (self.cycle.is_running() || self.pending.any_can_go());
        if self.space.is_exhausted() && !may_free {
            for fragment in std::mem::take(&mut self.space.waiters) {
                self.part_done(fragment.req, Err(TOO_BIG), out);
            }
        }
        let wanted = !self.space.waiters.is_empty() && !self.space.blocked;
        if self.closing && !wanted {
            return;
        }
        if let Some(range) = self.space.grow(wanted) {
            let op = self.start(Op::Grow);
            let (file_off, len) = (self.file_off(range.start), self.file_off(range.end - range.start));
            out.push(Action::Fallocate { op, level: self.top, file_off, len });
        }
    }

    fn grow_done(&mut self, result: Result<(), Errno>, out: &mut Vec<Action>) {
        match result {
            Ok(()) => {
                self.space.grown();
                self.ready.extend(std::mem::take(&mut self.space.waiters));
            }
            Err(NO_SPACE) if self.space.not_grown() => {}
            Err(NO_SPACE) if self.may_wait_for_space() => {
                // Writes wait for space. A zeroing must not wait: a block device may stop all other I/O for it.
                for fragment in std::mem::take(&mut self.space.waiters) {
                    if self.is_write(fragment.req) || breaks(Breach::HoldZeroings) {
                        self.space.waiters.push(fragment);
                    } else {
                        self.part_done(fragment.req, Err(NO_SPACE), out);
                    }
                }
            }
            Err(errno) => {
                if errno != NO_SPACE {
                    self.space.not_grown();
                }
                for fragment in std::mem::take(&mut self.space.waiters) {
                    self.part_done(fragment.req, Err(errno), out);
                }
            }
        }
    }

    fn kind(&self, req: ReqId) -> Option<RequestKind> {
        self.reqs.get(&req).map(|r| r.kind)
    }

    /// Clusters that the top's file may have by the limit of the disk's owner.
    fn file_cap(&self) -> u32 {
        match self.pending.shared.file_limit() {
            0 => u32::MAX,
            sectors => u32::try_from(sectors.saturating_mul(SECTOR) >> self.config.cluster_shift).unwrap_or(u32::MAX),
        }
    }

    /// Byte offset of a host cluster of the top's file, or bytes of so many clusters.
    fn file_off(&self, host_cluster: u32) -> u64 {
        u64::from(host_cluster) << self.config.cluster_shift
    }

    /// Host cluster in the top's durable BAT of a cluster without a pending change; 0: none.
    fn durable_host_cluster(&self, entry: MapEntry) -> u32 {
        match entry.location() {
            Some((level, host_cluster)) if level == self.top => host_cluster,
            _ => 0,
        }
    }
}

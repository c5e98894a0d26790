//! Cluster operations: what has to happen to a whole cluster before it is published, under its lock.
//!
//! A first write to a cluster that the top lacks allocates a host cluster there. If that reads as zero and no lower
//! level has the cluster, the write goes straight to it, without a cluster operation. Else the host cluster is filled
//! first: copied up from the lower level with the new bytes, zeroed, or written whole. Until then reads see the old
//! cluster, and writes wait.

mod background_copy;

use super::api::{Action, BounceId, Buf, Errno, LevelConfig, OpId, ReqId, RequestKind, Shared};
use super::breach::{Breach, breaks};
use super::map::MapEntry;
use super::request::Fragment;
use super::{Engine, NO_SPACE, Op};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// Waits until nothing is in flight on the cluster.
    Drain,
    /// As `Drain`, for a copy of background work that begins then.
    BackgroundDrain { host_cluster: u32 },
    /// Copies the cluster from another level, chunk by chunk.
    CopyUp { level: u8, host_cluster: u32 },
    /// Zeroes the host cluster; then the piece is written, unless it is a zeroing itself.
    Fill,
    /// The piece covers the cluster.
    Whole,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// Nothing in flight: draining, or waiting for a bounce buffer.
    Waiting,
    Reading,
    Filling,
    Writing,
}

/// What a cluster operation is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Purpose {
    Request,
    MergeTop,
    Relocate,
}

/// The request of a piece that belongs to background work.
const NO_REQUEST: ReqId = ReqId(u32::MAX);

/// Work on one cluster, which is locked meanwhile.
pub struct ClusterOp {
    purpose: Purpose,
    kind: Kind,
    step: Step,
    /// Level and host cluster that it fills.
    dest: u8,
    host_cluster: u32,
    slot: u32,
    /// The piece that began it.
    piece: Fragment,
    zero: bool,
    /// Copied up to here.
    at: u64,
    bounce: Option<BounceId>,
    waiters: Vec<Fragment>,
}

impl ClusterOp {
    /// May wait for space in the host file system. A zeroing must not wait, and a merge is given up instead.
    pub fn may_wait(&self) -> bool {
        self.purpose == Purpose::Request && (!self.zero || breaks(Breach::HoldZeroings))
    }
}

impl<S: Shared> Engine<S> {
    /// A host cluster in the top for a piece of a write. `Some`: write to it now.
    pub(super) fn allocate(
        &mut self,
        piece: Fragment,
        cluster: u32,
        entry: MapEntry,
        out: &mut Vec<Action>,
    ) -> Option<u32> {
        if !self.pending.has_slot_for(cluster) {
            self.wait_for_slot(piece);
            return None;
        }
        let Some(taken) = self.space.take(false) else {
            self.add_pending(piece.req);
            self.space.waiters.push(piece);
            return None;
        };
        if (taken.zero || breaks(Breach::TrustOldBytes)) && entry.location().is_none() {
            self.publish(cluster, taken.host_cluster, false, None);
            return Some(taken.host_cluster);
        }
        let kind = match entry.location() {
            _ if piece.len == 1 << self.config.cluster_shift => Kind::Whole,
            Some((level, from)) => Kind::CopyUp { level, host_cluster: from },
            None => Kind::Fill,
        };
        self.begin(kind, piece, cluster, taken.host_cluster, false, out);
        None
    }

    /// A cluster of zeroes (or a copy with zeroes in it) in the top, over what a lower level has.
    pub(super) fn allocate_zero(
        &mut self,
        piece: Fragment,
        cluster: u32,
        entry: MapEntry,
        whole: bool,
        out: &mut Vec<Action>,
    ) {
        if !self.pending.has_slot_for(cluster) {
            self.wait_for_slot(piece);
            return;
        }
        let Some(taken) = self.space.take(whole && !self.gives_back()) else {
            self.add_pending(piece.req);
            self.space.waiters.push(piece);
            return;
        };
        match entry.location() {
            _ if whole && taken.zero => self.publish(cluster, taken.host_cluster, true, None),
            Some((level, from)) if !whole => {
                self.begin(Kind::CopyUp { level, host_cluster: from }, piece, cluster, taken.host_cluster, true, out)
            }
            _ => self.begin(Kind::Fill, piece, cluster, taken.host_cluster, true, out),
        }
    }

    /// From now on the cluster is in the top, at `host_cluster`.
    fn publish(&mut self, cluster: u32, host_cluster: u32, ready: bool, slot: Option<u32>) {
        self.merge_sees_new(cluster);
        self.note_named(host_cluster);
        if let Ok(freed) = self.pending.set(cluster, host_cluster, ready, 0, slot) {
            self.map.set_location(cluster, Some((self.top, host_cluster)));
            self.map.mark(cluster, MapEntry::PENDING, true);
            self.stats.allocated += 1;
            if let Some(p) = freed {
                self.space.give(p);
            }
        }
    }

    fn begin(
        &mut self,
        kind: Kind,
        piece: Fragment,
        cluster: u32,
        host_cluster: u32,
        zero: bool,
        out: &mut Vec<Action>,
    ) {
        // The slot is taken now, so that publishing cannot fail.
        let Some(slot) = self.pending.take_slot() else {
            self.space.give(host_cluster);
            self.wait_for_slot(piece);
            return;
        };
        self.add_pending(piece.req);
        self.map.mark(cluster, MapEntry::LOCKED, true);
        let waiters = Vec::new();
        let (step, dest) = (Step::Waiting, self.top);
        let op = ClusterOp {
            purpose: Purpose::Request,
            kind,
            step,
            dest,
            host_cluster,
            slot,
            piece,
            zero,
            at: 0,
            bounce: None,
            waiters,
        };
        self.cluster_ops.insert(cluster, op);
        self.advance(cluster, out);
    }

    /// The piece waits until nothing is in flight on its cluster; later ones wait behind it.
    pub(super) fn drain(&mut self, cluster: u32, piece: Fragment) {
        self.add_pending(piece.req);
        self.map.mark(cluster, MapEntry::LOCKED, true);
        let waiters = vec![piece];
        let (kind, step) = (Kind::Drain, Step::Waiting);
        let dest = self.top;
        let op = ClusterOp {
            purpose: Purpose::Request,
            kind,
            step,
            dest,
            host_cluster: 0,
            slot: 0,
            piece,
            zero: true,
            at: 0,
            bounce: None,
            waiters,
        };
        self.cluster_ops.insert(cluster, op);
    }

    /// Nothing is in flight on the cluster any more.
    pub(super) fn drained(&mut self, cluster: u32, out: &mut Vec<Action>) {
        let Some(op) = self.cluster_ops.get_mut(&cluster) else { return };
        match op.kind {
            Kind::Drain => {
                self.let_go(cluster);
            }
            Kind::BackgroundDrain { host_cluster } => {
                op.kind = Kind::CopyUp { level: self.top, host_cluster };
                // Reads can go on, writes will wait once more.
                self.ready.extend(op.waiters.drain(..));
                self.advance(cluster, out);
            }
            _ => {}
        }
    }

    /// If copies that wait for space have all bounce buffers: zeroings that need one fail instead of waiting.
    pub(super) fn refuse_starved_zeroings(&mut self, out: &mut Vec<Action>) {
        let copies = |op: &OpId| matches!(self.ops.get(op.0), Some(Op::Cluster { .. }));
        if !self.bounces.is_empty() || !self.waiting_for_space.iter().any(copies) {
            return;
        }
        let starved = |c: &u32| self.cluster_ops.get(c).is_some_and(|op| op.zero && op.purpose == Purpose::Request);
        let clusters: Vec<u32> = self.bounce_wait.iter().copied().filter(starved).collect();
        self.bounce_wait.retain(|c| !clusters.contains(c));
        for cluster in clusters {
            self.cluster_op_failed(cluster, NO_SPACE, out);
        }
        let waiting: Vec<u32> = self.bounce_wait.iter().copied().collect();
        for cluster in waiting {
            self.refuse_zeroings(cluster, out);
        }
    }

    /// A write to the cluster waits for space: operations that wait until nothing is in flight there must not wait for
    /// it.
    pub(super) fn write_waits_for_space(&mut self, cluster: u32) {
        match self.cluster_ops.get(&cluster).map(|j| j.kind) {
            Some(Kind::Drain) => {
                self.let_go(cluster);
            }
            Some(Kind::BackgroundDrain { .. }) => {
                if let Some(op) = self.let_go(cluster) {
                    match op.purpose {
                        Purpose::Relocate => self.relocation_postponed(op.host_cluster, op.slot),
                        _ => self.merge_postponed(cluster, op.host_cluster),
                    }
                }
            }
            _ => {}
        }
    }

    /// Ends the cluster operation; the fragments that waited for it go on, in their order of arrival.
    fn let_go(&mut self, cluster: u32) -> Option<ClusterOp> {
        let mut op = self.cluster_ops.remove(&cluster)?;
        self.map.mark(cluster, MapEntry::LOCKED, false);
        self.ready.extend(op.waiters.drain(..));
        Some(op)
    }

    pub(super) fn wait_for_cluster_op(&mut self, cluster: u32, piece: Fragment) {
        self.add_pending(piece.req);
        match self.cluster_ops.get_mut(&cluster) {
            Some(op) => op.waiters.push(piece),
            None => self.ready.push_back(piece),
        }
    }

    /// The cluster operation waits for space: zeroings behind it must not.
    pub(super) fn refuse_zeroings(&mut self, cluster: u32, out: &mut Vec<Action>) {
        let Some(op) = self.cluster_ops.get_mut(&cluster) else { return };
        let waiters = std::mem::take(&mut op.waiters);
        let (zeroings, others): (Vec<Fragment>, Vec<Fragment>) =
            waiters.into_iter().partition(|fragment| self.kind(fragment.req) == Some(RequestKind::Zero));
        if let Some(op) = self.cluster_ops.get_mut(&cluster) {
            op.waiters = others;
        }
        for fragment in zeroings {
            self.part_done(fragment.req, Err(NO_SPACE), out);
        }
    }

    /// Reads see the old cluster while a new one is made, but wait behind a freeing, and behind a move: its old host
    /// cluster is freed with nothing in flight on it.
    pub(super) fn cluster_op_blocks_reads(&self, cluster: u32) -> bool {
        self.cluster_ops.get(&cluster).is_some_and(|j| {
            matches!(j.kind, Kind::Drain | Kind::BackgroundDrain { .. })
                || j.purpose == Purpose::Relocate && !breaks(Breach::MoveUnderReads)
        })
    }

    /// Begins the cluster operation's next operation.
    fn advance(&mut self, cluster: u32, out: &mut Vec<Action>) {
        let Some(op) = self.cluster_ops.get_mut(&cluster) else { return };
        op.step = match op.kind {
            Kind::Drain | Kind::BackgroundDrain { .. } => return,
            Kind::Whole => Step::Writing,
            Kind::Fill => Step::Filling,
            Kind::CopyUp { .. } => {
                if op.bounce.is_none() {
                    op.bounce = self.bounces.pop();
                }
                if op.bounce.is_none() && op.purpose == Purpose::Relocate {
                    // Reads of the cluster wait for the copy: it must not wait itself.
                    if let Some(op) = self.let_go(cluster) {
                        self.relocation_postponed(op.host_cluster, op.slot);
                    }
                    return;
                }
                if op.bounce.is_none() {
                    self.bounce_wait.push_back(cluster);
                    self.refuse_starved_zeroings(out);
                    return;
                }
                self.copy_chunk(cluster, out);
                return;
            }
        };
        self.start_step(cluster, out);
    }

    /// Bytes of the chunk that a copy is at.
    fn chunk_len(&self, op: &ClusterOp) -> u64 {
        (self.copy_len(op) - op.at).min(u64::from(self.config.bounce_bytes))
    }

    /// Bytes that a copy has to copy: a cluster, but a raw file ends with the device.
    fn copy_len(&self, op: &ClusterOp) -> u64 {
        let cluster = 1 << self.config.cluster_shift;
        match self.config.levels.get(usize::from(op.dest)) {
            Some(LevelConfig::Raw { .. }) => (self.config.device_bytes - self.file_off(op.host_cluster)).min(cluster),
            _ => cluster,
        }
    }

    /// The part of the piece that lies in the chunk: offset in the chunk, offset in the piece, length.
    fn overlap(&self, op: &ClusterOp) -> Option<(u64, u64, u64)> {
        let within = op.piece.off & ((1 << self.config.cluster_shift) - 1);
        let start = within.max(op.at);
        let end = (within + op.piece.len).min(op.at + self.chunk_len(op));
        (start < end).then(|| (start - op.at, start - within, end - start))
    }

    fn copy_chunk(&mut self, cluster: u32, out: &mut Vec<Action>) {
        let Some(op) = self.cluster_ops.get(&cluster) else { return };
        let Kind::CopyUp { level, host_cluster } = op.kind else { return };
        let len = self.chunk_len(op);
        let covered = self.overlap(op).is_some_and(|(_, _, n)| n == len);
        let nothing = self.readable(level, self.file_off(host_cluster) + op.at) == 0;
        if covered || nothing {
            self.chunk_read(cluster, out);
        } else if let Some(op) = self.cluster_ops.get_mut(&cluster) {
            op.step = Step::Reading;
            self.start_step(cluster, out);
        }
    }

    /// The old bytes of the chunk are in the bounce buffer: the new ones go over them, and all to the top.
    fn chunk_read(&mut self, cluster: u32, out: &mut Vec<Action>) {
        let Some(op) = self.cluster_ops.get(&cluster) else { return };
        let (Kind::CopyUp { level, host_cluster }, Some(bounce)) = (op.kind, op.bounce) else { return };
        let len = self.chunk_len(op);
        let have = self.readable(level, self.file_off(host_cluster) + op.at).min(len);
        if have < len {
            out.push(Action::Overlay { bounce, at: have as u32, from: None, len: (len - have) as u32 });
        }
        if let Some((at, in_piece, n)) = self.overlap(op) {
            let base = self.reqs.get(&op.piece.req).map_or(0, |r| op.piece.off - r.offset);
            let from = (!op.zero).then_some((op.piece.req, base + in_piece));
            out.push(Action::Overlay { bounce, at: at as u32, from, len: n as u32 });
        }
        if let Some(op) = self.cluster_ops.get_mut(&cluster) {
            op.step = Step::Writing;
            self.start_step(cluster, out);
        }
    }

    fn start_step(&mut self, cluster: u32, out: &mut Vec<Action>) {
        let op = self.start(Op::Cluster { cluster });
        self.repeat_step(cluster, op, out);
    }

    /// Emits the action of the cluster operation's step; also after it failed with ENOSPC.
    pub(super) fn repeat_step(&mut self, cluster: u32, op: OpId, out: &mut Vec<Action>) {
        let Some(work) = self.cluster_ops.get(&cluster) else { return };
        let to = self.file_off(work.host_cluster);
        let within = work.piece.off & ((1 << self.config.cluster_shift) - 1);
        let base = self.reqs.get(&work.piece.req).map_or(0, |r| work.piece.off - r.offset);
        out.push(match (work.step, work.kind, work.bounce) {
            (Step::Reading, Kind::CopyUp { level, host_cluster }, Some(id)) => {
                let file_off = self.file_off(host_cluster) + work.at;
                let len = self.chunk_len(work).min(self.readable(level, file_off));
                Action::Read { op, level, file_off, len, to: Buf::Bounce { id, off: 0 } }
            }
            (Step::Writing, Kind::CopyUp { .. }, Some(id)) => {
                let from = Buf::Bounce { id, off: 0 };
                Action::Write { op, level: work.dest, file_off: to + work.at, len: self.chunk_len(work), from }
            }
            (Step::Filling, ..) => {
                Action::ZeroRange { op, level: self.top, file_off: to, len: 1 << self.config.cluster_shift }
            }
            _ => {
                let from = Buf::Request { req: work.piece.req, off: base };
                Action::Write { op, level: self.top, file_off: to + within, len: work.piece.len, from }
            }
        });
    }

    pub(super) fn step_done(&mut self, cluster: u32, result: Result<(), Errno>, out: &mut Vec<Action>) {
        if let Err(errno) = result {
            self.cluster_op_failed(cluster, errno, out);
            return;
        }
        let (chunk, all) = self.cluster_ops.get(&cluster).map_or((0, 0), |j| (self.chunk_len(j), self.copy_len(j)));
        let Some(op) = self.cluster_ops.get_mut(&cluster) else { return };
        match (op.kind, op.step) {
            (Kind::CopyUp { .. }, Step::Reading) => self.chunk_read(cluster, out),
            (Kind::CopyUp { .. }, _) => {
                op.at += chunk;
                if op.at < all && !breaks(Breach::HalfBuilt) {
                    self.copy_chunk(cluster, out);
                } else {
                    self.stats.copied_up += u64::from(op.purpose == Purpose::Request);
                    self.cluster_op_complete(cluster, out);
                }
            }
            (Kind::Fill, Step::Filling) if !op.zero => {
                op.step = Step::Writing;
                self.start_step(cluster, out);
            }
            _ => self.cluster_op_complete(cluster, out),
        }
    }

    fn cluster_op_complete(&mut self, cluster: u32, out: &mut Vec<Action>) {
        let Some(op) = self.let_go(cluster) else { return };
        match op.purpose {
            Purpose::Request => self.publish(cluster, op.host_cluster, true, Some(op.slot)),
            Purpose::MergeTop => self.merge_copied(cluster, op.host_cluster, Ok(()), out),
            Purpose::Relocate => self.relocated(cluster, op.host_cluster, op.slot, Ok(()), out),
        }
        self.give_bounce_back(op.bounce, out);
        self.part_done(op.piece.req, Ok(()), out);
    }

    fn cluster_op_failed(&mut self, cluster: u32, errno: Errno, out: &mut Vec<Action>) {
        let Some(op) = self.let_go(cluster) else { return };
        match op.purpose {
            Purpose::Request => {
                self.space.give(op.host_cluster);
                self.pending.give_slot_back(op.slot);
            }
            Purpose::MergeTop => self.merge_copied(cluster, op.host_cluster, Err(errno), out),
            Purpose::Relocate => self.relocated(cluster, op.host_cluster, op.slot, Err(errno), out),
        }
        self.give_bounce_back(op.bounce, out);
        self.part_done(op.piece.req, Err(errno), out);
    }

    /// A bounce buffer is free.
    pub(super) fn has_bounce(&self) -> bool {
        !self.bounces.is_empty()
    }

    pub(super) fn give_bounce_back(&mut self, bounce: Option<BounceId>, out: &mut Vec<Action>) {
        let Some(bounce) = bounce else { return };
        self.bounces.push(bounce);
        if let Some(next) = self.bounce_wait.pop_front() {
            self.advance(next, out);
        }
    }

    /// Whether an unanswered request is a write (and not a zeroing).
    pub(super) fn is_write(&self, req: ReqId) -> bool {
        self.reqs.get(&req).is_some_and(|r| r.kind == RequestKind::Write)
    }
}

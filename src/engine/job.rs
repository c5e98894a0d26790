//! Jobs: what has to happen to a whole cluster before it is published, under its lock.
//!
//! A first write to a cluster that the top lacks takes a place there. If that place reads as zero and no lower level has
//! the cluster, the write goes straight to it (no job). Else the place is made right first: copied up from the lower
//! level with the new bytes laid over, zeroed, or written whole. Until then reads see the old cluster; writes wait.

use super::api::{Action, BounceId, Buf, Errno, LevelConfig, OpId, RequestKind, Shared};
use super::breach::{Breach, breaks};
use super::map::Ent;
use super::merge::NOBODY;
use super::request::Seg;
use super::{Engine, NO_SPACE, Op};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// Waits until nothing is in flight on the cluster.
    Drain,
    /// The same, for a copy that begins then.
    MergeDrain { place: u32 },
    /// Copies the cluster from another level, chunk by chunk.
    CopyUp { level: u8, place: u32 },
    /// Zeroes the place; then the piece is written, unless it is a zeroing itself.
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

/// Work on one cluster, which is held meanwhile.
pub struct Job {
    kind: Kind,
    step: Step,
    /// Level and place that it makes right.
    dest: u8,
    place: u32,
    slot: u32,
    /// The piece that began it.
    piece: Seg,
    zero: bool,
    /// Copied up to here.
    at: u64,
    bounce: Option<BounceId>,
    waiters: Vec<Seg>,
}

impl Job {
    /// Waits for space in the host file system; a zeroing must not, and a merge rather ends.
    pub fn may_wait(&self) -> bool {
        !self.zero || breaks(Breach::HoldZeroings)
    }
}

impl<S: Shared> Engine<S> {
    /// A place in the top for a piece of a write. `Some`: write to it now.
    pub(super) fn allocate(&mut self, piece: Seg, cluster: u32, ent: Ent, out: &mut Vec<Action>) -> Option<u32> {
        if !self.dirty.has_slot_for(cluster) {
            self.wait_for_slot(piece);
            return None;
        }
        let Some(place) = self.space.take(false) else {
            self.hold(piece.req);
            self.space.waiters.push(piece);
            return None;
        };
        if (place.zero || breaks(Breach::TrustOldBytes)) && ent.place().is_none() {
            self.publish(cluster, place.at, false, None);
            return Some(place.at);
        }
        let kind = match ent.place() {
            _ if piece.len == 1 << self.config.cluster_shift => Kind::Whole,
            Some((level, from)) => Kind::CopyUp { level, place: from },
            None => Kind::Fill,
        };
        self.begin(kind, piece, cluster, place.at, false, out);
        None
    }

    /// A cluster of zeroes (or a copy with zeroes in it) in the top, over what a lower level has.
    pub(super) fn allocate_zero(&mut self, piece: Seg, cluster: u32, ent: Ent, whole: bool, out: &mut Vec<Action>) {
        if !self.dirty.has_slot_for(cluster) {
            self.wait_for_slot(piece);
            return;
        }
        let Some(place) = self.space.take(whole) else {
            self.hold(piece.req);
            self.space.waiters.push(piece);
            return;
        };
        match ent.place() {
            _ if whole && place.zero => self.publish(cluster, place.at, true, None),
            Some((level, from)) if !whole => {
                self.begin(Kind::CopyUp { level, place: from }, piece, cluster, place.at, true, out)
            }
            _ => self.begin(Kind::Fill, piece, cluster, place.at, true, out),
        }
    }

    /// From now on the cluster is in the top, at `place`.
    fn publish(&mut self, cluster: u32, place: u32, ready: bool, slot: Option<u32>) {
        if let Ok(freed) = self.dirty.set(cluster, place, ready, 0, slot) {
            self.map.set_place(cluster, Some((self.top, place)));
            self.map.mark(cluster, Ent::DIRTY, true);
            self.stats.allocated += 1;
            if let Some(p) = freed {
                self.space.give(p);
            }
            self.merge_anew(cluster);
        }
    }

    fn begin(&mut self, kind: Kind, piece: Seg, cluster: u32, place: u32, zero: bool, out: &mut Vec<Action>) {
        // The slot is taken now, so that publishing cannot fail.
        let Some(slot) = self.dirty.take_slot() else {
            self.space.give(place);
            self.wait_for_slot(piece);
            return;
        };
        self.hold(piece.req);
        self.map.mark(cluster, Ent::HELD, true);
        let waiters = Vec::new();
        let (step, dest) = (Step::Waiting, self.top);
        let job = Job { kind, step, dest, place, slot, piece, zero, at: 0, bounce: None, waiters };
        self.jobs.insert(cluster, job);
        self.advance(cluster, out);
    }

    /// The piece waits until nothing is in flight on its cluster; later ones wait behind it.
    pub(super) fn drain(&mut self, cluster: u32, piece: Seg) {
        self.hold(piece.req);
        self.map.mark(cluster, Ent::HELD, true);
        let waiters = vec![piece];
        let (kind, step) = (Kind::Drain, Step::Waiting);
        let dest = self.top;
        let job = Job { kind, step, dest, place: 0, slot: 0, piece, zero: true, at: 0, bounce: None, waiters };
        self.jobs.insert(cluster, job);
    }

    /// The cluster is copied from its place in the top to one in the target of the merge, once nothing is in flight on it.
    pub(super) fn begin_merge_copy(&mut self, cluster: u32, from: u32, place: u32, busy: bool, out: &mut Vec<Action>) {
        let Some(dest) = self.merge.as_ref().map(|m| m.level) else { return };
        self.map.mark(cluster, Ent::HELD, true);
        let copy = Kind::CopyUp { level: self.top, place: from };
        let kind = if busy { Kind::MergeDrain { place: from } } else { copy };
        let piece = Seg { req: NOBODY, off: u64::from(cluster) << self.config.cluster_shift, len: 0 };
        let (step, waiters) = (Step::Waiting, Vec::new());
        // `zero`: it does not wait for space.
        let job = Job { kind, step, dest, place, slot: 0, piece, zero: true, at: 0, bounce: None, waiters };
        self.jobs.insert(cluster, job);
        self.advance(cluster, out);
    }

    /// Nothing is in flight on the cluster any more.
    pub(super) fn drained(&mut self, cluster: u32, out: &mut Vec<Action>) {
        let Some(job) = self.jobs.get_mut(&cluster) else { return };
        match job.kind {
            Kind::Drain => {
                self.let_go(cluster);
            }
            Kind::MergeDrain { place } => {
                job.kind = Kind::CopyUp { level: self.top, place };
                // Reads can go on, writes come back to wait.
                self.ready.extend(job.waiters.drain(..));
                self.advance(cluster, out);
            }
            _ => {}
        }
    }

    /// Copies that wait for space have all bounce buffers: zeroings that need one must not wait with them.
    pub(super) fn refuse_starved_zeroings(&mut self, out: &mut Vec<Action>) {
        let held = |op: &OpId| matches!(self.ops.get(op.0), Some(Op::Job { .. }));
        if !self.bounces.is_empty() || !self.parked.iter().any(held) {
            return;
        }
        let top = self.top;
        let starved = |c: &u32| self.jobs.get(c).is_some_and(|j| j.zero && j.dest == top);
        let clusters: Vec<u32> = self.bounce_wait.iter().copied().filter(starved).collect();
        self.bounce_wait.retain(|c| !clusters.contains(c));
        for cluster in clusters {
            self.job_failed(cluster, NO_SPACE, out);
        }
        let waiting: Vec<u32> = self.bounce_wait.iter().copied().collect();
        for cluster in waiting {
            self.refuse_zeroings(cluster, out);
        }
    }

    /// A write to the cluster waits for space: what waits until nothing is in flight there must not wait with it.
    pub(super) fn write_parked(&mut self, cluster: u32) {
        match self.jobs.get(&cluster).map(|j| j.kind) {
            Some(Kind::Drain) => {
                self.let_go(cluster);
            }
            Some(Kind::MergeDrain { .. }) => {
                if let Some(job) = self.let_go(cluster) {
                    self.merge_postponed(cluster, job.place);
                }
            }
            _ => {}
        }
    }

    /// Ends the job; what waited for it goes on, in the order in which it came.
    fn let_go(&mut self, cluster: u32) -> Option<Job> {
        let mut job = self.jobs.remove(&cluster)?;
        self.map.mark(cluster, Ent::HELD, false);
        self.ready.extend(job.waiters.drain(..));
        Some(job)
    }

    pub(super) fn wait_for_job(&mut self, cluster: u32, piece: Seg) {
        self.hold(piece.req);
        match self.jobs.get_mut(&cluster) {
            Some(job) => job.waiters.push(piece),
            None => self.ready.push_back(piece),
        }
    }

    /// The job waits for space: zeroings behind it must not.
    pub(super) fn refuse_zeroings(&mut self, cluster: u32, out: &mut Vec<Action>) {
        let Some(job) = self.jobs.get_mut(&cluster) else { return };
        let waiters = std::mem::take(&mut job.waiters);
        let (zeroings, others): (Vec<Seg>, Vec<Seg>) =
            waiters.into_iter().partition(|seg| self.kind(seg.req) == Some(RequestKind::Zero));
        if let Some(job) = self.jobs.get_mut(&cluster) {
            job.waiters = others;
        }
        for seg in zeroings {
            self.part_done(seg.req, Err(NO_SPACE), out);
        }
    }

    /// Reads see the old cluster while a new one is made, but wait behind a freeing.
    pub(super) fn job_blocks_reads(&self, cluster: u32) -> bool {
        self.jobs.get(&cluster).is_some_and(|j| matches!(j.kind, Kind::Drain | Kind::MergeDrain { .. }))
    }

    /// Begins the job's next operation.
    fn advance(&mut self, cluster: u32, out: &mut Vec<Action>) {
        let Some(job) = self.jobs.get_mut(&cluster) else { return };
        job.step = match job.kind {
            Kind::Drain | Kind::MergeDrain { .. } => return,
            Kind::Whole => Step::Writing,
            Kind::Fill => Step::Filling,
            Kind::CopyUp { .. } => {
                if job.bounce.is_none() {
                    job.bounce = self.bounces.pop();
                }
                if job.bounce.is_none() {
                    self.bounce_wait.push_back(cluster);
                    self.refuse_starved_zeroings(out);
                    return;
                }
                self.copy_chunk(cluster, out);
                return;
            }
        };
        self.job_op(cluster, out);
    }

    /// Bytes of the chunk that a copy is at.
    fn chunk_len(&self, job: &Job) -> u64 {
        (self.copy_len(job) - job.at).min(u64::from(self.config.bounce_bytes))
    }

    /// Bytes that a copy has to copy: a cluster, but a raw file ends with the device.
    fn copy_len(&self, job: &Job) -> u64 {
        let cluster = 1 << self.config.cluster_shift;
        match self.config.levels.get(usize::from(job.dest)) {
            Some(LevelConfig::Raw { .. }) => (self.config.device_bytes - self.file_off(job.place)).min(cluster),
            _ => cluster,
        }
    }

    /// The part of the piece that lies in the chunk: offset in the chunk, offset in the piece, length.
    fn overlap(&self, job: &Job) -> Option<(u64, u64, u64)> {
        let within = job.piece.off & ((1 << self.config.cluster_shift) - 1);
        let start = within.max(job.at);
        let end = (within + job.piece.len).min(job.at + self.chunk_len(job));
        (start < end).then(|| (start - job.at, start - within, end - start))
    }

    fn copy_chunk(&mut self, cluster: u32, out: &mut Vec<Action>) {
        let Some(job) = self.jobs.get(&cluster) else { return };
        let Kind::CopyUp { level, place } = job.kind else { return };
        let len = self.chunk_len(job);
        let covered = self.overlap(job).is_some_and(|(_, _, n)| n == len);
        let nothing = self.readable(level, self.file_off(place) + job.at) == 0;
        if covered || nothing {
            self.chunk_read(cluster, out);
        } else if let Some(job) = self.jobs.get_mut(&cluster) {
            job.step = Step::Reading;
            self.job_op(cluster, out);
        }
    }

    /// The old bytes of the chunk are in the bounce buffer: the new ones go over them, and all to the top.
    fn chunk_read(&mut self, cluster: u32, out: &mut Vec<Action>) {
        let Some(job) = self.jobs.get(&cluster) else { return };
        let (Kind::CopyUp { level, place }, Some(bounce)) = (job.kind, job.bounce) else { return };
        let len = self.chunk_len(job);
        let have = self.readable(level, self.file_off(place) + job.at).min(len);
        if have < len {
            out.push(Action::Overlay { bounce, at: have as u32, from: None, len: (len - have) as u32 });
        }
        if let Some((at, in_piece, n)) = self.overlap(job) {
            let base = self.reqs.get(&job.piece.req).map_or(0, |r| job.piece.off - r.offset);
            let from = (!job.zero).then_some((job.piece.req, base + in_piece));
            out.push(Action::Overlay { bounce, at: at as u32, from, len: n as u32 });
        }
        if let Some(job) = self.jobs.get_mut(&cluster) {
            job.step = Step::Writing;
            self.job_op(cluster, out);
        }
    }

    fn job_op(&mut self, cluster: u32, out: &mut Vec<Action>) {
        let op = self.start(Op::Job { cluster });
        self.job_again(cluster, op, out);
    }

    /// Asks for the operation of the job's step; also after it met ENOSPC.
    pub(super) fn job_again(&mut self, cluster: u32, op: OpId, out: &mut Vec<Action>) {
        let Some(job) = self.jobs.get(&cluster) else { return };
        let to = self.file_off(job.place);
        let within = job.piece.off & ((1 << self.config.cluster_shift) - 1);
        let base = self.reqs.get(&job.piece.req).map_or(0, |r| job.piece.off - r.offset);
        out.push(match (job.step, job.kind, job.bounce) {
            (Step::Reading, Kind::CopyUp { level, place }, Some(id)) => {
                let file_off = self.file_off(place) + job.at;
                let len = self.chunk_len(job).min(self.readable(level, file_off));
                Action::Read { op, level, file_off, len, to: Buf::Bounce { id, off: 0 } }
            }
            (Step::Writing, Kind::CopyUp { .. }, Some(id)) => {
                let from = Buf::Bounce { id, off: 0 };
                Action::Write { op, level: job.dest, file_off: to + job.at, len: self.chunk_len(job), from }
            }
            (Step::Filling, ..) => {
                Action::ZeroRange { op, level: self.top, file_off: to, len: 1 << self.config.cluster_shift }
            }
            _ => {
                let from = Buf::Request { req: job.piece.req, off: base };
                Action::Write { op, level: self.top, file_off: to + within, len: job.piece.len, from }
            }
        });
    }

    pub(super) fn job_step_done(&mut self, cluster: u32, result: Result<(), Errno>, out: &mut Vec<Action>) {
        if let Err(errno) = result {
            self.job_failed(cluster, errno, out);
            return;
        }
        let (chunk, all) = self.jobs.get(&cluster).map_or((0, 0), |j| (self.chunk_len(j), self.copy_len(j)));
        let Some(job) = self.jobs.get_mut(&cluster) else { return };
        match (job.kind, job.step) {
            (Kind::CopyUp { .. }, Step::Reading) => self.chunk_read(cluster, out),
            (Kind::CopyUp { .. }, _) => {
                job.at += chunk;
                if job.at < all && !breaks(Breach::HalfBuilt) {
                    self.copy_chunk(cluster, out);
                } else {
                    self.stats.copied_up += u64::from(job.dest == self.top);
                    self.job_complete(cluster, out);
                }
            }
            (Kind::Fill, Step::Filling) if !job.zero => {
                job.step = Step::Writing;
                self.job_op(cluster, out);
            }
            _ => self.job_complete(cluster, out),
        }
    }

    fn job_complete(&mut self, cluster: u32, out: &mut Vec<Action>) {
        let Some(job) = self.let_go(cluster) else { return };
        if job.dest == self.top {
            self.publish(cluster, job.place, true, Some(job.slot));
        } else {
            self.merge_copied(cluster, job.place, Ok(()), out);
        }
        self.give_bounce_back(job.bounce, out);
        self.part_done(job.piece.req, Ok(()), out);
    }

    fn job_failed(&mut self, cluster: u32, errno: Errno, out: &mut Vec<Action>) {
        let Some(job) = self.let_go(cluster) else { return };
        if job.dest == self.top {
            self.space.give(job.place);
            self.dirty.give_slot_back(job.slot);
        } else {
            self.merge_copied(cluster, job.place, Err(errno), out);
        }
        self.give_bounce_back(job.bounce, out);
        self.part_done(job.piece.req, Err(errno), out);
    }

    fn give_bounce_back(&mut self, bounce: Option<BounceId>, out: &mut Vec<Action>) {
        let Some(bounce) = bounce else { return };
        self.bounces.push(bounce);
        if let Some(next) = self.bounce_wait.pop_front() {
            self.advance(next, out);
        }
    }

    /// Kind of an unanswered request, for what must treat writes and zeroings apart.
    pub(super) fn is_write(&self, req: super::ReqId) -> bool {
        self.reqs.get(&req).is_some_and(|r| r.kind == RequestKind::Write)
    }
}

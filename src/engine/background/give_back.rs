//! Giving space back: clusters of the top move from the end of its file to free ones before it, and the file is cut.
//!
//! It goes in passes, each of four steps:
//!
//! 1. A flush cycle, so that what was unmapped before is free for use.
//! 2. As many clusters as are in use fit before a certain host cluster. What stands behind it moves to the free clusters
//!    before it: a cluster is copied under its lock, with nothing in flight on it; then its entry changes like that of
//!    any other write, and its old host cluster is free when the new entry is durable.
//! 3. A flush cycle that makes those entries durable.
//! 4. The file is cut behind the last host cluster that memory or the durable BAT names. Until the cut has ended no
//!    cluster behind it is given out, and the file does not grow.
//!
//! Requests may take the free clusters first; then another pass follows.

use super::super::api::{Action, Errno, GiveBackConfig, GivenBack, Shared};
use super::super::breach::{Breach, breaks};
use super::super::map::MapEntry;
use super::super::{BUSY, Engine, INVALID, IO, Op};
use super::{Background, BackgroundState, Work};
use crate::format::bat;

/// Clusters looked at in one step: a step stays short whatever the size of the disk.
const STEP: u32 = 4096;
/// Passes after which the work ends though requests have taken free clusters again and again.
const PASSES: u32 = 8;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// A flush cycle of this number or a later one has to end: then free clusters are known.
    Settle(u64),
    Move,
    /// As `Settle`: then the entries of moved clusters are durable.
    Publish(u64),
    /// The file can be cut when it is not growing.
    Cut,
    Cutting,
}

/// The work; see the module.
pub(in super::super) struct GiveBack {
    phase: Phase,
    config: GiveBackConfig,
    /// Copies that may begin before the next tick.
    budget: u32,
    /// Host clusters from here on are to be emptied.
    from: u32,
    cursor: u64,
    passes: u32,
    /// Clusters that this pass has moved, and those that it passed over since they were locked.
    moved: u32,
    missed: u32,
    /// Clusters that will have been moved when this pass ends.
    aim: u64,
    /// Host clusters that the file had at the begin.
    before: u32,
}

impl GiveBack {
    /// Next cluster that is looked at.
    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    /// How far it is, as a share of the device's clusters.
    pub fn seen(&self, copied: u64, clusters: u64) -> u64 {
        match self.phase {
            Phase::Settle(_) if self.passes == 0 => 0,
            Phase::Settle(_) | Phase::Move if self.aim > 0 => {
                (u128::from(clusters) * u128::from(copied) / u128::from(self.aim)).min(u128::from(clusters)) as u64
            }
            _ => clusters,
        }
    }

    pub fn refill(&mut self, busy: bool) {
        self.budget = self.config.budget(busy);
    }
}

impl GiveBackConfig {
    fn budget(&self, busy: bool) -> u32 {
        let most = |limit: u32| if limit == 0 { u32::MAX } else { limit };
        most(self.per_tick).min(if busy { most(self.per_busy_tick) } else { u32::MAX })
    }
}

enum Visit {
    NotYet,
    Passed,
}

impl<S: Shared> Engine<S> {
    /// Begins to give space back, unless other background work is under way.
    pub(in super::super) fn begin_give_back(&mut self, config: GiveBackConfig, out: &mut Vec<Action>) {
        let refusal = match &self.background {
            _ if self.raw_top || !self.config.writable || self.closing => Some(INVALID),
            _ if self.cycle.failed => Some(IO),
            _ if self.is_tracking() => Some(BUSY),
            Some(b) if !matches!(b.work, Work::GiveBack(_)) || b.is_running() => Some(BUSY),
            _ => None,
        };
        if let Some(errno) = refusal {
            out.push(Action::GaveBack { result: Err(errno) });
            return;
        }
        // Copies of one that was cancelled may still be in flight.
        let copying = self.background.as_ref().map_or(0, |b| b.copying);
        let busy = self.background.as_ref().map_or(0, |b| b.busy);
        self.background = Some(Background {
            state: BackgroundState::Running,
            paused: false,
            busy,
            requests_seen: self.requests_that_came(),
            copied: 0,
            copying,
            work: Work::GiveBack(GiveBack {
                phase: Phase::Settle(self.cycle.next()),
                config,
                budget: config.budget(true),
                from: 0,
                cursor: 0,
                passes: 0,
                moved: 0,
                missed: 0,
                aim: 0,
                before: self.space.file_end(),
            }),
            target: None,
        });
    }

    fn give_back(&mut self) -> Option<&mut GiveBack> {
        match self.background.as_mut().filter(|b| b.is_running()).map(|b| &mut b.work) {
            Some(Work::GiveBack(work)) => Some(work),
            _ => None,
        }
    }

    /// Freed clusters are used before those at the end.
    pub(in super::super) fn gives_back(&self) -> bool {
        self.background.as_ref().is_some_and(|b| b.is_running() && matches!(b.work, Work::GiveBack(_)))
    }

    /// The work waits for a flush cycle.
    pub(in super::super) fn give_back_wants_cycle(&mut self) -> bool {
        self.give_back().is_some_and(|w| matches!(w.phase, Phase::Settle(_) | Phase::Publish(_)))
    }

    pub(super) fn advance_give_back(&mut self, out: &mut Vec<Action>) {
        if self.cycle.failed {
            self.abort_background(IO, out);
            return;
        }
        loop {
            let Some(phase) = self.give_back().map(|w| w.phase) else { return };
            let next = match phase {
                Phase::Settle(cycle) | Phase::Publish(cycle) if !self.has_cycled(cycle) => return,
                Phase::Settle(_) => self.begin_pass(),
                Phase::Move => match self.move_clusters(out) {
                    true if breaks(Breach::CutUnpublished) => Phase::Cut,
                    true => Phase::Publish(self.cycle.next()),
                    false => return,
                },
                Phase::Publish(_) => Phase::Cut,
                Phase::Cut if self.space.growing.is_some() || self.space.cutting => return,
                Phase::Cut => {
                    self.begin_cut(out);
                    Phase::Cutting
                }
                Phase::Cutting if self.space.cutting => return,
                Phase::Cutting => return self.end_pass(out),
            };
            if let Some(work) = self.give_back() {
                work.phase = next;
            }
        }
    }

    fn begin_pass(&mut self) -> Phase {
        let (from, end) = (self.space.packed_end(), self.space.end());
        let left = u64::from(self.space.free_before(from));
        let copied = self.background.as_ref().map_or(0, |b| b.copied);
        let Some(work) = self.give_back() else { return Phase::Cut };
        work.passes += 1;
        (work.from, work.cursor, work.moved, work.missed) = (from, 0, 0, 0);
        work.aim = copied + left;
        if from >= end { Phase::Cut } else { Phase::Move }
    }

    /// Begins copies as far as that is allowed now. True: the pass has moved what it could.
    fn move_clusters(&mut self, out: &mut Vec<Action>) -> bool {
        let end = self.config.device_bytes.div_ceil(1 << self.config.cluster_shift);
        for _ in 0..STEP {
            let idle = usize::from(self.config.bounces).saturating_sub(1);
            let Some(b) = self.background.as_ref() else { return false };
            let (copying, may_copy) = (b.copying, b.may_copy(idle));
            let Some(work) = self.give_back() else { return false };
            let (cluster, from, budget) = (work.cursor, work.from, work.budget);
            if cluster >= end || !self.space.has_free_before(from) {
                return copying == 0;
            }
            if !may_copy || budget == 0 {
                return false;
            }
            match self.move_one(cluster as u32, from, out) {
                Visit::NotYet => return false,
                Visit::Passed => self.give_back().into_iter().for_each(|w| w.cursor += 1),
            }
        }
        // The remaining clusters follow in the next step.
        self.more_background = true;
        false
    }

    fn move_one(&mut self, cluster: u32, from: u32, out: &mut Vec<Action>) -> Visit {
        let page = bat::page_of(cluster);
        if !self.map.is_loaded(page) {
            if self.map.loading(page).is_none() {
                self.load(page, out);
            }
            if !self.map.is_loaded(page) {
                return Visit::NotYet;
            }
        }
        let Some(entry) = self.map.get(cluster) else { return Visit::NotYet };
        let Some((_, old)) = entry.location().filter(|(level, host)| *level == self.top && *host >= from) else {
            return Visit::Passed;
        };
        if entry.is(MapEntry::LOCKED) || self.is_waiting_for_space(cluster) {
            self.give_back().into_iter().for_each(|w| w.missed += 1);
            return Visit::Passed;
        }
        // Reads of the cluster wait for its copy, which must not wait for a buffer.
        if !self.pending.has_free_slot() || !self.has_bounce() {
            return Visit::NotYet;
        }
        let Some(host_cluster) = self.space.take_below(from) else { return Visit::NotYet };
        let Some(slot) = self.pending.take_slot() else {
            self.space.give(host_cluster);
            return Visit::NotYet;
        };
        if let Some(b) = &mut self.background {
            b.copying += 1;
        }
        self.give_back().into_iter().for_each(|w| w.budget -= 1);
        let busy = entry.in_flight() > 0 && !breaks(Breach::RelocateUndrained);
        self.begin_relocation(cluster, old, host_cluster, slot, busy, out);
        Visit::Passed
    }

    /// The cluster has been copied to its new host cluster, or not.
    pub(in super::super) fn relocated(
        &mut self,
        cluster: u32,
        host_cluster: u32,
        slot: u32,
        result: Result<(), Errno>,
        out: &mut Vec<Action>,
    ) {
        if let Some(b) = &mut self.background {
            b.copying -= 1;
        }
        let old = self.map.get(cluster).and_then(MapEntry::location);
        match (result, old) {
            (Ok(()), Some((_, old))) => {
                if let Ok(freed) = self.pending.set(cluster, host_cluster, true, old, Some(slot)) {
                    self.map.set_location(cluster, Some((self.top, host_cluster)));
                    self.map.mark(cluster, MapEntry::PENDING, true);
                    if let Some(free) = freed {
                        self.space.give(free);
                    }
                }
                self.give_back().into_iter().for_each(|w| w.moved += 1);
                self.count_copied(1);
            }
            (result, _) => {
                self.space.give(host_cluster);
                self.pending.give_slot_back(slot);
                if let Err(errno) = result {
                    self.abort_background(errno, out);
                }
            }
        }
    }

    /// The cluster cannot be moved in this pass.
    pub(in super::super) fn relocation_postponed(&mut self, host_cluster: u32, slot: u32) {
        if let Some(b) = &mut self.background {
            b.copying -= 1;
        }
        self.space.give(host_cluster);
        self.pending.give_slot_back(slot);
        self.give_back().into_iter().for_each(|w| w.missed += 1);
    }

    fn begin_cut(&mut self, out: &mut Vec<Action>) {
        let early = self.give_back().map(|w| w.from).filter(|_| breaks(Breach::CutUnpublished));
        let cut = self.space.begin_cut(early);
        let op = self.start(Op::Cut { old_end: cut.end });
        out.push(Action::Truncate { op, level: self.top, len: self.file_off(cut.start) });
    }

    /// The file has been cut, or is as long as before.
    pub(in super::super) fn cut_done(&mut self, old_end: u32, result: Result<(), Errno>, out: &mut Vec<Action>) {
        match result {
            Err(errno) if !breaks(Breach::SwallowCut) => {
                self.space.not_cut(old_end);
                if self.gives_back() {
                    self.abort_background(errno, out);
                }
            }
            _ => self.space.cutting = false,
        }
        self.ready.extend(std::mem::take(&mut self.space.waiters));
    }

    fn end_pass(&mut self, out: &mut Vec<Action>) {
        let (end, packed) = (self.space.end(), self.space.packed_end());
        let next = Phase::Settle(self.cycle.next());
        let shift = self.config.cluster_shift;
        let after = u64::from(self.space.file_end()) << shift;
        let Some(b) = self.background.as_mut().filter(|b| b.is_running()) else { return };
        let Work::GiveBack(work) = &mut b.work else { return };
        if packed < end && work.passes < PASSES && work.moved + work.missed > 0 {
            work.phase = next;
            self.more_background = true;
            return;
        }
        let given = GivenBack { moved: b.copied, before: u64::from(work.before) << shift, after };
        b.state = BackgroundState::Done;
        out.push(Action::GaveBack { result: Ok(given) });
    }
}

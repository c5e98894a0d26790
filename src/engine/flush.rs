//! Flush cycles: sync data, write the changed BAT pages, sync; with no changed page, one sync.
//!
//! A sync or BAT write that finds no space stays a step of its cycle and is repeated at each tick: nothing is published
//! or answered before it has succeeded, and the pages of the cycle keep their content. Flushes wait meanwhile. Where
//! they may not (the limit is over, the device is being stopped) they fail with ENOSPC, which promises nothing; the
//! cycle still goes on, so that a later flush can succeed. Only closing ends it: then the image stays marked.

use super::api::{Action, BAT_PAGE, Errno, LevelConfig, OpId, ReqId, RequestKind, Shared, SyncState};
use super::breach::{Breach, breaks};
use super::map::MapEntry;
use super::{Engine, IO, NO_SPACE, Op};
use crate::format::bat::{self, clusters_of, index_of, page_of};

/// BAT pages written at the same time.
const PAGES_AT_ONCE: usize = 32;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Idle,
    /// Pages of the map with changes have to be read first (after a takeover).
    Loading,
    DataSync,
    Pages,
    FinalSync,
}

/// The running cycle and the flushes that wait for the next one.
pub struct FlushCycle {
    phase: Phase,
    pub failed: bool,
    /// Its last sync or BAT write found no space.
    pub starved: bool,
    /// Flushes that arrived before the cycle began.
    joined: Vec<ReqId>,
    waiting: Vec<ReqId>,
    /// Clusters whose changes the cycle writes.
    going: Vec<u32>,
    /// BAT pages still to be written, descending.
    pages: Vec<u32>,
    in_flight: usize,
    ticks: u32,
    /// A cycle that began after the last request was answered, while closing, has ended.
    final_done: bool,
    final_running: bool,
    /// Cycles that have begun.
    begun: u64,
}

impl FlushCycle {
    pub fn is_running(&self) -> bool {
        self.phase != Phase::Idle
    }

    /// It, or the next one, can end well without more space.
    pub fn is_hopeful(&self) -> bool {
        !self.failed && !self.starved
    }

    pub fn new(failed: bool) -> FlushCycle {
        FlushCycle {
            phase: Phase::Idle,
            failed,
            starved: false,
            joined: Vec::new(),
            waiting: Vec::new(),
            going: Vec::new(),
            pages: Vec::new(),
            in_flight: 0,
            ticks: 0,
            final_done: false,
            final_running: false,
            begun: 0,
        }
    }

    /// Number of the first cycle that begins after now.
    pub(super) fn next(&self) -> u64 {
        self.begun + 1
    }

    /// A tick has passed with or without changes.
    pub fn age(&mut self, changed: bool) {
        self.ticks = if changed { self.ticks + 1 } else { 0 };
    }

    pub(super) fn flushes(&self) -> usize {
        self.joined.len() + self.waiting.len()
    }
}

impl<S: Shared> Engine<S> {
    pub(super) fn accept_flush(&mut self, id: ReqId, out: &mut Vec<Action>) {
        if self.cycle.failed {
            out.push(Action::Reply { req: id, result: Err(IO) });
        } else if !self.config.writable {
            out.push(Action::Reply { req: id, result: Ok(()) });
        } else if breaks(Breach::JoinRunning) && !matches!(self.cycle.phase, Phase::Idle | Phase::Loading) {
            self.cycle.joined.push(id);
        } else {
            self.cycle.waiting.push(id);
        }
    }

    pub(super) fn advance_cycle(&mut self, out: &mut Vec<Action>) {
        if self.cycle.failed {
            self.fail_waiting(IO, out);
            return;
        }
        if !self.config.writable {
            return;
        }
        if self.cycle.starved {
            self.refuse_zeroings_without_slot(out);
        }
        let begin = match self.cycle.phase {
            Phase::Idle => self.wants_cycle(),
            Phase::Loading => true,
            _ => false,
        };
        if begin {
            self.begin_cycle(out);
        }
    }

    fn wants_cycle(&mut self) -> bool {
        let pressed = self.pending.is_tight() || !self.slot_wait.is_empty() || !self.space.waiters.is_empty();
        !self.cycle.waiting.is_empty()
            || self.cycle.ticks >= self.config.bat_age && self.pending.any_can_go()
            || pressed && self.pending.any_can_go()
            || self.pending.any_can_go() && self.give_back_wants_cycle()
            || self.wants_final()
    }

    /// While closing: all requests are answered, but not all changes are durable.
    fn wants_final(&mut self) -> bool {
        if !self.closing || self.closed || !self.is_quiet() {
            return false;
        }
        self.pending.len() > 0 || !self.cycle.final_done
    }

    /// No request but flushes, no cluster operation, nothing growing.
    pub(super) fn is_quiet(&self) -> bool {
        self.reqs.is_empty() && self.cluster_ops.is_empty() && self.ready.is_empty() && self.space.growing.is_none()
    }

    fn begin_cycle(&mut self, out: &mut Vec<Action>) {
        let mut pages: Vec<u32> =
            self.pending.iter().filter(|(_, change)| change.can_go()).map(|(cluster, _)| page_of(cluster)).collect();
        pages.dedup();
        let missing: Vec<u32> = pages.iter().copied().filter(|&p| !self.map.is_loaded(p)).collect();
        if !missing.is_empty() {
            self.cycle.phase = Phase::Loading;
            for page in missing {
                if self.map.loading(page).is_none() {
                    self.load(page, out);
                }
            }
            return;
        }
        pages.reverse();
        self.cycle.pages = pages;
        self.cycle.joined = std::mem::take(&mut self.cycle.waiting);
        self.cycle.going = self.pending.start();
        self.cycle.phase = Phase::DataSync;
        self.cycle.begun += 1;
        self.cycle.ticks = 0;
        self.cycle.final_running = self.closing && self.is_quiet();
        if !breaks(Breach::NoSyncRecord) {
            self.pending.shared.set_sync_state(SyncState::Running);
        }
        if breaks(Breach::SkipDataSync) && !self.cycle.pages.is_empty() {
            self.sync_done(Ok(()), out);
            return;
        }
        let op = self.start(Op::Sync);
        out.push(Action::Sync { op, level: self.top });
    }

    /// A page with changes cannot be read: they can never become durable.
    pub(super) fn cycle_page_failed(&mut self, page: u32, out: &mut Vec<Action>) {
        let needed = self.pending.in_range(clusters_of(page)).next().is_some();
        if self.cycle.phase == Phase::Loading && needed {
            self.fail_cycle(out);
        }
    }

    /// The cycle of this number has ended, or there was nothing to do for one.
    pub(super) fn has_cycled(&self, number: u64) -> bool {
        let idle = matches!(self.cycle.phase, Phase::Idle | Phase::Loading);
        self.cycle.begun > number || idle && (self.cycle.begun == number || !self.pending.any_can_go())
    }

    pub(super) fn sync_done(&mut self, result: Result<(), Errno>, out: &mut Vec<Action>) {
        self.cycle.starved = false;
        match (result, self.cycle.phase) {
            (Err(_), _) if !breaks(Breach::SwallowSync) => self.fail_cycle(out),
            (_, Phase::DataSync) if !self.cycle.pages.is_empty() => {
                self.cycle.phase = Phase::Pages;
                self.write_pages(out);
            }
            _ => self.finish_cycle(out),
        }
    }

    fn write_pages(&mut self, out: &mut Vec<Action>) {
        while self.cycle.in_flight < PAGES_AT_ONCE {
            let Some(page) = self.cycle.pages.pop() else { return };
            self.cycle.in_flight += 1;
            let data = self.page_image(page);
            let op = self.start(Op::BatWrite { page });
            out.push(Action::WriteBat { op, level: self.top, page, data });
        }
    }

    /// A sync or BAT write that found no space waits for the next tick. False: it fails, because the engine is closing.
    pub(super) fn defer_flush(&mut self, op: OpId, out: &mut Vec<Action>) -> bool {
        let waits = self.flush_may_wait();
        if self.cycle.failed || self.closing && !waits || breaks(Breach::MetadataSpaceIsFinal) {
            return false;
        }
        if breaks(Breach::MetadataSpaceIsSuccess) {
            self.done(op, Ok(()), out);
            return true;
        }
        self.cycle.starved = true;
        self.waiting_for_space.push(op);
        if !waits || breaks(Breach::FlushDoesNotWait) {
            self.fail_waiting(NO_SPACE, out);
        }
        true
    }

    /// Emits the action of a sync or BAT write once more. The page has the same content: its changes are pending until
    /// the cycle ends, and what it writes of them was fixed when the cycle began.
    pub(super) fn repeat_flush_op(&mut self, op: OpId, out: &mut Vec<Action>) {
        match self.ops.get(op.0) {
            Some(&Op::BatWrite { page }) => {
                let data = self.page_image(page);
                out.push(Action::WriteBat { op, level: self.top, page, data });
            }
            Some(Op::Sync) => out.push(Action::Sync { op, level: self.top }),
            _ => {}
        }
    }

    /// Zeroings do not wait for space, and so not for a slot that becomes free when a cycle finds space.
    fn refuse_zeroings_without_slot(&mut self, out: &mut Vec<Action>) {
        if breaks(Breach::HoldZeroings) {
            return;
        }
        for fragment in std::mem::take(&mut self.slot_wait) {
            match self.kind(fragment.req) {
                Some(RequestKind::Zero) => self.part_done(fragment.req, Err(NO_SPACE), out),
                _ => self.slot_wait.push(fragment),
            }
        }
    }

    /// A BAT page with the changes of this cycle; every other entry has its last durable value.
    fn page_image(&mut self, page: u32) -> Box<[u8; BAT_PAGE]> {
        let mut data = Box::new([0u8; BAT_PAGE]);
        if page == 0 {
            data[..64].copy_from_slice(&self.config.header);
        }
        let Some(&LevelConfig::Ploop { v1, clusters, .. }) = self.config.levels.last() else { return data };
        let unit = bat::Unit::of(v1, self.config.cluster_shift);
        let range = clusters_of(page);
        for c in range.start..range.end.min(u64::from(clusters)) {
            let cluster = c as u32;
            let Some(entry) = self.map.get(cluster) else { continue };
            let host_cluster = match self.pending.get(cluster) {
                Some(change) if entry.is(MapEntry::PENDING) => {
                    if breaks(Breach::LateContent) {
                        change.current
                    } else {
                        change.writing.unwrap_or(change.durable)
                    }
                }
                _ => self.durable_host_cluster(entry),
            };
            bat::store(&mut data[..], index_of(cluster), unit.entry(host_cluster));
        }
        data
    }

    pub(super) fn bat_written(&mut self, result: Result<(), Errno>, out: &mut Vec<Action>) {
        self.cycle.in_flight = self.cycle.in_flight.saturating_sub(1);
        if self.cycle.failed {
            return;
        }
        if result.is_err() && !breaks(Breach::SwallowBatWrite) {
            self.fail_cycle(out);
            return;
        }
        self.cycle.starved = self.waiting_for_space.iter().any(|op| self.is_bat_write(*op));
        self.write_pages(out);
        if self.cycle.in_flight == 0 && breaks(Breach::SkipFinalSync) {
            self.finish_cycle(out);
        } else if self.cycle.in_flight == 0 {
            self.cycle.phase = Phase::FinalSync;
            let op = self.start(Op::Sync);
            out.push(Action::Sync { op, level: self.top });
        }
    }

    fn finish_cycle(&mut self, out: &mut Vec<Action>) {
        self.pending.shared.set_sync_state(SyncState::Idle);
        let mut freed_any = false;
        for cluster in std::mem::take(&mut self.cycle.going) {
            let (over, freed) = self.pending.made_durable(cluster);
            if over {
                self.map.mark(cluster, MapEntry::PENDING, false);
            }
            if let Some(host_cluster) = freed {
                self.space.give(host_cluster);
                freed_any = true;
            }
        }
        for req in std::mem::take(&mut self.cycle.joined) {
            out.push(Action::Reply { req, result: Ok(()) });
        }
        self.cycle.phase = Phase::Idle;
        self.cycle.final_done |= std::mem::take(&mut self.cycle.final_running);
        self.ready.extend(std::mem::take(&mut self.slot_wait));
        if freed_any {
            self.ready.extend(std::mem::take(&mut self.space.waiters));
        }
    }

    /// A sync or BAT write failed, so that its effect is unknown: no later success may hide that.
    fn fail_cycle(&mut self, out: &mut Vec<Action>) {
        self.cycle.failed = !breaks(Breach::ForgetFailure);
        self.cycle.phase = Phase::Idle;
        self.cycle.pages.clear();
        self.cycle.starved = false;
        for op in std::mem::take(&mut self.waiting_for_space) {
            match self.is_bat_write(op) {
                true => drop(self.ops.remove(op.0)),
                false => self.waiting_for_space.push(op),
            }
        }
        self.pending.shared.set_sync_state(SyncState::Failed);
        self.fail_waiting(IO, out);
    }

    fn is_bat_write(&self, op: OpId) -> bool {
        matches!(self.ops.get(op.0), Some(Op::BatWrite { .. }))
    }

    /// Flushes, and changes that wait for what they make free, fail.
    fn fail_waiting(&mut self, errno: Errno, out: &mut Vec<Action>) {
        let joined = std::mem::take(&mut self.cycle.joined);
        for req in joined.into_iter().chain(std::mem::take(&mut self.cycle.waiting)) {
            out.push(Action::Reply { req, result: Err(errno) });
        }
        for fragment in std::mem::take(&mut self.slot_wait) {
            self.part_done(fragment.req, Err(errno), out);
        }
    }

    pub(super) fn advance_close(&mut self, out: &mut Vec<Action>) {
        if !self.closing || self.closed || !self.is_quiet() || self.cycle.flushes() > 0 || !self.background_is_settled()
        {
            return;
        }
        if !self.ops.is_empty() {
            return;
        }
        let result = if self.cycle.failed && !breaks(Breach::CloseAsClean) {
            Err(IO)
        } else if !self.config.writable || self.cycle.failed || self.pending.len() == 0 && self.cycle.final_done {
            Ok(())
        } else {
            return;
        };
        self.closed = true;
        out.push(Action::Closed { result });
    }
}

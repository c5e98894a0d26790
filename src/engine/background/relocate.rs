//! Moving clusters of the top from the end of its file to free ones before it, so that the end can be cut.
//!
//! A cluster is copied under its lock, with nothing in flight on it; then its entry changes like that of any other write,
//! and its old host cluster is free when the new entry is durable.

use super::super::api::{Action, Errno, Shared};
use super::super::breach::{Breach, breaks};
use super::super::map::MapEntry;
use super::super::{Engine, INVALID, NO_SPACE};
use super::Work;
use crate::format::bat;

/// Clusters looked at in one step: a step stays short whatever the size of the disk.
const STEP: u32 = 4096;

/// The relocation; see the module.
pub(in super::super) struct Relocate {
    /// Host clusters from here on are to be emptied.
    from: u32,
    cursor: u64,
    /// Some cluster behind the cursor has to be looked at again.
    revisit: bool,
}

impl Relocate {
    pub fn new(from: u32) -> Relocate {
        Relocate { from, cursor: 0, revisit: false }
    }

    pub fn cursor(&self) -> u64 {
        self.cursor
    }
}

enum Visit {
    NotYet,
    Passed,
}

impl<S: Shared> Engine<S> {
    fn relocation(&mut self) -> Option<&mut Relocate> {
        match self.background.as_mut().filter(|b| b.is_running()).map(|b| &mut b.work) {
            Some(Work::Relocate(relocate)) => Some(relocate),
            _ => None,
        }
    }

    pub(super) fn advance_relocate(&mut self, out: &mut Vec<Action>) {
        if self.raw_top || !self.config.writable {
            self.abort_background(INVALID, out);
            return;
        }
        let end = self.config.device_bytes.div_ceil(1 << self.config.cluster_shift);
        for _ in 0..STEP {
            let idle = usize::from(self.config.bounces).saturating_sub(1);
            let Some(b) = self.background.as_ref().filter(|b| b.may_copy(idle)) else { return };
            let copying = b.copying;
            let Some(relocate) = self.relocation() else { return };
            if relocate.cursor >= end {
                if copying > 0 {
                    return;
                }
                if !std::mem::take(&mut relocate.revisit) {
                    self.background_done(out);
                    return;
                }
                relocate.cursor = 0;
            }
            let (cluster, from) = (relocate.cursor as u32, relocate.from);
            match self.relocate_one(cluster, from, out) {
                Visit::NotYet => return,
                Visit::Passed => self.relocation().into_iter().for_each(|r| r.cursor += 1),
            }
        }
        // The remaining clusters follow in the next step.
        self.more_background = true;
    }

    fn relocate_one(&mut self, cluster: u32, from: u32, out: &mut Vec<Action>) -> Visit {
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
        if entry.is(MapEntry::LOCKED) || self.is_waiting_for_space(cluster) || !self.pending.has_free_slot() {
            return Visit::NotYet;
        }
        let Some(host_cluster) = self.space.take_below(from) else {
            self.abort_background(NO_SPACE, out);
            return Visit::NotYet;
        };
        let Some(slot) = self.pending.take_slot() else {
            self.space.give(host_cluster);
            return Visit::NotYet;
        };
        if let Some(b) = &mut self.background {
            b.copying += 1;
        }
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

    /// The cluster has to be moved later.
    pub(in super::super) fn relocation_postponed(&mut self, host_cluster: u32, slot: u32) {
        if let Some(b) = &mut self.background {
            b.copying -= 1;
        }
        self.space.give(host_cluster);
        self.pending.give_slot_back(slot);
        self.relocation().into_iter().for_each(|r| r.revisit = true);
    }

    /// A cluster was allocated in the top.
    pub(in super::super) fn relocation_sees_new(&mut self, cluster: u32, host_cluster: u32) {
        if let Some(relocate) = self.relocation()
            && host_cluster >= relocate.from
            && u64::from(cluster) < relocate.cursor
        {
            relocate.revisit = true;
        }
    }
}

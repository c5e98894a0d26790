//! Pending BAT updates: changes of the top's BAT that are not durable yet.
//!
//! Each is in the shared table, too, so that the worker that takes over has it. A host cluster may be reused only
//! when neither the durable BAT nor a BAT page on its way to the disk can name it.

use std::collections::BTreeMap;
use std::ops::Range;

use super::api::{Carried, Shared};
use super::breach::{Breach, breaks};

/// The entry of one cluster: its new value, and the values that may be on disk. Values are host clusters, 0: none.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    pub current: u32,
    pub durable: u32,
    /// Value in a BAT page of the running cycle.
    pub writing: Option<u32>,
    /// The write to the host cluster `current` has ended.
    pub ready: bool,
    pub slot: u32,
}

impl Change {
    /// What a cycle that starts now may write: a host cluster only once its data is written. A change that is not ready
    /// is the first of a cluster that was not mapped, so that 0 is written for it: an older entry must not stay on
    /// disk.
    fn writable(&self) -> u32 {
        if self.ready || breaks(Breach::EntryWithoutData) { self.current } else { 0 }
    }

    /// A cycle that starts now can make this change or a part of it durable.
    pub fn can_go(&self) -> bool {
        self.writing.is_none() && self.writable() != self.durable
    }

    fn may_be_on_disk(&self, host_cluster: u32) -> bool {
        host_cluster == self.durable || self.writing == Some(host_cluster) && !breaks(Breach::ReuseWhileWritten)
    }
}

/// All changes, and the free slots of the shared table.
pub struct PendingUpdates<S: Shared> {
    changes: BTreeMap<u32, Change>,
    free_slots: Vec<u32>,
    total: usize,
    pub shared: S,
}

fn pack(cluster: u32, host_cluster: u32) -> u64 {
    u64::from(cluster) << 32 | u64::from(host_cluster)
}

impl<S: Shared> PendingUpdates<S> {
    /// Takes over the updates that a worker left when it exited, and clears every other slot.
    pub fn new(shared: S, carried: &[Carried]) -> Self {
        let mut changes = BTreeMap::new();
        let mut taken = vec![false; shared.slots()];
        for c in carried {
            if c.host_cluster == c.durable || c.slot >= taken.len() {
                continue;
            }
            taken[c.slot] = true;
            let slot = c.slot as u32;
            let change = Change { current: c.host_cluster, durable: c.durable, writing: None, ready: true, slot };
            changes.insert(c.cluster, change);
        }
        let free_slots: Vec<u32> = (0..taken.len()).rev().filter(|&i| !taken[i]).map(|i| i as u32).collect();
        for &slot in &free_slots {
            if shared.load(slot as usize) != S::FREE {
                shared.store(slot as usize, S::FREE);
            }
        }
        PendingUpdates { changes, free_slots, total: taken.len(), shared }
    }

    pub fn len(&self) -> usize {
        self.changes.len()
    }

    pub fn get(&self, cluster: u32) -> Option<&Change> {
        self.changes.get(&cluster)
    }

    pub fn in_range(&self, clusters: Range<u64>) -> impl Iterator<Item = (u32, &Change)> {
        let end = clusters.end.min(u64::from(u32::MAX)) as u32;
        self.changes.range(clusters.start as u32..end).map(|(c, d)| (*c, d))
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &Change)> {
        self.changes.iter().map(|(c, d)| (*c, d))
    }

    /// Less than half of the table is free: time for a cycle.
    pub fn is_tight(&self) -> bool {
        self.free_slots.len() * 2 < self.total
    }

    /// A cycle that starts now would make something durable.
    pub fn any_can_go(&self) -> bool {
        self.changes.values().any(Change::can_go)
    }

    /// A slot for a change that is to come, `None` if the table is full.
    pub fn take_slot(&mut self) -> Option<u32> {
        self.free_slots.pop()
    }

    pub fn give_slot_back(&mut self, slot: u32) {
        self.free_slots.push(slot);
    }

    pub fn has_free_slot(&self) -> bool {
        !self.free_slots.is_empty()
    }

    pub fn has_slot_for(&self, cluster: u32) -> bool {
        !self.free_slots.is_empty() || self.changes.contains_key(&cluster)
    }

    /// The entry of `cluster` becomes `host_cluster`. `durable`: its value on disk if there is no change yet. `slot`:
    /// one taken before, else one is taken here; see [`has_slot_for`](Self::has_slot_for). Returns a host cluster that
    /// neither memory nor disk names any more.
    pub fn set(
        &mut self,
        cluster: u32,
        host_cluster: u32,
        ready: bool,
        durable: u32,
        slot: Option<u32>,
    ) -> Result<Option<u32>, TableFull> {
        if let Some(change) = self.changes.get_mut(&cluster) {
            if let Some(spare) = slot {
                self.free_slots.push(spare);
            }
            let old = std::mem::replace(&mut change.current, host_cluster);
            change.ready = ready;
            if !breaks(Breach::SlotNotStored) {
                self.shared.store(change.slot as usize, pack(cluster, host_cluster));
            }
            return Ok((old != 0 && old != host_cluster && !change.may_be_on_disk(old)).then_some(old));
        }
        let slot = slot.or_else(|| self.free_slots.pop()).ok_or(TableFull)?;
        self.shared.store(slot as usize, pack(cluster, host_cluster));
        self.changes.insert(cluster, Change { current: host_cluster, durable, writing: None, ready, slot });
        Ok((durable != 0 && breaks(Breach::ReuseBeforeClear)).then_some(durable))
    }

    /// A write to the cluster's host cluster has ended.
    pub fn set_ready(&mut self, cluster: u32) {
        if let Some(change) = self.changes.get_mut(&cluster) {
            change.ready = true;
        }
    }

    /// The changes that a cycle which starts now writes; each is marked as being written.
    pub fn start(&mut self) -> Vec<u32> {
        let mut going = Vec::new();
        for (cluster, change) in &mut self.changes {
            if change.can_go() {
                change.writing = Some(change.writable());
                going.push(*cluster);
                if breaks(Breach::SlotFreedEarly) {
                    self.shared.store(change.slot as usize, S::FREE);
                }
            }
        }
        going
    }

    /// The cycle made the cluster's written value durable. Returns whether the change is over, and a host
    /// cluster that is free now.
    pub fn made_durable(&mut self, cluster: u32) -> (bool, Option<u32>) {
        let Some(change) = self.changes.get_mut(&cluster) else { return (false, None) };
        let Some(written) = change.writing.take() else { return (false, None) };
        let old = std::mem::replace(&mut change.durable, written);
        let freed = (old != 0 && old != written && old != change.current).then_some(old);
        let freed = freed.filter(|_| !breaks(Breach::ReuseBeforeClear));
        let over = change.current == change.durable;
        if over {
            self.forget(cluster);
        }
        (over, freed)
    }

    /// Drops a change whose current value is the durable one, and is in no page on its way to the disk.
    pub fn forget(&mut self, cluster: u32) {
        if let Some(change) = self.changes.remove(&cluster) {
            self.shared.store(change.slot as usize, S::FREE);
            self.free_slots.push(change.slot);
        }
    }
}

/// The shared table has no free slot.
#[derive(Debug)]
pub struct TableFull;

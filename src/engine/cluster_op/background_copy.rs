//! Cluster operations of background work: a cluster is copied to another host cluster, of the top or of a merge's target.

use super::{ClusterOp, Kind, NO_REQUEST, Purpose, Step};
use crate::engine::Engine;
use crate::engine::api::{Action, Shared};
use crate::engine::map::MapEntry;
use crate::engine::request::Fragment;

impl<S: Shared> Engine<S> {
    /// The cluster is copied from its host cluster in the top to one in the target of the merge, once nothing is in
    /// flight on it.
    pub(in crate::engine) fn begin_merge_copy(
        &mut self,
        cluster: u32,
        from: u32,
        host_cluster: u32,
        busy: bool,
        out: &mut Vec<Action>,
    ) {
        let Some(dest) = self.background.as_ref().and_then(|b| b.target.as_ref()).map(|t| t.level) else { return };
        self.begin_background_copy(cluster, from, (dest, host_cluster), (Purpose::MergeTop, 0), busy, out);
    }

    /// The cluster is copied to another host cluster of the top, once nothing is in flight on it.
    pub(in crate::engine) fn begin_relocation(
        &mut self,
        cluster: u32,
        from: u32,
        host_cluster: u32,
        slot: u32,
        busy: bool,
        out: &mut Vec<Action>,
    ) {
        let dest = (self.top, host_cluster);
        self.begin_background_copy(cluster, from, dest, (Purpose::Relocate, slot), busy, out);
    }

    fn begin_background_copy(
        &mut self,
        cluster: u32,
        from: u32,
        (dest, host_cluster): (u8, u32),
        (purpose, slot): (Purpose, u32),
        busy: bool,
        out: &mut Vec<Action>,
    ) {
        self.map.mark(cluster, MapEntry::LOCKED, true);
        let copy = Kind::CopyUp { level: self.top, host_cluster: from };
        let kind = if busy { Kind::BackgroundDrain { host_cluster: from } } else { copy };
        let piece = Fragment { req: NO_REQUEST, off: u64::from(cluster) << self.config.cluster_shift, len: 0 };
        let (step, waiters) = (Step::Waiting, Vec::new());
        let op = ClusterOp {
            purpose,
            kind,
            step,
            dest,
            host_cluster,
            slot,
            piece,
            zero: false,
            at: 0,
            bounce: None,
            waiters,
        };
        self.cluster_ops.insert(cluster, op);
        self.advance(cluster, out);
    }
}

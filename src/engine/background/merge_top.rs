//! Merging the writable top into the level below it while the device is in use.
//!
//! The top stays whole: at any instant the chain as it was before reads right. Cluster by cluster the content of the top
//! is copied to the target, under the cluster's lock; from then on every write to that cluster goes to both files. When
//! all clusters of the top have been copied the two files agree, and stay so until the engine is closed; closing
//! publishes the last changes. Then the top can be dropped.
//!
//! Two writes to the same sectors that are under way at the same time could end in different order in the two files:
//! the second waits for both halves of the first.
//!
//! The shared table has the progress. Word 0 is the cluster below which all clusters of the top agree durably. The
//! other words are the exceptions, as cluster number plus one: clusters below that were allocated in the top later. A
//! write that a killed worker left half done is not answered: the next worker gets it again and writes to both files.

use std::collections::{BTreeMap, BTreeSet};

use super::super::api::{Action, Errno, SYNC_WORD, Shared};
use super::super::breach::{Breach, breaks};
use super::super::io::Extent;
use super::super::map::MapEntry;
use super::super::request::{Fragment, Slab};
use super::super::{Engine, TOO_BIG};
use super::pages::PageSet;
use super::{BackgroundState, Work};
use crate::format::bat;

/// Clusters behind the cursor that are kept in memory; beyond that the cursor goes back.
const MAX_REVISITS: usize = 65_536;

/// A write under way in both files.
struct MirroredWrite {
    off: u64,
    len: u64,
    halves: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// In the top alone.
    Waiting,
    Copying,
    /// In both files.
    Copied,
    /// As `Copied`, and the publishing that is under way covers it.
    Publishing,
}

/// A cluster that was allocated in the top behind the cursor.
struct Revisit {
    stage: Stage,
    /// Where the shared table names it; `None`: the recorded cursor lies before it.
    word: Option<usize>,
}

/// A merge of the top; see the module.
pub(in super::super) struct MergeTop {
    /// BAT pages of the top that have entries.
    pages: PageSet,
    /// Clusters below have been looked at.
    cursor: u64,
    revisits: BTreeMap<u32, Revisit>,
    /// Those of them that wait to be copied.
    waiting: BTreeSet<u32>,
    free_words: Vec<usize>,
    /// The shared table does not name all clusters behind the recorded cursor: the cursor stays until all are
    /// published.
    overflowed: bool,
    recorded: u64,
    /// First clusters of the copies under way that are not revisits.
    copying: Vec<u32>,
    writes: Slab<MirroredWrite>,
    /// Writes that wait for the end of another one to the same sectors.
    waiters: Vec<Fragment>,
    end: u64,
}

impl MergeTop {
    pub fn new<S: Shared>(pages: PageSet, shared: &S) -> MergeTop {
        let cursor = shared.progress(0);
        let mut revisits = BTreeMap::new();
        let mut free_words = Vec::new();
        for word in (1..SYNC_WORD).rev() {
            match shared.progress(word) {
                0 => free_words.push(word),
                n => drop(revisits.insert((n - 1) as u32, Revisit { stage: Stage::Waiting, word: Some(word) })),
            }
        }
        MergeTop {
            pages,
            cursor,
            waiting: revisits.keys().copied().collect(),
            revisits,
            free_words,
            overflowed: false,
            recorded: cursor,
            copying: Vec::new(),
            writes: Slab::new(),
            waiters: Vec::new(),
            end: u64::MAX,
        }
    }

    pub fn cursor(&self) -> u64 {
        self.cursor.min(self.end)
    }

    /// All clusters below agree, but for revisits.
    pub fn safe_cursor(&self) -> u64 {
        self.copying.iter().map(|c| u64::from(*c)).min().unwrap_or(self.cursor).min(self.cursor)
    }

    /// Every cluster of the top has been copied.
    pub fn has_settled(&self) -> bool {
        self.cursor >= self.end && self.waiting.is_empty() && self.copying.is_empty()
    }

    /// The cluster's content is in both files, and is kept so.
    fn agrees(&self, cluster: u32) -> bool {
        let stage = self.revisits.get(&cluster).map(|r| r.stage);
        u64::from(cluster) < self.cursor && !matches!(stage, Some(Stage::Waiting | Stage::Copying))
    }

    /// Notes a cluster behind the cursor in the shared table; else the recorded cursor stays before it.
    fn revisit<S: Shared>(&mut self, cluster: u32, shared: &S) {
        if let Some(r) = self.revisits.get_mut(&cluster) {
            r.stage = Stage::Waiting;
            self.waiting.insert(cluster);
            return;
        }
        let word = self.free_words.pop();
        match word {
            _ if breaks(Breach::RevisitNotRecorded) => {}
            Some(word) => shared.set_progress(word, u64::from(cluster) + 1),
            None => {
                self.overflowed = true;
                if u64::from(cluster) < self.recorded {
                    self.recorded = u64::from(cluster);
                    shared.set_progress(0, self.recorded);
                }
            }
        }
        self.revisits.insert(cluster, Revisit { stage: Stage::Waiting, word });
        self.waiting.insert(cluster);
    }

    fn forget<S: Shared>(&mut self, cluster: u32, shared: &S) {
        if let Some(r) = self.revisits.remove(&cluster) {
            self.waiting.remove(&cluster);
            if let Some(word) = r.word {
                shared.set_progress(word, 0);
                self.free_words.push(word);
            }
        }
    }

    pub fn begin_publish(&mut self) {
        for r in self.revisits.values_mut().filter(|r| r.stage == Stage::Copied) {
            r.stage = Stage::Publishing;
        }
    }

    /// All clusters below `cursor` that are no revisits are durable, and so are the revisits that were being published.
    pub fn end_publish<S: Shared>(&mut self, cursor: u64, shared: &S) {
        let over: Vec<u32> =
            self.revisits.iter().filter(|(_, r)| r.stage == Stage::Publishing).map(|(c, _)| *c).collect();
        // First the cursor: a cluster that no word names must lie behind it only if it is durable.
        let unnamed = self.revisits.values().any(|r| r.word.is_none() && r.stage != Stage::Publishing);
        self.overflowed &= unnamed;
        if !self.overflowed && cursor != self.recorded {
            shared.set_progress(0, cursor);
            self.recorded = cursor;
        }
        over.into_iter().for_each(|c| self.forget(c, shared));
    }

    /// The fragments that waited for another write; they go on.
    pub fn release(&mut self) -> Vec<Fragment> {
        std::mem::take(&mut self.waiters)
    }
}

impl<S: Shared> Engine<S> {
    fn merge_top(&mut self) -> Option<&mut MergeTop> {
        match self.background.as_mut().map(|b| &mut b.work) {
            Some(Work::MergeTop(merge)) => Some(merge),
            _ => None,
        }
    }

    fn merge_top_is_alive(&self) -> bool {
        self.background.as_ref().is_some_and(|b| matches!(b.work, Work::MergeTop(_)) && !b.has_failed())
    }

    /// The top is being merged, or was until the merge failed. An entry of the target may be on its way to the disk,
    /// and a cluster without an entry in the top would read from it.
    pub(in super::super) fn merges_top(&self) -> bool {
        self.background.as_ref().is_some_and(|b| matches!(b.work, Work::MergeTop(_)))
    }

    /// The cluster's content is in both files.
    pub(in super::super) fn is_mirrored(&self, cluster: u32) -> bool {
        match self.background.as_ref().filter(|b| !b.has_failed()).map(|b| &b.work) {
            Some(Work::MergeTop(merge)) => merge.agrees(cluster),
            _ => false,
        }
    }

    /// A write or zeroing of the top at `piece.off`. False: it goes to the top alone. True: it has been started in both
    /// files, or waits.
    pub(in super::super) fn write_both(
        &mut self,
        piece: Fragment,
        cluster: u32,
        host_cluster: u32,
        at: u64,
        extent: &mut Option<Extent>,
        out: &mut Vec<Action>,
    ) -> bool {
        if !self.is_mirrored(cluster) || breaks(Breach::MergeUnmirrored) {
            return false;
        }
        let page = bat::page_of(cluster);
        if !self.need_target_page(page, out) {
            self.wait_for_target_page(page, piece);
            return true;
        }
        let mirror = self.background.as_ref().and_then(|b| b.target.as_ref());
        let Some((level, Some(mirror))) = mirror.map(|t| (t.level, t.host_cluster(cluster))) else { return false };
        let Some(merge) = self.merge_top() else { return false };
        let overlaps = |w: &MirroredWrite| w.off < piece.off + piece.len && piece.off < w.off + w.len;
        if merge.writes.iter().any(overlaps) && !breaks(Breach::MergeCrossed) {
            merge.waiters.push(piece);
            self.add_pending(piece.req);
            return true;
        }
        let pair = merge.writes.insert(MirroredWrite { off: piece.off, len: piece.len, halves: 2 });
        let before = extent.take();
        self.issue(piece.req, before, None, out);
        let within = piece.off & ((1 << self.config.cluster_shift) - 1);
        for (level, host_cluster) in [(self.top, host_cluster), (level, mirror)] {
            self.map.enter(cluster);
            let file_off = self.file_off(host_cluster) + within;
            let half = Extent { level, file_off, len: piece.len, at, first: cluster, count: 1 };
            self.issue(piece.req, Some(half), Some(pair), out);
        }
        true
    }

    /// Half of a write to both files has ended. Returns what that is for the request: an error of the target is none.
    pub(in super::super) fn half_done(
        &mut self,
        pair: u32,
        level: u8,
        result: Result<(), Errno>,
        out: &mut Vec<Action>,
    ) -> Result<(), Errno> {
        // A write that failed in one of the two files leaves them different.
        if let Err(errno) = result
            && !breaks(Breach::MergeSwallow)
        {
            self.abort_background(errno, out);
        }
        if let Some(merge) = self.merge_top()
            && let Some(write) = merge.writes.get_mut(pair)
        {
            write.halves -= 1;
            if write.halves == 0 {
                merge.writes.remove(pair);
                let waiters = std::mem::take(&mut merge.waiters);
                self.ready.extend(waiters);
            }
        }
        if level == self.top { result } else { Ok(()) }
    }

    /// A cluster is allocated in the top. It is noted before its entry changes, so that the next worker does not count
    /// it as copied.
    pub(in super::super) fn merge_sees_new(&mut self, cluster: u32) {
        if !self.merge_top_is_alive() || breaks(Breach::MergeMissed) {
            return;
        }
        let Some(Work::MergeTop(merge)) = self.background.as_mut().map(|b| &mut b.work) else { return };
        if u64::from(cluster) >= merge.cursor {
            merge.pages.insert(bat::page_of(cluster));
            // After a kill the next worker begins at the recorded cursor, which lies before.
            return;
        }
        merge.revisit(cluster, &self.pending.shared);
        if merge.revisits.len() > MAX_REVISITS
            && let Some(&first) = merge.waiting.first()
        {
            merge.cursor = u64::from(first);
            merge.pages.insert(bat::page_of(first));
            if merge.cursor < merge.recorded {
                merge.recorded = merge.cursor;
                self.pending.shared.set_progress(0, merge.cursor);
            }
        }
    }

    /// Starts what can be started.
    pub(super) fn advance_merge_top(&mut self, out: &mut Vec<Action>) {
        loop {
            let end = self.config.device_bytes.div_ceil(1 << self.config.cluster_shift);
            // Each cluster is copied under its lock with one buffer; requests keep one.
            let idle = usize::from(self.config.bounces).saturating_sub(1);
            let Some(b) = self.background.as_mut().filter(|b| !b.has_failed()) else { return };
            if !b.target.as_ref().is_some_and(|t| t.fits()) {
                self.abort_background(TOO_BIG, out);
                return;
            }
            let may_copy = b.may_copy(idle);
            let Work::MergeTop(merge) = &mut b.work else { return };
            merge.end = end;
            if !may_copy {
                return;
            }
            let waiting = merge.waiting.first().copied();
            let cluster = match waiting {
                Some(c) => c,
                None => match merge.next_cluster() {
                    Some(c) => c,
                    None => return,
                },
            };
            let revisit = waiting == Some(cluster);
            match self.merge_one(cluster, revisit, out) {
                Visit::NotYet => return,
                Visit::Nothing | Visit::Begun => {
                    let (Some(Work::MergeTop(merge)), shared) =
                        (self.background.as_mut().map(|b| &mut b.work), &self.pending.shared)
                    else {
                        return;
                    };
                    if !revisit {
                        merge.cursor = merge.cursor.max(u64::from(cluster) + 1);
                    } else if merge.revisits.get(&cluster).is_some_and(|r| r.stage == Stage::Waiting) {
                        // It is not in the top any more.
                        merge.forget(cluster, shared);
                    }
                }
            }
        }
    }

    /// Begins to copy a cluster if the top has it.
    fn merge_one(&mut self, cluster: u32, revisit: bool, out: &mut Vec<Action>) -> Visit {
        let page = bat::page_of(cluster);
        let target_there = self.need_target_page(page, out);
        if !self.map.is_loaded(page) && self.map.loading(page).is_none() {
            self.load(page, out);
        }
        let Some(entry) = self.map.get(cluster).filter(|_| target_there) else { return Visit::NotYet };
        let Some((level, from)) = entry.location() else { return Visit::Nothing };
        if level != self.top || !revisit && self.is_mirrored(cluster) {
            return Visit::Nothing;
        }
        if entry.is(MapEntry::LOCKED) || self.is_waiting_for_space(cluster) {
            // Its operation, or its wait for space, ends with a step.
            return Visit::NotYet;
        }
        let Some(host_cluster) = self.take_target_cluster(cluster, out) else { return Visit::NotYet };
        if let Some(b) = &mut self.background {
            b.copying += 1;
            if let Some(target) = &mut b.target {
                target.pin(cluster);
            }
            if let Work::MergeTop(merge) = &mut b.work {
                match merge.revisits.get_mut(&cluster) {
                    Some(r) => {
                        merge.waiting.remove(&cluster);
                        r.stage = Stage::Copying;
                    }
                    None => merge.copying.push(cluster),
                }
            }
        }
        let busy = entry.in_flight() > 0 && !breaks(Breach::MergeUndrained);
        self.begin_merge_copy(cluster, from, host_cluster, busy, out);
        Visit::Begun
    }

    /// A page of the map cannot be read.
    pub(in super::super) fn merge_page_failed(&mut self, page: u32, errno: Errno, out: &mut Vec<Action>) {
        let Some(b) = self.background.as_ref().filter(|b| b.state == BackgroundState::Running) else { return };
        let next = match &b.work {
            Work::MergeTop(merge) => merge.waiting.first().copied().unwrap_or(merge.cursor as u32),
            Work::GiveBack(work) => work.cursor() as u32,
            Work::MergeFrozen(_) => return,
        };
        if bat::page_of(next) == page {
            self.abort_background(errno, out);
        }
    }

    /// The copy of a cluster has to begin later.
    pub(in super::super) fn merge_postponed(&mut self, cluster: u32, host_cluster: u32) {
        let Some(b) = &mut self.background else { return };
        b.copying -= 1;
        if b.has_failed() {
            return;
        }
        if let Some(target) = &mut b.target {
            target.unpin(cluster);
            if target.host_cluster(cluster) == Some(0) {
                target.give_back(host_cluster);
            }
        }
        let Work::MergeTop(merge) = &mut b.work else { return };
        merge.copying.retain(|c| *c != cluster);
        merge.revisit(cluster, &self.pending.shared);
    }

    /// A cluster has been copied, or not.
    pub(in super::super) fn merge_copied(
        &mut self,
        cluster: u32,
        host_cluster: u32,
        result: Result<(), Errno>,
        out: &mut Vec<Action>,
    ) {
        let bytes = 1 << self.config.cluster_shift;
        let Some(b) = &mut self.background else { return };
        b.copying -= 1;
        if b.has_failed() {
            return;
        }
        if let Err(errno) = result
            && !breaks(Breach::MergeSwallow)
        {
            self.abort_background(errno, out);
            return;
        }
        if let Some(target) = &mut b.target {
            target.unpin(cluster);
            target.copied(cluster, host_cluster, bytes);
        }
        if let Work::MergeTop(merge) = &mut b.work {
            merge.copying.retain(|c| *c != cluster);
            if let Some(r) = merge.revisits.get_mut(&cluster) {
                r.stage = Stage::Copied;
            }
        }
        // The target's entry is on its way to the disk: without the top's entry the cluster would read from it.
        if !breaks(Breach::MergeUnmapped) {
            self.map.set_lower(cluster);
        }
        self.count_copied(1);
    }
}

/// Result of looking at a cluster.
enum Visit {
    /// The cluster has to be looked at once more.
    NotYet,
    Nothing,
    Begun,
}

impl MergeTop {
    /// The cluster at the cursor, which skips the pages without entries; `None`: all have been looked at.
    fn next_cluster(&mut self) -> Option<u32> {
        if self.cursor >= self.end {
            return None;
        }
        let page = bat::page_of(self.cursor as u32);
        if !self.pages.contains(page) {
            let next = self.pages.next(page).map_or(self.end, |p| bat::clusters_of(p).start);
            self.cursor = next.min(self.end);
        }
        (self.cursor < self.end).then_some(self.cursor as u32)
    }
}

//! Merging frozen levels into the lowest of them while the device is in use.
//!
//! No request reads what is written: a source above the target has each of these clusters, and the map names the
//! highest level that has one. So the work never conflicts with a request, and no cluster is locked. The BAT pages of
//! the sources are read when the work reaches them. Clusters that stand side by side in source and target are moved in
//! one piece: shared if the file system can, else copied through bounce buffers.

use std::collections::VecDeque;

use super::super::api::{Action, BAT_PAGE, BounceId, Buf, Errno, LevelConfig, Shared};
use super::super::breach::{Breach, breaks};
use super::super::request::Slab;
use super::super::{Engine, IO, TOO_BIG};
use super::pages::PageSet;
use super::{BackgroundOp, Work};
use crate::format::bat;

/// Bytes shared by one operation.
const SHARE: u64 = 64 << 20;
const NO_LEVEL: u8 = 0xFF;

/// What the sources have in the clusters of one BAT page: the highest of them that has a cluster, and where.
struct SourcePage {
    page: u32,
    entries: Box<[(u8, u32)]>,
    /// Reads under way.
    left: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// For a bounce buffer.
    Waiting,
    Sharing,
    Reading,
    Writing,
}

/// Neighbouring clusters on their way.
struct Copy {
    cluster: u32,
    count: u32,
    level: u8,
    from: u32,
    to: u32,
    /// Bytes copied.
    at: u64,
    step: Step,
    bounce: Option<BounceId>,
}

/// A merge of frozen levels; see the module.
pub(in super::super) struct MergeFrozen {
    high: u8,
    /// BAT pages in which a source has entries.
    pages: PageSet,
    end: u64,
    /// Clusters below have been looked at.
    cursor: u64,
    source: Option<SourcePage>,
    copies: Slab<Copy>,
    /// Copies that wait for a bounce buffer.
    waiting: VecDeque<u32>,
    /// Levels whose data cannot be shared with the target.
    unshared: [u64; 2],
}

impl MergeFrozen {
    pub fn new<S: Shared>(high: u8, pages: PageSet, end: u64, shared: &S) -> MergeFrozen {
        MergeFrozen {
            high,
            pages,
            end,
            cursor: shared.progress(0),
            source: None,
            copies: Slab::new(),
            waiting: VecDeque::new(),
            unshared: [0; 2],
        }
    }

    pub fn cursor(&self) -> u64 {
        self.cursor.min(self.end)
    }

    /// All clusters below have been copied.
    pub fn safe_cursor(&self) -> u64 {
        self.copies.iter().map(|c| u64::from(c.cluster)).min().unwrap_or(self.cursor)
    }

    pub fn is_complete(&self) -> bool {
        self.cursor >= self.end && self.copies.is_empty()
    }

    /// The merge is given up: forgets the copies that wait for a bounce buffer; returns how many they were.
    pub fn release(&mut self) -> usize {
        let waiting = std::mem::take(&mut self.waiting);
        waiting.iter().filter(|copy| self.copies.remove(**copy).is_some()).count()
    }

    fn shares(&self, level: u8) -> bool {
        self.unshared[usize::from(level) / 64] & 1 << (level % 64) == 0
    }

    /// The next cluster that a source has, on the page that is loaded, with level and host cluster.
    fn next_entry(&mut self) -> Option<(u32, u8, u32)> {
        let source = self.source.as_ref()?;
        let range = bat::clusters_of(source.page);
        let stop = range.end.min(self.end);
        while self.cursor < stop {
            let cluster = self.cursor as u32;
            let (level, host_cluster) = source.entries[bat::index_of(cluster)];
            if level != NO_LEVEL {
                return Some((cluster, level, host_cluster));
            }
            self.cursor += 1;
        }
        None
    }

    /// How many clusters from `cluster` on stand side by side in one source.
    fn run(&self, cluster: u32, level: u8, host_cluster: u32, most: u32) -> u32 {
        let Some(source) = &self.source else { return 1 };
        let stop = bat::clusters_of(source.page).end.min(self.end);
        let mut count = 1;
        while count < most && u64::from(cluster) + u64::from(count) < stop {
            if source.entries[bat::index_of(cluster + count)] != (level, host_cluster + count) {
                break;
            }
            count += 1;
        }
        count
    }
}

impl<S: Shared> Engine<S> {
    fn merge_frozen(&mut self) -> Option<&mut MergeFrozen> {
        match self.background.as_mut().map(|b| &mut b.work) {
            Some(Work::MergeFrozen(merge)) => Some(merge),
            _ => None,
        }
    }

    /// Starts what can be started.
    pub(super) fn advance_merge_frozen(&mut self, out: &mut Vec<Action>) {
        if !self.background.as_ref().and_then(|b| b.target.as_ref()).is_some_and(|t| t.fits()) {
            self.abort_background(TOO_BIG, out);
            return;
        }
        self.serve_waiting_copies(out);
        loop {
            // Requests keep one bounce buffer.
            let idle = usize::from(self.config.bounces).saturating_sub(1).max(1);
            let Some(b) = self.background.as_ref().filter(|b| b.is_running() && b.may_copy(idle)) else { return };
            let Work::MergeFrozen(merge) = &b.work else { return };
            if merge.cursor >= merge.end || !self.need_source_page(out) {
                return;
            }
            let Some(merge) = self.merge_frozen() else { return };
            let Some((cluster, level, from)) = merge.next_entry() else { continue };
            if !self.need_target_page(bat::page_of(cluster), out) {
                return;
            }
            if !self.begin_frozen_copy(cluster, level, from, out) {
                return;
            }
        }
    }

    /// The sources' BAT pages of the cursor are loaded; the cursor skips the pages without entries. False: they are
    /// being read, or nothing is left.
    fn need_source_page(&mut self, out: &mut Vec<Action>) -> bool {
        let low = self.background.as_ref().and_then(|b| b.target.as_ref()).map_or(0, |t| t.level);
        let clusters: Vec<(u8, u64)> = self
            .config
            .levels
            .iter()
            .enumerate()
            .filter_map(|(level, config)| match config {
                LevelConfig::Ploop { clusters, .. } => Some((level as u8, u64::from(*clusters))),
                LevelConfig::Raw { .. } => None,
            })
            .collect();
        let Some(merge) = self.merge_frozen() else { return false };
        let mut page = bat::page_of(merge.cursor as u32);
        if !merge.pages.contains(page) {
            match merge.pages.next(page).filter(|p| bat::clusters_of(*p).start < merge.end) {
                Some(next) => page = next,
                None => {
                    merge.cursor = merge.end;
                    return false;
                }
            }
            merge.cursor = merge.cursor.max(bat::clusters_of(page).start);
        }
        if let Some(source) = merge.source.as_ref().filter(|s| s.page == page) {
            return source.left == 0;
        }
        if merge.source.as_ref().is_some_and(|s| s.left > 0) {
            return false;
        }
        let start = bat::clusters_of(page).start;
        let reads: Vec<u8> =
            clusters.into_iter().filter(|(l, n)| *l > low && *l <= merge.high && start < *n).map(|(l, _)| l).collect();
        let entries = vec![(NO_LEVEL, 0); bat::ENTRIES].into_boxed_slice();
        merge.source = Some(SourcePage { page, entries, left: reads.len() as u32 });
        for level in &reads {
            let op = self.start_background_op(BackgroundOp::SourcePage { level: *level, page });
            out.push(Action::ReadBat { op, level: *level, page, len: BAT_PAGE as u32 });
        }
        reads.is_empty()
    }

    /// One source's BAT page was read: the highest source that has a cluster is used, whatever the order of the reads.
    pub(in super::super) fn source_page_read(
        &mut self,
        level: u8,
        page: u32,
        bytes: Result<&[u8], Errno>,
        out: &mut Vec<Action>,
    ) {
        let config = self.config.levels.get(usize::from(level)).cloned();
        let shift = self.config.cluster_shift;
        let failed = self.background.as_ref().is_none_or(|b| b.has_failed());
        let Some(merge) = self.merge_frozen() else { return };
        let Some(source) = merge.source.as_mut().filter(|s| s.page == page) else { return };
        source.left = source.left.saturating_sub(1);
        if failed {
            return;
        }
        let result = bytes.and_then(|b| match config {
            Some(config) if b.len() == BAT_PAGE => lay_over(source, level, &config, shift, b),
            _ => Err(IO),
        });
        if let Err(errno) = result {
            self.abort_background(errno, out);
        }
    }

    /// Begins to move as many neighbours as can go in one piece. False: no host clusters for them yet, or no buffer.
    fn begin_frozen_copy(&mut self, cluster: u32, level: u8, from: u32, out: &mut Vec<Action>) -> bool {
        let shift = self.config.cluster_shift;
        let Some(merge) = self.merge_frozen() else { return false };
        let shares = merge.shares(level);
        let most = if shares { SHARE >> shift } else { u64::from(self.config.bounce_bytes) >> shift }.max(1) as u32;
        let Some(merge) = self.merge_frozen() else { return false };
        let most = merge.run(cluster, level, from, most);
        if !shares && !self.has_spare_bounce() {
            return false;
        }
        let own = self.background.as_ref().and_then(|b| b.target.as_ref()).and_then(|t| t.host_cluster(cluster));
        let Some(to) = self.take_target_cluster(cluster, out) else { return false };
        let Some(b) = &mut self.background else { return false };
        let Some(target) = &mut b.target else { return false };
        let mut count = 1;
        while count < most {
            let fits = match (target.is_raw(), own, target.host_cluster(cluster + count)) {
                (true, ..) => true,
                (_, Some(0), Some(0)) => target.take_next(to + count - 1),
                (_, Some(0), _) => false,
                (_, _, next) => next == Some(to + count),
            };
            if !fits {
                break;
            }
            count += 1;
        }
        target.pin(cluster);
        b.copying += 1;
        let Work::MergeFrozen(merge) = &mut b.work else { return false };
        merge.cursor = u64::from(cluster) + u64::from(count);
        let step = if shares { Step::Sharing } else { Step::Waiting };
        let copy = merge.copies.insert(Copy { cluster, count, level, from, to, at: 0, step, bounce: None });
        self.advance_copy(copy, out);
        true
    }

    /// A bounce buffer is free beside the one that requests keep, and no request waits for it.
    fn has_spare_bounce(&self) -> bool {
        let kept = usize::from(self.config.bounces > 1);
        self.bounces.len() > kept && self.bounce_wait.is_empty()
    }

    fn serve_waiting_copies(&mut self, out: &mut Vec<Action>) {
        while self.has_spare_bounce()
            && let Some(copy) = self.merge_frozen().and_then(|m| m.waiting.pop_front())
        {
            self.advance_copy(copy, out);
        }
    }

    /// Bytes of all of a copy.
    fn copy_bytes(&self, copy: &Copy) -> u64 {
        let len = u64::from(copy.count) << self.config.cluster_shift;
        let target = self.background.as_ref().and_then(|b| b.target.as_ref());
        target.map_or(len, |t| t.room(self.file_off(copy.to), len))
    }

    fn copy_mut(&mut self, copy: u32) -> Option<&mut Copy> {
        self.merge_frozen()?.copies.get_mut(copy)
    }

    /// Begins the next operation of a copy.
    fn advance_copy(&mut self, number: u32, out: &mut Vec<Action>) {
        let spare = self.has_spare_bounce();
        let Some(copy) = self.copy_mut(number) else { return };
        let (step, has_bounce) = (copy.step, copy.bounce.is_some());
        if step == Step::Waiting && !has_bounce {
            let bounce = if spare { self.bounces.pop() } else { None };
            if bounce.is_none() {
                if let Some(merge) = self.merge_frozen() {
                    merge.waiting.push_back(number);
                }
                return;
            }
            if let Some(copy) = self.copy_mut(number) {
                copy.bounce = bounce;
                copy.step = Step::Reading;
            }
        }
        let target = self.background.as_ref().and_then(|b| b.target.as_ref()).map_or(0, |t| t.level);
        let Some(Work::MergeFrozen(merge)) = self.background.as_ref().map(|b| &b.work) else { return };
        let Some(copy) = merge.copies.get(number) else { return };
        let (from, to) = (self.file_off(copy.from) + copy.at, self.file_off(copy.to) + copy.at);
        let all = self.copy_bytes(copy);
        let chunk = (all - copy.at).min(u64::from(self.config.bounce_bytes));
        let (level, step, bounce) = (copy.level, copy.step, copy.bounce);
        let op = self.start_background_op(BackgroundOp::Copy { copy: number });
        out.push(match (step, bounce) {
            (Step::Reading, Some(id)) => {
                Action::Read { op, level, file_off: from, len: chunk, to: Buf::Bounce { id, off: 0 } }
            }
            (Step::Writing, Some(id)) => {
                Action::Write { op, level: target, file_off: to, len: chunk, from: Buf::Bounce { id, off: 0 } }
            }
            _ => Action::Clone { op, from: level, from_off: from, level: target, file_off: to, len: all },
        });
    }

    pub(super) fn frozen_copy_step(&mut self, number: u32, result: Result<(), Errno>, out: &mut Vec<Action>) {
        let failed = self.background.as_ref().is_none_or(|b| b.has_failed());
        let bounce_bytes = u64::from(self.config.bounce_bytes);
        let Some(Work::MergeFrozen(merge)) = self.background.as_ref().map(|b| &b.work) else { return };
        let Some(copy) = merge.copies.get(number) else { return };
        let all = self.copy_bytes(copy);
        let Some(merge) = self.merge_frozen() else { return };
        let Some(copy) = merge.copies.get_mut(number) else { return };
        match (copy.step, result) {
            _ if failed => self.end_frozen_copy(number, result, out),
            (Step::Sharing, Err(_)) => {
                // These files cannot share data, or not now: copied instead.
                let level = copy.level;
                copy.step = Step::Waiting;
                merge.unshared[usize::from(level) / 64] |= 1 << (level % 64);
                self.advance_copy(number, out);
            }
            (_, Err(_)) if !breaks(Breach::MergeSwallow) => self.end_frozen_copy(number, result, out),
            (Step::Reading, _) => {
                copy.step = Step::Writing;
                self.advance_copy(number, out);
            }
            (Step::Writing, _) => {
                copy.at = (copy.at + bounce_bytes).min(all);
                if copy.at < all {
                    copy.step = Step::Reading;
                    self.advance_copy(number, out);
                } else {
                    self.end_frozen_copy(number, Ok(()), out);
                }
            }
            (Step::Sharing | Step::Waiting, _) => self.end_frozen_copy(number, Ok(()), out),
        }
    }

    fn end_frozen_copy(&mut self, number: u32, result: Result<(), Errno>, out: &mut Vec<Action>) {
        let shift = self.config.cluster_shift;
        let Some(b) = &mut self.background else { return };
        let Work::MergeFrozen(merge) = &mut b.work else { return };
        let Some(copy) = merge.copies.remove(number) else { return };
        b.copying -= 1;
        let failed = b.has_failed();
        if let (Some(target), Ok(()), false) = (&mut b.target, result, failed) {
            target.unpin(copy.cluster);
            for i in 0..copy.count {
                target.copied(copy.cluster + i, copy.to + i, 1 << shift);
            }
        }
        self.give_bounce_back(copy.bounce, out);
        match result {
            Ok(()) if !failed => self.count_copied(u64::from(copy.count)),
            Err(errno) => self.abort_background(errno, out),
            Ok(()) => {}
        }
    }
}

fn lay_over(source: &mut SourcePage, level: u8, config: &LevelConfig, shift: u32, bytes: &[u8]) -> Result<(), Errno> {
    let LevelConfig::Ploop { v1, clusters, first_data, file_clusters } = *config else { return Err(IO) };
    debug_assert_eq!(bytes.len(), BAT_PAGE);
    let unit = bat::Unit::of(v1, shift);
    let range = bat::clusters_of(source.page);
    for c in range.start..range.end.min(u64::from(clusters)) {
        let index = bat::index_of(c as u32);
        let raw = bat::load(bytes, index);
        let host_cluster = unit.decode_within(raw, first_data, file_clusters).ok_or(IO)?;
        if host_cluster == 0 {
            continue;
        }
        let have = source.entries[index].0;
        if have == NO_LEVEL || (have < level) != breaks(Breach::LowerSourceWins) {
            source.entries[index] = (level, host_cluster);
        }
    }
    Ok(())
}

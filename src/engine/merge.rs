//! Merging the top into the level below it while the device is in use.
//!
//! The top stays whole: at any instant the chain as it was before reads right. Cluster by cluster the content of the top
//! is copied to the target, under the cluster's lock; from then on every write to that cluster goes to both files. When
//! all clusters of the top have been copied the two agree, and stay so until the engine is closed. Then the caller writes
//! the target's BAT ([`Engine::merged_pages`]), and the top can be dropped.
//!
//! The target's BAT is not touched before. What is written into the target is never read meanwhile, because the top
//! has each of these clusters: a merge that ends before its time has spoiled nothing but the target's own snapshot.
//!
//! Two writes to the same sectors that are under way at the same time could end in different order in the two files:
//! the second waits for both halves of the first.

use std::collections::VecDeque;

use super::api::{Action, BAT_PAGE, Errno, LevelConfig, MergeConfig, ReqId, Shared};
use super::breach::{Breach, breaks};
use super::io::Run;
use super::map::{ENTRIES, Ent, HEADER_ENTRIES, clusters_of, page_of};
use super::request::{Seg, Slab};
use super::space::Space;
use super::{CANCELED, Engine, IO, NO_SPACE, Op, TOO_BIG};

/// Clusters copied at the same time. With 4 a random writer kept a third of its rate, with 1 more than half; the merge
/// takes half as long again.
const AT_ONCE: u32 = 1;

/// Entries of the target for the clusters of one BAT page.
struct Page {
    /// Image clusters of the target, 0: none (a raw target has all).
    place: [u32; ENTRIES],
    /// The target has what the top has, and is kept so.
    agrees: [bool; ENTRIES],
}

/// A write under way in both files.
struct Pair {
    off: u64,
    len: u64,
    halves: u8,
}

/// Where the merge stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    Running,
    /// Top and target agree, and are kept so.
    Agreed,
    Failed(Errno),
}

/// A merge under way.
pub struct Merge {
    pub level: u8,
    raw: bool,
    /// The target has entries for the whole device.
    fits: bool,
    state: State,
    space: Space,
    pages: Vec<Option<Box<Page>>>,
    /// Clusters below have been looked at.
    cursor: u64,
    /// Clusters that came into the top behind the cursor.
    again: VecDeque<u32>,
    /// A page of the target is being read.
    loading: bool,
    copying: u32,
    copied: u64,
    pairs: Slab<Pair>,
    /// Writes that wait for the end of another one to the same sectors.
    waiters: Vec<Seg>,
}

fn slot_of(cluster: u32) -> usize {
    ((u64::from(cluster) + HEADER_ENTRIES) % ENTRIES as u64) as usize
}

impl Merge {
    /// Starts one into a level of `levels`; `pages` of the map cover the device.
    pub fn new(config: &MergeConfig, levels: &[LevelConfig], clusters: u64) -> Merge {
        let pages = clusters.checked_sub(1).map_or(0, |last| page_of(last as u32) as usize + 1);
        let target = levels.get(usize::from(config.level));
        // A page that cannot hold the device's clusters would lose them.
        let fits = match target {
            Some(LevelConfig::Raw { .. }) => true,
            Some(LevelConfig::Ploop { clusters: n, .. }) => u64::from(*n) >= clusters,
            None => false,
        };
        Merge {
            level: config.level,
            raw: matches!(target, Some(LevelConfig::Raw { .. })),
            fits: fits && usize::from(config.level) + 1 < levels.len(),
            state: State::Running,
            space: Space::new(&config.alloc),
            pages: std::iter::repeat_with(|| None).take(pages).collect(),
            cursor: 0,
            again: VecDeque::new(),
            loading: false,
            copying: 0,
            copied: 0,
            pairs: Slab::new(),
            waiters: Vec::new(),
        }
    }

    fn page(&mut self, cluster: u32) -> Option<&mut Page> {
        self.pages.get_mut(page_of(cluster) as usize)?.as_deref_mut()
    }

    /// Place in the target of a cluster that is kept equal.
    fn mirror_of(&self, cluster: u32) -> Option<u32> {
        if matches!(self.state, State::Failed(_)) || breaks(Breach::MergeUnmirrored) {
            return None;
        }
        let page = self.pages.get(page_of(cluster) as usize)?.as_deref()?;
        let slot = slot_of(cluster);
        page.agrees[slot].then_some(page.place[slot])
    }

    fn is_idle(&self) -> bool {
        self.again.is_empty() && self.copying == 0 && !self.loading
    }
}

impl<S: Shared> Engine<S> {
    /// How the merge stands; `None`: there is none.
    pub fn merge_state(&self) -> Option<State> {
        self.merge.as_ref().map(|m| m.state)
    }

    /// Clusters looked at and clusters copied so far.
    pub(super) fn merge_progress(&self) -> (u64, u64) {
        self.merge.as_ref().map_or((0, 0), |m| (m.cursor, m.copied))
    }

    /// After `Closed`, if top and target agree: the pages of the target's BAT as they have to be on disk once the data is
    /// durable there. Page 0 lacks the header, its first 64 bytes. None for a raw target.
    pub fn merged_pages(&self) -> impl Iterator<Item = (u32, Box<[u8; BAT_PAGE]>)> + '_ {
        let merge = self.merge.as_ref().filter(|m| m.state == State::Agreed && !m.raw);
        let per_entry = merge.map_or(1, |m| match self.config.levels.get(usize::from(m.level)) {
            Some(LevelConfig::Ploop { v1: true, .. }) => 1u32 << (self.config.cluster_shift - 9),
            _ => 1,
        });
        let pages = merge.into_iter().flat_map(|m| m.pages.iter().enumerate());
        pages.filter_map(move |(number, page)| {
            let page = page.as_deref()?;
            let mut data = Box::new([0u8; BAT_PAGE]);
            for (place, bytes) in page.place.iter().zip(data.chunks_exact_mut(4)) {
                bytes.copy_from_slice(&(place * per_entry).to_le_bytes());
            }
            Some((number as u32, data))
        })
    }

    /// The cluster's content is in both files.
    pub(super) fn is_mirrored(&self, cluster: u32) -> bool {
        self.merge.as_ref().is_some_and(|m| m.mirror_of(cluster).is_some())
    }

    /// A write or zeroing of the top at `within` in its cluster. False: it goes to the top alone. True: it has been
    /// started in both files, or waits.
    pub(super) fn write_both(
        &mut self,
        piece: Seg,
        cluster: u32,
        place: u32,
        at: u64,
        run: &mut Option<Run>,
        out: &mut Vec<Action>,
    ) -> bool {
        let Some(merge) = &mut self.merge else { return false };
        let Some(mirror) = merge.mirror_of(cluster) else { return false };
        let overlaps = |p: &Pair| p.off < piece.off + piece.len && piece.off < p.off + p.len;
        if merge.pairs.iter().any(overlaps) && !breaks(Breach::MergeCrossed) {
            merge.waiters.push(piece);
            self.hold(piece.req);
            return true;
        }
        let pair = merge.pairs.insert(Pair { off: piece.off, len: piece.len, halves: 2 });
        let level = merge.level;
        let before = run.take();
        self.issue(piece.req, before, None, out);
        let within = piece.off & ((1 << self.config.cluster_shift) - 1);
        for (level, place) in [(self.top, place), (level, mirror)] {
            self.map.enter(cluster);
            let half =
                Run { level, file_off: self.file_off(place) + within, len: piece.len, at, first: cluster, count: 1 };
            self.issue(piece.req, Some(half), Some(pair), out);
        }
        true
    }

    /// Half of a write to both files has ended.
    pub(super) fn half_done(&mut self, pair: u32) {
        let Some(merge) = &mut self.merge else { return };
        let Some(p) = merge.pairs.get_mut(pair) else { return };
        p.halves -= 1;
        if p.halves == 0 {
            merge.pairs.remove(pair);
            self.ready.extend(std::mem::take(&mut merge.waiters));
        }
    }

    /// A cluster has come into the top.
    pub(super) fn merge_anew(&mut self, cluster: u32) {
        if let Some(merge) = &mut self.merge
            && u64::from(cluster) < merge.cursor
            && !breaks(Breach::MergeMissed)
            && !matches!(merge.state, State::Failed(_))
        {
            merge.again.push_back(cluster);
        }
    }

    /// The merge cannot go on. The device can.
    pub(super) fn abort_merge(&mut self, errno: Errno, out: &mut Vec<Action>) {
        let Some(merge) = &mut self.merge else { return };
        if matches!(merge.state, State::Failed(_)) {
            return;
        }
        merge.state = State::Failed(errno);
        merge.again.clear();
        merge.pages.clear();
        self.ready.extend(std::mem::take(&mut merge.waiters));
        out.push(Action::Merged { result: Err(errno) });
    }

    /// The engine is being closed: what has not come to agree so far will not.
    pub(super) fn close_merge(&mut self, out: &mut Vec<Action>) {
        if self.merge_state() == Some(State::Running) {
            self.abort_merge(CANCELED, out);
        }
    }

    /// Nothing is left that has to be done before closing.
    pub(super) fn merge_is_idle(&self) -> bool {
        self.merge.as_ref().is_none_or(Merge::is_idle)
    }

    /// Starts what can be started.
    pub(super) fn look_after_merge(&mut self, out: &mut Vec<Action>) {
        loop {
            let end = self.config.device_bytes.div_ceil(1 << self.config.cluster_shift);
            let Some(merge) = &mut self.merge else { return };
            if matches!(merge.state, State::Failed(_)) || merge.loading || merge.copying >= AT_ONCE {
                return;
            }
            if !merge.fits {
                self.abort_merge(TOO_BIG, out);
                return;
            }
            let cluster = match merge.again.front() {
                Some(&c) => c,
                None if merge.cursor < end => merge.cursor as u32,
                None => {
                    if merge.copying == 0 && merge.state == State::Running {
                        merge.state = State::Agreed;
                        out.push(Action::Merged { result: Ok(()) });
                    }
                    return;
                }
            };
            if !self.merge_one(cluster, out) {
                return;
            }
            if let Some(merge) = &mut self.merge
                && merge.again.pop_front().is_none()
            {
                merge.cursor += 1;
            }
        }
    }

    /// Begins to copy a cluster if the top has it. False: not yet, it is to be asked for again.
    fn merge_one(&mut self, cluster: u32, out: &mut Vec<Action>) -> bool {
        let page = page_of(cluster);
        let Some(merge) = &mut self.merge else { return false };
        if merge.page(cluster).is_none() {
            // One page after another, each with a read: however large the disk, a step stays short.
            merge.loading = true;
            let level = if merge.raw { self.top } else { merge.level };
            let op = self.start(Op::MergePage { page });
            out.push(Action::ReadBat { op, level, page, len: BAT_PAGE as u32 });
            return false;
        }
        if !self.map.is_loaded(page) && self.map.loading(page).is_none() {
            self.load(page, out);
        }
        let Some(ent) = self.map.get(cluster) else { return false };
        let Some((level, from)) = ent.place() else { return true };
        if level != self.top || self.is_mirrored(cluster) {
            return true;
        }
        if ent.is(Ent::HELD) || self.is_parked(cluster) {
            // Its job, or its wait for space, ends with a step.
            return false;
        }
        let Some(place) = self.merge_place(cluster, out) else { return false };
        if let Some(merge) = &mut self.merge {
            merge.copying += 1;
        }
        let busy = ent.in_flight() > 0 && !breaks(Breach::MergeUndrained);
        self.begin_merge_copy(cluster, from, place, busy, out);
        true
    }

    /// A place in the target, its own or a new one; `None`: its file has to grow first.
    fn merge_place(&mut self, cluster: u32, out: &mut Vec<Action>) -> Option<u32> {
        let merge = self.merge.as_mut()?;
        let raw = merge.raw;
        let have = merge.page(cluster)?.place[slot_of(cluster)];
        if raw || have != 0 {
            return Some(have);
        }
        if let Some(place) = merge.space.take(false) {
            return Some(place.at);
        }
        if merge.space.is_exhausted() {
            self.abort_merge(TOO_BIG, out);
            return None;
        }
        if let Some(range) = merge.space.grow(true) {
            let level = merge.level;
            let op = self.start(Op::MergeGrow);
            let (file_off, len) = (self.file_off(range.start), self.file_off(range.end - range.start));
            out.push(Action::Fallocate { op, level, file_off, len });
        }
        None
    }

    pub(super) fn merge_grown(&mut self, result: Result<(), Errno>, out: &mut Vec<Action>) {
        let Some(merge) = &mut self.merge else { return };
        match result {
            Ok(()) => merge.space.grown(),
            // In smaller steps.
            Err(NO_SPACE) if merge.space.not_grown() => {}
            Err(errno) => {
                merge.space.growing = None;
                self.abort_merge(errno, out);
            }
        }
    }

    /// A page of the target has been read.
    pub(super) fn merge_page(&mut self, number: u32, bytes: Result<&[u8], Errno>, out: &mut Vec<Action>) {
        let target = self.merge.as_ref().and_then(|m| self.config.levels.get(usize::from(m.level)).cloned());
        let (Some(merge), Some(target)) = (&mut self.merge, target) else { return };
        merge.loading = false;
        if matches!(merge.state, State::Failed(_)) {
            return;
        }
        match bytes.and_then(|b| parse(&target, number, b, self.config.cluster_shift)) {
            Ok(page) => {
                if let Some(slot) = merge.pages.get_mut(number as usize) {
                    *slot = Some(page);
                }
            }
            Err(errno) => self.abort_merge(errno, out),
        }
    }

    /// A page of the map cannot be read.
    pub(super) fn merge_page_failed(&mut self, page: u32, errno: Errno, out: &mut Vec<Action>) {
        let next = self.merge.as_ref().map(|m| m.again.front().copied().unwrap_or(m.cursor as u32));
        if next.is_some_and(|c| page_of(c) == page) {
            self.abort_merge(errno, out);
        }
    }

    /// The copy of a cluster has to begin later.
    pub(super) fn merge_postponed(&mut self, cluster: u32, place: u32) {
        let Some(merge) = &mut self.merge else { return };
        merge.copying -= 1;
        if matches!(merge.state, State::Failed(_)) {
            return;
        }
        merge.again.push_back(cluster);
        let new = !merge.raw && merge.page(cluster).is_some_and(|p| p.place[slot_of(cluster)] == 0);
        if new {
            merge.space.give(place);
        }
    }

    /// A cluster has been copied, or not.
    pub(super) fn merge_copied(&mut self, cluster: u32, place: u32, result: Result<(), Errno>, out: &mut Vec<Action>) {
        let Some(merge) = &mut self.merge else { return };
        merge.copying -= 1;
        match result {
            Err(errno) if !breaks(Breach::MergeSwallow) => self.abort_merge(errno, out),
            _ => {
                merge.copied += 1;
                if let Some(page) = merge.page(cluster) {
                    page.place[slot_of(cluster)] = place;
                    page.agrees[slot_of(cluster)] = true;
                }
            }
        }
    }

    /// What half of a pair came to, for its request: an error of the target's is not.
    pub(super) fn mirrored(
        &mut self,
        level: u8,
        result: Result<(), Errno>,
        out: &mut Vec<Action>,
    ) -> Result<(), Errno> {
        // A write that failed in one of the two files leaves them different.
        if let Err(errno) = result
            && !breaks(Breach::MergeSwallow)
        {
            self.abort_merge(errno, out);
        }
        if level == self.top { result } else { Ok(()) }
    }
}

/// The entries of the target's page.
fn parse(target: &LevelConfig, number: u32, bytes: &[u8], shift: u32) -> Result<Box<Page>, Errno> {
    let mut page = Box::new(Page { place: [0; ENTRIES], agrees: [false; ENTRIES] });
    let range = clusters_of(number);
    match *target {
        LevelConfig::Raw { .. } => range.for_each(|c| page.place[slot_of(c as u32)] = c as u32),
        LevelConfig::Ploop { v1, clusters, first_data, file_clusters } => {
            if bytes.len() != BAT_PAGE {
                return Err(IO);
            }
            let per_entry = if v1 { 1u32 << (shift - 9) } else { 1 };
            for c in range.start..range.end.min(u64::from(clusters)) {
                let slot = slot_of(c as u32);
                let at = slot * 4;
                let raw = u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
                let place = raw / per_entry;
                if raw != 0 && (!raw.is_multiple_of(per_entry) || place < first_data || place >= file_clusters) {
                    return Err(IO);
                }
                page.place[slot] = place;
            }
        }
    }
    Ok(page)
}

/// A request that no caller made: pieces of jobs that belong to none.
pub(super) const NOBODY: ReqId = ReqId(u32::MAX);

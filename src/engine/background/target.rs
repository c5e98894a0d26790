//! The level that a merge writes to: its space, the pages of its BAT, and the publishing of copies.
//!
//! Pages of the target's BAT are read one after another when they are needed and dropped when they are clean. A raw
//! target has no BAT: each cluster is at its own offset.

mod publish;

use std::collections::VecDeque;

use super::super::api::{Action, BAT_PAGE, Errno, LevelConfig, Shared, TargetConfig};
use super::super::breach::{Breach, breaks};
use super::super::request::{Fragment, IntMap};
use super::super::space::Space;
use super::super::{Engine, IO, NO_SPACE, TOO_BIG};
use super::BackgroundOp;
use crate::format::bat;

/// Clean pages kept in memory, 4 KiB each.
const CACHED_PAGES: usize = 2048;
/// Changed pages after which they are published.
const CHANGED_PAGES: usize = 64;
/// Bytes copied after which they are published.
const BATCH: u64 = 256 << 20;
/// BAT pages written at the same time.
const PAGES_AT_ONCE: usize = 8;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Idle,
    DataSync,
    Pages,
    FinalSync,
}

/// A page of the target's BAT.
struct TargetPage {
    /// As on disk, with the entries of clusters copied since.
    bytes: Box<[u8; BAT_PAGE]>,
    loaded: bool,
    /// Differs from the disk.
    changed: bool,
    /// On its way to the disk.
    publishing: bool,
    /// Copies under way that will change it.
    pins: u32,
    /// Writes that wait until it is read.
    waiters: Vec<Fragment>,
}

/// The target of a merge; see the module.
pub(in super::super) struct Target {
    pub level: u8,
    /// Bytes of a raw file.
    raw: Option<u64>,
    unit: bat::Unit,
    first_data: u32,
    clusters: u32,
    /// It has entries for every cluster that can be merged into it.
    fits: bool,
    space: Space,
    pages: IntMap<u32, TargetPage>,
    order: VecDeque<u32>,
    changed_pages: usize,
    phase: Phase,
    /// Bytes that were copied and are not published.
    unpublished: u64,
    /// All copies are to be published without further delay.
    due: bool,
    /// Pages to be written, as they stood when the data sync began.
    writing: Vec<(u32, Box<[u8; BAT_PAGE]>)>,
    in_flight: usize,
    /// All clusters below are durable in the target once this publishing has ended.
    cursor: u64,
    /// A publishing that began after the last request was answered, while closing, has ended.
    final_done: bool,
    final_running: bool,
    /// Progress that was recorded last.
    recorded: u64,
    /// Every BAT page is written again, changed or not.
    doubtful: bool,
}

impl Target {
    /// `end`: clusters that may be merged into it.
    /// `doubtful`: a sync of it may have failed, so that the durable BAT may differ from the one that is read.
    pub fn new(
        config: &TargetConfig,
        levels: &[LevelConfig],
        end: u64,
        cluster_shift: u32,
        doubtful: bool,
    ) -> Option<Target> {
        let (raw, v1, first_data, clusters) = match *levels.get(usize::from(config.level))? {
            LevelConfig::Raw { bytes } => (Some(bytes), false, 0, u32::MAX),
            LevelConfig::Ploop { v1, clusters, first_data, .. } => (None, v1, first_data, clusters),
        };
        let enough = match raw {
            Some(bytes) => bytes.div_ceil(1 << cluster_shift) >= end,
            None => u64::from(clusters) >= end,
        };
        Some(Target {
            level: config.level,
            raw,
            unit: bat::Unit::of(v1, cluster_shift),
            first_data,
            clusters,
            fits: enough && usize::from(config.level) + 1 < levels.len(),
            space: Space::new(&config.alloc),
            pages: IntMap::default(),
            order: VecDeque::new(),
            changed_pages: 0,
            phase: Phase::Idle,
            unpublished: 0,
            due: false,
            writing: Vec::new(),
            in_flight: 0,
            cursor: 0,
            final_done: false,
            final_running: false,
            recorded: 0,
            doubtful,
        })
    }

    pub fn fits(&self) -> bool {
        self.fits
    }

    pub fn is_raw(&self) -> bool {
        self.raw.is_some()
    }

    /// Host clusters that the file has.
    pub fn file_end(&self) -> u32 {
        self.space.file_end()
    }

    /// Bytes that a copy of so many may write at `file_off`: a raw file ends with the disk.
    pub fn room(&self, file_off: u64, len: u64) -> u64 {
        self.raw.map_or(len, |bytes| bytes.saturating_sub(file_off).min(len))
    }

    /// Host cluster of a cluster, 0: none; `None`: its page has to be read first.
    pub fn host_cluster(&self, cluster: u32) -> Option<u32> {
        if self.raw.is_some() {
            return Some(cluster);
        }
        let page = self.pages.get(&bat::page_of(cluster)).filter(|p| p.loaded)?;
        Some(self.entry(&page.bytes, cluster))
    }

    /// Host cluster of a cluster by its entry in a page whose entries are sound; 0: none.
    fn entry(&self, bytes: &[u8; BAT_PAGE], cluster: u32) -> u32 {
        match self.unit.decode(bat::load(bytes, bat::index_of(cluster))) {
            bat::Entry::At(host_cluster) => host_cluster,
            _ => 0,
        }
    }

    /// Every entry of a page names a cluster of the file.
    fn is_sound(&self, number: u32, bytes: &[u8; BAT_PAGE]) -> bool {
        let range = bat::clusters_of(number);
        (range.start..range.end.min(u64::from(self.clusters))).all(|c| {
            let raw = bat::load(bytes, bat::index_of(c as u32));
            self.unit.decode_within(raw, self.first_data, self.file_end()).is_some()
        })
    }

    /// A copy that will change the entry of this cluster begins: its page stays in memory.
    pub fn pin(&mut self, cluster: u32) {
        if let Some(page) = self.pages.get_mut(&bat::page_of(cluster)) {
            page.pins += 1;
        }
    }

    pub fn unpin(&mut self, cluster: u32) {
        if let Some(page) = self.pages.get_mut(&bat::page_of(cluster)) {
            page.pins = page.pins.saturating_sub(1);
        }
    }

    /// So many bytes of the cluster were copied, to this host cluster.
    pub fn copied(&mut self, cluster: u32, host_cluster: u32, bytes: u64) {
        self.unpublished += bytes;
        if self.raw.is_some() {
            return;
        }
        let index = bat::index_of(cluster);
        let entry = self.unit.entry(host_cluster);
        let Some(page) = self.pages.get_mut(&bat::page_of(cluster)) else { return };
        if bat::load(&page.bytes[..], index) != entry {
            bat::store(&mut page.bytes[..], index, entry);
            self.changed_pages += usize::from(!std::mem::replace(&mut page.changed, true));
        }
        if breaks(Breach::LateTargetEntry)
            && let Some((_, data)) = self.writing.iter_mut().find(|(n, _)| *n == bat::page_of(cluster))
        {
            bat::store(&mut data[..], index, entry);
        }
    }

    /// Frees a host cluster that no copy has used.
    pub fn give_back(&mut self, host_cluster: u32) {
        if self.raw.is_none() {
            self.space.give(host_cluster);
        }
    }

    /// Takes the host cluster that follows `after`, if it is the next one to be taken.
    pub fn take_next(&mut self, after: u32) -> bool {
        self.space.take_at(after + 1)
    }

    /// What was copied is published at the next opportunity.
    pub fn publish_soon(&mut self) {
        self.due = true;
    }

    /// No file operation is under way.
    pub fn is_quiet(&self) -> bool {
        self.phase == Phase::Idle
    }

    /// All that was written is durable, and no request comes any more.
    pub fn is_final(&self) -> bool {
        self.final_done && self.is_quiet()
    }

    /// The merge is given up: returns the fragments that waited for a page; they go on without it.
    pub fn release(&mut self) -> Vec<Fragment> {
        self.order.clear();
        self.writing.clear();
        self.phase = Phase::Idle;
        self.pages.drain().flat_map(|(_, p)| p.waiters).collect()
    }

    /// Drops clean pages until there is room for one more.
    fn evict(&mut self) {
        let mut tries = self.order.len();
        while self.pages.len() >= CACHED_PAGES.min(self.limit()) && tries > 0 {
            tries -= 1;
            let Some(number) = self.order.pop_front() else { return };
            let keep = self.pages.get(&number).is_some_and(|p| {
                let unwritten = p.changed && !breaks(Breach::EvictChangedPage);
                !p.loaded || unwritten || p.publishing || p.pins > 0
            });
            if keep {
                self.order.push_back(number);
            } else if let Some(page) = self.pages.remove(&number) {
                self.changed_pages -= usize::from(page.changed);
            }
        }
    }

    /// A build for tests keeps few pages, so that pages are dropped and read anew.
    fn limit(&self) -> usize {
        if cfg!(test) { 2 } else { CACHED_PAGES }
    }
}

impl<S: Shared> Engine<S> {
    fn target(&mut self) -> Option<&mut Target> {
        self.background.as_mut()?.target.as_mut()
    }

    /// The page of the target's BAT is in memory. False: it is being read.
    pub(super) fn need_target_page(&mut self, number: u32, out: &mut Vec<Action>) -> bool {
        let Some(target) = self.target() else { return false };
        if target.raw.is_some() {
            return true;
        }
        if let Some(page) = target.pages.get(&number) {
            return page.loaded;
        }
        target.evict();
        let bytes = Box::new([0; BAT_PAGE]);
        let page = TargetPage { bytes, loaded: false, changed: false, publishing: false, pins: 0, waiters: Vec::new() };
        target.pages.insert(number, page);
        target.order.push_back(number);
        let level = target.level;
        let op = self.start_background_op(BackgroundOp::TargetPage { page: number });
        out.push(Action::ReadBat { op, level, page: number, len: BAT_PAGE as u32 });
        false
    }

    /// The write waits for a page of the target's BAT, which is being read.
    pub(super) fn wait_for_target_page(&mut self, number: u32, piece: Fragment) {
        self.add_pending(piece.req);
        match self.target().and_then(|t| t.pages.get_mut(&number)).filter(|p| !p.loaded) {
            Some(page) => page.waiters.push(piece),
            None => self.ready.push_back(piece),
        }
    }

    pub(in super::super) fn target_page_read(
        &mut self,
        number: u32,
        bytes: Result<&[u8], Errno>,
        out: &mut Vec<Action>,
    ) {
        let failed = self.background.as_ref().is_none_or(|b| b.has_failed());
        let Some(target) = self.target().filter(|_| !failed) else { return };
        let bytes = bytes.and_then(|b| <&[u8; BAT_PAGE]>::try_from(b).map_err(|_| IO));
        match bytes.and_then(|b| if target.is_sound(number, b) { Ok(b) } else { Err(IO) }) {
            Ok(bytes) => {
                let Some(page) = target.pages.get_mut(&number) else { return };
                page.bytes.copy_from_slice(bytes);
                page.loaded = true;
                page.changed = target.doubtful;
                target.changed_pages += usize::from(target.doubtful);
                let waiters = std::mem::take(&mut page.waiters);
                self.ready.extend(waiters);
            }
            Err(errno) => self.abort_background(errno, out),
        }
    }

    /// A host cluster of the target for a cluster whose page is loaded: its own or a new one. `None`: its file has to
    /// grow first.
    pub(super) fn take_target_cluster(&mut self, cluster: u32, out: &mut Vec<Action>) -> Option<u32> {
        let target = self.target()?;
        let own = target.host_cluster(cluster)?;
        if target.raw.is_some() || own != 0 {
            return Some(own);
        }
        if let Some(taken) = target.space.take(false) {
            return Some(taken.host_cluster);
        }
        if target.space.is_exhausted() {
            self.abort_background(TOO_BIG, out);
            return None;
        }
        if let Some(range) = target.space.grow(true) {
            let level = target.level;
            let op = self.start_background_op(BackgroundOp::Grow);
            let (file_off, len) = (self.file_off(range.start), self.file_off(range.end - range.start));
            out.push(Action::Fallocate { op, level, file_off, len });
        }
        None
    }

    pub(super) fn target_grown(&mut self, result: Result<(), Errno>, out: &mut Vec<Action>) {
        let Some(target) = self.target() else { return };
        match result {
            Ok(()) => target.space.grown(),
            // No space: the next attempt takes a smaller step.
            Err(NO_SPACE) if target.space.not_grown() => {}
            Err(errno) => {
                target.space.growing = None;
                self.abort_background(errno, out);
            }
        }
    }
}

//! The chain as one map: cluster -> (level, host cluster). It has a directory and pages, filled on demand from the BATs
//! of all levels, so that a lookup costs the same whatever the depth of the chain. A page covers the clusters of one
//! BAT page.

use super::api::Errno;
use super::request::Fragment;
use crate::format::bat::{ENTRIES, index_of, page_of, pages_for};

const LEVEL_SHIFT: u32 = 32;
const COUNT_SHIFT: u32 = 40;
const NO_LEVEL: u64 = 0xFF;

/// What is known of one cluster: where it is, how many operations are in flight on it, and marks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapEntry(u64);

impl MapEntry {
    /// A cluster operation has locked the cluster: see `cluster_op`.
    pub const LOCKED: u64 = 1 << 56;
    /// The top's entry differs from the durable one: see `pending`.
    pub const PENDING: u64 = 1 << 57;
    /// A level below the top has the cluster too.
    pub const LOWER: u64 = 1 << 58;

    pub const NONE: MapEntry = MapEntry(NO_LEVEL << LEVEL_SHIFT);

    /// Level and host cluster, `None` if no level has the cluster.
    pub fn location(self) -> Option<(u8, u32)> {
        let level = (self.0 >> LEVEL_SHIFT) & 0xFF;
        (level != NO_LEVEL).then_some((level as u8, self.0 as u32))
    }

    pub fn in_flight(self) -> u16 {
        (self.0 >> COUNT_SHIFT) as u16
    }

    pub fn is(self, mark: u64) -> bool {
        self.0 & mark != 0
    }

    pub fn set_location(&mut self, at: Option<(u8, u32)>) {
        let (level, host_cluster) = at.map_or((NO_LEVEL, 0), |(l, p)| (u64::from(l), p));
        self.0 = self.0 & !((0xFF << LEVEL_SHIFT) | 0xFFFF_FFFF) | level << LEVEL_SHIFT | u64::from(host_cluster);
    }

    pub fn mark(&mut self, mark: u64, on: bool) {
        if on { self.0 |= mark } else { self.0 &= !mark }
    }

    fn add(&mut self, up: bool) {
        let one = 1 << COUNT_SHIFT;
        self.0 = if up { self.0 + one } else { self.0 - one };
    }
}

/// One page of the map in memory.
pub struct Page {
    entry: Box<[MapEntry; ENTRIES]>,
    /// Operations in flight, cluster operations and pending updates that need the page to stay.
    pins: u32,
    used: bool,
}

/// A page whose BAT pages are being read.
pub struct Loading {
    pub page: Page,
    /// BAT reads not ended.
    pub left: u32,
    pub error: Option<Errno>,
    pub waiters: Vec<Fragment>,
}

enum Slot {
    Absent,
    Loading(Box<Loading>),
    Ready(Page),
}

impl Page {
    pub fn new() -> Page {
        Page { entry: Box::new([MapEntry::NONE; ENTRIES]), pins: 0, used: true }
    }

    pub fn entry(&mut self, cluster: u32) -> &mut MapEntry {
        &mut self.entry[index_of(cluster)]
    }

    pub fn pin(&mut self) {
        self.pins += 1;
    }
}

/// The directory of pages.
pub struct Map {
    dir: Vec<Slot>,
    resident: Vec<u32>,
    hand: usize,
    limit: usize,
}

impl Map {
    /// For so many clusters; at most about `limit` idle pages stay in memory.
    pub fn new(clusters: u64, limit: usize) -> Map {
        Map {
            dir: std::iter::repeat_with(|| Slot::Absent).take(pages_for(clusters)).collect(),
            resident: Vec::new(),
            hand: 0,
            limit: limit.max(1),
        }
    }

    pub fn is_loaded(&self, page: u32) -> bool {
        matches!(self.dir.get(page as usize), Some(Slot::Ready(_)))
    }

    pub fn loading(&mut self, page: u32) -> Option<&mut Loading> {
        match self.dir.get_mut(page as usize) {
            Some(Slot::Loading(l)) => Some(l),
            _ => None,
        }
    }

    /// Begins to load an absent page.
    pub fn begin(&mut self, page: u32, start: Page, left: u32) {
        let loading = Loading { page: start, left, error: None, waiters: Vec::new() };
        self.dir[page as usize] = Slot::Loading(Box::new(loading));
    }

    /// Ends the loading of a page: it is there, or absent again after an error.
    pub fn finish(&mut self, page: u32) -> (Vec<Fragment>, Option<Errno>) {
        match std::mem::replace(&mut self.dir[page as usize], Slot::Absent) {
            Slot::Loading(l) => {
                let Loading { page: content, error, waiters, .. } = *l;
                if error.is_none() {
                    self.evict();
                    self.dir[page as usize] = Slot::Ready(content);
                    self.resident.push(page);
                }
                (waiters, error)
            }
            other => {
                self.dir[page as usize] = other;
                (Vec::new(), None)
            }
        }
    }

    /// Drops clean idle pages (second chance) until there is room for one more, or all are needed.
    fn evict(&mut self) {
        let mut tries = self.resident.len() * 2;
        while self.resident.len() >= self.limit && tries > 0 {
            tries -= 1;
            if self.hand >= self.resident.len() {
                self.hand = 0;
            }
            let index = self.resident[self.hand] as usize;
            match &mut self.dir[index] {
                Slot::Ready(p) if p.pins == 0 && !p.used => {
                    self.dir[index] = Slot::Absent;
                    self.resident.swap_remove(self.hand);
                }
                Slot::Ready(p) => {
                    p.used = false;
                    self.hand += 1;
                }
                _ => self.hand += 1,
            }
        }
    }

    /// The entry of a cluster, if its page is loaded.
    pub fn get(&mut self, cluster: u32) -> Option<MapEntry> {
        match self.dir.get_mut(page_of(cluster) as usize) {
            Some(Slot::Ready(p)) => {
                p.used = true;
                Some(p.entry[index_of(cluster)])
            }
            _ => None,
        }
    }

    fn ready(&mut self, cluster: u32) -> Option<&mut Page> {
        match self.dir.get_mut(page_of(cluster) as usize) {
            Some(Slot::Ready(p)) => Some(p),
            _ => None,
        }
    }

    pub fn set_location(&mut self, cluster: u32, at: Option<(u8, u32)>) {
        if let Some(p) = self.ready(cluster) {
            p.entry[index_of(cluster)].set_location(at);
        }
    }

    /// A level below the top has the cluster, too, or will have it.
    pub fn set_lower(&mut self, cluster: u32) {
        if let Some(p) = self.ready(cluster) {
            p.entry[index_of(cluster)].mark(MapEntry::LOWER, true);
        }
    }

    /// Sets or clears a mark that pins the page.
    pub fn mark(&mut self, cluster: u32, mark: u64, on: bool) {
        if let Some(p) = self.ready(cluster) {
            let entry = &mut p.entry[index_of(cluster)];
            if entry.is(mark) != on {
                entry.mark(mark, on);
                if on { p.pins += 1 } else { p.pins -= 1 }
            }
        }
    }

    /// One more operation in flight on the cluster.
    pub fn enter(&mut self, cluster: u32) {
        if let Some(p) = self.ready(cluster) {
            p.entry[index_of(cluster)].add(true);
            p.pins += 1;
        }
    }

    /// One less; the entry as it is then.
    pub fn leave(&mut self, cluster: u32) -> MapEntry {
        match self.ready(cluster) {
            Some(p) => {
                let entry = &mut p.entry[index_of(cluster)];
                entry.add(false);
                p.pins -= 1;
                *entry
            }
            None => MapEntry::NONE,
        }
    }
}

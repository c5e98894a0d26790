//! The chain as one map: cluster -> (level, place), two levels, filled on demand from the BATs of all levels, so that
//! a lookup costs the same whatever the depth. A page of the map covers the clusters of one BAT page.

use super::api::{BAT_PAGE, Errno};
use super::request::Seg;

/// BAT entries in a page.
pub const ENTRIES: usize = BAT_PAGE / 4;
/// The header takes the room of this many entries.
pub const HEADER_ENTRIES: u64 = 16;

const LEVEL_SHIFT: u32 = 32;
const COUNT_SHIFT: u32 = 40;
const NO_LEVEL: u64 = 0xFF;

/// What is known of one cluster: where it is, how many operations are in flight on it, and marks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ent(u64);

impl Ent {
    /// A job has the cluster: see `job`.
    pub const HELD: u64 = 1 << 56;
    /// The top's entry differs from the durable one: see `dirty`.
    pub const DIRTY: u64 = 1 << 57;
    /// A level below the top has the cluster too.
    pub const LOWER: u64 = 1 << 58;

    pub const NONE: Ent = Ent(NO_LEVEL << LEVEL_SHIFT);

    /// Level and place, `None` if no level has the cluster.
    pub fn place(self) -> Option<(u8, u32)> {
        let level = (self.0 >> LEVEL_SHIFT) & 0xFF;
        (level != NO_LEVEL).then_some((level as u8, self.0 as u32))
    }

    pub fn in_flight(self) -> u16 {
        (self.0 >> COUNT_SHIFT) as u16
    }

    pub fn is(self, mark: u64) -> bool {
        self.0 & mark != 0
    }

    pub fn set_place(&mut self, at: Option<(u8, u32)>) {
        let (level, place) = at.map_or((NO_LEVEL, 0), |(l, p)| (u64::from(l), p));
        self.0 = self.0 & !((0xFF << LEVEL_SHIFT) | 0xFFFF_FFFF) | level << LEVEL_SHIFT | u64::from(place);
    }

    pub fn mark(&mut self, mark: u64, on: bool) {
        if on { self.0 |= mark } else { self.0 &= !mark }
    }

    fn add(&mut self, up: bool) {
        let one = 1 << COUNT_SHIFT;
        self.0 = if up { self.0 + one } else { self.0 - one };
    }
}

/// Index of the page that holds the entry of a cluster.
pub fn page_of(cluster: u32) -> u32 {
    ((u64::from(cluster) + HEADER_ENTRIES) / ENTRIES as u64) as u32
}

fn slot_of(cluster: u32) -> usize {
    ((u64::from(cluster) + HEADER_ENTRIES) % ENTRIES as u64) as usize
}

/// Clusters whose entries stand in a page (the end may lie beyond the device).
pub fn clusters_of(page: u32) -> std::ops::Range<u64> {
    let end = (u64::from(page) + 1) * ENTRIES as u64 - HEADER_ENTRIES;
    let start = (u64::from(page) * ENTRIES as u64).saturating_sub(HEADER_ENTRIES);
    start..end
}

/// One page of the map in memory.
pub struct Page {
    ent: Box<[Ent; ENTRIES]>,
    /// Operations, jobs and changes that need the page to stay.
    pins: u32,
    used: bool,
}

/// A page whose BAT pages are being read.
pub struct Loading {
    pub page: Page,
    /// BAT reads not ended.
    pub left: u32,
    pub error: Option<Errno>,
    pub waiters: Vec<Seg>,
}

enum Slot {
    Absent,
    Loading(Box<Loading>),
    Ready(Page),
}

impl Page {
    pub fn new() -> Page {
        Page { ent: Box::new([Ent::NONE; ENTRIES]), pins: 0, used: true }
    }

    pub fn ent(&mut self, cluster: u32) -> &mut Ent {
        &mut self.ent[slot_of(cluster)]
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
        let pages = clusters.checked_sub(1).map_or(0, |last| page_of(last as u32) as usize + 1);
        Map {
            dir: std::iter::repeat_with(|| Slot::Absent).take(pages).collect(),
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
    pub fn finish(&mut self, page: u32) -> (Vec<Seg>, Option<Errno>) {
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
    pub fn get(&mut self, cluster: u32) -> Option<Ent> {
        match self.dir.get_mut(page_of(cluster) as usize) {
            Some(Slot::Ready(p)) => {
                p.used = true;
                Some(p.ent[slot_of(cluster)])
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

    pub fn set_place(&mut self, cluster: u32, at: Option<(u8, u32)>) {
        if let Some(p) = self.ready(cluster) {
            p.ent[slot_of(cluster)].set_place(at);
        }
    }

    /// Sets or clears a mark that pins the page.
    pub fn mark(&mut self, cluster: u32, mark: u64, on: bool) {
        if let Some(p) = self.ready(cluster) {
            let ent = &mut p.ent[slot_of(cluster)];
            if ent.is(mark) != on {
                ent.mark(mark, on);
                if on { p.pins += 1 } else { p.pins -= 1 }
            }
        }
    }

    /// One more operation in flight on the cluster.
    pub fn enter(&mut self, cluster: u32) {
        if let Some(p) = self.ready(cluster) {
            p.ent[slot_of(cluster)].add(true);
            p.pins += 1;
        }
    }

    /// One less; the entry as it is then.
    pub fn leave(&mut self, cluster: u32) -> Ent {
        match self.ready(cluster) {
            Some(p) => {
                let ent = &mut p.ent[slot_of(cluster)];
                ent.add(false);
                p.pins -= 1;
                *ent
            }
            None => Ent::NONE,
        }
    }
}

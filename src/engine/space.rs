//! Space in the top's file: clusters that are free to use, and those allocated ahead at its end.

use std::collections::BTreeMap;
use std::ops::Range;

use super::api::AllocConfig;
use super::breach::{Breach, breaks};
use super::request::Fragment;

/// An allocated cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Taken {
    pub host_cluster: u32,
    /// It was allocated in this run and never written: it reads as zero.
    pub zero: bool,
}

/// Free clusters of the file.
pub struct Space {
    /// Start -> end; content unknown.
    free: BTreeMap<u32, u32>,
    free_count: u32,
    /// Allocated ahead at the end of the file, reads as zero. Everything below its start is used or in `free`.
    fresh: Range<u32>,
    ahead: u32,
    limit: u32,
    /// The limit that the disk's owner has set.
    cap: u32,
    /// A growing of the file is under way: that many clusters.
    pub growing: Option<u32>,
    /// The last attempt failed with ENOSPC: smaller steps until one succeeds.
    step: u32,
    pub no_space: bool,
    /// No further attempt to grow the file is made until the next tick.
    pub blocked: bool,
    /// The file is being cut: it does not grow meanwhile.
    pub cutting: bool,
    pub waiters: Vec<Fragment>,
}

impl Space {
    pub fn new(config: &AllocConfig) -> Space {
        let free: BTreeMap<u32, u32> = config.free.iter().filter(|r| !r.is_empty()).map(|r| (r.start, r.end)).collect();
        Space {
            free_count: free.iter().map(|(s, e)| e - s).sum(),
            free,
            fresh: config.end..config.end,
            ahead: config.ahead.max(1),
            limit: config.limit,
            cap: u32::MAX,
            growing: None,
            step: config.ahead.max(1),
            no_space: false,
            blocked: false,
            cutting: false,
            waiters: Vec::new(),
        }
    }

    /// A cluster: a freed one first (keeps the file small), or with `want_zero` rather one that reads as zero.
    pub fn take(&mut self, want_zero: bool) -> Option<Taken> {
        if (want_zero || self.free.is_empty())
            && self.fresh.start < self.cap
            && let Some(at) = self.fresh.next()
        {
            return Some(Taken { host_cluster: at, zero: true });
        }
        let (start, end) = self.free.pop_first()?;
        if start + 1 < end {
            self.free.insert(start + 1, end);
        }
        self.free_count -= 1;
        Some(Taken { host_cluster: start, zero: false })
    }

    /// Takes this cluster, if it is the one that [`take`](Self::take) would return.
    pub fn take_at(&mut self, at: u32) -> bool {
        let next = self.free.first_key_value().map_or(self.fresh.start, |(start, _)| *start);
        let there = next == at && (!self.free.is_empty() || !self.fresh.is_empty());
        there && self.take(false).is_some()
    }

    /// The lowest free cluster, if it lies below `limit`.
    pub fn take_below(&mut self, limit: u32) -> Option<u32> {
        let (&start, _) = self.free.first_key_value().filter(|(start, _)| **start < limit)?;
        self.take(false).map(|t| t.host_cluster).filter(|at| *at == start)
    }

    /// Clusters that the file has, used or not.
    pub fn file_end(&self) -> u32 {
        self.fresh.end
    }

    /// The cluster is free again; its content counts as unknown.
    pub fn give(&mut self, at: u32) {
        let (mut start, mut end) = (at, at + 1);
        if let Some((&s, &e)) = self.free.range(..at).next_back() {
            debug_assert!(e <= at, "cluster {at} freed twice");
            if e == at {
                start = s;
                self.free.remove(&s);
            }
        }
        if let Some(e) = self.free.remove(&end) {
            end = e;
        }
        self.free.insert(start, end);
        self.free_count += 1;
    }

    /// Clusters to allocate at the end of the file now, if that should begin.
    pub fn grow(&mut self, urgent: bool) -> Option<Range<u32>> {
        if self.growing.is_some() || self.cutting && !breaks(Breach::GrowDuringCut) {
            return None;
        }
        // Ahead-allocation goes on only where allocation has begun: a disk that is only read does not grow.
        let low = !self.fresh.is_empty() && (self.fresh.len() as u32) * 2 < self.ahead;
        if !(urgent || low && !self.no_space) {
            return None;
        }
        let n = self.step.min(self.limit.min(self.cap).saturating_sub(self.fresh.end));
        if n == 0 {
            return None;
        }
        self.growing = Some(n);
        Some(self.fresh.end..self.fresh.end + n)
    }

    /// Of the file so many clusters are used at most, from its beginning. What is in use already stays.
    pub fn set_cap(&mut self, clusters: u32) {
        self.cap = clusters;
    }

    /// The file cannot grow any more whatever the space (version 1 at 2^32 sectors, or the owner's limit).
    pub fn is_exhausted(&self) -> bool {
        self.growing.is_none() && self.fresh.end >= self.limit.min(self.cap)
    }

    pub fn grown(&mut self) {
        if let Some(n) = self.growing.take() {
            self.fresh.end += n;
            self.step = (self.step.saturating_mul(2)).clamp(1, self.ahead);
            self.no_space = false;
            self.blocked = false;
        }
    }

    /// ENOSPC. True: a smaller step is worth a try.
    pub fn not_grown(&mut self) -> bool {
        let n = self.growing.take().unwrap_or(1);
        self.step = (n / 8).max(1);
        if n == 1 {
            self.no_space = true;
            self.blocked = true;
        }
        n > 1
    }

    /// One more than the highest cluster in use, if all in use stood side by side.
    pub fn packed_end(&self) -> u32 {
        self.fresh.start - self.free_count
    }

    /// Whether there is a free cluster before this one.
    pub fn has_free_before(&self, limit: u32) -> bool {
        self.free.first_key_value().is_some_and(|(start, _)| *start < limit)
    }

    /// Free clusters before this one. Looks at all of them.
    pub fn free_before(&self, limit: u32) -> u32 {
        self.free.range(..limit).map(|(start, end)| end.min(&limit) - start).sum()
    }

    /// The file is to be cut behind the last cluster in use (a broken rule: here). Returns the clusters that go, which are
    /// not given out any more. There may be none: still, a growing that failed may have made the file longer.
    pub fn begin_cut(&mut self, early: Option<u32>) -> Range<u32> {
        let cut = early.unwrap_or(self.fresh.end).min(self.end())..self.fresh.end;
        if !breaks(Breach::AllocateInCut) {
            if let Some((&start, &end)) = self.free.last_key_value()
                && end == self.fresh.start
            {
                self.free.remove(&start);
                self.free_count -= end - start;
            }
            self.fresh = cut.start..cut.start;
        }
        self.cutting = true;
        cut
    }

    /// The file has as many clusters as before. Those that were to go are free, with unknown content.
    pub fn not_cut(&mut self, old_end: u32) {
        self.cutting = false;
        let start = self.fresh.start;
        self.fresh = old_end..old_end;
        for at in start..old_end {
            self.give(at);
        }
    }

    /// One more than the highest cluster in use.
    pub fn end(&self) -> u32 {
        match self.free.last_key_value() {
            Some((&start, &end)) if end == self.fresh.start => start,
            _ => self.fresh.start,
        }
    }

    /// Free clusters below [`end`](Self::end).
    pub fn free_below_end(&self) -> u32 {
        self.free_count - (self.fresh.start - self.end())
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;

    fn space(end: u32, free: Vec<Range<u32>>) -> Space {
        Space::new(&AllocConfig { end, free, ahead: 8, limit: 100 })
    }

    #[test]
    fn freed_clusters_come_first_and_join() {
        let mut s = space(10, vec![2..3, 5..7]);
        assert_eq!(s.take(false), Some(Taken { host_cluster: 2, zero: false }));
        s.give(4);
        s.give(3);
        s.give(2);
        assert_eq!(s.free.iter().map(|(a, b)| (*a, *b)).collect::<Vec<_>>(), [(2, 7)]);
        assert_eq!((s.end(), s.free_below_end()), (10, 5));
    }

    #[test]
    fn the_end_ignores_free_clusters_below_it() {
        let mut s = space(10, vec![8..10]);
        assert_eq!((s.end(), s.free_below_end()), (8, 0));
        s.give(7);
        assert_eq!(s.end(), 7);
    }

    #[test]
    fn without_space_the_steps_shrink_to_one() {
        let mut s = space(10, vec![]);
        assert_eq!(s.grow(true), Some(10..18));
        assert!(s.not_grown() && !s.no_space);
        assert_eq!(s.grow(true), Some(10..11));
        assert!(!s.not_grown() && s.no_space);
        assert_eq!(s.grow(true), Some(10..11));
        s.grown();
        assert_eq!(s.take(true), Some(Taken { host_cluster: 10, zero: true }));
        assert!(!s.no_space);
    }
}

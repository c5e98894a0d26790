//! What a sector of the device may hold: the history of its writes, as seen from outside.
//!
//! A write is superseded at a horizon `t` if another one began after it had ended and was itself over before `t`.
//! A read that began at `t` may return any write that is not superseded at `t`; after a power cut a sector may hold
//! any write that is not superseded at the arrival of the last flush that was answered well.

use crate::disk::Stamp;

const OPEN: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
pub struct Write {
    pub value: Stamp,
    start: u64,
    end: u64,
    /// It failed or its outcome is unknown: it supersedes nothing.
    weak: bool,
    /// The request, while it is in flight.
    tag: u64,
}

#[derive(Default)]
pub struct Oracle {
    sectors: Vec<Vec<Write>>,
    /// Arrival of the latest flush that was answered well.
    pub flushed: u64,
}

/// Start of the latest write that was over before `horizon`: whatever ended before that is superseded.
fn newest(all: &[Write], horizon: u64) -> u64 {
    all.iter().filter(|n| !n.weak && n.end < horizon).map(|n| n.start).max().unwrap_or(0)
}

impl Oracle {
    pub fn new(sectors: u64) -> Oracle {
        Oracle { sectors: vec![Vec::new(); sectors as usize], flushed: 0 }
    }

    pub fn is_touched(&self, sector: u64) -> bool {
        !self.sectors[sector as usize].is_empty()
    }

    /// What the sector held before anything happened.
    pub fn begin_with(&mut self, sector: u64, value: Stamp) {
        let list = &mut self.sectors[sector as usize];
        if list.is_empty() {
            list.push(Write { value, start: 0, end: 0, weak: false, tag: 0 });
        }
    }

    /// A write arrives. `oldest` is the arrival of the oldest read in flight: what no read or crash can ask for any
    /// more is forgotten.
    pub fn write_begins(&mut self, sector: u64, value: Stamp, tag: u64, now: u64, oldest: u64) {
        let horizon = oldest.min(self.flushed);
        let list = &mut self.sectors[sector as usize];
        if list.len() >= 12 {
            let newest = newest(list, horizon);
            list.retain(|w| w.end >= newest);
        }
        list.push(Write { value, start: now, end: OPEN, weak: false, tag });
    }

    /// It is answered.
    pub fn write_ends(&mut self, sector: u64, tag: u64, now: u64, well: bool) {
        for w in self.sectors[sector as usize].iter_mut().filter(|w| w.tag == tag && w.end == OPEN) {
            w.end = now;
            w.weak = !well;
            w.tag = 0;
        }
    }

    /// May the sector be found with this value at that horizon?
    pub fn admits(&self, sector: u64, value: Stamp, horizon: u64) -> bool {
        let list = &self.sectors[sector as usize];
        let newest = newest(list, horizon);
        list.iter().any(|w| w.value == value && w.end >= newest)
    }

    /// The sector held this value at some time that is still known.
    pub fn ever_held(&self, sector: u64, value: Stamp) -> bool {
        let list = &self.sectors[sector as usize];
        // Older history is forgotten when there are many writes.
        list.len() >= 11 || list.iter().any(|w| w.value == value) || list.first().is_some_and(|w| w.start > 0)
    }

    /// A read that began at `start` and ended now returned this value. If no write overlaps it, later reads must
    /// return the same.
    pub fn read_saw(&mut self, sector: u64, value: Stamp, start: u64, now: u64) {
        let list = &mut self.sectors[sector as usize];
        let alone = list.iter().all(|w| w.end < start);
        let newest = newest(list, start);
        let open_to_doubt = list.iter().filter(|w| w.end >= newest).nth(1).is_some();
        if alone && open_to_doubt {
            list.push(Write { value, start, end: now, weak: false, tag: 0 });
        }
    }

    /// After a power cut the stable content is known: nothing else may be found from now on.
    pub fn settle(&mut self, sector: u64, value: Stamp, now: u64) {
        let list = &mut self.sectors[sector as usize];
        list.clear();
        list.push(Write { value, start: now, end: now, weak: false, tag: 0 });
    }

    /// For messages.
    pub fn history(&self, sector: u64) -> String {
        let list = &self.sectors[sector as usize];
        let mut text = format!("flushed up to {}:", self.flushed);
        for w in list {
            let end = if w.end == OPEN { "..".to_string() } else { w.end.to_string() };
            let weak = if w.weak { " failed" } else { "" };
            let old = if w.end < newest(list, self.flushed) { " (gone)" } else { "" };
            text += &format!(" {:#x} [{},{}]{}{};", w.value, w.start, end, weak, old);
        }
        text
    }
}

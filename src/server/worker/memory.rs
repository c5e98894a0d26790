//! Where the buffers for requests, bounces and pages of BATs lie: all of the worker's I/O memory.
//!
//! A request is read from the queue into a big buffer, because its length is not known before. Short ones move on into
//! a small buffer at once, so that the big one is free for the next; few big ones are then enough, and their memory
//! stays warm in the caches.
//!
//! An idle device has the memory that one can do with. Behind it lies address space for more buffers, which
//! [`Pool`](super::pool::Pool) fills under load and empties when the device is idle.
#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;

use crate::engine::api::{BAT_PAGE, BounceId};
use crate::server::transport::Limits;
use crate::sys::arena::{Arena, Span};

/// Requests in flight that the worker can know, more than any block device has.
pub const REQUESTS: usize = 512;
/// A request of up to so many bytes is kept in a small buffer.
pub const SMALL: usize = 16 << 10;
/// Big buffers of an idle device.
pub const BIGS: usize = 4;
pub const SMALLS: usize = 160;
/// Bounce buffers of the engine at most, and the bytes of each.
const BOUNCES: usize = 4;
pub const BOUNCE: usize = 1 << 20;
/// Bounce buffers of a chain of one image, which has nothing to copy up or to merge.
const BOUNCES_ALONE: usize = 1;
/// Pages of BATs in flight, for each I/O thread.
pub const PAGES: usize = 32;
/// Memory that comes later begins on a huge page of its own.
const ALIGN: usize = 2 << 20;
/// Zeroes for file systems that cannot make them.
const ZEROES: usize = 256 << 10;

/// Further big buffers at most: with the others one for each request of the block device.
pub fn max_extras(limits: Limits) -> usize {
    limits.in_flight.saturating_sub(BIGS)
}

/// Bounce buffers of a chain of so many images.
pub fn bounces(levels: usize) -> usize {
    if levels > 1 { BOUNCES } else { BOUNCES_ALONE }
}

/// Where each kind of buffer begins; the big ones come first.
#[derive(Clone, Copy, Debug)]
struct Places {
    /// The first of them.
    bounce: usize,
    smalls: usize,
    pages: usize,
    zeroes: usize,
    /// The other bounce buffers: from here on there is memory only where it was asked for.
    bounces: usize,
    extras: usize,
}

impl Places {
    fn new(threads: usize, limits: Limits) -> Places {
        let bounce = BIGS * limits.max_io;
        let smalls = bounce + BOUNCES_ALONE * BOUNCE;
        let pages = smalls + SMALLS * SMALL;
        let zeroes = pages + threads * PAGES * BAT_PAGE;
        let bounces = (zeroes + ZEROES).next_multiple_of(ALIGN);
        let extras = (bounces + (BOUNCES - BOUNCES_ALONE) * BOUNCE).next_multiple_of(ALIGN);
        Places { bounce, smalls, pages, zeroes, bounces, extras }
    }
}

/// A data buffer of a request: big ones first, then small ones, then extra ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BufId(u16);

impl BufId {
    /// No buffer.
    pub const NONE: BufId = BufId(u16::MAX);

    pub fn raw(self) -> u16 {
        self.0
    }

    pub fn from_raw(raw: u16) -> BufId {
        BufId(raw)
    }

    pub fn is_big(self) -> bool {
        usize::from(self.0) < BIGS
    }

    /// Which of the extra ones it is.
    pub fn extra_number(self) -> Option<usize> {
        self.is_extra().then(|| usize::from(self.0) - BIGS - SMALLS)
    }

    pub fn extra(n: usize) -> BufId {
        BufId((BIGS + SMALLS + n) as u16)
    }

    pub fn is_extra(self) -> bool {
        usize::from(self.0) >= BIGS + SMALLS && self != BufId::NONE
    }
}

/// The memory and how it is divided.
#[derive(Clone, Debug)]
pub struct Memory {
    pub arena: Arc<Arena>,
    pub limits: Limits,
    places: Places,
}

impl Memory {
    /// Maps everything, and populates what an idle device needs, for so many I/O threads, a queue of these limits and a
    /// chain of so many images; `shared`: where a successor finds it. The places do not depend on the chain.
    pub fn new(threads: usize, shared: bool, limits: Limits, levels: usize) -> io::Result<Memory> {
        let places = Places::new(threads, limits);
        let make = if shared { Arena::new_shared } else { Arena::new };
        let reserve = places.extras - places.bounces + max_extras(limits) * limits.max_io;
        let arena = make(places.bounces, reserve)?;
        let more = bounces(levels) - BOUNCES_ALONE;
        if more > 0 {
            arena.open(Span { at: places.bounces, len: more * BOUNCE })?;
        }
        Ok(Memory { arena, limits, places })
    }

    /// The extra buffers from number `first` up to `end`.
    pub fn extras(&self, first: usize, end: usize) -> Span {
        let big = self.limits.max_io;
        Span { at: self.places.extras + first * big, len: (end - first) * big }
    }

    /// Numbers that are the same where every buffer lies at the same place.
    pub fn shape(&self) -> [u64; 6] {
        [REQUESTS, BIGS, SMALLS, SMALL, self.arena.bytes(), self.places.extras].map(|n| n as u64)
    }

    /// Bytes that fit into a buffer; there may be none, or none of that number.
    pub fn room(&self, id: BufId) -> usize {
        if usize::from(id.0) < BIGS + SMALLS + max_extras(self.limits) { self.buffer(id).len } else { 0 }
    }

    pub fn buffer(&self, id: BufId) -> Span {
        let (n, big) = (usize::from(id.0), self.limits.max_io);
        if id.is_big() {
            Span { at: n * big, len: big }
        } else if n < BIGS + SMALLS {
            Span { at: self.places.smalls + (n - BIGS) * SMALL, len: SMALL }
        } else {
            assert!(n < BIGS + SMALLS + max_extras(self.limits), "there is no buffer {n}");
            self.extras(n - BIGS - SMALLS, n - BIGS - SMALLS + 1)
        }
    }

    pub fn bounce(&self, id: BounceId) -> Span {
        let n = usize::from(id.0);
        assert!(n < BOUNCES, "there is no bounce buffer {n}");
        let first = match n.checked_sub(BOUNCES_ALONE) {
            None => self.places.bounce + n * BOUNCE,
            Some(n) => self.places.bounces + n * BOUNCE,
        };
        Span { at: first, len: BOUNCE }
    }

    /// The buffers for pages of BATs that belong to an I/O thread.
    pub fn pages(&self, thread: usize) -> Vec<Span> {
        let first = self.places.pages + thread * PAGES * BAT_PAGE;
        (0..PAGES).map(|i| Span { at: first + i * BAT_PAGE, len: BAT_PAGE }).collect()
    }

    /// Bytes that are zero and never change.
    pub fn zeroes(&self) -> Span {
        Span { at: self.places.zeroes, len: ZEROES }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { max_io: 1 << 20, in_flight: 128 };

    #[test]
    fn buffers_do_not_overlap() {
        for levels in [1, 2] {
            let m = Memory::new(2, false, LIMITS, levels).unwrap();
            let mut all: Vec<Span> = (0..BIGS + SMALLS).map(|i| m.buffer(BufId(i as u16))).collect();
            all.extend((0..bounces(levels)).map(|i| m.bounce(BounceId(i as u16))));
            all.extend(m.pages(0));
            all.extend(m.pages(1));
            all.push(m.zeroes());
            all.sort_by_key(|s| s.at);
            assert!(all.windows(2).all(|w| w[0].at + w[0].len <= w[1].at));
            // There is memory behind each of them.
            all.iter().for_each(|s| m.arena.zero(*s));
            assert!(all.last().is_some_and(|s| s.at + s.len <= m.places.extras));
            assert!(all.iter().all(|s| s.at % 4096 == 0));
            let extras = max_extras(LIMITS);
            assert_eq!(m.extras(0, extras).at, m.places.extras);
            assert_eq!(m.buffer(BufId::extra(extras - 1)), m.extras(extras - 1, extras));
            assert!(m.places.extras + extras * LIMITS.max_io <= m.arena.bytes());
        }
    }

    #[test]
    fn an_idle_device_of_one_image_has_eight_mebibytes() {
        assert_eq!(Places::new(2, LIMITS).bounces, 8 << 20);
    }
}

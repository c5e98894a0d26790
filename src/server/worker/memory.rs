//! Buffers for requests, bounces and pages of BATs: all of the worker's I/O memory, made once.
//!
//! A request is read from the queue into a big buffer, because its length is not known before. Short ones move on into
//! a small buffer at once, so that the big one is free for the next; few big ones are then enough, and their memory
//! stays warm in the caches.
//!
//! While the host file system is full, writes that wait for space keep their buffers, and reads must go on: then, and
//! only then, more big buffers are made, one for every request that the block device can have in flight.
#![forbid(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use crate::engine::api::{BAT_PAGE, BounceId};
use crate::server::transport::Limits;
use crate::sys::arena::{Arena, Span};

use super::locked;

/// Requests in flight that the worker can know, more than any block device has.
pub const REQUESTS: usize = 512;
/// A request of up to so many bytes is kept in a small buffer.
pub const SMALL: usize = 16 << 10;
const BIGS: usize = 16;
const SMALLS: usize = 160;
/// Bounce buffers of the engine, and the bytes of each.
pub const BOUNCES: usize = 4;
pub const BOUNCE: usize = 1 << 20;
/// Pages of BATs in flight, for each I/O thread.
pub const PAGES: usize = 32;
/// Zeroes for file systems that cannot make them.
const ZEROES: usize = 256 << 10;

/// So many are made at once.
const EXTRA_STEP: usize = 8;

/// Further big buffers while writes wait for space: with the others one for each request of the block device.
fn extras(limits: Limits) -> usize {
    limits.in_flight.saturating_sub(BIGS)
}

/// Where each kind of buffer begins; the big ones come first.
#[derive(Clone, Copy, Debug)]
struct Places {
    bounces: usize,
    smalls: usize,
    pages: usize,
    zeroes: usize,
    /// Behind all others.
    extras: usize,
}

impl Places {
    fn new(threads: usize, limits: Limits) -> Places {
        let bounces = BIGS * limits.max_io;
        let smalls = bounces + BOUNCES * BOUNCE;
        let pages = smalls + SMALLS * SMALL;
        let zeroes = pages + threads * PAGES * BAT_PAGE;
        Places { bounces, smalls, pages, zeroes, extras: (zeroes + ZEROES).next_multiple_of(2 << 20) }
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

    fn is_big(self) -> bool {
        usize::from(self.0) < BIGS
    }

    /// Which of the extra ones it is.
    fn extra_number(self) -> Option<usize> {
        self.is_extra().then(|| usize::from(self.0) - BIGS - SMALLS)
    }

    fn extra(n: usize) -> BufId {
        BufId((BIGS + SMALLS + n) as u16)
    }

    fn is_extra(self) -> bool {
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
    /// Maps and populates everything for so many I/O threads and a queue of these limits; `shared`: where a successor
    /// finds it.
    pub fn new(threads: usize, shared: bool, limits: Limits) -> io::Result<Memory> {
        let places = Places::new(threads, limits);
        let make = if shared { Arena::new_shared } else { Arena::new };
        Ok(Memory { arena: make(places.extras, extras(limits) * limits.max_io)?, limits, places })
    }

    /// Numbers that are the same where every buffer lies at the same place.
    pub fn shape(&self) -> [u64; 6] {
        [REQUESTS, BIGS, SMALLS, SMALL, self.arena.bytes(), self.places.extras].map(|n| n as u64)
    }

    /// Bytes that fit into a buffer; there may be none, or none of that number.
    pub fn room(&self, id: BufId) -> usize {
        if usize::from(id.0) < BIGS + SMALLS + extras(self.limits) { self.buffer(id).len } else { 0 }
    }

    pub fn buffer(&self, id: BufId) -> Span {
        let (n, big) = (usize::from(id.0), self.limits.max_io);
        if id.is_big() {
            Span { at: n * big, len: big }
        } else if n < BIGS + SMALLS {
            Span { at: self.places.smalls + (n - BIGS) * SMALL, len: SMALL }
        } else {
            assert!(n < BIGS + SMALLS + extras(self.limits), "there is no buffer {n}");
            Span { at: self.places.extras + (n - BIGS - SMALLS) * big, len: big }
        }
    }

    pub fn bounce(&self, id: BounceId) -> Span {
        let n = usize::from(id.0);
        assert!(n < BOUNCES, "there is no bounce buffer {n}");
        Span { at: self.places.bounces + n * BOUNCE, len: BOUNCE }
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

/// What is free. Each I/O thread has one of its own, so that it seldom has to ask the common one.
#[derive(Debug, Default)]
pub struct Stash {
    bigs: Vec<BufId>,
    smalls: Vec<BufId>,
    requests: Vec<u32>,
}

/// A thread keeps no more than its share, so that the others find something.
const SHARE_BIGS: usize = BIGS / 2;
const SHARE_SMALLS: usize = SMALLS / 2;
const SHARE_REQUESTS: usize = REQUESTS / 2;

impl Stash {
    fn with_room() -> Stash {
        Stash {
            bigs: Vec::with_capacity(BIGS),
            smalls: Vec::with_capacity(SMALLS),
            requests: Vec::with_capacity(REQUESTS),
        }
    }

    /// A big buffer and a request number without which nothing can be read; they stay in the stash.
    pub fn next(&self) -> Option<(BufId, u32)> {
        Some((*self.bigs.last()?, *self.requests.last()?))
    }

    /// Takes the request number that [`next`](Self::next) showed, and the big buffer.
    pub fn take_big(&mut self) {
        self.bigs.pop();
        self.requests.pop();
    }

    /// Takes the request number that [`next`](Self::next) showed, and no buffer.
    pub fn take_none(&mut self) {
        self.requests.pop();
    }

    /// Takes the request number that [`next`](Self::next) showed, and a small buffer if there is one.
    pub fn take_small(&mut self) -> Option<BufId> {
        let small = self.smalls.pop()?;
        self.requests.pop();
        Some(small)
    }

    /// Takes back what a request held.
    pub fn give(&mut self, buf: BufId, request: u32) {
        self.requests.push(request);
        if buf.is_big() || buf.is_extra() {
            self.bigs.push(buf);
        } else if buf != BufId::NONE {
            self.smalls.push(buf);
        }
    }
}

/// What is free and in no thread's stash.
#[derive(Debug)]
pub struct Common {
    stash: Mutex<Stash>,
    /// How many extra buffers there are.
    extras: AtomicUsize,
}

impl Common {
    pub fn new() -> Common {
        let mut all = Stash::with_room();
        // Last in, first out: the low ones are used most.
        all.bigs.extend((0..BIGS).rev().map(|i| BufId(i as u16)));
        all.smalls.extend((BIGS..BIGS + SMALLS).rev().map(|i| BufId(i as u16)));
        all.requests.extend((0..REQUESTS as u32).rev());
        Common { stash: Mutex::new(all), extras: AtomicUsize::new(0) }
    }

    /// A stash for one thread with its share.
    pub fn share(&self) -> Stash {
        let mut mine = Stash::with_room();
        self.refill(&mut mine);
        mine
    }

    /// Fills up a thread's stash to its share, as far as there is something.
    pub fn refill(&self, mine: &mut Stash) {
        let mut all = locked(&self.stash);
        top_up(&mut mine.bigs, &mut all.bigs, SHARE_BIGS);
        top_up(&mut mine.smalls, &mut all.smalls, SHARE_SMALLS);
        top_up(&mut mine.requests, &mut all.requests, SHARE_REQUESTS);
    }

    /// Takes from a thread's stash what exceeds its share, and extra buffers.
    pub fn level(&self, mine: &mut Stash) {
        if self.extras.load(Relaxed) > 0 {
            let mut all = locked(&self.stash);
            all.bigs.extend(mine.bigs.extract_if(.., |b| b.is_extra()));
        }
        if mine.bigs.len() > SHARE_BIGS || mine.smalls.len() > SHARE_SMALLS || mine.requests.len() > SHARE_REQUESTS {
            let mut all = locked(&self.stash);
            cut(&mut mine.bigs, &mut all.bigs, SHARE_BIGS);
            cut(&mut mine.smalls, &mut all.smalls, SHARE_SMALLS);
            cut(&mut mine.requests, &mut all.requests, SHARE_REQUESTS);
        }
    }

    /// Makes some extra big buffers, if there may be more of them; how many there are then.
    pub fn grow(&self, memory: &Memory) -> io::Result<usize> {
        let mut all = locked(&self.stash);
        let now = self.extras.load(Relaxed);
        let then = (now + EXTRA_STEP).min(extras(memory.limits));
        for n in now..then {
            memory.arena.open(memory.buffer(BufId::extra(n)))?;
            all.bigs.push(BufId::extra(n));
            self.extras.store(n + 1, Relaxed);
        }
        Ok(then)
    }

    /// Gives the memory of extra buffers back, the last first, as far as they are not in use.
    pub fn shrink(&self, memory: &Memory) {
        if self.extras.load(Relaxed) == 0 {
            return;
        }
        let mut all = locked(&self.stash);
        while let Some(n) = self.extras.load(Relaxed).checked_sub(1)
            && let Some(at) = all.bigs.iter().position(|b| *b == BufId::extra(n))
        {
            all.bigs.swap_remove(at);
            memory.arena.close(memory.buffer(BufId::extra(n)));
            self.extras.store(n, Relaxed);
        }
    }

    /// Takes this request number, and this buffer if it is one; false: they are in use.
    pub fn take(&self, memory: &Memory, buf: BufId, request: u32) -> io::Result<bool> {
        while buf.extra_number().is_some_and(|n| n >= self.extras.load(Relaxed)) {
            self.grow(memory)?;
        }
        let mut all = locked(&self.stash);
        let Some(request) = all.requests.iter().position(|r| *r == request) else { return Ok(false) };
        if buf != BufId::NONE {
            let free = if buf.is_big() || buf.is_extra() { &mut all.bigs } else { &mut all.smalls };
            let Some(at) = free.iter().position(|b| *b == buf) else { return Ok(false) };
            // The order stays: the low ones are used most.
            free.remove(at);
        }
        all.requests.remove(request);
        Ok(true)
    }

    /// For threads without a stash.
    pub fn give(&self, buf: BufId, request: u32) {
        locked(&self.stash).give(buf, request);
    }
}

fn top_up<T>(to: &mut Vec<T>, from: &mut Vec<T>, share: usize) {
    let n = share.saturating_sub(to.len()).min(from.len());
    to.extend(from.drain(from.len() - n..));
}

fn cut<T>(from: &mut Vec<T>, to: &mut Vec<T>, share: usize) {
    // The oldest go: what was used last is warm.
    if from.len() > share {
        let n = from.len() - share;
        to.extend(from.drain(..n));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { max_io: 1 << 20, in_flight: 128 };
    const EXTRAS: usize = 128 - BIGS;

    #[test]
    fn buffers_do_not_overlap() {
        let m = Memory::new(2, false, LIMITS).unwrap();
        let mut all: Vec<Span> = (0..BIGS + SMALLS).map(|i| m.buffer(BufId(i as u16))).collect();
        all.extend((0..BOUNCES).map(|i| m.bounce(BounceId(i as u16))));
        all.extend(m.pages(0));
        all.extend(m.pages(1));
        all.push(m.zeroes());
        all.sort_by_key(|s| s.at);
        assert!(all.windows(2).all(|w| w[0].at + w[0].len <= w[1].at));
        assert!(all.last().is_some_and(|s| s.at + s.len <= m.arena.bytes()));
        assert!(all.iter().all(|s| s.at % 4096 == 0));
        assert!(m.places.extras <= 26 << 20);
        let extra = m.buffer(BufId::extra(EXTRAS - 1));
        assert!(extra.at + extra.len <= m.arena.bytes());
    }

    #[test]
    fn extra_buffers_come_and_go() {
        let m = Memory::new(2, false, LIMITS).unwrap();
        let common = Common::new();
        let mut mine = common.share();
        let mut held = Vec::new();
        loop {
            common.refill(&mut mine);
            match mine.next() {
                Some((big, req)) => {
                    mine.take_big();
                    m.arena.zero(m.buffer(big));
                    held.push((big, req));
                }
                None if held.len() == BIGS + EXTRAS => break,
                None => assert!(common.grow(&m).unwrap() > 0),
            }
        }
        assert_eq!(common.grow(&m).unwrap(), EXTRAS);
        let last = held.pop().unwrap();
        common.shrink(&m);
        for (buf, req) in held {
            mine.give(buf, req);
        }
        common.level(&mut mine);
        common.shrink(&m);
        assert_eq!(BufId::extra(common.extras.load(Relaxed)).0, last.0.0 + 1);
        common.give(last.0, last.1);
        common.shrink(&m);
        assert_eq!(common.extras.load(Relaxed), 0);
        assert_eq!(locked(&common.stash).bigs.len() + mine.bigs.len(), BIGS);
    }

    #[test]
    fn what_is_given_back_is_found_again() {
        let common = Common::new();
        let (mut a, mut b) = (common.share(), common.share());
        let mut held = Vec::new();
        while let Some((big, req)) = a.next() {
            a.take_big();
            held.push((big, req));
        }
        assert_eq!(held.len(), SHARE_BIGS);
        for (buf, req) in held {
            b.give(buf, req);
        }
        common.level(&mut b);
        common.refill(&mut a);
        assert_eq!((a.bigs.len(), b.bigs.len()), (SHARE_BIGS, SHARE_BIGS));
        assert_eq!(a.requests.len() + b.requests.len(), REQUESTS);
    }
}

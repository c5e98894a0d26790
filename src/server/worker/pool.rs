//! Which buffers and request numbers are free, and how many buffers there are.
//!
//! Big buffers are added while load needs them ([`Pool::add_for_load`], by a thread that no request waits for), and given
//! back when the device is idle. While the host file system is full, writes that wait for space keep their buffers, and
//! reads must go on: then, and only then, an I/O thread makes more, one for every request that the block device can have
//! in flight.
#![forbid(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, TryLockError};

use super::locked;
use super::memory::{BIGS, BufId, Memory, REQUESTS, SMALLS, max_extras};

/// Extra big buffers of a device under load.
const LOAD_EXTRAS: usize = 12;
/// So many are made at once while writes wait for space.
const EXTRA_STEP: usize = 8;

/// What is free. Each I/O thread has one of its own, so that it seldom has to ask the common one.
#[derive(Debug)]
pub struct Stash {
    bigs: Vec<BufId>,
    smalls: Vec<BufId>,
    requests: Vec<u32>,
}

/// A thread keeps no more than its share, so that the other one finds something.
const SHARE_SMALLS: usize = SMALLS / 2;
const SHARE_REQUESTS: usize = REQUESTS / 2;

impl Stash {
    /// With room for everything: it never grows.
    fn with_room() -> Stash {
        Stash {
            bigs: Vec::with_capacity(REQUESTS),
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

/// What is free and in no thread's stash, and how many extra buffers there are.
#[derive(Debug)]
pub struct Pool {
    stash: Mutex<Stash>,
    /// Held while memory is added or given back, without [`stash`](Self::stash) while the kernel finds the memory.
    resizing: Mutex<()>,
    /// How many extra buffers there are.
    extras: AtomicUsize,
    /// Extra buffers of this number or a higher one go back to the pool when they are free, and from there to the host.
    keep: AtomicUsize,
}

impl Pool {
    pub fn new() -> Pool {
        let mut all = Stash::with_room();
        // Last in, first out: the low ones are used most.
        all.bigs.extend((0..BIGS).rev().map(|i| BufId::from_raw(i as u16)));
        all.smalls.extend((BIGS..BIGS + SMALLS).rev().map(|i| BufId::from_raw(i as u16)));
        all.requests.extend((0..REQUESTS as u32).rev());
        Pool {
            stash: Mutex::new(all),
            resizing: Mutex::new(()),
            extras: AtomicUsize::new(0),
            keep: AtomicUsize::new(LOAD_EXTRAS),
        }
    }

    /// How many big buffers a thread keeps.
    fn share_bigs(&self) -> usize {
        (BIGS + self.extras.load(Relaxed).min(LOAD_EXTRAS)) / 2
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
        top_up(&mut mine.bigs, &mut all.bigs, self.share_bigs());
        top_up(&mut mine.smalls, &mut all.smalls, SHARE_SMALLS);
        top_up(&mut mine.requests, &mut all.requests, SHARE_REQUESTS);
    }

    /// Takes from a thread's stash what exceeds its share, and extra buffers that are to be given back.
    pub fn level(&self, mine: &mut Stash) {
        let keep = self.keep.load(Relaxed);
        if self.extras.load(Relaxed) > keep {
            let mut all = locked(&self.stash);
            all.bigs.extend(mine.bigs.extract_if(.., |b| b.extra_number().is_some_and(|n| n >= keep)));
        }
        let share = self.share_bigs();
        if mine.bigs.len() > share || mine.smalls.len() > SHARE_SMALLS || mine.requests.len() > SHARE_REQUESTS {
            let mut all = locked(&self.stash);
            cut(&mut mine.bigs, &mut all.bigs, share);
            cut(&mut mine.smalls, &mut all.smalls, SHARE_SMALLS);
            cut(&mut mine.requests, &mut all.requests, SHARE_REQUESTS);
        }
    }

    /// Whether the device has fewer buffers than load needs.
    pub fn is_small(&self) -> bool {
        self.extras.load(Relaxed) < LOAD_EXTRAS
    }

    /// Adds the buffers that load needs, as far as they are not there. Waits for the kernel to find the memory: for a
    /// thread that no request waits for.
    pub fn add_for_load(&self, memory: &Memory) -> io::Result<()> {
        let resizing = locked(&self.resizing);
        self.keep.store(LOAD_EXTRAS, Relaxed);
        self.add(memory, LOAD_EXTRAS, &resizing)
    }

    /// Adds some buffers while writes wait for space, if there may be more of them and no other thread is at it; how
    /// many extra ones there are then.
    pub fn add_for_waiting(&self, memory: &Memory) -> io::Result<usize> {
        if let Some(resizing) = self.try_resizing() {
            self.add(memory, self.extras.load(Relaxed) + EXTRA_STEP, &resizing)?;
        }
        Ok(self.extras.load(Relaxed))
    }

    fn try_resizing(&self) -> Option<MutexGuard<'_, ()>> {
        match self.resizing.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Makes extra buffers until there are `wanted`, or as many as there can be.
    fn add(&self, memory: &Memory, wanted: usize, _: &MutexGuard<'_, ()>) -> io::Result<()> {
        let (now, then) = (self.extras.load(Relaxed), wanted.min(max_extras(memory.limits)));
        if now >= then {
            return Ok(());
        }
        memory.arena.open(memory.extras(now, then))?;
        let mut all = locked(&self.stash);
        // The low ones are used first.
        all.bigs.splice(0..0, (now..then).rev().map(BufId::extra));
        self.extras.store(then, Relaxed);
        Ok(())
    }

    /// The device is idle: from now on all extra buffers are to be given back. They are after the next
    /// [`level`](Self::level) of each thread.
    pub fn keep_none(&self) -> bool {
        self.keep.store(0, Relaxed);
        self.extras.load(Relaxed) > 0
    }

    /// Gives the memory of extra buffers back that are not to be kept, the last first, as far as they are not in use.
    pub fn shrink(&self, memory: &Memory) {
        let (now, keep) = (self.extras.load(Relaxed), self.keep.load(Relaxed));
        if now <= keep {
            return;
        }
        let Some(_resizing) = self.try_resizing() else { return };
        let mut all = locked(&self.stash);
        let mut left = now;
        while left > keep
            && let Some(at) = all.bigs.iter().position(|b| *b == BufId::extra(left - 1))
        {
            all.bigs.swap_remove(at);
            left -= 1;
        }
        self.extras.store(left, Relaxed);
        drop(all);
        if left < now {
            memory.arena.close(memory.extras(left, now));
        }
    }

    /// Takes this request number, and this buffer if it is one; false: they are in use.
    pub fn take(&self, memory: &Memory, buf: BufId, request: u32) -> io::Result<bool> {
        if let Some(n) = buf.extra_number() {
            self.add(memory, n + 1, &locked(&self.resizing))?;
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
    use crate::server::transport::Limits;

    const LIMITS: Limits = Limits { max_io: 1 << 20, in_flight: 128 };
    const EXTRAS: usize = 128 - BIGS;

    fn memory() -> Memory {
        Memory::new(2, false, LIMITS, 1).unwrap()
    }

    /// All big buffers that can be had, each of which has memory behind it.
    fn take_all(pool: &Pool, mine: &mut Stash, m: &Memory) -> Vec<(BufId, u32)> {
        let mut held = Vec::new();
        loop {
            pool.refill(mine);
            let Some((big, req)) = mine.next() else { return held };
            mine.take_big();
            m.arena.zero(m.buffer(big));
            held.push((big, req));
        }
    }

    #[test]
    fn extra_buffers_come_and_go_with_writes_that_wait() {
        let (m, pool) = (memory(), Pool::new());
        let mut mine = pool.share();
        let mut held = take_all(&pool, &mut mine, &m);
        while held.len() < BIGS + EXTRAS {
            assert!(pool.add_for_waiting(&m).unwrap() > 0);
            held.extend(take_all(&pool, &mut mine, &m));
        }
        assert_eq!(pool.add_for_waiting(&m).unwrap(), EXTRAS);
        let last = *held.iter().max_by_key(|(buf, _)| buf.raw()).unwrap();
        held.retain(|h| *h != last);
        pool.shrink(&m);
        for (buf, req) in held {
            mine.give(buf, req);
        }
        pool.level(&mut mine);
        pool.shrink(&m);
        assert_eq!(pool.extras.load(Relaxed), EXTRAS, "the last one is in use");
        pool.give(last.0, last.1);
        pool.shrink(&m);
        assert_eq!(pool.extras.load(Relaxed), LOAD_EXTRAS);
    }

    #[test]
    fn buffers_for_load_are_kept_until_the_device_is_idle() {
        let (m, pool) = (memory(), Pool::new());
        assert!(pool.is_small() && !pool.keep_none());
        let mut mine = pool.share();
        assert_eq!(take_all(&pool, &mut mine, &m).len(), BIGS);
        pool.add_for_load(&m).unwrap();
        pool.add_for_load(&m).unwrap();
        assert!(!pool.is_small());
        let held = take_all(&pool, &mut mine, &m);
        assert_eq!(held.len(), LOAD_EXTRAS);
        held.into_iter().for_each(|(buf, req)| mine.give(buf, req));
        pool.level(&mut mine);
        pool.shrink(&m);
        assert_eq!(pool.extras.load(Relaxed), LOAD_EXTRAS);
        assert_eq!(mine.bigs.len(), (BIGS + LOAD_EXTRAS) / 2, "no lock is taken for them");

        assert!(pool.keep_none());
        pool.shrink(&m);
        assert!(pool.extras.load(Relaxed) > 0, "a thread has them in its stash");
        pool.level(&mut mine);
        pool.shrink(&m);
        assert_eq!(pool.extras.load(Relaxed), 0);
        // The next load gets them anew.
        pool.add_for_load(&m).unwrap();
        assert_eq!(take_all(&pool, &mut mine, &m).len(), LOAD_EXTRAS);
    }

    #[test]
    fn what_is_given_back_is_found_again() {
        let (m, pool) = (memory(), Pool::new());
        pool.add_for_load(&m).unwrap();
        let (mut a, mut b) = (pool.share(), pool.share());
        let mut held = Vec::new();
        while let Some((big, req)) = a.next() {
            a.take_big();
            held.push((big, req));
        }
        assert_eq!(held.len(), pool.share_bigs());
        for (buf, req) in held {
            b.give(buf, req);
        }
        pool.level(&mut b);
        pool.refill(&mut a);
        assert_eq!((a.bigs.len(), b.bigs.len()), (pool.share_bigs(), pool.share_bigs()));
        assert_eq!(a.requests.len() + b.requests.len(), REQUESTS);
    }
}

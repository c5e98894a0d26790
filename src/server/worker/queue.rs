//! How the worker's threads hand work to each other.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::locked;

/// For threads that block in system calls: they wait here for the next job.
#[derive(Debug)]
pub struct Jobs<T> {
    queue: Mutex<VecDeque<T>>,
    more: Condvar,
}

impl<T> Jobs<T> {
    pub fn new() -> Jobs<T> {
        Jobs { queue: Mutex::new(VecDeque::with_capacity(256)), more: Condvar::new() }
    }

    pub fn push(&self, job: T) {
        locked(&self.queue).push_back(job);
        self.more.notify_one();
    }

    /// A job, if there is one.
    #[cfg(test)]
    pub fn try_pop(&self) -> Option<T> {
        locked(&self.queue).pop_front()
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        locked(&self.queue).is_empty()
    }

    /// Waits for a job, in the order in which they came.
    pub fn pop(&self) -> T {
        let mut queue = locked(&self.queue);
        loop {
            if let Some(job) = queue.pop_front() {
                return job;
            }
            queue = self.more.wait(queue).unwrap_or_else(|e| e.into_inner());
        }
    }
}

/// For threads that wait for descriptors: an eventfd tells that something is there.
#[derive(Debug)]
pub struct Inbox<T> {
    items: Mutex<Vec<T>>,
    /// The eventfd has been written and not yet been read.
    rung: AtomicBool,
    bell: OwnedFd,
}

impl<T> Inbox<T> {
    pub fn new() -> io::Result<Inbox<T>> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let bell = bell.as_fd().try_clone_to_owned()?;
        Ok(Inbox { items: Mutex::new(Vec::with_capacity(256)), rung: AtomicBool::new(false), bell })
    }

    pub fn push(&self, item: T) {
        locked(&self.items).push(item);
        self.ring();
    }

    /// Wakes the owner, even if there is nothing for it.
    pub fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            // It can only fail if the counter is full, and then the owner is awake.
            let _ = nix::unistd::write(&self.bell, &1u64.to_ne_bytes());
        }
    }

    /// The owner has been woken up and has not taken yet what is there.
    #[cfg(test)]
    pub fn has_rung(&self) -> bool {
        self.rung.load(Ordering::Acquire)
    }

    /// Takes what is there, after the eventfd was read.
    pub fn take(&self, out: &mut Vec<T>) {
        let mut count = [0; 8];
        let _ = nix::unistd::read(&self.bell, &mut count);
        self.rung.store(false, Ordering::Release);
        out.append(&mut locked(&self.items));
    }
}

impl<T> AsFd for Inbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    fn heard(i: &Inbox<u32>) -> bool {
        poll(&mut [PollFd::new(i.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn the_bell_rings_until_the_inbox_is_emptied() {
        let inbox = Inbox::new().unwrap();
        assert!(!heard(&inbox));
        inbox.push(1);
        inbox.push(2);
        assert!(heard(&inbox));
        let mut got = Vec::new();
        inbox.take(&mut got);
        assert_eq!(got, [1, 2]);
        assert!(!heard(&inbox));
        inbox.ring();
        assert!(heard(&inbox));
    }

    #[test]
    fn jobs_keep_their_order() {
        let jobs = Jobs::new();
        std::thread::scope(|s| {
            s.spawn(|| (0..100).for_each(|i| jobs.push(i)));
            assert!((0..100).all(|i| jobs.pop() == i));
        });
    }
}

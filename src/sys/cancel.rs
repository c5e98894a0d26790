//! Cancellation of the operation that runs in a thread, asked for by a signal handler that interrupted that very thread.
//!
//! Everything that [`request`] touches is an atomic in a table that only grows, found by thread number: no thread-local
//! storage (whose first use may allocate), no lock, no allocation. A request that hits no operation is forgotten.

use nix::errno::Errno;
use nix::unistd::gettid;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use super::{console, pidfd};

/// One running operation.
struct Slot {
    /// Thread that runs it; 0: the slot is free.
    thread: AtomicI32,
    requested: AtomicBool,
    /// pidfd of the helper program it waits for; -1: none.
    child: AtomicI32,
}

const SLOTS: usize = 64;

struct Table {
    slots: [Slot; SLOTS],
    next: OnceLock<Box<Table>>,
}

impl Table {
    const fn new() -> Self {
        Table {
            slots: [const {
                Slot { thread: AtomicI32::new(0), requested: AtomicBool::new(false), child: AtomicI32::new(-1) }
            }; SLOTS],
            next: OnceLock::new(),
        }
    }
}

static TABLE: Table = Table::new();

fn me() -> i32 {
    gettid().as_raw()
}

fn mine() -> Option<&'static Slot> {
    let me = me();
    let mut table = &TABLE;
    loop {
        if let Some(slot) = table.slots.iter().find(|s| s.thread.load(Ordering::Acquire) == me) {
            return Some(slot);
        }
        table = table.next.get()?;
    }
}

/// An operation that can be cancelled, from [`begin`] until it is dropped, in the thread that began it.
#[must_use = "the operation ends when this is dropped"]
pub struct Operation {
    /// `None` when it runs inside another one of this thread, which then decides.
    slot: Option<&'static Slot>,
    /// Not to be sent to another thread.
    _thread: PhantomData<*const ()>,
}

/// Starts an operation of this thread, with no request pending. Inside another operation of the thread it changes nothing.
pub fn begin() -> Operation {
    if mine().is_some() {
        return Operation { slot: None, _thread: PhantomData };
    }
    let me = me();
    let mut table = &TABLE;
    loop {
        for slot in &table.slots {
            // The flag is clear before the slot carries our number: `drop` cleared it and requests need the number.
            if slot.thread.compare_exchange(0, me, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return Operation { slot: Some(slot), _thread: PhantomData };
            }
        }
        table = table.next.get_or_init(|| Box::new(Table::new()));
    }
}

impl Operation {
    /// Ends the operation; returns whether it had been asked to stop. An inner operation returns false.
    pub fn end(mut self) -> bool {
        self.leave()
    }

    fn leave(&mut self) -> bool {
        let Some(slot) = self.slot.take() else { return false };
        slot.child.store(-1, Ordering::Release);
        let requested = slot.requested.swap(false, Ordering::AcqRel);
        slot.thread.store(0, Ordering::Release);
        requested
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Asks the operation of the calling thread to stop, and ends the helper program it waits for with SIGTERM.
/// Async-signal-safe; keeps `errno`.
pub fn request() {
    let errno = Errno::last();
    console::announce_cancel();
    if let Some(slot) = mine() {
        slot.requested.store(true, Ordering::Release);
        let child = slot.child.load(Ordering::Acquire);
        if child >= 0 {
            pidfd::send_signal(child, libc::SIGTERM);
        }
    }
    errno.set();
}

/// Forgets a request made to the operation of this thread.
pub fn clear() {
    if let Some(slot) = mine() {
        slot.requested.store(false, Ordering::Release);
    }
}

/// Has the operation of this thread been asked to stop? To be polled wherever stopping is safe.
pub fn requested() -> bool {
    mine().is_some_and(|slot| slot.requested.load(Ordering::Acquire))
}

/// A helper program that a request ends, while this lives.
#[must_use = "the program is registered until this is dropped"]
pub struct Child {
    slot: &'static Slot,
    before: i32,
    _pidfd: OwnedFd,
    _thread: PhantomData<*const ()>,
}

/// Registers the child process `pid` (started by us, not waited for yet) of this thread's operation. A request that came
/// before ends it at once. `None`: no operation runs here, or the kernel has no pidfds (before 5.3).
pub fn register_child(pid: i32) -> Option<Child> {
    let slot = mine()?;
    let fd = pidfd::open(pid).ok()?;
    let before = slot.child.swap(fd.as_raw_fd(), Ordering::AcqRel);
    if slot.requested.load(Ordering::Acquire) {
        pidfd::send_signal(fd.as_raw_fd(), libc::SIGTERM);
    }
    Some(Child { slot, before, _pidfd: fd, _thread: PhantomData })
}

impl Drop for Child {
    fn drop(&mut self) {
        // Before the descriptor closes: its number could be given to something else.
        self.slot.child.store(self.before, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;
    use std::thread;

    #[test]
    fn a_request_hits_only_the_operation_that_runs_in_its_thread() {
        request();
        let op = begin();
        assert!(!requested(), "a stale request is forgotten");
        thread::spawn(|| {
            let _op = begin();
            request();
            assert!(requested());
        })
        .join()
        .expect("thread");
        assert!(!requested(), "another thread's request does not count");
        request();
        {
            let _inner = begin();
            assert!(requested(), "an inner operation keeps the outer one's request");
        }
        assert!(requested());
        clear();
        assert!(!requested());
        request();
        drop(op);
        let _op = begin();
        assert!(!requested());
    }

    #[test]
    fn a_request_ends_the_child() {
        let _op = begin();
        let mut child = Command::new("sleep").arg("60").spawn().expect("sleep");
        let guard = register_child(child.id() as i32);
        assert!(guard.is_some());
        request();
        assert_eq!(child.wait().expect("wait").signal(), Some(libc::SIGTERM));
        request();
        drop(guard);
        let mut late = Command::new("sleep").arg("60").spawn().expect("sleep");
        let _guard = register_child(late.id() as i32);
        assert_eq!(late.wait().expect("wait").signal(), Some(libc::SIGTERM), "a request that came before counts too");
    }

    #[test]
    fn many_operations_at_once() {
        let barrier = std::sync::Barrier::new(100);
        thread::scope(|s| {
            for _ in 0..100 {
                s.spawn(|| {
                    let _op = begin();
                    barrier.wait();
                    assert!(!requested());
                    request();
                    assert!(requested());
                    barrier.wait();
                });
            }
        });
    }
}

//! One thread's io_uring: positioned reads and writes between files and the arena, and polls.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};

use super::arena::{Arena, Span};

/// Wakes one waiter only, where several poll the same descriptor.
const EPOLLEXCLUSIVE: u32 = 1 << 28;

/// A completion: the caller's tag and the system call's result, negative: an errno.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completion {
    pub tag: u64,
    pub result: i32,
}

/// A ring for one thread and one arena. Descriptors are not registered: a lock on a file falls with the last descriptor
/// of the process, not with the end of the ring.
pub struct Ring {
    ring: IoUring,
    arena: Arc<Arena>,
}

impl Ring {
    /// A ring with room for `entries` operations per submission and four times as many completions. Belongs to the
    /// thread that makes it.
    pub fn new(entries: u32, arena: Arc<Arena>) -> io::Result<Ring> {
        let modern = IoUring::builder()
            .setup_clamp()
            .setup_cqsize(entries * 4)
            .setup_submit_all()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .dontfork()
            .build(entries);
        let ring = match modern {
            // Before 6.1 these settings are not known.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                IoUring::builder().setup_clamp().setup_cqsize(entries * 4).dontfork().build(entries)?
            }
            other => other?,
        };
        let mut ring = Ring { ring, arena };
        ring.warm(entries)?;
        Ok(ring)
    }

    /// Makes the kernel allocate its records of operations and start its thread for those that would block, both of
    /// which it keeps, before the host is short of memory.
    fn warm(&mut self, entries: u32) -> io::Result<()> {
        // More threads would come and go. One is enough: it only starts the I/O, for nearly all kinds of files.
        if let Err(e) = self.ring.submitter().register_iowq_max_workers(&mut [1, 1])
            // Not known before 5.15.
            && e.raw_os_error() != Some(libc::EINVAL)
        {
            return Err(e);
        }
        for n in 0..entries {
            let flags = if n == 0 { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
            self.push(opcode::Nop::new().build().flags(flags))?;
        }
        let mut done = 0;
        while done < entries as usize {
            self.submit(1)?;
            done += self.ring.completion().count();
        }
        Ok(())
    }

    fn push(&mut self, entry: squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: `entry` was made below: its buffer, if any, is a part of an arena, which is never unmapped, so it
            // outlives the operation whatever happens to the ring or the process's threads.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return Ok(());
            }
            // Full: the kernel takes what is there.
            self.submit(0)?;
        }
    }

    /// Reads from `file` at `offset` into a part of the arena.
    pub fn read(&mut self, file: BorrowedFd, to: Span, offset: u64, tag: u64) -> io::Result<()> {
        let fd = types::Fd(file.as_raw_fd());
        self.push(opcode::Read::new(fd, self.arena.ptr(to), to.len as u32).offset(offset).build().user_data(tag))
    }

    /// Writes a part of the arena to `file` at `offset`.
    pub fn write(&mut self, file: BorrowedFd, from: Span, offset: u64, tag: u64) -> io::Result<()> {
        let fd = types::Fd(file.as_raw_fd());
        self.push(opcode::Write::new(fd, self.arena.ptr(from), from.len as u32).offset(offset).build().user_data(tag))
    }

    /// Completes once, when `fd` can be read; of several such polls of one descriptor at least one.
    pub fn poll_in(&mut self, fd: BorrowedFd, exclusive: bool, tag: u64) -> io::Result<()> {
        let events = libc::POLLIN as u32 | if exclusive { EPOLLEXCLUSIVE } else { 0 };
        self.push(opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), events).build().user_data(tag))
    }

    /// Ends the poll with this tag; it completes with ECANCELED unless it has completed already.
    pub fn cancel_poll(&mut self, poll: u64, tag: u64) -> io::Result<()> {
        self.push(opcode::PollRemove::new(poll).build().user_data(tag))
    }

    /// Hands everything to the kernel and waits until `want` completions are there.
    pub fn submit(&mut self, want: usize) -> io::Result<()> {
        match self.ring.submit_and_wait(want) {
            Ok(_) => Ok(()),
            // A signal, or the completions have to be taken first.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Takes the completions that are there.
    pub fn completions(&mut self, out: &mut Vec<Completion>) {
        out.extend(self.ring.completion().map(|c| Completion { tag: c.user_data(), result: c.result() }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn data_travels_and_polls_fire() {
        let arena = Arena::new(1, 0).unwrap();
        let mut ring = Ring::new(8, arena.clone()).unwrap();
        let file = tempfile::tempfile().unwrap();
        let (r, w) = nix::unistd::pipe().unwrap();
        arena.put(Span { at: 0, len: 5 }, b"12345");
        ring.poll_in(r.as_fd(), true, 9).unwrap();
        ring.write(file.as_fd(), Span { at: 0, len: 5 }, 7, 1).unwrap();
        ring.submit(1).unwrap();
        let mut done = Vec::new();
        ring.completions(&mut done);
        assert_eq!(done, [Completion { tag: 1, result: 5 }]);
        for tag in 0..20 {
            ring.read(file.as_fd(), Span { at: 4096 * (1 + tag as usize), len: 12 }, 0, tag).unwrap();
        }
        nix::unistd::write(&w, b"x").unwrap();
        done.clear();
        while done.len() < 21 {
            ring.submit(1).unwrap();
            ring.completions(&mut done);
        }
        assert!(done.iter().any(|c| c.tag == 9 && c.result == libc::POLLIN as i32));
        assert!(done.iter().filter(|c| c.tag != 9).all(|c| c.result == 12));
        let mut got = [0; 12];
        arena.get(Span { at: 4096 * 20, len: 12 }, &mut got);
        assert_eq!(&got, b"\0\0\0\0\0\0\x0012345");
        let (quiet, _w) = nix::unistd::pipe().unwrap();
        ring.poll_in(quiet.as_fd(), true, 3).unwrap();
        ring.cancel_poll(3, 4).unwrap();
        done.clear();
        while done.len() < 2 {
            ring.submit(1).unwrap();
            ring.completions(&mut done);
        }
        assert!(done.contains(&Completion { tag: 3, result: -libc::ECANCELED }));
        assert!(done.contains(&Completion { tag: 4, result: 0 }));
    }
}

//! Locks on open file descriptions.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::sys::host;

/// Between looks at a lock in the simulation.
const SIMULATED_WAIT: Duration = Duration::from_millis(5);

/// `flock(2)` on a description: exclusive, waiting if `wait`. A signal does not end the wait.
pub fn exclusive(file: impl AsFd, wait: bool) -> io::Result<()> {
    let file = file.as_fd();
    if host::is_simulated() && wait {
        return poll(|| exclusive(file, false));
    }
    flock(file, libc::LOCK_EX | if wait { 0 } else { libc::LOCK_NB })
}

/// Gives up the `flock` of a description.
pub fn release(file: impl AsFd) -> io::Result<()> {
    flock(file, libc::LOCK_UN)
}

fn flock(file: impl AsFd, how: i32) -> io::Result<()> {
    loop {
        // SAFETY: takes numbers only.
        if unsafe { libc::flock(file.as_fd().as_raw_fd(), how) } == 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

/// A lock of a description on bytes of its file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ByteLock {
    Shared,
    Exclusive,
    None,
}

impl ByteLock {
    /// As `fcntl` takes it.
    pub fn on(self, byte: i64) -> libc::flock {
        let kind = match self {
            ByteLock::Shared => libc::F_RDLCK,
            ByteLock::Exclusive => libc::F_WRLCK,
            ByteLock::None => libc::F_UNLCK,
        };
        libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
    }
}

/// Sets the lock of a description on one byte, waiting if `wait`; `WouldBlock` if another description's is in the way. A
/// signal does not end the wait.
pub fn lock_byte(file: impl AsFd, byte: i64, kind: ByteLock, wait: bool) -> io::Result<()> {
    let file = file.as_fd();
    if host::is_simulated() && wait {
        return poll(|| lock_byte(file, byte, kind, false));
    }
    let lock = kind.on(byte);
    loop {
        let done = match wait {
            true => fcntl(file, FcntlArg::F_OFD_SETLKW(&lock)),
            false => fcntl(file, FcntlArg::F_OFD_SETLK(&lock)),
        };
        return match done {
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN | Errno::EACCES) => Err(io::ErrorKind::WouldBlock.into()),
            Err(e) => Err(e.into()),
            Ok(_) => Ok(()),
        };
    }
}

/// The holder of the lock goes on while this thread waits.
fn poll(mut lock: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match lock() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => host::sleep(SIMULATED_WAIT),
            other => return other,
        }
    }
}

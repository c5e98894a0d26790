//! Locks on open file descriptions.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::stat::{major, minor};

use crate::sys::file_id::FileId;
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

/// The processes that hold locks on a file, in the text of /proc/locks. It names none for locks of open descriptions on bytes.
pub fn holders(locks: &str, file: FileId) -> Vec<String> {
    let wanted = format!("{:02x}:{:02x}:{}", major(file.dev), minor(file.dev), file.ino);
    let holder = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        // A process that waits has an arrow before its lock.
        let at = fields.iter().position(|f| *f == wanted).filter(|_| fields.get(1) != Some(&"->"))?;
        let pid = fields.get(at.checked_sub(1)?)?;
        pid.parse::<u32>().is_ok_and(|pid| pid > 0).then(|| (*pid).to_owned())
    };
    let mut found: Vec<String> = locks.lines().filter_map(holder).collect();
    found.dedup();
    found
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_of_a_file() {
        let locks = "1: FLOCK  ADVISORY  WRITE 12 08:01:131 0 EOF\n1: -> FLOCK  ADVISORY  WRITE 13 08:01:131 0 EOF\n\
                     2: OFDLCK ADVISORY  READ -1 08:01:131 200 204\n3: POSIX  ADVISORY  WRITE 14 08:01:132 0 EOF\n";
        let of = |ino| holders(locks, FileId { dev: nix::sys::stat::makedev(8, 1), ino });
        assert_eq!((of(131), of(132), of(133)), (vec!["12".to_owned()], vec!["14".to_owned()], vec![]));
    }
}

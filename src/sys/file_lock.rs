//! Locks on open file descriptions.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::sys::host;

/// Between looks at a lock in the simulation.
const SIMULATED_WAIT: Duration = Duration::from_millis(5);

/// `flock(2)` on the description of `file`: exclusive, waiting if `wait`. A signal does not end the wait.
pub fn exclusive(file: &File, wait: bool) -> io::Result<()> {
    if host::is_simulated() && wait {
        // The holder of the lock goes on while this thread waits.
        loop {
            match exclusive(file, false) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => host::sleep(SIMULATED_WAIT),
                other => return other,
            }
        }
    }
    let how = libc::LOCK_EX | if wait { 0 } else { libc::LOCK_NB };
    loop {
        // SAFETY: takes numbers only.
        if unsafe { libc::flock(file.as_raw_fd(), how) } == 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

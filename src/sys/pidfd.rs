//! Process file descriptors: a signal sent through one never reaches another process that got a recycled process
//! number.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Opens a descriptor (close-on-exec) for process `pid`, which must be a child not yet waited for.
pub fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(pid), 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us; no other code knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Sends `signal` to the process behind `pidfd`. Async-signal-safe; a closed or foreign descriptor is an error
/// (`false`), never a signal to another process.
pub fn send_signal(pidfd: RawFd, signal: i32) -> bool {
    // SAFETY: pidfd_send_signal accepts a null siginfo and touches no memory of ours.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            libc::c_long::from(pidfd),
            libc::c_long::from(signal),
            std::ptr::null::<libc::siginfo_t>(),
            0,
        ) == 0
    }
}

//! Priority of this process for processors and disks.

use std::io;

/// `IOPRIO_WHO_PROCESS`; 0 is the calling thread.
const WHO_PROCESS: libc::c_int = 1;
/// Class idle (3) in the upper bits.
const IDLE: libc::c_int = 3 << 13;

/// From here on this thread runs when no other wants the processor, and its I/O goes after all other.
pub fn lower() -> io::Result<()> {
    // SAFETY: both calls take numbers alone; 0 is the calling thread.
    unsafe {
        if libc::setpriority(libc::PRIO_PROCESS, 0, 19) != 0 {
            return Err(io::Error::last_os_error());
        }
        if libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, IDLE) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

//! Keeps a process that serves a block device from waiting on that device: no reclaim through it, no page faults,
//! no core dump to it. All of it is best effort: what is not permitted is left out.

use std::fs;
use std::io;

/// No core dump is written when this process crashes.
pub fn not_dumpable() -> io::Result<()> {
    const NONE: libc::c_ulong = 0;
    // SAFETY: takes numbers only.
    match unsafe { libc::prctl(libc::PR_SET_DUMPABLE, NONE, NONE, NONE, NONE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The OOM killer selects other processes first.
pub fn exempt_from_oom_killer() -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", "-1000").or_else(|_| fs::write("/proc/self/oom_score_adj", "-999"))
}

/// All memory, now and later, is present and stays so.
pub fn lock_memory() -> io::Result<()> {
    use nix::sys::mman::{MlockAllFlags, mlockall};
    Ok(mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE)?)
}

/// One heap for all threads, since each further one would cost locked memory; and what it got once it keeps.
pub fn use_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets numbers in the allocator; called before other threads run.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        // Less than that is taken from the heap, and is there again for the next one.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20);
    }
}

/// Makes the heap have room for `bytes` more, so that it does not grow while the host is short of memory. Of use where
/// [`use_one_heap`] was called and memory is locked.
pub fn reserve_heap(bytes: usize) {
    // More than one piece: a large one would get a mapping of its own.
    let room: Vec<Vec<u8>> = (0..bytes.div_ceil(64 << 10)).map(|_| Vec::with_capacity(64 << 10)).collect();
    std::hint::black_box(&room);
}

/// Signals that other programs, shells and service managers send to whole groups do not end this process.
pub fn ignore_signals() -> io::Result<()> {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGPIPE, libc::SIGXFSZ] {
        // SAFETY: SIG_IGN is no handler of ours; nothing runs in signal context.
        if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

//! The clocks by which times of files are judged. Waiting and limits go by [`host::now`](super::host::now) instead.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of the wall clock, from which the kernel takes the times of files.
pub fn wall() -> u64 {
    nanoseconds(ClockId::CLOCK_REALTIME).max(0) as u64
}

/// How far the wall clock is ahead of the one that counts since boot: it changes when the wall clock is set.
pub fn wall_offset() -> i64 {
    nanoseconds(ClockId::CLOCK_REALTIME) - nanoseconds(ClockId::CLOCK_BOOTTIME)
}

fn nanoseconds(clock: ClockId) -> i64 {
    // It fails for unknown clocks alone.
    clock_gettime(clock).map(|t| t.tv_sec().saturating_mul(1_000_000_000) + t.tv_nsec()).unwrap_or(0)
}

//! The clocks by which times of files are judged. Waiting and limits go by [`host::now`](super::host::now) instead.

use std::sync::OnceLock;

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of the wall clock, from which the kernel takes the times of files.
pub fn wall() -> u64 {
    nanoseconds(ClockId::CLOCK_REALTIME).max(0) as u64
}

/// How far the wall clock is ahead of the one that counts since the host's boot: it changes when the wall clock is set. The
/// same in each time namespace.
pub fn wall_offset() -> i64 {
    static NAMESPACE: OnceLock<i64> = OnceLock::new();
    let namespace = NAMESPACE
        .get_or_init(|| boottime_offset(&std::fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default()));
    nanoseconds(ClockId::CLOCK_REALTIME) - (nanoseconds(ClockId::CLOCK_BOOTTIME) - namespace)
}

/// By how much the time namespace's clock since boot is ahead of the host's, from /proc/PID/timens_offsets.
fn boottime_offset(text: &str) -> i64 {
    let line = text.lines().find_map(|l| l.strip_prefix("boottime"));
    let mut fields = line.unwrap_or_default().split_whitespace().map(|n| n.parse::<i64>().unwrap_or(0));
    fields.next().unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(fields.next().unwrap_or(0))
}

fn nanoseconds(clock: ClockId) -> i64 {
    // It fails for unknown clocks alone.
    clock_gettime(clock).map(|t| t.tv_sec().saturating_mul(1_000_000_000) + t.tv_nsec()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_namespaces_make_no_difference() {
        assert_eq!(
            boottime_offset("monotonic           0         0\nboottime            5         7\n"),
            5_000_000_007
        );
        assert_eq!(
            boottime_offset("monotonic          -1         0\nboottime           -2         0\n"),
            -2_000_000_000
        );
        assert_eq!(boottime_offset(""), 0);
    }
}

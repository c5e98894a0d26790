//! The console of messages: its level, the time that lines begin with, and the line that a signal handler writes.
//!
//! Levels are the classic ones: -1 error or important warning, 0 normal progress, 1 detail, 3 debug. Everything here is
//! an atomic of the process, so that a signal handler can read it.
#![forbid(unsafe_code)]

use std::io::Write;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use nix::time::{ClockId, clock_gettime};

use super::stdio::{self, Stream};

/// Console level: print nothing (the initial value).
pub const NO_CONSOLE: i32 = -2;
/// Console level: errors to standard error only.
pub const NO_STDOUT: i32 = -1;
/// Console levels from here on prefix each line with the time.
pub const TIMESTAMPS: i32 = 4;

static LEVEL: AtomicI32 = AtomicI32::new(NO_CONSOLE);
/// Microseconds of the monotonic clock (plus one, so that 0 means "never") when the clock was started.
static TIME_BASE: AtomicU64 = AtomicU64::new(0);

const PREFIX_MAX: usize = 40;

/// Sets the console level.
pub fn set_level(level: i32) {
    start_clock();
    LEVEL.store(level, Ordering::Relaxed);
}

/// The console level.
pub fn level() -> i32 {
    LEVEL.load(Ordering::Relaxed)
}

/// Whether the console shows messages of this level. Async-signal-safe.
pub fn wants(level: i32) -> bool {
    let shown = self::level();
    shown != NO_CONSOLE && shown >= level
}

/// The times of lines count from the first call.
pub fn start_clock() {
    let _ = TIME_BASE.compare_exchange(0, monotonic_us() + 1, Ordering::Relaxed, Ordering::Relaxed);
}

/// Prints a line, with the time before it from level [`TIMESTAMPS`] on.
pub fn print(stream: Stream, text: &str) {
    let mut buf = [0; PREFIX_MAX];
    let prefix = String::from_utf8_lossy(prefix(&mut buf));
    stdio::print(stream, &format!("{prefix}{text}\n"));
}

/// "Cancelling..." from a signal handler: past all locks and buffers. Async-signal-safe.
pub fn announce_cancel() {
    if wants(0) {
        const TEXT: &[u8] = b"Cancelling...\n";
        let mut buf = [0; PREFIX_MAX];
        let mut line = [0; PREFIX_MAX + TEXT.len()];
        let prefix = prefix(&mut buf);
        let len = prefix.len() + TEXT.len();
        line[..prefix.len()].copy_from_slice(prefix);
        line[prefix.len()..len].copy_from_slice(TEXT);
        stdio::raw_write(1, &line[..len]);
    }
}

/// `[SS.uuuuuu] ` at console level 4 and above, else nothing. Async-signal-safe.
fn prefix(buf: &mut [u8; PREFIX_MAX]) -> &[u8] {
    if level() < TIMESTAMPS {
        return &[];
    }
    let since = monotonic_us().saturating_sub(TIME_BASE.load(Ordering::Relaxed).saturating_sub(1));
    let mut rest: &mut [u8] = buf;
    // Writing integers into a slice allocates nothing; 40 bytes hold any u64.
    let _ = write!(rest, "[{:2}.{:06}] ", since / 1_000_000, since % 1_000_000);
    let left = rest.len();
    &buf[..PREFIX_MAX - left]
}

fn monotonic_us() -> u64 {
    match clock_gettime(ClockId::CLOCK_MONOTONIC) {
        Ok(t) => t.tv_sec() as u64 * 1_000_000 + t.tv_nsec() as u64 / 1000,
        Err(_) => 0,
    }
}

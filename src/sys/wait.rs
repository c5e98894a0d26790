//! Waiting for a descriptor.
#![forbid(unsafe_code)]

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};

use crate::error::{IoContext, Kind, Result};
use crate::sys::host;

/// Waits for `flags` until `end`; false: the time is over. A hang-up counts as an event.
pub fn wait(fd: BorrowedFd, flags: PollFlags, end: Instant) -> Result<bool> {
    loop {
        let left = end.saturating_duration_since(host::now());
        // Rounded up, or the last millisecond would be spent in a busy loop.
        let timeout = PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
        if host::poll(&mut [PollFd::new(fd, flags)], timeout).or_else(interrupted)? > 0 {
            return Ok(true);
        }
        if left.is_zero() {
            return Ok(false);
        }
    }
}

/// Waits for `flags` as long as it takes, or until a signal comes. A hang-up counts as an event.
pub fn wait_forever(fd: BorrowedFd, flags: PollFlags) -> Result<()> {
    host::poll(&mut [PollFd::new(fd, flags)], PollTimeout::NONE).or_else(interrupted).map(drop)
}

fn interrupted(e: nix::Error) -> Result<i32> {
    match e {
        nix::Error::EINTR => Ok(0),
        e => Err(e).ctx(Kind::Sys, || "cannot wait for a message"),
    }
}

//! Steps drawn out, for tests that kill a process in them.
#![forbid(unsafe_code)]

use std::time::Duration;

use crate::sys::host;

/// Waits, if a test has asked for it.
pub fn pause(milliseconds: u64) {
    if milliseconds > 0 {
        host::sleep(Duration::from_millis(milliseconds));
    }
}

//! Signal handlers of the commands. The library installs none.

use std::ffi::c_int;
use std::sync::atomic::{AtomicI32, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// The first signal that asked to stop; 0: none did.
static RECEIVED: AtomicI32 = AtomicI32::new(0);

extern "C" fn cancel(signal: c_int) {
    let _ = RECEIVED.compare_exchange(0, signal, Ordering::Relaxed, Ordering::Relaxed);
    super::cancel::request();
}

/// The first signal since [`cancel_on_termination`] that asked the process to stop.
pub fn received() -> Option<i32> {
    Some(RECEIVED.load(Ordering::Relaxed)).filter(|s| *s != 0)
}

/// SIGTERM, SIGINT and SIGHUP ask the operation of the interrupted thread to stop instead of ending the process. System
/// calls that wait are interrupted.
pub fn cancel_on_termination() {
    let action = SigAction::new(SigHandler::Handler(cancel), SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        // SAFETY: the handler stores to an atomic and calls `cancel::request`, which is async-signal-safe and keeps errno.
        // It can fail only for a signal that cannot be caught, which these are not.
        let _ = unsafe { sigaction(signal, &action) };
    }
}

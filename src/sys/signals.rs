//! Signal handlers of the commands. The library installs none.

use std::ffi::c_int;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

extern "C" fn cancel(_signal: c_int) {
    super::cancel::request();
}

/// SIGTERM, SIGINT and SIGHUP ask the operation of the interrupted thread to stop instead of ending the process. System
/// calls that wait are interrupted.
pub fn cancel_on_termination() {
    let action = SigAction::new(SigHandler::Handler(cancel), SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        // SAFETY: the handler calls `cancel::request` alone, which is async-signal-safe and keeps errno.
        // It can fail only for a signal that cannot be caught, which these are not.
        let _ = unsafe { sigaction(signal, &action) };
    }
}

//! Logging and control.

use super::boundary;
use super::convert;
use crate::error::{IoContext, Kind};
use crate::report;
use std::ffi::{c_char, c_int};

/// Text of this thread's last error, for users; "" before the first. Never NULL; not to be freed; the next error of the
/// thread overwrites it.
#[unsafe(no_mangle)]
pub extern "C" fn ploop_get_last_error() -> *const c_char {
    report::last_error_ptr()
}

/// Opens fname (appending) as the log file and closes the old one, which stays in use when that fails. NULL: no log file.
/// Returns 0 or -1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_set_log_file(fname: *const c_char) -> c_int {
    boundary::minus_one("ploop_set_log_file", || {
        // SAFETY: the caller's string, NULL or NUL-terminated.
        let path = if fname.is_null() { None } else { Some(unsafe { convert::path(fname, "log file") }?) };
        report::set_log_file(path.as_deref())
            .ctx(Kind::Open, || format!("cannot open log file {}", path.unwrap_or_default().display()))
    })
}

/// Level up to which messages go to the log file: -1 errors, 0 progress, 1 details, 3 debug (initially 3).
#[unsafe(no_mangle)]
pub extern "C" fn ploop_set_log_level(level: c_int) {
    boundary::void("ploop_set_log_level", || {
        report::set_log_level(level);
        Ok(())
    });
}

/// Level up to which messages go to standard output, and errors to standard error: PLOOP_LOG_NOCONSOLE (initially),
/// PLOOP_LOG_NOSTDOUT, 0 progress, 1 details, 3 debug, PLOOP_LOG_TIMESTAMPS.
#[unsafe(no_mangle)]
pub extern "C" fn ploop_set_verbose_level(level: c_int) {
    boundary::void("ploop_set_verbose_level", || {
        report::set_verbose_level(level);
        Ok(())
    });
}

/// Asks the operation that runs in the calling thread to stop. For signal handlers, which run in that thread.
#[unsafe(no_mangle)]
pub extern "C" fn ploop_cancel_operation() {
    // Without the frame of the other functions: a signal handler may call only async-signal-safe code.
    report::cancel::request();
}

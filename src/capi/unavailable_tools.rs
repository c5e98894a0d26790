//! Functions that the classic exports for its own programs without declaring them, and that this release does not have:
//! as in [`unavailable`](super::unavailable). They are not in the header.

use super::boundary;
use crate::bail;
use std::ffi::{c_char, c_int};

/// Stores a number of the device's state in *res. -1: not available.
#[unsafe(no_mangle)]
pub extern "C" fn ploop_get_attr(device: *const c_char, attr: *const c_char, res: *mut c_int) -> c_int {
    let _ = (device, attr, res);
    boundary::minus_one("ploop_get_attr", || bail!(Param, "{}", super::unavailable::text("ploop_get_attr")))
}

/// Stores the next free minor of ploop devices in *minor and returns a file descriptor that reserves it. -1: not
/// available.
#[unsafe(no_mangle)]
pub extern "C" fn ploop_getdevice(minor: *mut c_int) -> c_int {
    let _ = minor;
    boundary::minus_one("ploop_getdevice", || bail!(Param, "{}", super::unavailable::text("ploop_getdevice")))
}

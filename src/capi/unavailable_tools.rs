//! Functions that the classic exports for its own programs without declaring them, and that this release does not have:
//! as in [`unavailable`](super::unavailable). They are not in the header.

use super::boundary;
use super::types::ploop_disk_images_data;
use super::unavailable::refuse;
use crate::bail;
use std::ffi::{c_char, c_int};

/// Converts all images of a disk between format versions 1 and 2. flags: keep 0.
#[unsafe(no_mangle)]
pub extern "C" fn ploop_change_fmt_version(di: *mut ploop_disk_images_data, new_version: c_int, flags: c_int) -> c_int {
    let _ = (di, new_version, flags);
    refuse("ploop_change_fmt_version")
}

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

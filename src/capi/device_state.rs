//! What the classic exports for its own programs about the state of devices, without declaring it. Not in the header.

use super::{boundary, convert};
use crate::error::{Error, Kind};
use crate::{device, ops};
use std::ffi::{CStr, c_char, c_int};
use std::os::fd::IntoRawFd;

/// The error for a NULL pointer.
fn null(what: &str) -> Error {
    Error::new(Kind::Param, format!("{what} is NULL"))
}

/// Stores a number of the device's state in *res: top, running, block_size (sectors), fmt_version, aborted, locked. 0, or
/// -1: no such device, or no such number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_get_attr(device: *const c_char, attr: *const c_char, res: *mut c_int) -> c_int {
    boundary::minus_one("ploop_get_attr", || {
        // SAFETY: the caller's strings, NULL or NUL-terminated.
        let (device, attr) = unsafe { (convert::text(device), convert::text(attr)) };
        let shown = |text: &CStr| text.to_string_lossy().into_owned();
        let device = device.map(shown).ok_or_else(|| null("ploop_get_attr(): the device"))?;
        let attr = attr.map(shown).ok_or_else(|| null("ploop_get_attr(): the attribute"))?;
        if res.is_null() {
            return Err(null("ploop_get_attr(): the place for the number"));
        }
        let value = ops::stat::attribute(&device, &attr)?;
        // SAFETY: not NULL, and the caller's to write. A device without images has top 4294967295, in C -1.
        unsafe { *res = value as c_int };
        Ok(())
    })
}

/// Stores the minor of the next device in *minor (N * 16 for /dev/ploopN) and returns a file descriptor that keeps it from
/// other devices until the caller closes it. -1: an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_getdevice(minor: *mut c_int) -> c_int {
    boundary::or("ploop_getdevice", -1, || {
        if minor.is_null() {
            return Err(null("ploop_getdevice(): the place for the minor"));
        }
        let (number, reserved) = device::reserve_minor()?;
        // SAFETY: not NULL, and the caller's to write. The driver's numbers end below 2^20.
        unsafe { *minor = number as c_int };
        Ok(reserved.into_raw_fd())
    })
}

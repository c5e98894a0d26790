//! Functions that the classic exports for its own programs without declaring them, and that this release does not have:
//! as in [`unavailable`](super::unavailable). They are not in the header.

use super::boundary;
use super::types::ploop_discard_stat;
use super::unavailable::refuse;
use crate::bail;
use libc::{off_t, stat};
use std::ffi::{c_char, c_int};

/// Opens the balloon file of a mounted file system.
#[unsafe(no_mangle)]
pub extern "C" fn get_balloon(mount_point: *const c_char, st: *mut stat, outfd: *mut c_int) -> c_int {
    let _ = (mount_point, st, outfd);
    refuse("get_balloon")
}

/// Changes the size of the balloon file, in sectors.
#[unsafe(no_mangle)]
pub extern "C" fn ploop_balloon_change_size(device: *const c_char, balloonfd: c_int, new_size: off_t) -> c_int {
    let _ = (device, balloonfd, new_size);
    refuse("ploop_balloon_change_size")
}

/// Stores the maintenance state of a device, PLOOP_MNTN_*, in *state.
#[unsafe(no_mangle)]
pub extern "C" fn ploop_balloon_get_state(device: *const c_char, state: *mut u32) -> c_int {
    let _ = (device, state);
    refuse("ploop_balloon_get_state")
}

/// Ends a maintenance state that an earlier process left.
#[unsafe(no_mangle)]
pub extern "C" fn ploop_balloon_clear_state(device: *const c_char) -> c_int {
    let _ = device;
    refuse("ploop_balloon_clear_state")
}

/// Finishes an interrupted relocation.
#[unsafe(no_mangle)]
pub extern "C" fn ploop_balloon_complete(device: *const c_char) -> c_int {
    let _ = device;
    refuse("ploop_balloon_complete")
}

/// Counts, and with repair frees, clusters that lie under the balloon file.
#[unsafe(no_mangle)]
pub extern "C" fn ploop_balloon_check_and_repair(
    device: *const c_char,
    mount_point: *const c_char,
    repair: c_int,
) -> c_int {
    let _ = (device, mount_point, repair);
    refuse("ploop_balloon_check_and_repair")
}

/// ploop_discard_get_stat() by device and mount point.
#[unsafe(no_mangle)]
pub extern "C" fn ploop_discard_get_stat_by_dev(
    device: *const c_char,
    mount_point: *const c_char,
    pd_stat: *mut ploop_discard_stat,
) -> c_int {
    let _ = (device, mount_point, pd_stat);
    refuse("ploop_discard_get_stat_by_dev")
}

/// ploop_discard() by device and mount point.
#[unsafe(no_mangle)]
pub extern "C" fn ploop_discard_by_dev(
    device: *const c_char,
    mount_point: *const c_char,
    minlen_b: u64,
    to_free: u64,
    stop: *const c_int,
) -> c_int {
    let _ = (device, mount_point, minlen_b, to_free, stop);
    refuse("ploop_discard_by_dev")
}

/// Enlarges a running device to new_size sectors.
#[unsafe(no_mangle)]
pub extern "C" fn ploop_grow_device(device: *const c_char, new_size: off_t) -> c_int {
    let _ = (device, new_size);
    refuse("ploop_grow_device")
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

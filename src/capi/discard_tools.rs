//! Compacting by device: functions that the classic exports without declaring them. They are not in the header.

use super::discard::by_dev;
use super::types::ploop_discard_stat;
use std::ffi::{c_char, c_int};

/// ploop_discard_get_stat() by device and mount point.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_discard_get_stat_by_dev(
    device: *const c_char,
    mount_point: *const c_char,
    pd_stat: *mut ploop_discard_stat,
) -> c_int {
    // SAFETY: the caller's strings and struct.
    unsafe { by_dev::stat(device, mount_point, pd_stat) }
}

/// ploop_discard() by device and mount point.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_discard_by_dev(
    device: *const c_char,
    mount_point: *const c_char,
    minlen_b: u64,
    to_free: u64,
    stop: *const c_int,
) -> c_int {
    // SAFETY: the caller's strings; its flag stays valid during the call.
    unsafe { by_dev::discard(device, mount_point, minlen_b, to_free, stop) }
}

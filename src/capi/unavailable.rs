//! Functions of libploop.h that this release does not have. They are exported so that programs link and start; a call
//! changes nothing, fails and says so.

use super::boundary;
use super::types::{ploop_create_param, ploop_disk_images_data};
use crate::bail;
use std::ffi::{c_char, c_int, c_ulonglong};

/// The last error of a call.
pub(super) fn text(name: &str) -> String {
    format!("{name}() is not available in version {} of this library; nothing was changed", env!("CARGO_PKG_VERSION"))
}

/// SYSEXIT_PARAM, and a last error that names the function.
pub(super) fn refuse(name: &str) -> c_int {
    boundary::call(name, || bail!(Param, "{}", text(name)))
}

/// Writes di to the descriptor fname. Not available: SYSEXIT_PARAM.
#[unsafe(no_mangle)]
pub extern "C" fn ploop_store_diskdescriptor(fname: *const c_char, di: *mut ploop_disk_images_data) -> c_int {
    let _ = (fname, di);
    refuse("ploop_store_diskdescriptor")
}

/// Writes a descriptor for the image param->image, which need not exist. Not available: SYSEXIT_PARAM.
#[unsafe(no_mangle)]
pub extern "C" fn ploop_create_dd(ddxml: *const c_char, param: *mut ploop_create_param) -> c_int {
    let _ = (ddxml, param);
    refuse("ploop_create_dd")
}

/// Sets the limit of the top delta, in sectors. Not available: SYSEXIT_PARAM.
#[unsafe(no_mangle)]
pub extern "C" fn ploop_set_max_delta_size(di: *mut ploop_disk_images_data, size: c_ulonglong) -> c_int {
    let _ = (di, size);
    refuse("ploop_set_max_delta_size")
}

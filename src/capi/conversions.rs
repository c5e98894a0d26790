//! Another format for a disk.

use super::snapshots::change;
use super::types::{ploop_disk_images_data, ploop_image_mode};
use crate::bail;
use crate::descriptor::ImageMode;
use crate::ops::convert;
use std::ffi::c_int;

/// Converts a disk that is not mounted to another enum ploop_image_mode: its base image, whatever deltas stand on it. From
/// raw, or mounted: SYSEXIT_PARAM. An interrupted conversion is finished or undone by the next operation. flags: keep 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_convert_image(di: *mut ploop_disk_images_data, mode: c_int, flags: c_int) -> c_int {
    let _ = flags;
    // SAFETY: the caller's object, used by this thread alone.
    unsafe {
        change("ploop_convert_image", di, |descriptor, _| {
            let mode = match mode {
                m if m == ploop_image_mode::PLOOP_EXPANDED_MODE as c_int => ImageMode::Expanded,
                m if m == ploop_image_mode::PLOOP_EXPANDED_PREALLOCATED_MODE as c_int => ImageMode::Preallocated,
                m if m == ploop_image_mode::PLOOP_RAW_MODE as c_int => ImageMode::Raw,
                m => bail!(Param, "ploop_convert_image: mode {m}: 0 (expanded), 1 (preallocated) or 2 (raw) wanted"),
            };
            convert::convert_disk(descriptor, mode)
        })
    }
}

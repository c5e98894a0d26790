//! Sizes of disks.

use super::snapshots::change;
use super::types::{ploop_disk_images_data, ploop_resize_param};
use crate::bail;
use crate::ops::{resize, resize_balloon};
use std::ffi::c_int;

/// Gives a disk param->size sectors, rounded up to whole clusters; needs root. Larger than it is: with its last partition and
/// the file system (ext, xfs, btrfs) on it, mounted or not. Smaller: with param->offline_resize the file system (ext,
/// btrfs) of a disk that is not mounted gets that size, and the image file shrinks; else, and of a mounted disk, the balloon
/// of an ext4 or xfs takes the difference. 0: the largest balloon. SYSEXIT_PARAM: smaller than the files need.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_resize_image(di: *mut ploop_disk_images_data, param: *mut ploop_resize_param) -> c_int {
    // SAFETY: the caller's object, used by this thread alone.
    unsafe {
        change("ploop_resize_image", di, |descriptor, _| {
            // SAFETY: the caller's struct, NULL or valid, unchanged during the call.
            let Some(p) = param.as_ref() else { bail!(Param, "ploop_resize_image: param is NULL") };
            if p.size == 0 {
                return resize_balloon::largest(descriptor);
            }
            resize::resize_disk(descriptor, p.size, p.offline_resize != 0)
        })
    }
}

//! Sizes of disks.

use super::snapshots::change;
use super::types::{ploop_disk_images_data, ploop_resize_param};
use crate::bail;
use crate::ops::{resize, resize_balloon};
use std::ffi::c_int;

/// Enlarges a disk that is not mounted to param->size sectors, rounded up to whole clusters, with its last partition and the
/// file system (ext, xfs, btrfs) on it; needs root. 0: the largest balloon. Of a mounted disk with ext4, not larger than its
/// device: the balloon takes the difference. Smaller than a disk that is not mounted, or larger than a mounted one, in this
/// version: SYSEXIT_PARAM.
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
            resize::resize_disk(descriptor, p.size)
        })
    }
}

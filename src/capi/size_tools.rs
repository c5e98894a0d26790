//! Growing disks and images, other versions, and descriptors made anew: functions that the classic exports without declaring them. They are
//! not in the header.

use super::boundary;
use super::convert;
use super::snapshots::change;
use super::types::ploop_disk_images_data;
use crate::bail;
use crate::error::Result;
use crate::format::header::Version;
use crate::ops::{convert as conversion, grow, restore};
use crate::units::ClusterSize;
use std::ffi::{c_char, c_int};

#[allow(non_camel_case_types)]
type off_t = libc::off_t;

fn sectors(size: off_t) -> Result<u64> {
    match u64::try_from(size) {
        Ok(sectors) if sectors > 0 => Ok(sectors),
        _ => bail!(Param, "a size of {size} sectors: at least 1 wanted"),
    }
}

/// Enlarges a disk, mounted or not, to size sectors, by its top image; neither its partitions nor the file system inside.
/// Smaller than it is: SYSEXIT_PARAM.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_grow_image(di: *mut ploop_disk_images_data, size: off_t) -> c_int {
    // SAFETY: the caller's object, used by this thread alone.
    unsafe { change("ploop_grow_image", di, |descriptor, _| grow::grow_disk(descriptor, sectors(size)?)) }
}

/// Enlarges a running device to new_size sectors, with its top image and its descriptor. The same size: 0; smaller:
/// SYSEXIT_PARAM.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_grow_device(device: *const c_char, new_size: off_t) -> c_int {
    boundary::call("ploop_grow_device", || {
        // SAFETY: the caller's string, NULL or NUL-terminated.
        let device = unsafe { convert::path(device, "device")? };
        grow::grow_device(&device.to_string_lossy(), sectors(new_size)?)
    })
}

/// Enlarges one image that no device uses to new_size sectors, a multiple of its cluster. Marked in use:
/// SYSEXIT_OPEN.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_grow_delta_offline(image: *const c_char, new_size: off_t) -> c_int {
    boundary::call("ploop_grow_delta_offline", || {
        // SAFETY: the caller's string, NULL or NUL-terminated.
        let image = unsafe { convert::path(image, "image")? };
        grow::grow_image(&image, false, sectors(new_size)?)
    })
}

/// Enlarges one raw image that no device uses to new_size sectors, rounded up to 4 KiB.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_grow_raw_delta_offline(image: *const c_char, new_size: off_t) -> c_int {
    boundary::call("ploop_grow_raw_delta_offline", || {
        // SAFETY: the caller's string, NULL or NUL-terminated.
        let image = unsafe { convert::path(image, "image")? };
        grow::grow_image(&image, true, sectors(new_size)?)
    })
}

/// Gives all images of a disk that is not mounted the format version new_version, 1 or 2. A raw base, mounted, or what version
/// 1 cannot express: SYSEXIT_PARAM. flags: keep 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_change_fmt_version(
    di: *mut ploop_disk_images_data,
    new_version: c_int,
    flags: c_int,
) -> c_int {
    let _ = flags;
    // SAFETY: the caller's object, used by this thread alone.
    unsafe {
        change("ploop_change_fmt_version", di, |descriptor, _| {
            let version = match new_version {
                1 => Version::V1,
                2 => Version::V2,
                n => bail!(Param, "ploop_change_fmt_version: version {n}: 1 or 2 wanted"),
            };
            conversion::change_version(descriptor, version)
        })
    }
}

/// Writes DiskDescriptor.xml for a single image into dir. raw: the image is raw, its cluster blocksize sectors (0: the
/// largest that fits). A descriptor that is there stays: SYSEXIT_PARAM.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_restore_descriptor(
    dir: *const c_char,
    delta_path: *mut c_char,
    raw: c_int,
    blocksize: c_int,
) -> c_int {
    boundary::call("ploop_restore_descriptor", || {
        // SAFETY: the caller's strings, NULL or NUL-terminated.
        let (dir, image) = unsafe { (convert::path(dir, "dir")?, convert::path(delta_path, "delta_path")?) };
        let cluster = match blocksize {
            0 => None,
            n => match u64::try_from(n) {
                Ok(sectors) => Some(ClusterSize::from_sectors(sectors)?),
                Err(_) => bail!(Param, "ploop_restore_descriptor: a cluster of {n} sectors"),
            },
        };
        restore::restore_descriptor(&dir, &image, raw != 0, cluster.filter(|_| raw != 0))
    })
}

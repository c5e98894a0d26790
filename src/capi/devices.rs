//! Finding devices, mounts, sizes.

use super::boundary;
use super::convert::{self, Long};
use super::handle::{self, Disk};
use super::types::{ploop_disk_images_data, ploop_info, ploop_spec};
use crate::bail;
use crate::device::Device;
use crate::error::{Kind, Result};
use crate::fs::mounts::Mount;
use crate::fs::stat::FsInfo;
use crate::ops;
use std::ffi::{OsStr, OsString, c_char, c_int, c_uint, c_ulonglong};
use std::path::Path;

/// Stores the device of this disk for its component in out, a buffer of len bytes. Returns 0; 1 when the disk is not
/// attached; -1 or SYSEXIT_LOCK on error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_get_dev(di: *mut ploop_disk_images_data, out: *mut c_char, len: c_int) -> c_int {
    boundary::three_way("ploop_get_dev", || {
        // SAFETY: the caller's object, used by this thread alone.
        let mut disk = unsafe { Disk::borrow(di) }?;
        convert::buffer(out, len)?;
        let found = ops::info::get_dev(disk.descriptor(), disk.component().unwrap_or_default());
        disk.read().map_err(|e| e.as_kind(Kind::Lock))?;
        // SAFETY: the caller's buffer of `len` bytes.
        unsafe { found_text(found?, out, len, Long::Refuse) }
    })
}

/// Stores all devices of this disk, whatever their component, in *out: an array that ends in NULL, for
/// ploop_free_array(). Returns 0; 1 when there is none and -1 on error, both with *out NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_get_devs(di: *mut ploop_disk_images_data, out: *mut *mut *mut c_char) -> c_int {
    boundary::three_way("ploop_get_devs", || {
        if out.is_null() {
            bail!(Param, "ploop_get_devs: place for the array is NULL");
        }
        // SAFETY: not NULL, and the caller's place for one pointer.
        unsafe { *out = std::ptr::null_mut() };
        // SAFETY: the caller's object, used by this thread alone.
        let mut disk = unsafe { Disk::borrow(di) }.map_err(not_locking)?;
        read_once(&mut disk)?;
        let devices = ops::find::get_devs(disk.descriptor()).map_err(not_locking)?;
        if devices.is_empty() {
            return Ok(false);
        }
        let array = handle::string_array(&devices)?;
        // SAFETY: as above.
        unsafe { *out = array };
        Ok(true)
    })
}

/// Is the disk attached, by a running device without component? 1 yes, 0 no, -1 error. No mount is needed for a yes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_is_mounted(di: *mut ploop_disk_images_data) -> c_int {
    boundary::yes_no("ploop_is_mounted", || {
        // SAFETY: the caller's object, used by this thread alone.
        let mut disk = unsafe { Disk::borrow(di) }?;
        read_once(&mut disk)?;
        if disk.base().is_none() {
            bail!(DiskDescr, "{} names no image", disk.descriptor().display());
        }
        Ok(match ops::find::devices(disk.descriptor(), Some(""))?.into_iter().next() {
            None => false,
            Some(device) if device.state.runs() => true,
            Some(device) => bail!(
                Sys,
                "{} has this disk but does not run (state: {}); see ploop doctor",
                device.node().display(),
                device.state.as_str()
            ),
        })
    })
}

/// Frees an array of strings made by this library, and the strings. NULL is allowed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_free_array(array: *mut *mut c_char) {
    boundary::void("ploop_free_array", || {
        // SAFETY: the caller's array, made by this library, which it gives up here.
        unsafe { handle::free_string_array(array) };
        Ok(())
    })
}

/// Stores the device whose base delta is the file delta, and whose component is component_name (NULL or "": none), in
/// buf; longer than size bytes it is cut. Returns 0; 1 not found; -1 error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_find_dev(
    component_name: *const c_char,
    delta: *const c_char,
    buf: *mut c_char,
    size: c_int,
) -> c_int {
    boundary::three_way("ploop_find_dev", || {
        convert::buffer(buf, size)?;
        // SAFETY: the caller's strings, NULL or NUL-terminated.
        let (component, delta) =
            unsafe { (convert::optional_string(component_name, "component name"), convert::path(delta, "delta")) };
        let found = ops::find::find_dev(component?.as_deref().unwrap_or_default(), &delta?).map_err(not_locking)?;
        // SAFETY: the caller's buffer of `size` bytes.
        unsafe { found_text(found, buf, size, Long::Cut) }
    })
}

/// Stores the device (/dev/ploopN) that is mounted on path in buf. Returns 0; 1 if no ploop device is mounted there; -1
/// on error, a short buffer included.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_get_dev_by_mnt(path: *const c_char, buf: *mut c_char, size: c_int) -> c_int {
    // SAFETY: the caller's string and buffer.
    unsafe {
        by_path("ploop_get_dev_by_mnt", path, "mount point", buf, size, |p| {
            Ok(ops::find::by_mount_point(p)?.map(|(device, _)| device.node().to_owned()))
        })
    }
}

/// As ploop_get_dev_by_mnt(), but stores the node that is mounted, which may be a partition (/dev/ploopNp1).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_get_partition_by_mnt(path: *const c_char, buf: *mut c_char, size: c_int) -> c_int {
    // SAFETY: the caller's string and buffer.
    unsafe {
        by_path("ploop_get_partition_by_mnt", path, "mount point", buf, size, |p| {
            Ok(ops::find::by_mount_point(p)?.map(|(device, mount)| mounted_node(&device, &mount)))
        })
    }
}

/// Stores the first mount point of device dev or its first partition in buf. Returns 0; 1 not mounted; -1 error, an
/// unknown device included.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_get_mnt_by_dev(dev: *const c_char, buf: *mut c_char, size: c_int) -> c_int {
    // SAFETY: the caller's string and buffer.
    unsafe {
        by_path("ploop_get_mnt_by_dev", dev, "device", buf, size, |device| {
            ops::find::mnt_by_dev(&device.to_string_lossy())
        })
    }
}

/// Stores the path of a running device's top delta in image and its format, raw or ploop1, in format, cut to the sizes of
/// the buffers. Either may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_find_top_delta_name_and_format(
    device: *const c_char,
    image: *mut c_char,
    image_size: usize,
    format: *mut c_char,
    format_size: usize,
) -> c_int {
    boundary::call("ploop_find_top_delta_name_and_format", || {
        // SAFETY: the caller's string, NULL or NUL-terminated.
        let Some(device) = unsafe { convert::optional_string(device, "device") }? else {
            bail!(Param, "device is NULL or empty; give its path, /dev/ploopN");
        };
        let found = ops::device_chain::device(&device)?;
        let raw = found.images.last().is_some_and(|l| l.raw);
        let texts = [
            (image, image_size, found.top().as_os_str()),
            (format, format_size, OsStr::new(if raw { "raw" } else { "ploop1" })),
        ];
        for (buffer, size, text) in texts.into_iter().filter(|(b, ..)| !b.is_null()) {
            let size = c_int::try_from(size).unwrap_or(c_int::MAX);
            // SAFETY: the caller's buffer of `size` bytes.
            unsafe { convert::copy_out(buffer, size, text, Long::Cut) }?;
        }
        Ok(())
    })
}

/// Can disks use format version 2 here? Always 1.
#[unsafe(no_mangle)]
pub extern "C" fn ploop_is_large_disk_supported() -> c_int {
    1
}

/// Nothing to do any more; 0.
#[deprecated]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_complete_running_operation(device: *const c_char) -> c_int {
    let _ = device;
    0
}

/// Stores size and use of the file system of the disk with descriptor descr in *info: as stored at the last unmount,
/// else from the mounted file system, else by mounting it for a moment.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_get_info_by_descr(descr: *const c_char, info: *mut ploop_info) -> c_int {
    boundary::call("ploop_get_info_by_descr", || {
        if info.is_null() {
            bail!(Param, "ploop_get_info_by_descr: place for the result is NULL");
        }
        // SAFETY: the caller's string, NULL or NUL-terminated.
        let descriptor = unsafe { convert::path(descr, "descriptor") }?;
        let answer = fs_answer(ops::info::fs_info(&descriptor)?);
        // SAFETY: not NULL, and the caller's place for the struct.
        unsafe { *info = answer };
        Ok(())
    })
}

pub(super) fn fs_answer(fs: FsInfo) -> ploop_info {
    ploop_info {
        fs_bsize: fs.block_size,
        fs_blocks: fs.blocks,
        fs_bfree: fs.free_blocks,
        fs_inodes: fs.inodes,
        fs_ifree: fs.free_inodes,
    }
}

/// Stores size, cluster and format version of the disk in *spec, from its device when it is attached.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_get_spec(di: *mut ploop_disk_images_data, spec: *mut ploop_spec) -> c_int {
    boundary::call("ploop_get_spec", || {
        // SAFETY: the caller's object, used by this thread alone.
        let mut disk = unsafe { Disk::borrow(di) }?;
        if spec.is_null() {
            bail!(Param, "ploop_get_spec: place for the result is NULL");
        }
        let found = ops::info::spec(disk.descriptor());
        disk.read().map_err(|e| e.as_kind(Kind::Lock))?;
        let found = found?;
        // SAFETY: not NULL, and the caller's place for the struct, of which `dummy` is left alone.
        unsafe {
            (*spec).size = found.sectors as libc::off_t;
            (*spec).blocksize = found.cluster;
            (*spec).fmt_version = found.version as c_int;
        }
        Ok(())
    })
}

/// Stores the largest size of a disk with clusters of blocksize sectors (0: 2048) in *max, in sectors.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_get_max_size(blocksize: c_uint, max: *mut c_ulonglong) -> c_int {
    boundary::call("ploop_get_max_size", || {
        if max.is_null() {
            bail!(Param, "ploop_get_max_size: place for the result is NULL");
        }
        let size = ops::info::max_size(blocksize)?;
        // SAFETY: not NULL, and the caller's place for the number.
        unsafe { *max = size };
        Ok(())
    })
}

/// Functions that take no descriptor lock do not return SYSEXIT_LOCK either.
fn not_locking(error: crate::Error) -> crate::Error {
    if error.kind() == Kind::Lock { error.as_kind(Kind::Sys) } else { error }
}

/// Reads the descriptor, without its lock, unless the object shows one already.
fn read_once(disk: &mut Disk) -> Result<()> {
    if disk.is_empty() { disk.read().map_err(not_locking) } else { Ok(()) }
}

/// Copies what was found to the caller's buffer.
///
/// # Safety
/// As [`convert::copy_out`].
unsafe fn found_text<S: AsRef<OsStr>>(found: Option<S>, out: *mut c_char, len: c_int, long: Long) -> Result<bool> {
    let Some(found) = found else { return Ok(false) };
    // SAFETY: this function's contract.
    unsafe { convert::copy_out(out, len, found.as_ref(), long) }?;
    Ok(true)
}

/// The ploop node for a mount: the mount may have been made by the name of the block device behind it.
fn mounted_node(device: &Device, mount: &Mount) -> OsString {
    let source = mount.source.as_os_str();
    let behind = format!("/dev/{}", device.disk);
    match source.to_str().and_then(|s| s.strip_prefix(&behind)) {
        Some(partition) if partition.is_empty() || partition.starts_with('p') => {
            let mut node = device.node().as_os_str().to_owned();
            node.push(partition);
            node
        }
        _ => source.to_owned(),
    }
}

/// Looks something up by one path.
///
/// # Safety
/// `path` is NULL or a C string; `buf` is NULL or has room for `size` bytes.
unsafe fn by_path<S: AsRef<OsStr>>(
    name: &str,
    path: *const c_char,
    what: &str,
    buf: *mut c_char,
    size: c_int,
    look_up: impl FnOnce(&Path) -> Result<Option<S>>,
) -> c_int {
    boundary::three_way(name, || {
        convert::buffer(buf, size)?;
        // SAFETY: this function's contract.
        let path = unsafe { convert::path(path, what) }?;
        // SAFETY: this function's contract.
        unsafe { found_text(look_up(&path).map_err(not_locking)?, buf, size, Long::Refuse) }
    })
}

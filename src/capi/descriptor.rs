//! Disk objects and their descriptors.

use super::boundary;
use super::convert::{self, Long};
use super::handle::{self, Disk};
use super::types::ploop_disk_images_data;
use crate::bail;
use crate::descriptor::{Image, LockedDescriptor};
use crate::error::{IoContext, Kind, Result};
use crate::format::guid::{self, Guid};
use std::ffi::{CStr, c_char, c_int};
use std::ptr;

/// Longest component name: kernels with ploop keep 64 bytes and the NUL must fit.
const COMPONENT_MAX: usize = 63;

/// Makes an object for the disk with descriptor fname, to be freed by ploop_close_dd(). The descriptor is not read yet.
/// Missing descriptor: SYSEXIT_DISKDESCR, and *di is left alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_open_dd(di: *mut *mut ploop_disk_images_data, fname: *const c_char) -> c_int {
    boundary::call("ploop_open_dd", || {
        if di.is_null() {
            bail!(Param, "ploop_open_dd: place for the disk object is NULL");
        }
        // SAFETY: the caller's string, NULL or NUL-terminated.
        let path = unsafe { convert::path(fname, "descriptor") }?;
        let path = std::fs::canonicalize(&path)
            .ctx(Kind::DiskDescr, || format!("cannot find descriptor {}", path.display()))?;
        let object = Disk::create(path)?;
        // SAFETY: not NULL, and the caller's place for one pointer.
        unsafe { *di = object };
        Ok(())
    })
}

/// Frees an object of ploop_open_dd() and everything in it. NULL is allowed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_close_dd(di: *mut ploop_disk_images_data) {
    boundary::void("ploop_close_dd", || {
        // SAFETY: the caller's object, which it gives up here.
        unsafe { handle::close(di) }
    })
}

/// Old name of ploop_close_dd().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_free_diskdescriptor(di: *mut ploop_disk_images_data) {
    boundary::void("ploop_free_diskdescriptor", || {
        // SAFETY: the caller's object, which it gives up here.
        unsafe { handle::close(di) }
    })
}

/// ploop_open_dd(), and the descriptor is read at once, without its lock. If that fails -1 is returned with *di set, to be
/// freed all the same.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_read_disk_descr(di: *mut *mut ploop_disk_images_data, file: *const c_char) -> c_int {
    // SAFETY: the same arguments.
    let opened = unsafe { ploop_open_dd(di, file) };
    if opened != 0 {
        return opened;
    }
    boundary::minus_one("ploop_read_disk_descr", || {
        // SAFETY: `*di` was just set to a new object that no other thread uses.
        unsafe { Disk::borrow(*di) }?.read()
    })
}

/// GUID of the parent of snapshot guid inside di, which must have been read; NULL for the base and an unknown one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_find_parent_by_guid(
    di: *mut ploop_disk_images_data,
    guid: *const c_char,
) -> *mut c_char {
    boundary::or("ploop_find_parent_by_guid", ptr::null_mut(), || {
        // SAFETY: the caller's object, used by this thread alone, and its string.
        let (disk, guid) = unsafe { (Disk::borrow(di)?, convert::text(guid)) };
        let Some(shown) = guid.and_then(|g| disk.shown(g)) else { return Ok(ptr::null_mut()) };
        // SAFETY: a string of the object.
        let parent = unsafe { CStr::from_ptr(shown.parent) };
        let base = parent.to_bytes() == guid::NONE.as_str().as_bytes();
        Ok(if base { ptr::null_mut() } else { shown.parent })
    })
}

/// Not supported: logs an error, returns NULL.
#[deprecated]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_get_base_delta_uuid(di: *mut ploop_disk_images_data) -> *mut c_char {
    let _ = di;
    boundary::or("ploop_get_base_delta_uuid", ptr::null_mut(), || {
        bail!(Param, "ploop_get_base_delta_uuid is not supported; ploop_get_base_delta_fname gives the base's file")
    })
}

/// Sets the component (at most 63 bytes) by which devices of this object are made and looked for: one image can be attached
/// once for each. NULL or "": none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_set_component_name(
    di: *mut ploop_disk_images_data,
    component_name: *const c_char,
) -> c_int {
    boundary::call("ploop_set_component_name", || {
        // SAFETY: the caller's object, used by this thread alone, and its string.
        let (disk, name) = unsafe { (Disk::borrow(di), convert::optional_string(component_name, "component name")) };
        let mut disk = disk.map_err(|e| if di.is_null() { e.as_kind(Kind::Param) } else { e })?;
        let name = name?;
        if let Some(name) = name.as_ref().filter(|n| n.len() > COMPONENT_MAX) {
            bail!(Param, "component name {name} has {} bytes; at most {COMPONENT_MAX} are possible", name.len());
        }
        disk.set_component(name);
        Ok(())
    })
}

/// Stores the path of the top delta in out, a buffer of len bytes. Too short: SYSEXIT_PARAM.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_get_top_delta_fname(
    di: *mut ploop_disk_images_data,
    out: *mut c_char,
    len: c_int,
) -> c_int {
    boundary::call("ploop_get_top_delta_fname", || {
        // SAFETY: the caller's object, used by this thread alone, and its buffer of `len` bytes.
        unsafe { delta_fname(di, out, len, |chain| chain.last().copied()) }
    })
}

/// Stores the path of the base delta in out, a buffer of len bytes. Too short: SYSEXIT_PARAM.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_get_base_delta_fname(
    di: *mut ploop_disk_images_data,
    out: *mut c_char,
    len: c_int,
) -> c_int {
    boundary::call("ploop_get_base_delta_fname", || {
        // SAFETY: the caller's object, used by this thread alone, and its buffer of `len` bytes.
        unsafe { delta_fname(di, out, len, |chain| chain.first().copied()) }
    })
}

/// # Safety
/// As for the two functions above.
unsafe fn delta_fname(
    di: *mut ploop_disk_images_data,
    out: *mut c_char,
    len: c_int,
    pick: for<'a> fn(&[&'a Image]) -> Option<&'a Image>,
) -> Result<()> {
    // SAFETY: this function's contract.
    let mut disk = unsafe { Disk::borrow(di) }?;
    convert::buffer(out, len)?;
    let locked = lock(&mut disk)?;
    let chain = locked.chain(&locked.top).map_err(|e| e.context(disk.descriptor().display()))?;
    let Some(image) = pick(&chain) else {
        bail!(DiskDescr, "{}: the chain of the top delta is empty", disk.descriptor().display());
    };
    // SAFETY: this function's contract.
    unsafe { convert::copy_out(out, len, image.file.as_os_str(), Long::Refuse) }
}

/// Locks the disk's descriptor, reads it again and shows it in the object's visible fields.
pub(super) fn lock(disk: &mut Disk) -> Result<LockedDescriptor> {
    let locked = LockedDescriptor::open_to_look(disk.descriptor()).inspect_err(|_| disk.clear())?;
    disk.fill(&locked)?;
    Ok(locked)
}

/// Stores a new random GUID in uuid, a buffer of len bytes (at least 39).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_uuid_generate(uuid: *mut c_char, len: c_int) -> c_int {
    boundary::call("ploop_uuid_generate", || {
        // SAFETY: the caller's buffer of `len` bytes.
        unsafe { convert::copy_out(uuid, len, Guid::generate().as_str().as_ref(), Long::Refuse) }
    })
}

//! Snapshots: taking, deleting, merging, switching; replacing an image by a copy.

use super::boundary;
use super::convert;
use super::handle::Disk;
use super::types::{
    ploop_disk_images_data, ploop_merge_param, ploop_replace_flags, ploop_replace_param, ploop_snapshot_param,
    ploop_snapshot_switch_param, ploop_tsnapshot_param,
};
use crate::bail;
use crate::capi::consts::{PLOOP_SNAP_SKIP_TOPDELTA_CREATE, PLOOP_SNAP_SKIP_TOPDELTA_DESTROY};
use crate::error::Result;
use crate::format::guid::Guid;
use crate::ops::merge::{self, MergeParams};
use crate::ops::replace::{self, Which};
use crate::ops::snapshot::{self, SnapshotParams, TemporaryParams};
use crate::ops::switch::{self, SwitchParams};
use crate::units::Level;
use std::ffi::{c_char, c_int};
use std::os::fd::IntoRawFd;
use std::path::Path;

/// Takes a snapshot: the disk's content is kept as param->guid, and a new top delta takes all further writes.
/// The file system of a running disk is brought to rest first. A GUID that is malformed or there already: SYSEXIT_PARAM.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_create_snapshot(
    di: *mut ploop_disk_images_data,
    param: *mut ploop_snapshot_param,
) -> c_int {
    // SAFETY: the caller's object, used by this thread alone.
    unsafe {
        change("ploop_create_snapshot", di, |descriptor, component| {
            // SAFETY: the caller's struct, NULL or valid, unchanged during the call.
            snapshot::create(descriptor, component, &snapshot_params(param)?)
        })
    }
}

/// # Safety
/// `param` is NULL or points to a valid struct whose strings no thread changes during the call.
pub(super) unsafe fn snapshot_params(param: *const ploop_snapshot_param) -> Result<SnapshotParams> {
    // SAFETY: this function's contract.
    unsafe {
        let Some(p) = param.as_ref() else { bail!(Param, "parameters of the snapshot are NULL") };
        Ok(SnapshotParams {
            guid: guid(p.guid)?.unwrap_or_else(Guid::generate),
            snap_dir: convert::optional_path(p.snap_dir),
            temporary: false,
        })
    }
}

/// Takes a temporary snapshot, which a later operation removes when no process uses it, and mounts it read-only as a
/// device of its own with component param->component_name; the device's path is stored in param->device. With holder_fd
/// the device is opened and the descriptor stored there: the snapshot stays until the caller closes it. Without
/// holder_fd the component gets a leading ~, and the snapshot stays until it is unmounted.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_create_temporary_snapshot(
    di: *mut ploop_disk_images_data,
    param: *mut ploop_tsnapshot_param,
    holder_fd: *mut c_int,
) -> c_int {
    boundary::call("ploop_create_temporary_snapshot", || {
        if di.is_null() {
            bail!(Param, "ploop_create_temporary_snapshot: disk object is NULL");
        }
        // SAFETY: the caller's object and struct, used by this thread alone.
        let (mut disk, p) = unsafe { (Disk::borrow(di)?, param.as_mut()) };
        let Some(p) = p else { bail!(Param, "ploop_create_temporary_snapshot: param is NULL") };
        // SAFETY: strings of the caller's struct, NULL or NUL-terminated.
        let (guid, component, target, snap_dir) = unsafe {
            (
                guid(p.guid)?,
                convert::optional_string(p.component_name, "component name")?,
                convert::optional_path(p.target),
                convert::optional_path(p.snap_dir),
            )
        };
        let (Some(guid), Some(component)) = (guid, component) else {
            bail!(Param, "ploop_create_temporary_snapshot: guid and component_name must be given");
        };
        let params = TemporaryParams { guid, snap_dir, target, options: None, with_holder: !holder_fd.is_null() };
        let taken = snapshot::create_temporary(disk.descriptor(), &component, &params);
        show(&mut disk);
        let taken = taken?;
        convert::store_fixed(&mut p.device, &taken.device, "device")?;
        if let Some(file) = taken.holder {
            // SAFETY: a holder is there only if `holder_fd` is not NULL; it is the caller's place for one number.
            unsafe { *holder_fd = file.into_raw_fd() };
        }
        Ok(())
    })
}

/// Deletes snapshot guid. Deltas that stand on it keep their content: a single one is merged into it; for several it
/// stays, marked temporary, until one is left. The base and the top of a running disk: SYSEXIT_PARAM; unknown:
/// SYSEXIT_NOSNAP.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_delete_snapshot(di: *mut ploop_disk_images_data, guid: *const c_char) -> c_int {
    // SAFETY: the caller's object, used by this thread alone, and its string.
    unsafe {
        change("ploop_delete_snapshot", di, |descriptor, _| match self::guid(guid)? {
            Some(guid) => snapshot::delete(descriptor, &guid),
            None => bail!(Param, "ploop_delete_snapshot: no GUID given"),
        })
    }
}

/// Deletes the top delta of a disk that does not run; its parent becomes the top. di must have been read before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_delete_top_delta(di: *mut ploop_disk_images_data) -> c_int {
    boundary::call("ploop_delete_top_delta", || {
        // SAFETY: the caller's object, used by this thread alone.
        let mut disk = unsafe { Disk::borrow(di) }?;
        if disk.is_empty() {
            bail!(Format, "ploop_delete_top_delta: the descriptor was not read yet; call ploop_read_disk_descr()");
        }
        let done = snapshot::delete_top(disk.descriptor());
        show(&mut disk);
        done
    })
}

/// Merges snapshot param->guid (NULL: the top) into its parent, or with all that it stands on down to param->guid2, or with
/// param->merge_all the top down to the base. The result keeps the upper one's GUID in the lower one's file, or in the new
/// file param->new_delta. The disk may run. A merge that has begun is not undone: the same call finishes it.
/// Unknown snapshot: SYSEXIT_NOSNAP.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_merge_snapshot(di: *mut ploop_disk_images_data, param: *mut ploop_merge_param) -> c_int {
    // SAFETY: the caller's object, used by this thread alone.
    unsafe {
        change("ploop_merge_snapshot", di, |descriptor, component| {
            // SAFETY: the caller's struct, NULL or valid, unchanged during the call.
            let Some(p) = param.as_ref() else { bail!(Param, "ploop_merge_snapshot: param is NULL") };
            let params = MergeParams {
                guid: guid(p.guid)?,
                guid2: guid(p.guid2)?,
                all: p.merge_all != 0,
                new_delta: convert::optional_path(p.new_delta),
            };
            merge::merge_snapshot(descriptor, component, &params)
        })
    }
}

/// Makes snapshot param->guid the parent of a new, empty top; the old top is removed. The disk must not run.
/// PLOOP_SNAP_SKIP_TOPDELTA_DESTROY: the old top is kept as snapshot param->guid_old (NULL: a random GUID).
/// PLOOP_SNAP_SKIP_TOPDELTA_CREATE: the snapshot itself becomes the top. Unknown snapshot: SYSEXIT_NOSNAP.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_switch_snapshot_ex(
    di: *mut ploop_disk_images_data,
    param: *mut ploop_snapshot_switch_param,
) -> c_int {
    // SAFETY: the caller's object, used by this thread alone.
    unsafe {
        change("ploop_switch_snapshot_ex", di, |descriptor, component| {
            // SAFETY: the caller's struct, NULL or valid, unchanged during the call.
            let Some(p) = param.as_ref() else { bail!(Param, "ploop_switch_snapshot_ex: param is NULL") };
            switch(descriptor, component, p.guid, p.guid_old, p.flags)
        })
    }
}

/// ploop_switch_snapshot_ex() without a GUID for the old top.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_switch_snapshot(
    di: *mut ploop_disk_images_data,
    uuid: *const c_char,
    flags: c_int,
) -> c_int {
    // SAFETY: the caller's object, used by this thread alone, and its string.
    unsafe {
        change("ploop_switch_snapshot", di, |descriptor, component| {
            switch(descriptor, component, uuid, std::ptr::null(), flags)
        })
    }
}

/// Replaces an image of the disk by the file param->file, an identical copy of it. Of a running disk any image but the
/// top can be replaced. PLOOP_REPLACE_KEEP_NAME: the copy gets the image's name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_replace_image(
    di: *mut ploop_disk_images_data,
    param: *mut ploop_replace_param,
) -> c_int {
    // SAFETY: the caller's object, used by this thread alone.
    unsafe {
        change("ploop_replace_image", di, |descriptor, component| {
            // SAFETY: the caller's struct, NULL or valid, unchanged during the call.
            let Some(p) = param.as_ref() else { bail!(Param, "ploop_replace_image: param is NULL") };
            let new = convert::path(p.file, "file")?;
            let which = match (guid(p.guid)?, convert::optional_path(p.cur_file)) {
                (Some(guid), _) => Which::Guid(guid),
                (None, Some(file)) => Which::File(file),
                (None, None) => match Level::try_from(p.level) {
                    Ok(level) => Which::Level(level),
                    Err(_) => bail!(Param, "level {}: must be 0 to {}", p.level, Level::MAX),
                },
            };
            let keep = ploop_replace_flags::PLOOP_REPLACE_KEEP_NAME as c_int;
            replace::replace(descriptor, component, &which, &new, p.flags & keep != 0)
        })
    }
}

/// Runs an operation on the disk's descriptor under its component, and shows the descriptor as it is afterwards.
///
/// # Safety
/// `di` is NULL or an open object of this library that this thread alone uses.
pub(super) unsafe fn change(
    name: &str,
    di: *mut ploop_disk_images_data,
    operation: impl FnOnce(&Path, &str) -> Result<()>,
) -> c_int {
    boundary::call(name, || {
        // SAFETY: this function's contract.
        let mut disk = unsafe { Disk::borrow(di) }?;
        let done = operation(disk.descriptor(), disk.component().unwrap_or_default());
        show(&mut disk);
        done
    })
}

/// An error here is dropped: the operation has read the descriptor itself, and its result is returned.
fn show(disk: &mut Disk) {
    let _ = disk.read();
}

/// # Safety
/// The strings are NULL or C strings.
unsafe fn switch(
    descriptor: &Path,
    component: &str,
    to: *const c_char,
    old: *const c_char,
    flags: c_int,
) -> Result<()> {
    // SAFETY: this function's contract.
    let to = unsafe { guid(to) }?;
    let Some(to) = to else { bail!(Param, "no GUID to switch to is given") };
    let no_new_top = flags & PLOOP_SNAP_SKIP_TOPDELTA_CREATE != 0;
    // Without a new top the old one is always dropped.
    let keep_top = !no_new_top && flags & PLOOP_SNAP_SKIP_TOPDELTA_DESTROY != 0;
    // SAFETY: this function's contract.
    let guid_old = if keep_top { unsafe { guid(old) }? } else { None };
    switch::switch(descriptor, component, &SwitchParams { guid: to, guid_old, keep_top, no_new_top })
}

/// A GUID in braces; NULL is none.
///
/// # Safety
/// `text` is NULL or a C string.
unsafe fn guid(text: *const c_char) -> Result<Option<Guid>> {
    // SAFETY: this function's contract.
    match unsafe { convert::text(text) } {
        None => Ok(None),
        Some(text) => Guid::parse(&text.to_string_lossy()).map(Some),
    }
}

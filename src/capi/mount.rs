//! Creating, attaching and mounting disks, unmounting and detaching them.

use super::boundary;
use super::convert;
use super::handle::Disk;
use super::types::{ploop_create_flags, ploop_create_param, ploop_disk_images_data, ploop_mount_param};
use crate::bail;
use crate::descriptor::ImageMode;
use crate::error::Result;
use crate::format::header::Version;
use crate::fs::mkfs::{FsType, Inodes};
use crate::ops;
use crate::ops::create::{CreateParams, FsParams};
use crate::ops::mount::{MountParams, Mounted};
use crate::units::ClusterSize;
use std::ffi::{c_char, c_int};

/// Creates an image and DiskDescriptor.xml beside it, and in it, when param->fstype says so, a GPT with one partition, a
/// file system and the balloon file. Neither file may exist. After an error the files that this call made are removed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_create_image(param: *mut ploop_create_param) -> c_int {
    boundary::call("ploop_create_image", || {
        // SAFETY: the caller's struct, NULL or valid, unchanged during the call.
        let params = unsafe { create_params(param) }?;
        ops::create::create_image(&params)
    })
}

/// Attaches the disk, from param->guid (NULL: the top) down to the base, to a device, stores its path in param->device,
/// and mounts it on param->target if given. Already attached with this component: SYSEXIT_MOUNT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_mount_image(di: *mut ploop_disk_images_data, param: *mut ploop_mount_param) -> c_int {
    boundary::call("ploop_mount_image", || {
        // SAFETY: the caller's object, used by this thread alone, and its struct, NULL or valid.
        let (disk, params) = unsafe { (Disk::borrow(di), mount_params(param)) };
        let (mut disk, params) = (disk?, params?);
        let mounted = ops::mount::mount_descriptor(disk.descriptor(), disk.component().unwrap_or_default(), &params);
        show(&mut disk);
        // SAFETY: `mount_params` refused NULL.
        unsafe { store_mounted(param, &mounted?) }
    })
}

/// ploop_mount_image() for a snapshot: param->guid must be set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_mount_snapshot(di: *mut ploop_disk_images_data, param: *mut ploop_mount_param) -> c_int {
    let named = boundary::call("ploop_mount_snapshot", || {
        // SAFETY: the caller's struct, NULL or valid.
        match unsafe { param.as_ref() } {
            Some(p) if !p.guid.is_null() => Ok(()),
            Some(_) => bail!(Param, "ploop_mount_snapshot: no GUID given"),
            None => bail!(Param, "mount parameters are NULL"),
        }
    });
    // SAFETY: the same arguments.
    if named != 0 { named } else { unsafe { ploop_mount_image(di, param) } }
}

/// Attaches a chain of files, base first, in an array that ends in NULL, without descriptor. di may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_mount(
    di: *mut ploop_disk_images_data,
    images: *mut *mut c_char,
    param: *mut ploop_mount_param,
    raw: c_int,
) -> c_int {
    boundary::call("ploop_mount", || {
        // SAFETY: the caller's array of strings and its struct, NULL or valid.
        let (images, params) = unsafe { (convert::paths(images, "list of images"), mount_params(param)) };
        let (images, mut params) = (images?, params?);
        if images.is_empty() {
            bail!(Param, "ploop_mount: the list of images is empty");
        }
        if !di.is_null() && params.cluster.is_none() {
            // SAFETY: the caller's object, used by this thread alone.
            let disk = unsafe { Disk::borrow(di) }?;
            if !disk.is_empty() {
                params.cluster = Some(ClusterSize::from_sectors(disk.blocksize().into())?);
            }
        }
        if raw != 0 && params.cluster.is_none() {
            bail!(
                Param,
                "ploop_mount: a raw image's cluster size must be given, in param->blocksize or by the disk object"
            );
        }
        let mounted = ops::mount::mount_list(&images, raw != 0, &params)?;
        // SAFETY: `mount_params` refused NULL.
        unsafe { store_mounted(param, &mounted) }
    })
}

/// Unmounts the disk's file system and detaches its device. Not attached: SYSEXIT_DEV_NOT_MOUNTED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_umount_image(di: *mut ploop_disk_images_data) -> c_int {
    boundary::call("ploop_umount_image", || {
        // SAFETY: the caller's object, used by this thread alone.
        let mut disk = unsafe { Disk::borrow(di) }?;
        let done = ops::umount::umount_descriptor(disk.descriptor(), disk.component().unwrap_or_default());
        show(&mut disk);
        done
    })
}

/// Unmounts and detaches a device by its path. di may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_umount(device: *const c_char, di: *mut ploop_disk_images_data) -> c_int {
    boundary::call("ploop_umount", || {
        if device.is_null() {
            bail!(Sys, "ploop_umount: device is NULL; give its path, /dev/ploopN");
        }
        // SAFETY: the caller's string.
        let Some(device) = unsafe { convert::optional_string(device, "device") }? else {
            bail!(Param, "device is an empty string; give its path, /dev/ploopN");
        };
        // SAFETY: the caller's object, used by this thread alone.
        let disk = if di.is_null() { None } else { Some(unsafe { Disk::borrow(di) }?) };
        ops::umount::umount_device(&device, disk.as_ref().map(Disk::descriptor))
    })
}

/// Shows the descriptor as it is after the operation. An error here is dropped: the operation has read the descriptor
/// itself, and its result is returned.
fn show(disk: &mut Disk) {
    let _ = disk.read();
}

/// # Safety
/// `param` is NULL or points to a valid struct whose strings no thread changes during the call.
pub(super) unsafe fn create_params(param: *const ploop_create_param) -> Result<CreateParams> {
    // SAFETY: this function's contract.
    let Some(p) = (unsafe { param.as_ref() }) else {
        bail!(Param, "creation parameters are NULL");
    };
    let mode = match p.mode {
        0 => ImageMode::Expanded,
        1 => ImageMode::Preallocated,
        2 => ImageMode::Raw,
        mode => bail!(Creat, "image mode {mode}: must be 0 (expanded), 1 (preallocated) or 2 (raw)"),
    };
    // The classic accepts any version number with a file system and crashes on most of them without one.
    let version = match p.fmt_version {
        0 | 2 => Version::V2,
        1 => Version::V1,
        other => bail!(Param, "format version {other}: must be 1, 2 or 0 for the best"),
    };
    // SAFETY: this function's contract.
    let (image, fstype) = unsafe { (convert::path(p.image, "image"), convert::optional_string(p.fstype, "fstype")) };
    let fs = match fstype?.as_deref() {
        None => None,
        Some(name) => Some(FsParams {
            fstype: fs_type(name)?,
            block_size: p.fsblocksize,
            lazy: p.flags & ploop_create_flags::PLOOP_CREATE_NOLAZY as u32 == 0,
            inodes: Inodes::Usual,
        }),
    };
    Ok(CreateParams {
        image: image?,
        sectors: p.size,
        cluster: cluster(p.blocksize)?.unwrap_or(ClusterSize::DEFAULT),
        version,
        mode,
        fs,
        without_partition: p.without_partition != 0,
    })
}

fn fs_type(name: &str) -> Result<FsType> {
    match name {
        "ext4" => Ok(FsType::Ext4),
        "ext3" => Ok(FsType::Ext3),
        _ => bail!(Param, "file system {name} cannot be made: must be ext4 or ext3"),
    }
}

/// # Safety
/// As [`create_params`].
unsafe fn mount_params(param: *const ploop_mount_param) -> Result<MountParams> {
    // SAFETY: this function's contract.
    let Some(p) = (unsafe { param.as_ref() }) else {
        bail!(Param, "mount parameters are NULL");
    };
    let device = convert::fixed(&p.device);
    // The node's whole path has to fit into the same array afterwards.
    let folder = if device.starts_with(b"/") { 0 } else { "/dev/".len() };
    if folder + device.len() >= p.device.len() {
        bail!(
            Param,
            "device name {:?} has {} bytes; its path can have {}",
            String::from_utf8_lossy(&device),
            device.len(),
            p.device.len() - 1
        );
    }
    let Ok(device) = String::from_utf8(device) else {
        bail!(Param, "device name {:?} is not UTF-8", convert::fixed(&p.device).escape_ascii().to_string());
    };
    // SAFETY: this function's contract.
    let (fstype, target, guid, data) = unsafe {
        (
            convert::optional_string(p.fstype, "fstype")?,
            convert::optional_path(p.target),
            convert::optional_string(p.guid, "guid")?,
            convert::optional_string(p.mount_data, "mount_data")?,
        )
    };
    Ok(MountParams {
        device: Some(device).filter(|d| !d.is_empty()),
        read_only: p.ro != 0,
        noatime: p.flags & libc::MS_NOATIME as c_int != 0,
        fstype,
        target,
        guid,
        quota: p.quota != 0,
        options: data,
        cluster: cluster(p.blocksize)?,
        fsck: p.fsck != 0,
        ..MountParams::default()
    })
}

/// Stores the results of a mount. `dummy` and the fields of steps that did not run are left alone.
///
/// # Safety
/// `param` points to the caller's struct.
unsafe fn store_mounted(param: *mut ploop_mount_param, mounted: &Mounted) -> Result<()> {
    // SAFETY: this function's contract; no other reference to the struct is alive.
    let param = unsafe { &mut *param };
    convert::store_fixed(&mut param.device, &mounted.device.node().to_string_lossy(), "device")?;
    if let Some(rc) = mounted.fsck_rc {
        param.fsck_rc = rc;
    }
    Ok(())
}

fn cluster(sectors: u32) -> Result<Option<ClusterSize>> {
    if sectors == 0 { Ok(None) } else { ClusterSize::from_sectors(sectors.into()).map(Some) }
}

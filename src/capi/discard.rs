//! Compacting running disks.

use super::boundary;
use super::convert;
use super::snapshots::change;
use super::types::{ploop_discard_param, ploop_discard_stat, ploop_disk_images_data};
use crate::bail;
use crate::error::{Error, Kind};
use crate::ops::discard::{self, DiscardParams, DiscardStat};
use std::ffi::c_int;

/// What the classic returns when the work itself has failed.
fn code(code: c_int) -> c_int {
    if code == Kind::Reloc.code() { -1 } else { code }
}

/// Gives space that the file system inside does not use back to the host, while the disk is in use. Not mounted:
/// SYSEXIT_PARAM, unless param->automount. The work failed: -1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_discard(di: *mut ploop_disk_images_data, param: *mut ploop_discard_param) -> c_int {
    // SAFETY: the caller's object, used by this thread alone.
    code(unsafe {
        change("ploop_discard", di, |descriptor, component| {
            // SAFETY: the caller's struct, NULL or valid; this thread alone changes it during the call.
            let Some(p) = param.as_mut() else { bail!(Param, "ploop_discard: param is NULL") };
            let params = DiscardParams {
                shortest: p.minlen_b,
                to_free: p.to_free,
                automount: p.automount != 0,
                defrag: p.defrag != 0,
            };
            let stop = p.stop;
            // SAFETY: NULL or the address of an int that stays valid during the call; another thread or a signal handler
            // may set it.
            let mut stopped = || !stop.is_null() && stop.read_volatile() != 0;
            let done = discard::discard(descriptor, component, &params, &mut stopped)?;
            p.to_free = done.to_free;
            Ok(())
        })
    })
}

fn store(to: &mut ploop_discard_stat, stat: DiscardStat) -> Result<(), Error> {
    let off = |bytes: u64| {
        i64::try_from(bytes).map_err(|_| Error::new(Kind::Param, format!("a size of {bytes} bytes is no off_t")))
    };
    *to = ploop_discard_stat {
        data_size: off(stat.data)?,
        ploop_size: off(stat.disk)?,
        image_size: off(stat.image)?,
        balloon_size: off(stat.balloon)?,
    };
    Ok(())
}

/// Stores the sizes that tell what ploop_discard() could free in *pd_stat. The disk has to be mounted: SYSEXIT_PARAM.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_discard_get_stat(
    di: *mut ploop_disk_images_data,
    pd_stat: *mut ploop_discard_stat,
) -> c_int {
    // SAFETY: the caller's object, used by this thread alone.
    unsafe {
        change("ploop_discard_get_stat", di, |descriptor, component| {
            // SAFETY: the caller's struct, NULL or valid.
            let Some(to) = pd_stat.as_mut() else { bail!(Param, "ploop_discard_get_stat: pd_stat is NULL") };
            store(to, discard::stat(descriptor, component)?)
        })
    }
}

/// The same by device and mount point, for the functions of tools.
pub(super) mod by_dev {
    use super::*;
    use std::ffi::c_char;

    /// # Safety
    /// The strings are NULL or NUL-terminated, the struct is NULL or valid.
    pub unsafe fn stat(device: *const c_char, mount_point: *const c_char, pd_stat: *mut ploop_discard_stat) -> c_int {
        boundary::call("ploop_discard_get_stat_by_dev", || {
            // SAFETY: this function's contract.
            let (device, folder) =
                unsafe { (convert::path(device, "device")?, convert::path(mount_point, "mount_point")?) };
            // SAFETY: this function's contract.
            let Some(to) = (unsafe { pd_stat.as_mut() }) else {
                bail!(Param, "ploop_discard_get_stat_by_dev: pd_stat is NULL")
            };
            store(to, discard::stat_by_dev(&device.to_string_lossy(), &folder)?)
        })
    }

    /// # Safety
    /// The strings are NULL or NUL-terminated; `stop` is NULL or the address of an int that stays valid during the call.
    pub unsafe fn discard(
        device: *const c_char,
        mount_point: *const c_char,
        minlen_b: u64,
        to_free: u64,
        stop: *const c_int,
    ) -> c_int {
        code(boundary::call("ploop_discard_by_dev", || {
            // SAFETY: this function's contract.
            let (device, folder) =
                unsafe { (convert::path(device, "device")?, convert::path(mount_point, "mount_point")?) };
            let params = DiscardParams { shortest: minlen_b, to_free, ..DiscardParams::default() };
            // SAFETY: this function's contract; another thread or a signal handler may set it.
            let mut stopped = || !stop.is_null() && unsafe { stop.read_volatile() } != 0;
            discard::discard_by_dev(&device.to_string_lossy(), &folder, &params, &mut stopped).map(drop)
        }))
    }
}

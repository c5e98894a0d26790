//! The balloon: functions that the classic exports for its own programs without declaring them. They are not in the header.

use super::boundary;
use super::convert;
use crate::bail;
use crate::device::Device;
use crate::error::{IoContext, Kind, Result};
use crate::fs::balloon::{Balloon, Root};
use crate::ops::balloon;
use libc::{off_t, stat};
use nix::sys::stat::fstat;
use std::ffi::{c_char, c_int};
use std::os::fd::{BorrowedFd, IntoRawFd};

/// Opens the balloon of the file system that is mounted at mount_point. outfd not NULL: it is locked (17: another process has
/// it locked), and *outfd is to be closed by the caller. st not NULL: gets its attributes. With outfd alone a balloon that is
/// missing is made, else that is 4. 3: no ext4, or not its root folder.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn get_balloon(mount_point: *const c_char, st: *mut stat, outfd: *mut c_int) -> c_int {
    boundary::call("get_balloon", || {
        // SAFETY: the caller's string.
        let folder = unsafe { convert::path(mount_point, "mount point") }?;
        let root = Root::open(&folder)?;
        let opened = match outfd.is_null() {
            true => balloon::existing(&root, false)?,
            false => balloon::locked(&root, st.is_null())?,
        };
        if !st.is_null() {
            let attributes =
                fstat(&opened.file).ctx(Kind::Fstat, || format!("cannot look at {}", opened.path().display()))?;
            // SAFETY: the caller's struct.
            unsafe { st.write(attributes) };
        }
        if !outfd.is_null() {
            // SAFETY: the caller's variable.
            unsafe { outfd.write(opened.file.into_raw_fd()) };
        }
        Ok(())
    })
}

/// Gives the balloon that get_balloon() has opened and locked so many sectors, rounded up to blocks of its file system, and
/// frees the clusters of the image that it lies on. 20: no space; 17: other maintenance; 38: the top is raw.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_balloon_change_size(device: *const c_char, balloonfd: c_int, new_size: off_t) -> c_int {
    boundary::call("ploop_balloon_change_size", || {
        // SAFETY: the caller's string.
        let device = unsafe { by_name(device) }?;
        let Ok(sectors) = u64::try_from(new_size) else { bail!(Param, "a balloon of {new_size} sectors") };
        if balloonfd < 0 {
            bail!(Param, "balloonfd is {balloonfd}: that of get_balloon() is wanted");
        }
        // SAFETY: the caller keeps it open during the call; a number that is not open is refused by the kernel.
        let balloon = Balloon::of(unsafe { BorrowedFd::borrow_raw(balloonfd) })?;
        balloon::change_locked(&device, &balloon, sectors)
    })
}

/// Stores the maintenance state of a device, PLOOP_MNTN_*, in *state.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_balloon_get_state(device: *const c_char, state: *mut u32) -> c_int {
    boundary::call("ploop_balloon_get_state", || {
        if state.is_null() {
            bail!(Param, "ploop_balloon_get_state: state is NULL");
        }
        // SAFETY: the caller's string and variable.
        unsafe { state.write(by_name(device)?.maintenance().number()) };
        Ok(())
    })
}

/// Ends the state BALLOON that an earlier process has left. 17: the device is in another state.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_balloon_clear_state(device: *const c_char) -> c_int {
    boundary::call("ploop_balloon_clear_state", || {
        // SAFETY: the caller's string.
        balloon::clear_state(&unsafe { by_name(device) }?)
    })
}

/// Finishes an interrupted relocation or discard; 0 also if there is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_balloon_complete(device: *const c_char) -> c_int {
    boundary::call("ploop_balloon_complete", || {
        // SAFETY: the caller's string.
        balloon::complete_device(&unsafe { by_name(device) }?).map(drop)
    })
}

/// Counts, and with repair frees, clusters that lie under the balloon file.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_balloon_check_and_repair(
    device: *const c_char,
    mount_point: *const c_char,
    repair: c_int,
) -> c_int {
    boundary::call("ploop_balloon_check_and_repair", || {
        // SAFETY: the caller's strings.
        let (device, folder) = unsafe { (by_name(device)?, convert::path(mount_point, "mount point")?) };
        balloon::check_or_repair(&device, &Root::open(&folder)?, repair != 0).map(drop)
    })
}

/// A device by its node; one that is not there cannot be opened.
///
/// # Safety
/// `device` is NULL or a C string.
unsafe fn by_name(device: *const c_char) -> Result<Device> {
    // SAFETY: this function's contract.
    match unsafe { convert::optional_string(device, "device") }? {
        Some(name) => balloon::by_node(&name, Kind::Open),
        None => bail!(Param, "device is NULL or empty; give its path, /dev/ploopN"),
    }
}

//! Copying running disks.

use super::boundary;
use super::convert;
use super::types::{ploop_copy_receive_param, ploop_copy_send_param};
use crate::bail;
use crate::error::Result;
use crate::ops::copy;
use std::ffi::{OsString, c_char, c_int};
use std::path::PathBuf;

/// Sends the top delta of the running device arg->device to arg->ofd: a pipe or socket for ploop_copy_receive() of this library
/// or of versions 1.12 to 1.15, or a regular file, which is written in place and synced. arg->flush_cmd, for the shell, ends what
/// writes; then the file systems of the device are frozen for a moment. Nothing need be mounted. Something else than a pipe,
/// socket or file, or arg->feedback_fd no pipe or socket: SYSEXIT_PARAM; no device: SYSEXIT_DEVICE; levels of it are merged, it is
/// compacted or copied already: SYSEXIT_EBUSY; the command fails: SYSEXIT_SYS; the receiver cannot sync: SYSEXIT_FSYNC, does not
/// answer: SYSEXIT_PROTOCOL. With ofd 1 messages below errors are not printed from then on, with 2 none are. A receiver that ends
/// sends the caller SIGPIPE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_copy_send(arg: *mut ploop_copy_send_param) -> c_int {
    boundary::call("ploop_copy_send", || {
        // SAFETY: the caller's struct, which lives through the call, or NULL.
        let Some(arg) = (unsafe { arg.as_ref() }) else { bail!(Param, "arg is NULL; give a ploop_copy_send_param") };
        // SAFETY: the caller's strings, NULL or NUL-terminated.
        let (device, stop) = unsafe { device_and_command(arg.device, arg.flush_cmd)? };
        let feedback = Some(arg.feedback_fd).filter(|fd| *fd >= 0);
        copy::send_by_number(&device, arg.ofd, stop.as_deref(), feedback).map(drop)
    })
}

/// Old form of ploop_copy_send(), without answers; is_pipe is ignored.
#[deprecated]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_send(
    device: *const c_char,
    ofd: c_int,
    flush_cmd: *const c_char,
    is_pipe: c_int,
) -> c_int {
    let _ = is_pipe;
    boundary::call("ploop_send", || -> Result<()> {
        // SAFETY: the caller's strings, NULL or NUL-terminated.
        let (device, stop) = unsafe { device_and_command(device, flush_cmd)? };
        copy::send_by_number(&device, ofd, stop.as_deref(), None).map(drop)
    })
}

/// # Safety
/// Both are NULL or NUL-terminated strings.
unsafe fn device_and_command(device: *const c_char, command: *const c_char) -> Result<(PathBuf, Option<OsString>)> {
    // SAFETY: passed on.
    let device = unsafe { convert::path(device, "device")? };
    // SAFETY: passed on.
    let command = unsafe { convert::optional_path(command) };
    Ok((device, command.map(PathBuf::into_os_string)))
}

/// Receives into the new file arg->file what ploop_copy_send() of this library or of versions 1.12 to 1.15 sends to
/// arg->ifd. The file appears when all of it has come and is durable. It exists: SYSEXIT_CREAT; a descriptor that is no pipe
/// or socket: SYSEXIT_PARAM; the stream ends too early: SYSEXIT_READ; it is none: SYSEXIT_PROTOCOL. With feedback_fd 1 messages
/// below errors are not printed from then on, with 2 none are.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_copy_receive(arg: *mut ploop_copy_receive_param) -> c_int {
    boundary::call("ploop_copy_receive", || {
        // SAFETY: the caller's struct, which lives through the call, or NULL.
        let Some(arg) = (unsafe { arg.as_ref() }) else { bail!(Param, "arg is NULL; give a ploop_copy_receive_param") };
        // SAFETY: the caller's string, NULL or NUL-terminated.
        let file = unsafe { convert::path(arg.file, "file")? };
        copy::receive_by_number(&file, arg.ifd, Some(arg.feedback_fd).filter(|fd| *fd >= 0)).map(drop)
    })
}

/// Old form of ploop_copy_receive(), from standard input and without answers.
#[deprecated]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_receive(dst: *const c_char) -> c_int {
    boundary::call("ploop_receive", || -> Result<()> {
        // SAFETY: the caller's string, NULL or NUL-terminated.
        let file = unsafe { convert::path(dst, "dst")? };
        copy::receive_by_number(&file, 0, None).map(drop)
    })
}

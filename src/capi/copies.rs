//! Copying running disks.

use super::boundary;
use super::convert;
use super::types::ploop_copy_receive_param;
use crate::bail;
use crate::error::Result;
use crate::ops::copy;
use std::ffi::{c_char, c_int};

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

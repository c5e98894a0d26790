//! What direct I/O on a file needs.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

/// Alignment that direct I/O on a file needs, in bytes; 0: direct I/O is not possible.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirectAlign {
    pub memory: u32,
    pub offset: u32,
}

/// Asks the kernel (6.1 and later); none where kernel or file system does not tell.
pub fn direct_align(file: &File) -> io::Result<Option<DirectAlign>> {
    let mut buf = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the empty path with AT_EMPTY_PATH names the descriptor; `buf` has room for the answer.
    let rc = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, buf.as_mut_ptr())
    };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed before, and any bytes are a valid struct statx.
    let stat = unsafe { buf.assume_init() };
    if stat.stx_mask & libc::STATX_DIOALIGN == 0 {
        return Ok(None);
    }
    Ok(Some(DirectAlign { memory: stat.stx_dio_mem_align, offset: stat.stx_dio_offset_align }))
}

//! What direct I/O on a file needs, and where a file is, without a question to its file system.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

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

/// `st_dev` of what a path leads to, as the kernel remembers it: a file system whose server does not answer is not asked.
pub fn cached_dev(path: &Path) -> Option<u64> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut buf = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT;
    // SAFETY: `path` is a string that ends with a zero byte; `buf` has room for the answer.
    let rc = unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, libc::STATX_TYPE, buf.as_mut_ptr()) };
    if rc < 0 {
        return None;
    }
    // SAFETY: zeroed before, and any bytes are a valid struct statx.
    let stat = unsafe { buf.assume_init() };
    Some(libc::makedev(stat.stx_dev_major, stat.stx_dev_minor))
}

//! Flags of an inode, as lsattr shows them.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `EXT4_EXTENTS_FL`: ext4 maps this file by extents.
pub const EXTENTS: u32 = 0x0008_0000;

nix::ioctl_read!(fs_ioc_getflags, b'f', 1, libc::c_long);

/// `FS_IOC_GETFLAGS` of an open file.
pub fn get(file: impl AsFd) -> io::Result<u32> {
    // The call's number says long, the kernel stores an int: room for either, the int first in memory.
    let mut flags = [0u32; size_of::<libc::c_long>() / 4];
    // SAFETY: the pointer is to `c_long` bytes that live and are ours during the call, which keeps no reference to
    // them.
    unsafe { fs_ioc_getflags(file.as_fd().as_raw_fd(), flags.as_mut_ptr().cast()) }?;
    Ok(flags[0])
}

//! Freezing and trimming file systems. Frozen: all that was written is on the disk, and writers wait until the thaw. A freeze stays when the
//! process ends that made it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

nix::ioctl_readwrite!(fifreeze, b'X', 119, libc::c_int);
nix::ioctl_readwrite!(fithaw, b'X', 120, libc::c_int);

/// Freezes the file system that `file` lies on. EBUSY: it is frozen; EOPNOTSUPP: it cannot be.
pub fn freeze(file: &File) -> io::Result<()> {
    let mut unused = 0;
    // SAFETY: the descriptor is open; the kernel does not use the argument of this call.
    unsafe { fifreeze(file.as_raw_fd(), &mut unused) }?;
    Ok(())
}

/// Thaws it. EINVAL: it is not frozen.
pub fn thaw(file: &File) -> io::Result<()> {
    let mut unused = 0;
    // SAFETY: as in `freeze`.
    unsafe { fithaw(file.as_raw_fd(), &mut unused) }?;
    Ok(())
}

/// `struct fstrim_range`.
#[repr(C)]
pub struct TrimRange {
    start: u64,
    len: u64,
    minlen: u64,
}

nix::ioctl_readwrite!(fitrim, b'X', 121, TrimRange);

/// Has the file system that `file` lies on discard its free space; how many bytes that were. EOPNOTSUPP: it, or its
/// device, cannot.
pub fn trim(file: &File) -> io::Result<u64> {
    trim_range(file, 0, u64::MAX, 0)
}

/// The same of bytes `start` to `start + len` of the file system, for free extents of at least `shortest` bytes.
pub fn trim_range(file: &File, start: u64, len: u64, shortest: u64) -> io::Result<u64> {
    let mut range = TrimRange { start, len, minlen: shortest };
    // SAFETY: the descriptor is open; the kernel reads and writes one `struct fstrim_range`.
    unsafe { fitrim(file.as_raw_fd(), &mut range) }?;
    Ok(range.len)
}

/// Writes back all of the file system that `file` lies on.
pub fn sync_file_system(file: &File) -> io::Result<()> {
    Ok(nix::unistd::syncfs(file)?)
}

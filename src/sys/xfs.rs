//! What XFS says of its inodes.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `struct xfs_bulk_ireq`.
#[repr(C)]
#[derive(Default)]
struct Request {
    inode: u64,
    flags: u32,
    entries: u32,
    returned: u32,
    group: u32,
    reserved: [u64; 5],
}

/// The head of `struct xfs_bulkstat`, whose first field is the inode's number.
#[repr(C)]
struct Inode {
    number: u64,
    rest: [u64; 23],
}

/// `struct xfs_bulkstat_req` with room for one answer.
#[repr(C)]
pub struct Bulkstat {
    request: Request,
    answer: Inode,
}

/// `struct fsxattr`.
#[repr(C)]
#[derive(Default)]
pub struct Attributes {
    flags: u32,
    rest: [u32; 6],
}

/// XFS_BULK_IREQ_SPECIAL: `inode` is one of the numbers below.
const SPECIAL: u32 = 1 << 1;
/// XFS_BULK_IREQ_SPECIAL_ROOT.
const ROOT: u64 = 1;
/// FS_XFLAG_REALTIME.
const REALTIME: u32 = 1;

const _: () = assert!(size_of::<Request>() == 64 && size_of::<Inode>() == 192 && size_of::<Attributes>() == 28);

// XFS_IOC_BULKSTAT: the size in its number is that of the request without answers, and it is said to be read only.
nix::ioctl_readwrite_bad!(bulkstat, nix::request_code_read!(b'X', 127, size_of::<Request>()), Bulkstat);
nix::ioctl_read!(get_attributes, b'X', 31, Attributes);

/// The inode of the root folder of the XFS that `file` lies on (Linux 5.3 and later).
pub fn root_inode(file: impl AsFd) -> io::Result<u64> {
    let request = Request { inode: ROOT, flags: SPECIAL, entries: 1, ..Request::default() };
    let mut both = Bulkstat { request, answer: Inode { number: 0, rest: [0; 23] } };
    // SAFETY: the descriptor is open; XFS_IOC_BULKSTAT reads a `struct xfs_bulk_ireq` (64 bytes, layout asserted above), and
    // writes it and at most one `struct xfs_bulkstat` (192 bytes) behind it, which is what `entries` asks for.
    unsafe { bulkstat(file.as_fd().as_raw_fd(), &mut both) }?;
    match both.request.returned {
        1 => Ok(both.answer.number),
        n => Err(io::Error::other(format!("XFS_IOC_BULKSTAT returned {n} inodes, 1 wanted"))),
    }
}

/// Whether the blocks of a file are those of the real-time device, or part, of its XFS.
pub fn is_realtime(file: impl AsFd) -> io::Result<bool> {
    let mut attributes = Attributes::default();
    // SAFETY: the descriptor is open; FS_IOC_FSGETXATTR fills one `struct fsxattr` (28 bytes, layout asserted above).
    unsafe { get_attributes(file.as_fd().as_raw_fd(), &mut attributes) }?;
    Ok(attributes.flags & REALTIME != 0)
}

//! ioctls of block devices: partitions, disk sequence number, size.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

const BLKPG: u32 = 0x1269;
const BLKGETDISKSEQ: u32 = 0x8008_1280;
const BLKDISCARD: u32 = 0x1277;
const BLKGETSIZE64: u32 = 0x8008_1272;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
enum Op {
    Add = 1,
    Delete = 2,
    Resize = 3,
}

/// `struct blkpg_partition`.
#[repr(C)]
struct Partition {
    start: i64,
    length: i64,
    number: i32,
    names: [[u8; 64]; 2],
}

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
struct Arg {
    op: i32,
    flags: i32,
    len: i32,
    data: *mut Partition,
}

const _: () = assert!(size_of::<Partition>() == 152 && size_of::<Arg>() == 24);

fn blkpg(disk: BorrowedFd, op: Op, number: i32, start: u64, length: u64) -> io::Result<()> {
    let mut part = Partition { start: start as i64, length: length as i64, number, names: [[0; 64]; 2] };
    let arg = Arg { op: op as i32, flags: 0, len: size_of::<Partition>() as i32, data: &mut part };
    // SAFETY: BLKPG reads one `struct blkpg_ioctl_arg` and the `struct blkpg_partition` it points to (layouts asserted
    // above); both live until the call returns.
    match unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG as _, &arg) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Tells the kernel about a partition; start and length in bytes. EBUSY: it overlaps another or exists.
pub fn add(disk: BorrowedFd, number: i32, start: u64, length: u64) -> io::Result<()> {
    blkpg(disk, Op::Add, number, start, length)
}

/// Tells the kernel that a partition has another length; start and length in bytes. It may be mounted.
pub fn resize(disk: BorrowedFd, number: i32, start: u64, length: u64) -> io::Result<()> {
    blkpg(disk, Op::Resize, number, start, length)
}

/// Makes the kernel forget a partition. EBUSY: it is open or mounted; ENXIO: there is none.
pub fn delete(disk: BorrowedFd, number: i32) -> io::Result<()> {
    blkpg(disk, Op::Delete, number, 0, 0)
}

fn get_u64(device: BorrowedFd, request: u32) -> io::Result<u64> {
    let mut value = 0u64;
    // SAFETY: both requests store one u64.
    match unsafe { libc::ioctl(device.as_raw_fd(), request as _, &mut value) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(value),
    }
}

/// The disk's sequence number (Linux 5.15): another one after each new binding of a loop device.
pub fn diskseq(device: BorrowedFd) -> io::Result<u64> {
    get_u64(device, BLKGETDISKSEQ)
}

/// Size of a block device in bytes.
pub fn size(device: BorrowedFd) -> io::Result<u64> {
    get_u64(device, BLKGETSIZE64)
}

/// Gives a range of bytes back. EOPNOTSUPP: the device cannot.
pub fn discard(device: BorrowedFd, start: u64, length: u64) -> io::Result<()> {
    let range = [start, length];
    // SAFETY: BLKDISCARD reads two u64.
    match unsafe { libc::ioctl(device.as_raw_fd(), BLKDISCARD as _, &range) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

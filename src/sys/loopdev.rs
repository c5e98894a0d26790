//! ioctls of the loop driver.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `lo_flags`.
pub const READ_ONLY: u32 = 1;
pub const AUTOCLEAR: u32 = 4;
pub const PARTSCAN: u32 = 8;
pub const DIRECT_IO: u32 = 16;

const LOOP_CLR_FD: u32 = 0x4c01;
const LOOP_SET_STATUS64: u32 = 0x4c04;
const LOOP_GET_STATUS64: u32 = 0x4c05;
const LOOP_SET_CAPACITY: u32 = 0x4c07;
const LOOP_CONFIGURE: u32 = 0x4c0a;
const LOOP_CTL_ADD: u32 = 0x4c80;
const LOOP_CTL_REMOVE: u32 = 0x4c81;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    pub flags: u32,
    pub file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Info>() == 232 && size_of::<Config>() == 304);

impl Info {
    /// No offset, no limit; a name that is longer than 63 bytes keeps its end.
    pub fn new(flags: u32, name: &[u8]) -> Info {
        let mut file_name = [0; 64];
        let tail = &name[name.len().saturating_sub(63)..];
        file_name[..tail.len()].copy_from_slice(tail);
        Info {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            sizelimit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags,
            file_name,
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

fn number(fd: BorrowedFd, request: u32, arg: libc::c_long) -> io::Result<i32> {
    // SAFETY: the argument of these requests is a plain number (or ignored), not an address.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request as _, arg) } {
        -1 => Err(io::Error::last_os_error()),
        n => Ok(n),
    }
}

/// Makes loop device `n`; EEXIST if there is one, EINVAL if the number is too high for the driver's settings.
pub fn add(control: BorrowedFd, n: u32) -> io::Result<()> {
    number(control, LOOP_CTL_ADD, n.into()).map(drop)
}

/// Removes loop device `n`; EBUSY while it is bound or open.
pub fn remove(control: BorrowedFd, n: u32) -> io::Result<()> {
    number(control, LOOP_CTL_REMOVE, n.into()).map(drop)
}

/// Binds `file` to the loop device in one step (Linux 5.8). Sends an fsync to the file and waits for it.
pub fn configure(device: BorrowedFd, file: BorrowedFd, info: Info) -> io::Result<()> {
    let config = Config { fd: file.as_raw_fd() as u32, block_size: 0, info, reserved: [0; 8] };
    // SAFETY: LOOP_CONFIGURE reads one `struct loop_config` (304 bytes, layout asserted above).
    match unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, &config) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Unbinds the loop device when its last opener goes; ENXIO if it is not bound.
pub fn clear(device: BorrowedFd) -> io::Result<()> {
    number(device, LOOP_CLR_FD, 0).map(drop)
}

/// Takes over the size that the file has now.
pub fn set_capacity(device: BorrowedFd) -> io::Result<()> {
    number(device, LOOP_SET_CAPACITY, 0).map(drop)
}

/// ENXIO if the device is not bound, or bound no more once the last opener goes.
pub fn status(device: BorrowedFd) -> io::Result<Info> {
    let mut info = Info::new(0, b"");
    // SAFETY: LOOP_GET_STATUS64 fills one `struct loop_info64` (232 bytes, layout asserted above).
    match unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64 as _, &mut info) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(info),
    }
}

/// Sets what of `info` can be changed, AUTOCLEAR for one.
pub fn set_status(device: BorrowedFd, info: &Info) -> io::Result<()> {
    // SAFETY: LOOP_SET_STATUS64 reads one `struct loop_info64` (232 bytes, layout asserted above).
    match unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_STATUS64 as _, info as *const Info) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

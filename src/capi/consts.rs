//! The numbers of libploop.h. They are the source of the C header: comments here become comments there.

#![allow(non_camel_case_types)]

use std::ffi::c_int;

/// ploop_switch_snapshot_ex(): keep the old top delta.
pub const PLOOP_SNAP_SKIP_TOPDELTA_DESTROY: c_int = 0x01;
/// ploop_switch_snapshot_ex(): make the snapshot itself the top.
pub const PLOOP_SNAP_SKIP_TOPDELTA_CREATE: c_int = 0x02;

/// ploop_set_verbose_level(): print nothing (initially so).
pub const PLOOP_LOG_NOCONSOLE: c_int = -2;
/// ploop_set_verbose_level(): errors only, to standard error.
pub const PLOOP_LOG_NOSTDOUT: c_int = -1;
/// ploop_set_verbose_level(): everything, with the time.
pub const PLOOP_LOG_TIMESTAMPS: c_int = 4;

/// Error codes of functions that return 0 on success; also the exit codes of the ploop program.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ploop_sysexit {
    /// Cannot create a file.
    SYSEXIT_CREAT = 1,
    /// Cannot allocate or open a device.
    SYSEXIT_DEVICE = 2,
    /// A request to a device or file failed.
    SYSEXIT_DEVIOC = 3,
    /// Cannot open a file, or its header is unusable.
    SYSEXIT_OPEN = 4,
    /// Out of memory.
    SYSEXIT_MALLOC = 5,
    /// Read failed or came short.
    SYSEXIT_READ = 6,
    /// Write failed or came short.
    SYSEXIT_WRITE = 7,
    SYSEXIT_RESERVED_8 = 8,
    /// State of a device is missing or unreadable.
    SYSEXIT_SYSFS = 9,
    SYSEXIT_RESERVED_10 = 10,
    /// Bad image format, unrepaired image, images that differ.
    SYSEXIT_PLOOPFMT = 11,
    /// Other system error, failed helper program.
    SYSEXIT_SYS = 12,
    /// Corrupt copy stream, wrong answer of the sender or receiver of a copy.
    SYSEXIT_PROTOCOL = 13,
    /// Too many passes while copying.
    SYSEXIT_LOOP = 14,
    /// stat or statfs failed.
    SYSEXIT_FSTAT = 15,
    /// Sync failed.
    SYSEXIT_FSYNC = 16,
    /// Another operation is in progress.
    SYSEXIT_EBUSY = 17,
    /// Lock of the balloon failed.
    SYSEXIT_FLOCK = 18,
    /// Truncation failed.
    SYSEXIT_FTRUNCATE = 19,
    /// Allocation of space failed.
    SYSEXIT_FALLOCATE = 20,
    /// Mount failed, or the image is attached already.
    SYSEXIT_MOUNT = 21,
    /// Unmount failed.
    SYSEXIT_UMOUNT = 22,
    /// Descriptor not locked, or not readable after locking.
    SYSEXIT_LOCK = 23,
    /// Making the file system failed.
    SYSEXIT_MKFS = 24,
    SYSEXIT_RESERVED_25 = 25,
    /// Resizing the file system failed.
    SYSEXIT_RESIZE_FS = 26,
    /// mkdir failed.
    SYSEXIT_MKDIR = 27,
    /// rename failed.
    SYSEXIT_RENAME = 28,
    /// Internal inconsistency.
    SYSEXIT_ABORT = 29,
    /// Relocation of clusters failed.
    SYSEXIT_RELOC = 30,
    SYSEXIT_RESERVED_31 = 31,
    SYSEXIT_RESERVED_32 = 32,
    /// Change of the partition table failed.
    SYSEXIT_CHANGE_GPT = 33,
    SYSEXIT_RESERVED_34 = 34,
    /// unlink failed.
    SYSEXIT_UNLINK = 35,
    /// mknod failed.
    SYSEXIT_MKNOD = 36,
    /// Image is marked as in use, or used by a device.
    SYSEXIT_PLOOPINUSE = 37,
    /// Invalid argument, unsupported request.
    SYSEXIT_PARAM = 38,
    /// Descriptor missing, not storable, inconsistent.
    SYSEXIT_DISKDESCR = 39,
    /// The image has no device.
    SYSEXIT_DEV_NOT_MOUNTED = 40,
    /// fsck failed.
    SYSEXIT_FSCK = 41,
    SYSEXIT_RESERVED_42 = 42,
    /// No such snapshot.
    SYSEXIT_NOSNAP = 43,
}

//! The structs of libploop.h, field by field and byte by byte. They are the source of the C header: comments here become
//! comments there, so they speak to the C programmer.
//!
//! Sizes are sectors of 512 bytes unless a comment says bytes. A zeroed struct asks for every default.

#![allow(non_camel_case_types)]

use libc::{off_t, pid_t};
use std::ffi::{c_char, c_int, c_uint, c_ulonglong};

/// Spelled as in C, where linux/types.h defines it.
pub type __u32 = u32;
/// Spelled as in C, where linux/types.h defines it.
pub type __u64 = u64;

/// How an image keeps its data (ploop_create_param.mode, ploop_disk_images_data.mode).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ploop_image_mode {
    /// Grows as it is written.
    PLOOP_EXPANDED_MODE = 0,
    /// The same format with all space allocated at creation.
    PLOOP_EXPANDED_PREALLOCATED_MODE = 1,
    /// Plain bytes of the disk.
    PLOOP_RAW_MODE = 2,
}

/// Flags of ploop_create_param.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ploop_create_flags {
    /// Initialise the file system's inode tables at once, not later in the background.
    PLOOP_CREATE_NOLAZY = 1,
}

/// Flags of ploop_replace_param.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ploop_replace_flags {
    /// The new file takes the old file's name.
    PLOOP_REPLACE_KEEP_NAME = 1,
}

/// How to mount an image.
#[repr(C)]
pub struct ploop_mount_param {
    /// Device to use, /dev/ploopN; empty: one is chosen and its path stored here.
    pub device: [c_char; 64],
    /// Non-zero: attach and mount read-only.
    pub ro: c_int,
    /// Flags of mount(2); MS_NOATIME is honoured, other flags are ignored.
    pub flags: c_int,
    /// Keep 0.
    pub unused1: c_int,
    /// File system; NULL: ext4.
    pub fstype: *mut c_char,
    /// Existing folder to mount on; NULL: attach the device only.
    pub target: *mut c_char,
    /// Snapshot to mount; NULL: the top delta.
    pub guid: *mut c_char,
    /// Non-zero: journalled user and group quota.
    pub quota: c_int,
    /// More mount options, or NULL.
    pub mount_data: *mut c_char,
    /// Cluster size in sectors, for raw images mounted by file name only; 0: from the descriptor.
    pub blocksize: c_uint,
    /// Non-zero: run fsck -p before mounting.
    pub fsck: c_int,
    /// Out: exit code of fsck, if it ran.
    pub fsck_rc: c_int,
    /// Reserved, keep 0.
    pub dummy: [c_char; 32],
}

/// How to create an image.
#[repr(C)]
pub struct ploop_create_param {
    /// Size of the disk in sectors, rounded up to the cluster.
    pub size: c_ulonglong,
    /// enum ploop_image_mode.
    pub mode: c_int,
    /// Path of the image; must not exist. DiskDescriptor.xml is made in the same folder.
    pub image: *mut c_char,
    /// File system to make (ext4, ext3); NULL: neither partition nor file system.
    pub fstype: *mut c_char,
    /// Non-zero: file system on the whole disk; 0: GPT with one partition.
    pub without_partition: c_int,
    /// Cluster size in sectors, a power of two from 64 to 131072; 0: 2048 (1 MiB).
    pub blocksize: c_uint,
    /// Block of the file system in bytes; 0: 4096.
    pub fsblocksize: c_uint,
    /// Format version 1 or 2; 0: the best.
    pub fmt_version: c_int,
    /// enum ploop_create_flags.
    pub flags: c_uint,
    /// Reserved, keep 0.
    pub dummy: [c_char; 32],
}

/// Which image of a chain to replace, by guid, else by cur_file, else by level.
#[repr(C)]
pub struct ploop_replace_param {
    /// The replacement, an identical copy.
    pub file: *mut c_char,
    /// Image to replace, by GUID.
    pub guid: *mut c_char,
    /// The same by level in the running device, 0 is the base.
    pub level: c_int,
    /// The same by file name.
    pub cur_file: *mut c_char,
    /// enum ploop_replace_flags.
    pub flags: c_int,
    /// Reserved, keep 0.
    pub dummy: [c_char; 32],
}

/// One image of a disk. Owned by the library, read-only.
#[repr(C)]
pub struct ploop_image_data {
    pub guid: *mut c_char,
    /// Path.
    pub file: *mut c_char,
}

/// One snapshot of a disk. Owned by the library, read-only.
#[repr(C)]
pub struct ploop_snapshot_data {
    pub guid: *mut c_char,
    /// The null GUID for the base.
    pub parent_guid: *mut c_char,
    /// Non-zero: temporary; removed by a merge when no process uses it.
    pub temporary: c_int,
}

/// State of the library behind a ploop_disk_images_data; opaque.
pub struct ploop_disk_images_runtime_data {
    pub(super) state: super::state::State,
}

/// A disk, made by ploop_open_dd() and freed by ploop_close_dd(). Read-only for callers; empty until a function that
/// locks the descriptor has read it, and read again by each such function: pointers from here are valid until the next
/// call.
#[repr(C)]
pub struct ploop_disk_images_data {
    /// Size of the disk in sectors.
    pub size: c_ulonglong,
    pub heads: c_uint,
    pub cylinders: c_uint,
    pub sectors: c_uint,
    /// enum ploop_image_mode.
    pub mode: c_int,
    pub nimages: c_int,
    /// nimages pointers, in the descriptor's order.
    pub images: *mut *mut ploop_image_data,
    pub top_guid: *mut c_char,
    pub nsnapshots: c_int,
    /// nsnapshots pointers.
    pub snapshots: *mut *mut ploop_snapshot_data,
    pub runtime: *mut ploop_disk_images_runtime_data,
    /// Cluster size in sectors.
    pub blocksize: c_uint,
    /// Limit of the top delta in sectors; 0: none.
    pub max_delta_size: c_ulonglong,
    /// Reserved.
    pub dummy: [c_char; 32],
}

/// How to resize a disk.
#[repr(C)]
pub struct ploop_resize_param {
    /// New size in sectors; 0: inflate the balloon to the maximum.
    pub size: c_ulonglong,
    /// Non-zero: allow the offline way when the image is not mounted.
    pub offline_resize: c_int,
    /// Process in whose mount namespace the image may be mounted; 0: none.
    pub mntns_pid: pid_t,
    /// Reserved, keep 0.
    pub dummy: [c_char; 32],
}

/// How to make a snapshot.
#[repr(C)]
pub struct ploop_snapshot_param {
    /// GUID of the new snapshot; NULL: generated.
    pub guid: *mut c_char,
    /// Folder of the new delta; NULL: beside the base image.
    pub snap_dir: *mut c_char,
    /// Reserved, keep 0.
    pub dummy: [c_char; 32],
}

/// How to make and mount a temporary snapshot.
#[repr(C)]
pub struct ploop_tsnapshot_param {
    /// GUID of the new snapshot, required.
    pub guid: *mut c_char,
    /// Component that its device gets, required.
    pub component_name: *mut c_char,
    /// Folder to mount on, or NULL.
    pub target: *mut c_char,
    /// Out: its device.
    pub device: [c_char; 64],
    /// Folder of the new delta; NULL: beside the base image.
    pub snap_dir: *mut c_char,
    /// Reserved, keep 0.
    pub dummy: [c_char; 32],
}

/// Which snapshot to switch to.
#[repr(C)]
pub struct ploop_snapshot_switch_param {
    /// Snapshot that becomes the parent of the new top, required.
    pub guid: *const c_char,
    /// New GUID of the old top, when it is kept.
    pub guid_old: *const c_char,
    /// PLOOP_SNAP_SKIP_TOPDELTA_DESTROY, PLOOP_SNAP_SKIP_TOPDELTA_CREATE.
    pub flags: c_int,
    /// Reserved, keep 0.
    pub dummy: [c_char; 32],
}

/// Which snapshots to merge.
#[repr(C)]
pub struct ploop_merge_param {
    /// Keep 0.
    pub unused1: c_int,
    /// Non-zero, without guid: everything down to the base.
    pub merge_all: c_int,
    /// Snapshot that is merged into its parent; NULL: the top.
    pub guid: *const c_char,
    /// Ancestor where the range ends, or NULL.
    pub guid2: *const c_char,
    /// New file to merge into, or NULL.
    pub new_delta: *const c_char,
    /// Reserved, keep 0.
    pub dummy: [c_char; 32],
}

/// How to compact an image.
#[repr(C)]
pub struct ploop_discard_param {
    /// Smallest extent worth freeing, bytes; 0: the cluster.
    pub minlen_b: __u64,
    /// Bytes to free; 0: all that is free.
    pub to_free: __u64,
    /// Non-zero: mount the image for it when it is not mounted.
    pub automount: c_int,
    /// Polled; non-zero stops. May be NULL.
    pub stop: *const c_int,
    /// Non-zero: defragment first.
    pub defrag: c_int,
    /// Reserved, keep 0.
    pub dummy: [c_char; 32],
}

/// What statfs(2) says about the file system inside, in blocks of fs_bsize bytes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ploop_info {
    pub fs_bsize: c_ulonglong,
    pub fs_blocks: c_ulonglong,
    pub fs_bfree: c_ulonglong,
    pub fs_inodes: c_ulonglong,
    pub fs_ifree: c_ulonglong,
}

/// Format of a disk.
#[repr(C)]
pub struct ploop_spec {
    /// Size of the disk in sectors.
    pub size: off_t,
    /// Cluster size in sectors.
    pub blocksize: __u32,
    /// 1 or 2; 0 for raw.
    pub fmt_version: c_int,
    /// Reserved, left alone.
    pub dummy: [c_char; 32],
}

/// Space of an image, in bytes.
#[repr(C)]
pub struct ploop_discard_stat {
    /// Used by the file system.
    pub data_size: off_t,
    /// Size of the disk without the balloon.
    pub ploop_size: off_t,
    /// Size of the top delta's file.
    pub image_size: off_t,
    /// Size of the balloon.
    pub balloon_size: off_t,
}

/// How to send a copy of a running disk.
#[repr(C)]
pub struct ploop_copy_send_param {
    pub device: *const c_char,
    /// Regular file, pipe or socket.
    pub ofd: c_int,
    /// Command run before the last pass, or NULL.
    pub flush_cmd: *const c_char,
    /// Descriptor of the receiver's answers; negative: none (0 is a descriptor).
    pub feedback_fd: c_int,
    /// Reserved, keep 0.
    pub dummy: [c_char; 32],
}

/// How to receive a copy.
#[repr(C)]
pub struct ploop_copy_receive_param {
    /// File to make; must not exist.
    pub file: *const c_char,
    /// Pipe or socket.
    pub ifd: c_int,
    /// Descriptor for answers to the sender; negative: none (0 is a descriptor).
    pub feedback_fd: c_int,
    /// Reserved, keep 0.
    pub dummy: [c_char; 32],
}

/// Not used by any function.
#[repr(C)]
pub struct ploop_copy_param {
    pub ofd: c_int,
    pub dummy: [c_char; 32],
}

/// Not used by any function.
#[repr(C)]
pub struct ploop_copy_stat {
    pub xferred_total: __u64,
    pub xferred: __u64,
}

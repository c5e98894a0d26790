//! What keeps other programs away from the images of a device, from its attach to its end.
//!
//! Two kinds of locks are on an image that is written to. The barrier is on the worker's own open file description, which no
//! other process has: when it falls, the last I/O of that worker has landed, and the next worker begins. The exclusion is
//! on a description that supervisor and worker share: the supervisor opens it, passes it as [`Role::Level`] to each worker,
//! and a worker passes it to the next supervisor. So it outlives each of them, and no stranger that waits for a lock gets in
//! between two workers. It has the flock and the byte locks that [`lock`] describes.
//!
//! An O_PATH descriptor in its place carries no locks: a supervisor of an earlier version sends such, and one of this version
//! where the file system makes byte-range locks of a flock (NFS, SMB, 9P). There a flock by one description would exclude
//! the barrier of another one. Then the worker's own description has all locks, and they fall with it.
//!
//! [`Role::Level`]: crate::server::roles::Role::Level
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{FsType, NFS_SUPER_MAGIC, SMB_SUPER_MAGIC, fstatfs};

use crate::image::lock;
use crate::sys::file_lock::{self, ByteLock};
use crate::sys::reopen::{Access, reopen};

/// Bytes beyond each file, and beyond those that other programs lock. The barrier is on the first. The second is locked by
/// the exclusion, so that no other program gets a lock over the whole file, not even a shared one: that would have the
/// barrier's byte in it.
const BARRIER: i64 = i64::MAX - 1;
const WHOLE_FILE: i64 = i64::MAX - 3;

/// SMB 1, SMB 2 and later, 9P.
const CIFS_SUPER_MAGIC: i64 = 0xFF53_4D42;
const SMB2_SUPER_MAGIC: i64 = 0xFE53_4D42;
const V9FS_MAGIC: i64 = 0x0102_1997;

/// A description of an image for its exclusion; `written`: the device writes to it. Where none can be had, or would not
/// do, the descriptor that came.
pub fn open(image: OwnedFd, written: bool) -> OwnedFd {
    if flock_is_ranges(&image) {
        return image;
    }
    match reopen(&image, Access { write: written, direct: false }) {
        Ok((file, _)) => file.into(),
        // The worker reports why it cannot be opened.
        Err(_) => image,
    }
}

/// The same for the images of a chain that have none yet; base first. `writable`: the device writes to its top.
pub fn open_missing(chain: Vec<OwnedFd>, writable: bool) -> Vec<OwnedFd> {
    let top = chain.len().saturating_sub(1);
    let one = |(i, image): (usize, OwnedFd)| match is_shared(&image) {
        true => image,
        false => open(image, writable && i == top),
    };
    chain.into_iter().enumerate().map(one).collect()
}

/// Whether the locks of the exclusion are on this descriptor's description. Else they are on the worker's own.
pub fn is_shared(level: &OwnedFd) -> bool {
    fcntl(level, FcntlArg::F_GETFL).is_ok_and(|flags| !OFlag::from_bits_retain(flags).contains(OFlag::O_PATH))
}

/// Whether the image that `level` names gets an exclusion of its own in a device whose images have such.
pub fn would_be_shared(image: &OwnedFd) -> bool {
    !flock_is_ranges(image)
}

/// A file system whose kernel module emulates flock by locking all bytes of the file.
fn flock_is_ranges(image: &OwnedFd) -> bool {
    let of = |magic: i64| FsType(magic as _);
    let more = [CIFS_SUPER_MAGIC, SMB2_SUPER_MAGIC, V9FS_MAGIC].map(of);
    fstatfs(image).is_ok_and(|s| {
        let found = s.filesystem_type();
        found == NFS_SUPER_MAGIC || found == SMB_SUPER_MAGIC || more.contains(&found)
    })
}

/// Takes the barrier on a worker's own description, open for writing. `wait`: until it has fallen from that of the worker
/// before; else `WouldBlock`.
pub fn take_barrier(own: &File, wait: bool) -> io::Result<()> {
    match wait {
        true => file_lock::lock_byte(own, BARRIER, ByteLock::Exclusive, true),
        false => lock::retry(|| take_barrier_now(own)),
    }
}

/// The same once: who gets it knows that no worker of the chain has the image open.
pub fn take_barrier_now(own: &File) -> io::Result<()> {
    file_lock::lock_byte(own, BARRIER, ByteLock::Exclusive, false)
}

/// Takes the flock of a file that is written to; of a shared description it is held already unless this is the first
/// worker, or the first one that has it. `wait`: for the worker before, which may have it on its own description.
pub fn take_flock(holder: impl AsFd, wait: bool) -> io::Result<()> {
    match wait {
        true => file_lock::exclusive(holder, true),
        false => lock::retry(|| file_lock::exclusive(&holder, false)),
    }
}

/// No other program gets a lock over the whole file from here on. Only a description that is open for writing can have
/// that; `WouldBlock`: another program has one.
pub fn exclude_whole_file_locks(level: &OwnedFd) -> io::Result<()> {
    match file_lock::lock_byte(level, WHOLE_FILE, ByteLock::Exclusive, false) {
        Err(e) if e.kind() != io::ErrorKind::WouldBlock => Ok(()),
        other => other,
    }
}

/// The image is only read from here on: its exclusion is that of a reader. There is no moment without one.
pub fn release_write(level: &OwnedFd) -> io::Result<()> {
    lock::become_reader(level)?;
    let _ = file_lock::lock_byte(level, WHOLE_FILE, ByteLock::None, false);
    file_lock::release(level)
}

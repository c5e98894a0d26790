//! Locks on an image file that show other programs its use: those of a worker, and those that qemu and the newer line
//! check.
//!
//! A process that writes to an image holds an exclusive flock on it; of a running device it is on a description that its
//! supervisor has, too (`server/exclusion.rs`). A process that only reads a delta of a running
//! chain holds shared locks on bytes of it, so that an operation that changes a lower delta can check that no process
//! reads it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::file_id::FileId;
use crate::sys::file_lock::{self, ByteLock};
use crate::sys::folder::Folder;
use crate::sys::host;

use super::open::{Access, open_level, reopen};

/// Bytes whose locks show other programs how an image is used, as in qemu: a shared lock on 100 + n means "this process
/// uses permission n", on 200 + n "no other process may use permission n". 0 is reading, 1 writing, 3 resizing. The
/// newer line takes a lock on 200 to 204 for "in use", too.
const USES_READ: i64 = 100;
const USES_WRITE: i64 = 101;
const USES_RESIZE: i64 = 103;
const NO_OTHER_WRITE: i64 = 201;
const NO_OTHER_RESIZE: i64 = 203;
const WRITING: [i64; 4] = [USES_WRITE, USES_RESIZE, NO_OTHER_WRITE, NO_OTHER_RESIZE];

/// What other programs may do with the file while it is locked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sharing {
    /// The operation only reads the content: other programs may read it, too.
    Readers,
    /// The operation changes the content, or removes the file: no other program may read or write it.
    Exclusive,
}

/// An image file, locked: no other program writes to it until this is dropped.
#[derive(Debug)]
pub struct LockedImage {
    pub file: File,
    pub path: PathBuf,
}

/// Opens an image and locks it: no other program writes to it, or with [`Sharing::Exclusive`] reads it, until the
/// result is dropped. Fails with `Busy` if another program does. `dir`: folder of the descriptor that names it, see
/// [`open_level`].
pub fn lock_image(path: &Path, dir: Option<&Folder>, access: Access, sharing: Sharing) -> Result<LockedImage> {
    lock_open(&open_level(path, dir)?, path, access, sharing)
}

/// As [`lock_image`], for an open image. `path`: its name in messages.
pub fn lock_open(fd: &OwnedFd, path: &Path, access: Access, sharing: Sharing) -> Result<LockedImage> {
    let (file, _) = reopen(fd, access).ctx(Kind::Open, || format!("cannot open image {}", path.display()))?;
    lock_opened(file, path, sharing)
}

/// As [`lock_image`], for an image that is open with all that is needed; a lock that its description has already stays.
pub fn lock_opened(file: File, path: &Path, sharing: Sharing) -> Result<LockedImage> {
    let image = LockedImage { file, path: path.to_owned() };
    image.lock(sharing)?;
    Ok(image)
}

impl LockedImage {
    pub fn id(&self) -> Result<FileId> {
        FileId::of(&self.file).ctx(Kind::Fstat, || format!("cannot look at image {}", self.path.display()))
    }

    fn lock(&self, sharing: Sharing) -> Result<()> {
        match retry(|| file_lock::exclusive(&self.file, false)) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                bail!(Busy, "image {} is in use by a program that writes to it", self.path.display())
            }
            // The file system has no such locks.
            Err(_) => {}
            Ok(()) => {}
        }
        let told = match sharing {
            Sharing::Readers => lock_read(&self.file),
            Sharing::Exclusive => lock_exclusive(&self.file),
        };
        told.map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => {
                Error::new(Kind::Busy, format!("image {} is in use by another device or program", self.path.display()))
            }
            _ => Error::with(Kind::Flock, format!("cannot lock image {}", self.path.display()), e),
        })
    }
}

/// Shows other programs that the file is read, until its description is closed. `WouldBlock` if one of them writes to
/// it.
pub fn lock_read(file: impl AsFd) -> io::Result<()> {
    share(file, &[USES_READ, NO_OTHER_WRITE, NO_OTHER_RESIZE], &[USES_WRITE, USES_RESIZE])
}

/// Shows other programs that the file is written to. `WouldBlock` if one of them uses it in a way that forbids that.
pub fn lock_write(file: impl AsFd) -> io::Result<()> {
    share(file, &WRITING, &WRITING)
}

/// As [`lock_write`], and no other program may read the file either.
pub fn lock_exclusive(file: impl AsFd) -> io::Result<()> {
    share(&file, &WRITING, &[USES_READ]).and_then(|()| lock_write(&file))
}

/// Shows other programs that the file, which was written to, is only read from here on.
pub fn become_reader(file: impl AsFd) -> io::Result<()> {
    lock_read(&file)?;
    unlock(&file, &[USES_WRITE, USES_RESIZE])
}

/// Releases the locks of [`lock_read`].
pub fn unlock_read(file: impl AsFd) -> io::Result<()> {
    unlock(&file, &[USES_READ, NO_OTHER_WRITE, NO_OTHER_RESIZE])
}

fn unlock(file: impl AsFd, bytes: &[i64]) -> io::Result<()> {
    for byte in bytes {
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&ByteLock::None.on(*byte))) {
            // The file system has no such locks.
            Ok(_) | Err(Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOLCK) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Takes shared locks on `bytes`, then checks that no other program has one on `against`: of two that do so at the same
/// time at least one notices. `WouldBlock`: another program has. Where the file system has no such locks they are left
/// out: they guard against other programs.
fn share(file: impl AsFd, bytes: &[i64], against: &[i64]) -> io::Result<()> {
    for byte in bytes {
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&ByteLock::Shared.on(*byte))) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(io::ErrorKind::WouldBlock.into()),
            Err(_) => return Ok(()),
        }
    }
    retry(|| {
        for byte in against {
            let mut found = ByteLock::Exclusive.on(*byte);
            fcntl(&file, FcntlArg::F_OFD_GETLK(&mut found))?;
            if found.l_type != libc::F_UNLCK as i16 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
        }
        Ok(())
    })
}

/// Retries for a second: a worker that has just exited may still have I/O under way.
pub fn retry(mut lock: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    for _ in 0..20 {
        match lock() {
            Err(e) if e.raw_os_error() == Some(Errno::EINTR as i32) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => host::sleep(Duration::from_millis(50)),
            other => return other,
        }
    }
    lock()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, "x").unwrap();
        let write = Access { write: true, direct: false };
        let get = |access, sharing| lock_image(&path, None, access, sharing).map_err(|e| e.kind());
        let alone = get(write, Sharing::Exclusive).unwrap();
        assert_eq!(get(Access::default(), Sharing::Readers).unwrap_err(), Kind::Busy);
        drop(alone);
        // A server's reader.
        let reader = File::open(&path).unwrap();
        lock_read(&reader).unwrap();
        drop(get(Access::default(), Sharing::Readers).unwrap());
        assert_eq!(get(write, Sharing::Exclusive).unwrap_err(), Kind::Busy);
        // It lets other programs write for a while.
        unlock_read(&reader).unwrap();
        let writer = get(write, Sharing::Exclusive).unwrap();
        assert!(lock_read(&reader).is_err());
        unlock_read(&reader).unwrap();
        drop(writer);
        drop(reader);
        get(write, Sharing::Exclusive).unwrap();
    }
}

//! The balloon: a hidden file in the root of the inner file system whose size is the space withheld from the user.
//!
//! Root inside may be a stranger, who can put anything under its name at any time: nothing is opened through a link, and
//! what is not a file of root with one name is refused.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, FallocateFlags, OFlag, fallocate, open, openat};
use nix::sys::stat::{Mode, SFlag, fchmod, fstat, fstatat};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, fstatfs};
use nix::sys::statvfs::fstatvfs;
use nix::unistd::{Gid, Uid, fchown};

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::file_lock;
use crate::sys::reopen::{Access, reopen};
use crate::sys::xfs;

/// Name of the balloon file, mode 0600, owner root, empty when the disk is made.
pub const NAME: &str = ".balloon-c3a5ae3d-ce7f-43c4-a1ea-c61e2b4504e8";

/// ext4 keeps a fiftieth, and at most so many blocks, for the extents of files.
const KEPT: u64 = 4096;

/// Number of the root folder of an ext file system.
const EXT_ROOT: u64 = 2;

/// A file system that can have a balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    Ext,
    Xfs,
}

/// The root folder of a mounted file system.
#[derive(Debug)]
pub struct Root {
    folder: OwnedFd,
    pub kind: FileSystem,
    /// For messages.
    path: PathBuf,
    /// Number of the block device that it lies on.
    pub dev: u64,
}

impl Root {
    /// `DevIoc`: what is there is neither ext nor XFS, or not its root.
    pub fn open(folder: &Path) -> Result<Root> {
        let shown = folder.display();
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let fd = open(folder, flags, Mode::empty()).ctx(Kind::Open, || format!("cannot open {shown}"))?;
        let stat = fstat(&fd).ctx(Kind::Fstat, || format!("cannot look at {shown}"))?;
        let kind = kind_of(&fd, folder)?;
        let root = match kind {
            FileSystem::Ext => EXT_ROOT,
            FileSystem::Xfs => xfs::root_inode(&fd)
                .ctx(Kind::DevIoc, || format!("cannot ask the xfs at {shown} for its root folder"))?,
        };
        if stat.st_ino != root {
            bail!(DevIoc, "{shown} is not the root folder of its file system, where the balloon lies");
        }
        Ok(Root { folder: fd, kind, path: folder.to_owned(), dev: stat.st_dev })
    }

    /// An open descriptor of it.
    pub fn folder(&self) -> Result<File> {
        let copy = self.folder.try_clone().ctx(Kind::Sys, || "cannot duplicate the descriptor of the root folder")?;
        Ok(copy.into())
    }

    /// For messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The balloon; none: there is none. `write`: to be changed. `Open`: what has its name is no balloon.
    pub fn balloon(&self, write: bool) -> Result<Option<Balloon>> {
        let path = self.path.join(NAME);
        let shown = path.display();
        // A device or a pipe must not be opened.
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let found = match openat(&self.folder, NAME, flags, Mode::empty()) {
            Err(Errno::ENOENT) => return Ok(None),
            other => other.ctx(Kind::Open, || format!("cannot open {shown}"))?,
        };
        let stat = fstat(&found).ctx(Kind::Fstat, || format!("cannot look at {shown}"))?;
        if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
            bail!(Open, "{shown} is no regular file: it is no balloon; remove it, and a new one can be made");
        }
        if stat.st_nlink != 1 || stat.st_uid != 0 || stat.st_mode & 0o7777 != 0o600 {
            bail!(
                Open,
                "{shown} has {} links, owner {} and mode {:o}; a balloon has 1 link, owner 0 and mode 600: remove it, \
                 and a new one can be made",
                stat.st_nlink,
                stat.st_uid,
                stat.st_mode & 0o7777
            );
        }
        let (file, _) =
            reopen(&found, Access { write, direct: false }).ctx(Kind::Open, || format!("cannot open {shown}"))?;
        refuse_realtime(self.kind, &file, &path)?;
        Ok(Some(Balloon { file, path }))
    }

    /// The balloon, made where it is missing.
    pub fn balloon_or_new(&self) -> Result<Balloon> {
        if let Some(found) = self.balloon(true)? {
            return Ok(found);
        }
        let path = self.path.join(NAME);
        let creat = || format!("cannot make {}", path.display());
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&self.folder, NAME, flags, Mode::from_bits_truncate(0o600)).ctx(Kind::Creat, creat)?;
        // Whatever the umask is, and a set-group-ID root folder gives.
        let owned = fchmod(&fd, Mode::from_bits_truncate(0o600))
            .and_then(|()| fchown(&fd, Some(Uid::from_raw(0)), Some(Gid::from_raw(0))));
        owned.ctx(Kind::Creat, creat)?;
        let file = File::from(fd);
        refuse_realtime(self.kind, &file, &path)?;
        file.sync_all().ctx(Kind::Fsync, creat)?;
        nix::unistd::fsync(&self.folder).ctx(Kind::Fsync, creat)?;
        Ok(Balloon { file, path })
    }

    /// The balloon's size in bytes by its name alone: 0 without one.
    pub fn balloon_size(&self) -> Result<u64> {
        match fstatat(&self.folder, NAME, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => Ok(0),
            _ => self.balloon(false)?.map_or(Ok(0), |b| b.size()),
        }
    }

    /// Blocks, bytes of one, and blocks that root can still allocate.
    pub fn space(&self) -> Result<Space> {
        let stat =
            fstatvfs(&self.folder).ctx(Kind::Fstat, || format!("cannot get the size of {}", self.path.display()))?;
        let (blocks, free) = (stat.blocks() as u64, stat.blocks_free() as u64);
        let (kept, inodes) = match self.kind {
            FileSystem::Ext => ((blocks / 50).min(KEPT), stat.files() as u64),
            // It has set aside what it keeps, and has no tables of inodes.
            FileSystem::Xfs => (0, 0),
        };
        Ok(Space { block: stat.fragment_size() as u64, blocks, free: free.saturating_sub(kept), inodes })
    }
}

/// What a file system has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes of a block.
    pub block: u64,
    pub blocks: u64,
    /// Blocks that root can still allocate.
    pub free: u64,
    /// In tables that a smaller file system has less of.
    pub inodes: u64,
}

/// Blocks of other file systems cannot be found on the device, or not given to a file without being written.
fn kind_of(file: impl AsFd, path: &Path) -> Result<FileSystem> {
    let shown = path.display();
    let stat = fstatfs(&file).ctx(Kind::Fstat, || format!("cannot look at the file system of {shown}"))?;
    match stat.filesystem_type() {
        EXT4_SUPER_MAGIC => Ok(FileSystem::Ext),
        XFS_SUPER_MAGIC => Ok(FileSystem::Xfs),
        _ => bail!(DevIoc, "{shown}: only ext4 and xfs can have a balloon here, and this is another file system"),
    }
}

/// `DevIoc`: the blocks of the file are not those of the disk.
fn refuse_realtime(kind: FileSystem, file: &File, path: &Path) -> Result<()> {
    let shown = path.display();
    if kind == FileSystem::Xfs
        && xfs::is_realtime(file).ctx(Kind::DevIoc, || format!("cannot look at the attributes of {shown}"))?
    {
        bail!(
            DevIoc,
            "{shown} lies on the real-time part of its xfs: it is no balloon; remove it, and a new one can be made"
        );
    }
    Ok(())
}

/// An open balloon file.
#[derive(Debug)]
pub struct Balloon {
    pub file: File,
    path: PathBuf,
}

impl Balloon {
    /// Of a descriptor that a caller has opened; it is duplicated.
    pub fn of(fd: impl AsFd) -> Result<Balloon> {
        let path = PathBuf::from(NAME);
        let file: File =
            fd.as_fd().try_clone_to_owned().ctx(Kind::Sys, || "cannot duplicate the descriptor of the balloon")?.into();
        refuse_realtime(kind_of(&file, &path)?, &file, &path)?;
        match file.metadata().is_ok_and(|m| m.is_file()) {
            true => Ok(Balloon { file, path }),
            false => bail!(Param, "the descriptor given for the balloon is not that of a regular file"),
        }
    }

    /// For messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Locks it as long as it is open. `Busy`: another process has it locked.
    pub fn lock(&self) -> Result<()> {
        match file_lock::exclusive(&self.file, false) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                bail!(Busy, "{} is locked by another process: its balloon is being changed", self.path.display())
            }
            Err(e) => Err(Error::with(Kind::Flock, format!("cannot lock {}", self.path.display()), e)),
        }
    }

    fn metadata(&self) -> Result<std::fs::Metadata> {
        self.file.metadata().ctx(Kind::Fstat, || format!("cannot look at {}", self.path.display()))
    }

    /// Bytes.
    pub fn size(&self) -> Result<u64> {
        Ok(self.metadata()?.len())
    }

    /// Number of the block device that it lies on, and bytes of a block of its file system.
    pub fn place(&self) -> Result<(u64, u64)> {
        let meta = self.metadata()?;
        Ok((meta.dev(), meta.blksize().max(512)))
    }

    /// Cuts it; durable.
    pub fn truncate(&self, size: u64) -> Result<()> {
        let shown = || format!("cannot cut {} to {size} bytes", self.path.display());
        self.file.set_len(size).ctx(Kind::Ftruncate, shown)?;
        self.file.sync_all().ctx(Kind::Fsync, shown)
    }

    /// Extends it by space that is allocated and not written; durable. After an error it has the size that it had.
    pub fn inflate(&self, from: u64, to: u64) -> Result<()> {
        let shown = || format!("cannot inflate {} from {from} to {to} bytes", self.path.display());
        let too_large = || Error::new(Kind::Fallocate, shown());
        let (start, length) =
            (i64::try_from(from).map_err(|_| too_large())?, i64::try_from(to - from.min(to)).map_err(|_| too_large())?);
        let done = loop {
            match fallocate(&self.file, FallocateFlags::empty(), start, length) {
                Err(Errno::EINTR) => continue,
                other => break other,
            }
        };
        let done = done.ctx(Kind::Fallocate, shown).and_then(|()| self.file.sync_all().ctx(Kind::Fsync, shown));
        done.inspect_err(|_| {
            let _ = self.truncate(from);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_root_of_a_known_file_system_has_a_balloon() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Root::open(dir.path()).unwrap_err().kind(), Kind::DevIoc);
        assert_eq!(Root::open(Path::new("/proc")).unwrap_err().kind(), Kind::DevIoc);
        assert_eq!(Root::open(&dir.path().join("none")).unwrap_err().kind(), Kind::Open);
    }
}

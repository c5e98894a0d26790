//! The private folder of a new disk until it is whole: `.ploop-init` beside the image. A running creation holds a lock
//! in it. A folder whose lock is free was left by an interrupted creation and is replaced.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use nix::unistd::geteuid;

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::fs::mkfs;
use crate::report;
use crate::sys::file_id::FileId;

/// Name of the folder. One is enough: a folder has one DiskDescriptor.xml, so one disk.
pub const NAME: &str = ".ploop-init";
const LOCK: &str = "lock";
const IMAGE: &str = "image";
const CONTENT: &str = "fs";
const ROOT: &str = "root";

/// The folder, locked. Dropping it removes the folder and the files that a creation makes in it.
pub struct Scratch {
    path: PathBuf,
    keep: bool,
    _lock: Flock<File>,
}

impl Scratch {
    /// Makes the folder in `parent`, or takes over a leftover. `Lock` while another creation runs there.
    pub fn take(parent: &Path) -> Result<Scratch> {
        let path = parent.join(NAME);
        // Another creation may finish, and take the folder away, between any two steps.
        for _ in 0..10 {
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(e).ctx(Kind::Creat, || format!("{} cannot be made", path.display()));
                }
                _ => {}
            }
            let meta = match fs::symlink_metadata(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                other => other.ctx(Kind::Fstat, || path.display().to_string())?,
            };
            if !meta.is_dir() || meta.uid() != geteuid().as_raw() {
                bail!(
                    Param,
                    "{} is needed as a scratch folder, but it is not a folder of this user; remove it",
                    path.display()
                );
            }
            let lock_path = path.join(LOCK);
            let opened = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&lock_path);
            let file = match opened {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                other => other.ctx(Kind::Creat, || format!("{} cannot be opened", lock_path.display()))?,
            };
            let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => lock,
                Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                    bail!(Lock, "another disk is being made in {}; wait for it", parent.display())
                }
                Err((_, errno)) => {
                    return Err(errno).ctx(Kind::Lock, || format!("{} cannot be locked", lock_path.display()));
                }
            };
            let locked = FileId::of(&*lock).ctx(Kind::Fstat, || lock_path.display().to_string())?;
            if FileId::at_nofollow(&lock_path).is_ok_and(|id| id == locked) {
                return Ok(Scratch { path, keep: false, _lock: lock });
            }
        }
        Err(Error::new(
            Kind::Lock,
            format!("{} is made and removed by other processes; try again later", path.display()),
        ))
    }

    /// The image until it gets its name.
    pub fn image(&self) -> PathBuf {
        self.path.join(IMAGE)
    }

    /// The file system until it is copied into the image.
    pub fn content(&self) -> PathBuf {
        self.path.join(CONTENT)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves the folder as it is.
    pub fn keep(mut self) {
        self.keep = true;
    }

    /// Removes what an interrupted creation left, except the lock. `Param` if the folder has other files.
    pub fn clear(&self) -> Result<()> {
        let gone = |r: io::Result<()>| match r {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        };
        let clear = || {
            gone(fs::remove_file(self.image()))?;
            gone(fs::remove_file(self.content()))?;
            mkfs::remove_root(&self.path.join(ROOT))
        };
        clear().ctx(Kind::Unlink, || format!("{} cannot be cleared", self.path.display()))?;
        for entry in fs::read_dir(&self.path).ctx(Kind::Read, || self.path.display().to_string())?.flatten() {
            if entry.file_name() != LOCK {
                bail!(Param, "{} is not ours; move it away or remove it", entry.path().display());
            }
        }
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        let cleared = self.clear().and_then(|()| {
            fs::remove_file(self.path.join(LOCK))
                .and_then(|()| fs::remove_dir(&self.path))
                .ctx(Kind::Unlink, || format!("{} cannot be removed", self.path.display()))
        });
        if let Err(e) = cleared {
            report::warn(format_args!("{e}; the next creation here will replace it"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_are_replaced_and_strangers_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        fs::create_dir(&path).unwrap();
        fs::write(path.join(IMAGE), "half").unwrap();
        let scratch = Scratch::take(dir.path()).unwrap();
        scratch.clear().unwrap();
        assert!(!scratch.image().exists());
        assert_eq!(Scratch::take(dir.path()).err().map(|e| e.kind()), Some(Kind::Lock));
        fs::write(path.join("mine"), "x").unwrap();
        assert_eq!(scratch.clear().unwrap_err().kind(), Kind::Param);
        drop(scratch);
        assert!(path.join("mine").exists());
        fs::remove_dir_all(&path).unwrap();
        drop(Scratch::take(dir.path()).unwrap());
        assert!(!path.exists());
        fs::write(&path, "a file").unwrap();
        assert_eq!(Scratch::take(dir.path()).err().map(|e| e.kind()), Some(Kind::Param));
        assert_eq!(fs::read(&path).unwrap(), b"a file");
    }
}

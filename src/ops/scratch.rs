//! The private folder of a new disk until it is whole: `.ploop-init` beside the image. A running creation holds a lock
//! in it. A folder whose lock is free was left by an interrupted creation and is replaced.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::libc;
use nix::unistd::geteuid;

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::fs::mkfs;
use crate::report;
use crate::sys::file_id::FileId;
use crate::sys::folder::{Folder, Place};
use crate::sys::store;

/// Name of the folder. One is enough: a folder has one DiskDescriptor.xml, so one disk.
pub const NAME: &str = ".ploop-init";
const LOCK: &str = "lock";
const IMAGE: &str = "image";
const CONTENT: &str = "fs";
const ROOT: &str = "root";

/// The folder, locked. Dropping it removes the folder and the files that a creation makes in it.
pub struct Scratch {
    place: Place,
    inside: Folder,
    keep: bool,
    /// None once the folder is being removed.
    lock: Option<Flock<File>>,
}

/// How long a file system may take to remove a file that was open when its name went (FUSE and NFS keep it under another
/// name in the folder until then).
const LATE: Duration = Duration::from_secs(3);

impl Scratch {
    /// Makes the folder in `parent`, or takes over a leftover. `Lock` while another creation runs there.
    pub fn take(parent: &Folder) -> Result<Scratch> {
        let place = parent.entry(NAME);
        let shown = place.display();
        // Another creation may finish, and take the folder away, between any two steps.
        for _ in 0..10 {
            match store::make_dir(&place, 0o700) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(e).ctx(Kind::Creat, || format!("{shown} cannot be made"));
                }
                _ => {}
            }
            let strange = || {
                Error::new(
                    Kind::Param,
                    format!("{shown} is needed as a scratch folder, but it is not a folder of this user; remove it"),
                )
            };
            let inside = match parent.below(Path::new(NAME)) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTDIR | libc::ELOOP)) => return Err(strange()),
                other => other.ctx(Kind::Fstat, || &shown)?,
            };
            if inside.stat().ctx(Kind::Fstat, || &shown)?.st_uid != geteuid().as_raw() {
                return Err(strange());
            }
            let lock_place = inside.entry(LOCK);
            let file = match lock_place.open(OFlag::O_RDWR | OFlag::O_CREAT) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                other => File::from(other.ctx(Kind::Creat, || format!("{} cannot be opened", lock_place.display()))?),
            };
            let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => lock,
                Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                    bail!(Lock, "another disk is being made in {}; wait for it", parent.display())
                }
                Err((_, errno)) => {
                    return Err(errno).ctx(Kind::Lock, || format!("{} cannot be locked", lock_place.display()));
                }
            };
            let locked = FileId::of(&*lock).ctx(Kind::Fstat, || lock_place.display())?;
            let current = parent.below(Path::new(NAME)).and_then(|folder| folder.entry(LOCK).id());
            if current.is_ok_and(|id| id == Some(locked)) {
                return Ok(Scratch { place, inside, keep: false, lock: Some(lock) });
            }
        }
        Err(Error::new(Kind::Lock, format!("{shown} is made and removed by other processes; try again later")))
    }

    /// The image until it gets its name.
    pub fn image(&self) -> Place {
        self.inside.entry(IMAGE)
    }

    /// The file system until it is copied into the image.
    pub fn content(&self) -> Place {
        self.inside.entry(CONTENT)
    }

    /// A path by which a program that is started now finds this folder, whatever has its name by then.
    pub fn path_for_programs(&self) -> Result<PathBuf> {
        let fd = self.inside.fd().ctx(Kind::Open, || self.place.display())?;
        let opened = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd()));
        // Without /proc only the name is left.
        Ok(if opened.is_dir() { opened } else { self.inside.path().to_owned() })
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
            gone(store::unlink(&self.image()))?;
            gone(store::unlink(&self.content()))?;
            match self.inside.below(Path::new(ROOT)) {
                Ok(root) => mkfs::clear_root(&root)?,
                Err(e) => gone(Err(e))?,
            }
            gone(store::remove_dir(&self.inside.entry(ROOT)))
        };
        clear().ctx(Kind::Unlink, || format!("{} cannot be cleared", self.place.display()))?;
        for name in self.inside.names().ctx(Kind::Read, || self.place.display())? {
            let of_an_open_file =
                [".fuse_hidden", ".nfs"].iter().any(|p| name.as_encoded_bytes().starts_with(p.as_bytes()));
            if of_an_open_file {
                // It goes by itself, unless its host has crashed.
                let _ = store::unlink(&self.inside.entry(&name));
            } else if name != LOCK {
                bail!(Param, "{} is not ours; move it away or remove it", self.inside.join(name).display());
            }
        }
        Ok(())
    }
}

/// Removes a name.
type Unlink<'a> = dyn Fn(&Place) -> io::Result<()> + 'a;

impl Scratch {
    /// Removes the folder, in which only the lock is left. While the lock is held its name goes, so that no other creation
    /// takes a folder that is about to go.
    fn remove(&mut self, unlink: &Unlink<'_>) -> io::Result<()> {
        let lock = self.inside.entry(LOCK);
        let mut folder = self.place.clone();
        let unlinked = unlink(&lock);
        if unlinked.is_err() {
            // No file that is open can be removed here: first the folder gets a name that no creation looks for.
            folder = self.place.suffixed(format!("-{}", std::process::id()));
            store::rename(&self.place, &folder)?;
        }
        // Closed, since it may be kept in the folder under another name until then.
        self.lock = None;
        if unlinked.is_err() {
            unlink(&lock)?;
        }
        let end = Instant::now() + LATE;
        loop {
            match store::remove_dir(&folder) {
                Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty && Instant::now() < end && !self.has_lock() => {
                    sleep(Duration::from_millis(10));
                }
                other => return other,
            }
        }
    }

    /// Another creation has taken the folder.
    fn has_lock(&self) -> bool {
        self.inside.entry(LOCK).id().is_ok_and(|id| id.is_some())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        let cleared = self.clear().and_then(|()| {
            let removed = self.remove(&|place| store::unlink(place));
            removed.ctx(Kind::Unlink, || format!("{} cannot be removed", self.place.display()))
        });
        if let Err(e) = cleared {
            report::warn(format_args!("{e}; the next creation here will replace it"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Whether a process holds a lock on it, so has it open.
    fn is_open(path: &Path) -> bool {
        let file = File::open(path).unwrap();
        Flock::lock(file, FlockArg::LockExclusiveNonblock).is_err()
    }

    #[test]
    fn the_folder_goes_where_files_that_are_open_keep_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path().canonicalize().unwrap()).unwrap();
        let path = dir.path().join(NAME);
        // As FUSE and NFS do: the file gets another name, and goes after it was closed.
        let later = |place: &Place| {
            let hidden = place.folder.join(".fuse_hidden00000001");
            fs::rename(place.path(), &hidden)?;
            std::thread::spawn(move || {
                while is_open(&hidden) {
                    sleep(Duration::from_millis(5));
                }
                sleep(Duration::from_millis(30));
                fs::remove_file(hidden).unwrap();
            });
            Ok(())
        };
        let mut scratch = Scratch::take(&folder).unwrap();
        scratch.remove(&later).unwrap();
        scratch.keep();
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
        // As other file systems do: what is open cannot be removed.
        let refused = |place: &Place| {
            let now = fs::read_dir(dir.path()).unwrap().flatten().next().unwrap().path();
            let file = now.join(&place.name);
            if is_open(&file) {
                return Err(io::Error::from_raw_os_error(libc::EBUSY));
            }
            fs::remove_file(file)
        };
        let mut scratch = Scratch::take(&folder).unwrap();
        scratch.remove(&refused).unwrap();
        scratch.keep();
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
        // Another creation that takes the folder meanwhile keeps it.
        let taken = |place: &Place| {
            store::unlink(place)?;
            fs::write(path.join(LOCK), "")
        };
        let mut scratch = Scratch::take(&folder).unwrap();
        assert_eq!(scratch.remove(&taken).unwrap_err().kind(), io::ErrorKind::DirectoryNotEmpty);
        scratch.keep();
        assert!(path.join(LOCK).exists());
    }

    #[test]
    fn leftovers_are_replaced_and_strangers_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path().canonicalize().unwrap()).unwrap();
        let path = dir.path().join(NAME);
        fs::create_dir(&path).unwrap();
        fs::write(path.join(IMAGE), "half").unwrap();
        fs::write(path.join(".fuse_hidden000000a1"), "of the creation that was interrupted").unwrap();
        let scratch = Scratch::take(&folder).unwrap();
        scratch.clear().unwrap();
        assert!(scratch.image().id().unwrap().is_none());
        assert_eq!(Scratch::take(&folder).err().map(|e| e.kind()), Some(Kind::Lock));
        fs::write(path.join("mine"), "x").unwrap();
        assert_eq!(scratch.clear().unwrap_err().kind(), Kind::Param);
        drop(scratch);
        assert!(path.join("mine").exists());
        fs::remove_dir_all(&path).unwrap();
        drop(Scratch::take(&folder).unwrap());
        assert!(!path.exists());
        fs::write(&path, "a file").unwrap();
        assert_eq!(Scratch::take(&folder).err().map(|e| e.kind()), Some(Kind::Param));
        assert_eq!(fs::read(&path).unwrap(), b"a file");
    }
}

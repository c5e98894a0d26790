//! The folder in which a disk is received, until it is whole.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::fcntl::OFlag;

use super::super::receive::SUFFIX;
use super::incoming::{Incoming, MAX_OLD};
use super::names;
use crate::bail;
use crate::descriptor;
use crate::error::{Error, IoContext, Kind, Result};
use crate::image::lock::{Sharing, lock_open};
use crate::image::open::Access;
use crate::sys::file_id::FileId;
use crate::sys::file_lock;
use crate::sys::folder::{Folder, Place};
use crate::sys::store;

/// Only its owner looks into a disk that is not whole, and into one that is until its owner says otherwise.
const FOLDER_MODE: u32 = 0o700;
const WRITE: Access = Access { write: true, direct: false };
const FILE_MODE: u32 = 0o600;
/// The first file that a receiver makes in its folder, and the last that it removes. Without it the folder is none of a receiver's:
/// the owner of the folder above may have given a disk that name. No image can have the name.
pub(super) const MARKER: &str = ".ploop-receiving";

/// See the module.
pub(super) struct Half {
    place: Place,
    unfinished: Place,
    pub folder: Folder,
    /// Held as long as it is received: a folder without the lock is what an interrupted receiver has left.
    _lock: File,
    made: bool,
}

impl Half {
    /// `Creat`: the folder that would be made exists.
    pub fn check_free(dir: &Path) -> Result<()> {
        Half::places(dir).map(drop)
    }

    /// For the new folder `dir`; it exists: `Creat`. What an interrupted try has left for it is taken.
    pub fn make(dir: &Path) -> Result<Half> {
        let (place, unfinished) = Half::places(dir)?;
        let made = match store::make_dir(&unfinished, FOLDER_MODE) {
            Ok(()) => true,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => false,
            Err(e) => return Err(Error::with(Kind::Creat, format!("cannot make {}", unfinished.display()), e)),
        };
        let half = Half::open_at(place, unfinished, made)?;
        if !half.is_marked()? {
            half.mark()?;
        }
        Ok(half)
    }

    /// What an interrupted try has left; none: nothing.
    pub fn left(dir: &Path) -> Result<Option<Half>> {
        let (place, unfinished) = Half::places(dir)?;
        match unfinished.id().ctx(Kind::Creat, || format!("cannot look at {}", unfinished.display()))? {
            Some(_) => Half::open_at(place, unfinished, false).map(Some),
            None => Ok(None),
        }
    }

    fn places(dir: &Path) -> Result<(Place, Place)> {
        let shown = || format!("cannot make {}", dir.display());
        let Some(name) = dir.file_name() else { bail!(Creat, "{} does not name a folder to be made", dir.display()) };
        let parent = dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let place = Folder::resolve(parent).ctx(Kind::Creat, shown)?.entry(name);
        if place.id().ctx(Kind::Creat, || format!("cannot look at {}", place.display()))?.is_some() {
            bail!(Creat, "{} exists; remove it, or receive into another folder", place.display());
        }
        let unfinished = place.suffixed(SUFFIX);
        Ok((place, unfinished))
    }

    fn open_at(place: Place, unfinished: Place, made: bool) -> Result<Half> {
        let shown = unfinished.display();
        let opened = unfinished.open(OFlag::O_RDONLY | OFlag::O_DIRECTORY);
        let lock = File::from(opened.ctx(Kind::Creat, || format!("cannot open {shown}, which must be a folder"))?);
        let owner = lock.metadata().ctx(Kind::Creat, || format!("cannot look at {shown}"))?.uid();
        let me = nix::unistd::geteuid().as_raw();
        if owner != me {
            bail!(Creat, "{shown} belongs to user {owner}, not to {me}, who receives: it is in the way; remove it");
        }
        if file_lock::exclusive(&lock, false).is_err() {
            bail!(Creat, "another process uses {shown} just now; wait for its end");
        }
        let id = FileId::of(&lock).ctx(Kind::Creat, || format!("cannot look at {shown}"))?;
        let folder = unfinished.folder.below(Path::new(&unfinished.name));
        let folder = folder.ctx(Kind::Creat, || format!("cannot open {shown}"))?;
        // The receiver that had the lock may have ended well meanwhile.
        if folder.fd().and_then(FileId::of).ctx(Kind::Creat, || format!("cannot look at {shown}"))? != id {
            bail!(Creat, "{shown} was replaced by another process just now; receive again");
        }
        let half = Half { place, unfinished, folder, _lock: lock, made };
        half.check_receivers()?;
        Ok(half)
    }

    /// A receiver has made the folder, or nothing is in it.
    fn check_receivers(&self) -> Result<()> {
        if self.is_marked()? || self.names()?.is_empty() {
            return Ok(());
        }
        let shown = self.display();
        let disk =
            self.folder.entry(descriptor::FILE_NAME).id().ctx(Kind::Read, || format!("cannot look into {shown}"))?;
        match disk.is_some() {
            true => bail!(
                Creat,
                "{shown} has a {} and no {MARKER}: it is a disk, not what a receiver has left, or was received whole and only lacks \
                 its name: give it another name, or remove it",
                descriptor::FILE_NAME
            ),
            false => {
                bail!(Creat, "{shown} has no {MARKER}: no receiver has made it; remove it, or give it another name")
            }
        }
    }

    fn marker(&self) -> Place {
        self.folder.entry(MARKER)
    }

    fn is_marked(&self) -> Result<bool> {
        let marker = self.marker();
        let found = marker.regular().ctx(Kind::Read, || format!("cannot look at {}", marker.display()))?;
        Ok(found.is_some_and(|stat| stat.st_uid == nix::unistd::geteuid().as_raw()))
    }

    fn mark(&self) -> Result<()> {
        let marker = self.marker();
        store::create_new(&marker, FILE_MODE).map(drop).ctx(Kind::Creat, || format!("cannot make {}", marker.display()))
    }

    fn unmark(&self) -> Result<()> {
        let marker = self.marker();
        store::unlink(&marker).ctx(Kind::Unlink, || format!("cannot remove {}", marker.display()))?;
        store::sync_dir(&self.folder).ctx(Kind::Fsync, || format!("cannot sync {}", self.display()))
    }

    pub fn display(&self) -> String {
        self.unfinished.display()
    }

    /// What is in it, by name.
    pub fn names(&self) -> Result<Vec<String>> {
        let found = self.folder.names().ctx(Kind::Read, || format!("cannot list {}", self.display()))?;
        let text = |name: std::ffi::OsString| name.into_string();
        let mut names = found.into_iter().map(text).collect::<Result<Vec<_>, _>>().map_err(|name| {
            Error::new(Kind::Creat, format!("{} has {name:?}, which no receiver makes; remove it", self.display()))
        })?;
        names.sort();
        Ok(names)
    }

    /// An image of an earlier try, to be looked at; none: the file is none, or is not used.
    pub fn open(&self, name: &str) -> Result<Option<File>> {
        let place = self.folder.entry(name);
        if names::check(name).is_err() || place.regular().ctx(Kind::Read, || place.display())?.is_none() {
            return Ok(None);
        }
        let file = File::from(place.open(OFlag::O_RDONLY | OFlag::O_NONBLOCK).ctx(Kind::Open, || place.display())?);
        let len = file.metadata().ctx(Kind::Fstat, || place.display())?.len();
        Ok(Some(file).filter(|_| len <= MAX_OLD))
    }

    /// The file of this name for what comes: of an earlier try if there is one, else a new one. `again`: emptied.
    pub fn take(&self, name: &str, again: bool) -> Result<Incoming> {
        let place = self.folder.entry(name);
        let shown = place.display();
        let file = match store::create_new(&place, FILE_MODE) {
            Ok(file) => return Ok(Incoming::new(file, shown, 0)),
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::with(Kind::Creat, format!("cannot make {shown}"), e));
            }
            Err(_) => {
                place.open(OFlag::O_RDWR | OFlag::O_NONBLOCK).ctx(Kind::Creat, || format!("cannot open {shown}"))?
            }
        };
        // A disk's image may be in use.
        let file = lock_open(&file, Path::new(&shown), WRITE, Sharing::Exclusive)?.file;
        let meta = file.metadata().ctx(Kind::Creat, || format!("cannot look at {shown}"))?;
        if !meta.is_file() || meta.nlink() != 1 {
            bail!(Creat, "{shown} is in the way: it is no file, or has {} names; remove it", meta.nlink());
        }
        if again || meta.len() > MAX_OLD {
            store::set_len(&file, 0).ctx(Kind::Ftruncate, || format!("cannot empty {shown}"))?;
            return Ok(Incoming::new(file, shown, 0));
        }
        Ok(Incoming::new(file, shown, meta.len()))
    }

    /// All is durable in it: gives it its name.
    pub fn publish(&self) -> Result<()> {
        self.unmark().and_then(|()| self.rename()).inspect_err(|_| {
            // The next try may use it.
            let _ = self.mark();
        })?;
        let looked = || format!("cannot look at {}", self.place.display());
        let id = self.folder.fd().and_then(FileId::of).ctx(Kind::Rename, looked)?;
        if self.place.id().ctx(Kind::Rename, looked)? != Some(id) {
            bail!(
                Rename,
                "{} is not what was received: another process has replaced it; remove it",
                self.place.display()
            );
        }
        let parent = &self.place.folder;
        store::sync_dir(parent).ctx(Kind::Fsync, || format!("cannot sync the folder of {}", self.place.display()))
    }

    fn rename(&self) -> Result<()> {
        match store::rename_new(&self.unfinished, &self.place) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                bail!(Creat, "{} was made meanwhile; nothing was changed", self.place.display())
            }
            other => other.ctx(Kind::Rename, || format!("cannot give {} its name", self.place.display())),
        }
    }

    /// Removes a folder of this receiver in which nothing is.
    pub fn forget_if_empty(&self) -> bool {
        let empty = || self.names().is_ok_and(|names| names == [MARKER]);
        self.made && empty() && store::unlink(&self.marker()).and_then(|()| store::remove_dir(&self.unfinished)).is_ok()
    }
}

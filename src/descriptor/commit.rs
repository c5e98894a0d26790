//! Storing a descriptor: the commit point of operations.

use std::fs::File;
use std::os::unix::fs::{PermissionsExt, fchown};

use nix::sys::stat::FileStat;

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::file_id::FileId;
use crate::sys::folder::{Folder, Named, Place};
use crate::sys::store;

use super::model::Descriptor;

impl Descriptor {
    /// Replaces the descriptor at `to`, durably: after a crash the old file is there or the new one, whole.
    pub fn commit(&self, to: &(impl Named + ?Sized)) -> Result<()> {
        self.store(&place_of(to)?, true)
    }

    /// Stores the descriptor of a new disk: a file that exists is an error (38) and stays.
    pub fn commit_new(&self, to: &(impl Named + ?Sized)) -> Result<()> {
        self.store(&place_of(to)?, false)
    }

    /// Writes the descriptor durably under the temporary name beside `place`, for the worker that serves the disk to rename
    /// it over `place` ([`commit_by_fd`](super::commit_by_fd)). Returns that name and the file.
    pub fn prepare(&self, place: &Place) -> Result<(Place, FileId)> {
        self.write_tmp(place, true)
    }

    fn write_tmp(&self, place: &Place, replace: bool) -> Result<(Place, FileId)> {
        let mut this = self.clone();
        this.normalise_top()?;
        this.check_storable()?;
        let xml = this.to_xml()?;
        let tmp = place.suffixed(".tmp");
        let old = match replace {
            true => place.regular().ok().flatten(),
            false => None,
        };
        let file = make(&tmp)?;
        let id = FileId::of(&file).ctx(Kind::Fstat, || format!("cannot look at {}", tmp.display()))?;
        fill(file, xml.as_bytes(), old.as_ref())
            .ctx(Kind::Write, || format!("cannot write {}", tmp.display()))
            .inspect_err(|_| forget(&tmp, id))?;
        Ok((tmp, id))
    }

    fn store(&self, place: &Place, replace: bool) -> Result<()> {
        let (tmp, id) = self.write_tmp(place, replace)?;
        let renamed = if replace { rename(&tmp, place) } else { rename_new(&tmp, place) };
        renamed.inspect_err(|_| forget(&tmp, id))?;
        sync_folder(&place.folder)
    }
}

fn place_of(to: &(impl Named + ?Sized)) -> Result<Place> {
    to.place().ctx(Kind::Creat, || "cannot open the folder of a descriptor")
}

/// Removes the temporary file, which this process made exclusively. The next store would replace it anyway.
fn forget(tmp: &Place, id: FileId) {
    let _ = store::unlink_file(tmp, id);
}

/// Makes the temporary file exclusively; removes first what an interrupted store left under that name.
fn make(tmp: &Place) -> Result<File> {
    let fail = || format!("cannot create {}", tmp.display());
    match store::unlink(tmp) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::with(Kind::Unlink, format!("cannot remove {}", tmp.display()), e));
        }
        _ => {}
    }
    store::create_new(tmp, 0o644).ctx(Kind::Creat, fail)
}

fn fill(file: File, bytes: &[u8], like: Option<&FileStat>) -> std::io::Result<()> {
    if let Some(old) = like {
        // Without the right to change owners the user that stores the file becomes its owner, as with any editor.
        let _ = fchown(&file, Some(old.st_uid), Some(old.st_gid));
        file.set_permissions(std::fs::Permissions::from_mode(old.st_mode & 0o7777))?;
    }
    store::write_all(&file, bytes, 0)?;
    store::sync_all(&file)
}

fn rename(from: &Place, to: &Place) -> Result<()> {
    store::rename(from, to).ctx(Kind::Rename, || format!("cannot rename {} to {}", from.display(), to.display()))
}

/// Renames a file, also an image, without replacing: an existing target is `Param`.
pub fn rename_new(from: &Place, to: &Place) -> Result<()> {
    match store::rename_new(from, to) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            bail!(Param, "{} exists already: it is not replaced", to.display())
        }
        other => other.ctx(Kind::Rename, || format!("cannot rename {} to {}", from.display(), to.display())),
    }
}

/// Makes the entries of a folder durable.
pub fn sync_folder(folder: &Folder) -> Result<()> {
    store::sync_dir(folder).ctx(Kind::Fsync, || format!("cannot sync folder {}", folder.display()))
}

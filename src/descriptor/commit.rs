//! Storing a descriptor: the commit point of operations.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::store;

use super::model::Descriptor;

impl Descriptor {
    /// Replaces the descriptor at `path`, durably: after a crash the old file is there or the new one, whole.
    pub fn commit(&self, path: &Path) -> Result<()> {
        self.store(path, true)
    }

    /// Stores the descriptor of a new disk: a file that exists is an error (38) and stays.
    pub fn commit_new(&self, path: &Path) -> Result<()> {
        self.store(path, false)
    }

    /// Writes the descriptor durably under the temporary name beside `path`, for the worker that serves the disk to rename it
    /// over `path` ([`commit_by_fd`](super::commit_by_fd)). Returns that name.
    pub fn prepare(&self, path: &Path) -> Result<PathBuf> {
        self.write_tmp(path, true)
    }

    fn write_tmp(&self, path: &Path, replace: bool) -> Result<PathBuf> {
        let mut this = self.clone();
        this.normalise_top()?;
        this.check_storable()?;
        let xml = this.to_xml()?;
        let mut tmp: OsString = path.into();
        tmp.push(".tmp");
        let tmp = PathBuf::from(tmp);
        let old = std::fs::symlink_metadata(path).ok().filter(|m| m.is_file());
        let file = make(&tmp)?;
        fill(file, xml.as_bytes(), old.as_ref().filter(|_| replace))
            .ctx(Kind::Write, || format!("cannot write {}", tmp.display()))
            .inspect_err(|_| forget(&tmp))?;
        Ok(tmp)
    }

    fn store(&self, path: &Path, replace: bool) -> Result<()> {
        let tmp = self.write_tmp(path, replace)?;
        let renamed = if replace { rename(&tmp, path) } else { rename_new(&tmp, path) };
        renamed.inspect_err(|_| forget(&tmp))?;
        sync_parent(path)
    }
}

/// Removes the temporary file, which this process made exclusively. The next store would replace it anyway.
fn forget(tmp: &Path) {
    let _ = store::unlink(tmp);
}

/// Makes the temporary file exclusively; removes first what an interrupted store left under that name.
fn make(tmp: &Path) -> Result<File> {
    let fail = || format!("cannot create {}", tmp.display());
    match store::unlink(tmp) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::with(Kind::Unlink, format!("cannot remove {}", tmp.display()), e));
        }
        _ => {}
    }
    store::create_new(tmp, 0o644).ctx(Kind::Creat, fail)
}

fn fill(file: File, bytes: &[u8], like: Option<&std::fs::Metadata>) -> std::io::Result<()> {
    if let Some(old) = like {
        // Without the right to change owners the user that stores the file becomes its owner, as with any editor.
        let _ = fchown(&file, Some(old.uid()), Some(old.gid()));
        file.set_permissions(std::fs::Permissions::from_mode(old.mode() & 0o7777))?;
    }
    store::write_all(&file, bytes, 0)?;
    store::sync_all(&file)
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    store::rename(from, to).ctx(Kind::Rename, || format!("cannot rename {} to {}", from.display(), to.display()))
}

/// Renames a file, also an image, without replacing: an existing target is `Param`.
pub fn rename_new(from: &Path, to: &Path) -> Result<()> {
    match store::rename_new(from, to) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            bail!(Param, "{} exists already: it is not replaced", to.display())
        }
        other => other.ctx(Kind::Rename, || format!("cannot rename {} to {}", from.display(), to.display())),
    }
}

/// Makes the folder entry of `path` durable.
pub fn sync_parent(path: &Path) -> Result<()> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    store::sync_dir(dir).ctx(Kind::Fsync, || format!("cannot sync folder {}", dir.display()))
}

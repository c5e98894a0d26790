//! The commit of a change of the chain: a new descriptor is renamed over the old one, durably.
//!
//! It uses open files of the folder and of the new descriptor, so that it does not depend on names or mounts of the
//! caller, and so that the next worker or supervisor can find out whether it was made.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::fcntl::AtFlags;
use nix::sys::stat::fstatat;
use serde::{Deserialize, Serialize};

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::sys::file_id::FileId;
use crate::sys::{host, store};

/// File names in the folder of a descriptor: the new content is renamed over the old.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CommitNames {
    pub tmp: PathBuf,
    pub name: PathBuf,
}

/// What a commit uses.
#[derive(Debug)]
pub struct CommitFds {
    /// O_PATH.
    pub folder: OwnedFd,
    /// The new descriptor, O_PATH.
    pub file: OwnedFd,
    /// The lock on the disk: held as long as a process has it open.
    pub lock: Option<OwnedFd>,
}

/// The file `name` in the folder is the new one: the change has been made.
pub fn is_committed(names: &CommitNames, CommitFds { folder, file, .. }: &CommitFds) -> Result<bool> {
    check(&names.tmp)?;
    check(&names.name)?;
    Ok(entry(folder, &names.name)? == Some(identity(file)?))
}

/// Makes the change unless it was made. The warning: it is made, but the folder could not be synced. An error: it is
/// not made.
pub fn commit(names: &CommitNames, fds: &CommitFds) -> Result<Option<String>> {
    let CommitFds { folder, file: new, .. } = fds;
    let (tmp, name) = (names.tmp.display(), names.name.display());
    if !is_committed(names, fds)? {
        if entry(folder, &names.tmp)? != Some(identity(new)?) {
            bail!(Rename, "{tmp} is not the file that was prepared; has another process changed it?");
        }
        store::rename_in(folder, &names.tmp, &names.name)
            .ctx(Kind::Rename, || format!("cannot rename {tmp} to {name}"))?;
    }
    if host::breach("the folder of a commit is not synced") {
        return Ok(None);
    }
    let synced = store::sync_open_dir(folder);
    Ok(synced.err().map(|e| format!("{name} was replaced, but its folder cannot be synced: {e}")))
}

/// A name in the folder itself.
fn check(name: &Path) -> Result<()> {
    match name.file_name() {
        Some(file) if file == name.as_os_str() => Ok(()),
        _ => bail!(Protocol, "{} is no name of a file in a folder", name.display()),
    }
}

fn identity(fd: &OwnedFd) -> Result<FileId> {
    FileId::of(fd).ctx(Kind::Fstat, || "cannot look at the new descriptor")
}

fn entry(folder: &OwnedFd, name: &Path) -> Result<Option<FileId>> {
    match fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat.into())),
        Err(nix::Error::ENOENT) => Ok(None),
        Err(e) => Err(e).ctx(Kind::Fstat, || format!("cannot look at {}", name.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::os::unix::fs::OpenOptionsExt;

    fn path_fd(path: &Path) -> OwnedFd {
        File::options().read(true).custom_flags(libc::O_PATH).open(path).unwrap().into()
    }

    #[test]
    fn once_and_only_what_was_prepared() {
        let dir = tempfile::tempdir().unwrap();
        let (old, tmp) = (dir.path().join("d"), dir.path().join("d.tmp"));
        fs::write(&old, "old").unwrap();
        fs::write(&tmp, "new").unwrap();
        let names = CommitNames { tmp: "d.tmp".into(), name: "d".into() };
        let fds = CommitFds { folder: path_fd(dir.path()), file: path_fd(&tmp), lock: None };
        assert!(!is_committed(&names, &fds).unwrap());
        assert_eq!(commit(&names, &fds).unwrap(), None);
        assert!(is_committed(&names, &fds).unwrap());
        // A second commit changes nothing, also if there is another temporary file.
        fs::write(&tmp, "other").unwrap();
        assert_eq!(commit(&names, &fds).unwrap(), None);
        assert_eq!(fs::read(&old).unwrap(), b"new");
        assert_eq!(fs::read(&tmp).unwrap(), b"other");
        // Another file under the name is left alone.
        let prepared = path_fd(&tmp);
        fs::remove_file(&tmp).unwrap();
        fs::write(&tmp, "another").unwrap();
        let fds = CommitFds { file: prepared, ..fds };
        assert_eq!(commit(&names, &fds).unwrap_err().kind(), Kind::Rename);
        for bad in ["../d", "a/b", "", ".."] {
            let names = CommitNames { tmp: bad.into(), name: "d".into() };
            assert_eq!(commit(&names, &fds).unwrap_err().kind(), Kind::Protocol, "{bad}");
        }
    }
}

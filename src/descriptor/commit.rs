//! Storing a descriptor: the commit point of operations.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};

use super::model::Descriptor;

impl Descriptor {
    /// Replaces the descriptor at `path`, durably: after a crash the old file is there or the new one, whole.
    pub fn commit(&self, path: &Path) -> Result<()> {
        self.store(path, true)
    }

    /// The same for a new disk: a file that exists is an error (38) and stays.
    pub fn commit_new(&self, path: &Path) -> Result<()> {
        self.store(path, false)
    }

    fn store(&self, path: &Path, replace: bool) -> Result<()> {
        let mut this = self.clone();
        this.normalise_top()?;
        if let Some(shot) = this.shots.iter().find(|s| s.reverse_merge.is_some()) {
            bail!(
                Param,
                "snapshot {} is marked TemporaryZero, half merged by another program: that program must finish it \
                 before this disk is changed",
                shot.guid
            );
        }
        let xml = this.to_xml()?;
        let mut tmp: OsString = path.into();
        tmp.push(".tmp");
        let tmp = PathBuf::from(tmp);
        let old = std::fs::symlink_metadata(path).ok().filter(|m| m.is_file());
        let file = make(&tmp)?;
        let written = fill(file, xml.as_bytes(), old.as_ref().filter(|_| replace))
            .ctx(Kind::Write, || format!("cannot write {}", tmp.display()))
            .and_then(|()| if replace { rename(&tmp, path) } else { rename_new(&tmp, path) });
        if let Err(e) = written {
            // Ours: made exclusively above. The next store would replace it anyway.
            let _ = std::fs::remove_file(&tmp);
            return Err(e);
        }
        sync_parent(path)
    }
}

/// Makes the temporary file exclusively; what an interrupted store left under that name goes.
fn make(tmp: &Path) -> Result<File> {
    let fail = || format!("cannot create {}", tmp.display());
    match std::fs::remove_file(tmp) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::with(Kind::Unlink, format!("cannot remove {}", tmp.display()), e));
        }
        _ => {}
    }
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o666)
        .custom_flags(libc::O_NOFOLLOW)
        .open(tmp)
        .ctx(Kind::Creat, fail)
}

fn fill(mut file: File, bytes: &[u8], like: Option<&std::fs::Metadata>) -> std::io::Result<()> {
    if let Some(old) = like {
        // Without the right to give files away the new owner is who stores it, as with any editor.
        let _ = fchown(&file, Some(old.uid()), Some(old.gid()));
        file.set_permissions(std::fs::Permissions::from_mode(old.mode() & 0o7777))?;
    }
    file.write_all(bytes)?;
    file.sync_all()
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).ctx(Kind::Rename, || format!("cannot rename {} to {}", from.display(), to.display()))
}

/// Renames without replacing: the target existing is an error of kind `Param`. For new images, too.
pub fn rename_new(from: &Path, to: &Path) -> Result<()> {
    let done = match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        // File systems without the flag: a link never replaces either.
        Err(Errno::EINVAL | Errno::ENOSYS) => std::fs::hard_link(from, to).and_then(|()| std::fs::remove_file(from)),
        other => other.map_err(std::io::Error::from),
    };
    match done {
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
    File::open(dir).and_then(|d| d.sync_all()).ctx(Kind::Fsync, || format!("cannot sync folder {}", dir.display()))
}

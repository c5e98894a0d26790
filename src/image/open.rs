//! Opening image files that untrusted users may have made or named.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::sys::stat::{Mode, SFlag, fstat};

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};

pub use crate::sys::reopen::{Access, reopen};

/// A file of the same name in the descriptor's folder, where the image was looked for elsewhere.
fn beside(path: &Path, dir: &Path) -> Option<PathBuf> {
    let other = dir.join(path.file_name()?);
    (other != path && other.is_file()).then_some(other)
}

/// An O_PATH descriptor of an image: a regular file.
///
/// `dir` is the folder of the descriptor that names it. Below that folder no link is followed. A file elsewhere must
/// belong to the folder's owner and be no link itself, so that a user cannot make root open the file of another user by
/// writing a descriptor. Without `dir` the user named the file, and links are followed.
pub fn open_level(path: &Path, dir: Option<&Path>) -> Result<OwnedFd> {
    let fail = |e: Errno| {
        let why: String = match (e, dir.and_then(|dir| beside(path, dir))) {
            (Errno::ELOOP, _) => " (links are not followed for images that a descriptor names)".into(),
            (Errno::ENOENT, Some(other)) => format!(
                " ({} lies beside the descriptor: if that is the image, correct the element File in the descriptor)",
                other.display()
            ),
            _ => String::new(),
        };
        Error::with(
            Kind::Open,
            format!("cannot open image {}{why}", path.display()),
            std::io::Error::from_raw_os_error(e as i32),
        )
    };
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let fd = match dir {
        None => open(path, flags, Mode::empty()).map_err(fail)?,
        Some(dir) => {
            let folder = open(dir, flags | OFlag::O_DIRECTORY, Mode::empty())
                .ctx(Kind::Open, || format!("cannot open folder {}", dir.display()))?;
            let path = lexical(path);
            match path.strip_prefix(lexical(dir)) {
                Ok(inside) => open_below(&folder, inside).map_err(fail)?,
                Err(_) => {
                    let fd = open(&path, flags | OFlag::O_NOFOLLOW, Mode::empty()).map_err(fail)?;
                    check_owner(&fd, &folder, &path, dir)?;
                    fd
                }
            }
        }
    };
    let kind = fstat(&fd).map(|s| SFlag::from_bits_truncate(s.st_mode & SFlag::S_IFMT.bits()));
    match kind {
        Ok(SFlag::S_IFREG) => Ok(fd),
        Ok(kind) => {
            let what = match kind {
                SFlag::S_IFLNK => "a symbolic link (links are not followed for images that a descriptor names)",
                SFlag::S_IFDIR => "a folder",
                SFlag::S_IFBLK | SFlag::S_IFCHR => "a device",
                SFlag::S_IFIFO => "a pipe",
                SFlag::S_IFSOCK => "a socket",
                _ => "no file",
            };
            bail!(Open, "{} is {what}: an image must be a regular file", path.display())
        }
        Err(e) => Err(Error::with(
            Kind::Fstat,
            format!("cannot look at {}", path.display()),
            std::io::Error::from_raw_os_error(e as i32),
        )),
    }
}

/// `.` and `..` and doubled slashes resolved by text, as the newer line reads its paths.
pub fn lexical(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                out.pop();
            }
            other => out.push(other),
        }
    }
    out
}

fn open_below(folder: &OwnedFd, inside: &Path) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    match openat2(folder, inside, how) {
        // Kernels before 5.6 and sandboxes that do not know the call: step by step.
        Err(Errno::ENOSYS | Errno::EPERM) => {}
        other => return other,
    }
    let mut at: Option<OwnedFd> = None;
    let names: Vec<&OsStr> = inside.iter().collect();
    for (i, name) in names.iter().enumerate() {
        let last = i + 1 == names.len();
        let step = if last { flags } else { flags | OFlag::O_DIRECTORY };
        at = Some(match &at {
            None => openat(folder, *name, step, Mode::empty())?,
            Some(fd) => openat(fd, *name, step, Mode::empty())?,
        });
    }
    at.ok_or(Errno::EISDIR)
}

fn check_owner(fd: &OwnedFd, folder: &OwnedFd, path: &Path, dir: &Path) -> Result<()> {
    let file = fstat(fd).ctx(Kind::Fstat, || format!("cannot look at {}", path.display()))?;
    let owner = fstat(folder).ctx(Kind::Fstat, || format!("cannot look at {}", dir.display()))?.st_uid;
    if file.st_uid != owner {
        bail!(
            Open,
            "image {} lies outside its descriptor's folder {} and belongs to user {}: must belong to the folder's \
             owner, user {owner}; give one of them to the other's owner, or move the image into the folder",
            path.display(),
            dir.display(),
            file.st_uid
        );
    }
    Ok(())
}

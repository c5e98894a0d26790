//! Opening image files that untrusted users may have made or named.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::geteuid;

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::folder::{Folder, Place, look_up};

pub use crate::sys::folder::lexical;
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
pub fn open_level(path: &Path, dir: Option<&Folder>) -> Result<OwnedFd> {
    let fail = |e: std::io::Error| {
        let why: String = match (e.raw_os_error(), dir.and_then(|dir| beside(path, dir))) {
            (Some(libc::ELOOP), _) => " (links are not followed for images that a descriptor names)".into(),
            (Some(libc::ENOENT), Some(other)) => format!(
                " ({} lies beside the descriptor: if that is the image, correct the element File in the descriptor)",
                other.display()
            ),
            _ => String::new(),
        };
        Error::with(Kind::Open, format!("cannot open image {}{why}", path.display()), e)
    };
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let fd = match dir {
        None => open(path, flags, Mode::empty()).map_err(|e| fail(e.into()))?,
        Some(dir) => {
            let folder = dir.fd().ctx(Kind::Open, || format!("cannot open folder {}", dir.display()))?;
            let path = lexical(path);
            match path.strip_prefix(lexical(dir)) {
                Ok(inside) => look_up(Some(folder), inside, flags).map_err(fail)?,
                Err(_) => {
                    let fd = open(&path, flags | OFlag::O_NOFOLLOW, Mode::empty()).map_err(|e| fail(e.into()))?;
                    check_owner(&fd, dir, &path)?;
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

/// The place for a file that this program makes in the name of a disk: in the disk's folder, or in another one if that
/// belongs to the same user, or the disk to the user of this program. So a user cannot make root write elsewhere by writing
/// a descriptor.
pub fn place_beside(path: &Path, dir: &Folder) -> Result<Place> {
    let shown = path.display();
    let place = dir.place(path).ctx(Kind::Open, || format!("cannot open the folder of {shown}"))?;
    if !dir.has(path) {
        let owner = |folder: &Folder| {
            folder.stat().ctx(Kind::Fstat, || format!("cannot look at {}", folder.display())).map(|s| s.st_uid)
        };
        let (of_disk, here) = (owner(dir)?, owner(&place.folder)?);
        if of_disk != geteuid().as_raw() && of_disk != here {
            bail!(
                Param,
                "{shown} lies outside the disk's folder {}, which belongs to user {of_disk}, in a folder of user {here}: no \
                 file is made there; move the image into the disk's folder",
                dir.display()
            );
        }
    }
    Ok(place)
}

fn check_owner(fd: &OwnedFd, dir: &Folder, path: &Path) -> Result<()> {
    let file = fstat(fd).ctx(Kind::Fstat, || format!("cannot look at {}", path.display()))?;
    let owner = dir.stat().ctx(Kind::Fstat, || format!("cannot look at {}", dir.display()))?.st_uid;
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

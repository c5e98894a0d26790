//! Resolving a path that the user of this program named, by handles. Links are followed; but one that belongs to another
//! user than root and this one leads only to folders of that user, so that the owner of a folder on the way cannot send
//! an operation elsewhere.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, openat, readlinkat};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::geteuid;

use super::{FOLDER, Folder, PATH, Place};

/// Links followed at most, as in the kernel.
const LINKS: usize = 40;

struct Walk {
    fd: OwnedFd,
    real: PathBuf,
    left: VecDeque<OsString>,
    links: usize,
    /// Owners of links that belong neither to root nor to this user.
    owners: Vec<u32>,
}

/// The folder and the name to which a path leads; the file is there and is no link. The root folder has the name `.`.
pub fn place(path: &Path) -> io::Result<Place> {
    let mut walk = Walk::start(path)?;
    let mut last: OsString = ".".into();
    while let Some(name) = walk.left.pop_front() {
        let is_last = walk.left.is_empty();
        let opened = openat(&walk.fd, name.as_os_str(), PATH | OFlag::O_NOFOLLOW, Mode::empty())?;
        let stat = fstat(&opened)?;
        if kind(stat.st_mode) == SFlag::S_IFLNK {
            walk.follow(&opened, stat.st_uid)?;
        } else if is_last && name != ".." {
            last = name;
        } else {
            walk.enter(opened, &name);
        }
    }
    walk.end()?;
    Ok(Folder::with(walk.real, walk.fd).entry(last))
}

/// The folder to which a path leads.
pub fn folder(path: &Path) -> io::Result<Folder> {
    let found = place(path)?;
    let opened = openat(found.folder.fd()?, found.name.as_os_str(), FOLDER | OFlag::O_NOFOLLOW, Mode::empty())?;
    let real = if found.name == "." { found.folder.path().to_owned() } else { found.path() };
    Ok(Folder::with(real, opened))
}

fn kind(mode: u32) -> SFlag {
    SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits())
}

fn parts(path: &Path) -> impl DoubleEndedIterator<Item = OsString> + '_ {
    path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    })
}

impl Walk {
    fn start(path: &Path) -> io::Result<Walk> {
        if path.as_os_str().is_empty() {
            return Err(Errno::ENOENT.into());
        }
        let (from, real) = match path.is_absolute() {
            true => (OsStr::new("/"), PathBuf::from("/")),
            false => (OsStr::new("."), std::env::current_dir()?),
        };
        let fd = openat(AT_FDCWD, from, FOLDER, Mode::empty())?;
        Ok(Walk { fd, real, left: parts(path).collect(), links: 0, owners: Vec::new() })
    }

    fn enter(&mut self, opened: OwnedFd, name: &OsStr) {
        self.fd = opened;
        match name == ".." {
            true => drop(self.real.pop()),
            false => self.real.push(name),
        }
    }

    fn follow(&mut self, link: &OwnedFd, owner: u32) -> io::Result<()> {
        self.links += 1;
        if self.links > LINKS {
            return Err(Errno::ELOOP.into());
        }
        if owner != 0 && owner != geteuid().as_raw() {
            self.owners.push(owner);
        }
        let target = PathBuf::from(readlinkat(link, "")?);
        if target.is_absolute() {
            self.fd = openat(AT_FDCWD, "/", FOLDER, Mode::empty())?;
            self.real = PathBuf::from("/");
        }
        for part in parts(&target).rev() {
            self.left.push_front(part);
        }
        Ok(())
    }

    fn end(&self) -> io::Result<()> {
        let here = fstat(&self.fd)?.st_uid;
        match self.owners.iter().find(|owner| **owner != here) {
            None => Ok(()),
            Some(owner) => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!(
                    "a link of user {owner} on the way leads to {}, a folder of user {here}: name that folder itself",
                    self.real.display()
                ),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::file_id::FileId;
    use std::fs;
    use std::os::unix::fs::{lchown, symlink};

    #[test]
    fn a_path_leads_where_the_kernel_leads_it_unless_a_strangers_link_leads_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/b/f"), "x").unwrap();
        symlink("a/./b/../b", root.join("rel")).unwrap();
        symlink(root.join("rel"), root.join("abs")).unwrap();
        symlink("abs/f", root.join("file")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        for path in ["a/b/f", "rel/f", "abs/f", "file", "abs/../../a/b//f", "a/b/."] {
            let path = root.join(path);
            let found = place(&path).unwrap();
            let real = path.canonicalize().unwrap();
            assert_eq!(found.path(), real, "{}", path.display());
            assert_eq!(found.id().unwrap().unwrap(), FileId::at(&real).unwrap());
        }
        for (path, errno) in [("none", libc::ENOENT), ("loop", libc::ELOOP), ("a/b/f/x", libc::ENOTDIR)] {
            assert_eq!(place(&root.join(path)).unwrap_err().raw_os_error(), Some(errno), "{path}");
        }
        assert_eq!(folder(&root.join("abs")).unwrap().path(), root.join("a/b"));
        assert_eq!(folder(Path::new("/")).unwrap().path(), Path::new("/"));
        assert!(folder(&root.join("file")).is_err());
        if !geteuid().is_root() {
            return;
        }
        lchown(root.join("abs"), Some(12345), None).unwrap();
        let e = place(&root.join("abs/f")).unwrap_err();
        assert!(e.to_string().contains("link of user 12345"), "{e}");
        std::os::unix::fs::chown(root.join("a/b"), Some(12345), None).unwrap();
        place(&root.join("abs/f")).unwrap();
    }
}

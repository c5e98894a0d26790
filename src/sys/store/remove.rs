//! Removing one certain file from a folder that another user may be changing at the same time.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, RenameFlags, openat, renameat, renameat2};
use nix::sys::stat::{Mode, fstat, mkdirat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};

use crate::sys::file_id::FileId;
use crate::sys::folder::Place;

/// Prefix of the names of private folders, which exist while a file is removed.
pub const PRIVATE: &str = ".ploop-remove.";
const NAME: &str = "file";

/// Removes `file` under this name. Another file that has got the name stays, and is an error.
///
/// Where another user can change the folder the name could get another file between the comparison and the removal. So
/// the file is first moved into a private folder, compared, and removed there.
pub fn file(place: &Place, file: FileId) -> io::Result<()> {
    let folder = place.folder.fd()?;
    if !matches(place.id()?, file)? {
        return Err(other(place));
    }
    if !another_user_can_change(folder)? {
        return Ok(unlinkat(folder, place.name.as_os_str(), UnlinkatFlags::NoRemoveDir)?);
    }
    let private = format!("{PRIVATE}{}", uuid::Uuid::new_v4());
    let made =
        mkdirat(folder, private.as_str(), Mode::S_IRWXU).map_err(io::Error::from).and_then(|()| own(folder, &private));
    let Ok(inside) = made else {
        // No space, or no right, for a folder. What can have got the name meanwhile is a file that the other user put into
        // the folder and could remove as well.
        let _ = unlinkat(folder, private.as_str(), UnlinkatFlags::RemoveDir);
        return Ok(unlinkat(folder, place.name.as_os_str(), UnlinkatFlags::NoRemoveDir)?);
    };
    let done = renameat(folder, place.name.as_os_str(), &inside, NAME)
        .map_err(io::Error::from)
        .and_then(|()| remove_moved(place, &inside, file));
    let _ = unlinkat(folder, private.as_str(), UnlinkatFlags::RemoveDir);
    done
}

fn remove_moved(place: &Place, inside: &OwnedFd, file: FileId) -> io::Result<()> {
    if matches(FileId::in_folder(inside, Path::new(NAME))?, file)? {
        return Ok(unlinkat(inside, NAME, UnlinkatFlags::NoRemoveDir)?);
    }
    // Another file had got the name: it gets it back, unless yet another one has it by now.
    let (folder, flags) = (place.folder.fd()?, RenameFlags::RENAME_NOREPLACE);
    match renameat2(inside, NAME, folder, place.name.as_os_str(), flags) {
        Ok(()) => {}
        Err(Errno::EINVAL | Errno::ENOSYS) => renameat(inside, NAME, folder, place.name.as_os_str())?,
        Err(_) => renameat(inside, NAME, folder, format!("{PRIVATE}{}", uuid::Uuid::new_v4()).as_str())?,
    }
    Err(other(place))
}

fn matches(found: Option<FileId>, file: FileId) -> io::Result<bool> {
    found.map(|id| id == file).ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn other(place: &Place) -> io::Error {
    io::Error::other(format!("another file has got the name {} meanwhile: that one stays", place.display()))
}

/// The private folder, if it is the one that was made: only this user can change it.
fn own(folder: impl AsFd, name: &str) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let fd = openat(folder, name, flags, Mode::empty())?;
    match another_user_can_change(&fd)? {
        true => Err(io::ErrorKind::PermissionDenied.into()),
        false => Ok(fd),
    }
}

fn another_user_can_change(folder: impl AsFd) -> io::Result<bool> {
    let stat = fstat(folder)?;
    Ok(stat.st_uid != geteuid().as_raw() || stat.st_mode & 0o022 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::folder::Folder;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_the_file_that_was_meant_goes() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let folder = Folder::open(&root).unwrap();
        for mode in [0o755, 0o777] {
            fs::set_permissions(&root, fs::Permissions::from_mode(mode)).unwrap();
            for name in ["a", "b"] {
                fs::write(root.join(name), name).unwrap();
            }
            let (a, b) = (folder.entry("a"), folder.entry("b"));
            let (ia, ib) = (a.id().unwrap().unwrap(), b.id().unwrap().unwrap());
            assert!(file(&a, ib).is_err());
            file(&a, ia).unwrap();
            assert_eq!(file(&a, ia).unwrap_err().kind(), io::ErrorKind::NotFound);
            assert_eq!(folder.names().unwrap(), ["b"]);
            // What was moved and is another file gets its name back.
            fs::create_dir(root.join("p")).unwrap();
            let inside = Folder::open(root.join("p")).unwrap();
            fs::rename(root.join("b"), root.join("p").join(NAME)).unwrap();
            assert!(remove_moved(&b, &inside.duplicate().unwrap(), ia).is_err());
            assert_eq!(fs::read(root.join("b")).unwrap(), b"b");
            fs::remove_dir(root.join("p")).unwrap();
        }
    }
}

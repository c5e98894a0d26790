//! The identity of a file: equal for all its names, and of no two files at a time.

use std::fs::{self, Metadata};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::fcntl::AtFlags;
use nix::sys::stat::{FileStat, fstat, fstatat};
use serde::{Deserialize, Serialize};

/// Device and inode number. In messages and records `[dev, ino]`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(from = "(u64, u64)", into = "(u64, u64)")]
pub struct FileId {
    pub dev: u64,
    pub ino: u64,
}

impl FileId {
    /// Of an open file, O_PATH included.
    pub fn of(fd: impl AsFd) -> io::Result<FileId> {
        Ok(fstat(fd)?.into())
    }

    /// Of the file that a path leads to.
    pub fn at(path: &Path) -> io::Result<FileId> {
        fs::metadata(path).map(|m| FileId::from(&m))
    }

    /// Of what has this name in an open folder, a symbolic link included; none: nothing has.
    pub fn in_folder(folder: impl AsFd, name: &Path) -> io::Result<Option<FileId>> {
        match fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat.into())),
            Err(nix::Error::ENOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Of what has this name, a symbolic link included.
    pub fn at_nofollow(path: &Path) -> io::Result<FileId> {
        fs::symlink_metadata(path).map(|m| FileId::from(&m))
    }
}

impl From<&Metadata> for FileId {
    fn from(m: &Metadata) -> FileId {
        FileId { dev: m.dev(), ino: m.ino() }
    }
}

impl From<FileStat> for FileId {
    fn from(stat: FileStat) -> FileId {
        FileId { dev: stat.st_dev, ino: stat.st_ino }
    }
}

impl From<(u64, u64)> for FileId {
    fn from((dev, ino): (u64, u64)) -> FileId {
        FileId { dev, ino }
    }
}

impl From<FileId> for (u64, u64) {
    fn from(id: FileId) -> (u64, u64) {
        (id.dev, id.ino)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ways_to_a_file_agree() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&path, "x").unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let id = FileId::at(&path).unwrap();
        assert_eq!(FileId::of(fs::File::open(&link).unwrap()).unwrap(), id);
        assert_eq!((FileId::at(&link).unwrap(), FileId::at_nofollow(&path).unwrap()), (id, id));
        assert_ne!(FileId::at_nofollow(&link).unwrap(), id);
        let folder = fs::File::open(dir.path()).unwrap();
        assert_eq!(FileId::in_folder(&folder, Path::new("a")).unwrap(), Some(id));
        assert_eq!(FileId::in_folder(&folder, Path::new("b")).unwrap(), FileId::at_nofollow(&link).ok());
        assert_eq!(FileId::in_folder(&folder, Path::new("c")).unwrap(), None);
    }

    #[test]
    fn in_messages_it_is_a_pair() {
        let id = FileId { dev: 7, ino: u64::MAX };
        let text = serde_json::to_string(&id).unwrap();
        assert_eq!(text, "[7,18446744073709551615]");
        assert_eq!(serde_json::from_str::<FileId>(&text).unwrap(), id);
    }
}

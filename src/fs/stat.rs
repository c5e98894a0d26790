//! How full the inner file system is, and the cache file of these numbers beside the image.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::sys::statvfs::statvfs;

use crate::error::{IoContext, Kind, Result};
use crate::sys::folder::Folder;
use crate::sys::store;

/// Name of the cache file, in the folder of the image.
pub const FILE: &str = ".statfs";

/// Size and use of a file system; blocks of `block_size` bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FsInfo {
    pub block_size: u64,
    pub blocks: u64,
    pub free_blocks: u64,
    pub inodes: u64,
    pub free_inodes: u64,
}

impl FsInfo {
    /// Of the file system mounted at `mount_point`.
    pub fn of(mount_point: &Path) -> Result<FsInfo> {
        let s = statvfs(mount_point).ctx(Kind::Fstat, || format!("statfs of {}", mount_point.display()))?;
        Ok(FsInfo {
            block_size: s.fragment_size(),
            blocks: s.blocks(),
            free_blocks: s.blocks_free(),
            inodes: s.files(),
            free_inodes: s.files_free(),
        })
    }

    fn to_bytes(self) -> [u8; 40] {
        let mut bytes = [0; 40];
        let numbers = [self.block_size, self.blocks, self.free_blocks, self.inodes, self.free_inodes];
        for (place, n) in bytes.chunks_exact_mut(8).zip(numbers) {
            place.copy_from_slice(&n.to_ne_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: &[u8; 40]) -> FsInfo {
        let n = |i: usize| {
            let mut number = [0; 8];
            number.copy_from_slice(&bytes[8 * i..8 * i + 8]);
            u64::from_ne_bytes(number)
        };
        FsInfo { block_size: n(0), blocks: n(1), free_blocks: n(2), inodes: n(3), free_inodes: n(4) }
    }

    /// What is cached in `folder`; none if there is no such file or it is not exactly five numbers.
    pub fn cached(folder: &Path) -> Option<FsInfo> {
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK)
            .open(folder.join(FILE))
            .ok()?;
        let meta = file.metadata().ok()?;
        let mut bytes = [0; 40];
        if !meta.is_file() || meta.len() != 40 || file.read_exact(&mut bytes).is_err() {
            return None;
        }
        Some(FsInfo::from_bytes(&bytes))
    }

    /// Replaces the cache in `folder`.
    pub fn store(self, folder: &Folder) -> io::Result<()> {
        let (place, tmp) = (folder.entry(FILE), folder.entry(format!("{FILE}.tmp")));
        let _ = store::unlink(&tmp);
        let file = store::create_new(&tmp, 0o600)?;
        let written = store::write_all(&file, &self.to_bytes(), 0).and_then(|()| store::rename(&tmp, &place));
        if written.is_err() {
            let _ = store::unlink(&tmp);
        }
        written
    }
}

/// Removes the cache in `folder`: its numbers are not valid any more.
pub fn drop_cache(folder: &Folder) -> io::Result<()> {
    match store::unlink(&folder.entry(FILE)) {
        // On a read-only file system neither the cache nor the disk changes.
        Err(e) if !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ReadOnlyFilesystem) => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn cache_is_five_native_numbers() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(FsInfo::cached(dir.path()), None);
        let info = FsInfo { block_size: 4096, blocks: 1000, free_blocks: 7, inodes: 64, free_inodes: 53 };
        let folder = Folder::open(dir.path().canonicalize().unwrap()).unwrap();
        info.store(&folder).unwrap();
        let bytes = fs::read(dir.path().join(FILE)).unwrap();
        assert_eq!(bytes.len(), 40);
        assert_eq!(bytes[8..16], 1000u64.to_ne_bytes());
        assert_eq!(FsInfo::cached(dir.path()), Some(info));
        fs::write(dir.path().join(FILE), [0; 39]).unwrap();
        assert_eq!(FsInfo::cached(dir.path()), None);
        drop_cache(&folder).unwrap();
        drop_cache(&folder).unwrap();
    }
}

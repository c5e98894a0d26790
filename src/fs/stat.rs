//! How full the inner file system is, and the cache file of these numbers beside the image.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::sys::statvfs::statvfs;

use crate::error::{IoContext, Kind, Result};

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
    pub fn store(self, folder: &Path) -> io::Result<()> {
        let tmp = folder.join(format!("{FILE}.tmp"));
        let _ = fs::remove_file(&tmp);
        let mut file: File = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&tmp)?;
        let written = file.write_all(&self.to_bytes()).and_then(|()| fs::rename(&tmp, folder.join(FILE)));
        if written.is_err() {
            let _ = fs::remove_file(&tmp);
        }
        written
    }
}

/// Removes the cache in `folder`: its numbers are not valid any more.
pub fn drop_cache(folder: &Path) -> io::Result<()> {
    match fs::remove_file(folder.join(FILE)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_is_five_native_numbers() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(FsInfo::cached(dir.path()), None);
        let info = FsInfo { block_size: 4096, blocks: 1000, free_blocks: 7, inodes: 64, free_inodes: 53 };
        info.store(dir.path()).unwrap();
        let bytes = fs::read(dir.path().join(FILE)).unwrap();
        assert_eq!(bytes.len(), 40);
        assert_eq!(bytes[8..16], 1000u64.to_ne_bytes());
        assert_eq!(FsInfo::cached(dir.path()), Some(info));
        fs::write(dir.path().join(FILE), [0; 39]).unwrap();
        assert_eq!(FsInfo::cached(dir.path()), None);
        drop_cache(dir.path()).unwrap();
        drop_cache(dir.path()).unwrap();
    }
}

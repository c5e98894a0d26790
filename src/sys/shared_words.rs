//! 64-bit words in memory shared with other processes: by a memfd, or by a file that outlives them.

use std::ffi::CStr;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::ops::Deref;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::AtomicU64;

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs};

use super::host;

/// A mapping of such memory as atomic words; unmapped when dropped.
#[derive(Debug)]
pub struct SharedWords {
    map: MmapRaw,
    count: usize,
}

/// Makes a memfd of `count` zero words that can neither shrink nor grow any more.
pub fn create(name: &CStr, count: usize) -> io::Result<OwnedFd> {
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    nix::unistd::ftruncate(&fd, (count * 8) as i64)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(fd)
}

/// Makes a file of `count` zero words that only its owner can open, with all its space taken: no store to its mapping can
/// fail. An error where the file system could refuse a store later on.
pub fn create_file(path: &Path, count: usize) -> io::Result<OwnedFd> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(OWNERS).custom_flags(libc::O_NOFOLLOW);
    let mut file = options.open(path)?;
    let filled = match keeps_space(&file) {
        true => fallocate(&file, FallocateFlags::empty(), 0, (count * 8) as i64)
            .map_err(io::Error::from)
            .and_then(|()| file.write_all(&vec![0; count * 8])),
        false => Err(io::Error::other("its file system may refuse to keep what is stored: tmpfs, ext4 or XFS wanted")),
    };
    match filled {
        Ok(()) => Ok(file.into()),
        Err(e) => {
            let _ = std::fs::remove_file(path);
            Err(e)
        }
    }
}

/// Opens a file that [`create_file`] made with the same count. An error: it is none.
pub fn open_file(path: &Path, count: usize) -> io::Result<OwnedFd> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
    let meta = file.metadata()?;
    if !is_owners(&meta) || meta.nlink() != 1 || meta.len() != (count * 8) as u64 || !keeps_space(&file) {
        return Err(io::Error::other(format!(
            "a file of {} bytes, owner {}, mode {:o}, {} names: {} bytes of the user {}, mode {OWNERS:o}, one name wanted",
            meta.len(),
            meta.uid(),
            meta.mode() & 0o7777,
            meta.nlink(),
            count * 8,
            nix::unistd::geteuid(),
        )));
    }
    // Space that is missing, in a file that was not made here, must show now.
    loop {
        match fallocate(&file, FallocateFlags::empty(), 0, (count * 8) as i64) {
            // A signal of the calling program.
            Err(nix::errno::Errno::EINTR) => {}
            other => break other?,
        }
    }
    Ok(file.into())
}

/// The permissions of a file of words.
const OWNERS: u32 = 0o600;

fn is_owners(meta: &Metadata) -> bool {
    meta.is_file() && meta.uid() == nix::unistd::geteuid().as_raw() && meta.mode() & 0o7777 == OWNERS
}

/// Whether stores to space that was allocated once need no more of it.
fn keeps_space(file: &File) -> bool {
    let known = [TMPFS_MAGIC, EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC];
    host::is_simulated() || fstatfs(file).is_ok_and(|s| known.contains(&s.filesystem_type()))
}

impl SharedWords {
    /// Maps what [`create`], [`create_file`] or [`open_file`] gave with the same count.
    pub fn map(fd: BorrowedFd, count: usize) -> io::Result<SharedWords> {
        let wanted = (count * 8) as u64;
        let meta = File::from(fd.try_clone_to_owned()?).metadata()?;
        let found = meta.len();
        let seals = fcntl(fd, FcntlArg::F_GET_SEALS).unwrap_or(0);
        let kept = seals & SealFlag::F_SEAL_SHRINK.bits() != 0 || is_owners(&meta);
        if found != wanted || !kept {
            return Err(io::Error::other(format!(
                "shared memory of {found} bytes with seals {seals:#x}: {wanted} bytes, sealed against shrinking, or in a \
                 file of its own, wanted"
            )));
        }
        // No program shortens it: a memfd is sealed, a file belongs to root alone.
        Ok(SharedWords { map: MmapOptions::new().len(count * 8).populate().map_raw(&fd)?, count })
    }
}

impl Deref for SharedWords {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has `count` words, is page-aligned and lives as long as `self`; every process that has it
        // mapped changes it by whole atomic words only.
        unsafe { std::slice::from_raw_parts(self.map.as_mut_ptr().cast::<AtomicU64>(), self.count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::sync::atomic::Ordering::SeqCst;

    #[test]
    fn two_mappings_see_one_memory() {
        let fd = create(c"test", 1024).unwrap();
        let a = SharedWords::map(fd.as_fd(), 1024).unwrap();
        let b = SharedWords::map(fd.as_fd(), 1024).unwrap();
        a[1023].store(42, SeqCst);
        assert_eq!(b[1023].load(SeqCst), 42);
        assert!(SharedWords::map(fd.as_fd(), 1025).is_err());
        assert!(nix::unistd::ftruncate(&fd, 10).is_err());
    }

    #[test]
    fn a_file_of_words_is_its_makers_alone() {
        use std::fs::{self, Permissions};
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("words");
        let Ok(fd) = create_file(&path, 1024) else {
            crate::testing::skip::skip("the file system of the project is none that keeps space");
            return;
        };
        SharedWords::map(fd.as_fd(), 1024).unwrap()[1023].store(42, SeqCst);
        drop(fd);
        assert_eq!(create_file(&path, 1024).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        let fd = open_file(&path, 1024).unwrap();
        assert_eq!(SharedWords::map(fd.as_fd(), 1024).unwrap()[1023].load(SeqCst), 42);
        assert!(open_file(&path, 1023).is_err());
        fs::hard_link(&path, dir.path().join("other")).unwrap();
        assert!(open_file(&path, 1024).is_err(), "it has two names");
        fs::remove_file(dir.path().join("other")).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        assert!(open_file(&path, 1024).is_err(), "every user can read it");
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert!(open_file(&path, 1024).is_err(), "a link");
    }
}

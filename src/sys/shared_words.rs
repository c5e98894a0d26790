//! 64-bit words in memory shared with other processes by a memfd.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU64;

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// A mapping of a memfd as atomic words; unmapped when dropped.
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

impl SharedWords {
    /// Maps a memfd made by [`create`] with the same count.
    pub fn map(fd: BorrowedFd, count: usize) -> io::Result<SharedWords> {
        let wanted = (count * 8) as u64;
        let found = File::from(fd.try_clone_to_owned()?).metadata()?.len();
        let seals = fcntl(fd, FcntlArg::F_GET_SEALS)?;
        if found != wanted || seals & SealFlag::F_SEAL_SHRINK.bits() == 0 {
            return Err(io::Error::other(format!(
                "shared memory of {found} bytes with seals {seals:#x}: {wanted} bytes, sealed against shrinking, wanted"
            )));
        }
        // The file is sealed and long enough, so that no access can meet its end.
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
}

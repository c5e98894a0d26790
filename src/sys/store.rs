//! The steps by which files change, in one place: each takes effect whole or not, and tests can record every one of
//! them, let one fail, and make up what a crash leaves.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, renameat, renameat2};

#[cfg(test)]
pub mod record;

/// A step, for the watcher.
#[cfg_attr(not(test), allow(dead_code))]
#[derive(Clone, Copy)]
enum Step<'a> {
    Create(&'a Path),
    Write(&'a File, &'a [u8], u64),
    Zero(&'a File, u64, u64),
    /// What is written at this offset came from another file.
    Share(&'a File, u64, u64),
    SetLen(&'a File, u64),
    /// Longer if it is shorter.
    Extend(&'a File, u64),
    Sync(&'a File),
    Rename(&'a Path, &'a Path),
    Unlink(&'a Path),
    SyncDir(&'a Path),
}

#[cfg(test)]
impl Step<'_> {
    fn name(&self) -> &'static str {
        match self {
            Step::Create(_) => "create a file",
            Step::Write(..) => "write",
            Step::Zero(..) => "zero",
            Step::Share(..) => "share",
            Step::SetLen(..) => "set a file's length",
            Step::Extend(..) => "extend a file",
            Step::Sync(_) => "sync a file",
            Step::Rename(..) => "rename a file",
            Step::Unlink(_) => "unlink a file",
            Step::SyncDir(_) => "sync a folder",
        }
    }
}

/// Does it, watched.
#[cfg(test)]
fn step<T>(step: Step<'_>, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    record::watched(step, act)
}

#[cfg(not(test))]
#[inline(always)]
fn step<T>(_: Step<'_>, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    act()
}

/// Makes a file exclusively, open for reading and writing; no link is followed.
pub fn create_new(path: &Path, mode: u32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(mode).custom_flags(libc::O_NOFOLLOW);
    step(Step::Create(path), || options.open(path))
}

/// Writes all.
pub fn write_all(file: &File, buf: &[u8], offset: u64) -> io::Result<()> {
    step(Step::Write(file, buf, offset), || file.write_all_at(buf, offset))
}

pub fn sync_all(file: &File) -> io::Result<()> {
    step(Step::Sync(file), || file.sync_all())
}

pub fn sync_data(file: &File) -> io::Result<()> {
    step(Step::Sync(file), || file.sync_data())
}

pub fn set_len(file: &File, len: u64) -> io::Result<()> {
    step(Step::SetLen(file, len), || file.set_len(len))
}

fn allocate(file: &File, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
    let too_large = |_| io::Error::from(io::ErrorKind::FileTooLarge);
    let (offset, len) = (i64::try_from(offset).map_err(too_large)?, i64::try_from(len).map_err(too_large)?);
    Ok(nix::fcntl::fallocate(file, flags, offset, len)?)
}

/// Takes space for a part of the file, which gets longer if it must; what is new reads as zero.
pub fn fallocate(file: &File, offset: u64, len: u64) -> io::Result<()> {
    step(Step::Extend(file, offset + len), || allocate(file, FallocateFlags::empty(), offset, len))
}

/// Makes the first bytes of the file, up to `len`, such that rewriting them takes no space: holes get blocks, and blocks
/// that the file shares with others are copied. Length and content stay. The only errors are those of missing space;
/// where a file system cannot do it, or allocates for each write anew, nothing has changed.
pub fn reserve(file: &File, len: u64) -> io::Result<()> {
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let unshared = allocate(file, keep | FallocateFlags::FALLOC_FL_UNSHARE_RANGE, 0, len);
    let reserved = match unshared {
        Err(e) if !lacks_space(&e) => allocate(file, keep, 0, len),
        other => other,
    };
    reserved.or_else(|e| if lacks_space(&e) { Err(e) } else { Ok(()) })
}

/// ENOSPC, or EDQUOT: a quota that is used up is a file system that is full.
pub fn lacks_space(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Makes a part of the file read as zero, with its space taken.
pub fn zero_range(file: &File, offset: u64, len: u64) -> io::Result<()> {
    step(Step::Zero(file, offset, len), || allocate(file, FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, len))
}

/// Shares the content of a part of `from` with `to` (FICLONERANGE). Offsets and length are multiples of the file
/// system's block. Errors of [`cannot_clone`] mean that the file systems do not do that.
pub fn clone_range(from: &File, from_offset: u64, to: &File, to_offset: u64, len: u64) -> io::Result<()> {
    #[repr(C)]
    struct Range {
        from: i64,
        from_offset: u64,
        len: u64,
        to_offset: u64,
    }
    /// `_IOW(0x94, 13, struct file_clone_range)`, whose size is 32 bytes.
    const FICLONERANGE: libc::c_ulong = 0x4020_940D;
    let range = Range { from: i64::from(from.as_raw_fd()), from_offset, len, to_offset };
    step(Step::Share(to, to_offset, len), || {
        loop {
            // SAFETY: `range` is a struct file_clone_range and lives through the call; both descriptors are open.
            if unsafe { libc::ioctl(to.as_raw_fd(), FICLONERANGE as _, &range) } == 0 {
                return Ok(());
            }
            let e = io::Error::last_os_error();
            if e.kind() != io::ErrorKind::Interrupted {
                return Err(e);
            }
        }
    })
}

/// Whether this error of [`clone_range`] says "not with these files".
pub fn cannot_clone(e: &io::Error) -> bool {
    const NOT_HERE: [i32; 6] = [libc::EOPNOTSUPP, libc::ENOTTY, libc::EXDEV, libc::EINVAL, libc::ENOSYS, libc::EPERM];
    e.raw_os_error().is_some_and(|n| NOT_HERE.contains(&n))
}

pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    step(Step::Rename(from, to), || std::fs::rename(from, to))
}

/// Renames a file of a folder within it.
pub fn rename_in(folder: &OwnedFd, from: &Path, to: &Path) -> io::Result<()> {
    let rename = || Ok(renameat(folder, from, folder, to)?);
    #[cfg(test)]
    {
        let dir = record::path_of(folder);
        step(Step::Rename(&dir.join(from), &dir.join(to)), rename)
    }
    #[cfg(not(test))]
    rename()
}

/// Renames without replacing: a target that exists is `AlreadyExists`.
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    step(Step::Rename(from, to), || match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        // File systems without the flag: a link never replaces either.
        Err(Errno::EINVAL | Errno::ENOSYS) => std::fs::hard_link(from, to).and_then(|()| std::fs::remove_file(from)),
        other => other.map_err(io::Error::from),
    })
}

pub fn unlink(path: &Path) -> io::Result<()> {
    step(Step::Unlink(path), || std::fs::remove_file(path))
}

/// Makes what was made, renamed and removed in a folder durable.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    step(Step::SyncDir(dir), || File::open(dir)?.sync_all())
}

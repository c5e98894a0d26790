//! The steps by which files change, in one place: each takes effect whole or not, and tests can record every one of
//! them, let one fail, and make up what a crash leaves.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, FallocateFlags, OFlag, RenameFlags, openat, renameat, renameat2};
use nix::sys::stat::{Mode, SFlag, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

use super::file_id::FileId;
use super::folder::{Folder, Place};

#[cfg(test)]
pub mod record;
mod remove;

pub use remove::PRIVATE;

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
    Link(&'a Path, &'a Path),
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
            Step::Link(..) => "link a file",
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
pub fn create_new(place: &Place, mode: u32) -> io::Result<File> {
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mode = Mode::from_bits_truncate(mode);
    step(Step::Create(&shown(place)), || Ok(openat(place.folder.fd()?, place.name.as_os_str(), flags, mode)?.into()))
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

/// Makes a part of the file, before its end, a hole.
pub fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    step(Step::Zero(file, offset, len), || allocate(file, flags, offset, len))
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

pub fn rename(from: &Place, to: &Place) -> io::Result<()> {
    step(Step::Rename(&shown(from), &shown(to)), || {
        Ok(renameat(from.folder.fd()?, from.name.as_os_str(), to.folder.fd()?, to.name.as_os_str())?)
    })
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

/// Renames without replacing: a target that exists is `AlreadyExists`. Of a folder, where the file system has no such renames (NFS,
/// 9p, some FUSE), an empty folder that another process makes in this moment is replaced.
pub fn rename_new(from: &Place, to: &Place) -> io::Result<()> {
    step(Step::Rename(&shown(from), &shown(to)), || {
        let (old, new) = (from.folder.fd()?, to.folder.fd()?);
        let flags = RenameFlags::RENAME_NOREPLACE;
        match renameat2(old, from.name.as_os_str(), new, to.name.as_os_str(), flags) {
            // File systems without the flag.
            Err(Errno::EINVAL | Errno::ENOSYS) => rename_without_flag(from, to),
            other => other.map_err(io::Error::from),
        }
    })
}

fn rename_without_flag(from: &Place, to: &Place) -> io::Result<()> {
    let (old, new) = (from.folder.fd()?, to.folder.fd()?);
    let stat = fstatat(old, from.name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFDIR.bits() {
        // A link never replaces.
        link_at(from, to)?;
        return Ok(unlinkat(old, from.name.as_os_str(), UnlinkatFlags::NoRemoveDir)?);
    }
    if to.id()?.is_some() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    // The kernel replaces neither a file nor a folder that is not empty by a folder.
    match renameat(old, from.name.as_os_str(), new, to.name.as_os_str()) {
        Err(Errno::ENOTEMPTY | Errno::EEXIST | Errno::ENOTDIR) => Err(io::ErrorKind::AlreadyExists.into()),
        other => Ok(other?),
    }
}

/// Gives a file a second name; a name that is taken is `AlreadyExists`.
pub fn link(from: &Place, to: &Place) -> io::Result<()> {
    step(Step::Link(&shown(from), &shown(to)), || link_at(from, to))
}

fn link_at(from: &Place, to: &Place) -> io::Result<()> {
    let (old, new) = (from.folder.fd()?, to.folder.fd()?);
    Ok(linkat(old, from.name.as_os_str(), new, to.name.as_os_str(), AtFlags::empty())?)
}

/// Removes what has a name that only this program's operations use.
pub fn unlink(place: &Place) -> io::Result<()> {
    step(Step::Unlink(&shown(place)), || {
        Ok(unlinkat(place.folder.fd()?, place.name.as_os_str(), UnlinkatFlags::NoRemoveDir)?)
    })
}

/// Removes this very file: if another one has got the name, that one stays and the result is an error.
pub fn unlink_file(place: &Place, file: FileId) -> io::Result<()> {
    step(Step::Unlink(&shown(place)), || remove::file(place, file))
}

/// Makes a folder.
pub fn make_dir(place: &Place, mode: u32) -> io::Result<()> {
    Ok(mkdirat(place.folder.fd()?, place.name.as_os_str(), Mode::from_bits_truncate(mode))?)
}

/// Removes an empty folder.
pub fn remove_dir(place: &Place) -> io::Result<()> {
    Ok(unlinkat(place.folder.fd()?, place.name.as_os_str(), UnlinkatFlags::RemoveDir)?)
}

/// Makes what was made, renamed and removed in a folder durable.
pub fn sync_dir(folder: &Folder) -> io::Result<()> {
    sync_open_dir(folder.fd()?)
}

/// As [`sync_dir`], for an open folder; it may be O_PATH, which cannot be synced itself.
pub fn sync_open_dir(folder: impl AsFd) -> io::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let sync = || File::from(openat(&folder, ".", flags, Mode::empty())?).sync_all();
    #[cfg(test)]
    {
        let dir = record::path_of(&folder.as_fd());
        step(Step::SyncDir(&dir), sync)
    }
    #[cfg(not(test))]
    sync()
}

/// The path of a place, which tests record.
#[cfg(test)]
fn shown(place: &Place) -> Cow<'_, Path> {
    Cow::Owned(place.folder.fd().map(|fd| record::path_of(&fd).join(&place.name)).unwrap_or_default())
}

#[cfg(not(test))]
#[inline(always)]
fn shown(place: &Place) -> Cow<'_, Path> {
    Cow::Borrowed(Path::new(&place.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_not_replaced_on_file_systems_without_such_renames() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        let place = |name: &str| Folder::new(&path).entry(name);
        let taken = |from: &str, to: &str| {
            let e = rename_without_flag(&place(from), &place(to)).unwrap_err();
            assert_eq!(e.kind(), io::ErrorKind::AlreadyExists, "{from} {to}: {e}");
        };
        std::fs::create_dir(path.join("folder")).unwrap();
        std::fs::write(path.join("folder/inside"), "1").unwrap();
        std::fs::write(path.join("file"), "2").unwrap();
        std::fs::create_dir(path.join("full")).unwrap();
        std::fs::write(path.join("full/inside"), "3").unwrap();
        std::fs::create_dir(path.join("empty")).unwrap();
        for to in ["full", "empty", "file"] {
            taken("folder", to);
        }
        for to in ["full", "empty"] {
            taken("file", to);
        }
        rename_without_flag(&place("folder"), &place("new")).unwrap();
        rename_without_flag(&place("file"), &place("other")).unwrap();
        assert_eq!(std::fs::read_to_string(path.join("new/inside")).unwrap(), "1");
        assert_eq!(std::fs::read_to_string(path.join("other")).unwrap(), "2");
        assert!(!path.join("folder").exists() && !path.join("file").exists());
        assert_eq!(rename_without_flag(&place("gone"), &place("x")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}

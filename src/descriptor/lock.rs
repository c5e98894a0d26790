//! The lock that every operation on a disk takes.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{AtFlags, FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{AccessFlags, faccessat};

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::folder::Place;
use crate::sys::reopen::{Access, reopen};
use crate::sys::{file_lock, host};

use super::model::Descriptor;

/// Longest wait for a lock that another process holds.
const PATIENCE: Duration = Duration::from_secs(60);

/// Byte ranges of the base image that the newer line locks (offset, length). Any operation locks 200 to 204; this
/// program checks a byte of them that servers do not lock. Long operations lock 300 to 304.
const RANGE_ANY: (i64, i64) = (202, 1);
const RANGE_LONG: (i64, i64) = (300, 5);

/// A descriptor read under its lock; dropping it unlocks.
#[derive(Debug)]
pub struct LockedDescriptor {
    /// Resolved path of the file.
    pub path: PathBuf,
    /// Its name in its folder, which stays open.
    pub place: Place,
    pub descriptor: Descriptor,
    /// The lock file; it stays on disk.
    /// Only closing it releases the lock: a process that has a duplicate keeps the disk locked.
    /// None: there is none, since nothing can be written in that folder.
    lock: Option<File>,
}

impl LockedDescriptor {
    /// Locks a descriptor and reads it. Waits up to 60 s for other processes. Errors: 39 if the path cannot be
    /// resolved, else 23.
    pub fn open(path: &Path) -> Result<LockedDescriptor> {
        LockedDescriptor::open_within(path, PATIENCE)
    }

    /// As [`open`](Self::open) with another limit.
    pub fn open_within(path: &Path, patience: Duration) -> Result<LockedDescriptor> {
        LockedDescriptor::open_while(path, patience, &mut || true, lock_to_change)
    }

    /// As [`open`](Self::open), as long as `wait`, called while another process holds the lock, says that it is to wait.
    pub fn open_waiting(path: &Path, wait: &mut dyn FnMut() -> bool) -> Result<LockedDescriptor> {
        LockedDescriptor::open_while(path, PATIENCE, wait, lock_to_change)
    }

    /// As [`open`](Self::open), for operations that write nothing there: without a lock file where none can be made (a
    /// read-only file system, a folder that the caller may not change, no space).
    pub fn open_to_look(path: &Path) -> Result<LockedDescriptor> {
        LockedDescriptor::look_waiting(path, &mut || true)
    }

    /// As [`open_to_look`](Self::open_to_look), as long as `wait` says that it is to wait.
    pub fn look_waiting(path: &Path, wait: &mut dyn FnMut() -> bool) -> Result<LockedDescriptor> {
        LockedDescriptor::open_while(path, PATIENCE, wait, lock_to_look)
    }

    /// Nothing can be written beside the descriptor, so that not even a lock file was made.
    pub fn is_unlocked(&self) -> bool {
        self.lock.is_none()
    }

    fn open_while(
        path: &Path,
        patience: Duration,
        wait: &mut dyn FnMut() -> bool,
        take: Take,
    ) -> Result<LockedDescriptor> {
        let place = Descriptor::find(path)?;
        let path = place.path();
        // Checked first, so that no lock file is made beside a folder or a device.
        if place.regular().is_ok_and(|found| found.is_none()) {
            bail!(Lock, "descriptor {} is not a regular file", path.display());
        }
        // No lock file is made beside what is no descriptor. A descriptor is replaced by a rename, so it can be read unlocked.
        if !lock_path(&path).exists() {
            Descriptor::read(&path).map_err(|e| e.as_kind(Kind::Lock))?;
        }
        let until = host::now() + patience;
        let lock = take(&place, until, wait)?;
        let descriptor = Descriptor::read_at(&place).map_err(|e| e.as_kind(Kind::Lock))?;
        wait_for_ranges(&descriptor, until)?;
        Ok(LockedDescriptor { path, place, descriptor, lock })
    }

    /// Replaces the descriptor by `next`, on disk first. After an error the old one stays in memory; the file may be
    /// the old or the new one.
    pub fn commit_as(&mut self, mut next: Descriptor) -> Result<()> {
        self.taken()?;
        next.normalise_top()?;
        next.commit(&self.place)?;
        self.descriptor = next;
        Ok(())
    }

    fn taken(&self) -> Result<&File> {
        self.lock.as_ref().ok_or_else(|| {
            Error::new(
                Kind::Lock,
                format!("{} cannot be changed: no lock file can be made beside it", self.path.display()),
            )
        })
    }

    /// A duplicate of the open lock file, for a process that goes on with the operation if this process exits: the disk
    /// stays locked until that process has closed it, too.
    pub fn share_lock(&self) -> Result<OwnedFd> {
        let lock = self.taken()?.try_clone().ctx(Kind::Lock, || "cannot duplicate the lock")?;
        Ok(lock.into())
    }

    /// Stores the descriptor as it is in memory.
    pub fn commit(&self) -> Result<()> {
        self.taken()?;
        self.descriptor.commit(&self.place)
    }
}

impl std::ops::Deref for LockedDescriptor {
    type Target = Descriptor;

    fn deref(&self) -> &Descriptor {
        &self.descriptor
    }
}

impl std::ops::DerefMut for LockedDescriptor {
    fn deref_mut(&mut self) -> &mut Descriptor {
        &mut self.descriptor
    }
}

/// Suffix of the lock file's name.
const LOCK: &str = ".lck";

/// Path of a descriptor's lock file.
pub fn lock_path(descriptor: &Path) -> PathBuf {
    let mut name: OsString = descriptor.into();
    name.push(LOCK);
    name.into()
}

/// How the lock file is opened and locked: until then, as long as the last one says that it is to wait.
type Take = fn(&Place, Instant, &mut dyn FnMut() -> bool) -> Result<Option<File>>;

const MADE: OFlag = OFlag::O_RDWR.union(OFlag::O_CREAT).union(OFlag::O_NONBLOCK);

fn lock_to_change(descriptor: &Place, until: Instant, wait: &mut dyn FnMut() -> bool) -> Result<Option<File>> {
    let name = descriptor.suffixed(LOCK);
    let file = name.open(MADE).ctx(Kind::Lock, || format!("cannot open lock file {}", name.display()))?;
    locked(file.into(), &name, until, wait).map(Some)
}

/// The lock file, made, or opened as it is; none where it is not there and cannot be made.
fn lock_to_look(descriptor: &Place, until: Instant, wait: &mut dyn FnMut() -> bool) -> Result<Option<File>> {
    let name = descriptor.suffixed(LOCK);
    let refused = match name.open(MADE) {
        Ok(file) => return locked(file.into(), &name, until, wait).map(Some),
        Err(e) => e,
    };
    let nothing_can_be_made = match refused.raw_os_error() {
        Some(libc::EROFS | libc::ENOSPC | libc::EDQUOT) => true,
        // Where the caller may write in the folder the operation has to exclude other ones.
        Some(libc::EACCES | libc::EPERM) => {
            let folder = descriptor.folder.fd().ctx(Kind::Lock, || descriptor.folder.display().to_string())?;
            let flags = AtFlags::AT_EACCESS;
            faccessat(folder, ".", AccessFlags::W_OK, flags).is_err()
        }
        _ => false,
    };
    if nothing_can_be_made {
        match name.open(OFlag::O_RDONLY | OFlag::O_NONBLOCK) {
            Ok(file) => return locked(file.into(), &name, until, wait).map(Some),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EACCES)) => return Ok(None),
            Err(_) => {}
        }
    }
    Err(Error::with(Kind::Lock, format!("cannot open lock file {}", name.display()), refused))
}

/// Waits for the lock of an open lock file.
fn locked(file: File, name: &Place, until: Instant, wait: &mut dyn FnMut() -> bool) -> Result<File> {
    let mut pause = Duration::from_millis(5);
    loop {
        match file_lock::exclusive(&file, false) {
            Ok(()) => return Ok(file),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(Error::with(Kind::Lock, format!("cannot lock {}", name.display()), e)),
        }
        let left = until.saturating_duration_since(host::now());
        if left.is_zero() || !wait() {
            bail!(Lock, "{} is locked: another operation on this disk is running; try again later", name.display());
        }
        host::sleep(pause.min(left));
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// Waits for programs of the newer line (and qemu), which lock byte ranges of the base image instead of a lock file.
fn wait_for_ranges(descriptor: &Descriptor, until: Instant) -> Result<()> {
    let Ok(base) = descriptor.first_image() else { return Ok(()) };
    // The operation reports a missing image if it needs it.
    let Some(file) = open_quietly(&base.file) else { return Ok(()) };
    if held(&file, RANGE_LONG) {
        bail!(
            Lock,
            "image {} is locked (bytes 300 to 304): a long operation of another program is running on it",
            base.file.display()
        );
    }
    while held(&file, RANGE_ANY) {
        let left = until.saturating_duration_since(host::now());
        if left.is_zero() {
            bail!(Lock, "image {} is locked (bytes 200 to 204) by another program", base.file.display());
        }
        host::sleep(left.min(Duration::from_secs(1)));
    }
    Ok(())
}

/// Whether another process holds a lock on the range.
fn held(file: &File, (start, len): (i64, i64)) -> bool {
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    if fcntl(file, FcntlArg::F_GETLK(&mut lock)).is_err() || lock.l_type == libc::F_UNLCK as i16 {
        return false;
    }
    // Open file description locks are those of a worker or of qemu; a mount checks them itself.
    lock.l_pid != -1
}

/// Opens a regular file only to check its locks: its content is not read.
fn open_quietly(path: &Path) -> Option<File> {
    let fd = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW, Mode::empty()).ok()?;
    let kind = SFlag::from_bits_truncate(fstat(&fd).ok()?.st_mode & SFlag::S_IFMT.bits());
    if kind != SFlag::S_IFREG {
        return None;
    }
    reopen(&fd, Access::default()).ok().map(|(file, _)| file)
}

//! The files of a chain, opened by the worker itself and locked.
//!
//! A description of its own matters: I/O of a worker lands for seconds after its exit, and a lock on a description
//! falls only when the last of it is over. A successor waits for that lock, the barrier. So these descriptors are
//! close-on-exec and never passed to another process. The locks that keep other programs away are on the descriptions
//! that came from the supervisor: see [`exclusion`].
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::bail;
use crate::chain::LevelFile;
use crate::error::{Error, IoContext, Kind, Result};
use crate::image::lock;
use crate::server::exclusion;
use crate::server::proto::LevelName;
use crate::sys::aligned::AlignedBuf;
use crate::sys::statx::direct_align;

/// Direct I/O must allow sectors: the device has blocks of so many bytes.
const SECTOR: u32 = 512;

/// Opens every level (given by descriptors of any kind, base first) anew: the top of a writable chain for writing, the rest
/// for reading only and without changing times; with direct I/O where file and device below take single sectors.
pub fn open(paths: &[OwnedFd], names: &[LevelName], writable: bool) -> Result<Vec<LevelFile>> {
    if paths.len() != names.len() || paths.is_empty() {
        bail!(Protocol, "{} descriptors came for {} images: as many wanted", paths.len(), names.len());
    }
    let top = paths.len() - 1;
    paths.iter().zip(names).enumerate().map(|(i, (path, name))| open_one(path, name, writable && i == top)).collect()
}

fn open_one(path: &OwnedFd, name: &LevelName, writable: bool) -> Result<LevelFile> {
    let open = |flags: i32| {
        let mut options = OpenOptions::new();
        options.read(true).write(writable);
        let path = format!("/proc/self/fd/{}", path.as_raw_fd());
        if writable {
            return options.custom_flags(flags).open(path);
        }
        match options.custom_flags(flags | libc::O_NOATIME).open(&path) {
            // Only for the owner of the file.
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => options.custom_flags(flags).open(&path),
            other => other,
        }
    };
    let (file, direct) = match open(libc::O_DIRECT) {
        Ok(file) if takes_sectors(&file) => (file, true),
        Ok(_) => (open(0).ctx(Kind::Open, || cannot_open(name))?, false),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => (open(0).ctx(Kind::Open, || cannot_open(name))?, false),
        Err(e) => return Err(Error::with(Kind::Open, cannot_open(name), e)),
    };
    Ok(LevelFile { file, name: name.path.clone(), raw: name.raw, direct })
}

fn cannot_open(name: &LevelName) -> String {
    format!("cannot open {}", name.path.display())
}

/// Whether direct I/O on the file takes single sectors in memory aligned to sectors.
fn takes_sectors(file: &File) -> bool {
    match direct_align(file) {
        Ok(Some(align)) => (1..=SECTOR).contains(&align.offset) && (1..=SECTOR).contains(&align.memory),
        // The kernel does not tell: try. An alignment of 4096 is refused here.
        _ => {
            let mut buf = AlignedBuf::new(2 * SECTOR as usize);
            let fine = |offset| {
                use std::os::unix::fs::FileExt;
                file.read_at(&mut buf[..SECTOR as usize], offset).is_ok()
            };
            [0, u64::from(SECTOR)].into_iter().all(fine)
        }
    }
}

/// Opens a level for writing, too: the target of a merge, which no other process may use. `wait`: until the last
/// operation of a former worker is over.
pub fn open_target(fd: &OwnedFd, name: &LevelName, wait: bool) -> Result<LevelFile> {
    let level = open_one(fd, name, true)?;
    let busy = || {
        let shown = level.name.display();
        Error::new(
            Kind::Busy,
            format!("image {shown} is to take what is merged, and another process uses it; unmount that first"),
        )
    };
    let locked = lock_written(&level, fd, wait)
        .map_err(|e| if e.kind() == Kind::InUse { busy() } else { e })
        .and_then(|()| lock::lock_exclusive(holder(&level, fd)).map_err(|_| busy()));
    locked.inspect_err(|_| release(fd))?;
    Ok(level)
}

/// Locks the files: the writable top exclusively, what is only read together with other readers. At a takeover this
/// waits until the last operation of the former worker is over; otherwise a lock that another process holds is an
/// error. `fds`: by which the supervisor has them. `except`: a level that is locked already, or that another process
/// writes to. `finish`: a former top, which stays locked for writing until it is finished. Each other level that is not
/// the top is a reader's, also if a change of the chain that failed has locked it for writing.
pub fn lock(
    levels: &[LevelFile],
    fds: &[OwnedFd],
    writable: bool,
    takeover: bool,
    except: Option<usize>,
    finish: Option<usize>,
) -> Result<()> {
    for (i, (level, fd)) in levels.iter().zip(fds).enumerate().filter(|(i, _)| Some(*i) != except) {
        if writable && i + 1 == levels.len() {
            lock_written(level, fd, takeover)?;
            lock::lock_write(holder(level, fd)).map_err(|_| in_use(level))?;
        } else if exclusion::is_shared(fd) && finish != Some(i) {
            exclusion::release_write(fd).map_err(|_| in_use(level))?;
        } else {
            lock::lock_read(holder(level, fd)).map_err(|_| in_use(level))?;
        }
    }
    Ok(())
}

/// Locks a level that this process also reads, for writing, until [`release`].
pub fn lock_exclusive(level: &LevelFile, fd: &OwnedFd) -> Result<()> {
    lock_written(level, fd, false)
}

/// The level is only read from here on.
pub fn release(fd: &OwnedFd) {
    if exclusion::is_shared(fd) {
        // An error leaves it locked against programs that would be harmless.
        let _ = exclusion::release_write(fd);
    }
}

/// The description that has the locks against other programs.
fn holder<'a>(level: &'a LevelFile, fd: &'a OwnedFd) -> BorrowedFd<'a> {
    if exclusion::is_shared(fd) { fd.as_fd() } else { level.file.as_fd() }
}

/// The barrier, and the flock; where the supervisor's description has no locks one is both.
fn lock_written(level: &LevelFile, fd: &OwnedFd, takeover: bool) -> Result<()> {
    let mut taken = exclusion::take_flock(holder(level, fd), takeover);
    if exclusion::is_shared(fd) {
        taken = taken
            .and_then(|()| exclusion::take_barrier(&level.file, takeover))
            .and_then(|()| exclusion::exclude_whole_file_locks(fd));
    }
    match taken {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(in_use(level)),
        Err(e) => Err(Error::with(
            Kind::Mount,
            format!(
                "cannot lock {}; the file system must support flock and byte-range locks for writing",
                level.name.display()
            ),
            e,
        )),
    }
}

fn in_use(level: &LevelFile) -> Error {
    Error::new(
        Kind::InUse,
        format!(
            "image {} is in use by another device or program; unmount that first (ploop list)",
            level.name.display()
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::lock::{Sharing, lock_image};
    use crate::image::open::Access;
    use std::thread::sleep;
    use std::time::Duration;

    /// As a supervisor has the image: with an exclusion, or without as one of an earlier version.
    fn image(dir: &tempfile::TempDir, shared: bool, writable: bool) -> OwnedFd {
        let path = dir.path().join("image");
        if !path.exists() {
            std::fs::write(&path, [7; 8192]).unwrap();
        }
        let fd: OwnedFd = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path).unwrap().into();
        if shared { exclusion::open(fd, writable) } else { fd }
    }

    /// What a worker opens.
    fn level(dir: &tempfile::TempDir, fd: &OwnedFd, writable: bool) -> [LevelFile; 1] {
        [open(std::slice::from_ref(fd), &[name(dir)], writable).unwrap().remove(0)]
    }

    fn name(dir: &tempfile::TempDir) -> LevelName {
        LevelName { path: dir.path().join("image"), raw: true }
    }

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap()
    }

    fn locked(level: &[LevelFile; 1], fd: &OwnedFd, writable: bool, takeover: bool) -> Result<()> {
        lock(level, std::slice::from_ref(fd), writable, takeover, None, None)
    }

    #[test]
    fn a_writer_is_alone() {
        for shared in [false, true] {
            let dir = folder();
            let of = |writable| {
                let fd = image(&dir, shared, writable);
                (level(&dir, &fd, writable), fd)
            };
            let first = of(true);
            locked(&first.0, &first.1, true, false).unwrap();
            let second = of(true);
            assert_eq!(locked(&second.0, &second.1, true, false).unwrap_err().kind(), Kind::InUse);
            let reader = of(false);
            assert_eq!(locked(&reader.0, &reader.1, false, false).unwrap_err().kind(), Kind::InUse);
            drop(first);
            locked(&reader.0, &reader.1, false, false).unwrap();
            let other = of(false);
            locked(&other.0, &other.1, false, false).unwrap();
            assert_eq!(locked(&second.0, &second.1, true, false).unwrap_err().kind(), Kind::InUse);
        }
    }

    #[test]
    fn a_successor_waits_for_the_lock() {
        // Also where the worker before had its locks on its own description.
        for (before, after) in [(false, false), (true, true), (false, true)] {
            let dir = folder();
            let fd = image(&dir, before, true);
            let first = level(&dir, &fd, true);
            locked(&first, &fd, true, false).unwrap();
            let kept = if before == after { fd } else { image(&dir, after, true) };
            let second = level(&dir, &kept, true);
            std::thread::scope(|s| {
                let waiting = s.spawn(|| locked(&second, &kept, true, true));
                sleep(Duration::from_millis(200));
                assert!(!waiting.is_finished());
                drop(first);
                waiting.join().unwrap().unwrap();
            });
        }
    }

    #[test]
    fn the_exclusion_outlives_the_worker_and_ends_with_the_supervisor() {
        let dir = folder();
        let path = dir.path().join("image");
        let supervisors = image(&dir, true, true);
        let workers = supervisors.try_clone().unwrap();
        let level = level(&dir, &workers, true);
        locked(&level, &workers, true, false).unwrap();
        drop((level, workers));
        let stranger = |sharing| lock_image(&path, None, Access { write: true, direct: false }, sharing);
        assert_eq!(stranger(Sharing::Readers).unwrap_err().kind(), Kind::Busy);
        // A frozen level is only read: others may read it, too, and none may write.
        release(&supervisors);
        drop(stranger(Sharing::Readers).unwrap());
        assert_eq!(stranger(Sharing::Exclusive).unwrap_err().kind(), Kind::Busy);
        drop(supervisors);
        stranger(Sharing::Exclusive).unwrap();
    }

    #[test]
    fn a_merge_target_that_cannot_be_had_stays_what_it_was() {
        let dir = folder();
        let (own, others) = (image(&dir, true, false), image(&dir, true, false));
        let own_level = level(&dir, &own, false);
        for (level, fd) in [(&own_level, &own), (&level(&dir, &others, false), &others)] {
            locked(level, fd, false, false).unwrap();
        }
        assert_eq!(open_target(&own, &name(&dir), false).unwrap_err().kind(), Kind::Busy);
        drop(others);
        let other = image(&dir, true, false);
        let other_level = level(&dir, &other, false);
        locked(&other_level, &other, false, false).unwrap();
        drop(other);
        // A merge that begins and fails: the next worker has the level as a reader.
        let target = open_target(&own, &name(&dir), false).unwrap();
        drop(target);
        let other = image(&dir, true, false);
        assert_eq!(locked(&other_level, &other, false, false).unwrap_err().kind(), Kind::InUse);
        locked(&own_level, &own, false, false).unwrap();
        locked(&other_level, &other, false, false).unwrap();
    }
}

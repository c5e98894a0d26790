//! The files of a chain, opened by the worker itself and locked.
//!
//! A description of its own matters: I/O of a worker lands for seconds after its exit, and a lock on a description
//! falls only when the last of it is over. A successor waits for that lock. So these descriptors are
//! close-on-exec and never passed to another process.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::bail;
use crate::chain::LevelFile;
use crate::error::{Error, IoContext, Kind, Result};
use crate::image::lock;
use crate::server::proto::LevelName;
use crate::sys::aligned::AlignedBuf;
use crate::sys::file_lock;
use crate::sys::statx::direct_align;

/// Direct I/O must allow sectors: the device has blocks of so many bytes.
const SECTOR: u32 = 512;

/// Opens every level (given by O_PATH descriptors, base first) anew: the top of a writable chain for writing, the rest
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
pub fn open_target(path: &OwnedFd, name: &LevelName, wait: bool) -> Result<LevelFile> {
    let level = open_one(path, name, true)?;
    let busy = || {
        let shown = level.name.display();
        Error::new(
            Kind::Busy,
            format!("image {shown} is to take what is merged, and another process uses it; unmount that first"),
        )
    };
    lock_top(&level, wait).map_err(|e| if e.kind() == Kind::InUse { busy() } else { e })?;
    lock::lock_exclusive(&level.file).map_err(|_| busy())?;
    Ok(level)
}

/// Locks the files: the writable top exclusively, what is only read together with other readers. At a takeover this
/// waits until the last operation of the former worker is over; otherwise a lock that another process holds is an
/// error. `except`: a level that is locked already, or that another process writes to.
pub fn lock(levels: &[LevelFile], writable: bool, takeover: bool, except: Option<usize>) -> Result<()> {
    for (i, level) in levels.iter().enumerate().filter(|(i, _)| Some(*i) != except) {
        if writable && i + 1 == levels.len() {
            lock_top(level, takeover)?;
            lock::lock_write(&level.file).map_err(|_| in_use(level))?;
        } else {
            lock::lock_read(&level.file).map_err(|_| in_use(level))?;
        }
    }
    Ok(())
}

/// Locks a level that this process also reads, for writing.
pub fn lock_exclusive(level: &LevelFile) -> Result<()> {
    lock_top(level, false)
}

fn lock_top(top: &LevelFile, takeover: bool) -> Result<()> {
    let taken = match takeover {
        true => file_lock::exclusive(&top.file, true),
        false => lock::retry(|| file_lock::exclusive(&top.file, false)),
    };
    match taken {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(in_use(top)),
        Err(e) => Err(Error::with(
            Kind::Mount,
            format!("cannot lock {}; the file system must support flock for writing", top.name.display()),
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
    use std::path::PathBuf;
    use std::thread::sleep;
    use std::time::Duration;

    fn level(dir: &tempfile::TempDir, writable: bool) -> Result<LevelFile> {
        let path = dir.path().join("image");
        if !path.exists() {
            std::fs::write(&path, [7; 8192]).unwrap();
        }
        let fd: OwnedFd = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path).unwrap().into();
        let name = LevelName { path: PathBuf::from(&path), raw: true };
        Ok(open(&[fd], &[name], writable)?.remove(0))
    }

    #[test]
    fn a_writer_is_alone() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let first = [level(&dir, true).unwrap()];
        lock(&first, true, false, None).unwrap();
        let second = [level(&dir, true).unwrap()];
        assert_eq!(lock(&second, true, false, None).unwrap_err().kind(), Kind::InUse);
        let reader = [level(&dir, false).unwrap()];
        assert_eq!(lock(&reader, false, false, None).unwrap_err().kind(), Kind::InUse);
        drop(first);
        lock(&reader, false, false, None).unwrap();
        lock(&[level(&dir, false).unwrap()], false, false, None).unwrap();
        assert_eq!(lock(&second, true, false, None).unwrap_err().kind(), Kind::InUse);
    }

    #[test]
    fn a_successor_waits_for_the_lock() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let first = [level(&dir, true).unwrap()];
        lock(&first, true, false, None).unwrap();
        let second = [level(&dir, true).unwrap()];
        std::thread::scope(|s| {
            let waiting = s.spawn(|| lock(&second, true, true, None));
            sleep(Duration::from_millis(200));
            assert!(!waiting.is_finished());
            drop(first);
            waiting.join().unwrap().unwrap();
        });
    }
}

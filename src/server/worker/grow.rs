//! The top image gets a larger disk, between the worker that has retired and the one that is about to serve. No other process
//! uses the image, and requests wait.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};

use crate::bail;
use crate::chain::LevelFile;
use crate::engine::api::{Shared, SyncState};
use crate::error::{IoContext, Kind, Result};
use crate::format::bat;
use crate::image::grow::{grow, grow_raw, next_size};
use crate::image::target::Target;
use crate::server::shm::Shm;
use crate::sys::store;
use crate::units::SECTOR;

/// Bytes of the file that are moved at once, at most: requests wait for it.
const MOVED: u64 = 1 << 20;

/// Tables are written by pages.
const PAGE: u64 = 4096;

/// Makes the top larger if the change says so; `fds`: by which the supervisor has the `files`. False: it has not got its last size yet, and another change is to follow.
pub fn grow_top(sectors: Option<u64>, files: &[LevelFile], fds: &[OwnedFd], shm: &Shm) -> Result<bool> {
    let Some(sectors) = sectors else { return Ok(true) };
    let (Some(level), Some(fd)) = (files.last(), fds.last()) else {
        bail!(Protocol, "a chain without images is to grow")
    };
    if shm.failed() || shm.sync_state() == SyncState::Failed {
        // The durable entries may differ from those that are read.
        bail!(Fsync, "a sync of {} has failed: it does not grow", level.name.display());
    }
    let grown = grow_level(level, &open(level, fd)?, sectors);
    match &grown {
        // What of it has reached the disk is not known: nothing more may be relied upon, by any worker.
        Err(e) if e.kind() == Kind::Fsync => shm.set_sync_state(SyncState::Failed),
        // The file was changed by this device.
        _ => shm.beat(),
    }
    grown
}

/// A description of its own without direct I/O, since header and entries are no whole sectors. Each operation on it is
/// over when this process is.
fn open(level: &LevelFile, fd: &OwnedFd) -> Result<File> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .ctx(Kind::Open, || format!("cannot open {} to make it larger", level.name.display()))
}

fn grow_level(level: &LevelFile, file: &File, sectors: u64) -> Result<bool> {
    let shown = level.name.display();
    if level.raw {
        let len = file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {shown}"))?.len();
        let Some(wanted) = sectors.checked_mul(SECTOR) else { bail!(Param, "image {shown}: {sectors} sectors") };
        if len < wanted {
            grow_raw(file, &level.name, len, wanted)?;
        }
        return Ok(true);
    }
    let mut target = Target::open(file, &level.name)?;
    if target.header.sectors >= sectors {
        return Ok(true);
    }
    let next = next_size(&target.header, sectors, MOVED)?;
    // Before anything changes: a flush must not meet the lack of space for the longer table half way.
    let clusters = next / u64::from(target.header.cluster.sectors());
    store::reserve(file, bat::offset_of(clusters).next_multiple_of(PAGE))
        .ctx(Kind::Fallocate, || format!("no space for the longer BAT of image {shown}"))?;
    grow(&mut target, next)?;
    Ok(next == sectors)
}

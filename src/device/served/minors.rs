//! The minor that the next device would get.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use crate::bail;
use crate::device::served::lock;
use crate::error::{IoContext, Kind, Result};
use crate::server::{minors, runtime};

/// So many devices the classic driver's minors are enough for.
const DEVICES: u32 = 65536;

/// The minor N * 16 of the first name ploopN that is free. No other device gets that name, unless it is asked for by name,
/// as long as the descriptor is open.
pub fn reserve() -> Result<(u32, OwnedFd)> {
    let (dir, path) = (lock::lock_dir(), minors::file());
    lock::make(&dir).ctx(Kind::Lock, || format!("cannot make {}", dir.display()))?;
    runtime::verify_dir(&dir)?;
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(&path)
        .ctx(Kind::Lock, || format!("cannot open {}", path.display()))?;
    for number in 0..DEVICES {
        let name = format!("ploop{number}");
        if minors::is_taken(&name) || minors::is_reserved(&name) {
            continue;
        }
        if minors::reserve(&file, number).ctx(Kind::Lock, || format!("cannot lock {}", path.display()))? {
            return Ok((number * minors::PER_DEVICE, file.into()));
        }
    }
    bail!(Device, "all names from ploop0 to ploop{} are taken", DEVICES - 1)
}

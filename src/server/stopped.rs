//! Devices that were stopped and can be started again: /run/ploop/.stopped-NAME has what was attached, and what its files
//! were like.
//!
//! The supervisor makes the record as the last step of a stop, when the images are closed, and before it removes the
//! device's folder. As long as there is that folder the record counts for nothing: the device runs, or its processes
//! were killed. The supervisor of a device that runs removes the record of that name.
#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::server::proto::{AttachRequest, DeviceRecord, MAX_FRAME};
use crate::server::runtime;
use crate::sys::host;

/// Names of the records, before the device's name.
const PREFIX: &str = ".stopped-";
/// A record that is being changed.
const CHANGING: &str = ".stopping-";

/// What a device that was stopped is started from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoppedRecord {
    /// As it was when its images were closed.
    pub device: DeviceRecord,
    /// What is attached when it is started.
    pub attach: AttachRequest,
    /// Of each file, base first.
    pub stamps: Vec<Stamp>,
}

/// What changes with a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    pub size: i64,
    /// Seconds and nanoseconds of the last change of its content, then of its content or attributes.
    pub modified: (i64, i64),
    pub changed: (i64, i64),
}

impl Stamp {
    /// Of an open file, O_PATH included.
    pub fn of(fd: impl AsFd) -> io::Result<Stamp> {
        let stat = fstat(fd)?;
        Ok(Stamp {
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec),
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        })
    }
}

fn path(name: &str) -> PathBuf {
    runtime::run_dir().join(format!("{PREFIX}{name}"))
}

/// Whether there is a record of this name, which then is no other device's name.
pub fn is_recorded(name: &str) -> bool {
    fs::symlink_metadata(path(name)).is_ok()
}

/// Opens the record of a device that is stopped; none: it is not.
pub fn open(name: &str) -> Result<Option<File>> {
    if fs::symlink_metadata(runtime::device_dir(name)).is_ok() {
        return Ok(None);
    }
    let path = path(name);
    match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        other => {
            let file = other.ctx(Kind::Open, || format!("cannot open {}", path.display()))?;
            runtime::verify_dir(&runtime::run_dir())?;
            Ok(Some(file))
        }
    }
}

/// The record of a device that is stopped; none: it is not, or it was so in an earlier boot.
pub fn read(name: &str) -> Result<Option<StoppedRecord>> {
    match open(name)? {
        Some(file) => parse(name, file),
        None => Ok(None),
    }
}

/// The record in an open file.
pub fn parse(name: &str, file: impl Read) -> Result<Option<StoppedRecord>> {
    let shown = path(name);
    let mut text = Vec::new();
    file.take(MAX_FRAME as u64)
        .read_to_end(&mut text)
        .ctx(Kind::Read, || format!("cannot read {}", shown.display()))?;
    let record: StoppedRecord = match serde_json::from_slice(&text) {
        Ok(record) => record,
        Err(e) => {
            let message = format!("{} is no record of a stopped device; look at it and remove it", shown.display());
            return Err(Error::with(Kind::Device, message, e));
        }
    };
    let levels = record.attach.levels.len();
    if record.device.name != name || levels == 0 || [record.attach.ids.len(), record.stamps.len()] != [levels; 2] {
        bail!(Device, "{} is not the record of {name} stopped; look at it and remove it", shown.display());
    }
    Ok(Some(record).filter(|r| runtime::is_this_boot(&r.device.boot)))
}

/// Names of all devices with such a record, by number.
pub fn names() -> Vec<String> {
    let Ok(entries) = fs::read_dir(runtime::run_dir()) else { return Vec::new() };
    let name = |e: fs::DirEntry| Some(e.file_name().to_str()?.strip_prefix(PREFIX)?.to_owned());
    let mut names: Vec<String> =
        entries.flatten().filter_map(name).filter(|n| runtime::check_name(n).is_ok()).collect();
    names.sort_by_key(|n| (runtime::number(n).is_none(), runtime::number(n), n.clone()));
    names
}

/// Puts a record in its place.
fn write(record: &StoppedRecord, new: &Path) -> Result<()> {
    let text = serde_json::to_vec(record).map_err(|e| Error::with(Kind::Protocol, "cannot encode the record", e))?;
    let place = path(&record.device.name);
    let write = || {
        host::step("write the record of a stopped device")?;
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(new)?;
        file.write_all(&text)?;
        fs::rename(new, &place)
    };
    write().ctx(Kind::Write, || format!("cannot write {}", place.display()))
}

/// Makes the record of a device whose images are closed. `dir`: its folder.
pub fn keep(dir: &Path, device: &DeviceRecord, attach: &AttachRequest, levels: &[OwnedFd]) -> Result<()> {
    let stamps = levels.iter().map(Stamp::of).collect::<io::Result<Vec<_>>>();
    let stamps = stamps.ctx(Kind::Fstat, || "cannot look at the images")?;
    let device = DeviceRecord { keep: false, ..device.clone() };
    write(&StoppedRecord { device, attach: attach.clone(), stamps }, &dir.join(runtime::NEW_STATE))
}

/// A start has been undone, and has closed the images as it found them: the next one is to find them unchanged.
pub fn renew(device: &DeviceRecord, levels: &[OwnedFd]) {
    // Of its own name there can be none; the caller has looked at the folder.
    let Ok(file) = File::open(path(&device.name)) else { return };
    let Ok(Some(record)) = parse(&device.name, file) else { return };
    let stamps = levels.iter().map(Stamp::of).collect::<io::Result<Vec<_>>>();
    if let (Ok(stamps), true) = (stamps, record.attach.ids == device.ids) {
        let _ = replace(&StoppedRecord { stamps, ..record });
    }
}

/// Changes the record of a device that is stopped.
pub fn replace(record: &StoppedRecord) -> Result<()> {
    write(record, &runtime::run_dir().join(format!("{CHANGING}{}", record.device.name)))
}

/// Removes the record, if there is one.
pub fn forget(name: &str) -> io::Result<()> {
    for file in [runtime::run_dir().join(format!("{CHANGING}{name}")), path(name)] {
        match fs::remove_file(file) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// Removes the records of earlier boots, where /run outlives the boot.
pub fn forget_earlier_boots() {
    for name in names() {
        let record = File::open(path(&name)).ok().and_then(|file| {
            let mut text = Vec::new();
            file.take(MAX_FRAME as u64).read_to_end(&mut text).ok()?;
            serde_json::from_slice::<StoppedRecord>(&text).ok()
        });
        if record.is_some_and(|r| !runtime::is_this_boot(&r.device.boot)) {
            let _ = forget(&name);
        }
    }
}

//! The records of devices that are stopped: looked up, changed, forgotten.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use crate::bail;
use crate::device::model::Device;
use crate::device::served::model::device_of;
use crate::device::state::State;
use crate::error::{Error, IoContext, Kind, Result};
use crate::image::open;
use crate::server::runtime;
use crate::server::stopped::{self, Stamp, StoppedRecord};
use crate::sys::file_id::FileId;
use crate::sys::file_lock;

/// See [`device::stopped`](crate::device::stopped).
pub fn list() -> Result<Vec<Device>> {
    let mut found = Vec::new();
    for name in stopped::names() {
        found.extend(find(&name)?);
    }
    Ok(found)
}

/// The device of this name, if it is stopped.
pub fn find(name: &str) -> Result<Option<Device>> {
    Ok(stopped::read(name)?.map(shown))
}

/// With what is attached when it is started.
fn shown(stopped: StoppedRecord) -> Device {
    let StoppedRecord { mut device, attach, .. } = stopped;
    (device.levels, device.ids) = (attach.levels, attach.ids);
    (device.descriptor, device.read_only) = (attach.descriptor, attach.read_only);
    device_of(device, State::Stopped)
}

/// The error of all that needs it running. `Device`.
pub fn refusal(stopped: &Device) -> Error {
    let node = stopped.node.display();
    Error::new(
        Kind::Device,
        format!("{node} is stopped: ploop start -d {node} attaches it again, ploop clear -d {node} forgets it"),
    )
}

/// The record of a stopped device, kept from other processes that would start or change it.
pub(super) struct Locked {
    pub record: StoppedRecord,
    _file: File,
}

impl Locked {
    pub fn open(device: &Device) -> Result<Locked> {
        let name = &device.name;
        let gone = || Error::new(Kind::DevIoc, format!("{name} is not stopped any more; ploop list shows its state"));
        let file = stopped::open(name)?.ok_or_else(gone)?;
        match file_lock::exclusive(&file, false) {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                bail!(DevIoc, "{name} is being started or changed by another process; ploop list shows its state")
            }
            other => other.ctx(Kind::Lock, || format!("cannot lock the record of {name}"))?,
        }
        // Another process may have started or changed it until the lock was had.
        let now = stopped::open(name)?.ok_or_else(gone)?;
        let (locked, there) = (FileId::of(&file), FileId::of(&now));
        if locked.ctx(Kind::Fstat, || name.clone())? != there.ctx(Kind::Fstat, || name.clone())? {
            bail!(DevIoc, "{name} was changed by another process just now; try again");
        }
        let record = stopped::parse(name, &now)?.ok_or_else(gone)?;
        if record.device.token != device.instance {
            return Err(gone());
        }
        Ok(Locked { record, _file: file })
    }
}

/// Whether this is the file of a level as it was.
pub(super) fn check(stopped: &StoppedRecord, level: usize, fd: impl AsFd) -> Result<()> {
    let path = stopped.attach.levels.get(level).map_or(Path::new(""), |l| &l.path).display();
    let node = stopped.device.node.display();
    let cure = || format!("ploop clear -d {node} forgets the device; then mount the disk");
    let id = FileId::of(&fd).ctx(Kind::Fstat, || format!("cannot look at {path}"))?;
    if Some(&id) != stopped.attach.ids.get(level) {
        bail!(InUse, "{path} is not the file that {node} had when it was stopped; {}", cure());
    }
    let (was, now) = (stopped.stamps.get(level).copied(), Stamp::of(&fd));
    let now = now.ctx(Kind::Fstat, || format!("cannot look at {path}"))?;
    let what = match was {
        Some(was) if was == now => return Ok(()),
        Some(was) if was.size != now.size => format!("had {} bytes, and has {}", was.size, now.size),
        Some(was) if was.modified != now.modified => "was written to".into(),
        _ => "got another name, owner or mode, or was written to".into(),
    };
    bail!(InUse, "{path} has changed since {node} was stopped: it {what}; {}", cure())
}

/// See [`device::changed`](crate::device::changed).
pub fn changed(device: &Device) -> Result<()> {
    let Some(record) = stopped::read(&device.name)? else { return Ok(()) };
    for (i, level) in record.attach.levels.iter().enumerate() {
        check(&record, i, open::open_level(&level.path, None)?)?;
    }
    Ok(())
}

/// See [`device::forget`](crate::device::forget).
pub fn forget(device: &Device) -> Result<()> {
    let _lock = Locked::open(device)?;
    stopped::forget(&device.name).ctx(Kind::Unlink, || format!("cannot remove the record of {}", device.name))?;
    // Only the last record's removal succeeds.
    let _ = std::fs::remove_dir(runtime::run_dir());
    Ok(())
}

/// See [`device::drop_level`](crate::device::drop_level).
pub fn drop_level(device: &Device, level: usize) -> Result<usize> {
    let locked = Locked::open(device)?;
    let mut record = locked.record.clone();
    let left = record.attach.levels.len() - 1;
    if level > left {
        bail!(DevIoc, "{} has no level {level}: its top is level {left}", device.node.display());
    }
    if left == 0 {
        drop(locked);
        return forget(device).map(|()| 0);
    }
    record.attach.levels.remove(level);
    record.attach.ids.remove(level);
    record.stamps.remove(level);
    // What becomes the top was frozen: other chains may stand on it.
    record.attach.read_only |= level == left;
    // It is no chain of the descriptor's any more.
    record.attach.descriptor = None;
    if level == 0 && record.device.levels.first().is_some_and(|base| base.raw) {
        record.attach.raw_cluster = None;
    }
    stopped::replace(&record)?;
    Ok(left)
}

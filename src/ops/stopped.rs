//! Stopping a device: it is detached and its images are closed, but it keeps its name and a record, from which it can be
//! started again; changing and forgetting that record.
//!
//! Nothing of a stopped device is locked: its disk can be read, checked, merged, snapshotted and mounted read-only
//! meanwhile. A start finds what has been changed, and refuses it by name. Only a mount for writing is refused.

use std::path::Path;

use nix::unistd::{AccessFlags, access};

use super::mount_images::{host_checks, refuse_frozen};
use super::mount_levels::{level, refuse_twice, refuse_used};
use super::{deleted, disk_lock, find, image_set, max_delta};
use crate::bail;
use crate::descriptor::{Descriptor, LockedDescriptor};
use crate::device::{self, Device, Level, Maintenance, State};
use crate::error::{Error, Kind, Result};
use crate::fs::holders;
use crate::report;
use crate::sys::file_id::FileId;
use crate::sys::folder::Place;

/// Stops a running device. `DevIoc` if it is in use or stopped already, `Device` if there is none.
pub fn stop(name: &str) -> Result<()> {
    let _operation = report::cancel::begin();
    if let Some(stopped) = stopped(name)? {
        bail!(DevIoc, "{} is stopped already", stopped.node().display());
    }
    let device = running(name)?;
    let node = device.node().display();
    match &device.state {
        State::Dead => bail!(DevIoc, "{node} has lost its server: ploop umount -d {node}, then mount the disk again"),
        State::Running | State::NoSpace | State::Stalled => {}
        state => bail!(DevIoc, "{node} is {state}, and only a running device can be stopped; see ploop doctor"),
    }
    if let Some(mount) = find::mounts_of(&device)?.first() {
        let target = mount.target.display();
        bail!(DevIoc, "{node} is mounted at {target}: umount {target} first; nothing was changed");
    }
    if let Some(holder) = holders::of(device.rdev).first() {
        bail!(DevIoc, "{node} is in use by another block device: end {holder} first; nothing was changed");
    }
    match device.maintenance() {
        Maintenance::Off => {}
        state => bail!(
            DevIoc,
            "{node} is in maintenance state {}: wait for its end (ploop list), or ploop balloon complete; nothing was changed",
            state.word()
        ),
    }
    if let Some(lost) = deleted::of(&device).first() {
        bail!(
            DevIoc,
            "image {} was deleted, and would be lost: ploop umount --save-deleted -d {node}",
            lost.path.display()
        );
    }
    device::stop(&device)?;
    report::say(0, format_args!("{node} is stopped"));
    Ok(())
}

/// Attaches a stopped device again, as it was. `DevIoc` if it runs, `InUse` if a file of it has changed meanwhile, `Device`
/// if there is none.
pub fn start(name: &str) -> Result<()> {
    let _operation = report::cancel::begin();
    let stopped = find_stopped(name)?;
    // Before the descriptor is looked at, so that the file is named that has changed; the driver looks again.
    device::changed(&stopped).map_err(|e| match e.kind() {
        Kind::Open => changed(&stopped, e.to_string()),
        _ => e,
    })?;
    let disk = match &stopped.descriptor {
        Some(path) => Some(lock_disk(&stopped, path)?),
        None => None,
    };
    let folder = disk.as_ref().map(|d| &d.dir);
    let levels = stopped.images.iter().map(|i| level(&i.path, folder, i.raw)).collect::<Result<Vec<Level>>>();
    let levels = levels.map_err(|e| changed(&stopped, e.to_string()))?;
    refuse_twice(&levels)?;
    refuse_used(&levels, stopped.read_only)?;
    if let (None, Some(top)) = (&disk, levels.last()) {
        refuse_frozen(top, stopped.read_only, false)?;
    }
    host_checks(&levels)?;
    let mut device = device::start(&stopped, levels)?;
    if let Some(disk) = &disk {
        device = max_delta::at_mount(disk, device)?;
    }
    report::say(0, format_args!("{} is started", device.node().display()));
    Ok(())
}

/// Forgets a stopped device. `DevIoc` if it runs, `Device` if there is none.
pub fn clear(name: &str) -> Result<()> {
    let stopped = find_stopped(name)?;
    device::forget(&stopped)?;
    report::say(0, format_args!("{} is forgotten", stopped.node().display()));
    Ok(())
}

/// Drops a level of a stopped device; its file stays. `DevIoc` if it runs or has no such level, `Device` if there is none.
pub fn drop_level(name: &str, level: usize) -> Result<()> {
    let stopped = find_stopped(name)?;
    let (node, top) = (stopped.node().display(), stopped.images.len().saturating_sub(1));
    let left = device::drop_level(&stopped, level)?;
    let file = stopped.images.get(level).map_or(Path::new(""), |i| &i.path).display();
    report::say(0, format_args!("{file} is dropped from {node}"));
    match left {
        0 => report::say(0, format_args!("{node} is forgotten")),
        _ if level == top && !stopped.read_only => {
            report::say(0, format_args!("{node} is read-only from now on: its new top was a frozen image"));
        }
        _ => {}
    }
    Ok(())
}

/// Forgets the device that is stopped of this disk; false: none is.
pub fn forget_of(place: &Place, disk: &Descriptor, component: &str) -> Result<bool> {
    match find::stopped_of(place, disk, component)? {
        Some(stopped) => clear(stopped.name()).map(|()| true),
        None => Ok(false),
    }
}

fn running(name: &str) -> Result<Device> {
    let none = "no ploop device; ploop list shows those that are there";
    match device::by_node(name) {
        Ok(Some(device)) => Ok(device),
        Err(e) if e.kind() != Kind::Param => Err(e),
        // As for an ioctl that another driver's device, or a file, refuses.
        _ if access(name, AccessFlags::R_OK).is_ok() => bail!(DevIoc, "{name} is {none}"),
        _ => bail!(Device, "{name} is {none}"),
    }
}

/// The device of this name if it is stopped; a text that cannot be a device's name is none.
fn stopped(name: &str) -> Result<Option<Device>> {
    match device::find_stopped(name) {
        Err(e) if e.kind() == Kind::Param => Ok(None),
        other => other,
    }
}

fn find_stopped(name: &str) -> Result<Device> {
    match stopped(name)? {
        Some(stopped) => Ok(stopped),
        None => {
            let device = running(name)?;
            bail!(
                DevIoc,
                "{0} is not stopped, but {1}; ploop stop -d {0} stops it",
                device.node().display(),
                device.state
            )
        }
    }
}

/// Locks the disk that a stopped device is of; its descriptor must name the same chain as before.
fn lock_disk(stopped: &Device, path: &Path) -> Result<LockedDescriptor> {
    let locked = if stopped.read_only { disk_lock::open_to_look(path) } else { disk_lock::open(path) };
    let disk = locked.map_err(|e| match e.kind() {
        Kind::DiskDescr => changed(stopped, e.to_string()),
        _ => e,
    })?;
    let id = |file: &Path| FileId::at(file).ok();
    let top = stopped.images.last();
    let named = disk.images.iter().find(|i| top.is_some_and(|t| id(&i.file) == Some(t.id)));
    let Some(guid) = named.map(|i| i.guid) else {
        let file = top.map_or(Path::new(""), |t| &t.path).display();
        return Err(changed(stopped, format!("{} does not name {file} any more", path.display())));
    };
    let chain: Vec<Option<FileId>> = disk.chain(&guid)?.iter().map(|i| id(&i.file)).collect();
    let was: Vec<Option<FileId>> = stopped.images.iter().map(|i| Some(i.id)).collect();
    if chain != was {
        return Err(changed(stopped, format!("{} names another chain of images", path.display())));
    }
    disk.check_whole(&guid)?;
    if !stopped.read_only {
        if disk.has_children(&guid) {
            return Err(changed(stopped, format!("{} has deltas on what was the top", path.display())));
        }
        image_set::refuse_dead(&disk)?;
    }
    Ok(disk)
}

fn changed(stopped: &Device, what: String) -> Error {
    let node = stopped.node().display();
    let cure = format!("ploop clear -d {node} forgets the device; then mount the disk");
    Error::new(Kind::InUse, format!("{what}, which has changed since {node} was stopped; {cure}"))
}

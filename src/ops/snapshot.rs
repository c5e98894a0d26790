//! Snapshots: taking and deleting them. The descriptor's durable rename decides; what it names is durable before, what it
//! no longer names is removed after.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use super::delete_leaf::delete_leaf;
use super::find::UNTIL_UMOUNT;
use super::maintenance::{self, Work};
use super::mount::{self, MountParams};
use super::{disk_lock, image_set, merge, merge_temporary, online, recovery, umount};
use crate::bail;
use crate::descriptor::LockedDescriptor;
use crate::device::{self, Device};
use crate::error::{IoContext, Kind, Result};
use crate::format::guid::{self, Guid};
use crate::image::lock::Sharing;
use crate::image::open::Access;
use crate::report;
use crate::sys::folder::Place;

/// A snapshot to be taken.
#[derive(Clone, Debug)]
pub struct SnapshotParams {
    /// Of the snapshot; must be new.
    pub guid: Guid,
    /// Folder for the new delta; none: beside the first image.
    pub snap_dir: Option<PathBuf>,
    /// The next operation removes it once no process uses it.
    pub temporary: bool,
}

/// A temporary snapshot to be taken and mounted read-only.
#[derive(Clone, Debug)]
pub struct TemporaryParams {
    pub guid: Guid,
    /// Folder for the new delta; none: beside the first image.
    pub snap_dir: Option<PathBuf>,
    /// Where to mount its file system; none: only the device is made.
    pub target: Option<PathBuf>,
    /// Options for that mount.
    pub options: Option<String>,
    /// The snapshot stays while the returned `holder` is open; else until it is unmounted.
    pub with_holder: bool,
}

/// A temporary snapshot, mounted.
#[derive(Debug)]
pub struct TemporarySnapshot {
    /// Its device, `/dev/ploopN`.
    pub device: String,
    /// The open device: the snapshot stays until the caller closes it.
    pub holder: Option<File>,
}

/// Takes a snapshot: the top becomes snapshot `guid`, an empty delta the new top. Of a running disk, if it runs under
/// this component.
pub fn create(descriptor: &Path, component: &str, params: &SnapshotParams) -> Result<()> {
    let _operation = report::cancel::begin();
    let mut disk = disk_lock::open(descriptor)?;
    create_locked(&mut disk, component, params)
}

fn create_locked(disk: &mut LockedDescriptor, component: &str, params: &SnapshotParams) -> Result<()> {
    recovery::before_change(disk)?;
    // Everything that can be refused is, before anything changes.
    disk.descriptor.clone().add_snapshot(image_set::new_name(disk, None)?.path(), params.guid, params.temporary)?;
    recovery::check_files(disk, &guid::TOP)?;
    image_set::running(disk, component)?;
    merge_temporary::merge_unused(disk)?;
    // Its chain may be shorter by now.
    let device = image_set::running(disk, component)?;
    let place = image_set::new_name(disk, params.snap_dir.as_deref())?;
    match device {
        Some(device) => running(disk, &device, params, place)?,
        None => offline(disk, params, place)?,
    }
    report::say(0, format_args!("snapshot {} is created", params.guid));
    Ok(())
}

fn offline(disk: &mut LockedDescriptor, params: &SnapshotParams, place: Place) -> Result<()> {
    let Some(top) = disk.image(&guid::TOP).cloned() else {
        bail!(DiskDescr, "descriptor: the top has no image");
    };
    let held = image_set::lock_image(disk, &top.file, Access::default(), Sharing::Readers)?;
    if !disk.is_raw(&top) {
        // From now on it is a lower delta: closed, and without anything half done.
        image_set::repair_in_place(disk, &top.file)?;
    }
    let shape = image_set::Shape::above(disk, &top)?;
    let mut next = disk.descriptor.clone();
    next.add_snapshot(place.path(), params.guid, params.temporary)?;
    let made = shape.make(&place)?;
    next.size_sectors = made.sectors;
    disk.commit_as(next).inspect_err(|_| image_set::undo_new(disk, &place, made.id))?;
    drop(held);
    Ok(())
}

fn running(disk: &mut LockedDescriptor, device: &Device, params: &SnapshotParams, place: Place) -> Result<()> {
    let Some(top) = disk.image(&guid::TOP).cloned() else {
        bail!(DiskDescr, "descriptor: the top has no image");
    };
    maintenance::before(device, Work::Snapshot)?;
    online::check_chain(disk, device)?;
    let shape = image_set::Shape::above(disk, &top)?;
    let mut next = disk.descriptor.clone();
    next.add_snapshot(place.path(), params.guid, params.temporary)?;
    let made = shape.make(&place)?;
    next.size_sectors = made.sectors;
    online::snapshot(disk, device, next, &place, made.id)
}

/// Deletes a snapshot. No delta stands on it: its file is removed. One does: that delta is merged into it and keeps its
/// own GUID. Several do: the snapshot stays for them and is marked temporary; it is removed when only one is left.
pub fn delete(descriptor: &Path, guid: &Guid) -> Result<()> {
    let _operation = report::cancel::begin();
    let mut disk = disk_lock::open(descriptor)?;
    delete_locked(&mut disk, guid)
}

/// Deletes the top: its parent becomes the top.
pub fn delete_top(descriptor: &Path) -> Result<()> {
    let _operation = report::cancel::begin();
    let mut disk = disk_lock::open(descriptor)?;
    let top = disk.top;
    delete_locked(&mut disk, &top)
}

fn delete_locked(disk: &mut LockedDescriptor, guid: &Guid) -> Result<()> {
    recovery::before_change(disk)?;
    let guid = disk.known(guid)?.guid;
    match disk.children(&guid).as_slice() {
        [] => delete_leaf(disk, &guid)?,
        [child] => merge::range(disk, child, &guid, None)?,
        children if disk.snapshot(&guid).is_some_and(|s| s.temporary) => bail!(
            Param,
            "snapshot {guid} is deleted already: it stays for the {} snapshots on it, until only one of them is left",
            children.len()
        ),
        children => {
            let mut next = disk.descriptor.clone();
            next.mark_temporary(&[guid], true);
            disk.commit_as(next)?;
            report::say(
                1,
                format_args!(
                    "snapshot {guid} has {} children: marked temporary, it is removed when only one is left",
                    children.len()
                ),
            );
        }
    }
    report::say(0, format_args!("snapshot {guid} is deleted"));
    if let Err(e) = merge_temporary::merge_unused(disk) {
        report::warn(format_args!("a temporary snapshot stays: {e}"));
    }
    Ok(())
}

/// Takes a temporary snapshot and mounts it read-only under a component.
pub fn create_temporary(descriptor: &Path, component: &str, params: &TemporaryParams) -> Result<TemporarySnapshot> {
    let _operation = report::cancel::begin();
    if component.is_empty() {
        bail!(Param, "a temporary snapshot needs a component name, by which its device is known");
    }
    let mut disk = disk_lock::open(descriptor)?;
    let snapshot = SnapshotParams { guid: params.guid, snap_dir: params.snap_dir.clone(), temporary: true };
    // The disk itself runs, if it does, without a component.
    create_locked(&mut disk, "", &snapshot)?;
    let taken = mount_temporary(&mut disk, component, params);
    if taken.is_err() {
        // No process uses it yet, so it can be removed.
        if let Err(e) = merge_temporary::merge_unused(&mut disk) {
            report::warn(format_args!("the temporary snapshot {} stays for now: {e}", params.guid));
        }
    }
    taken
}

fn mount_temporary(
    disk: &mut LockedDescriptor,
    component: &str,
    params: &TemporaryParams,
) -> Result<TemporarySnapshot> {
    let component = match params.with_holder {
        true => component.to_owned(),
        false => format!("{UNTIL_UMOUNT}{component}"),
    };
    let how = MountParams {
        read_only: true,
        target: params.target.clone(),
        options: params.options.clone(),
        guid: Some(params.guid.to_string()),
        ..MountParams::default()
    };
    let mounted = mount::mount_locked(disk, &component, &how)?;
    let node = mounted.device.node().to_owned();
    let holder = match params.with_holder {
        false => None,
        true => match open_holder(&mounted.device) {
            Ok(file) => Some(file),
            Err(e) => {
                if let Err(undo) = umount::umount_device(mounted.device.name(), None) {
                    report::warn(format_args!("{} stays: {undo}", node.display()));
                }
                return Err(e);
            }
        },
    };
    Ok(TemporarySnapshot { device: node.display().to_string(), holder })
}

fn open_holder(device: &Device) -> Result<File> {
    let node = device.node();
    let file =
        OpenOptions::new().read(true).open(node).ctx(Kind::Device, || format!("cannot open {}", node.display()))?;
    match device::by_node(&node.to_string_lossy())? {
        Some(found) if found.is_same(device) => Ok(file),
        _ => bail!(Device, "{} is not the device of the temporary snapshot any more", node.display()),
    }
}

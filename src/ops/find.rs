//! Finding devices: by disk, by base image, by mount point; and the mount points of a device.

use std::fs;
use std::io;
use std::path::{self, Path, PathBuf};

use crate::bail;
use crate::descriptor::{Descriptor, LockedDescriptor};
use crate::device::{self, Aliases, Device, State};
use crate::error::{IoContext, Kind, Result};
use crate::fs::mounts::{self, Mount, Names};
use crate::image::open;
use crate::sys::file_id::FileId;

/// Longest component name in bytes; no program could find a device by a longer one.
pub const COMPONENT_MAX: usize = 63;

/// Prefix of the components of temporary snapshots that stay until they are unmounted.
pub const UNTIL_UMOUNT: char = '~';

/// Refuses component names that cannot be stored. `Param`.
pub fn check_component(component: &str) -> Result<()> {
    if component.len() > COMPONENT_MAX || component.contains(['\0', '\n']) {
        bail!(Param, "component name {component:?}: at most {COMPONENT_MAX} bytes, no line breaks");
    }
    Ok(())
}

/// The device of a base image under exactly this component.
pub fn of_base(base: &Path, component: &str) -> Result<Option<Device>> {
    Ok(device::by_base(base, Some(component))?.into_iter().next())
}

fn id(path: &Path) -> Option<FileId> {
    FileId::at(path).ok()
}

/// Where the base of a device is now: it may have been moved, perhaps with its folder, while the device runs.
pub fn base_of(device: &Device) -> PathBuf {
    let known = device.base();
    if device.base_id().is_none() || device.base_id() == id(known) {
        return known.to_owned();
    }
    device::base_name(device).unwrap_or_else(|| known.to_owned())
}

/// Refuses a disk whose base has the name, but not the identity, of a file that a device runs from: what took the place of
/// the image while the disk ran is not what its users write to. `InUse`.
pub fn refuse_replaced(disk: &Descriptor) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        // Only root may see where a device's files are. The locks on the images still refuse a second writer.
        return Ok(());
    }
    let base = &disk.first_image()?.file;
    let folder = |path: &Path| path.parent().and_then(id);
    let (Some(now), here) = (id(base), folder(base)) else { return Ok(()) };
    let replaced = device::list_of(|d| {
        let Some(named) = d.images.first().map(|i| i.path.as_path()) else { return false };
        let same_name = named.file_name() == base.file_name() && folder(named) == here;
        same_name && !d.read_only && d.base_id() != Some(now)
    })?;
    let found = replaced.into_iter().find(|d| d.state != State::Dead && device::base_name(d).is_none());
    let Some(device) = found else { return Ok(()) };
    bail!(
        InUse,
        "{} is not the file that {} runs from, but has taken its place since; unmount that device (ploop umount -d {}), \
         then find out which file is the right one",
        base.display(),
        device.node().display(),
        device.node().display()
    )
}

/// Node of the device that runs this disk under this component. `Sys` if it is there but not running.
pub fn get_dev(descriptor: &Path, component: &str) -> Result<Option<PathBuf>> {
    let disk = LockedDescriptor::open(descriptor)?;
    let Some(found) = of_base(&disk.first_image()?.file, component)? else { return Ok(None) };
    if !found.state.runs() {
        bail!(
            Sys,
            "{} has this disk but does not run (state: {}); see ploop doctor",
            found.node().display(),
            found.state.as_str()
        );
    }
    Ok(Some(found.node().to_owned()))
}

/// Nodes of all devices over the base of this disk, whatever their components. No lock is taken.
pub fn get_devs(descriptor: &Path) -> Result<Vec<PathBuf>> {
    let disk = Descriptor::read(descriptor)?;
    let found = device::by_base(&disk.first_image()?.file, None)?;
    Ok(found.iter().map(|d| d.node().to_owned()).collect())
}

/// Node of the device whose base is this file, under this component. A file that is not there belongs to none.
pub fn find_dev(component: &str, base: &Path) -> Result<Option<PathBuf>> {
    Ok(of_base(base, component)?.map(|d| d.node().to_owned()))
}

/// The numbers and nodes by which a device's mounts are known.
pub fn names(device: &Device) -> Names {
    let Aliases { devs, nodes } = device::aliases(device);
    Names { devs, nodes }
}

/// The mounts of a device in the mount namespace of the calling process, oldest first.
pub fn mounts_of(device: &Device) -> Result<Vec<Mount>> {
    let names = names(device);
    Ok(mounts::read()?.into_iter().filter(|m| names.mounted_by(m)).collect())
}

/// First mount point of a device or of one of its partitions. `Device` if there is no such device.
pub fn mnt_by_dev(name: &str) -> Result<Option<PathBuf>> {
    let Some(found) = device::by_node(name)? else { bail!(Device, "{name} is no ploop device") };
    Ok(mounts_of(&found)?.into_iter().next().map(|m| m.target))
}

/// The device under a mount point, and what of it is mounted there. None if the folder is not there, is no mount
/// point, or is one of something else.
pub fn by_mount_point(folder: &Path) -> Result<Option<(Device, Mount)>> {
    let wanted = match fs::canonicalize(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        // The root of a file system whose device is dead need not be readable.
        Err(_) => open::lexical(&path::absolute(folder).ctx(Kind::Param, || folder.display().to_string())?),
        Ok(resolved) => resolved,
    };
    let mounts = mounts::read()?;
    // Of several mounts at one place only the last one is seen.
    let visible = match mounts.iter().rev().find(|m| m.target == wanted) {
        Some(mount) => vec![mount],
        None => {
            // The table names it differently (a chroot): by identity.
            let this = id(&wanted);
            let dev = this.map(|id| id.dev);
            let here = |m: &&Mount| Some(m.dev) == dev && id(&m.target) == this;
            mounts.iter().rev().filter(here).collect()
        }
    };
    let mount_of = |device: &Device| {
        let names = names(device);
        visible.iter().copied().find(|m| names.mounted_by(m))
    };
    let found = device::list_of(|d| mount_of(d).is_some())?.into_iter().next();
    Ok(found.and_then(|device| mount_of(&device).cloned().map(|mount| (device, mount))))
}

//! Finding devices: by disk, by base image, by mount point; and the mount points of a device.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{self, Path, PathBuf};

use crate::bail;
use crate::descriptor::{Descriptor, LockedDescriptor};
use crate::device::{self, Aliases, Device, State};
use crate::error::{IoContext, Kind, Result};
use crate::fs::mounts::{self, Mount, Names};
use crate::image::open;
use crate::sys::file_id::FileId;
use crate::sys::folder::Place;

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

/// The device that runs this disk under exactly this component.
pub fn of_disk(disk: &LockedDescriptor, component: &str) -> Result<Option<Device>> {
    Ok(devices_of(&disk.place, disk, Some(component))?.into_iter().next())
}

/// The devices that run a disk. A disk is its descriptor and its chain: other disks may stand on the same base file (a
/// template, hard links), and their devices are not among these.
pub fn devices_of(place: &Place, disk: &Descriptor, component: Option<&str>) -> Result<Vec<Device>> {
    let base = id_of(&disk.first_image()?.file)?;
    let own = Own::of(place, disk);
    let stands_on_base = |d: &Device| base.is_some_and(|base| d.base_id() == Some(base));
    // Of a disk whose images were renamed or deleted the device's record says whose they are.
    let candidate = |d: &Device| stands_on_base(d) || own.missing && d.top_id().is_some();
    device::list_of(|d| component.is_none_or(|c| c == d.component()) && candidate(d) && own.runs(d))
}

/// The stopped device that would run this disk; see [`devices_of`].
pub fn stopped_of(place: &Place, disk: &Descriptor, component: &str) -> Result<Option<Device>> {
    let base = id_of(&disk.first_image()?.file)?;
    let own = Own::of(place, disk);
    let mut stopped = device::stopped()?.into_iter();
    Ok(stopped.find(|d| base.is_some() && d.base_id() == base && d.component() == component && own.runs(d)))
}

/// Whether a device runs, or shows a snapshot of, this disk; see [`devices_of`].
pub fn is_of(disk: &LockedDescriptor, device: &Device) -> bool {
    Own::of(&disk.place, disk).runs(device)
}

/// By what a disk is told from another one that stands on the same base.
struct Own<'a> {
    place: &'a Place,
    folder: Option<FileId>,
    images: Vec<FileId>,
    top: Option<FileId>,
    /// An image was removed or renamed; the device may run it.
    missing: bool,
}

impl Own<'_> {
    fn of<'a>(place: &'a Place, disk: &Descriptor) -> Own<'a> {
        let images: Vec<FileId> = disk.images.iter().filter_map(|i| id(&i.file)).collect();
        Own {
            place,
            folder: place.folder.fd().and_then(FileId::of).ok(),
            missing: images.len() < disk.images.len(),
            images,
            top: disk.image(&disk.top).and_then(|i| id(&i.file)),
        }
    }

    /// A device over the base of this disk, or over files that are not there any more, runs it if it shows one of its images, or a file that was put on its top, unless
    /// the device was made by another descriptor that names that image.
    fn runs(&self, device: &Device) -> bool {
        let Some(top) = device.top_id() else { return true };
        let here = device.descriptor.as_ref().is_some_and(|made_by| {
            let folder = made_by.parent().and_then(id);
            folder.is_some() && folder == self.folder && made_by.file_name() == Some(&self.place.name)
        });
        let extended = self.top.is_some_and(|own| device.level_of(own).is_some());
        if !self.images.contains(&top) && !extended {
            return here && self.missing;
        }
        let Some(made_by) = device.descriptor.as_ref().filter(|_| !here) else { return true };
        // The folder was moved, or this is another disk.
        !Descriptor::read(made_by).is_ok_and(|d| d.images.iter().any(|i| id(&i.file) == Some(top)))
    }
}

/// The device of a base image under exactly this component. Of a file with several names (hard links) each name can be the
/// base of a disk of its own: the device is that of the name by which it was made, as long as that is there.
pub fn of_base(base: &Path, component: &str) -> Result<Option<Device>> {
    if id_of(base)?.is_none() {
        return deleted_base(base, component);
    }
    let mut found = device::by_base(base, Some(component))?;
    let names = fs::metadata(base).map_or(1, |m| m.nlink());
    if names > 1 {
        let real = fs::canonicalize(base).ok();
        let other = |d: &Device| real.as_deref() != Some(d.base()) && id(d.base()) == d.base_id();
        found.retain(|d| !other(d));
    }
    Ok(found.into_iter().next())
}

/// The device whose base had this name when it was attached; by now the name is free.
fn deleted_base(base: &Path, component: &str) -> Result<Option<Device>> {
    let absolute = path::absolute(base).ctx(Kind::Param, || base.display().to_string())?;
    let folder = absolute.parent().and_then(|f| fs::canonicalize(f).ok());
    let (Some(folder), Some(name)) = (folder, absolute.file_name()) else { return Ok(None) };
    let named = folder.join(name);
    Ok(device::list_of(|d| d.component() == component && d.base() == named)?.into_iter().next())
}

/// The identity of what a path leads to; none: nothing is there.
fn id_of(path: &Path) -> Result<Option<FileId>> {
    match FileId::at(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some).ctx(Kind::Fstat, || format!("cannot look at {}", path.display())),
    }
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

/// Nodes of all devices of this disk, whatever their components. No lock is taken.
pub fn get_devs(descriptor: &Path) -> Result<Vec<PathBuf>> {
    let found = devices(descriptor, None)?;
    Ok(found.iter().map(|d| d.node().to_owned()).collect())
}

/// Devices of a disk; no lock is taken.
pub fn devices(descriptor: &Path, component: Option<&str>) -> Result<Vec<Device>> {
    let place = Descriptor::find(descriptor)?;
    devices_of(&place, &Descriptor::read_at(&place)?, component)
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
    Ok(mounts_among(&mounts::read()?, device))
}

/// Those mounts of `all` that are a device's, in their order.
pub fn mounts_among(all: &[Mount], device: &Device) -> Vec<Mount> {
    let names = names(device);
    all.iter().filter(|m| names.mounted_by(m)).cloned().collect()
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
    if visible.is_empty() {
        return Ok(None);
    }
    let mount_of = |device: &Device| {
        let names = names(device);
        visible.iter().copied().find(|m| names.mounted_by(m))
    };
    let found = device::list_of(|d| mount_of(d).is_some())?.into_iter().next();
    Ok(found.and_then(|device| mount_of(&device).cloned().map(|mount| (device, mount))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor::{FILE_NAME, ImageMode};
    use crate::device::served::made_up;
    use crate::format::guid;
    use crate::format::header::Version;
    use crate::ops::snapshot::{self, SnapshotParams};
    use crate::ops::testkit::{self, g, make_disk, small};

    #[test]
    fn a_device_is_of_the_disk_that_made_it_whatever_shares_its_base() {
        let dir = testkit::folder();
        let root = dir.path().canonicalize().unwrap();
        let [a, b] = ["a", "b"].map(|name| root.join(name));
        for folder in [&a, &b] {
            fs::create_dir(folder).unwrap();
        }
        let dd = make_disk(&a, Version::V2, ImageMode::Expanded, small(), 20);
        snapshot::create(&dd, "", &SnapshotParams { guid: g(1), snap_dir: None, temporary: false }).unwrap();
        let top = Descriptor::read(&dd).unwrap().image(&guid::TOP).unwrap().file.clone();
        fs::hard_link(a.join("root.hdd"), b.join("root.hdd")).unwrap();
        for name in [FILE_NAME.as_ref(), top.file_name().unwrap()] {
            fs::copy(a.join(name), b.join(name)).unwrap();
        }
        let is = |device: &Device, folder: &Path| {
            let place = Descriptor::find(&folder.join(FILE_NAME)).unwrap();
            let disk = Descriptor::read_at(&place).unwrap();
            let own = Own::of(&place, &disk);
            assert!(own.images.contains(&device.base_id().unwrap()));
            own.runs(device)
        };
        let base = a.join("root.hdd");
        let running = made_up(Some(&dd), &[&base, &top]);
        let look = made_up(Some(&dd), &[&base]);
        let by_list = made_up(None, &[&base, &top]);
        for device in [&running, &look, &by_list] {
            assert!(is(device, &a) && !is(device, &b), "{:?}", device.descriptor);
        }
        // The same folder by another path, and after it was moved; a copy with the old name is another disk.
        std::os::unix::fs::symlink(&a, root.join("link")).unwrap();
        assert!(is(&made_up(Some(&root.join("link").join(FILE_NAME)), &[&base, &top]), &a));
        let moved = root.join("moved");
        fs::rename(&a, &moved).unwrap();
        assert!(is(&running, &moved) && !is(&running, &b));
        fs::rename(&b, &a).unwrap();
        assert!(is(&running, &moved) && !is(&running, &a));
        // A file that was put on its top by device.
        fs::write(moved.join("more"), "x").unwrap();
        let (base, top) = (moved.join("root.hdd"), moved.join(top.file_name().unwrap()));
        let extended = made_up(Some(&moved.join(FILE_NAME)), &[&base, &top, &moved.join("more")]);
        assert!(is(&extended, &moved) && !is(&extended, &a));
        // Its top was removed while it runs.
        let running = made_up(Some(&moved.join(FILE_NAME)), &[&base, &top]);
        fs::remove_file(&top).unwrap();
        assert!(is(&running, &moved) && !is(&running, &a));
    }
}

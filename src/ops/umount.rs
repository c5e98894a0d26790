//! Unmounting: every mount of the device in the caller's mount namespace, then the device itself, its image closed
//! cleanly.

use std::io::ErrorKind::{NotADirectory, NotFound, ReadOnlyFilesystem};
use std::path::Path;

use super::deleted::{self, Deleted, Rescue};
use super::disk_lock::Disk;
use super::find::{self, UNTIL_UMOUNT};
use super::maintenance::{self, Work};
use super::stopped;
use crate::bail;
use crate::descriptor::{Descriptor, LockedDescriptor};
use crate::device::{self, Device, Image, State};
use crate::error::{Error, Kind, Result};
use crate::fs::mounts::Mount;
use crate::fs::stat::FsInfo;
use crate::fs::{elsewhere, holders, mount, utab};
use crate::image::open;
use crate::report;
use crate::sys::file_id::FileId;
use crate::sys::folder::Place;
use crate::sys::store;

/// How to unmount.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Umount {
    /// What becomes of images that were deleted while the disk runs.
    pub deleted: Deleted,
}

impl Umount {
    /// Unmounts a disk by its descriptor. `DevNotMounted` if it is not running under this component.
    pub fn descriptor(self, descriptor: &Path, component: &str) -> Result<()> {
        let _operation = report::cancel::begin();
        // A merge in the disk's own server ends with the device, and the next mount begins it anew.
        let disk = Disk::look(descriptor)?;
        self.of_place(disk.place(), &disk, component)
    }

    fn locked(self, disk: &LockedDescriptor, component: &str) -> Result<()> {
        self.of_place(&disk.place, disk, component)
    }

    fn of_place(self, place: &Place, disk: &Descriptor, component: &str) -> Result<()> {
        let find = |name: &str| Ok(find::devices_of(place, disk, Some(name))?.into_iter().next());
        match of_component(find, component)? {
            Some(device) => {
                maintenance::before(&device, Work::Umount)?;
                self.device(&device, Some(disk))
            }
            None => {
                if stopped::forget_of(place, disk, component)? {
                    return Ok(());
                }
                find::refuse_replaced(disk)?;
                let of = if component.is_empty() { String::new() } else { format!(" under component {component}") };
                bail!(DevNotMounted, "{} is not mounted{of}", place.display())
            }
        }
    }

    /// Unmounts a device by its node or name; with the descriptor of its disk, if there is one, the size of the file
    /// system is remembered beside the image. `Device` if there is no such device.
    pub fn node(self, name: &str, descriptor: Option<&Path>) -> Result<()> {
        let _operation = report::cancel::begin();
        if device::find_stopped(name).is_ok_and(|d| d.is_some()) {
            return stopped::clear(name);
        }
        let Some(device) = device::by_node(name)? else {
            bail!(Device, "{name} is no ploop device that this machine runs; ploop list shows them")
        };
        match descriptor {
            Some(path) => self.device(&device, Some(&Descriptor::read(path)?)),
            None => self.device(&device, None),
        }
    }

    /// Unmounts the device under a mount point. `Param` if none is mounted there.
    pub fn mountpoint(self, folder: &Path) -> Result<()> {
        let _operation = report::cancel::begin();
        match find::by_mount_point(folder)? {
            Some((device, _)) => self.device(&device, None),
            None => bail!(Param, "{} is not the mount point of a ploop device", folder.display()),
        }
    }

    /// Unmounts the device over a base image. `Param` if there is none.
    pub fn base(self, base: &Path, component: &str) -> Result<()> {
        let _operation = report::cancel::begin();
        match of_component(|name| find::of_base(base, name), component)? {
            Some(device) => self.device(&device, None),
            None => bail!(Param, "{} is not the base image of a device that this machine runs", base.display()),
        }
    }

    fn device(self, device: &Device, disk: Option<&Descriptor>) -> Result<()> {
        if device.state != State::Dead {
            refuse_held(device)?;
        }
        let lost = deleted::of(device);
        let rescue = match self.deleted {
            _ if lost.is_empty() => None,
            Deleted::Refuse => return Err(deleted::refusal(device, &lost)),
            Deleted::Save => {
                refuse_nested(device, &find::mounts_of(device)?)?;
                Some(Rescue::begin(device, &lost)?)
            }
            Deleted::Discard => None,
        };
        if let Some((what, remedy)) = deleted::trouble(device).filter(|_| lost.is_empty()) {
            report::warn(format_args!("{what}: {remedy}"));
        }
        umount(device, disk, rescue)
    }
}

/// Unmounts a disk by its descriptor; see [`Umount::descriptor`].
pub fn umount_descriptor(descriptor: &Path, component: &str) -> Result<()> {
    Umount::default().descriptor(descriptor, component)
}

/// Unmounts a disk whose descriptor the caller has locked.
pub fn umount_locked(disk: &LockedDescriptor, component: &str) -> Result<()> {
    Umount::default().locked(disk, component)
}

/// The device of this component; a temporary snapshot that stays until it is unmounted is found by the name that it was
/// given, too.
fn of_component(find: impl Fn(&str) -> Result<Option<Device>>, component: &str) -> Result<Option<Device>> {
    match find(component)? {
        None if !component.is_empty() => find(&format!("{UNTIL_UMOUNT}{component}")),
        found => Ok(found),
    }
}

/// Unmounts a device by its node or name; see [`Umount::node`].
pub fn umount_device(name: &str, descriptor: Option<&Path>) -> Result<()> {
    Umount::default().node(name, descriptor)
}

/// Unmounts the device under a mount point; see [`Umount::mountpoint`].
pub fn umount_mountpoint(folder: &Path) -> Result<()> {
    Umount::default().mountpoint(folder)
}

/// Gives up a device that cannot be served any more: waiting I/O fails, its mounts are detached, and the device is
/// removed if no process uses it.
pub fn abort(name: &str) -> Result<()> {
    let Some(found) = device::by_node(name)? else {
        bail!(Device, "{name} is no ploop device that this machine runs; ploop list shows them")
    };
    device::abort(found.name())?;
    // The device's I/O fails from now on, so waiting for the users of its mounts would save no data.
    for mount in find::mounts_of(&found)?.iter().rev() {
        mount::umount_lazily(&mount.target)?;
    }
    match device::by_node(name)? {
        Some(found) => detach(&found).map_err(|e| {
            e.context(format!(
                "{} is given up, but not gone yet; end what uses it, then ploop umount -d {0}",
                found.node().display()
            ))
        }),
        None => Ok(()),
    }
}

/// Before anything is changed: what stands on the device would keep it.
fn refuse_held(device: &Device) -> Result<()> {
    let held = holders::of(device.rdev);
    if held.is_empty() {
        return Ok(());
    }
    let held: Vec<String> = held.iter().map(ToString::to_string).collect();
    bail!(
        Umount,
        "{} is in use by other block devices: end {}, then unmount it; nothing was changed",
        device.node().display(),
        held.join(", ")
    )
}

/// Before anything is changed: the server of a disk that lies in the file system would keep it.
fn refuse_nested(device: &Device, mounts: &[Mount]) -> Result<()> {
    let names = find::names(device);
    let lies_in = |image: &Image| {
        names.devs.contains(&image.id.dev)
            || mounts.iter().any(|m| image.path.starts_with(&m.target))
                && FileId::at(&image.path).is_ok_and(|id| id == image.id)
    };
    let inner = device::list_of(|d| d.name() != device.name() && d.images.iter().any(lies_in))?;
    let inner: Vec<&Device> = inner.iter().filter(|d| d.state != State::Dead).collect();
    if inner.is_empty() {
        return Ok(());
    }
    let one = |d: &&Device| format!("{} ({})", d.node().display(), d.base().display());
    let end = |d: &&Device| format!("ploop umount -d {}", d.node().display());
    bail!(
        Umount,
        "{} has images of other disks that run: {}; unmount them first ({}); nothing was changed",
        device.node().display(),
        inner.iter().map(one).collect::<Vec<_>>().join(", "),
        inner.iter().map(end).collect::<Vec<_>>().join("; ")
    )
}

fn umount(device: &Device, disk: Option<&Descriptor>, rescue: Option<Rescue>) -> Result<()> {
    let mounts = find::mounts_of(device)?;
    refuse_nested(device, &mounts)?;
    if let (Some(disk), Some(first)) = (disk.filter(|_| device.component().is_empty()), mounts.first())
        && let Err(e) = remember(disk, &first.target)
        && e.errno() != Some(libc::EROFS)
    {
        report::warn(format_args!("the file system's size is not remembered: {e}"));
    }
    let full = device.state == State::NoSpace;
    if full {
        report::warn(format_args!(
            "{}: writes wait for space (the host's file system is full, or a quota is used up); those that find none fail now",
            device.node().display()
        ));
        device::hold_for_space(device.name(), false)?;
    }
    let names = find::names(device);
    let ended = mount::umount_all(&names).and_then(|()| elsewhere::umount_all(&names)).and_then(|()| match rescue {
        Some(rescue) => detach_and_save(device, rescue),
        None => detach(device),
    });
    if ended.is_err() && full {
        // The device is still in use: its writes wait for space as before. If even that fails the device is detached or
        // dead.
        let _ = device::hold_for_space(device.name(), true);
    }
    ended?;
    for mount in &mounts {
        // What is left there of a mount by mount(8) would only be out of date.
        let _ = utab::remove(&mount.target);
    }
    if let Some(Ok(place)) = disk.map(temporary_mount_point) {
        remove_mount_point(&place);
    }
    report::say(0, format_args!("{} is detached", device.node().display()));
    Ok(())
}

/// What is in use is reported by one code, whether processes use the file system or the device.
fn detach(device: &Device) -> Result<()> {
    device::detach(device.name()).map_err(|e| if e.kind() == Kind::DevIoc { e.as_kind(Kind::Umount) } else { e })
}

/// The copies of deleted images get their names before the server closes the images, and what closing changed after it.
fn detach_and_save(device: &Device, mut rescue: Rescue) -> Result<()> {
    if let Err(e) = rescue.publish(device) {
        return Err(e.context(format!("{} is unmounted, but still attached", device.node().display())));
    }
    match detach(device) {
        Ok(()) => rescue.finish(),
        // Nothing has changed: the device has its images, and the copies would only be in the way.
        Err(e) if e.kind() == Kind::Umount && runs_on(device) => {
            rescue.withdraw();
            Err(e)
        }
        Err(e) => {
            // The server ends the device in spite of the error, perhaps later: the copies are all that there is then.
            if let Err(more) = rescue.finish() {
                report::warn(more);
            }
            Err(e)
        }
    }
}

/// The device is there as it was, with the same images.
fn runs_on(device: &Device) -> bool {
    let now = device::by_node(device.name()).ok().flatten();
    now.is_some_and(|now| now.state == State::Running && now.rdev == device.rdev && now.top_id() == device.top_id())
}

fn remember(disk: &Descriptor, mount_point: &Path) -> Result<()> {
    let folder = open::place_beside(&disk.first_image()?.file, &disk.dir)?.folder;
    FsInfo::of(mount_point)?.store(&folder).map_err(|e| {
        Error::with(Kind::Write, format!("cannot write {}", folder.join(crate::fs::stat::FILE).display()), e)
    })
}

/// Where operations that need the file system for a moment mount it.
pub fn temporary_mount_point(disk: &Descriptor) -> Result<Place> {
    Ok(open::place_beside(&disk.first_image()?.file, &disk.dir)?.suffixed(".mnt"))
}

/// Removes that folder if it is there and empty.
pub(super) fn remove_mount_point(place: &Place) {
    match store::remove_dir(place) {
        Err(e) if !matches!(e.kind(), NotFound | NotADirectory | ReadOnlyFilesystem) => {
            report::say(1, format_args!("{} stays: {e}", place.display()));
        }
        _ => {}
    }
}

//! A disk in /etc/fstab: what mount(8) and umount(8) ask of their helpers, so that the disk behaves as other disks do. Its
//! device lives as long as it is mounted.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::mount::{self as disks, MountParams};
use super::{find, umount as ends};
use crate::bail;
use crate::descriptor::Descriptor;
use crate::device::{Device, State};
use crate::error::{IoContext, Kind, Result};
use crate::fs::mount::{self, MountSpec};
use crate::fs::mounts::{self, Mount};
use crate::fs::utab;
use crate::report;

/// The option that is the device's, not the file system's.
const AUTO_COMPACT: &str = "auto_compact";

/// How long a device may take to end.
const ENDING: Duration = Duration::from_secs(20);

/// Mounts a disk, given by its descriptor or image, or with option `remount` changes how it is mounted. `fake`: only what
/// can be checked beforehand. False: nothing was to be done.
pub fn mount(disk: &Path, folder: &Path, options: &str, fake: bool) -> Result<bool> {
    let word = |wanted: &str| options.split(',').any(|w| w == wanted);
    let folder = fs::canonicalize(folder).ctx(Kind::Param, || folder.display().to_string())?;
    if !folder.is_dir() {
        bail!(Param, "{} is not a folder", folder.display());
    }
    let disk = match fs::canonicalize(disk) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && word("nofail") => {
            report::say(0, format_args!("{} is not there: left out (nofail)", disk.display()));
            return Ok(false);
        }
        other => other.ctx(Kind::Param, || disk.display().to_string())?,
    };
    if !disk.is_file() {
        bail!(Param, "{} is not a file: a DiskDescriptor.xml is wanted", disk.display());
    }
    let here = find::by_mount_point(&folder)?;
    let mounted = here.as_ref().filter(|(device, _)| runs(&disk, device));
    if word("remount") {
        let Some((_, at)) = mounted else { bail!(Mount, "{} is not mounted at {}", disk.display(), folder.display()) };
        return if fake { Ok(false) } else { mount::remount(at, options).map(|()| false) };
    }
    if mounted.is_some() {
        // `mount -a` asks for each line of fstab: it cannot know that this disk is there already.
        report::say(0, format_args!("{} is mounted at {} already", disk.display(), folder.display()));
        return Ok(false);
    }
    if here.is_some() || mounts::is_mount_point(&folder)? {
        bail!(Param, "{} is a mount point already", folder.display());
    }
    if fake {
        return Ok(true);
    }
    attach_and_mount(&disk, &folder, options)?;
    Ok(true)
}

fn attach_and_mount(disk: &Path, folder: &Path, options: &str) -> Result<()> {
    let read_only = options.split(',').fold(false, |ro, word| match word {
        "ro" => true,
        "rw" => false,
        _ => ro,
    });
    // Options for fstab only are dropped where the file system is mounted.
    let passed: Vec<&str> = options.split(',').filter(|w| !matches!(*w, "ro" | "rw" | "" | AUTO_COMPACT)).collect();
    let params = MountParams {
        read_only,
        until_unmounted: true,
        auto_compact: options.split(',').any(|w| w == AUTO_COMPACT),
        target: Some(folder.to_owned()),
        options: (!passed.is_empty()).then(|| passed.join(",")),
        ..MountParams::default()
    };
    if !mount_attached(disk, folder, &params)? {
        match is_descriptor(disk) {
            true => disks::mount_descriptor(disk, "", &params)?,
            false => disks::mount_list(std::slice::from_ref(&disk.to_owned()), false, &params)?,
        };
    }
    let Some((_, at)) = find::by_mount_point(folder)? else { return Ok(()) };
    if let Err(e) = utab::add(&at.source, &at.target) {
        report::warn(format_args!(
            "/run/mount/utab cannot be changed ({e}): after umount {} its device ends a moment later",
            at.target.display()
        ));
    }
    Ok(())
}

/// Mounts the device that the disk has already: its last mount has just gone, or it was only attached. False: there is
/// none any more.
fn mount_attached(disk: &Path, folder: &Path, params: &MountParams) -> Result<bool> {
    let Some(device) = device_of(disk)?.filter(|d| d.state != State::Dead) else { return Ok(false) };
    if !find::mounts_of(&device)?.is_empty() {
        return Ok(false);
    }
    if device.read_only == params.read_only {
        let spec = MountSpec { read_only: params.read_only, options: params.options.clone(), ..MountSpec::default() };
        let mounted = disks::source_of(&device, params).and_then(|source| mount::mount_device(&source, folder, &spec));
        let Err(e) = mounted else { return Ok(true) };
        // Perhaps it was just ending.
        let until = Instant::now() + ENDING;
        loop {
            match device_of(disk)? {
                None => return Ok(false),
                Some(d) if d.state.runs() || Instant::now() >= until => return Err(e),
                Some(_) => sleep(Duration::from_millis(20)),
            }
        }
    }
    ends::umount_device(device.name(), None)?;
    Ok(false)
}

fn is_descriptor(disk: &Path) -> bool {
    disk.extension().is_some_and(|e| e == "xml")
}

fn device_of(disk: &Path) -> Result<Option<Device>> {
    match is_descriptor(disk) {
        true => {
            let place = Descriptor::find(disk)?;
            Ok(find::devices_of(&place, &Descriptor::read_at(&place)?, Some(""))?.into_iter().next())
        }
        false => find::of_base(disk, ""),
    }
}

fn runs(disk: &Path, device: &Device) -> bool {
    device_of(disk).is_ok_and(|own| own.is_some_and(|own| own.name() == device.name()))
}

/// Unmounts what is at a mount point, and ends the device if that was its last mount. `lazy`: the mount goes at once, the
/// device as soon as no process uses it any more.
pub fn umount(folder: &Path, lazy: bool) -> Result<()> {
    let Some((device, at)) = find::by_mount_point(folder)? else {
        bail!(Param, "{} is not the mount point of a ploop device", folder.display())
    };
    let ended = end(&device, &at, folder, lazy);
    if ended.is_ok()
        && let Err(e) = utab::remove(&at.target)
    {
        report::warn(format_args!("/run/mount/utab cannot be changed: {e}"));
    }
    ended
}

fn end(device: &Device, at: &Mount, folder: &Path, lazy: bool) -> Result<()> {
    match find::mounts_of(device)?.len() {
        _ if lazy => mount::umount_lazily(&at.target),
        0 | 1 => ends::umount_mountpoint(folder),
        _ => mount::umount(&at.target),
    }
}

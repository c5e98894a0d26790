//! The disk whose balloon is meant: its device, and the root of the file system that is mounted from it.

use std::path::Path;

use crate::bail;
use crate::descriptor::Descriptor;
use crate::device::{self, Device, State};
use crate::error::{Error, Kind, Result};
use crate::fs::balloon::Root;
use crate::ops::{find, inside};

/// See the module.
#[derive(Debug)]
pub struct Target {
    pub device: Device,
    pub root: Root,
}

impl Target {
    /// By the device's node; the mount is looked up, in the caller's mount namespace first, then in all others. `Param`: it is
    /// not there, or not mounted.
    pub fn by_device(node: &str) -> Result<Target> {
        let device = by_node(node, Kind::Param)?;
        let root = root_of(&device)?;
        Ok(Target { device, root })
    }

    /// By its mount point. `Param`: it is none of a ploop device.
    pub fn by_mount(folder: &Path) -> Result<Target> {
        match find::by_mount_point(folder)? {
            Some((device, _)) => Ok(Target { device, root: Root::open(folder)? }),
            None => bail!(Param, "{} is not the mount point of a ploop device", folder.display()),
        }
    }

    /// By both; neither is looked up, but the one must be mounted from the other. `Open`: no such device.
    pub fn by_both(node: &str, folder: &Path) -> Result<Target> {
        let device = by_node(node, Kind::Open)?;
        let root = Root::open(folder)?;
        match find::names(&device).devs.contains(&root.dev) {
            true => Ok(Target { device, root }),
            false => bail!(Param, "{} is not mounted from {}", folder.display(), device.node().display()),
        }
    }

    /// By the descriptor of a running disk. `Param`: it does not run, or is not mounted.
    pub fn by_disk(descriptor: &Path) -> Result<Target> {
        let place = Descriptor::find(descriptor)?;
        let found = find::devices_of(&place, &Descriptor::read_at(&place)?, Some(""))?;
        let Some(device) = found.into_iter().next() else {
            bail!(Param, "{} does not run: a balloon can be changed while its disk is mounted", place.display())
        };
        let root = root_of(&device)?;
        Ok(Target { device, root })
    }
}

/// A device by its node; `kind`: of the error if there is none.
pub fn by_node(node: &str, kind: Kind) -> Result<Device> {
    let found = device::by_node(node).map_err(|e| e.as_kind(kind))?;
    let none = || Error::new(kind, format!("{node} is no ploop device that this machine runs; ploop list shows them"));
    found.filter(|d| d.state != State::Dead).ok_or_else(none)
}

/// The root of the file system that is mounted from a device.
pub fn root_of(device: &Device) -> Result<Root> {
    let node = device.node().display();
    let mut why = None;
    for (path, mount) in inside::mounts_everywhere(device)? {
        match Root::open(&path) {
            // Not what another mount has hidden.
            Ok(root) if root.dev == mount.dev => return Ok(root),
            Ok(_) => {}
            Err(e) => why = Some(e),
        }
    }
    match why {
        Some(e) => Err(e.context(format_args!("{node} has no balloon that can be reached"))),
        None => bail!(Param, "{node} is not mounted: a balloon can be changed while its file system is mounted"),
    }
}

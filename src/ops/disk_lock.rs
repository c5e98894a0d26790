//! The lock on a disk, where the disk's own server may hold it for the length of a merge.
//!
//! A merge of a running disk goes on when its caller is killed, and one that an interrupted merge left goes on after the
//! mount: the supervisor holds the lock until the descriptor is changed. Such a merge changes neither the images that the
//! device has nor whether it runs, so queries and the end of the device need no lock of their own meanwhile.

use std::ops::Deref;
use std::path::Path;
use std::time::{Duration, Instant};

use super::find;
use crate::descriptor::{Descriptor, LockedDescriptor};
use crate::device::Device;
use crate::error::{Error, Kind, Result};
use crate::sys::folder::Place;
use crate::sys::host;

/// Between two looks at the devices of a disk whose lock is held.
const LOOK: Duration = Duration::from_millis(300);

/// Locks a descriptor, as long as the function says that it is to wait.
type Lock = fn(&Path, &mut dyn FnMut() -> bool) -> Result<LockedDescriptor>;

/// A disk: locked, or with a merge in its own server, which holds the lock.
pub enum Disk {
    Locked(LockedDescriptor),
    Merging { place: Place, descriptor: Descriptor },
}

impl Disk {
    /// Locks a disk, unless its own server merges it.
    pub fn open(path: &Path) -> Result<Disk> {
        Disk::unless_merging(path, LockedDescriptor::open_waiting)
    }

    /// The same for operations that write nothing there; see [`LockedDescriptor::open_to_look`].
    pub fn look(path: &Path) -> Result<Disk> {
        Disk::unless_merging(path, LockedDescriptor::look_waiting)
    }

    fn unless_merging(path: &Path, lock: Lock) -> Result<Disk> {
        let mut looks = Looks::default();
        match lock(path, &mut || looks.merging(path).is_none()) {
            Err(_) if looks.found.is_some() => {
                let place = Descriptor::find(path)?;
                let descriptor = Descriptor::read_at(&place).map_err(|e| e.as_kind(Kind::Lock))?;
                Ok(Disk::Merging { place, descriptor })
            }
            other => other.map(Disk::Locked),
        }
    }

    /// The device that runs it under exactly this component.
    pub fn device(&self, component: &str) -> Result<Option<Device>> {
        Ok(find::devices_of(self.place(), self, Some(component))?.into_iter().next())
    }

    pub fn place(&self) -> &Place {
        match self {
            Disk::Locked(disk) => &disk.place,
            Disk::Merging { place, .. } => place,
        }
    }
}

impl Deref for Disk {
    type Target = Descriptor;

    fn deref(&self) -> &Descriptor {
        match self {
            Disk::Locked(disk) => disk,
            Disk::Merging { descriptor, .. } => descriptor,
        }
    }
}

/// Locks a disk for an operation that changes it. Waits for another operation as [`LockedDescriptor::open`] does; if that
/// is a merge in the disk's own server, the error says so.
pub fn open(path: &Path) -> Result<LockedDescriptor> {
    told(path, LockedDescriptor::open(path))
}

/// The same for an operation that may find that it cannot write there; see [`LockedDescriptor::open_to_look`].
pub fn open_to_look(path: &Path) -> Result<LockedDescriptor> {
    told(path, LockedDescriptor::open_to_look(path))
}

fn told(path: &Path, locked: Result<LockedDescriptor>) -> Result<LockedDescriptor> {
    locked.map_err(|e| match (e.kind(), Looks::default().merging(path)) {
        (Kind::Lock, Some(device)) => {
            let (done, all) = device.merging.unwrap_or_default();
            Error::new(
                Kind::Lock,
                format!(
                    "{e}; snapshots of it are being merged while {} runs ({done} of {all} clusters): wait for the end \
                     (ploop list shows it), or unmount the disk, and the next mount begins the merge anew",
                    device.node().display()
                ),
            )
        }
        _ => e,
    })
}

/// Looks, now and then, whether a device of the disk merges.
#[derive(Default)]
struct Looks {
    next: Option<Instant>,
    found: Option<Device>,
}

impl Looks {
    fn merging(&mut self, path: &Path) -> Option<&Device> {
        let now = host::now();
        if self.found.is_none() && self.next.is_none_or(|at| at <= now) {
            self.next = Some(now + LOOK);
            let devices = find::devices(path, None).unwrap_or_default();
            self.found = devices.into_iter().find(|d| d.merging.is_some());
        }
        self.found.as_ref()
    }
}

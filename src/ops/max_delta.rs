//! The limit of the top's file: kept in the descriptor, and enforced by the device while the disk runs.

use std::path::Path;

use super::{disk_lock, image_set};
use crate::descriptor::Descriptor;
use crate::device::{self, Device};
use crate::error::Result;
use crate::report;

/// Limits the top's file to `sectors`, 0: no limit. A running disk has the limit from now on: a write that needs more space
/// in the file fails; what the file has already stays. A raw top has no such limit, the delta that comes above it has.
pub fn set_max_delta_size(descriptor: &Path, sectors: u64) -> Result<()> {
    let _operation = report::cancel::begin();
    let mut disk = disk_lock::open(descriptor)?;
    let running = image_set::writer(&disk)?;
    let former = disk.max_delta_size;
    if let Some(device) = &running {
        device::limit_top(device, sectors)?;
    }
    let mut next = disk.descriptor.clone();
    next.max_delta_size = sectors;
    disk.commit_as(next).inspect_err(|_| {
        // The device goes on as the descriptor says. That it does not is seen at the next mount at the latest.
        if let Some(device) = &running {
            let _ = device::limit_top(device, former);
        }
    })
}

/// Limits the top of a device that was just attached for writing. After an error the device is detached.
pub(super) fn at_mount(disk: &Descriptor, device: Device) -> Result<Device> {
    if disk.max_delta_size == 0 || device.read_only {
        return Ok(device);
    }
    match device::limit_top(&device, disk.max_delta_size) {
        Ok(()) => Ok(device),
        Err(e) => {
            if let Err(undo) = device::detach(device.name()) {
                report::warn(format_args!("{} stays: {undo}", device.node().display()));
            }
            Err(e)
        }
    }
}

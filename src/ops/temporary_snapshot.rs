//! The devices that show temporary snapshots: finds those that no process uses any more, and ends them.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use nix::unistd::geteuid;

use super::find::UNTIL_UMOUNT;
use super::{find, image_set, umount};
use crate::descriptor::LockedDescriptor;
use crate::device::{self, Device};
use crate::error::Result;
use crate::format::guid::Guid;
use crate::report;
use crate::sys::file_id::FileId;

/// Ends the devices that show this temporary snapshot if no process uses them. False: one does. As a lower delta of other
/// devices it can be merged.
pub fn end_idle(disk: &LockedDescriptor, guid: &Guid) -> Result<bool> {
    let Some(image) = disk.image(guid) else { return Ok(false) };
    let Ok(id) = FileId::at(&image.file) else { return Ok(false) };
    // Another disk may show the same file.
    let shows = |d: &&Device| d.top_id() == Some(id) && find::is_of(disk, d);
    for device in image_set::users(&image.file)?.iter().filter(shows) {
        let node = device.node().display();
        if !idle(device) {
            return Ok(false);
        }
        match umount::umount_device(device.name(), None) {
            Ok(()) => {
                report::say(0, format_args!("{node}, the device of temporary snapshot {guid}, was used by no process"))
            }
            Err(e) => {
                report::say(1, format_args!("{node} stays: {e}"));
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// No process has the device of a temporary snapshot open (a mount may have), and the snapshot was not taken to stay
/// until it is unmounted. If that cannot be found out the device counts as used.
pub(super) fn idle(device: &Device) -> bool {
    if !device.read_only || device.component().is_empty() || device.component().starts_with(UNTIL_UMOUNT) {
        return false;
    }
    if !geteuid().is_root() {
        return false;
    }
    let mut disks = vec![device.rdev];
    let Ok(partitions) = device::partitions(device) else { return false };
    disks.extend(partitions.iter().map(|p| p.rdev));
    let Ok(processes) = fs::read_dir("/proc") else { return false };
    for process in processes.flatten() {
        let name = process.file_name();
        if !name.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        // A process that has exited has nothing open.
        let Ok(open) = fs::read_dir(process.path().join("fd")) else { continue };
        for file in open.flatten().map(|f| f.path()) {
            // Looks only at files that may be the device: a stat of a file whose FUSE server is gone would wait.
            let Ok(link) = fs::read_link(&file) else { continue };
            let target = link.file_name().unwrap_or_default().as_encoded_bytes();
            if !target.starts_with(device.name.as_bytes()) && !target.starts_with(device.disk.as_bytes()) {
                continue;
            }
            if fs::metadata(&file).is_ok_and(|m| m.file_type().is_block_device() && disks.contains(&m.rdev())) {
                return false;
            }
        }
    }
    true
}

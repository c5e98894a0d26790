//! Freezes the file systems of a running device.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;

use crate::device::{self, Device, Freeze};
use crate::error::Result;
use crate::fs::mounts::{self, Mount};
use crate::ops::{find, inside};
use crate::sys::host;

/// What is mounted from the device in any mount namespace, ready to be frozen until the returned value is dropped. What
/// these file systems have in memory is being written back.
pub fn prepare(device: &Device) -> Result<Box<dyn Freeze>> {
    device::freeze(device, mounted(device)?)
}

/// One open folder of each file system that is mounted from the device in any mount namespace.
fn mounted(device: &Device) -> Result<Vec<File>> {
    if host::is_simulated() {
        // Its programs use the block device itself.
        return Ok(Vec::new());
    }
    let names = find::names(device);
    mounts_that(&|m| names.mounted_by(m))
}

/// One open folder of each file system that has a mount, in any mount namespace, which is `wanted`.
pub fn mounts_that(wanted: &dyn Fn(&Mount) -> bool) -> Result<Vec<File>> {
    let mut found = BTreeSet::new();
    let mut files = Vec::new();
    for (path, mount) in inside::mounts_that(wanted)? {
        if found.contains(&mount.dev) {
            continue;
        }
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOATIME).open(&path);
        // Another mount may hide it.
        let Ok(file) = file else { continue };
        if mounts::id_of(&file) == Some(mount.id) {
            found.insert(mount.dev);
            files.push(file);
        }
    }
    Ok(files)
}

//! Which names new devices may have: ploopN stands for the minor N * 16 of the classic driver.
#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::server::{runtime, stopped};
use crate::sys::file_lock::{self, ByteLock};
#[cfg(test)]
use crate::sys::host;

/// Minors of each device, partitions included.
pub const PER_DEVICE: u32 = 16;

/// Byte N of it is locked by the process that has reserved ploopN.
const FILE: &str = "/var/lock/ploop/minors";

/// The file with the locks.
pub fn file() -> PathBuf {
    #[cfg(test)]
    if let Some(root) = host::root() {
        return root.join("lock/minors");
    }
    FILE.into()
}

/// A node, a block device of the kernel's or a folder of ours has this name.
pub fn is_taken(name: &str) -> bool {
    fs::symlink_metadata(runtime::dev_dir().join(name)).is_ok()
        || Path::new("/sys/class/block").join(name).exists()
        || fs::symlink_metadata(runtime::device_dir(name)).is_ok()
}

/// The name belongs to a device that is stopped, or a process has reserved it: only a caller that asks for it by name
/// gets it.
pub fn is_reserved(name: &str) -> bool {
    if stopped::is_recorded(name) {
        return true;
    }
    let Some(number) = runtime::number(name) else { return false };
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(file());
    file.is_ok_and(|file| !reserve(&file, number).unwrap_or(true))
}

/// Reserves a name as long as the file is open; false: another process has it.
pub fn reserve(file: &File, number: u32) -> std::io::Result<bool> {
    match file_lock::lock_byte(file, i64::from(number), ByteLock::Exclusive, false) {
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(false),
        other => other.map(|()| true),
    }
}

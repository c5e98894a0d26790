//! Block devices as /sys shows them; opens no device.
#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;

use nix::sys::stat::makedev;

#[cfg(test)]
use crate::sys::host;

/// Device number and disk sequence number (0: the kernel has none) of a whole disk, from /sys; opens nothing.
pub fn disk_identity(backing: &str) -> Option<(u64, u64)> {
    #[cfg(test)]
    if host::is_simulated() {
        return crate::lives::transport::disk_identity(backing);
    }
    let dir = Path::new("/sys/block").join(backing);
    let (major, minor) = parse_dev(&fs::read_to_string(dir.join("dev")).ok()?)?;
    let seq = fs::read_to_string(dir.join("diskseq")).ok().and_then(|s| s.trim().parse().ok()).unwrap_or(0);
    Some((makedev(major, minor), seq))
}

/// `7:10000`, as /sys writes it.
pub fn parse_dev(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

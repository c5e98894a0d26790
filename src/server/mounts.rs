//! Mounts of a device, in any mount namespace that this process may look into.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::stat::makedev;

use crate::server::partitions;
use crate::server::sysfs::parse_dev;
use crate::sys::processes;

/// Where a device is mounted. Octal escapes are not decoded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mounted {
    pub point: String,
    /// A process in the mount namespace, unless that is ours.
    pub elsewhere: Option<u32>,
}

impl fmt::Display for Mounted {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.point)?;
        match self.elsewhere {
            Some(pid) => write!(f, " in the mount namespace of process {}", processes::shown(&pid.to_string())),
            None => Ok(()),
        }
    }
}

/// Where a device with one of these numbers is mounted; `None`: nowhere.
pub fn mounted_anywhere(rdevs: &[u64]) -> Option<Mounted> {
    if crate::sys::host::is_simulated() {
        return None;
    }
    let own = fs::read_to_string("/proc/self/mountinfo").ok().and_then(|text| find(&text, rdevs));
    if let Some(point) = own {
        return Some(Mounted { point, elsewhere: None });
    }
    let mut seen: BTreeSet<u64> = fs::metadata("/proc/self/ns/mnt").iter().map(MetadataExt::ino).collect();
    let processes = fs::read_dir("/proc").ok()?;
    for entry in processes.flatten() {
        let process = entry.path();
        // Each namespace once.
        let Ok(ns) = fs::metadata(process.join("ns/mnt")) else { continue };
        if !seen.insert(ns.ino()) {
            continue;
        }
        let found = fs::read_to_string(process.join("mountinfo")).ok().and_then(|text| find(&text, rdevs));
        if let Some(point) = found {
            return Some(Mounted { point, elsewhere: entry.file_name().to_str().and_then(|n| n.parse().ok()) });
        }
    }
    None
}

/// Device numbers of a disk and its partitions.
pub fn numbers(backing: &str, rdev: u64) -> Vec<u64> {
    let mut all = vec![rdev];
    all.extend(partitions::known(backing).iter().map(|p| p.rdev));
    all
}

fn find(mountinfo: &str, rdevs: &[u64]) -> Option<String> {
    mountinfo.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (major, minor) = parse_dev(fields.nth(2)?)?;
        let point = fields.nth(1)?;
        // File systems with anonymous numbers (btrfs) name the device as their source.
        let source = line.split_once(" - ").and_then(|(_, right)| right.split(' ').nth(1));
        let by_source =
            || source.filter(|s| s.starts_with("/dev/")).and_then(|s| super::nodes::block_node(Path::new(s)));
        let hit =
            rdevs.contains(&makedev(major, minor)) || (major == 0 && by_source().is_some_and(|r| rdevs.contains(&r)));
        hit.then(|| point.to_string())
    })
}

/// Minor number of the file system mounted at `point` in this namespace, without touching the file system.
pub fn anonymous_number(point: &Path) -> Option<u64> {
    let text = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let point = point.to_str()?;
    text.lines().rev().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        (fields.get(4) == Some(&point)).then(|| parse_dev(fields[2]).map(|(_, minor)| minor))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_by_number() {
        let text = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw\n\
                    37 35 7:10000 / /a\\040b rw - ext4 /dev/ploop0 rw\n";
        assert_eq!(find(text, &[makedev(7, 10000)]), Some("/a\\040b".into()));
        assert_eq!(find(text, &[makedev(7, 1)]), None);
        assert!(mounted_anywhere(&[makedev(511, 3)]).is_none());
        // No process has this number.
        let there = Mounted { point: "/a".into(), elsewhere: Some(u32::MAX) };
        assert_eq!(there.to_string(), format!("/a in the mount namespace of process {}", u32::MAX));
        assert!(anonymous_number(Path::new("/proc")).is_some());
    }
}

//! The file systems that are mounted from a running device, in whatever mount namespace.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::device::Device;
use crate::error::{IoContext, Kind, Result};
use crate::fs::mounts::{self, Mount};
use crate::ops::find;

/// Each mount of the device in each mount namespace, that of the calling process first, with a path by which this process
/// reaches it. Another mount may hide it, so that the path leads elsewhere.
pub fn mounts_everywhere(device: &Device) -> Result<Vec<(PathBuf, Mount)>> {
    let names = find::names(device);
    mounts_that(&|m| names.mounted_by(m))
}

/// The same of the mounts that are `wanted`.
pub fn mounts_that(wanted: &dyn Fn(&Mount) -> bool) -> Result<Vec<(PathBuf, Mount)>> {
    let mut namespaces = BTreeSet::new();
    let mut found = Vec::new();
    let own = Path::new("/proc/self");
    let mut processes = vec![own.to_owned()];
    let others = fs::read_dir("/proc").ctx(Kind::Sys, || "cannot list /proc")?;
    processes.extend(others.flatten().map(|e| e.path()));
    for process in processes {
        let Ok(ns) = fs::metadata(process.join("ns/mnt")) else { continue };
        if !namespaces.insert(ns.ino()) {
            continue;
        }
        // The process may exit at any time.
        let Ok(table) = mounts::read_of(&process) else { continue };
        for mount in table.into_iter().filter(|m| wanted(m)) {
            let Ok(inside) = mount.target.strip_prefix("/") else { continue };
            let path = match process == own {
                true => mount.target.clone(),
                false => process.join("root").join(inside),
            };
            found.push((path, mount));
        }
    }
    Ok(found)
}

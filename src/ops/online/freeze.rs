//! The file systems of a running device at rest, for as long as a value lives.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use crate::bail;
use crate::device::Device;
use crate::error::{IoContext, Kind, Result};
use crate::fs::mounts;
use crate::ops::find;
use crate::report;
use crate::server::helper::{JobEvent, remote_error};
use crate::server::proto::Command;
use crate::server::{control, frame, freeze, runtime};

/// Writing back a host's memory takes its time.
const FREEZE: Duration = Duration::from_secs(300);
/// Thawing writes a block.
const THAW: Duration = Duration::from_secs(60);

/// Frozen file systems; dropping thaws them. If this process ends, the process that holds the freeze thaws them.
#[derive(Debug)]
pub struct Frozen {
    /// None: thawed, or nothing was mounted.
    owner: Option<OwnedFd>,
    files: Vec<File>,
}

impl Frozen {
    /// Freezes what is mounted from the device in any mount namespace; those that cannot be frozen are synced.
    pub fn start(device: &Device) -> Result<Frozen> {
        let files = mounted(device)?;
        if files.is_empty() {
            return Ok(Frozen { owner: None, files });
        }
        let (mine, theirs) = frame::pair()?;
        let mut fds: Vec<BorrowedFd> = vec![theirs.as_fd()];
        fds.extend(files.iter().map(AsFd::as_fd));
        let dir = runtime::device_dir(device.name());
        control::ask_with(&dir, &Command::Freeze, &fds, Duration::from_secs(10))?.0.into_result()?;
        drop(theirs);
        let mut frozen = Frozen { owner: Some(mine), files };
        match frozen.hear(FREEZE)? {
            Some(JobEvent::Frozen) => Ok(frozen),
            Some(JobEvent::Error { code, message }) => {
                frozen.owner = None;
                Err(remote_error(code, message))
            }
            _ => bail!(Sys, "the process that was to freeze the file system of {} died", device.node().display()),
        }
    }

    /// Thaws. An error: they were not frozen all the time, or are still.
    pub fn thaw(&mut self) -> Result<()> {
        let Some(owner) = &self.owner else { return Ok(()) };
        // If it has died this fails, and the answer tells.
        let _ = freeze::let_go(owner.as_fd());
        let heard = self.hear(THAW);
        self.owner = None;
        match heard? {
            Some(JobEvent::Error { code, message }) => Err(remote_error(code, message)),
            Some(_) => Ok(()),
            None => freeze::thaw_directly(&self.files),
        }
    }

    fn hear(&self, limit: Duration) -> Result<Option<JobEvent>> {
        match &self.owner {
            Some(owner) => Ok(frame::recv_within::<JobEvent>(owner, limit)?.map(|(event, _)| event)),
            None => Ok(None),
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Err(e) = self.thaw() {
            report::warn(e);
        }
    }
}

/// One open folder of each file system that is mounted from the device.
fn mounted(device: &Device) -> Result<Vec<File>> {
    let names = find::names(device);
    let mut namespaces = BTreeSet::new();
    let mut found = BTreeSet::new();
    let mut files = Vec::new();
    let mut processes = vec![Path::new("/proc/self").to_owned()];
    let others = fs::read_dir("/proc").ctx(Kind::Sys, || "cannot list /proc")?;
    processes.extend(others.flatten().map(|e| e.path()));
    for process in processes {
        let Ok(ns) = fs::metadata(process.join("ns/mnt")) else { continue };
        if !namespaces.insert(ns.ino()) {
            continue;
        }
        // It may end at any time.
        let Ok(table) = mounts::read_of(&process) else { continue };
        for mount in table.iter().filter(|m| names.mounted_by(m)) {
            if found.contains(&mount.dev) {
                continue;
            }
            let Ok(inside) = mount.target.strip_prefix("/") else { continue };
            let path = process.join("root").join(inside);
            let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOATIME).open(&path);
            // Another mount may hide it.
            let Ok(file) = file else { continue };
            if file.metadata().is_ok_and(|m| m.dev() == mount.dev) {
                found.insert(mount.dev);
                files.push(file);
            }
        }
    }
    Ok(files)
}

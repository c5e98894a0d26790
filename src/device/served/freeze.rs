//! Freezes file systems of a running device until a value is dropped. A helper process of the supervisor keeps them
//! frozen.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::bail;
use crate::device::driver::Freeze;
use crate::device::model::Device;
use crate::error::Result;
use crate::report;
use crate::server::helper::remote_error;
use crate::server::jobs::JobEvent;
use crate::server::proto::Command;
use crate::server::{control, frame, freeze, runtime};

/// Limit for freezing, in which the kernel writes back dirty memory.
const FREEZE: Duration = Duration::from_secs(300);
/// Limit for thawing, in which the kernel writes a block.
const THAW: Duration = Duration::from_secs(60);

/// Frozen file systems; dropping thaws them. When this process exits, the helper process thaws them.
#[derive(Debug)]
pub(super) struct Frozen {
    /// None: thawed, or nothing was mounted.
    owner: Option<OwnedFd>,
    files: Vec<File>,
}

impl Frozen {
    /// Freezes the file systems of these files; those that cannot be frozen are synced.
    pub fn start(device: &Device, files: Vec<File>) -> Result<Frozen> {
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
            _ => bail!(Sys, "the helper process that freezes the file system of {} exited", device.node().display()),
        }
    }

    fn hear(&self, limit: Duration) -> Result<Option<JobEvent>> {
        match &self.owner {
            Some(owner) => Ok(frame::recv_within::<JobEvent>(owner, limit)?.map(|(event, _)| event)),
            None => Ok(None),
        }
    }
}

impl Freeze for Frozen {
    fn thaw(&mut self) -> Result<()> {
        let Some(owner) = &self.owner else { return Ok(()) };
        // If the helper has exited this fails, no answer follows, and this process thaws.
        let _ = freeze::let_go(owner.as_fd());
        let heard = self.hear(THAW);
        self.owner = None;
        match heard? {
            Some(JobEvent::Error { code, message }) => Err(remote_error(code, message)),
            Some(_) => Ok(()),
            None => freeze::thaw_directly(&self.files),
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

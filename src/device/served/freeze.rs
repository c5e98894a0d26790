//! Freezes file systems of a running device until a value is dropped. A helper process of the supervisor keeps them
//! frozen.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};

use crate::bail;
use crate::device::driver::Freeze;
use crate::device::model::Device;
use crate::error::Result;
use crate::report;
use crate::server::helper::remote_error;
use crate::server::jobs::JobEvent;
use crate::server::proto::Command;
use crate::server::{control, frame, freeze, runtime};
use crate::sys::host;

/// Limit for freezing, in which the kernel writes back dirty memory.
const FREEZE: Duration = Duration::from_secs(300);
/// Limit for thawing, in which the kernel writes a block.
const THAW: Duration = Duration::from_secs(60);
/// Limit for the exit of a helper that has nothing more to do.
const EXIT: Duration = Duration::from_secs(2);

/// File systems that are to be frozen; dropping thaws them. When this process exits, the helper process thaws them.
#[derive(Debug)]
pub(super) struct FreezeHelper {
    /// The device's folder.
    dir: PathBuf,
    /// The helper; none: there is none yet, or any more.
    helper: Option<OwnedFd>,
    files: Vec<File>,
    frozen: bool,
}

impl FreezeHelper {
    /// Has a helper write back what the file systems of these files have in memory, without waiting for it.
    pub fn prepare(device: &Device, files: Vec<File>) -> FreezeHelper {
        let mut prepared = FreezeHelper { dir: runtime::device_dir(device.name()), helper: None, files, frozen: false };
        if !prepared.files.is_empty() {
            // A server that does not know the command, or is about to end, says so again when they are to be frozen.
            prepared.helper = prepared.start(&Command::PrepareFreeze).ok();
        }
        prepared
    }

    fn start(&self, command: &Command) -> Result<OwnedFd> {
        let (mine, theirs) = frame::pair()?;
        let mut fds: Vec<BorrowedFd> = vec![theirs.as_fd()];
        fds.extend(self.files.iter().map(AsFd::as_fd));
        control::ask_with(&self.dir, command, &fds, Duration::from_secs(10))?.0.into_result()?;
        Ok(mine)
    }

    fn await_frozen(&mut self) -> Result<()> {
        match self.hear(FREEZE)? {
            Some(JobEvent::Frozen) => {
                self.frozen = true;
                Ok(())
            }
            Some(JobEvent::Error { code, message }) => {
                self.helper = None;
                Err(remote_error(code, message))
            }
            _ => {
                self.helper = None;
                bail!(Sys, "the helper process that freezes the file systems of {} exited", self.dir.display())
            }
        }
    }

    fn hear(&self, limit: Duration) -> Result<Option<JobEvent>> {
        match &self.helper {
            Some(helper) => Ok(frame::recv_within::<JobEvent>(helper, limit)?.map(|(event, _)| event)),
            None => Ok(None),
        }
    }
}

impl Freeze for FreezeHelper {
    fn freeze(&mut self) -> Result<()> {
        if self.files.is_empty() {
            return Ok(());
        }
        if let Some(helper) = &self.helper
            && freeze::go(helper.as_fd()).is_ok()
            && self.await_frozen().is_ok()
        {
            return Ok(());
        }
        self.helper = Some(self.start(&Command::Freeze)?);
        self.await_frozen()
    }

    fn thaw(&mut self) -> Result<()> {
        let Some(helper) = self.helper.as_ref().filter(|_| self.frozen) else {
            if let Some(waiting) = self.helper.take() {
                end_helper(&waiting);
            }
            return Ok(());
        };
        // If the helper has exited this fails, no answer follows, and this process thaws.
        let _ = freeze::go(helper.as_fd());
        let heard = self.hear(THAW);
        self.helper = None;
        match heard? {
            Some(JobEvent::Error { code, message }) => Err(remote_error(code, message)),
            Some(_) => Ok(()),
            None => freeze::thaw_directly(&self.files),
        }
    }
}

/// Has a helper that waits for its initiator exit, so that what it holds open is in the way of no unmount that follows.
pub(super) fn end_helper(helper: &OwnedFd) {
    if shutdown(helper.as_raw_fd(), Shutdown::Write).is_ok() {
        let end = host::now() + EXIT;
        while host::now() < end && matches!(frame::recv_within::<serde_json::Value>(helper, EXIT), Ok(Some(_))) {}
    }
}

impl Drop for FreezeHelper {
    fn drop(&mut self) {
        if let Err(e) = self.thaw() {
            report::warn(e);
        }
    }
}

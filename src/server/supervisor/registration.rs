//! The folder of a running device in /run/ploop, by which all programs find it.
#![forbid(unsafe_code)]

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use crate::bail;
use crate::error::Result;
use crate::server::kernel_log::log;
use crate::server::proto::DeviceRecord;
use crate::server::runtime::{CONTROL, STATE};
use crate::server::supervisor::Supervisor;
use crate::server::{control, runtime};

impl Supervisor {
    /// A device without its folder in /run/ploop could not be found, nor unmounted.
    pub(super) fn stay_registered(&mut self) {
        if self.dir.as_os_str().is_empty() || self.lost {
            return;
        }
        match register_again(&self.dir, &self.record) {
            Ok(None) => {}
            Ok(Some(listener)) => {
                log(&self.record.name, "its folder in /run/ploop was gone: made anew");
                let listens = self.clients.listen_on(&listener);
                if let (Some(fds), Ok(())) = (&mut self.fds, listens) {
                    // Later workers get it; until then a supervisor that the worker starts makes another one.
                    fds.listener = listener;
                }
            }
            Err(e) => self.log_once(&e.to_string()),
        }
    }
}

/// Makes the folder of a running device anew where another process has removed it, with this record and a new control
/// socket. None: all is there.
fn register_again(dir: &Path, record: &DeviceRecord) -> Result<Option<OwnedFd>> {
    let is_there = |file: &str| fs::symlink_metadata(dir.join(file)).is_ok();
    if is_there(CONTROL) && is_there(STATE) {
        return Ok(None);
    }
    if fs::symlink_metadata(dir).is_ok() {
        runtime::write_record(dir, record)?;
        return if is_there(CONTROL) { Ok(None) } else { control::listen_at(dir, CONTROL).map(Some) };
    }
    let new = runtime::new_dir()?;
    let listener = control::listen_at(&new, CONTROL)?;
    runtime::write_record(&new, record)?;
    if !runtime::publish(&new, &record.name)? {
        let _ = runtime::remove_dir(&new);
        bail!(Busy, "{} belongs to another device by now", dir.display());
    }
    Ok(Some(listener))
}

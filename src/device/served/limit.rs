//! The limit of the top's file.
#![forbid(unsafe_code)]

use crate::bail;
use crate::device::model::Device;
use crate::device::served::{clean, record};
use crate::device::state::State;
use crate::error::Result;
use crate::server::proto::Command;

/// See [`Driver::limit_top`](crate::device::driver::Driver::limit_top).
pub(super) fn limit_top(device: &Device, sectors: u64) -> Result<()> {
    let node = device.node().display().to_string();
    if device.state == State::Dead {
        bail!(Device, "{node} has lost its server: unmount the disk and mount it again");
    }
    let command = Command::LimitTop { sectors };
    if let Some(e) = record(device).refuse(&command) {
        return Err(e.context(format_args!("ploop reload {node} gives it a newer server")));
    }
    clean::tell(device.name(), &command)
}

//! Counters and attributes of a device, by the names of the classic driver.

use super::device_chain;
use crate::bail;
use crate::device::{self, Device, State};
use crate::error::Result;

/// The counters of a running device, by name. `Sysfs` if there is none.
pub fn counters(node: &str) -> Result<Vec<(String, u64)>> {
    device::counters(&running(node)?)
}

/// Sets counters; which names there are not.
pub fn set_counters(node: &str, values: &[(String, u64)]) -> Result<Vec<String>> {
    let device = running(node)?;
    let known = device::counters(&device)?;
    device::set_counters(&device, values)?;
    let unknown = values.iter().filter(|(name, _)| !known.iter().any(|(k, _)| k == name));
    Ok(unknown.map(|(name, _)| name.clone()).collect())
}

/// Begins all counters anew.
pub fn clear_counters(node: &str) -> Result<()> {
    let device = running(node)?;
    let zeroes: Vec<(String, u64)> = device::counters(&device)?.into_iter().map(|(name, _)| (name, 0)).collect();
    device::set_counters(&device, &zeroes)
}

fn running(node: &str) -> Result<Device> {
    let device = device_chain::device(node)?;
    if !device.state.runs() {
        bail!(Sysfs, "{} is {}: it has no counters", device.node().display(), device.state);
    }
    Ok(device)
}

/// A number of the device's state, as the classic driver shows it in `pstate`; also of a stopped device. `Sysfs` if there
/// is no such device, or no such number.
pub fn attribute(node: &str, name: &str) -> Result<u32> {
    let device = match device::find_stopped(node) {
        Ok(Some(stopped)) => stopped,
        _ => device_chain::device(node)?,
    };
    let top = device.images.len().checked_sub(1).and_then(|top| u32::try_from(top).ok());
    Ok(match name {
        // As the driver of a device without images.
        "top" => top.unwrap_or(u32::MAX),
        "running" => device.state.runs().into(),
        "block_size" => device.cluster()?.sectors(),
        "fmt_version" => device.version.map_or(0, |v| v.number()),
        "aborted" => (device.state == State::Failed).into(),
        // A device is found from the moment on in which it can be used.
        "locked" => (device.state == State::Starting).into(),
        _ => bail!(
            Sysfs,
            "{} has no attribute {name}; there are top, running, block_size, fmt_version, aborted, locked",
            device.node().display()
        ),
    })
}

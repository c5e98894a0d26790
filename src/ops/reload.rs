//! The processes that serve devices are replaced by those of the program that is installed now; I/O waits for a moment.

use crate::bail;
use crate::device::{self, State};
use crate::error::Result;
use crate::report;

/// Reloads one device. `Device` if there is no such device.
pub fn reload(name: &str) -> Result<()> {
    let Some(found) = device::by_node(name)? else {
        bail!(Device, "{name} is no ploop device that this machine runs; ploop list shows them")
    };
    device::reload(found.name())?;
    report::say(0, format_args!("{} is served by new processes", found.node().display()));
    Ok(())
}

/// Reloads all devices that run; the first error after all were tried.
pub fn reload_all() -> Result<()> {
    let mut first = Ok(());
    for found in device::list()?.iter().filter(|d| d.state == State::Running) {
        if let Err(e) = reload(found.name()) {
            report::warn(format_args!("{}: {e}", found.node().display()));
            first = first.and(Err(e));
        }
    }
    first
}

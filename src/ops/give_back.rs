//! Giving space of a running disk's top image back to the host: its clusters move to the front of the file, and the file is
//! cut behind the last one in use. What the file system inside has not discarded counts as in use ([`trim`](super::trim)).

use crate::bail;
use crate::device::{self, Device, Watch};
use crate::error::Result;
use crate::report;

pub use crate::device::{GivenBack, Rates};

/// Bytes that are moved in a second while the device has requests, unless the caller wants another rate.
pub const BUSY_RATE: u64 = 16 << 20;

/// How space is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    pub rates: Rates,
}

impl Default for Options {
    fn default() -> Options {
        Options { rates: Rates { most: None, busy: Some(BUSY_RATE) } }
    }
}

impl Options {
    /// At most so many bytes in a second.
    pub fn limited(rate: Option<u64>) -> Options {
        let Options { rates } = Options::default();
        Options { rates: Rates { most: rate, busy: rates.busy.map(|b| rate.map_or(b, |r| r.min(b))) } }
    }
}

/// Gives the space back, while I/O goes on. `progress` gets what was done, and of how much. A device of which levels are
/// being merged: `Busy`. A signal, or [`report::cancel`], ends it: `Abort`, and what was moved stays moved.
pub fn give_back(device: &Device, options: &Options, progress: &mut dyn FnMut(u64, u64)) -> Result<GivenBack> {
    refuse(device)?;
    device::give_back(device, options.rates, &mut Caller { progress })
}

/// Refuses devices that have no space to give back. `Param`.
pub fn refuse(device: &Device) -> Result<()> {
    if device.read_only {
        bail!(Param, "{} is read-only: it has no space to give back", device.node().display());
    }
    if device.version.is_none() {
        bail!(
            Param,
            "the top of {}, {}, is a raw image: it has no clusters to be freed",
            device.node().display(),
            device.top().display()
        );
    }
    Ok(())
}

struct Caller<'a> {
    progress: &'a mut dyn FnMut(u64, u64),
}

impl Watch for Caller<'_> {
    fn progress(&mut self, seen: u64, all: u64) {
        (self.progress)(seen, all);
    }

    fn cancelled(&mut self) -> bool {
        report::cancel::requested()
    }
}

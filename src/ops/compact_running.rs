//! Giving space that is not used inside a running disk back to the host, and what that would bring.

use std::time::Duration;

use super::give_back::{self, GivenBack, Options};
use super::{find, trim};
use crate::bail;
use crate::descriptor::{Descriptor, ImageMode};
use crate::device::{self, Device, State};
use crate::error::{Error, IoContext, Kind, Result};
use crate::report;
use crate::report::progress::Progress;
use crate::sys::priority;

/// Bytes that are moved in a second where nothing limits it, for estimates.
const USUAL_RATE: u64 = 100 << 20;

/// What was given back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Bytes that the file systems inside have discarded.
    pub trimmed: u64,
    pub given: GivenBack,
}

/// The device that runs a disk and writes to it; none: the disk does not run.
pub fn device_of(descriptor: &std::path::Path) -> Result<Option<Device>> {
    if !nix::unistd::geteuid().is_root() {
        // Only root can make devices.
        return Ok(None);
    }
    let all = find::devices(descriptor, None)?;
    Ok(all.into_iter().find(|d| !d.read_only && d.state != State::Dead))
}

/// The running device with this node.
pub fn device_named(node: &str) -> Result<Device> {
    match device::by_node(node)? {
        Some(device) if device.state != State::Dead => Ok(device),
        Some(device) => bail!(Device, "{} has lost its server; see ploop doctor", device.node().display()),
        None => bail!(Device, "{node} is no ploop device"),
    }
}

/// From here on this process makes way for all others.
pub fn lower_priority() {
    if let Err(e) = priority::lower() {
        report::say(1, format_args!("the priority is not lowered: {e}"));
    }
}

/// Has what is mounted from the device discard what it does not use (`trim`), and gives the space back, while the disk is in
/// use. Content and size of the disk do not change. A signal ends it: `Abort`; the disk is whole.
pub fn compact(device: &Device, trim_first: bool, options: &Options) -> Result<Compacted> {
    let _operation = report::cancel::begin();
    give_back::refuse(device)?;
    refuse_preallocated(device)?;
    let mut trimmed = 0;
    if trim_first {
        let inside = trim::file_systems(device)?;
        if inside.is_empty() {
            report::warn(format_args!(
                "nothing is mounted from {} for writing: only what is free already is given back",
                device.node().display()
            ));
        }
        let shortest = device.cluster()?.bytes();
        for one in &inside {
            let ranges = trim::worth(device, one)?;
            trimmed += trim::trim(device, one, ranges.as_deref(), shortest, &mut report::cancel::requested)?;
            if report::cancel::requested() {
                return Err(cancelled(device));
            }
        }
        report::say(0, format_args!("{} MiB inside are not used", trimmed >> 20));
    }
    let mut shown = Progress::in_units("compacting", device.cluster()?.bytes());
    let given = give_back::give_back(device, options, &mut |done, total| shown.at(done, total));
    let given = given?;
    shown.finish();
    Ok(Compacted { trimmed, given })
}

/// `Param`.
fn refuse_preallocated(device: &Device) -> Result<()> {
    if let Some(descriptor) = device.descriptor.as_ref().filter(|_| is_preallocated(device)) {
        bail!(Param, "{} is preallocated: it keeps the space that its owner has chosen to take", descriptor.display());
    }
    Ok(())
}

pub(super) fn is_preallocated(device: &Device) -> bool {
    let disk = device.descriptor.as_ref().map(|path| Descriptor::read(path));
    disk.is_some_and(|disk| disk.is_ok_and(|disk| disk.mode == ImageMode::Preallocated))
}

fn cancelled(device: &Device) -> Error {
    let text = format!("the compaction of {} was cancelled: the disk is whole, and goes on", device.node().display());
    Error::new(Kind::Abort, text)
}

/// What compacting would bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Bytes of the top image's file.
    pub image_bytes: u64,
    /// Bytes that the file systems use.
    pub used_bytes: u64,
    /// Bytes to be had, about.
    pub bytes: u64,
    pub time: Duration,
}

impl Estimate {
    /// Of a file of so many bytes. `levels`: images of the chain; what of the top of a chain is free is not known, and
    /// counts as much as it can be.
    pub fn new(image_bytes: u64, disk_bytes: u64, used_bytes: u64, levels: usize, rate: Option<u64>) -> Estimate {
        let free = disk_bytes.saturating_sub(used_bytes);
        let bytes = match levels {
            0 | 1 => image_bytes.saturating_sub(used_bytes),
            _ => image_bytes.min(free),
        };
        // At worst each cluster that stays has to move, or each hole is filled.
        let moved = bytes.min(image_bytes - bytes);
        let time = Duration::from_secs(moved.div_ceil(rate.map_or(USUAL_RATE, |r| r.clamp(1, USUAL_RATE))));
        Estimate { image_bytes, used_bytes, bytes, time }
    }
}

/// Estimates what [`compact`] would bring of a running disk.
pub fn estimate(device: &Device, rate: Option<u64>) -> Result<Estimate> {
    give_back::refuse(device)?;
    let inside = trim::file_systems(device)?;
    if inside.is_empty() {
        bail!(
            Param,
            "nothing is mounted from {} for writing: what is free inside is not known",
            device.node().display()
        );
    }
    Ok(Estimate::new(
        top_bytes(device)?,
        device.sectors * crate::units::SECTOR,
        inside.iter().map(trim::Inside::used).sum(),
        device.images.len(),
        rate,
    ))
}

/// Bytes of the file that the device writes to.
pub fn top_bytes(device: &Device) -> Result<u64> {
    let Some(top) = device.images.len().checked_sub(1) else {
        bail!(Device, "{}: its images are not known", device.node().display());
    };
    let file = device::open_image(device, top)?;
    Ok(file.metadata().ctx(Kind::Fstat, || format!("cannot look at {}", device.top().display()))?.len())
}

/// All devices that can be compacted: they run, write to ploop images, and something is mounted from them.
pub fn candidates() -> Result<Vec<Device>> {
    let running = device::list_of(|d| !d.read_only && d.version.is_some())?;
    let wanted = |d: &Device| d.state.runs() && refuse_preallocated(d).is_ok();
    let used = |d: &Device| wanted(d) && trim::file_systems(d).is_ok_and(|inside| !inside.is_empty());
    Ok(running.into_iter().filter(used).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimates_of_one_image_and_of_a_chain() {
        const GIB: u64 = 1 << 30;
        let one = Estimate::new(3 * GIB, 10 * GIB, GIB / 2, 1, None);
        assert_eq!((one.bytes, one.time), (5 * GIB / 2, Duration::from_secs(6)));
        let slow = Estimate::new(3 * GIB, 10 * GIB, GIB / 2, 1, Some(1 << 20));
        assert_eq!(slow.time, Duration::from_secs(512));
        assert_eq!(Estimate::new(GIB, 10 * GIB, 2 * GIB, 1, None).bytes, 0);
        assert_eq!(Estimate::new(GIB, 10 * GIB, 2 * GIB, 2, None).bytes, GIB);
        assert_eq!(Estimate::new(3 * GIB, 4 * GIB, 2 * GIB, 2, None).bytes, 2 * GIB);
    }
}

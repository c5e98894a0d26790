//! Running disks get larger.

use super::{Ended, check_chain, check_state, outcome};
use crate::bail;
use crate::descriptor::LockedDescriptor;
use crate::device::{self, CommitFile, Device, SwitchSpec};
use crate::error::{Error, Kind, Result};
use crate::format::header::Header;
use crate::ops::maintenance::{self, Work};
use crate::report;
use crate::report::progress::Progress;
use crate::units::SECTOR;

/// Raw images are multiples of so many sectors.
pub const RAW_SECTORS: u64 = 8;

/// Gives a running disk `sectors`: the top image grows, then the descriptor is stored, then the block device grows. I/O waits
/// for moments. The same size: what an interrupted grow has left is finished. After a kill of any process the disk runs on,
/// and the same call finishes it.
pub fn grow(disk: &mut LockedDescriptor, device: &Device, sectors: u64) -> Result<()> {
    maintenance::before(device, Work::Grow)?;
    check_chain(disk, device)?;
    let sectors = rounded(device, sectors)?;
    if disk.size_sectors == sectors {
        return set_size(device, sectors, None);
    }
    let mut next = disk.descriptor.clone();
    next.size_sectors = sectors;
    let (tmp, file) = next.prepare(&disk.place)?;
    let commit = CommitFile::open(&tmp, &disk.place)?.of(file)?.under(disk.share_lock()?);
    let result = set_size(device, sectors, Some(&commit));
    let spec = SwitchSpec { levels: Vec::new(), commit: Some(commit), linger: 0 };
    match outcome(disk, spec, &(tmp, file), next, result) {
        Ended::Changed(result) => result,
        Ended::Not(e) | Ended::Unknown(e) => Err(e),
    }
}

/// The same of a device whose images no descriptor names.
pub fn grow_device(device: &Device, sectors: u64) -> Result<()> {
    maintenance::before(device, Work::Grow)?;
    check_state(device)?;
    set_size(device, rounded(device, sectors)?, None)
}

fn set_size(device: &Device, sectors: u64, commit: Option<&CommitFile>) -> Result<()> {
    let mut shown = Progress::in_units("growing", SECTOR);
    let mut grown = |now: u64| shown.at(now.saturating_sub(device.sectors), sectors.saturating_sub(device.sectors));
    let warning = device::set_size(device, sectors, commit, &mut grown)?;
    shown.finish();
    if let Some(warning) = warning {
        report::warn(warning);
    }
    Ok(())
}

/// The size that the device gets; what it cannot get is `Param`.
fn rounded(device: &Device, sectors: u64) -> Result<u64> {
    let node = device.node().display();
    if device.read_only {
        bail!(Param, "{node} is read-only: it is not made larger");
    }
    let too_large = || Error::new(Kind::Param, format!("{node}: a size of {sectors} sectors is too large"));
    let sectors = match device.version {
        None => sectors.checked_next_multiple_of(RAW_SECTORS).ok_or_else(too_large)?,
        Some(version) => {
            let cluster = device.cluster()?;
            let multiple = u64::from(cluster.sectors());
            if !sectors.is_multiple_of(multiple) {
                bail!(
                    Param,
                    "{node}: a size of {sectors} sectors is no multiple of its cluster, {multiple} sectors; take {} or {}",
                    sectors / multiple * multiple,
                    sectors.next_multiple_of(multiple)
                );
            }
            // Before anything is written: the larger size must fit the version.
            Header::sized(version, cluster, sectors)?;
            sectors
        }
    };
    if sectors < device.sectors {
        bail!(Param, "{node} has {} sectors: it cannot be made smaller, {sectors}", device.sectors);
    }
    Ok(sectors)
}

//! The balloon of a running disk: how large it is, changing it, and giving back to the image's file what it lies on.
//!
//! The state OFF, BALLOON and so on is kept by the device's server. A larger balloon is first a larger file, durable, in
//! state BALLOON; then the image gives its clusters up (FBLOADED), and moves its last clusters into free ones and cuts its
//! file (RELOC, then OFF). If the caller ends in between, the state stays: BALLOON until [`check_or_repair`] gives up what
//! is left, or [`clear`] only ends the state; FBLOADED and RELOC until [`complete`] finishes them, or the worker has.

mod space;
mod target;

use crate::bail;
use crate::device::{self, Device, Maintenance};
use crate::error::{Error, Kind, Result};
use crate::fs::balloon::{Balloon, Root};
use crate::ops::maintenance::{self, Work};
use crate::report;
use crate::units::SECTOR;

use space::Space;
pub use target::{Target, by_node, root_of};

use Maintenance::{Balloon as Inflating, FreeBlocksLoaded, Off};

/// Bytes of the balloon. `Open`: there is none.
pub fn size(root: &Root) -> Result<u64> {
    existing(root, false)?.size()
}

/// Opens the balloon of a mounted file system and locks it. `Busy`: another process has it locked.
pub fn locked(root: &Root, make: bool) -> Result<Balloon> {
    let balloon = if make { root.balloon_or_new()? } else { existing(root, true)? };
    balloon.lock()?;
    Ok(balloon)
}

/// Opens the balloon; `Open`: there is none.
pub fn existing(root: &Root, write: bool) -> Result<Balloon> {
    match root.balloon(write)? {
        Some(balloon) => Ok(balloon),
        None => Err(Error::new(
            Kind::Open,
            format!("{} has no balloon; ploop balloon change makes one", root.path().display()),
        )),
    }
}

/// Locks the balloon if there is one, for what does without.
fn lock_if_there(root: &Root) -> Result<Option<Balloon>> {
    let balloon = root.balloon(false)?;
    balloon.iter().try_for_each(Balloon::lock)?;
    Ok(balloon)
}

/// Ends the state BALLOON, which an interrupted change or repair has left. `Busy` in other states but OFF.
pub fn clear(target: &Target) -> Result<()> {
    let _locked = lock_if_there(&target.root)?;
    clear_state(&target.device)
}

/// The same of a device; the caller has locked the balloon.
pub fn clear_state(device: &Device) -> Result<()> {
    maintenance::before(device, Work::BalloonClear)?;
    if maintenance::now(device)? == Inflating {
        device::set_maintenance(device, &[Inflating, Off], Off)?;
    }
    Ok(())
}

/// Finishes what a balloon or a discard has begun. The state that was found.
pub fn complete(target: &Target) -> Result<Maintenance> {
    let _locked = lock_if_there(&target.root)?;
    complete_device(&target.device)
}

/// The same of a device; the caller has locked the balloon.
pub fn complete_device(device: &Device) -> Result<Maintenance> {
    let state = maintenance::complete(device)?;
    if !matches!(state, Maintenance::FreeBlocksLoaded | Maintenance::Relocation | Maintenance::Discard) {
        report::say(0, format_args!("Nothing to complete: the maintenance state is {state}"));
    }
    Ok(state)
}

/// Gives the balloon, which is made where it is missing, so many sectors.
pub fn change(target: &Target, sectors: u64) -> Result<()> {
    let _operation = report::cancel::begin();
    if sectors == 0 && target.root.balloon(false)?.is_none() {
        report::say(0, "There is no balloon: its size is 0");
        return Ok(());
    }
    let balloon = locked(&target.root, true)?;
    change_locked(&target.device, &balloon, sectors)
}

/// The same; the caller has locked the balloon.
pub fn change_locked(device: &Device, balloon: &Balloon, sectors: u64) -> Result<()> {
    let (_, block) = balloon.place()?;
    let Some(wanted) = sectors.checked_mul(SECTOR).and_then(|bytes| bytes.checked_next_multiple_of(block)) else {
        bail!(Param, "a balloon of {sectors} sectors is too large")
    };
    let now = balloon.size()?;
    if wanted <= now {
        maintenance::before(device, Work::Deflate)?;
        if wanted < now {
            balloon.truncate(wanted)?;
        }
        if maintenance::now(device)? == Inflating {
            // An interrupted change has left it.
            device::set_maintenance(device, &[Inflating, Off], Off)?;
        }
    } else {
        refuse_unfit(device)?;
        maintenance::before(device, Work::Inflate)?;
        device::set_maintenance(device, &[Off, Inflating], Inflating)?;
        if let Err(e) = balloon.inflate(now, wanted) {
            device::set_maintenance(device, &[Inflating], Off)?;
            return Err(e);
        }
    }
    match wanted == now {
        true => report::say(0, format_args!("The balloon has {now} bytes already")),
        false => report::say(0, format_args!("Changed the balloon's size from {now} to {wanted} bytes")),
    }
    if wanted > now { give_back(device, balloon) } else { Ok(()) }
}

/// Counts the clusters of the image on which the balloon lies; with `repair` gives them back. `Open`: there is no balloon.
pub fn check_or_repair(device: &Device, root: &Root, repair: bool) -> Result<u64> {
    let _operation = report::cancel::begin();
    let balloon = locked(root, false)?;
    refuse_unfit(device)?;
    maintenance::before(device, if repair { Work::BalloonRepair } else { Work::BalloonCheck })?;
    device::set_maintenance(device, &[Off, Inflating], Inflating)?;
    let free = Space::of(device, &balloon).map(|space| space.clusters());
    if !repair || !matches!(free, Ok(1..)) {
        device::set_maintenance(device, &[Inflating], Off)?;
    }
    match free? {
        0 => {
            report::say(0, "The balloon has no free blocks that the image keeps");
            Ok(0)
        }
        free => {
            report::say(0, format_args!("The balloon has {free} free blocks that the image keeps"));
            if repair {
                give_back(device, &balloon)?;
            }
            Ok(free)
        }
    }
}

/// Has the image give up what the balloon lies on, and its file become shorter; the state BALLOON becomes FBLOADED, RELOC,
/// OFF.
fn give_back(device: &Device, balloon: &Balloon) -> Result<()> {
    let space = Space::of(device, balloon)?;
    let bytes = space.give_back().map_err(|e| {
        e.context(
            "the balloon has its size, but its space is not all given back (ploop balloon repair goes on with it)",
        )
    })?;
    if bytes == 0 {
        return device::set_maintenance(device, &[Inflating, Off], Off);
    }
    let clusters = bytes / space.cluster();
    report::say(0, format_args!("Freed {clusters} cluster-blocks ({bytes} bytes) of the image"));
    device::set_maintenance(device, &[Inflating, FreeBlocksLoaded], FreeBlocksLoaded)?;
    maintenance::shorten(device)
}

/// Only a ploop1 image gives clusters back. `Param`
fn refuse_unfit(device: &Device) -> Result<()> {
    let node = device.node().display();
    if device.version.is_none() {
        bail!(Param, "{node} runs a raw image: it has no clusters to be given back");
    }
    if device.read_only {
        bail!(Param, "{node} is read-only");
    }
    Ok(())
}

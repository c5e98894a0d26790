//! Merging snapshots of a running disk. The worker copies, so that the merge goes on if the caller is killed; the
//! caller prepares the descriptor.

use std::path::PathBuf;

use super::{Ended, check_chain, check_state, outcome, prepare};
use crate::bail;
use crate::descriptor::{Descriptor, LockedDescriptor};
use crate::device::merge::{Unmerged, Watch, merge_levels as merge_levels_of, merge_top};
use crate::device::{self, Device, NewLevel, SwitchSpec};
use crate::error::{Error, Kind, Result};
use crate::format::guid::Guid;
use crate::ops::image_set::{self, Unneeded};
use crate::ops::maintenance::{self, Work};
use crate::report;
use crate::report::progress::Progress;
use crate::sys::file_id::FileId;
use crate::units::ClusterSize;

/// Merges `descendant` and all between into `ancestor`; the device runs all of them. I/O goes on. An interrupted merge
/// is finished by running it again: the snapshots that disappear are marked as half merged before anything is written.
pub fn merge(disk: &mut LockedDescriptor, device: &Device, descendant: &Guid, ancestor: &Guid) -> Result<()> {
    let gone = disk.removed_by_merge(descendant, ancestor)?;
    let single = disk.parent(descendant)? == Some(*ancestor);
    maintenance::before(device, if single { Work::Merge } else { Work::MergeRange })?;
    check_chain(disk, device)?;
    if *descendant != disk.top {
        return step(disk, device, descendant, ancestor, &gone);
    }
    // The frozen ones first, so that the top is merged into its own parent.
    let Some(parent) = disk.parent(descendant)? else {
        bail!(Param, "snapshot {descendant} is the base: there is nothing below to merge it into");
    };
    if parent == *ancestor {
        return step(disk, device, descendant, ancestor, &gone);
    }
    let lower: Vec<Guid> = gone.iter().copied().filter(|g| *g != parent).collect();
    step(disk, device, &parent, ancestor, &lower)?;
    let Some(device) = device::by_node(device.name())? else {
        bail!(Device, "{} is gone", device.node().display());
    };
    step(disk, &device, descendant, &parent, &[parent])
}

/// One merge by the worker. `gone`: the snapshots that disappear.
fn step(disk: &mut LockedDescriptor, device: &Device, descendant: &Guid, ancestor: &Guid, gone: &[Guid]) -> Result<()> {
    let level = |disk: &Descriptor, guid: &Guid| {
        let image = disk.image(guid).map(|i| FileId::at_nofollow(&i.file));
        let found = image.and_then(std::io::Result::ok).and_then(|id| device.level_of(id));
        found.ok_or_else(|| {
            Error::new(Kind::Param, format!("snapshot {guid} is no level of {}", device.node().display()))
        })
    };
    let (low, high) = (level(disk, ancestor)?, level(disk, descendant)?);
    let mut next = disk.descriptor.clone();
    let files = next.collapse(descendant, ancestor, None)?;
    // The files that the device runs.
    let unneeded = |path: PathBuf| {
        let running = disk.images.iter().find(|i| i.file == path).and_then(|i| level(disk, &i.guid).ok());
        let file = running.and_then(|at| device.images.get(at))?.id;
        Some(Unneeded { path, file })
    };
    let files: Vec<Unneeded> = files.into_iter().filter_map(unneeded).collect();

    if let Some(target) = disk.image(ancestor) {
        image_set::refuse_shared(disk, target)?;
    }
    let before = disk.descriptor.clone();
    mark(disk, gone)?;
    let (spec, tmp) = prepare(disk, device, &mut next).inspect_err(|_| unmark(disk, &before))?;
    let is_top = *descendant == disk.top;
    let merged = run(device, (low, high), is_top, &spec);
    let (result, untouched) = match merged {
        Ok(()) => (Ok(()), false),
        Err(Unmerged { error, untouched }) => (Err(error), untouched),
    };
    match outcome(disk, spec, &tmp, next, result) {
        Ended::Changed(result) => {
            image_set::remove(disk, &files);
            result
        }
        Ended::Not(e) => {
            match untouched {
                true => unmark(disk, &before),
                false => report::warn(
                    "the merge was begun and stays so: the disk is as it was, the snapshots that it removes are marked \
                     as half merged; the next merge, snapshot or mount finishes it",
                ),
            }
            Err(e)
        }
        Ended::Unknown(e) => Err(e),
    }
}

/// Asks the supervisor for the merge and waits until it is done.
fn run(device: &Device, levels: (usize, usize), is_top: bool, then: &SwitchSpec) -> Result<(), Unmerged> {
    let unit = device.cluster().map_or(1, ClusterSize::bytes);
    let mut patience = Patience { shown: Progress::in_units("merging", unit) };
    let merged = match is_top {
        true => merge_top(device, then.commit.as_ref(), &mut patience),
        false => merge_levels_of(device, levels, then, &mut patience),
    };
    let warning = merged?;
    patience.shown.finish();
    if let Some(warning) = warning {
        report::warn(warning);
    }
    Ok(())
}

/// Waits until it is done or the operation is cancelled.
struct Patience {
    shown: Progress,
}

impl Watch for Patience {
    fn progress(&mut self, done: u64, all: u64) {
        self.shown.at(done, all);
    }

    fn cancelled(&mut self) -> bool {
        report::cancel::requested()
    }
}

fn mark(disk: &mut LockedDescriptor, gone: &[Guid]) -> Result<()> {
    let mut next = disk.descriptor.clone();
    next.mark_spoiled(gone);
    if next == disk.descriptor { Ok(()) } else { disk.commit_as(next) }
}

fn unmark(disk: &mut LockedDescriptor, before: &Descriptor) {
    if disk.descriptor != *before
        && let Err(e) = disk.commit_as(before.clone())
    {
        report::warn(format_args!("the snapshots stay marked as half merged: {e}"));
    }
}

/// Merges levels `low` to `high` of a running device; no descriptor is changed. The files of the levels above the
/// lowest stay: the caller removes them.
pub fn merge_levels(device: &Device, low: usize, high: usize) -> Result<()> {
    check_state(device)?;
    let top = device.images.len().saturating_sub(1);
    if low >= high || high > top {
        bail!(Param, "levels {low}..{high} of {}: the highest is {top}", device.node().display());
    }
    let writable_top = high == top && !device.read_only;
    if writable_top && low + 1 < high {
        merge_in_one(device, low, high - 1)?;
        let Some(device) = device::by_node(device.name())? else {
            bail!(Device, "{} is gone", device.node().display());
        };
        return merge_in_one(&device, low, low + 1);
    }
    merge_in_one(device, low, high)
}

fn merge_in_one(device: &Device, low: usize, high: usize) -> Result<()> {
    let levels = device.images.len();
    let kept = (0..=low).chain(high + 1..levels).map(NewLevel::Kept).collect();
    let spec = SwitchSpec { levels: kept, commit: None, linger: 0 };
    let is_top = high + 1 == levels && !device.read_only;
    run(device, (low, high), is_top, &spec).map_err(|u| match u.untouched {
        true => u.error,
        false => u.error.context("the merge was begun and stays so; the device is as it was"),
    })
}

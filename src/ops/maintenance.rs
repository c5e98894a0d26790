//! What may be done to a running device in which maintenance state, and how a state that a program has left is ended.

use crate::bail;
use crate::device::{self, Device, Maintenance};
use crate::error::{Kind, Result};
use crate::ops::compact_running::is_preallocated;
use crate::ops::give_back::{self, Options};
use crate::report;
use crate::report::progress::Progress;

use Maintenance::{Balloon, Discard, FreeBlocksLoaded, Grow, Merge, Off, Relocation, Track};

/// What is to be done to a running device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Unmounting it by its descriptor.
    Umount,
    Resize,
    /// Enlarging it.
    Grow,
    Snapshot,
    /// Merging a snapshot into its parent.
    Merge,
    /// Merging several levels.
    MergeRange,
    Replace,
    /// Sending a copy of its top.
    Copy,
    /// Discarding what the file system does not use, in rounds.
    Discard,
    /// A larger balloon.
    Inflate,
    /// A smaller balloon, or one of the same size.
    Deflate,
    /// Counting what the balloon keeps of the image, and giving it back.
    BalloonCheck,
    BalloonRepair,
    BalloonClear,
    BalloonComplete,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Go,
    /// What was begun is finished first.
    Complete,
    /// `Busy`
    Refuse,
}

fn verdict(work: Work, state: Maintenance) -> Verdict {
    use Verdict::{Complete, Go, Refuse};
    match (work, state) {
        (_, Off) => Go,
        // One that was interrupted is continued.
        (Work::Discard, Discard) => Go,
        (Work::Discard, _) => Refuse,
        (Work::BalloonComplete, FreeBlocksLoaded | Relocation | Discard) => Complete,
        (Work::BalloonComplete, _) => Go,
        (Work::BalloonClear, Balloon) => Go,
        (Work::Inflate | Work::BalloonCheck | Work::BalloonRepair, Balloon) => Go,
        (Work::Deflate, Balloon | Merge | Grow | Track) => Go,
        (Work::BalloonClear | Work::Inflate | Work::Deflate | Work::BalloonCheck | Work::BalloonRepair, _) => Refuse,
        (Work::Grow, Balloon | Merge) | (Work::Copy, Balloon) => Go,
        (Work::Copy, FreeBlocksLoaded | Relocation | Discard) => Complete,
        (Work::Grow | Work::Copy, _) => Refuse,
        // While a balloon is inflated the chain can change.
        (Work::Umount | Work::Resize | Work::Snapshot | Work::Merge | Work::MergeRange | Work::Replace, Balloon) => Go,
        // The lock on the disk, and the server, order merges themselves.
        (Work::Umount | Work::Resize | Work::Snapshot | Work::Merge | Work::MergeRange | Work::Replace, Merge) => Go,
        (Work::Umount | Work::Resize | Work::Snapshot | Work::Merge, FreeBlocksLoaded | Relocation | Discard) => {
            Complete
        }
        // A copy that runs ends with its device.
        (Work::Umount, Track) => Go,
        (Work::Umount | Work::Resize | Work::Snapshot | Work::Merge | Work::MergeRange | Work::Replace, _) => Refuse,
    }
}

/// The state that a device has now: `device` may have been looked at before it was completed.
pub fn now(device: &Device) -> Result<Maintenance> {
    let found = device::by_node(device.name())?.filter(|now| now.is_same(device));
    Ok(found.map_or(device.maintenance(), |now| now.maintenance()))
}

/// Makes a device ready for what is to be done to it: finishes what was begun. `Busy`: its state does not allow it.
pub fn before(device: &Device, work: Work) -> Result<()> {
    if !device.state.runs() {
        // What has no server has no state.
        return Ok(());
    }
    let state = now(device)?;
    match verdict(work, state) {
        Verdict::Go => Ok(()),
        Verdict::Complete => match complete(device) {
            // The end of the device ends it, too; what is free in the image stays free.
            Err(e) if work == Work::Umount => {
                report::warn(e);
                Ok(())
            }
            other => other.map(drop),
        },
        Verdict::Refuse if state == Track => bail!(
            Busy,
            "{}: its top is being copied (ploop copy -s): it is in the maintenance state {state}; wait for the end of that",
            device.node().display()
        ),
        Verdict::Refuse => bail!(
            Busy,
            "{}: its maintenance state is {state}, another operation is under way or was interrupted; ploop balloon \
             complete or clear ends one that was interrupted",
            device.node().display()
        ),
    }
}

/// Finishes what a balloon or a discard has begun on a device. The state that it had: OFF, and others that are not ended by
/// this, mean that there was nothing to finish.
pub fn complete(device: &Device) -> Result<Maintenance> {
    let state = now(device)?;
    if verdict(Work::BalloonComplete, state) == Verdict::Complete {
        match state {
            // What was discarded is free already.
            Discard => device::set_maintenance(device, &[Discard, Off], Off)?,
            _ => shorten(device)?,
        }
        report::say(1, format_args!("{}: {state} is completed", device.node().display()));
    }
    Ok(state)
}

/// Moves what the image's file has at its end into free clusters, and cuts it. The state, FBLOADED or RELOC, is RELOC
/// meanwhile, and OFF afterwards; FBLOADED if it was cancelled.
pub fn shorten(device: &Device) -> Result<()> {
    if is_preallocated(device) {
        // What is free in its file stays its own.
        return device::set_maintenance(device, &[FreeBlocksLoaded, Relocation, Off], Off);
    }
    device::set_maintenance(device, &[FreeBlocksLoaded, Relocation, Off], Relocation)?;
    let mut shown = Progress::in_units("relocating", device.cluster()?.bytes());
    let given = give_back::give_back(device, &Options::default(), &mut |done, all| shown.at(done, all));
    let cancelled = matches!(&given, Err(e) if e.kind() == Kind::Abort);
    if cancelled {
        // The supervisor has ended RELOC with the work.
        device::set_maintenance(device, &[Relocation, FreeBlocksLoaded, Off], FreeBlocksLoaded)?;
    } else {
        // The supervisor may have done it when the worker had finished.
        device::set_maintenance(device, &[Relocation, Off], Off)?;
    }
    let given = given.map_err(|e| if cancelled { e } else { e.as_kind(Kind::Reloc) })?;
    shown.finish();
    let bytes = given.before.saturating_sub(given.after);
    if bytes > 0 {
        let clusters = bytes / device.cluster()?.bytes();
        report::say(0, format_args!("TRUNCATED: {clusters} cluster-blocks ({bytes} bytes)"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One letter for each state: + goes on, c completes first, - is refused.
    #[test]
    fn each_work_in_each_state() {
        let states = [Off, Balloon, FreeBlocksLoaded, Relocation, Merge, Grow, Track, Discard, Maintenance::Unknown];
        let table = [
            (Work::Umount, "++cc+-+c-"),
            (Work::Resize, "++cc+--c-"),
            (Work::Grow, "++--+----"),
            (Work::Snapshot, "++cc+--c-"),
            (Work::Merge, "++cc+--c-"),
            (Work::MergeRange, "++--+----"),
            (Work::Replace, "++--+----"),
            (Work::Copy, "++cc---c-"),
            (Work::Discard, "+------+-"),
            (Work::Inflate, "++-------"),
            (Work::Deflate, "++--+++--"),
            (Work::BalloonCheck, "++-------"),
            (Work::BalloonRepair, "++-------"),
            (Work::BalloonClear, "++-------"),
            (Work::BalloonComplete, "++cc+++c+"),
        ];
        for (work, row) in table {
            let got: String = states
                .iter()
                .map(|state| match verdict(work, *state) {
                    Verdict::Go => '+',
                    Verdict::Complete => 'c',
                    Verdict::Refuse => '-',
                })
                .collect();
            assert_eq!(got, row, "{work:?}");
        }
    }
}

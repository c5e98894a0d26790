//! Merging frozen levels of a running chain, in a process of its own.
#![forbid(unsafe_code)]

use std::os::fd::{BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::image::lock::{LockedImage, Sharing, lock_open};
use crate::image::merge::{BATCH, Merge, MergeLevel, MergeOptions};
use crate::image::open::{Access, reopen};
use crate::server::frame;
use crate::server::helper::JobEvent;
use crate::server::proto::LevelName;
use crate::sys::process_hardening;

/// The levels, base first, whose descriptors come in the same order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MergeJob {
    pub levels: Vec<LevelName>,
    /// Which of them takes what all above it have.
    pub low: usize,
}

/// Merges, reporting progress to `owner`; ends at the next safe point once `owner` is closed.
pub fn merge(job: &MergeJob, fds: &[OwnedFd], owner: BorrowedFd) -> JobEvent {
    let _ = process_hardening::ignore_signals();
    let mut untouched = true;
    match work(job, fds, owner, &mut untouched) {
        Ok(()) => JobEvent::Done,
        Err(e) => JobEvent::NotMerged { code: e.code(), message: e.to_string(), untouched },
    }
}

fn work(job: &MergeJob, fds: &[OwnedFd], owner: BorrowedFd, untouched: &mut bool) -> Result<()> {
    if fds.len() != job.levels.len() || job.low + 1 >= fds.len() {
        bail!(
            Protocol,
            "level {} of {} with {} descriptors is to be merged into",
            job.low,
            job.levels.len(),
            fds.len()
        );
    }
    let mut held = Vec::with_capacity(fds.len());
    for (i, (fd, name)) in fds.iter().zip(&job.levels).enumerate() {
        let target = i == job.low;
        let others = if target { Sharing::Exclusive } else { Sharing::Readers };
        // What lies below is looked at alone, by others as well.
        held.push(match i < job.low {
            true => below(fd, name)?,
            false => lock_open(fd, &name.path, Access { write: target, direct: false }, others)?,
        });
    }
    let level = |i: usize| match (held.get(i), job.levels.get(i)) {
        (Some(held), Some(name)) => Ok(MergeLevel { file: &held.file, name: &held.path, raw: name.raw }),
        _ => Err(Error::new(Kind::Protocol, format!("there is no level {i}"))),
    };
    let sources = (job.low + 1..fds.len()).rev().map(level).collect::<Result<Vec<_>>>()?;
    let below = (0..job.low).map(level).collect::<Result<Vec<_>>>()?;
    let merge = Merge::prepare(&sources, level(job.low)?, Some(&below))?;
    if merge.moves_data() {
        bail!(
            Param,
            "image {} has a smaller disk than those above it, and no room in its table for theirs: it cannot grow while the \
             device is running; unmount it and merge then",
            level(job.low)?.name.display()
        );
    }
    let mut progress = |done: u64, total: u64| match frame::send(owner, &JobEvent::Progress { done, total }, &[]) {
        Ok(()) => Ok(()),
        Err(_) => bail!(Sys, "the merge was ended after {done} of {total} bytes"),
    };
    let mut options = MergeOptions { progress: &mut progress, stay_marked: false, batch: BATCH, reflink: true };
    merge.run(&mut options).map(drop).map_err(|failed| {
        *untouched = failed.untouched;
        failed.error
    })
}

fn below(fd: &OwnedFd, name: &LevelName) -> Result<LockedImage> {
    let (file, _) =
        reopen(fd, Access::default()).ctx(Kind::Open, || format!("cannot open image {}", name.path.display()))?;
    Ok(LockedImage { file, path: name.path.clone() })
}

//! The former top of a chain that got a new one: completed and unmarked while the device runs, by a thread of its own.
#![forbid(unsafe_code)]

use crate::bail;
use crate::chain;
use crate::error::Result;
use crate::units::ClusterSize;

use super::core::{Core, Notice};
use super::setup::Kept;
use super::{levels, locked};

/// Finishes the level that the start names, and tells the main thread.
pub fn finish_thread(core: &Core, kept: &Kept, cluster: ClusterSize, level: usize) {
    let result = finish(kept, cluster, level);
    if let Err(e) = &result {
        core.log.say(format!("the former top: {e}"));
    }
    *locked(&core.finished) = Some(result.err().map(|e| (e.code(), e.to_string())));
    core.notices.push(Notice::Finished);
}

fn finish(kept: &Kept, cluster: ClusterSize, level: usize) -> Result<()> {
    let names = &kept.start.attach.levels;
    let (Some(fd), Some(name)) = (kept.levels().get(level..=level), names.get(level..=level)) else {
        bail!(Protocol, "level {level} of {} is to be finished", names.len());
    };
    // Until this is closed nobody else writes the file, as when it was the top.
    let file = levels::open(fd, name, true)?;
    levels::lock_alone(&file[0])?;
    chain::finish(&file[0], cluster)
}

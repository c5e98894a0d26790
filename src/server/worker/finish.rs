//! The former top of a chain that got a new one: completed and unmarked while the device runs, by a thread of its own.
#![forbid(unsafe_code)]

use crate::bail;
use crate::chain;
use crate::error::Result;
use crate::server::remote_error::RemoteError;
use crate::units::ClusterSize;

use super::core::{Core, Notice};
use super::init::Inherited;
use super::{locked, open_files};

/// Finishes the level that the start names, and notifies the main thread.
pub fn finish_thread(core: &Core, inherited: &Inherited, cluster: ClusterSize, level: usize) {
    let result = finish(inherited, cluster, level);
    if let Err(e) = &result {
        core.log.line(format!("the former top: {e}"));
    }
    *locked(&core.finished) = Some(result.err().map(RemoteError::from));
    core.notices.push(Notice::Finished);
}

fn finish(inherited: &Inherited, cluster: ClusterSize, level: usize) -> Result<()> {
    let names = &inherited.start.attach.levels;
    let (Some(fd), Some(name)) = (inherited.levels().get(level..=level), names.get(level..=level)) else {
        bail!(Protocol, "level {level} of {} is to be finished", names.len());
    };
    // Until it is finished no other process writes the file, as when it was the top.
    let file = open_files::open(fd, name, true)?;
    let finished = open_files::lock_exclusive(&file[0], &fd[0]).and_then(|()| chain::finish(&file[0], cluster));
    open_files::release(&fd[0]);
    finished
}

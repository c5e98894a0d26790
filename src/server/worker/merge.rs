//! What a worker does for a merge of its top when it ends: the target becomes the top of the next one, or a lower delta as
//! it was.
#![forbid(unsafe_code)]

use crate::bail;
use crate::chain;
use crate::engine::State;
use crate::error::Result;
use crate::server::proto::Swap;
use crate::units::ClusterSize;

use super::core::Core;
use super::locked;
use super::setup::Kept;

/// Before a change of the chain, with the engine closed: if it is the one that follows the merge, everything is made
/// durable in the target. Until the change is made the top still has all of it, too.
pub fn complete(core: &Core, kept: &Kept, swap: &Swap) -> Result<()> {
    let Some(_) = kept.start.merge.as_ref().filter(|m| m.token == swap.token) else { return Ok(()) };
    let engine = locked(&core.engine);
    let Some(target) = core.levels.len().checked_sub(2).map(|i| &core.levels[i]) else { return Ok(()) };
    match engine.merge_state() {
        Some(State::Agreed) => chain::finish_target(target, engine.merged_pages()),
        state => bail!(
            Abort,
            "{} is not merged into {} ({state:?}): the chain stays as it was",
            core.top().name.display(),
            target.name.display()
        ),
    }
}

/// The device was closed during a merge: the target is a lower delta like any other again. What was written into it is
/// hidden by the top; its own snapshot is spoiled.
pub fn leave_target(core: &Core, kept: &Kept, cluster: ClusterSize) -> Result<()> {
    let merging = kept.start.merge.is_some() && locked(&core.engine).merge_state().is_some();
    match core.levels.len().checked_sub(2) {
        Some(level) if merging && !core.levels[level].raw => chain::finish(&core.levels[level], cluster),
        _ => Ok(()),
    }
}

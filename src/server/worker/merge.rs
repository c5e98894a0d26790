//! What a worker does when it ends during a merge: the chain without the merged levels may follow only if the target
//! has all of them, durably.
#![forbid(unsafe_code)]

use crate::bail;
use crate::chain;
use crate::engine::BackgroundState;
use crate::error::Result;
use crate::server::proto::ChainSwitch;
use crate::units::ClusterSize;

use super::core::Core;
use super::init::Inherited;
use super::locked;

/// Before a change of the chain, with the engine closed: if it is the one that follows the merge, the target must have
/// everything. Until the change is made the merged levels still have all of it, too.
pub fn complete(core: &Core, inherited: &Inherited, switch: &ChainSwitch) -> Result<()> {
    let Some(_) = inherited.start.merge.as_ref().filter(|m| m.token == switch.token) else { return Ok(()) };
    let engine = locked(&core.engine);
    match engine.background_state() {
        Some(BackgroundState::Done) => Ok(()),
        state => {
            let target = inherited.start.merged_levels().and_then(|(low, _)| core.levels.get(low));
            let name = target.map(|t| t.name.display().to_string()).unwrap_or_default();
            bail!(Abort, "the merge into {name} is not complete ({state:?}): the chain stays as it was")
        }
    }
}

/// The device was closed during a merge: the target is a lower delta like any other again. What was written into it is
/// hidden by the top; its own snapshot is spoiled.
pub fn leave_target(core: &Core, inherited: &Inherited, cluster: ClusterSize) -> Result<()> {
    let merging = locked(&core.engine).background_state().is_some();
    match inherited.start.merged_levels().and_then(|(low, _)| core.levels.get(low)) {
        Some(level) if merging => chain::finish(level, cluster),
        _ => Ok(()),
    }
}

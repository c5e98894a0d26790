//! Temporary snapshots go away when no process uses them: those taken for a backup, those whose children were the reason
//! to keep them, and those that an interrupted merge had begun to merge.

use super::delete_leaf::delete_leaf;
use super::{merge, temporary_snapshot};
use crate::descriptor::LockedDescriptor;
use crate::error::{Kind, Result};
use crate::format::guid::Guid;
use crate::report;

/// Removes all temporary snapshots that no process uses. What is in use stays, and is no error.
pub fn merge_unused(disk: &mut LockedDescriptor) -> Result<()> {
    // Removing one can make another one removable.
    let mut kept: Vec<Guid> = Vec::new();
    loop {
        let next = disk.snapshots.iter().find(|s| s.temporary && !kept.contains(&s.guid)).map(|s| s.guid);
        let Some(guid) = next else { return Ok(()) };
        match remove(disk, &guid) {
            Ok(true) => {
                report::say(0, format_args!("temporary snapshot {guid} is removed"));
                kept.clear();
            }
            Ok(false) => kept.push(guid),
            Err(e) if e.kind() == Kind::Busy => {
                report::say(1, format_args!("temporary snapshot {guid} stays: {e}"));
                kept.push(guid);
            }
            Err(e) => return Err(e.context(format_args!("temporary snapshot {guid}"))),
        }
    }
}

/// Removes one if that is possible now.
fn remove(disk: &mut LockedDescriptor, guid: &Guid) -> Result<bool> {
    if !temporary_snapshot::end_idle(disk, guid)? {
        return Ok(false);
    }
    match disk.children(guid).as_slice() {
        [] if disk.parent(guid)?.is_some() => delete_leaf(disk, guid).map(|()| true),
        [child] => {
            let child = *child;
            merge::range(disk, &child, guid, None).map(|()| true)
        }
        _ => Ok(false),
    }
}

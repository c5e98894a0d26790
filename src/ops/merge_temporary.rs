//! Temporary snapshots go away when no process uses them: those taken for a backup, those whose children were the reason
//! to keep them, and those that an interrupted merge had begun to merge.

use std::path::Path;

use super::delete_leaf::delete_leaf;
use super::{disk_lock, image_set, merge, temporary_snapshot};
use crate::descriptor::LockedDescriptor;
use crate::device;
use crate::error::{Kind, Result};
use crate::format::guid::Guid;
use crate::report;
use crate::sys::host;

/// Which merges are made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    /// All that can be made now, by this process where no device runs the images.
    All,
    /// Those that the device which runs the disk makes while it serves, of the chain of its top. A merge elsewhere in the
    /// tree would keep the disk locked, and no umount could end it.
    Running,
}

/// Removes all temporary snapshots that no process uses. What is in use stays, and is no error.
pub fn merge_unused(disk: &mut LockedDescriptor) -> Result<()> {
    remove_all(disk, Which::All)
}

/// After the mount of a disk, whose lock the caller holds: has its temporary snapshots merged while it runs. A process of
/// its own asks the device's server for one merge after the other, as soon as the caller has given up the lock; the caller
/// waits for none of it.
pub fn start_merges(disk: &mut LockedDescriptor) {
    if !disk.snapshots.iter().any(|s| s.temporary) {
        return;
    }
    let started = match host::is_simulated() {
        true => remove_all(disk, Which::Running),
        false => device::start_merges(&disk.path),
    };
    if let Err(e) = started {
        report::warn(format_args!("a temporary snapshot stays: {e}"));
    }
}

/// What the process does that [`start_merges`] has started.
pub fn run_merges(descriptor: &Path) -> Result<()> {
    let _operation = report::cancel::begin();
    let mut disk = disk_lock::open(descriptor)?;
    remove_all(&mut disk, Which::Running)
}

fn remove_all(disk: &mut LockedDescriptor, which: Which) -> Result<()> {
    // Removing one can make another one removable.
    let mut kept: Vec<Guid> = Vec::new();
    loop {
        let next = disk.snapshots.iter().find(|s| s.temporary && !kept.contains(&s.guid)).map(|s| s.guid);
        let Some(guid) = next else { return Ok(()) };
        match remove(disk, &guid, which) {
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
fn remove(disk: &mut LockedDescriptor, guid: &Guid, which: Which) -> Result<bool> {
    if !temporary_snapshot::end_idle(disk, guid)? {
        return Ok(false);
    }
    match disk.children(guid).as_slice() {
        [] if disk.parent(guid)?.is_some() => delete_leaf(disk, guid).map(|()| true),
        [child] => {
            let child = *child;
            match which {
                Which::All => merge::range(disk, &child, guid, None).map(|()| true),
                Which::Running => match image_set::writer(disk)? {
                    Some(device) if merge::on_device(disk, &device, &child)? => {
                        merge::running(disk, &device, &child, guid, None).map(|()| true)
                    }
                    _ => Ok(false),
                },
            }
        }
        _ => Ok(false),
    }
}

//! Removing a snapshot on which no delta stands, with its file.

use super::image_set::{self, Unneeded};
use crate::descriptor::LockedDescriptor;
use crate::error::{Kind, Result};
use crate::format::guid::{self, Guid};
use crate::image::lock::Sharing;
use crate::image::open::Access;

/// Removes a snapshot on which no delta stands.
pub fn delete_leaf(disk: &mut LockedDescriptor, guid: &Guid) -> Result<()> {
    let mut next = disk.descriptor.clone();
    let file = next.delete_leaf(guid)?;
    let held = match image_set::lock_image(disk, &file, Access::default(), Sharing::Exclusive) {
        Err(e) if e.kind() == Kind::Busy && *guid == disk.top => {
            return Err(e.as_kind(Kind::Param).context("the top of a running disk cannot be deleted"));
        }
        // The file is removed already: only the descriptor still names it.
        Err(e) if e.errno() == Some(libc::ENOENT) => None,
        other => Some(other?),
    };
    let unneeded = match &held {
        Some(held) => Some(Unneeded { path: file.clone(), file: held.id()? }),
        None => None,
    };
    if *guid == disk.top
        && let Some(top) = next.image(&guid::TOP)
    {
        next.size_sectors = image_set::Shape::above(&next, top)?.sectors;
    }
    disk.commit_as(next)?;
    drop(held);
    image_set::remove(disk, unneeded.as_slice());
    Ok(())
}

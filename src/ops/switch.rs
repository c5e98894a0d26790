//! Switching a disk that does not run to one of its snapshots.

use std::path::Path;

use super::image_set::{self, Unneeded};
use super::{disk_lock, mount, recovery};
use crate::bail;
use crate::error::{Kind, Result};
use crate::format::guid::{self, Guid};
use crate::image::lock::Sharing;
use crate::image::open::Access;
use crate::report;
use crate::sys::folder::Place;

/// What to switch to, and what becomes of the old top.
#[derive(Clone, Debug)]
pub struct SwitchParams {
    pub guid: Guid,
    /// The GUID that a kept top gets; none: a random one.
    pub guid_old: Option<Guid>,
    /// The old top stays as a snapshot; else it is removed.
    pub keep_top: bool,
    /// The snapshot itself becomes the top; else an empty delta on it.
    pub no_new_top: bool,
}

/// Switches. `Param` while the disk runs.
pub fn switch(descriptor: &Path, component: &str, params: &SwitchParams) -> Result<()> {
    let _operation = report::cancel::begin();
    let mut disk = disk_lock::open(descriptor)?;
    if let Some(device) = image_set::running(&disk, component)? {
        bail!(
            Param,
            "the disk runs as {}: unmount it before it is switched to another snapshot",
            device.node().display()
        );
    }
    recovery::before_change(&mut disk)?;
    let keep = params.keep_top.then(|| params.guid_old.unwrap_or_else(Guid::generate));
    let place = match params.no_new_top {
        true => None,
        false => Some(image_set::new_name(&disk, None)?),
    };
    let mut next = disk.descriptor.clone();
    let gone = next.switch(&params.guid, place.as_ref().map(Place::path), keep)?;
    recovery::check_files(&disk, &params.guid)?;

    // The old top: no process may write to it; if it is removed, no process may read it.
    let (Some(old), Some(to)) = (disk.image(&guid::TOP).cloned(), disk.image(&params.guid).cloned()) else {
        bail!(DiskDescr, "descriptor: a snapshot has no image");
    };
    let others = if gone.is_some() { Sharing::Exclusive } else { Sharing::Readers };
    let held = match image_set::lock_image(&disk, &old.file, Access::default(), others) {
        Err(e) if gone.is_some() && e.errno() == Some(libc::ENOENT) => None,
        other => Some(other.map_err(|e| match e.kind() {
            Kind::Busy => e.as_kind(Kind::Param),
            _ => e,
        })?),
    };
    if keep.is_some() && !disk.is_raw(&old) {
        image_set::repair_in_place(&disk, &old.file)?;
    }
    let shape = image_set::Shape::above(&disk, &to)?;
    let made = match &place {
        Some(place) => Some((place, shape.make(place)?)),
        None => None,
    };
    next.size_sectors = made.as_ref().map_or(shape.sectors, |(_, built)| built.sectors);
    let unneeded = match (gone, &held) {
        (Some(path), Some(held)) => Some(Unneeded { path, file: held.id()? }),
        _ => None,
    };
    disk.commit_as(next).inspect_err(|_| {
        if let Some((place, built)) = &made {
            image_set::undo_new(&disk, place, built.id);
        }
    })?;
    drop(held);
    mount::drop_cache(&disk);
    image_set::remove(&disk, unneeded.as_slice());
    report::say(0, format_args!("the disk is on snapshot {} now", params.guid));
    if let Some(keep) = keep {
        report::say(0, format_args!("the old top is kept as snapshot {keep}"));
    }
    Ok(())
}

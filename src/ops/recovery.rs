//! Repairs what an interrupted operation provably left in a disk, before the next operation, with one message for each.
//! What is only suspicious is left to `check`.

use std::fs;

use super::{convert_recovery, image_set};
use crate::bail;
use crate::descriptor::{Descriptor, Image, ImageMode, LockedDescriptor};
use crate::error::{Kind, Result};
use crate::format::guid::Guid;
use crate::format::header;
use crate::image::check::read_header;
use crate::image::lock::Sharing;
use crate::image::open::{self, Access};
use crate::report;
use crate::sys::folder::Place;
use crate::sys::store;

/// Before an operation changes the disk: finishes or removes descriptors that were not stored completely, validates the
/// tree, and clears marks that a crash left on lower deltas. The caller holds the disk's lock, so no other operation on
/// the disk is under way.
pub fn before_change(disk: &mut LockedDescriptor) -> Result<()> {
    image_set::refuse_unflushed(disk.images.iter().map(|i| &*i.file), Some(&disk.path))?;
    disk.check_storable()?;
    image_set::refuse_dead(disk)?;
    finish_pending_descriptor(disk)?;
    disk.check_tree()?;
    convert_recovery::finish(disk)?;
    adopt_size(disk)?;
    let all: Vec<Guid> = disk.snapshots.iter().map(|s| s.guid).filter(|g| *g != disk.top).collect();
    clear_marks(disk, &all)
}

/// Before the images of a disk are checked: finishes what an interrupted operation provably left in its descriptor.
pub fn before_check(disk: &mut LockedDescriptor) -> Result<()> {
    if disk.check_storable().is_err() {
        return Ok(());
    }
    finish_pending_descriptor(disk)?;
    disk.check_tree()?;
    convert_recovery::finish(disk)?;
    adopt_size(disk)
}

/// Before a chain is mounted: repairs what concerns the chain. Errors in images that the mount does not need are left
/// to the operation that needs them. A read-only mount writes to no image.
pub fn before_mount(disk: &mut LockedDescriptor, guid: &Guid, read_only: bool) -> Result<()> {
    if disk.check_storable().is_err() {
        return Ok(());
    }
    finish_pending_descriptor(disk)?;
    if read_only {
        return Ok(());
    }
    convert_recovery::finish(disk)?;
    let mut below: Vec<Guid> = disk.chain(guid)?.iter().map(|i| i.guid).collect();
    below.pop();
    clear_marks(disk, &below)?;
    adopt_size(disk)
}

/// A grow that was interrupted between its two durable steps, or one of the image file alone, leaves the top larger than the
/// descriptor says: the image is right.
fn adopt_size(disk: &mut LockedDescriptor) -> Result<()> {
    let Some(top) = disk.image(&disk.top).filter(|i| !disk.is_raw(i)) else { return Ok(()) };
    let Ok(header) = read_header(&top.file, Some(&disk.dir)) else { return Ok(()) };
    // A last cluster that is not whole may be counted as whole in one of them.
    let known = disk.size_sectors.next_multiple_of(u64::from(disk.blocksize.sectors()));
    if header.sectors <= known {
        return Ok(());
    }
    let said = disk.size_sectors;
    let mut next = disk.descriptor.clone();
    next.size_sectors = header.sectors;
    disk.commit_as(next)?;
    report::say(
        0,
        format_args!(
            "the top image has {} sectors, {} said {said}: corrected, as after an interrupted grow",
            header.sectors,
            disk.path.display()
        ),
    );
    Ok(())
}

/// Finishes or removes descriptors under temporary names. The caller holds the disk's lock, so no process is storing
/// them.
fn finish_pending_descriptor(disk: &mut LockedDescriptor) -> Result<()> {
    let tmp = disk.place.suffixed(".tmp");
    let twice = tmp.suffixed(".tmp");
    let there = |place: &Place| place.regular().is_ok_and(|found| found.is_some());
    if there(&tmp) {
        let new = Descriptor::read_at(&tmp).ok();
        match new {
            Some(new) if replaces_missing(disk, &new) => {
                report::say(
                    0,
                    format_args!(
                        "{} names a file that a finished merge has removed; {} is the descriptor of that merge: stored",
                        disk.path.display(),
                        tmp.display()
                    ),
                );
                disk.commit_as(new)?;
            }
            Some(new) if new.mode == ImageMode::Raw && disk.mode != ImageMode::Raw => match base_signed(disk) {
                // The copy of an interrupted conversion to raw is incomplete.
                true => {
                    convert_recovery::forget_classic_copy(disk);
                    forget(&tmp);
                }
                false if convert_recovery::is_half_raw(disk, &new) => {
                    disk.commit_as(new)?;
                    report::say(
                        0,
                        format_args!(
                            "{}: the image is raw since an interrupted conversion: stored",
                            disk.path.display()
                        ),
                    );
                }
                // Neither descriptor fits the file: both stay, for the user.
                false => {}
            },
            _ => forget(&tmp),
        }
    }
    if there(&twice) {
        forget(&twice);
    }
    Ok(())
}

fn forget(place: &Place) {
    match store::unlink(place) {
        Ok(()) => report::say(0, format_args!("Removed {}, left by an interrupted operation", place.display())),
        Err(e) => report::say(1, format_args!("{} stays: {e}", place.display())),
    }
}

/// Whether `new` is the descriptor of a finished merge into a new file. The classic removes the old files of such a
/// merge before it stores the descriptor without them. Then the old descriptor cannot be used, and the new one is
/// whole: same disk, same top, all of its files exist and are closed, and only the new file is not in the old
/// descriptor.
fn replaces_missing(old: &Descriptor, new: &Descriptor) -> bool {
    let there = |i: &Image| old.dir.place(&i.file).and_then(|place| place.regular()).is_ok_and(|found| found.is_some());
    let missing: Vec<&Image> = old.images.iter().filter(|i| !there(i)).collect();
    let fresh: Vec<&Image> = new.images.iter().filter(|n| !old.images.iter().any(|o| o.file == n.file)).collect();
    let known = |g: &Guid| old.snapshot(g).is_some();
    !missing.is_empty()
        && fresh.len() == 1
        && missing.iter().all(|m| !new.images.iter().any(|n| n.file == m.file))
        && new.images.len() < old.images.len()
        && (new.blocksize, new.mode, new.top) == (old.blocksize, old.mode, old.top)
        && new.check_tree().is_ok()
        && new.snapshots.iter().all(|s| known(&s.guid))
        && new.images.iter().all(there)
        && fresh.iter().all(|f| read_header(&f.file, Some(&old.dir)).is_ok_and(|h| h.in_use == 0))
}

fn base_signed(disk: &Descriptor) -> bool {
    use std::io::Read;
    let mut head = [0; header::SIZE];
    let opened = disk.first_image().ok().and_then(|i| open::open_level(&i.file, Some(&disk.dir)).ok());
    let file = opened.and_then(|fd| open::reopen(&fd, Access::default()).ok());
    let read = file.map(|(mut file, _)| file.read_exact(&mut head));
    matches!(read, Some(Ok(()))) && header::has_signature(&head)
}

/// Clears in-use marks of deltas that are not the top: an interrupted merge, grow or change of tops left them. An
/// exclusive lock proves that no process uses the image. An image that is in use or damaged stays as it is; the
/// operation that needs it reports it.
fn clear_marks(disk: &LockedDescriptor, guids: &[Guid]) -> Result<()> {
    for guid in guids {
        let Some(image) = disk.image(guid).filter(|i| !disk.is_raw(i)) else { continue };
        let Ok(header) = read_header(&image.file, Some(&disk.dir)) else { continue };
        if !header.is_marked() || header.is_converting() {
            continue;
        }
        let access = Access { write: true, direct: false };
        let held = match image_set::lock_image(disk, &image.file, access, Sharing::Exclusive) {
            Err(e) if e.kind() == Kind::Busy => continue,
            other => other?,
        };
        image_set::repair_in_place(disk, &image.file)?;
        drop(held);
        report::say(
            0,
            format_args!("{} was marked in use by an interrupted operation: checked and cleared", image.file.display()),
        );
    }
    Ok(())
}

/// All images from the base to `guid` are there. `Open`, naming the first one that is not.
pub fn check_files(disk: &Descriptor, guid: &Guid) -> Result<()> {
    for image in disk.chain(guid)? {
        if let Err(e) = fs::symlink_metadata(&image.file) {
            bail!(
                Open,
                "image {} of snapshot {} cannot be found: {e}; the disk needs it, bring it back",
                image.file.display(),
                image.guid
            );
        }
    }
    Ok(())
}

//! Growing a disk, running or not. Neither its partition table nor the file system inside change.

use std::path::Path;

use super::{disk_lock, image_set, mount, online, recovery};
use crate::bail;
use crate::descriptor::{Image, LockedDescriptor};
use crate::device;
use crate::error::{IoContext, Kind, Result};
use crate::format::{guid, header};
use crate::image::grow::{grow, grow_raw};
use crate::image::lock::{self, LockedImage, Sharing};
use crate::image::open::Access;
use crate::image::target::Target;
use crate::report;
use crate::sys::aligned::read_full;
use crate::units::SECTOR;

const WRITE: Access = Access { write: true, direct: false };

/// Grows a disk to `sectors`, by its top image. The same size: 0, and a descriptor that an interrupted grow left with the
/// former size is corrected. A running disk grows without being unmounted. Smaller: `Param`. A ploop image's size is a multiple of its cluster (`Param`), a raw image's
/// is rounded up to 4 KiB.
pub fn grow_disk(descriptor: &Path, sectors: u64) -> Result<()> {
    let _operation = report::cancel::begin();
    let mut disk = disk_lock::open(descriptor)?;
    grow_locked(&mut disk, sectors)
}

/// The same of a disk whose descriptor the caller has locked.
pub(super) fn grow_locked(disk: &mut LockedDescriptor, sectors: u64) -> Result<()> {
    let running = image_set::writer(disk)?;
    recovery::before_change(disk)?;
    recovery::check_files(disk, &guid::TOP)?;
    let Some(top) = disk.image(&disk.top).cloned() else { bail!(DiskDescr, "descriptor: the top has no image") };
    image_set::refuse_shared(disk, &top)?;
    if let Some(device) = running {
        return online::grow(disk, &device, sectors);
    }
    let grown = grow_top(disk, &top, sectors)?;
    if disk.size_sectors != grown {
        let mut next = disk.descriptor.clone();
        next.size_sectors = grown;
        disk.commit_as(next)?;
        mount::drop_cache(disk);
    }
    Ok(())
}

/// Grows the disk of a running device, with its descriptor if it has one. `node`: as `/dev/ploop0`. Smaller: `Param`.
pub fn grow_device(node: &str, sectors: u64) -> Result<()> {
    let _operation = report::cancel::begin();
    let Some(device) = device::by_node(node)? else { bail!(Device, "{node} is no ploop device; see ploop list") };
    let Some(path) = device.descriptor.as_ref().filter(|_| !device.read_only) else {
        return online::grow_device(&device, sectors);
    };
    let mut disk = disk_lock::open(path)?;
    match image_set::writer(&disk)? {
        Some(found) if found.instance == device.instance => grow_locked(&mut disk, sectors),
        // The descriptor is another disk's by now.
        _ => online::grow_device(&device, sectors),
    }
}

fn grow_top(disk: &LockedDescriptor, top: &Image, sectors: u64) -> Result<u64> {
    let held = image_set::lock_image(disk, &top.file, WRITE, Sharing::Exclusive)?;
    if disk.is_raw(top) {
        return grow_raw_held(&held, sectors);
    }
    // The descriptor tells that no other program has marked it.
    image_set::repair_in_place(disk, &top.file)?;
    grow_held(&held, sectors)?;
    Ok(sectors)
}

/// Grows an image file that is no part of a running chain. `raw`: it is a raw image. Marked in use: `Open`; see [`grow_disk`]
/// for sizes.
pub fn grow_image(image: &Path, raw: bool, sectors: u64) -> Result<()> {
    let _operation = report::cancel::begin();
    let held = lock::lock_image(image, None, WRITE, Sharing::Exclusive).map_err(|e| image_set::named(e, image))?;
    image_set::refuse_dead_users(&[held.id()?], image)?;
    // A worker that had the lock until now may have been killed.
    image_set::refuse_unflushed([image], None)?;
    if let Some((descriptor, disk, guid)) = image_set::named_beside(&held.path, held.id()?)
        && disk.has_children(&guid)
    {
        bail!(
            Param,
            "{} is the image of a snapshot in {}: deltas stand on it; grow the disk (ploop grow {})",
            image.display(),
            descriptor.display(),
            descriptor.display()
        );
    }
    match raw {
        true => grow_raw_held(&held, sectors).map(drop),
        false => grow_held(&held, sectors),
    }
}

fn grow_raw_held(held: &LockedImage, sectors: u64) -> Result<u64> {
    let (file, shown) = (&held.file, held.path.display());
    let mut head = [0; header::SIZE];
    let got = read_full(file, &mut head, 0).ctx(Kind::Read, || format!("cannot read image {shown}"))?;
    if got == head.len() && header::has_signature(&head) {
        bail!(Param, "{shown} has the signature of a ploop image: it is not raw");
    }
    let len = file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {shown}"))?.len();
    let wanted = sectors.checked_next_multiple_of(online::RAW_SECTORS).and_then(|s| s.checked_mul(SECTOR));
    let Some(wanted) = wanted else { bail!(Param, "image {shown}: a size of {sectors} sectors is too large") };
    if wanted < len {
        bail!(Param, "image {shown} has {} sectors: it cannot be made smaller, {sectors}", len / SECTOR);
    }
    grow_raw(file, &held.path, len, wanted)?;
    Ok(wanted / SECTOR)
}

fn grow_held(held: &LockedImage, sectors: u64) -> Result<()> {
    let shown = held.path.display();
    let mut target = Target::open(&held.file, &held.path)?;
    if target.header.is_marked() {
        bail!(
            Open,
            "image {shown} is marked in use: a running device has it, or a crash left it so; check it first (ploop check -d \
             {shown})"
        );
    }
    let cluster = u64::from(target.header.cluster.sectors());
    if !sectors.is_multiple_of(cluster) {
        bail!(
            Param,
            "image {shown}: a size of {sectors} sectors is no multiple of its cluster, {cluster} sectors; take {} or {}",
            sectors / cluster * cluster,
            sectors.next_multiple_of(cluster)
        );
    }
    if sectors < target.header.sectors {
        bail!(Param, "image {shown} has {} sectors: it cannot be made smaller, {sectors}", target.header.sectors);
    }
    if sectors == target.header.sectors {
        return Ok(());
    }
    // Before anything is written: the larger size must fit the version.
    header::Header::sized(target.header.version, target.header.cluster, sectors)?;
    target.mark()?;
    match grow(&mut target, sectors) {
        Ok(()) => target.close(false),
        // What has reached the disk is not known: the mark stays.
        Err(e) if e.kind() == Kind::Fsync => Err(e),
        // The image is whole at each step.
        Err(e) => target.close_as_it_is().and(Err(e)),
    }
}

//! Another format for a disk that does not run: raw, preallocated, expanded, or the other version of the image format.
//!
//! To raw: the content is copied to a new file, the descriptor that names it is the commit point, and the old image's name
//! is taken afterwards. To preallocated: each cluster is allocated before its entry is written. To another version: all
//! images are rewritten in place, with a copy of header and BAT beside each ([`convert_recovery`]).

use std::fs::{File, Permissions};
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::Path;

use super::convert_recovery::{self, SCRATCH};
use super::{disk_lock, find, image_set, recovery};
use crate::bail;
use crate::descriptor::{self, Image, ImageMode, LockedDescriptor};
use crate::error::{IoContext, Kind, Result};
use crate::format::guid;
use crate::format::header::{self, Header, Version};
use crate::image::lock::{LockedImage, Sharing};
use crate::image::merge::{BATCH, Merge, MergeLevel, MergeOptions};
use crate::image::open::{Access, place_beside};
use crate::image::{fill, version};
use crate::report;
use crate::report::progress::Progress;
use crate::sys::aligned::read_full;
use crate::sys::file_id::FileId;
use crate::sys::folder::Place;
use crate::sys::store;
use crate::units::SECTOR;

const WRITE: Access = Access { write: true, direct: false };

/// Gives the base of a disk another format; deltas above it stay as they are. From raw, or of a disk that runs: `Param`. To
/// expanded: only the descriptor changes. The content does not change, at no instant.
pub fn convert_disk(descriptor: &Path, mode: ImageMode) -> Result<()> {
    let _operation = report::cancel::begin();
    let mut disk = open(descriptor)?;
    if disk.mode == ImageMode::Raw {
        bail!(
            Param,
            "{} is a raw disk: it is not converted in place; make a new disk, and copy the content into it",
            disk.path.display()
        );
    }
    recovery::check_files(&disk, &guid::TOP)?;
    let Some(base) = disk.chain(&disk.top)?.first().map(|image| Image::clone(image)) else {
        bail!(DiskDescr, "descriptor: the top has no image")
    };
    match mode {
        ImageMode::Raw => to_raw(&mut disk, &base),
        ImageMode::Preallocated => {
            let held = lock(&disk, &base)?;
            image_set::repair_in_place(&disk, &base.file)?;
            let mut shown = Progress::begin("preallocating");
            fill::preallocate(&held.file, &held.path, &mut |done, total| {
                not_cancelled(&disk)?;
                shown.at(done, total);
                Ok(())
            })?;
            commit_mode(&mut disk, mode)
        }
        ImageMode::Expanded => commit_mode(&mut disk, mode),
    }
}

/// Locks a disk that is to be converted, with what interrupted operations left finished.
fn open(descriptor: &Path) -> Result<LockedDescriptor> {
    let mut disk = disk_lock::open(descriptor)?;
    image_set::refuse_running(&disk, "converted")?;
    if nix::unistd::geteuid().is_root()
        && let Some(device) = find::devices_of(&disk.place, &disk, None)?.first()
    {
        bail!(Param, "the disk runs as {}: unmount it before it is converted", device.node().display());
    }
    recovery::before_change(&mut disk)?;
    Ok(disk)
}

fn not_cancelled(disk: &LockedDescriptor) -> Result<()> {
    if report::cancel::requested() {
        bail!(Sys, "the conversion of {} was cancelled: its content is whole", disk.path.display());
    }
    Ok(())
}

/// Locks an image for this process alone, and refuses one that another disk may stand on.
fn lock(disk: &LockedDescriptor, image: &Image) -> Result<LockedImage> {
    let held = image_set::lock_image(disk, &image.file, WRITE, Sharing::Exclusive)?;
    let shown = image.file.display();
    let meta = nix::sys::stat::fstat(&held.file).ctx(Kind::Fstat, || format!("cannot look at {shown}"))?;
    if meta.st_nlink > 1 {
        bail!(
            Busy,
            "image {shown} has {} names (hard links), so that another disk may stand on it: it is not converted; remove the \
             names that are not needed, or copy the image",
            meta.st_nlink
        );
    }
    Ok(held)
}

fn commit_mode(disk: &mut LockedDescriptor, mode: ImageMode) -> Result<()> {
    if disk.mode == mode {
        return Ok(());
    }
    let mut next = disk.descriptor.clone();
    next.mode = mode;
    disk.commit_as(next)
}

fn to_raw(disk: &mut LockedDescriptor, base: &Image) -> Result<()> {
    let held = lock(disk, base)?;
    image_set::repair_in_place(disk, &base.file)?;
    let scratch = place_beside(&base.file, &disk.dir)?.suffixed(SCRATCH);
    let (file, copied) = copy_raw(disk, &held, &scratch)?;
    #[cfg(test)]
    if crate::image::breach::is("old image removed before the commit") {
        let _ = store::unlink(&place_beside(&base.file, &disk.dir)?);
    }
    let before = disk.descriptor.clone();
    let mut next = before.clone();
    next.set_file(&base.guid, scratch.path())?;
    next.mode = ImageMode::Raw;
    if let Err(e) = disk.commit_as(next) {
        image_set::undo_new(disk, &scratch, file);
        return Err(e);
    }
    report::say(0, format_args!("{} is raw: {} MiB were copied", base.file.display(), copied >> 20));
    // From here on the disk is converted; only its image has a name that it is not to keep.
    let named = convert_recovery::finish_raw(disk, Some(held.id()?));
    drop(held);
    if let Err(e) = named {
        report::warn(format_args!("the raw image keeps the name {} until the next operation: {e}", scratch.display()));
    }
    Ok(())
}

/// Makes the raw copy of an image, durable with its name. After an error the new file is removed.
fn copy_raw(disk: &LockedDescriptor, held: &LockedImage, scratch: &Place) -> Result<(FileId, u64)> {
    let shown = scratch.display();
    let file = store::create_new(scratch, 0o600).ctx(Kind::Creat, || format!("cannot create image {shown}"))?;
    let id = FileId::of(&file).ctx(Kind::Fstat, || format!("cannot look at image {shown}"))?;
    let copy = || -> Result<u64> {
        let old = nix::sys::stat::fstat(&held.file).ctx(Kind::Fstat, || format!("cannot look at {shown}"))?;
        // Without the right to change owners the caller becomes the owner.
        let _ = fchown(&file, Some(old.st_uid), Some(old.st_gid));
        file.set_permissions(Permissions::from_mode(old.st_mode & 0o7777))
            .ctx(Kind::Creat, || format!("cannot set the rights of {shown}"))?;
        let (header, _) = crate::image::target::read_table(&held.file, &held.path)?;
        let bytes = header.sectors * SECTOR;
        match store::fallocate(&file, 0, bytes) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {}
            other => other.ctx(Kind::Fallocate, || format!("cannot take {bytes} bytes for image {shown}"))?,
        }
        let path = scratch.path();
        let source = MergeLevel { file: &held.file, name: &held.path, raw: false };
        let target = MergeLevel { file: &file, name: &path, raw: true };
        let mut bar = Progress::begin("converting");
        let merged = Merge::prepare(&[source], target, Some(&[]))?
            .run(&mut MergeOptions {
                progress: &mut |done, total| {
                    not_cancelled(disk)?;
                    bar.at(done, total);
                    Ok(())
                },
                stay_marked: false,
                batch: BATCH,
                reflink: true,
            })
            .map_err(|failed| failed.error)?;
        // The classic's check wants space that was not written to begin and end on cluster borders.
        crate::image::complete::complete_raw(&file, header.cluster, bytes)
            .ctx(Kind::Write, || format!("cannot complete image {shown}"))?;
        refuse_signature(&file, disk)?;
        store::sync_all(&file).ctx(Kind::Fsync, || format!("cannot sync image {shown}"))?;
        descriptor::sync_folder(&scratch.folder)?;
        Ok(merged.copied + merged.shared)
    };
    copy().map(|bytes| (id, bytes)).inspect_err(|_| {
        let _ = store::unlink_file(scratch, id);
    })
}

/// A raw image that begins like a ploop image would be taken for one, and not be opened by any program.
fn refuse_signature(file: &File, disk: &LockedDescriptor) -> Result<()> {
    let mut head = [0; header::SIZE];
    let got = read_full(file, &mut head, 0).ctx(Kind::Read, || "cannot read the raw image")?;
    if got == head.len() && header::has_signature(&head) {
        bail!(
            Param,
            "the first bytes of the disk {} are those of a ploop image: as a raw image it could not be told from one",
            disk.path.display()
        );
    }
    Ok(())
}

/// An image whose version is to change.
struct Changing {
    held: LockedImage,
    header: Header,
    backup: Place,
}

/// Gives all images of a disk the format version `to`. A raw base, or a disk that runs: `Param`; so is a disk that version
/// 1 cannot express. The content does not change; an interrupted run is undone or finished by the next operation.
pub fn change_version(descriptor: &Path, to: Version) -> Result<()> {
    let _operation = report::cancel::begin();
    let mut disk = open(descriptor)?;
    if disk.mode == ImageMode::Raw {
        bail!(Param, "{} has a raw base: there is no version to be changed", disk.path.display());
    }
    for snapshot in &disk.snapshots {
        recovery::check_files(&disk, &snapshot.guid)?;
    }
    let base = disk.chain(&disk.top)?.first().map(|image| image.guid);
    let mut images: Vec<&Image> = disk.images.iter().collect();
    // The base is flagged first, and its flag is taken last: every program that looks at it alone finds the conversion.
    images.sort_by_key(|image| Some(image.guid) != base);
    let mut changing = Vec::new();
    for image in images {
        let held = lock(&disk, image)?;
        image_set::repair_in_place(&disk, &image.file)?;
        let header = version::check(&held.file, &held.path, to)?;
        if header.version != to {
            let backup = place_beside(&image.file, &disk.dir)?.suffixed(version::BACKUP);
            changing.push(Changing { held, header, backup });
        }
    }
    if changing.is_empty() {
        return Ok(());
    }
    if let Err(e) = change_all(&changing, to) {
        drop(changing);
        // Undone at once where that can be done; else by the next operation.
        if let Err(later) = convert_recovery::finish(&mut disk) {
            report::warn(format_args!("the conversion is undone by the next operation on the disk: {later}"));
        }
        return Err(e);
    }
    report::say(0, format_args!("All images of {} have version {}", disk.path.display(), to.number()));
    Ok(())
}

fn change_all(changing: &[Changing], to: Version) -> Result<()> {
    for c in changing {
        match store::unlink(&c.backup) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).ctx(Kind::Unlink, || format!("cannot remove {}", c.backup.display()));
            }
            _ => {}
        }
    }
    #[cfg(test)]
    let late = crate::image::breach::is("backup after the flag");
    #[cfg(not(test))]
    let late = false;
    if !late {
        back_up(changing)?;
    }
    for c in changing {
        version::flag(&c.held.file, &c.held.path, &c.header)?;
    }
    if late {
        back_up(changing)?;
    }
    for c in changing {
        version::rewrite(&c.held.file, &c.held.path, &c.header, to)?;
    }
    #[cfg(test)]
    if crate::image::breach::is("backups removed before the flags") {
        remove_backups(changing);
    }
    for c in changing.iter().rev() {
        let now = Header { version: to, ..c.header };
        version::unflag(&c.held.file, &c.held.path, &now, c.header.in_use)?;
    }
    remove_backups(changing);
    Ok(())
}

/// Copies of all headers and BATs, durable with their names: from here on a flag can be set.
fn back_up(changing: &[Changing]) -> Result<()> {
    let copies = || -> Result<()> {
        for c in changing {
            version::back_up(&c.held.file, &c.held.path, &c.header, &c.backup)?;
        }
        for c in changing {
            descriptor::sync_folder(&c.backup.folder)?;
        }
        Ok(())
    };
    copies().inspect_err(|_| remove_backups(changing))
}

/// A copy that stays does no harm: the next operation removes it.
fn remove_backups(changing: &[Changing]) {
    for c in changing {
        if let Err(e) = store::unlink(&c.backup)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            report::warn(format_args!("{} is not needed any more but cannot be removed: {e}", c.backup.display()));
        }
    }
    for c in changing {
        if let Err(e) = descriptor::sync_folder(&c.backup.folder) {
            report::warn(e);
        }
    }
}

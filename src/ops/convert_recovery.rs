//! What an interrupted conversion left, by this program or the classic: finished or undone before the next operation.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::image_set;
use crate::bail;
use crate::descriptor::{self, Descriptor, Image, ImageMode, LockedDescriptor};
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::header::Header;
use crate::image::check::read_header;
use crate::image::lock::{LockedImage, Sharing};
use crate::image::open::{Access, place_beside, reopen};
use crate::image::version;
use crate::report;
use crate::sys::file_id::FileId;
use crate::sys::folder::Place;
use crate::sys::store;
use crate::units::SECTOR;

/// Suffix of a raw copy's name until it has that of the image which it replaces.
pub(super) const SCRATCH: &str = ".ploop-raw";

const READ: Access = Access { write: false, direct: false };
const WRITE: Access = Access { write: true, direct: false };

/// Finishes or undoes conversions. The caller holds the disk's lock, so none is under way.
pub(super) fn finish(disk: &mut LockedDescriptor) -> Result<()> {
    finish_raw(disk, None)?;
    finish_version(disk)
}

/// The name without [`SCRATCH`].
fn final_name(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.as_bytes().strip_suffix(SCRATCH.as_bytes()).filter(|n| !n.is_empty())?;
    Some(path.with_file_name(OsStr::from_bytes(name)))
}

/// After the commit of a conversion to raw: the raw image takes the name of the old one, step by step with both names named
/// by files. Before it: an incomplete copy is removed. `old`: the replaced image, where the caller knows it.
pub(super) fn finish_raw(disk: &mut LockedDescriptor, old: Option<FileId>) -> Result<()> {
    let Some(base) = disk.chain(&disk.top).ok().and_then(|c| c.first().map(|i| Image::clone(i))) else { return Ok(()) };
    let wanted = final_name(&base.file).filter(|_| disk.mode == ImageMode::Raw);
    let Some(wanted) = wanted else { return forget_copy(disk, &base) };
    let (from, to) = (place_beside(&base.file, &disk.dir)?, place_beside(&wanted, &disk.dir)?);
    let look = |place: &Place| place.id().ctx(Kind::Fstat, || format!("cannot look at {}", place.display()));
    let Some(raw) = look(&from)? else { return Ok(()) };
    if let Some(there) = look(&to)?.filter(|there| *there != raw) {
        if old != Some(there) && !is_replaced(disk, &wanted) {
            report::warn(format_args!(
                "the raw image keeps the name {}: {} is another file, and stays",
                from.display(),
                to.display()
            ));
            return Ok(());
        }
        store::unlink_file(&to, there).ctx(Kind::Unlink, || format!("cannot remove {}", to.display()))?;
    }
    if look(&to)?.is_none()
        && let Err(e) = store::link(&from, &to)
    {
        report::warn(format_args!(
            "the raw image keeps the name {}: {} cannot be made: {e}",
            from.display(),
            to.display()
        ));
        return Ok(());
    }
    descriptor::sync_folder(&to.folder)?;
    let mut next = disk.descriptor.clone();
    next.set_file(&base.guid, wanted)?;
    disk.commit_as(next)?;
    store::unlink_file(&from, raw).ctx(Kind::Unlink, || format!("cannot remove the name {}", from.display()))?;
    descriptor::sync_folder(&from.folder)
}

/// The file is the ploop1 image of this disk's base: nothing but a finished conversion leaves it beside the raw one.
fn is_replaced(disk: &Descriptor, path: &Path) -> bool {
    let raw = disk.chain(&disk.top).ok().and_then(|c| c.first().and_then(|i| std::fs::metadata(&i.file).ok()));
    read_header(path, Some(&disk.dir))
        .is_ok_and(|h| h.cluster == disk.blocksize && raw.is_some_and(|m| m.len() == h.sectors * SECTOR))
        && !disk.images.iter().any(|i| i.file == path)
}

/// Removes a raw copy that the descriptor does not name: it is incomplete, or a second name of the image.
fn forget_copy(disk: &LockedDescriptor, base: &Image) -> Result<()> {
    let Ok(place) = place_beside(&base.file, &disk.dir) else { return Ok(()) };
    let scratch = place.suffixed(SCRATCH);
    if !scratch.regular().is_ok_and(|found| found.is_some()) || disk.images.iter().any(|i| i.file == scratch.path()) {
        return Ok(());
    }
    store::unlink(&scratch).ctx(Kind::Unlink, || format!("cannot remove {}", scratch.display()))?;
    report::say(0, format_args!("Removed {}, left by an interrupted conversion", scratch.display()));
    descriptor::sync_folder(&scratch.folder)
}

/// An image with the copy of its header and BAT, if there is one.
struct Found {
    path: PathBuf,
    header: Header,
    backup: Option<(Place, File, Header)>,
}

impl Found {
    /// It was rewritten completely: no flag, and another version than its copy.
    fn is_converted(&self) -> bool {
        !self.header.is_converting()
            && self.backup.as_ref().is_some_and(|(_, _, copy)| copy.version != self.header.version)
    }
}

/// A change of versions: where an image of the disk has been completed, all were rewritten, and the rest is completed too;
/// else every flagged one gets its copy back.
fn finish_version(disk: &mut LockedDescriptor) -> Result<()> {
    let (found, unreadable) = images(disk);
    if !found.iter().any(|f| f.header.is_converting()) {
        return remove_backups(found);
    }
    if let Some(e) = unreadable {
        // It may be the one that tells whether the change is finished or undone.
        return Err(e.context("a change of the version was interrupted, and all images are needed to finish it"));
    }
    let forward = found.iter().any(Found::is_converted);
    let mut held: Vec<(LockedImage, &Found)> = Vec::new();
    for f in &found {
        held.push((image_set::lock_image(disk, &f.path, WRITE, Sharing::Exclusive)?, f));
    }
    for (_, f) in held.iter().filter(|(_, f)| f.header.is_converting()) {
        let whole = match forward {
            true => held.iter().any(|(h, other)| other.path == f.path && version::is_whole(&h.file, &f.header)),
            false => f.backup.is_some(),
        };
        if !whole {
            bail!(
                Busy,
                "image {}: a change of its version was interrupted, and {}{} is missing or does not fit: bring that file or \
                 the whole disk back from a backup",
                f.path.display(),
                f.path.display(),
                version::BACKUP
            );
        }
    }
    // The sync after which a flag was gone may have failed: once more, before the copies go.
    for (image, f) in held.iter().filter(|(_, f)| forward && f.is_converted()) {
        let closed = f.backup.as_ref().map_or(0, |(_, _, copy)| copy.in_use);
        version::unflag(&image.file, &f.path, &f.header, closed)?;
    }
    // The base comes first in `found`; its flag is taken last.
    for (image, f) in held.iter().rev().filter(|(_, f)| f.header.is_converting()) {
        let closed = f.backup.as_ref().map_or(0, |(_, _, copy)| copy.in_use);
        let header = match &f.backup {
            Some((_, backup, copy)) if !forward => version::restore(&image.file, &f.path, copy, backup)?,
            _ => f.header,
        };
        version::unflag(&image.file, &f.path, &header, closed)?;
    }
    let what = if forward { "finished" } else { "undone" };
    report::say(0, format_args!("{}: an interrupted change of the version was {what}", disk.path.display()));
    drop(held);
    remove_backups(found)
}

/// Images whose headers can be read, the base first, and why another one cannot be.
fn images(disk: &LockedDescriptor) -> (Vec<Found>, Option<Error>) {
    let base = disk.chain(&disk.top).ok().and_then(|c| c.first().map(|i| i.guid));
    let mut all: Vec<&Image> = disk.images.iter().filter(|i| !disk.is_raw(i)).collect();
    all.sort_by_key(|i| Some(i.guid) != base);
    let (mut found, mut unreadable) = (Vec::new(), None);
    for image in all {
        match read_header(&image.file, Some(&disk.dir)) {
            Ok(header) => {
                found.push(Found { path: image.file.clone(), header, backup: backup(disk, image, &header) });
            }
            Err(e) => unreadable = Some(e),
        }
    }
    (found, unreadable)
}

fn backup(disk: &LockedDescriptor, image: &Image, header: &Header) -> Option<(Place, File, Header)> {
    let place = place_beside(&image.file, &disk.dir).ok()?.suffixed(version::BACKUP);
    place.regular().ok()??;
    let fd = place.open(nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_NOFOLLOW).ok()?;
    let (file, _) = reopen(&fd, READ).ok()?;
    let copy = version::backup_of(header, &file)?;
    Some((place, file, copy))
}

/// Removes copies that fit their images. They are of no use: no image is flagged.
fn remove_backups(found: Vec<Found>) -> Result<()> {
    for (place, ..) in found.into_iter().filter_map(|f| f.backup) {
        match store::unlink(&place) {
            Ok(()) => {
                report::say(0, format_args!("Removed {}, left by an interrupted conversion", place.display()));
                descriptor::sync_folder(&place.folder)?;
            }
            Err(e) => report::say(1, format_args!("{} stays: {e}", place.display())),
        }
    }
    Ok(())
}

/// The classic renames the raw copy over the image before it renames the descriptor that says so. In between, the stored
/// descriptor calls a raw file a ploop1 image. Whether `new`, the descriptor under its temporary name, is that: same disk,
/// and the base has exactly its bytes. That the base has no signature the caller has seen.
pub(super) fn is_half_raw(disk: &Descriptor, new: &Descriptor) -> bool {
    let as_raw = Descriptor { mode: ImageMode::Raw, layout: new.layout, ..disk.clone() };
    let base = disk.chain(&disk.top).ok().and_then(|c| c.first().and_then(|i| std::fs::symlink_metadata(&i.file).ok()));
    let alone = disk.images.len() == 1;
    as_raw == *new
        && base.is_some_and(|m| m.is_file() && m.len() > 0 && (!alone || m.len() == new.size_sectors * SECTOR))
}

/// Removes what the classic had copied when it was interrupted before it renamed anything.
pub(super) fn forget_classic_copy(disk: &Descriptor) {
    let Ok(first) = disk.first_image() else { return };
    let Ok(copy) = place_beside(&first.file, &disk.dir).map(|p| p.suffixed(".tmp")) else { return };
    if copy.regular().is_ok_and(|found| found.is_some()) && !disk.images.iter().any(|i| i.file == copy.path()) {
        match store::unlink(&copy) {
            Ok(()) => report::say(0, format_args!("Removed {}, left by an interrupted conversion", copy.display())),
            Err(e) => report::say(1, format_args!("{} stays: {e}", copy.display())),
        }
    }
}

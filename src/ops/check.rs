//! Checking an image file, or a disk with all that its descriptor names.

use std::fs::File;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::disk_lock::Disk;
use super::mount_images::refuse_cut_off;
use super::{disk_lock, find, image_set, online, orphans, recovery};
use crate::bail;
use crate::descriptor::{Descriptor, Image};
use crate::error::{IoContext, Kind, Result};
use crate::format::guid::Guid;
use crate::image::check::check_file;
pub use crate::image::check::{CheckOptions, CheckReport};
use crate::image::live;
use crate::image::open::open_level;
use crate::report;
use crate::sys::file_id::FileId;
use crate::sys::folder::Folder;
use crate::sys::reopen::{Access, reopen};

/// Checks one image file, and repairs what the options say. `InUse` if a device of this machine has it open and
/// anything could be written.
pub fn check_image(path: &Path, options: &CheckOptions) -> Result<CheckReport> {
    let _operation = report::cancel::begin();
    let _lock = match options.read_only {
        true => None,
        false => {
            refuse_attached(path)?;
            let held = hold(path, None)?;
            image_set::refuse_unflushed([path], None)?;
            held
        }
    };
    let found = check_file(path, None, options)?;
    tell(&found);
    Ok(found)
}

/// Checks all deltas of a disk from the base to `guid` (none: the top), clears marks that a crash left and fills holes;
/// looks at the tree, at sizes and versions, and reports files that nothing names. `InUse` if the disk runs.
pub fn check_disk(descriptor: &Path, guid: Option<&Guid>) -> Result<()> {
    check(descriptor, guid, How::Repair)
}

/// Checks a disk as [`check_disk`] does, and writes nothing: a mark that a crash left is `InUse`. The images of a disk that runs
/// are checked while its worker writes to them.
pub fn look_at_disk(descriptor: &Path, guid: Option<&Guid>) -> Result<()> {
    let disk = Disk::look(descriptor)?;
    let Some(device) = find::devices_of(disk.place(), &disk, None)?.into_iter().next() else {
        drop(disk);
        return check(descriptor, guid, How::Look);
    };
    let _operation = report::cancel::begin();
    disk.check_tree()?;
    let mut below: Option<(PathBuf, CheckReport)> = None;
    for image in disk.chain(guid.unwrap_or(&disk.top))? {
        if disk.is_raw(image) {
            continue;
        }
        let live = live::look(&image.file, Some(&disk.dir))?;
        let found = CheckReport {
            skipped: false,
            cluster: live.header.cluster,
            version: Some(live.header.version),
            sectors: live.header.sectors,
            notes: Vec::new(),
        };
        check_cluster(&disk, image, &found)?;
        if let Some((lower, l)) = &below {
            fits(lower, l, &image.file, &found)?;
        }
        report::say(1, format_args!("{}: {} clusters have a place, each its own", image.file.display(), live.mapped));
        below = Some((image.file.clone(), found));
    }
    report::say(0, format_args!("{} runs as {}: looked at as it runs", descriptor.display(), device.node().display()));
    Ok(())
}

/// What a check of a disk may change.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Look,
    Repair,
    RemoveOrphans,
}

/// Checks a disk as [`check_disk`] does. Then it removes deltas that no descriptor in the folder names and no process
/// uses. A delta that may belong to another disk stays, and is an error.
pub fn check_disk_and_remove_orphans(descriptor: &Path, guid: Option<&Guid>) -> Result<()> {
    check(descriptor, guid, How::RemoveOrphans)
}

fn check(descriptor: &Path, guid: Option<&Guid>, how: How) -> Result<()> {
    let _operation = report::cancel::begin();
    let mut disk = match how {
        How::RemoveOrphans => disk_lock::open(descriptor)?,
        How::Repair | How::Look => disk_lock::open_to_look(descriptor)?,
    };
    image_set::refuse_dead(&disk)?;
    if let Some(running) = find::devices_of(&disk.place, &disk, None)?.first() {
        if running.component().is_empty()
            && let Err(e) = online::check_chain(&disk, running)
        {
            report::warn(e);
        }
        bail!(
            InUse,
            "{} runs as {}; unmount it before it is checked, or look without writing (-r)",
            disk.path.display(),
            running.node().display()
        );
    }
    find::refuse_replaced(&disk)?;
    disk.check_tree()?;
    if !disk.is_unlocked() && how != How::Look {
        recovery::before_check(&mut disk)?;
    }
    let chain = disk.chain(guid.unwrap_or(&disk.top))?;
    for why in disk.snapshots.iter().filter_map(|s| disk.half_merged(&s.guid)) {
        report::warn(why);
    }
    let mut below: Option<(PathBuf, CheckReport)> = None;
    for image in chain {
        // Nothing runs on the disk, so a mark anywhere is a crash's.
        let options = CheckOptions {
            check: true,
            drop_inuse: true,
            repair_sparse: true,
            raw: disk.is_raw(image),
            raw_blocksize: Some(u64::from(disk.blocksize.sectors())),
            ..CheckOptions::default()
        };
        // Another disk may stand on the same file, and its worker knows the file as it is.
        let used = !image_set::users(&image.file)?.is_empty();
        let read_only = used || disk.is_unlocked() || how == How::Look;
        let force = used || how == How::Look;
        let options = CheckOptions { read_only, drop_inuse: !read_only, repair_sparse: !read_only, force, ..options };
        let lock = hold(&image.file, Some(&disk.dir))?;
        image_set::refuse_unflushed([&*image.file], Some(&disk.path))?;
        let found = check_file(&image.file, Some(&disk.dir), &options)?;
        drop(lock);
        tell(&found);
        if found.skipped {
            // Of a clean image the BAT was not read; a mount reads it.
            refuse_cut_off(&image.file, &disk.dir)?;
        }
        check_cluster(&disk, image, &found)?;
        if let Some((lower, l)) = &below {
            fits(lower, l, &image.file, &found)?;
        }
        below = Some((image.file.clone(), found));
    }
    if let Some((top, found)) = below.filter(|_| guid.is_none_or(|g| *g == disk.top))
        && found.sectors != disk.size_sectors
    {
        report::warn(format_args!(
            "{} says {} sectors, its top {} has {}; mounts take the image's size",
            disk.path.display(),
            disk.size_sectors,
            top.display(),
            found.sectors
        ));
    }
    orphans::leftovers(&disk, how == How::RemoveOrphans)
}

fn check_cluster(disk: &Descriptor, image: &Image, found: &CheckReport) -> Result<()> {
    if found.cluster != disk.blocksize {
        bail!(
            Param,
            "{} has clusters of {} sectors, the descriptor says {}",
            image.file.display(),
            found.cluster.sectors(),
            disk.blocksize.sectors()
        );
    }
    Ok(())
}

fn fits(lower: &Path, l: &CheckReport, upper: &Path, u: &CheckReport) -> Result<()> {
    if l.version.is_some() && l.version != u.version {
        bail!(
            Format,
            "{} and {} have different format versions; all deltas of a chain must have one",
            lower.display(),
            upper.display()
        );
    }
    if l.sectors > u.sectors {
        bail!(
            Format,
            "{} ({} sectors) is larger than {} ({} sectors) that stands on it",
            lower.display(),
            l.sectors,
            upper.display(),
            u.sectors
        );
    }
    Ok(())
}

fn tell(found: &CheckReport) {
    for note in &found.notes {
        report::say(0, note);
    }
}

/// Refuses an image that a device of this machine has open: its worker would not see the change. `InUse`.
fn refuse_attached(path: &Path) -> Result<()> {
    image_set::refuse_dead_users(&FileId::at(path).into_iter().collect::<Vec<_>>(), path)?;
    match image_set::users(path)?.first() {
        Some(device) => bail!(
            InUse,
            "{} is part of {}; unmount that first, or look without writing (-r)",
            path.display(),
            device.node().display()
        ),
        None => Ok(()),
    }
}

/// Takes the lock that a worker holds on the image that it writes. This also finds a worker without a record in this
/// /run/ploop. None: the file system has no such locks.
fn hold(path: &Path, dir: Option<&Folder>) -> Result<Option<Flock<File>>> {
    let fd = open_level(path, dir)?;
    let (file, _) =
        reopen(&fd, Access::default()).ctx(Kind::Open, || format!("cannot open image {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => {
            bail!(InUse, "{} is locked by a program that writes to it; end that first", path.display())
        }
        // A file system without such locks.
        Err(_) => Ok(None),
    }
}

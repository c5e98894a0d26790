//! What the operations on a disk's deltas share: which devices use them, what a new one is like, how old ones are
//! removed.

use std::path::{Path, PathBuf};

use super::find;
use crate::bail;
use crate::descriptor::{self, Descriptor, Image, LockedDescriptor};
use crate::device::{self, Device};
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::guid::Guid;
use crate::format::header::Version;
use crate::image::check::{CheckOptions, check_file, read_header};
use crate::image::create::{Built, create_delta};
use crate::image::lock::{self, LockedImage, Sharing};
use crate::image::open::{self, Access};
use crate::report;
use crate::sys::file_id::FileId;
use crate::sys::folder::{Folder, Place};
use crate::sys::store;
use crate::units::{ClusterSize, SECTOR};

/// What a delta on top of an image has to be like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    pub version: Version,
    pub cluster: ClusterSize,
    pub sectors: u64,
}

impl Shape {
    /// Of a delta that is to stand on this image. Files that are no images of this disk's kind are errors.
    pub fn above(disk: &Descriptor, image: &Image) -> Result<Shape> {
        let shown = image.file.display();
        if disk.is_raw(image) {
            let fd = open::open_level(&image.file, Some(&disk.dir))?;
            let (file, _) = open::reopen(&fd, Access::default()).ctx(Kind::Open, || format!("cannot open {shown}"))?;
            let len = file.metadata().ctx(Kind::Fstat, || format!("cannot look at {shown}"))?.len();
            return Ok(Shape { version: Version::V2, cluster: disk.blocksize, sectors: len / SECTOR });
        }
        let header = read_header(&image.file, Some(&disk.dir))?;
        if header.cluster != disk.blocksize {
            bail!(
                Param,
                "image {shown} has clusters of {} sectors, its descriptor says {}",
                header.cluster.sectors(),
                disk.blocksize.sectors()
            );
        }
        Ok(Shape { version: header.version, cluster: header.cluster, sectors: header.sectors })
    }

    /// Makes an empty delta like this, durable.
    pub fn make(&self, place: &Place) -> Result<Built> {
        report::say(
            0,
            format_args!(
                "Creating delta {} bs={} size={} sectors v{}",
                place.display(),
                self.cluster.sectors(),
                self.sectors,
                self.version.number()
            ),
        );
        create_delta(place, self.version, self.cluster, self.sectors)
    }
}

/// A name for a new delta: beside the first image, or in `folder`, which must exist (`Creat`).
pub fn new_name(disk: &Descriptor, folder: Option<&Path>) -> Result<Place> {
    let first = &disk.first_image()?.file;
    let Some(stem) = first.file_name() else { bail!(DiskDescr, "image {} has no name", first.display()) };
    let folder = match folder {
        None => {
            let place = disk.dir.place(first);
            place.ctx(Kind::Creat, || format!("cannot open the folder of {}", first.display()))?.folder
        }
        Some(dir) => {
            let named = || format!("folder {}: new deltas go into one", dir.display());
            let found = Folder::resolve(dir).ctx(Kind::Creat, named)?;
            match found.strip_prefix(&disk.dir) {
                Ok(inside) => disk.dir.below(inside).ctx(Kind::Creat, named)?,
                Err(_) => found,
            }
        }
    };
    check_usable(disk, &folder)?;
    let mut name = stem.to_owned();
    name.push(format!(".{}", Guid::generate()));
    Ok(folder.entry(name))
}

/// Refuses a folder outside the disk's folder in which a new delta would belong to a user whose images are not opened;
/// see [`open::open_level`].
fn check_usable(disk: &Descriptor, folder: &Path) -> Result<()> {
    let shown = disk.dir.display();
    let owner = disk.dir.stat().ctx(Kind::Fstat, || format!("cannot look at folder {shown}"))?.st_uid;
    let me = nix::unistd::geteuid().as_raw();
    if owner != me && !disk.dir.has(folder) {
        bail!(
            Param,
            "folder {} lies outside the disk's folder {shown}, which belongs to user {owner}: the new delta would belong \
             to user {me} and not be opened; leave the folder out, or give the disk to user {me}",
            folder.display()
        );
    }
    Ok(())
}

/// The device that runs this disk under this component and may write to its top; none: no ploop device does.
pub fn running(disk: &LockedDescriptor, component: &str) -> Result<Option<Device>> {
    find::check_component(component)?;
    let found = find::of_disk(disk, component)?;
    if found.is_none() {
        find::refuse_replaced(disk)?;
    }
    Ok(found.filter(|d| !d.read_only && d.state != device::State::Dead))
}

/// The device that runs this disk and may write to its top, whatever its component.
pub fn writer(disk: &LockedDescriptor) -> Result<Option<Device>> {
    if !nix::unistd::geteuid().is_root() {
        // Only root can make devices. The locks on the images still refuse a second writer.
        return Ok(None);
    }
    let found = find::devices_of(&disk.place, disk, None)?;
    if found.is_empty() {
        find::refuse_replaced(disk)?;
    }
    Ok(found.into_iter().find(|d| !d.read_only && d.state != device::State::Dead))
}

/// Refuses what this version does only to a disk that does not run; `done`: what happens to it, as `grown`. `Param`.
pub fn refuse_running(disk: &LockedDescriptor, done: &str) -> Result<()> {
    match writer(disk)? {
        None => Ok(()),
        Some(device) => bail!(
            Param,
            "the disk runs as {}: unmount it before it is {done}; in this version that is not done while it runs",
            device.node().display()
        ),
    }
}

/// Devices with this file among their levels.
pub fn users(path: &Path) -> Result<Vec<Device>> {
    let Ok(id) = FileId::at(path) else { return Ok(Vec::new()) };
    let mut found = match device::list_of(|d| d.level_of(id).is_some()) {
        // A user without rights may not be allowed to list devices. The locks on the images still refuse a second
        // writer.
        Err(e) if nix::unistd::geteuid().is_root() => return Err(e),
        other => other.unwrap_or_default(),
    };
    found.retain(|d| d.state != device::State::Dead);
    Ok(found)
}

/// Refuses to change a disk under a device that is still there although its server was killed. It may be mounted; and the
/// next mount decides what of the last writes is in the images. `InUse`.
pub fn refuse_dead(disk: &LockedDescriptor) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        // Only root can make devices.
        return Ok(());
    }
    let found = find::devices_of(&disk.place, disk, None)?;
    found.iter().find(|d| is_dead_writer(d)).map_or(Ok(()), |dead| Err(left_by(dead, &disk.path)))
}

/// The same for image files: devices with one of them among their levels.
pub fn refuse_dead_users(files: &[FileId], shown: &Path) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let found = device::list_of(|d| files.iter().any(|id| d.level_of(*id).is_some()))?;
    found.iter().find(|d| is_dead_writer(d)).map_or(Ok(()), |dead| Err(left_by(dead, shown)))
}

/// A read-only device that has lost its server loses nothing by a change.
fn is_dead_writer(device: &Device) -> bool {
    !device.read_only && device.state == device::State::Dead
}

fn left_by(dead: &Device, shown: &Path) -> Error {
    let node = dead.node().display();
    let mounted = match find::mounts_of(dead).unwrap_or_default().first() {
        Some(mount) => format!(", and it is still mounted at {}", mount.target.display()),
        None => String::new(),
    };
    Error::new(
        Kind::InUse,
        format!(
            "{} was run by {node}, whose server was killed{mounted}: nothing was changed; end that device first (ploop umount \
             -d {node}), and mount the disk once, which repairs it",
            shown.display()
        ),
    )
}

/// Locks an image of the disk. If another process uses it, the error (17) names the device.
pub fn lock_image(disk: &Descriptor, path: &Path, access: Access, others: Sharing) -> Result<LockedImage> {
    let held = lock::lock_image(path, Some(&disk.dir), access, others).map_err(|e| named(e, path))?;
    // A worker that had the lock until now may have been killed.
    refuse_unflushed([path], Some(&disk.dir.join(descriptor::FILE_NAME)))?;
    Ok(held)
}

/// Refuses images whose last changes wait for the next mount, since their server was killed before they were flushed: what
/// the file holds is older than what was answered. `Busy`.
pub fn refuse_unflushed<'a>(images: impl IntoIterator<Item = &'a Path>, descriptor: Option<&Path>) -> Result<()> {
    for image in images {
        let Ok(id) = FileId::at(image) else { continue };
        // A user without rights cannot look, nor mount.
        let found =
            device::unflushed(&[id]).or_else(|e| if nix::unistd::geteuid().is_root() { Err(e) } else { Ok(None) })?;
        let Some((_, waits)) = found.filter(|_| users(image).is_ok_and(|users| users.is_empty())) else {
            continue;
        };
        let disk = descriptor.unwrap_or(image).display();
        bail!(
            Busy,
            "image {} lacks changes that were answered, but not flushed when its server was killed ({}): mount it once \
             (ploop mount {disk}; ploop umount {disk}), and it has them",
            image.display(),
            waits.display()
        );
    }
    Ok(())
}

/// The descriptor beside an image that names this file, and the snapshot whose image it is.
pub fn named_beside(path: &Path, file: FileId) -> Option<(PathBuf, Descriptor, Guid)> {
    let descriptor = path.with_file_name(descriptor::FILE_NAME);
    let disk = match Descriptor::read(&descriptor) {
        Ok(disk) => disk,
        Err(e) if e.errno() == Some(libc::ENOENT) => return None,
        Err(e) => {
            report::warn(e.context("whether deltas stand on the image is not known"));
            return None;
        }
    };
    let id = |path: &Path| open::open_level(path, Some(&disk.dir)).ok().and_then(|fd| FileId::of(fd).ok());
    let guid = disk.images.iter().find(|i| id(&i.file) == Some(file))?.guid;
    Some((descriptor, disk, guid))
}

/// Refuses to merge files into `target` if the descriptor beside it has a delta on it that is not one of the files. `Param`.
pub fn refuse_other_deltas(target: &Path, file: FileId, merged: &[FileId]) -> Result<()> {
    let real = std::fs::canonicalize(target).ctx(Kind::Open, || format!("cannot open image {}", target.display()))?;
    let Some((descriptor, disk, guid)) = named_beside(&real, file) else { return Ok(()) };
    let is_merged = |path: &Path| FileId::at(path).is_ok_and(|id| merged.contains(&id));
    let children = disk.children(&guid);
    let left = children.iter().filter_map(|g| disk.image(g)).find(|i| !is_merged(&i.file));
    match left {
        Some(image) => bail!(
            Param,
            "{} of {} stands on {}, too, and would change: merge into a new file (-n), or by the descriptor (ploop \
             snapshot-merge)",
            image.file.display(),
            descriptor.display(),
            target.display()
        ),
        None => Ok(()),
    }
}

/// Refuses to merge into a file that has several names (hard links): another disk may stand on it. `Busy`, as for
/// a file that a device of another disk reads, so that callers which merge temporary snapshots leave those above it.
pub fn refuse_shared(disk: &Descriptor, image: &Image) -> Result<()> {
    let shown = image.file.display();
    let fd = open::open_level(&image.file, Some(&disk.dir))?;
    let names = nix::sys::stat::fstat(&fd).ctx(Kind::Fstat, || format!("cannot look at {shown}"))?.st_nlink;
    if names > 1 {
        bail!(
            Busy,
            "image {shown} has {names} names (hard links), so that another disk may stand on it: nothing is merged into it; \
             merge into a new file (-n FILE), or remove the names that are not needed"
        );
    }
    Ok(())
}

/// Adds the devices that use the image to an error that says it is busy.
pub fn named(e: Error, path: &Path) -> Error {
    if e.kind() != Kind::Busy {
        return e;
    }
    let nodes: Vec<String> = users(path).unwrap_or_default().iter().map(describe).collect();
    match nodes.is_empty() {
        true => e,
        false => Error::new(
            Kind::Busy,
            format!("image {} is in use by {}; unmount that first", path.display(), nodes.join(", ")),
        ),
    }
}

fn describe(device: &Device) -> String {
    match device.component() {
        "" => device.node().display().to_string(),
        component => format!("{} (component {component})", device.node().display()),
    }
}

/// Options of a check that repairs an image which no process uses: it removes what a crash left.
pub const REPAIR_IN_PLACE: CheckOptions = CheckOptions {
    force: false,
    hard_force: false,
    drop_inuse: true,
    check: true,
    repair_sparse: true,
    read_only: false,
    raw: false,
    raw_blocksize: None,
};

/// Checks an image that the caller holds locked, and clears its mark.
pub fn repair_in_place(disk: &Descriptor, path: &Path) -> Result<()> {
    for note in check_file(path, Some(&disk.dir), &REPAIR_IN_PLACE)?.notes {
        report::say(0, format_args!("{}: {note}", path.display()));
    }
    Ok(())
}

/// After a commit that failed: removes the new image if the descriptor on disk does not name it. If the descriptor
/// names it or cannot be read, the file stays.
pub fn undo_new(disk: &LockedDescriptor, place: &Place, file: FileId) {
    let path = place.path();
    let names_it = |d: Descriptor| d.images.iter().any(|i| i.file == path);
    match Descriptor::read_at(&disk.place).map(names_it) {
        Ok(false) => {
            let _ = store::unlink_file(place, file);
        }
        _ => report::warn(format_args!("{} stays: it may be part of the disk", path.display())),
    }
}

/// A file that the descriptor is about to name no more, as it was when the operation had it open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unneeded {
    pub path: PathBuf,
    pub file: FileId,
}

/// Removes files that the stored descriptor no longer names. A file that cannot be removed is a warning and no error:
/// the operation is done. Nothing is removed before the stored descriptor is durable: after a power cut the one before
/// it may be there, which names these files.
pub fn remove(disk: &Descriptor, files: &[Unneeded]) {
    if let (Some(first), Err(e)) = (files.first(), descriptor::sync_folder(&disk.dir)) {
        report::warn(format_args!(
            "{} and whatever else is not used any more stays, since the change may not survive a power cut: {e}; `ploop check \
             --remove-orphans` removes it later",
            first.path.display()
        ));
        return;
    }
    let mut folders: Vec<Folder> = Vec::new();
    let mut places = Vec::new();
    for Unneeded { path, file } in files {
        report::say(0, format_args!("Removing {}", path.display()));
        match disk.dir.place(path) {
            Ok(place) => {
                if !folders.contains(&place.folder) {
                    folders.push(place.folder.clone());
                }
                places.push((place, *file));
            }
            Err(e) => warn_of(path, &e),
        }
    }
    for ((place, _), done) in places.iter().zip(unlink_all(&places)) {
        if let Err(e) = done {
            warn_of(&place.path(), &e);
        }
    }
    for folder in folders {
        if let Err(e) = descriptor::sync_folder(&folder) {
            report::warn(e);
        }
    }
}

fn warn_of(path: &Path, e: &std::io::Error) {
    if e.kind() != std::io::ErrorKind::NotFound {
        report::warn(format_args!("{} is not used any more but cannot be removed: {e}", path.display()));
    }
}

/// So many files are removed one after the other; more of them by as many threads: the host file system gives the space of
/// a long chain back several times as fast.
const FEW: usize = 8;

fn unlink_all(files: &[(Place, FileId)]) -> Vec<std::io::Result<()>> {
    let one_by_one =
        |files: &[(Place, FileId)]| files.iter().map(|(p, id)| store::unlink_file(p, *id)).collect::<Vec<_>>();
    if files.len() <= FEW {
        return one_by_one(files);
    }
    std::thread::scope(|scope| {
        let parts: Vec<_> =
            files.chunks(files.len().div_ceil(FEW)).map(|part| (part, scope.spawn(move || one_by_one(part)))).collect();
        // A thread that panicked returns no result; the next check reports the files that are left.
        parts
            .into_iter()
            .flat_map(|(part, t)| t.join().unwrap_or_else(|_| part.iter().map(|_| Ok(())).collect()))
            .collect()
    })
}

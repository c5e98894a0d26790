//! Merging deltas that stand on each other into the lowest of them, or into a new file.
//!
//! This order is safe at any crash. First the snapshots that are going to disappear are marked as half merged, so that no
//! operation shows or switches to one whose content is partly that of another. Then their data is copied down; until the
//! descriptor without them is stored, the sources hide the copies. Only then are the sources removed. A merge that was
//! interrupted is finished by running it again.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::image_set::{self, Unneeded};
use super::{disk_lock, online, recovery, temporary_snapshot};
use nix::fcntl::OFlag;

use crate::bail;
use crate::descriptor::{self, Descriptor, LockedDescriptor};
use crate::device::{self, Device};
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::guid::Guid;
use crate::image::check::read_header;
use crate::image::lock::{self, LockedImage, Sharing};
use crate::image::merge::{BATCH, Failed, Merge, MergeLevel, MergeOptions, Merged};
use crate::image::open::Access;
use crate::image::target::read_table;
use crate::image::{complete, create};
use crate::report;
use crate::report::progress::Progress;
use crate::sys::file_id::FileId;
use crate::sys::file_lock;
use crate::sys::folder::{Folder, Place};
use crate::sys::store;

/// What to merge. Nothing given: the top into its parent.
#[derive(Clone, Debug, Default)]
pub struct MergeParams {
    /// This snapshot into its parent, or down to `guid2`.
    pub guid: Option<Guid>,
    /// An ancestor of `guid`.
    pub guid2: Option<Guid>,
    /// Everything from the top to the base.
    pub all: bool,
    /// A new file for the result instead of the lowest delta's; it must not exist.
    pub new_delta: Option<PathBuf>,
}

/// Suffix of a new file's name until the file is complete.
pub(super) const SCRATCH: &str = ".ploop-merge";

const READ: Access = Access { write: false, direct: false };
const WRITE: Access = Access { write: true, direct: false };

/// Merges snapshots of a disk. The lowest one's file stays and gets the GUID of the highest.
pub fn merge_snapshot(descriptor: &Path, component: &str, params: &MergeParams) -> Result<()> {
    let _operation = report::cancel::begin();
    let mut disk = disk_lock::open(descriptor)?;
    image_set::running(&disk, component)?;
    recovery::before_change(&mut disk)?;
    let top = disk.top;
    let (descendant, ancestor) = match (params.guid, params.guid2, params.all) {
        (None, Some(_), _) => bail!(Param, "a merge down to a snapshot needs the snapshot where it starts, too"),
        (Some(guid), Some(guid2), _) => {
            for guid in [&guid, &guid2] {
                disk.known(guid)?;
            }
            (guid, guid2)
        }
        (Some(guid), None, _) => (guid, parent(&disk, &guid)?),
        (None, None, true) => match disk.chain(&top)?.first() {
            Some(base) if base.guid == top => {
                bail!(Param, "{} has a single image: there is nothing to merge", disk.path.display())
            }
            Some(base) => (top, base.guid),
            None => bail!(DiskDescr, "{}: the top has no chain", disk.path.display()),
        },
        (None, None, false) => (top, parent(&disk, &top)?),
    };
    range(&mut disk, &descendant, &ancestor, params.new_delta.as_deref())
}

fn parent(disk: &LockedDescriptor, guid: &Guid) -> Result<Guid> {
    disk.known(guid)?;
    match disk.parent(guid)? {
        Some(parent) => Ok(parent),
        None => bail!(Param, "snapshot {guid} is the base: there is nothing below to merge it into"),
    }
}

/// Whether the image of this snapshot is a level of the device.
pub(super) fn on_device(disk: &Descriptor, device: &Device, guid: &Guid) -> Result<bool> {
    let Some(image) = disk.image(guid) else { return Ok(false) };
    let meta = fs::metadata(&image.file).ctx(Kind::Open, || format!("image {}", image.file.display()))?;
    Ok(device.level_of(FileId::from(&meta)).is_some())
}

pub(super) fn running(
    disk: &mut LockedDescriptor,
    device: &Device,
    descendant: &Guid,
    ancestor: &Guid,
    new_delta: Option<&Path>,
) -> Result<()> {
    let moved;
    let device = match new_delta {
        None => device,
        Some(new) => {
            disk.removed_by_merge(descendant, ancestor)?;
            moved = move_to(disk, device, ancestor, &new_file(new)?)?;
            &moved
        }
    };
    online::merge(disk, device, descendant, ancestor)?;
    report::say(0, format_args!("{ancestor} is merged: its place has snapshot {descendant}"));
    Ok(())
}

/// Replaces the image of a running disk by a copy of it; returns the device as it is then.
fn move_to(disk: &mut LockedDescriptor, device: &Device, guid: &Guid, new: &Place) -> Result<Device> {
    let Some(image) = disk.image(guid).cloned() else { bail!(Param, "snapshot {guid} has no image") };
    if disk.is_raw(&image) {
        bail!(
            Param,
            "image {} is raw: a running disk is merged into it, not into a new file; unmount it first, or leave the new \
             file out",
            image.file.display()
        );
    }
    let tmp = scratch_name(new)?;
    let (copy, old) = copy_image(disk, &image.file, &tmp)?;
    let named = descriptor::rename_new(&tmp, new).and_then(|()| descriptor::sync_folder(&new.folder));
    named.inspect_err(|_| {
        let _ = store::unlink_file(&tmp, copy);
    })?;
    let moved = online::replace(disk, device, &image, &new.path(), false);
    moved.inspect_err(|_| image_set::undo_new(disk, new, copy))?;
    image_set::remove(disk, &[Unneeded { path: image.file, file: old }]);
    match device::by_node(device.name())? {
        Some(device) => Ok(device),
        None => bail!(Device, "{} is gone", device.node().display()),
    }
}

/// Copies an image of a running disk; returns the identities of the copy and of the image.
fn copy_image(disk: &LockedDescriptor, from: &Path, to: &Place) -> Result<(FileId, FileId)> {
    let held = image_set::lock_image(disk, from, READ, Sharing::Readers)?;
    let file = new_copy(level(&held, false), to)?;
    let shown = to.display();
    let copy = FileId::of(&file).ctx(Kind::Fstat, || format!("cannot look at {shown}"))?;
    let finish = || {
        let len = file.metadata().ctx(Kind::Fstat, || format!("cannot look at {shown}"))?.len();
        complete::complete(&file, disk.blocksize, len).ctx(Kind::Write, || format!("cannot complete {shown}"))?;
        store::sync_all(&file).ctx(Kind::Fsync, || format!("cannot sync {shown}"))?;
        Ok((copy, held.id()?))
    };
    finish().inspect_err(|_| {
        let _ = store::unlink_file(to, copy);
    })
}

/// Merges `descendant` and all between into `ancestor`. No process may use these images except the device that runs the
/// disk, if there is one (`Busy`).
pub(super) fn range(
    disk: &mut LockedDescriptor,
    descendant: &Guid,
    ancestor: &Guid,
    new_delta: Option<&Path>,
) -> Result<()> {
    if let Some(device) = image_set::writer(disk)?
        && on_device(disk, &device, descendant)?
    {
        return running(disk, &device, descendant, ancestor, new_delta);
    }
    let gone = disk.removed_by_merge(descendant, ancestor)?;
    if let Some(target) = disk.image(ancestor).filter(|_| new_delta.is_none()) {
        image_set::refuse_shared(disk, target)?;
    }
    for guid in gone.iter().filter(|g| disk.snapshot(g).is_some_and(|s| s.temporary)) {
        // If another process does use it, the locks refuse the merge.
        temporary_snapshot::end_idle(disk, guid)?;
    }
    recovery::check_files(disk, descendant)?;
    let is_top = *descendant == disk.top;
    let locked = LockedChain::lock(disk, descendant, gone.len(), new_delta.is_some())?;
    let mut next = disk.descriptor.clone();
    let merged = match new_delta {
        None => {
            let files = next.collapse(descendant, ancestor, None)?;
            let merge = locked.prepare()?;
            let merged = merge_down(disk, &gone, merge)?;
            (files, merged, None)
        }
        Some(new) => {
            let new = new_file(new)?;
            let files = next.collapse(descendant, ancestor, Some(new.path()))?;
            let (merged, id) = locked.write_new(&new)?;
            (files, merged, Some((new, id)))
        }
    };
    let (files, merged, new) = merged;
    if is_top {
        next.size_sectors = merged.sectors;
    }
    disk.commit_as(next).inspect_err(|_| {
        if let Some((new, id)) = &new {
            image_set::undo_new(disk, new, *id);
        }
    })?;
    let files = locked.unneeded(&files)?;
    drop(locked);
    image_set::remove(disk, &files);
    report::say(0, format_args!("{ancestor} is merged: its place has snapshot {descendant}"));
    Ok(())
}

/// The copy, between the marks in the descriptor.
fn merge_down(disk: &mut LockedDescriptor, gone: &[Guid], merge: Merge<'_>) -> Result<Merged> {
    let before = disk.descriptor.clone();
    let mut marked = before.clone();
    marked.mark_spoiled(gone);
    if marked != before {
        disk.commit_as(marked)?;
    }
    match run(merge) {
        Ok(merged) => Ok(merged),
        Err(Failed { error, untouched: true }) => {
            if **disk != before
                && let Err(e) = disk.commit_as(before)
            {
                report::warn(format_args!("the snapshots stay marked as half merged: {e}"));
            }
            Err(error)
        }
        Err(Failed { error, untouched: false }) => {
            report::warn(
                "the merge was begun and stays so: the disk is as it was, the snapshots that it removes are marked \
                 as half merged; the next merge, snapshot or mount finishes it",
            );
            Err(error)
        }
    }
}

fn run(merge: Merge<'_>) -> Result<Merged, Failed> {
    let mut shown = Progress::begin("merging");
    let mut progress = |done: u64, total: u64| {
        shown.at(done, total);
        if report::cancel::requested() {
            bail!(Sys, "the merge was cancelled after {done} of {total} bytes");
        }
        Ok(())
    };
    let mut options = MergeOptions { progress: &mut progress, stay_marked: false, batch: BATCH, reflink: true };
    let merged = merge.run(&mut options)?;
    shown.finish();
    report::say(
        1,
        format_args!("{} bytes copied, {} shared, {} of zeroes left out", merged.copied, merged.shared, merged.skipped),
    );
    Ok(merged)
}

/// The images of a merge, locked, and those below.
struct LockedChain {
    /// Topmost first.
    sources: Vec<LockedImage>,
    target: LockedImage,
    target_raw: bool,
    /// None: the caller named only the files of the merge.
    below: Option<Vec<(LockedImage, bool)>>,
}

impl LockedChain {
    /// `removed`: how many images below `descendant` belong to the merge. `keep_target`: it is only read.
    fn lock(disk: &LockedDescriptor, descendant: &Guid, removed: usize, keep_target: bool) -> Result<LockedChain> {
        let chain = disk.chain(descendant)?;
        let at = chain.len().saturating_sub(removed + 1);
        let (below, range) = chain.split_at(at);
        let Some((target, sources)) = range.split_first().filter(|(_, sources)| !sources.is_empty()) else {
            bail!(Param, "snapshot {descendant}: nothing to merge it into");
        };
        let mut locked = LockedChain {
            sources: Vec::new(),
            target: image_set::lock_image(
                disk,
                &target.file,
                if keep_target { READ } else { WRITE },
                Sharing::Exclusive,
            )?,
            target_raw: disk.is_raw(target),
            below: None,
        };
        for image in sources.iter().rev() {
            let held = image_set::lock_image(disk, &image.file, READ, Sharing::Exclusive)?;
            // Lower ones were looked at when the disk was opened.
            if read_header(&image.file, Some(&disk.dir))?.is_marked() {
                image_set::repair_in_place(disk, &image.file)?;
            }
            locked.sources.push(held);
        }
        let below = below
            .iter()
            .map(|image| Ok((image_set::lock_image(disk, &image.file, READ, Sharing::Readers)?, disk.is_raw(image))))
            .collect::<Result<_>>()?;
        locked.below = Some(below);
        Ok(locked)
    }

    /// Sources, target, and what is below.
    fn levels(&self) -> (Vec<MergeLevel<'_>>, MergeLevel<'_>, Option<Vec<MergeLevel<'_>>>) {
        let sources = self.sources.iter().map(|h| level(h, false)).collect();
        let below = self.below.as_ref().map(|all| all.iter().map(|(h, raw)| level(h, *raw)).collect());
        (sources, level(&self.target, self.target_raw), below)
    }

    fn prepare(&self) -> Result<Merge<'_>> {
        let (sources, target, below) = self.levels();
        Merge::prepare(&sources, target, below.as_deref())
    }

    /// Writes the merged content into a new file of this name, durable. The target itself is only read.
    fn write_new(&self, new: &Place) -> Result<(Merged, FileId)> {
        let tmp = scratch_name(new)?;
        let (mut sources, target, below) = self.levels();
        // Held from its creation, so that it is not taken for what an interrupted merge has left.
        let copy = if self.target_raw { Some(new_copy(target, &tmp)?) } else { None };
        let id = match &copy {
            Some(copy) => FileId::of(copy).ctx(Kind::Fstat, || format!("cannot look at {}", tmp.display()))?,
            None => {
                // As large as the lowest, which may be smaller than those above it: the merge lets it grow.
                let (header, _) = read_table(&self.target.file, &self.target.path)?;
                sources.push(target);
                create::create_delta(&tmp, header.version, header.cluster, header.sectors)?.id
            }
        };
        let fill = || {
            let held = match copy {
                Some(copy) => lock::lock_opened(copy, &tmp.path(), Sharing::Exclusive)?,
                None => {
                    let opened =
                        tmp.open(OFlag::O_PATH).ctx(Kind::Open, || format!("cannot open {}", tmp.display()))?;
                    lock::lock_open(&opened, &tmp.path(), WRITE, Sharing::Exclusive)?
                }
            };
            if held.id()? != id {
                bail!(Open, "{} is not the file that this merge made; another process has replaced it", tmp.display());
            }
            let merge = Merge::prepare(&sources, level(&held, self.target_raw), below.as_deref())?;
            let merged = run(merge).map_err(|f| f.error)?;
            descriptor::rename_new(&tmp, new)?;
            descriptor::sync_folder(&new.folder).inspect_err(|_| {
                let _ = store::unlink_file(new, id);
            })?;
            Ok((merged, id))
        };
        fill().inspect_err(|_| {
            let _ = store::unlink_file(&tmp, id);
        })
    }

    /// These files, as they were opened for the merge.
    fn unneeded(&self, files: &[PathBuf]) -> Result<Vec<Unneeded>> {
        let held = self.sources.iter().chain([&self.target]).filter(|held| files.contains(&held.path));
        held.map(|held| Ok(Unneeded { path: held.path.clone(), file: held.id()? })).collect()
    }
}

fn level(held: &LockedImage, raw: bool) -> MergeLevel<'_> {
    MergeLevel { file: &held.file, name: &held.path, raw }
}

/// The path of a file to be made, resolved: its folder must exist (`Creat`), itself must not (`Param`).
fn new_file(path: &Path) -> Result<Place> {
    let Some(name) = path.file_name() else { bail!(Param, "{} does not name a file", path.display()) };
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let named = || format!("folder {}", folder.display());
    let folder = Folder::resolve(folder).ctx(Kind::Creat, named)?;
    let new = folder.entry(name);
    if new.id().ctx(Kind::Fstat, || format!("cannot look at {}", new.display()))?.is_some() {
        bail!(Param, "{} exists already: a merge goes into a file that it makes itself", new.display());
    }
    Ok(new)
}

/// The name of the new file until it is complete. Removes what an interrupted merge left there.
fn scratch_name(new: &Place) -> Result<Place> {
    let tmp = new.suffixed(SCRATCH);
    let shown = tmp.display();
    if tmp.id().ctx(Kind::Fstat, || format!("cannot look at {shown}"))?.is_some() {
        if tmp.regular().ctx(Kind::Fstat, || format!("cannot look at {shown}"))?.is_none() {
            bail!(Open, "{shown} is no regular file, and its name is that of a merge's new file; move it away");
        }
        let opened = tmp.open(OFlag::O_PATH).ctx(Kind::Open, || format!("cannot open {shown}"))?;
        let held = lock::lock_open(&opened, &tmp.path(), READ, Sharing::Exclusive)?;
        store::unlink_file(&tmp, held.id()?).ctx(Kind::Unlink, || format!("cannot remove {shown}"))?;
    }
    Ok(tmp)
}

/// Copies an image file byte by byte into a new file, which is locked until the result is dropped.
fn new_copy(from: MergeLevel<'_>, to: &Place) -> Result<File> {
    let shown = to.display();
    let len = from.file.metadata().ctx(Kind::Fstat, || format!("cannot look at {}", from.name.display()))?.len();
    let file = store::create_new(to, 0o600).ctx(Kind::Creat, || format!("cannot create image {shown}"))?;
    // A file system without such locks has none.
    let _ = lock::retry(|| file_lock::exclusive(&file, false));
    if len == 0 || store::clone_range(from.file, 0, &file, 0, len).is_ok() {
        return Ok(file);
    }
    store::set_len(&file, len).ctx(Kind::Ftruncate, || format!("cannot extend image {shown} to {len} bytes"))?;
    copy_data(from.file, &file, len).map_err(|e| {
        if let Ok(id) = FileId::of(&file) {
            let _ = store::unlink_file(to, id);
        }
        Error::with(Kind::Write, format!("cannot fill image {shown}"), e)
    })?;
    Ok(file)
}

fn copy_data(from: &File, to: &File, len: u64) -> std::io::Result<()> {
    use crate::sys::aligned::{AlignedBuf, read_exact, write_all};
    const CHUNK: u64 = 4 << 20;
    let mut buf = AlignedBuf::new(CHUNK as usize);
    crate::sys::fiemap::each_data(from, 0, len, &mut |start, end| {
        let mut at = start;
        while at < end {
            if report::cancel::requested() {
                return Err(std::io::Error::other("cancelled"));
            }
            let n = (end - at).min(CHUNK) as usize;
            let piece = buf.get_mut(..n).unwrap_or_default();
            read_exact(from, piece, at)?;
            write_all(to, piece, at)?;
            at += n as u64;
        }
        Ok(())
    })
}

/// Merges image files, the topmost first, into the last one (raw if `raw`), or into a new file. The sources stay.
pub fn merge_files(images: &[PathBuf], raw: bool, new_delta: Option<&Path>) -> Result<()> {
    let _operation = report::cancel::begin();
    let Some((target, sources)) = images.split_last().filter(|(_, sources)| !sources.is_empty()) else {
        bail!(Param, "a merge needs at least two images, the topmost first");
    };
    let mut ids = Vec::new();
    for (i, image) in images.iter().enumerate() {
        let id = FileId::at(image).ctx(Kind::Open, || format!("cannot open image {}", image.display()))?;
        if ids.contains(&id) {
            bail!(Param, "image {} is named twice", image.display());
        }
        ids.push(id);
        if !raw || i + 1 < images.len() {
            // As in the classic, a file that is no image cannot be opened as one.
            read_header(image, None).map_err(|e| if e.kind() == Kind::Format { e.as_kind(Kind::Open) } else { e })?;
        }
    }
    image_set::refuse_dead_users(&ids, target)?;
    if let (None, Some(file)) = (new_delta, ids.last()) {
        image_set::refuse_other_deltas(target, *file, &ids)?;
    }
    let hold = |path: &Path, access, others| {
        let path = fs::canonicalize(path).ctx(Kind::Open, || format!("cannot open image {}", path.display()))?;
        let held = lock::lock_image(&path, None, access, others).map_err(|e| image_set::named(e, &path))?;
        image_set::refuse_unflushed([&*path], None)?;
        Ok::<_, Error>(held)
    };
    let (access, others) = match new_delta {
        None => (WRITE, Sharing::Exclusive),
        Some(_) => (READ, Sharing::Readers),
    };
    let locked = LockedChain {
        target: hold(target, access, others)?,
        target_raw: raw,
        sources: sources.iter().map(|s| hold(s, READ, Sharing::Readers)).collect::<Result<_>>()?,
        below: None,
    };
    match new_delta {
        Some(new) => locked.write_new(&new_file(new)?).map(drop),
        None => {
            let merge = locked.prepare()?;
            if merge.target_marked() {
                bail!(
                    Open,
                    "image {} is marked in use: it is open elsewhere or was not closed cleanly; run `ploop check -d` on \
                     it when no process has it open",
                    target.display()
                );
            }
            run(merge).map(drop).map_err(|f| match f.untouched {
                true => f.error,
                false => f.error.context(format_args!("{} is half merged, run the merge again", target.display())),
            })
        }
    }
}

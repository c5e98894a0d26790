//! Images that were renamed or deleted while a device runs. A deleted one lives as long as the processes that serve the
//! device have it open; unmounting can copy it back under its name before they exit.

use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use nix::sys::stat::fstat;

use crate::bail;
use crate::descriptor::{self, Descriptor};
use crate::device::{self, Device, State, Whereabouts};
use crate::error::{Error, IoContext, Kind, Result};
use crate::image::lock;
use crate::report;
use crate::sys::fiemap::{each_data, next_data, next_hole};
use crate::sys::file_id::FileId;
use crate::sys::file_lock;
use crate::sys::folder::{Folder, Place};
use crate::sys::store;

/// What unmounting does where images of the chain were deleted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Deleted {
    /// It fails before anything has changed.
    #[default]
    Refuse,
    /// It copies them back.
    Save,
    /// It lets them go.
    Discard,
}

/// A deleted image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeletedImage {
    level: usize,
    /// Its last name.
    pub path: PathBuf,
}

/// The deleted images of a device, base first. What the disk's descriptor does not name any more was removed by a merge.
pub fn of(device: &Device) -> Vec<DeletedImage> {
    let found = device::whereabouts(device).into_iter().enumerate();
    let deleted = found.filter_map(|(level, now)| match now {
        Whereabouts::Deleted { was } => {
            Some(DeletedImage { level, path: last_name(device.images.get(level)?.path.as_path(), was) })
        }
        _ => None,
    });
    let deleted: Vec<DeletedImage> = deleted.collect();
    if deleted.is_empty() {
        return deleted;
    }
    let disk = device.descriptor.as_ref().and_then(|dd| Descriptor::read(dd).ok());
    let named = |path: &Path| disk.as_ref().is_none_or(|d| d.images.iter().any(|i| i.file == path));
    deleted
        .into_iter()
        .filter(|l| named(&l.path) || device.images.get(l.level).is_some_and(|i| named(&i.path)))
        .collect()
}

/// The folder may have been moved since the device was made; the kernel's name follows that, but is one of the server's
/// mount namespace.
fn last_name(recorded: &Path, was: PathBuf) -> PathBuf {
    match was.parent().is_some_and(Path::is_dir) {
        true => was,
        false => recorded.to_owned(),
    }
}

/// Images that were renamed alone, so that the disk's descriptor does not lead to them: the old name and the present one.
pub fn moved(device: &Device) -> Vec<(PathBuf, PathBuf)> {
    let with_folder = |old: &Path, new: &Path| {
        let beside = device.descriptor.as_ref().and_then(|d| d.file_name()).map(|d| new.with_file_name(d));
        old.file_name() == new.file_name() && beside.is_none_or(|d| d.exists())
    };
    let found = device.images.iter().zip(device::whereabouts(device));
    let moved = found.filter_map(|(image, now)| match now {
        Whereabouts::Moved(new) if !with_folder(&image.path, &new) => Some((image.path.clone(), new)),
        _ => None,
    });
    moved.collect()
}

/// What to say of the images of a device that are not where its descriptor names them, and what to do.
pub fn trouble(device: &Device) -> Option<(String, String)> {
    let lost = of(device);
    if !lost.is_empty() {
        return Some(advice(device, &lost));
    }
    let moved = moved(device);
    let (old, new) = moved.first()?;
    Some((
        format!("{} is now {}", old.display(), new.display()),
        format!("mv {} {}, so that the disk can be mounted again", new.display(), old.display()),
    ))
}

fn advice(device: &Device, lost: &[DeletedImage]) -> (String, String) {
    let names: Vec<String> = lost.iter().map(|l| l.path.display().to_string()).collect();
    (
        format!("{} was deleted while the disk runs; its content is there until it is unmounted", names.join(", ")),
        format!(
            "ploop umount --save-deleted -d {} copies it back (the folder needs the space); --discard-deleted gives it up",
            device.node().display()
        ),
    )
}

/// Before anything is changed: unmounting would end what is left of these images. `Umount`.
pub fn refusal(device: &Device, lost: &[DeletedImage]) -> Error {
    let (what, remedy) = advice(device, lost);
    Error::new(Kind::Umount, format!("{what}: {remedy}; nothing was changed"))
}

/// Copies of deleted images, made while their device is unmounted.
///
/// A first copy is made while the disk may still be in use: it takes the space, so that what may fail has not yet changed
/// anything. When no file system is mounted and the device is flushed, [`publish`](Self::publish) brings the copies up to
/// date and gives them their names: from then on they are as good as the images after a crash. When the server has closed
/// the images, [`finish`](Self::finish) takes over what that changed. Dropped before that, the copies are removed: the
/// device runs on.
pub struct Rescue {
    saving: Vec<Saving>,
}

struct Saving {
    source: File,
    copy: File,
    id: FileId,
    /// Where the copy is.
    now: Place,
    target: Place,
    /// The copy is all that there is.
    kept: bool,
}

impl Drop for Saving {
    fn drop(&mut self) {
        if !self.kept {
            let _ = store::unlink_file(&self.now, self.id);
        }
    }
}

impl Rescue {
    /// The first copies.
    pub fn begin(device: &Device, lost: &[DeletedImage]) -> Result<Rescue> {
        if device.state != State::Running {
            bail!(
                Umount,
                "{} is {}: deleted images are copied back only from a device that runs. What there is of them can be read \
                 from the descriptors of its ploop-server below /proc/PID/fd (cp --sparse=always)",
                device.node().display(),
                device.state
            );
        }
        let mut rescue = Rescue { saving: Vec::new() };
        for one in lost {
            let source = device::open_image(device, one.level)?;
            rescue.saving.push(Saving::begin(source, &one.path)?);
        }
        Ok(rescue)
    }

    /// No file system of the device is mounted any more.
    pub fn publish(&mut self, device: &Device) -> Result<()> {
        if !device.read_only {
            let node = device.node();
            File::open(node)
                .and_then(|f| f.sync_all())
                .ctx(Kind::Fsync, || format!("cannot flush {}", node.display()))?;
        }
        self.saving.iter_mut().try_for_each(Saving::publish)?;
        // What is removed from here on may be all that there is.
        self.saving.iter_mut().for_each(|one| one.kept = true);
        Ok(())
    }

    /// The device runs on with its images: the copies are removed.
    pub fn withdraw(mut self) {
        self.saving.iter_mut().for_each(|one| one.kept = false);
    }

    /// The server has closed the images.
    pub fn finish(self) -> Result<()> {
        for one in &self.saving {
            one.update().map_err(|e| {
                e.context(format!(
                    "{} is as after a crash: mounting it by its descriptor, or ploop check, repairs it",
                    one.target.display()
                ))
            })?;
            report::say(0, format_args!("{} is there again", one.target.display()));
        }
        Ok(())
    }
}

impl Saving {
    fn begin(source: File, path: &Path) -> Result<Saving> {
        let shown = path.display();
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            bail!(Param, "{shown} was deleted, and is no name of a file")
        };
        let folder = Folder::resolve(parent).ctx(Kind::Open, || {
            format!("{shown} cannot be copied back: cannot open {} (make it again: mkdir -p)", parent.display())
        })?;
        let target = folder.entry(name);
        if target.id().ctx(Kind::Open, || format!("cannot look at {shown}"))?.is_some() {
            bail!(
                Creat,
                "{shown} was deleted, and another file has its name: move that away, then try again; nothing was changed"
            );
        }
        let now = target.suffixed(".saving");
        let copy = store::create_new(&now, 0o600)
            .ctx(Kind::Creat, || format!("cannot make {} (one of an interrupted try can be removed)", now.display()))?;
        let id = FileId::of(&copy).ctx(Kind::Fstat, || now.display())?;
        // Held until it has its name: a file without the lock is what an interrupted program has left. Some file systems have no
        // such locks.
        let _ = lock::retry(|| file_lock::exclusive(&copy, false));
        let saving = Saving { source, copy, id, now, target, kept: false };
        saving.own()?;
        saving.update()?;
        Ok(saving)
    }

    /// Owner and mode of the deleted file.
    fn own(&self) -> Result<()> {
        let what = || format!("cannot give {} the owner and mode of the deleted file", self.now.display());
        let old = fstat(&self.source).ctx(Kind::Fstat, what)?;
        fchown(&self.copy, Some(old.st_uid), Some(old.st_gid)).ctx(Kind::Creat, what)?;
        self.copy.set_permissions(PermissionsExt::from_mode(old.st_mode & 0o7777)).ctx(Kind::Creat, what)
    }

    fn publish(&mut self) -> Result<()> {
        self.update()?;
        store::rename_new(&self.now, &self.target)
            .ctx(Kind::Rename, || format!("cannot rename {} to {}", self.now.display(), self.target.display()))?;
        self.now = self.target.clone();
        let _ = file_lock::release(&self.copy);
        descriptor::sync_folder(&self.target.folder)
    }

    fn update(&self) -> Result<()> {
        update(&self.source, &self.copy).ctx(Kind::Write, || {
            format!("cannot copy the deleted image to {}; it needs the space of the image", self.now.display())
        })
    }
}

/// The part with the header and the mark "in use".
const HEAD: u64 = 4096;
const STEP: usize = 1 << 20;

/// Makes the copy equal to the source, durably; only what differs is written. The head comes last: a copy of an image that
/// was closed meanwhile is marked in use until it has everything.
fn update(source: &File, copy: &File) -> std::io::Result<()> {
    let len = source.metadata()?.len();
    store::set_len(copy, len)?;
    for (start, end) in [(HEAD.min(len), len), (0, HEAD.min(len))] {
        let mut pos = start;
        let mut buffers = (vec![0; STEP], vec![0; STEP]);
        each_data(source, start, end, &mut |from, to| {
            clear(copy, pos, from, &mut buffers.0)?;
            pos = to;
            copy_range(source, copy, from, to, &mut buffers)
        })?;
        clear(copy, pos, end, &mut buffers.0)?;
        store::sync_all(copy)?;
    }
    Ok(())
}

fn copy_range(source: &File, copy: &File, from: u64, to: u64, buffers: &mut (Vec<u8>, Vec<u8>)) -> std::io::Result<()> {
    let mut at = from;
    while at < to {
        let n = (to - at).min(STEP as u64) as usize;
        let (new, old) = (&mut buffers.0[..n], &mut buffers.1[..n]);
        source.read_exact_at(new, at)?;
        copy.read_exact_at(old, at)?;
        if new != old {
            store::write_all(copy, new, at)?;
        }
        at += n as u64;
    }
    Ok(())
}

/// Where the source has a hole the copy reads as zero.
fn clear(copy: &File, from: u64, to: u64, buffer: &mut [u8]) -> std::io::Result<()> {
    let mut at = from;
    while at < to {
        let Some(data) = next_data(copy, at)?.filter(|data| *data < to) else { return Ok(()) };
        let n = (next_hole(copy, data)?.unwrap_or(to).min(to) - data).min(buffer.len() as u64);
        let part = &mut buffer[..n as usize];
        copy.read_exact_at(part, data)?;
        if part.iter().any(|b| *b != 0) {
            part.fill(0);
            store::write_all(copy, part, data)?;
        }
        at = data + n;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_copy_becomes_equal_to_its_source_and_keeps_its_holes() {
        let dir = tempfile::tempdir().unwrap();
        let open =
            |name: &str| File::options().read(true).write(true).create_new(true).open(dir.path().join(name)).unwrap();
        let (source, copy) = (open("source"), open("copy"));
        let same = |what: &str| {
            update(&source, &copy).unwrap();
            assert!(
                fs::read(dir.path().join("source")).unwrap() == fs::read(dir.path().join("copy")).unwrap(),
                "{what}"
            );
        };
        source.set_len(64 << 20).unwrap();
        source.write_all_at(&[1; 9000], 0).unwrap();
        source.write_all_at(&[2; 3 << 20], 20 << 20).unwrap();
        same("new");
        let blocks = |f: &File| std::os::unix::fs::MetadataExt::blocks(&f.metadata().unwrap());
        assert!(blocks(&copy) <= blocks(&source) + 64, "{} blocks, the source has {}", blocks(&copy), blocks(&source));
        source.write_all_at(&[3; 100], 17).unwrap();
        source.write_all_at(&[4; 5000], 40 << 20).unwrap();
        same("more data");
        source.set_len(21 << 20).unwrap();
        source.set_len(30 << 20).unwrap();
        same("a hole where data was");
        source.set_len(100).unwrap();
        same("short");
        source.set_len(0).unwrap();
        same("empty");
    }

    #[test]
    fn a_name_that_is_taken_is_refused_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("root.hds");
        fs::write(&path, "deleted").unwrap();
        let source = File::open(&path).unwrap();
        let try_it = || Saving::begin(source.try_clone().unwrap(), &path);
        assert_eq!(try_it().err().unwrap().kind(), Kind::Creat);
        fs::remove_file(&path).unwrap();
        let mut saving = try_it().unwrap();
        // A file that gets the name meanwhile stays.
        fs::write(&path, "other").unwrap();
        assert_eq!(saving.publish().unwrap_err().kind(), Kind::Rename);
        fs::remove_file(&path).unwrap();
        saving.publish().unwrap();
        saving.kept = true;
        Rescue { saving: vec![saving] }.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"deleted");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        // A try that ends before the copy has its name leaves nothing.
        fs::remove_file(&path).unwrap();
        drop(try_it().unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_strangers_link_sends_no_copy_elsewhere() {
        if !nix::unistd::geteuid().is_root() {
            crate::testing::skip::skip("files of two users need root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        let (home, root) = (top.join("home"), top.join("root"));
        for folder in [&home, &root] {
            fs::create_dir(folder).unwrap();
        }
        std::os::unix::fs::symlink(&root, home.join("disk")).unwrap();
        for path in [&home, &home.join("disk")] {
            std::os::unix::fs::lchown(path, Some(1000), Some(1000)).unwrap();
        }
        fs::write(top.join("image"), "deleted").unwrap();
        let source = File::open(top.join("image")).unwrap();
        let e = Saving::begin(source, &home.join("disk/root.hds")).err().unwrap();
        assert_eq!(e.kind(), Kind::Open, "{e}");
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    }
}

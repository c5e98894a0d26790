//! Replacing an image of a disk by a copy of it, in another place perhaps.

use std::path::{Path, PathBuf};

use super::image_copy::copy_of;
use super::maintenance::{self, Work};
use super::{disk_lock, image_set, online, recovery};
use crate::bail;
use crate::descriptor::{self, Descriptor, Image};
use crate::device::Device;
use crate::error::{IoContext, Kind, Result};
use crate::format::guid::Guid;
use crate::image::lock::Sharing;
use crate::image::open::Access;
use crate::report;
use crate::sys::file_id::FileId;
use crate::sys::folder::Place;
use crate::sys::store;
use crate::units::Level;

/// Which image.
#[derive(Clone, Debug)]
pub enum Which {
    /// That of a snapshot.
    Guid(Guid),
    /// That with this file.
    File(PathBuf),
    /// That at this level of the running device.
    Level(Level),
}

const READ: Access = Access { write: false, direct: false };

/// Replaces an image by `new`, which must be a copy of it: clean, and the same in size, header and content (`Format`).
/// The old file stays; with `keep_name` it is removed, and the new one takes its name.
pub fn replace(descriptor: &Path, component: &str, which: &Which, new: &Path, keep_name: bool) -> Result<()> {
    let _operation = report::cancel::begin();
    let mut disk = disk_lock::open(descriptor)?;
    recovery::before_change(&mut disk)?;
    let device = image_set::running(&disk, component)?;
    let image = find(&disk, device.as_ref(), which)?;
    disk.check_whole(&image.guid)?;
    let new = new.canonicalize().ctx(Kind::Param, || format!("cannot open image {}", new.display()))?;
    let id = id_of(&new)?;
    if let Some(own) = disk.images.iter().find(|i| id_of(&i.file).is_ok_and(|other| other == id)) {
        bail!(Param, "{} is the image of snapshot {} already", new.display(), own.guid);
    }
    if disk.is_raw(&image) {
        bail!(Format, "image {} is raw: only ploop1 images can be compared and replaced", image.file.display());
    }
    if let Some(device) = device
        && device.level_of(id_of(&image.file)?).is_some()
    {
        maintenance::before(&device, Work::Replace)?;
        online::replace(&mut disk, &device, &image, &new, keep_name)?;
        report::say(0, format_args!("{} is replaced by {}", image.file.display(), new.display()));
        return Ok(());
    }
    let old_held = image_set::lock_image(&disk, &image.file, READ, Sharing::Exclusive)?;
    let new_held = copy_of(Some(&disk), &image.file, &old_held, &new, Sharing::Exclusive)?;
    if keep_name {
        take_name(&disk, &image.file, &new, new_held.id()?)?;
    } else {
        let mut next = disk.descriptor.clone();
        next.set_file(&image.guid, new.clone())?;
        disk.commit_as(next)?;
    }
    drop((old_held, new_held));
    report::say(0, format_args!("{} is replaced by {}", image.file.display(), new.display()));
    Ok(())
}

/// Renames the new file over the old one. Both are looked up under the rules of images; the name must still be that of
/// the file that was compared.
fn take_name(disk: &Descriptor, old: &Path, new: &Path, file: FileId) -> Result<()> {
    let place = |path: &Path| {
        disk.dir.place(path).ctx(Kind::Rename, || format!("cannot open the folder of {}", path.display()))
    };
    let (from, to) = (place(new)?, place(old)?);
    let is = |place: &Place| place.id().ctx(Kind::Rename, || format!("cannot look at {}", place.display()));
    let changed =
        || format!("{} is not the file that was compared any more: another process has replaced it", new.display());
    if is(&from)? != Some(file) {
        bail!(Rename, "{}", changed());
    }
    store::rename(&from, &to).ctx(Kind::Rename, || {
        format!("cannot give {} the name of {}, on the same file system", new.display(), old.display())
    })?;
    if is(&to)? != Some(file) {
        bail!(Rename, "{}", changed());
    }
    descriptor::sync_folder(&to.folder)
}

fn id_of(path: &Path) -> Result<FileId> {
    FileId::at(path).ctx(Kind::Open, || format!("cannot open image {}", path.display()))
}

/// The image that is meant. `NoSnap`: no such snapshot; `Param`: no such file or level.
fn find(disk: &Descriptor, device: Option<&Device>, which: &Which) -> Result<Image> {
    let of_id = |id: FileId| disk.images.iter().find(|i| id_of(&i.file).is_ok_and(|other| other == id));
    let found = match which {
        Which::Guid(guid) => disk.image(guid),
        Which::File(file) => match id_of(file).or_else(|_| id_of(&disk.dir.join(file))) {
            Ok(id) => of_id(id),
            Err(_) => None,
        },
        Which::Level(level) => {
            let Some(device) = device else {
                bail!(Param, "level {level}: levels are those of a running device, and this disk does not run");
            };
            device.images.get(usize::from(*level)).and_then(|i| of_id(i.id))
        }
    };
    match (found, which) {
        (Some(image), _) => Ok(image.clone()),
        (None, Which::Guid(guid)) => bail!(NoSnap, "no snapshot {guid} in this disk; ploop snapshot-list shows them"),
        (None, Which::File(file)) => bail!(Param, "{} is no image of this disk", file.display()),
        (None, Which::Level(level)) => bail!(Param, "the running device has no level {level}"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;
    use crate::descriptor::ImageMode;
    use crate::format::guid;
    use crate::format::header::Version;
    use crate::ops::snapshot::{self, SnapshotParams};
    use crate::ops::testkit::{content, files, g, make_disk, map, put, small};

    #[test]
    fn only_copies_replace_images() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let dd = make_disk(dir.path(), Version::V2, ImageMode::Expanded, small(), 20);
        put(&dd, &guid::TOP, 3, 1);
        snapshot::create(&dd, "", &SnapshotParams { guid: g(1), snap_dir: None, temporary: false }).unwrap();
        put(&dd, &guid::TOP, 3, 2);
        let old = dd.with_file_name("root.hdd");
        let new = dd.with_file_name("copy");
        fs::copy(&old, &new).unwrap();
        let kind = |which: Which| replace(&dd, "", &which, &new, false).map_err(|e| e.kind());
        assert_eq!(kind(Which::Guid(g(9))), Err(Kind::NoSnap));
        assert_eq!(kind(Which::File("/nowhere".into())), Err(Kind::Param));
        assert_eq!(kind(Which::Level(0)), Err(Kind::Param));
        assert_eq!(kind(Which::Guid(guid::TOP)), Err(Kind::Format), "another image");
        assert_eq!(replace(&dd, "", &Which::Guid(g(1)), &old, false).unwrap_err().kind(), Kind::Param);
        // An empty image with clusters that nothing uses.
        let base = dd.with_file_name("root.hdd");
        let empty = dd.with_file_name("empty");
        crate::image::create::create_delta(&empty, Version::V2, small(), 20 * 64).unwrap();
        File::options().write(true).open(&empty).and_then(|f| f.set_len(1 << 20)).unwrap();
        let error = replace(&dd, "", &Which::File(base), &empty, false).unwrap_err().to_string();
        assert!(error.contains("bytes at the end") && error.contains("check -f"), "{error}");
        fs::remove_file(&empty).unwrap();
        // One bit differs.
        let bytes = fs::read(&new).unwrap();
        let mut other = bytes.clone();
        *other.last_mut().unwrap() ^= 1;
        fs::write(&new, other).unwrap();
        assert_eq!(kind(Which::Guid(g(1))), Err(Kind::Format));
        fs::write(&new, bytes).unwrap();
        kind(Which::Guid(g(1))).unwrap();
        assert_eq!(Descriptor::read(&dd).unwrap().image(&g(1)).unwrap().file, new);
        assert!(old.exists());
        // Back, under the name that it has now.
        replace(&dd, "", &Which::File("copy".into()), &old, true).unwrap();
        assert!(!old.exists());
        assert_eq!(files(&dd).len(), 2);
        assert_eq!(content(&dd, &guid::TOP), map(&[(3, 2)]));
        assert_eq!(content(&dd, &g(1)), map(&[(3, 1)]));
    }
}

//! Replacing an image of a running device by a copy of it.

use std::os::fd::OwnedFd;
use std::path::Path;

use nix::fcntl::OFlag;

use super::{Ended, change, check_chain, check_state};
use crate::bail;
use crate::descriptor::{self, Image, LockedDescriptor};
use crate::device::{self, CommitFile, Device, NewLevel, SwitchSpec};
use crate::error::{IoContext, Kind, Result};
use crate::image::lock::{Sharing, lock_image};
use crate::image::open::{Access, open_level};
use crate::ops::image_copy::copy_of;
use crate::ops::image_set;
use crate::report;
use crate::sys::file_id::FileId;
use crate::sys::folder::Place;
use crate::sys::store;

/// Suffix of the new image's name until it has that of the old one.
pub const REPLACING: &str = ".ploop-replace";

const READ: Access = Access { write: false, direct: false };

/// Replaces the image of a running disk by `new`, which is no image of the disk. `keep_name`: the new file takes the
/// name of the old one, which is removed. After an error the disk has the old file, and the new one is called `new` as
/// before.
pub fn replace(disk: &mut LockedDescriptor, device: &Device, image: &Image, new: &Path, keep_name: bool) -> Result<()> {
    check_chain(disk, device)?;
    let id = FileId::at_nofollow(&image.file).ctx(Kind::Open, || format!("image {}", image.file.display()))?;
    let Some(level) = device.level_of(id) else {
        bail!(Param, "{} is no image of {}", image.file.display(), device.node().display());
    };
    check_level(device, level)?;
    let old_held = image_set::lock_image(disk, &image.file, READ, Sharing::Readers)?;
    let new_held = copy_of(Some(disk), &image.file, &old_held, new, Sharing::Readers)?;
    if !keep_name {
        let mut next = disk.descriptor.clone();
        next.set_file(&image.guid, new.to_owned())?;
        return match change(disk, device, next, &mut || Ok(()), &mut || {}) {
            Ended::Changed(result) => result,
            Ended::Not(e) | Ended::Unknown(e) => Err(e),
        };
    }
    let place = |path: &Path| {
        disk.dir.place(path).ctx(Kind::Rename, || format!("cannot open the folder of {}", path.display()))
    };
    let (old_place, file) = (place(&image.file)?, new_held.id()?);
    let beside = Beside::bring(place(new)?, &old_place)?;
    let opened =
        beside.place.open(OFlag::O_PATH).ctx(Kind::Open, || format!("cannot open {}", beside.place.display()))?;
    let levels = levels_with(device, level, &image.file, opened);
    let commit = CommitFile::open(&beside.place, &old_place)?.of(file).inspect_err(|_| beside.back())?;
    let commit = commit.under(disk.share_lock()?);
    let spec = SwitchSpec { levels, commit: Some(commit), linger: 0 };
    let switched = device::switch(device, &spec, &mut warn);
    let committed = spec.commit.as_ref().is_none_or(|c| c.is_committed().unwrap_or(true));
    drop((old_held, new_held));
    match committed {
        true => switched,
        false => {
            beside.back();
            switched
        }
    }
}

/// Replaces a level of a running device; no descriptor is changed.
pub fn replace_level(device: &Device, level: usize, new: &Path) -> Result<()> {
    check_state(device)?;
    check_level(device, level)?;
    let Some(name) = device.images.get(level) else {
        bail!(Param, "{} has no level {level}", device.node().display());
    };
    let new = new.canonicalize().ctx(Kind::Open, || format!("cannot open image {}", new.display()))?;
    let id = FileId::at_nofollow(&new).ctx(Kind::Open, || format!("cannot open image {}", new.display()))?;
    if device.level_of(id).is_some() {
        bail!(Param, "{} is an image of {} already", new.display(), device.node().display());
    }
    // The file that the device runs must still have this name.
    let old = lock_image(&name.path, None, READ, Sharing::Readers).map_err(|e| image_set::named(e, &name.path))?;
    let running = FileId::at_nofollow(&name.path).is_ok_and(|id| id == name.id);
    if !running {
        bail!(Param, "{} is not the image that {} runs any more", name.path.display(), device.node().display());
    }
    let held = copy_of(None, &name.path, &old, &new, Sharing::Readers)?;
    let levels = levels_with(device, level, &new, open_level(&new, None)?);
    let switched = device::switch(device, &SwitchSpec { levels, commit: None, linger: 0 }, &mut warn);
    drop((old, held));
    switched
}

fn warn(warning: Option<&str>) {
    if let Some(warning) = warning {
        report::warn(warning);
    }
}

fn check_level(device: &Device, level: usize) -> Result<()> {
    let node = device.node().display();
    if level + 1 >= device.images.len() {
        bail!(Param, "level {level} of {node} is its top: only those below it can be replaced while it runs");
    }
    if device.images.get(level).is_some_and(|l| l.raw) {
        bail!(Format, "level {level} of {node} is raw: only ploop1 images can be compared and replaced");
    }
    Ok(())
}

/// The running chain with the file `fd` in the place of a level, called `name`.
fn levels_with(device: &Device, level: usize, name: &Path, fd: OwnedFd) -> Vec<NewLevel> {
    let mut levels: Vec<NewLevel> = (0..device.images.len()).map(NewLevel::Kept).collect();
    if let Some(place) = levels.get_mut(level) {
        *place = NewLevel::File { path: name.to_owned(), raw: false, fd };
    }
    levels
}

/// The new file in the folder of the old one, from where it can be renamed over it.
struct Beside {
    place: Place,
    /// Where it came from.
    from: Option<Place>,
}

impl Beside {
    fn bring(new: Place, old: &Place) -> Result<Beside> {
        let folder = |place: &Place| {
            let id = place.folder.fd().and_then(FileId::of);
            id.ctx(Kind::Rename, || format!("cannot look at the folder of {}", place.display()))
        };
        if folder(&new)? == folder(old)? {
            return Ok(Beside { place: new, from: None });
        }
        let place = old.suffixed(REPLACING);
        store::rename_new(&new, &place).ctx(Kind::Rename, || {
            format!("cannot bring {} into the folder of {}, on the same file system", new.display(), old.display())
        })?;
        descriptor::sync_folder(&place.folder)?;
        Ok(Beside { place, from: Some(new) })
    }

    fn back(&self) {
        if let Some(from) = &self.from
            && let Err(e) = store::rename_new(&self.place, from)
        {
            report::warn(format_args!("{} is called {} now: {e}", from.display(), self.place.display()));
        }
    }
}

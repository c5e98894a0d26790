//! The check that a file is a copy of an image and can take its place.

use std::path::Path;

use super::image_set;
use crate::descriptor::{self, Descriptor};
use crate::error::{IoContext, Kind, Result};
use crate::image::check::{CheckOptions, check_file};
use crate::image::lock::{self, LockedImage, Sharing};
use crate::image::open::Access;
use crate::image::same::{same_content, same_shape_of};
use crate::sys::folder::Place;
use crate::sys::store;

const READ: Access = Access { write: false, direct: false };

/// Makes sure that `new` can replace the image `old`, and that it is durable; `sharing` says how other processes may
/// use it meanwhile.
pub fn copy_of(
    disk: Option<&Descriptor>,
    image: &Path,
    old: &LockedImage,
    new: &Path,
    sharing: Sharing,
) -> Result<LockedImage> {
    let dir = disk.map(|d| &d.dir);
    let held = lock::lock_image(new, dir, READ, sharing).map_err(|e| image_set::named(e, new))?;
    let options = CheckOptions { check: true, force: true, read_only: true, ..CheckOptions::default() };
    check_file(new, dir, &options)?;
    same_shape_of((&old.file, image), (&held.file, new))?;
    same_content(&old.file, &old.path, &held.file, new)?;
    store::sync_all(&held.file).ctx(Kind::Fsync, || format!("cannot sync image {}", new.display()))?;
    let place = match dir {
        Some(dir) => dir.place(new),
        None => Place::named(new),
    };
    descriptor::sync_folder(&place.ctx(Kind::Open, || format!("cannot open the folder of {}", new.display()))?.folder)?;
    Ok(held)
}

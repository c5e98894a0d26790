//! Descriptors as files: storing one, making one for an image that is not there, and the limit of the top delta.

use super::boundary;
use super::convert;
use super::handle::Disk;
use super::mount::create_params;
use super::snapshots::change;
use super::types::{ploop_create_param, ploop_disk_images_data};
use crate::bail;
use crate::descriptor::{Descriptor, Image, ImageMode, Snapshot};
use crate::error::Result;
use crate::format::guid::Guid;
use crate::ops::{descriptor_file, max_delta};
use crate::units::ClusterSize;
use std::ffi::{CStr, OsStr, c_char, c_int, c_ulonglong};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Stores di, as it was read last, in the descriptor fname: atomically, over the file that is there. No lock is taken, and
/// what other programs have stored since is lost. An old-style GUID of the top becomes the fixed one; the paths of images in
/// the folder of fname are stored relative to it. di stays bound to its own descriptor. Not read yet, no whole tree, no such
/// folder: SYSEXIT_DISKDESCR.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_store_diskdescriptor(fname: *const c_char, di: *mut ploop_disk_images_data) -> c_int {
    boundary::call("ploop_store_diskdescriptor", || {
        // SAFETY: the caller's string, and its object, used by this thread alone.
        let (path, disk) = unsafe { (convert::path(fname, "descriptor")?, Disk::borrow(di)?) };
        descriptor_file::store_descriptor(&path, visible(&disk)?)
    })
}

/// Stores a new descriptor ddxml for the image param->image, which need not exist and is not looked at; a relative path of it
/// counts from the folder of ddxml. param->size (sectors, rounded up to whole clusters), mode and blocksize are stored, too.
/// ddxml exists: SYSEXIT_PARAM, and it stays.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_create_dd(ddxml: *const c_char, param: *mut ploop_create_param) -> c_int {
    boundary::call("ploop_create_dd", || {
        // SAFETY: the caller's string and struct, NULL or valid, unchanged during the call.
        let (path, params) = unsafe { (convert::path(ddxml, "descriptor")?, create_params(param)?) };
        descriptor_file::create_descriptor(&path, &params)
    })
}

/// Limits the file of the top delta to size sectors, 0: no limit. Kept in the descriptor; a running disk has it from now on,
/// and another one from its next mount on: a write that needs more space in that file fails with EIO. What the file has
/// already stays. A disk whose only image is raw keeps the number, and has no such limit.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ploop_set_max_delta_size(di: *mut ploop_disk_images_data, size: c_ulonglong) -> c_int {
    // SAFETY: the caller's object, used by this thread alone.
    unsafe { change("ploop_set_max_delta_size", di, |descriptor, _| max_delta::set_max_delta_size(descriptor, size)) }
}

/// What the visible fields of `disk` say, and what they do not show as it was read.
fn visible(disk: &Disk) -> Result<Descriptor> {
    let Some(read) = disk.last_read().filter(|_| !disk.is_empty()) else {
        bail!(
            DiskDescr,
            "the disk object of {} was not read: there is nothing to store; ploop_read_disk_descr() reads at once",
            disk.descriptor().display()
        );
    };
    let m = disk.mirror();
    let (images, snapshots) = (images(m)?, snapshots(m, read)?);
    // SAFETY: a filled object has a top.
    let top = unsafe { guid(m.top_guid) }?;
    Ok(Descriptor {
        size_sectors: m.size,
        heads: m.heads,
        cylinders: m.cylinders,
        blocksize: ClusterSize::from_sectors(m.blocksize.into())?,
        mode: match m.mode {
            0 => ImageMode::Expanded,
            1 => ImageMode::Preallocated,
            2 => ImageMode::Raw,
            mode => bail!(Param, "image mode {mode}: must be 0 (expanded), 1 (preallocated) or 2 (raw)"),
        },
        max_delta_size: m.max_delta_size,
        images,
        snapshots,
        top,
        ..read.clone()
    })
}

fn images(m: &ploop_disk_images_data) -> Result<Vec<Image>> {
    let mut images = Vec::new();
    for i in 0..usize::try_from(m.nimages).unwrap_or(0) {
        // SAFETY: a filled object has `nimages` pointers to live structs, whose strings are NULL or NUL-terminated.
        let (guid, file) = unsafe {
            let image = &**m.images.add(i);
            (guid(image.guid)?, convert::text(image.file).map(CStr::to_bytes).unwrap_or_default())
        };
        let file = PathBuf::from(OsStr::from_bytes(file));
        if !file.is_absolute() {
            bail!(DiskDescr, "image {guid} has the path {:?}: an absolute one is wanted", file);
        }
        images.push(Image { guid, file });
    }
    Ok(images)
}

fn snapshots(m: &ploop_disk_images_data, read: &Descriptor) -> Result<Vec<Snapshot>> {
    let mut snapshots = Vec::new();
    for i in 0..usize::try_from(m.nsnapshots).unwrap_or(0) {
        // SAFETY: a filled object has `nsnapshots` pointers to live structs, whose strings are NULL or NUL-terminated.
        let (guid, parent, temporary) = unsafe {
            let snapshot = &**m.snapshots.add(i);
            (guid(snapshot.guid)?, guid(snapshot.parent_guid)?, snapshot.temporary != 0)
        };
        let before = read.snapshot(&guid);
        snapshots.push(Snapshot {
            guid,
            parent,
            temporary,
            spoiled: temporary && before.is_some_and(|s| s.spoiled),
            reverse_merge: before.and_then(|s| s.reverse_merge),
        });
    }
    Ok(snapshots)
}

/// # Safety
/// `text` is NULL or a C string.
unsafe fn guid(text: *const c_char) -> Result<Guid> {
    // SAFETY: this function's contract.
    match unsafe { convert::text(text) } {
        Some(text) => Guid::parse(&text.to_string_lossy()),
        None => bail!(DiskDescr, "the disk object has an image or a snapshot without a GUID"),
    }
}

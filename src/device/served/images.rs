//! Where the files of a running chain are now: other programs rename and delete files that a device has open.
#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::bail;
use crate::device::model::{Device, Whereabouts};
use crate::device::served::record;
use crate::error::{IoContext, Kind, Result};
use crate::sys::file_id::FileId;

/// What the kernel appends to the name of an open file that has been deleted.
const DELETED: &[u8] = b" (deleted)";

/// Where each image of the chain is, base first.
pub(super) fn whereabouts(device: &Device) -> Vec<Whereabouts> {
    let here = |path: &Path, id: FileId| FileId::at(path).is_ok_and(|now| now == id);
    device
        .images
        .iter()
        .map(|i| if here(&i.path, i.id) { Whereabouts::InPlace } else { open_file(device, i.id) })
        .collect()
}

/// What the descriptor that a server has of the file says.
fn open_file(device: &Device, id: FileId) -> Whereabouts {
    let mut deleted = None;
    for fd in descriptors(device, id) {
        let Ok(name) = fs::read_link(&fd) else { continue };
        if FileId::at(&name).is_ok_and(|now| now == id) {
            return Whereabouts::Moved(name);
        }
        let Some(was) = name.as_os_str().as_bytes().strip_suffix(DELETED) else { continue };
        if fs::metadata(&fd).is_ok_and(|m| m.nlink() == 0) {
            deleted = Some(PathBuf::from(std::ffi::OsString::from_vec(was.to_vec())));
        }
    }
    deleted.map_or(Whereabouts::Unknown, |was| Whereabouts::Deleted { was })
}

/// The descriptors that worker and supervisor have of a file, as paths below /proc.
fn descriptors(device: &Device, id: FileId) -> Vec<PathBuf> {
    let record = record(device);
    let pids = [record.worker.pid, record.supervisor.pid].into_iter().filter(|pid| *pid > 0);
    let open = pids.filter_map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).ok()).flatten().flatten();
    open.map(|fd| fd.path()).filter(|fd| FileId::at(fd).is_ok_and(|now| now == id)).collect()
}

/// Opens the image of this level for reading, whatever became of its name.
pub(super) fn open(device: &Device, level: usize) -> Result<File> {
    let Some(image) = device.images.get(level) else {
        bail!(Param, "{} has {} images; none of level {level}", device.node.display(), device.images.len())
    };
    let Some(fd) = descriptors(device, image.id).into_iter().next() else {
        bail!(Open, "no process that serves {} has {} open", device.node.display(), image.path.display())
    };
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(&fd)
        .ctx(Kind::Open, || format!("cannot open {} through {}", image.path.display(), fd.display()))?;
    let now = FileId::of(&file).ctx(Kind::Fstat, || format!("cannot look at {}", fd.display()))?;
    if now != image.id {
        bail!(
            Open,
            "{} is not {} any more: its server was replaced just now; try again",
            fd.display(),
            image.path.display()
        );
    }
    Ok(file)
}

/// A name that leads to the base, perhaps not the one under which it was attached.
pub(super) fn base_name(device: &Device) -> Option<PathBuf> {
    match open_file(device, device.base_id()?) {
        Whereabouts::Moved(name) => Some(name),
        _ => None,
    }
}

//! Changes that wait for the next device, since all processes of the last one were killed.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use crate::bail;
use crate::device::served::find;
use crate::device::spec::Level;
use crate::error::{IoContext, Kind, Result};
use crate::report;
use crate::server::{runtime, unflushed};
use crate::sys::file_id::FileId;
use crate::sys::reopen::{Access, reopen};

/// Whether a device of these images takes over what waits for their top. What does not belong to the image any more is
/// dropped, with one line.
pub(super) fn before_attach(levels: &[Level], ids: &[FileId], read_only: bool) -> Result<bool> {
    let (Some(level), Some(top)) = (levels.last(), ids.last().copied()) else { return Ok(false) };
    let image = level.path.display();
    if let (false, Some(name)) = (read_only, dead_device(top)?) {
        bail!(
            Busy,
            "image {image} is that of {name}, whose server was killed: unmount what is mounted from it, then ploop umount \
             -d {name}"
        );
    }
    let left = match unflushed::left_of(top) {
        Ok(None) => return Ok(false),
        Ok(Some(left)) => left,
        Err(e) if read_only => {
            report::warn(format_args!(
                "image {image}: what was not flushed when its server was killed is not shown: {e}"
            ));
            return Ok(false);
        }
        Err(e) => bail!(
            Busy,
            "image {image} has changes that were not flushed when its server was killed, and this version cannot use them: {e}; \
             mount it with the version that left them, or remove that folder to give them up"
        ),
    };
    let (file, _) = reopen(&level.fd, Access::default()).ctx(Kind::Open, || format!("cannot open {image}"))?;
    match left.why_stale(&file, level.raw)? {
        Some(why) if read_only => {
            report::warn(format_args!(
                "image {image}: {} changes that were not flushed when its server was killed are not shown, and the next \
                 mount for writing drops them: {why}",
                left.changes()
            ));
            Ok(false)
        }
        None if read_only => {
            if left.changes() > 0 {
                report::warn(format_args!(
                    "image {image}: {} clusters written last are not shown, since its server was killed before a flush; \
                     the next mount for writing has them",
                    left.changes()
                ));
            }
            Ok(false)
        }
        Some(why) => {
            report::warn(format_args!(
                "image {image}: {} changes that were not flushed when its server was killed are dropped: {why}",
                left.changes()
            ));
            unflushed::forget(top);
            Ok(false)
        }
        None if !left.is_of_chain(ids) => bail!(
            Busy,
            "image {image} has {} changes that were not flushed when its server was killed; mount the chain that they are \
             of ({}), or remove {} to give them up",
            left.changes(),
            left.images().iter().map(|i| i.display().to_string()).collect::<Vec<_>>().join(", "),
            left.dir.display()
        ),
        None => Ok(true),
    }
}

/// The device whose processes were killed while it wrote to this file, if it has not been removed yet.
fn dead_device(top: FileId) -> Result<Option<String>> {
    let names = runtime::names()?;
    Ok(names.into_iter().find(|name| {
        let dir = runtime::device_dir(name);
        unflushed::top_in(&dir) == Some(top)
            && find::is_dead(name)
            && unflushed::left_in(&dir).is_ok_and(|left| left.is_some())
    }))
}

/// The folder in which changes wait for one of these files, and which file it is.
pub(super) fn waiting(files: &[FileId]) -> Result<Option<(FileId, PathBuf)>> {
    for file in files {
        if let Some(name) = dead_device(*file)? {
            return Ok(Some((*file, runtime::device_dir(&name))));
        }
        if let Some(left) = unflushed::left_of(*file)? {
            return Ok(Some((*file, left.dir)));
        }
    }
    Ok(None)
}

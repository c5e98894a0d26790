//! The images of a chain before they are attached: opened, and refused where another device has them.

use std::collections::HashMap;
use std::path::Path;

use crate::bail;
use crate::device::{self, Device, Level, State};
use crate::error::{IoContext, Kind, Result};
use crate::image::open;
use crate::sys::file_id::FileId;
use crate::sys::folder::Folder;

/// Opens one image for the server. A missing one is `Mount`.
pub fn level(path: &Path, dir: Option<&Folder>, raw: bool) -> Result<Level> {
    let fd = open::open_level(path, dir).map_err(|e| match e.errno() {
        Some(libc::ENOENT) => e.as_kind(Kind::Mount),
        _ => e,
    })?;
    Ok(Level { path: path.to_owned(), raw, fd })
}

fn identity(level: &Level) -> Result<FileId> {
    FileId::of(&level.fd).ctx(Kind::Fstat, || format!("cannot look at {}", level.path.display()))
}

/// Refuses a chain that has one file twice, whatever the names. `Param`.
pub fn refuse_twice(levels: &[Level]) -> Result<()> {
    let mut seen = HashMap::new();
    for level in levels {
        if let Some(other) = seen.insert(identity(level)?, &level.path) {
            bail!(
                Param,
                "image {} is there twice, the other time as {}: each level of a chain is a file of its own",
                level.path.display(),
                other.display()
            );
        }
    }
    Ok(())
}

/// Refuses images that another device writes to, and a top that another device reads. `Mount`.
pub fn refuse_used(levels: &[Level], read_only: bool) -> Result<()> {
    let ids = levels.iter().map(identity).collect::<Result<Vec<_>>>()?;
    let top = ids.last().copied().filter(|_| !read_only);
    let clash = |device: &Device| {
        let written = device.written_id().filter(|w| ids.contains(w));
        let file = written.or(top.filter(|t| device.level_of(*t).is_some()))?;
        ids.iter().position(|i| *i == file).and_then(|at| levels.get(at))
    };
    for device in &device::list_of(|d| clash(d).is_some())? {
        let Some(level) = clash(device) else { continue };
        if device.state == State::Dead {
            if !read_only {
                // What another server left of the same images, by another component or as a list of files.
                device::clean(device.name()).map_err(|e| {
                    e.context(format!("left by a dead server: {} as {}", level.path.display(), device.node().display()))
                })?;
            }
            continue;
        }
        bail!(
            Mount,
            "image {} is in use by {}: an image that is written to has one user; unmount that first (ploop umount -d {})",
            level.path.display(),
            device.node().display(),
            device.node().display()
        );
    }
    Ok(())
}

/// Refuses to write to an image of a device that is stopped, or to use the one that it writes to: it could not be started any
/// more. Frozen images below may be shared. `Mount`.
pub fn refuse_stopped(levels: &[Level], read_only: bool) -> Result<()> {
    if read_only {
        return Ok(());
    }
    let ids = levels.iter().map(identity).collect::<Result<Vec<_>>>()?;
    let top = ids.len().saturating_sub(1);
    for stopped in device::stopped()? {
        let clashes = |(at, id): (usize, &FileId)| {
            at == top && stopped.level_of(*id).is_some() || stopped.written_id() == Some(*id)
        };
        let Some(at) = ids.iter().enumerate().position(clashes) else { continue };
        let node = stopped.node().display();
        bail!(
            Mount,
            "image {} belongs to {node}, which is stopped: ploop start -d {node} attaches it again; to mount it anew: \
             ploop clear -d {node}",
            levels[at].path.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(level(&dir.path().join("gone"), None, false).unwrap_err().kind(), Kind::Mount);
    }
}

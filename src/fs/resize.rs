//! Making a file system as large as its partition.

use std::ffi::OsStr;
use std::path::Path;

use super::helper;
use super::mount::{self, MountSpec};
use super::probe::{self, Found};
use crate::error::{Error, IoContext, Kind, Result};

/// Grows what is on a partition that is not mounted. ext is checked first; xfs and btrfs are mounted at `folder`, an empty
/// one, meanwhile. `None`: no file system that this library can grow; nothing was done.
pub fn grow(partition: &Path, folder: &Path) -> Result<Option<Found>> {
    let found = probe::device(partition).ctx(Kind::Read, || format!("{} cannot be read", partition.display()))?;
    let Some(found) = found else { return Ok(None) };
    match found {
        Found::Ext { .. } => {
            // resize2fs wants a check that has just been made.
            run("e2fsck", &["-f".as_ref(), "-p".as_ref(), partition.as_os_str()], 3, Kind::Fsck)?;
            run("resize2fs", &[partition.as_os_str()], 0, Kind::ResizeFs)?;
        }
        Found::Xfs => mounted(partition, folder, "xfs_growfs", &[folder.as_os_str()])?,
        Found::Btrfs => {
            let resize = ["filesystem".as_ref(), "resize".as_ref(), "max".as_ref(), folder.as_os_str()];
            mounted(partition, folder, "btrfs", &resize)?;
        }
    }
    Ok(Some(found))
}

fn mounted(partition: &Path, folder: &Path, program: &str, args: &[&OsStr]) -> Result<()> {
    mount::mount_device(partition, folder, &MountSpec::default())?;
    let grown = run(program, args, 0, Kind::ResizeFs);
    let unmounted = mount::umount(folder);
    grown.and(unmounted)
}

/// Runs a program whose status is to be at most `fine`.
fn run(program: &str, args: &[&OsStr], fine: i32, kind: Kind) -> Result<()> {
    let outcome = helper::run(program, args)?;
    if (0..=fine).contains(&outcome.status) {
        return Ok(());
    }
    let shown = args.iter().map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" ");
    if outcome.status == helper::NOT_STARTED {
        return Err(Error::new(kind, format!("{program} {shown} cannot be run: {}", outcome.err)));
    }

    Err(Error::new(kind, format!("{program} {shown} ended with {}", outcome.complaint())))
}

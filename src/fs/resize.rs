//! Making a file system as large as its partition, or smaller.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::helper;
use super::mount::{self, MountSpec};
use super::probe::{self, Found};
use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::units::SECTOR;

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

/// The least size that [`shrink`] can give to what is on a partition that may be mounted, in bytes. Xfs and what is not
/// recognised is refused: `Param`.
pub fn least(partition: &Path, folder: &Path) -> Result<u64> {
    match shrinkable(partition)? {
        Found::Ext { .. } => {
            let blocks = asked("resize2fs", &["-P".as_ref(), partition.as_os_str()], &|out| {
                out.lines().find_map(|l| l.rsplit_once(':')?.1.trim().parse().ok())
            })?;
            // s_log_block_size.
            let mut shift = [0; 4];
            File::open(partition)
                .and_then(|file| file.read_exact_at(&mut shift, 1024 + 24))
                .ctx(Kind::Read, || format!("{} cannot be read", partition.display()))?;
            let block = 1024_u64.checked_shl(u32::from_le_bytes(shift)).unwrap_or(u64::MAX);
            Ok(blocks.saturating_mul(block))
        }
        _ => {
            let ask = ["inspect-internal".as_ref(), "min-dev-size".as_ref(), folder.as_os_str()];
            mount::mount_device(partition, folder, &MountSpec::default())?;
            let bytes = asked("btrfs", &ask, &|out| out.split_whitespace().next()?.parse().ok());
            let unmounted = mount::umount(folder);
            bytes.and_then(|bytes| unmounted.map(|()| bytes))
        }
    }
}

/// Gives what is on a partition that is not mounted so many sectors, more or less than it has. ext is checked first; btrfs
/// is mounted at `folder`, an empty one, meanwhile. Interrupted it is finished by another run.
pub fn shrink(partition: &Path, folder: &Path, sectors: u64) -> Result<Found> {
    let found = shrinkable(partition)?;
    match found {
        Found::Ext { .. } => {
            run("e2fsck", &["-f".as_ref(), "-p".as_ref(), partition.as_os_str()], 3, Kind::Fsck)?;
            let size = format!("{sectors}s");
            run("resize2fs", &[partition.as_os_str(), size.as_ref()], 0, Kind::ResizeFs)?;
        }
        _ => {
            let size = (sectors * SECTOR).to_string();
            let resize = ["filesystem".as_ref(), "resize".as_ref(), size.as_ref(), folder.as_os_str()];
            mounted(partition, folder, "btrfs", &resize)?;
        }
    }
    Ok(found)
}

/// What can be made smaller.
fn shrinkable(partition: &Path) -> Result<Found> {
    let shown = partition.display();
    match probe::device(partition).ctx(Kind::Read, || format!("{shown} cannot be read"))? {
        Some(Found::Xfs) => bail!(
            Param,
            "{shown} has an xfs, which no program can make smaller: copy its files to a new, smaller disk, or mount it \
             and resize it then, by a balloon"
        ),
        None => bail!(Param, "no ext or btrfs was recognised on {shown}: only these can be made smaller"),
        Some(found) => Ok(found),
    }
}

/// The number that a program tells.
fn asked(program: &str, args: &[&OsStr], number: &dyn Fn(&str) -> Option<u64>) -> Result<u64> {
    let outcome = helper::run(program, args)?;
    match number(&outcome.out).filter(|_| outcome.status == 0) {
        Some(number) => Ok(number),
        None => {
            let text = format!("{program} {} does not tell the size: {}", shown(args), outcome.complaint());
            Err(Error::new(Kind::ResizeFs, text))
        }
    }
}

fn shown(args: &[&OsStr]) -> String {
    args.iter().map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Runs a program whose status is to be at most `fine`.
fn run(program: &str, args: &[&OsStr], fine: i32, kind: Kind) -> Result<()> {
    let outcome = helper::run(program, args)?;
    if (0..=fine).contains(&outcome.status) {
        return Ok(());
    }
    let shown = shown(args);
    if outcome.status == helper::NOT_STARTED {
        return Err(Error::new(kind, format!("{program} {shown} cannot be run: {}", outcome.err)));
    }

    Err(Error::new(kind, format!("{program} {shown} ended with {}", outcome.complaint())))
}

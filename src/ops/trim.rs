//! Having the file systems on a running device discard what they do not use (FITRIM), in whatever mount namespace they are
//! mounted.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::bail;
use crate::device::{self, Device};
use crate::error::{IoContext, Kind, Result};
use crate::fs::mounts;
use crate::fs::stat::FsInfo;
use crate::image::allocated::allocated_ranges;
use crate::report;
use crate::sys::{freeze, host};

use super::inside;

/// Bytes of a file system that are trimmed in one call: a call cannot be interrupted.
const PIECE: u64 = 8 << 30;

/// The chain is looked at so often, and before so many bytes.
const LOOK: Duration = Duration::from_millis(50);

/// A file system that is mounted from a device.
#[derive(Debug)]
pub struct Inside {
    pub root: File,
    /// Its mount point, as the process sees it in whose mount namespace it was found.
    pub target: PathBuf,
    pub fstype: String,
    /// Where it begins on the disk, in bytes.
    pub start: u64,
    /// Size and use.
    pub info: FsInfo,
}

impl Inside {
    /// The file system with this root, which begins at byte `start` of the disk.
    pub fn of(root: File, target: PathBuf, fstype: String, start: u64) -> Result<Inside> {
        let info = FsInfo::of(&PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd())))?;
        Ok(Inside { root, target, fstype, start, info })
    }

    fn bytes(&self) -> u64 {
        self.info.blocks.saturating_mul(self.info.block_size)
    }

    /// Bytes that it uses.
    pub fn used(&self) -> u64 {
        self.info.blocks.saturating_sub(self.info.free_blocks).saturating_mul(self.info.block_size)
    }
}

/// The file systems of a device that are mounted for writing, each once; that of the calling process's namespace first.
pub fn file_systems(device: &Device) -> Result<Vec<Inside>> {
    let partitions = device::partitions(device).unwrap_or_default();
    let mut found = Vec::<(u64, Inside)>::new();
    for (path, mount) in inside::mounts_everywhere(device)? {
        if mount.read_only || found.iter().any(|(dev, _)| *dev == mount.dev) {
            continue;
        }
        // Whatever has the place by now, a pipe for one, is not waited for.
        let flags = libc::O_DIRECTORY | libc::O_NONBLOCK | libc::O_NOATIME;
        let Ok(root) = OpenOptions::new().read(true).custom_flags(flags).open(&path) else { continue };
        // Another mount may hide it.
        if mounts::id_of(&root) != Some(mount.id) {
            continue;
        }
        let start = partitions.iter().find(|p| p.rdev == mount.dev).map_or(0, |p| p.start);
        found.push((mount.dev, Inside::of(root, mount.target, mount.fstype, start)?));
    }
    Ok(found.into_iter().map(|(_, inside)| inside).collect())
}

/// Has a file system on a device discard its free extents of at least `shortest` bytes, in these ranges of the disk (none:
/// all of it); how many bytes those were. It ends early when `stop` says so; `Busy`: the chain was changed.
pub fn trim(
    device: &Device,
    inside: &Inside,
    ranges: Option<&[Range<u64>]>,
    shortest: u64,
    stop: &mut dyn FnMut() -> bool,
) -> Result<u64> {
    freeze::sync_file_system(&inside.root)
        .ctx(Kind::Fsync, || format!("the file system on {} cannot be written back", inside.target.display()))?;
    let all = vec![inside.start..inside.start + inside.bytes(); 1];
    let (mut trimmed, mut trimmed_over) = (0, 0);
    let mut looked: Option<(Instant, u64)> = None;
    for range in ranges.unwrap_or(&all) {
        let mut at = range.start.max(inside.start) - inside.start;
        let end = range.end.saturating_sub(inside.start).min(inside.bytes());
        while at < end {
            if stop() {
                return Ok(trimmed);
            }
            let len = PIECE.min(end - at);
            if looked.is_none_or(|(when, bytes)| host::since(when) >= LOOK || trimmed_over - bytes >= PIECE) {
                unchanged(device)?;
                looked = Some((host::now(), trimmed_over));
            }
            trimmed_over += len;
            match freeze::trim_range(&inside.root, at, len, shortest) {
                Ok(bytes) => trimmed += bytes,
                // It has no room for extents of that length, or ends before.
                Err(e) if e.raw_os_error() == Some(nix::libc::EINVAL) => {}
                Err(e) if e.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => bail!(
                    Sys,
                    "the file system ({}) on {} cannot discard; ploop compact --no-trim gives back what is free already",
                    inside.fstype,
                    inside.target.display()
                ),
                Err(e) => {
                    return Err(e)
                        .ctx(Kind::Sys, || format!("the file system on {} cannot discard", inside.target.display()));
                }
            }
            at += len;
        }
    }
    Ok(trimmed)
}

/// What of a file system's free space is worth discarding: see [`parts_of_the_top`]. None: all.
pub fn worth(device: &Device, inside: &Inside) -> Result<Option<Vec<Range<u64>>>> {
    let parts = parts_of_the_top(device)?;
    if parts.is_some() && inside.fstype == "btrfs" {
        report::warn(format_args!(
            "{}: what a btrfs does not use stays, since the disk has snapshots: discards of it could make the top image larger",
            inside.target.display()
        ));
        return Ok(Some(Vec::new()));
    }
    Ok(parts)
}

/// The parts of the disk that the top of a chain has: a discard of what only a lower image has would make the top larger,
/// since it has to hide that. None: the chain has one image.
pub fn parts_of_the_top(device: &Device) -> Result<Option<Vec<Range<u64>>>> {
    unchanged(device)?;
    let Some(top) = device.images.len().checked_sub(1).filter(|top| *top > 0) else { return Ok(None) };
    let file = device::open_image(device, top)?;
    allocated_ranges(&file, device.top()).map(Some)
}

/// `Busy` after a change of the chain, a snapshot for one: what was looked at is not the top any more.
pub fn unchanged(device: &Device) -> Result<()> {
    let now = device::by_node(device.name())?;
    if !now.is_some_and(|now| now.is_same(device) && now.ids() == device.ids()) {
        bail!(Busy, "the chain of {} was changed meanwhile; start it again", device.node().display());
    }
    Ok(())
}

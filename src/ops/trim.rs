//! Having the file systems on a running device discard what they do not use (FITRIM), in whatever mount namespace they are
//! mounted.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::bail;
use crate::device::{self, Device};
use crate::error::{IoContext, Kind, Result};
use crate::fs::mounts;
use crate::fs::stat::FsInfo;
use crate::image::target::read_table;
use crate::report;
use crate::sys::freeze;

use super::find;

/// Bytes of a file system that are trimmed in one call: a call cannot be interrupted.
const PIECE: u64 = 8 << 30;

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
    let names = find::names(device);
    let partitions = device::partitions(device).unwrap_or_default();
    let (mut namespaces, mut found) = (BTreeSet::new(), Vec::<(u64, Inside)>::new());
    let mut processes = vec![PathBuf::from("/proc/self")];
    processes.extend(fs::read_dir("/proc").ctx(Kind::Sys, || "cannot list /proc")?.flatten().map(|e| e.path()));
    for process in processes {
        // A process may end meanwhile.
        let Ok(namespace) = fs::metadata(process.join("ns/mnt")) else { continue };
        if !namespaces.insert(namespace.ino()) {
            continue;
        }
        for mount in mounts::read_of(&process).unwrap_or_default() {
            if mount.read_only || !names.mounted_by(&mount) || found.iter().any(|(dev, _)| *dev == mount.dev) {
                continue;
            }
            let Ok(root) = open(&process, &mount.target) else { continue };
            // Another mount may hide it.
            if !root.metadata().is_ok_and(|m| m.dev() == mount.dev) {
                continue;
            }
            let start = partitions.iter().find(|p| p.rdev == mount.dev).map_or(0, |p| p.start);
            let here = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&root)));
            let info = FsInfo::of(&here)?;
            found.push((mount.dev, Inside { root, target: mount.target, fstype: mount.fstype, start, info }));
        }
    }
    Ok(found.into_iter().map(|(_, inside)| inside).collect())
}

fn open(process: &Path, target: &Path) -> std::io::Result<File> {
    let inside = target.strip_prefix("/").unwrap_or(target);
    let path = if process == Path::new("/proc/self") { target.to_owned() } else { process.join("root").join(inside) };
    File::open(path)
}

/// Has a file system discard its free extents of at least `shortest` bytes, in these ranges of the disk (none: all of it);
/// how many bytes those were. It ends early when `stop` says so.
pub fn trim(
    inside: &Inside,
    ranges: Option<&[Range<u64>]>,
    shortest: u64,
    stop: &mut dyn FnMut() -> bool,
) -> Result<u64> {
    freeze::sync_file_system(&inside.root)
        .ctx(Kind::Fsync, || format!("the file system on {} cannot be written back", inside.target.display()))?;
    let all = vec![inside.start..inside.start + inside.bytes(); 1];
    let mut trimmed = 0;
    for range in ranges.unwrap_or(&all) {
        let mut at = range.start.max(inside.start) - inside.start;
        let end = range.end.saturating_sub(inside.start).min(inside.bytes());
        while at < end {
            if stop() {
                return Ok(trimmed);
            }
            let len = PIECE.min(end - at);
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

/// What of a file system's free space is worth discarding: the clusters that the top of a chain has. A discard of what only
/// a lower image has would make the top larger, since it has to hide that. None: all; a chain of one image, or a file
/// system whose addresses are not those of the disk.
pub fn worth(device: &Device, inside: &Inside) -> Result<Option<Vec<Range<u64>>>> {
    let Some(top) = device.images.len().checked_sub(1).filter(|top| *top > 0) else { return Ok(None) };
    if inside.fstype == "btrfs" {
        report::say(
            1,
            format_args!("{}: discards of btrfs may make the top of a chain larger", inside.target.display()),
        );
        return Ok(None);
    }
    let file = device::open_image(device, top)?;
    let (header, table) = read_table(&file, device.top())?;
    let cluster = header.cluster.bytes();
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for (virt, _) in &table.entries {
        let start = u64::from(*virt) * cluster;
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end += cluster,
            _ => ranges.push(start..start + cluster),
        }
    }
    Ok(Some(ranges))
}

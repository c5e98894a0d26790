//! Compacting a running disk as `ploop_discard` does it: the file system discards its free extents, the longest first, and
//! after each round the space is given back, until enough of it is free.

use std::fs::OpenOptions;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::compact_running::top_bytes;
use super::give_back::{self, Options};
use super::maintenance::{self, Work};
use super::mount::{self, MountParams};
use super::trim::{self, Inside};
use super::{find, umount};
use crate::bail;
use crate::device::{self, Device, Maintenance};
use crate::error::{Error, IoContext, Kind, Result};
use crate::fs::balloon;
use crate::fs::helper;
use crate::report;
use crate::units::SECTOR;

/// The first round takes extents of so many clusters and more.
const FIRST_ROUND: u64 = 32;

/// Defragments a file system, where it is installed.
const DEFRAG: &str = "e4defrag2";

/// How to compact.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiscardParams {
    /// Shortest free extent, bytes; 0: the cluster.
    pub shortest: u64,
    /// Bytes to be freed; 0: all that is free.
    pub to_free: u64,
    /// Mount a disk that does not run for it.
    pub automount: bool,
    /// Defragment first, if the program for it is installed.
    pub defrag: bool,
}

/// What was freed; bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Discarded {
    pub freed: u64,
    /// What was to be freed in the end: defragmenting may have made the image larger. 0: all.
    pub to_free: u64,
}

/// Space of a running disk, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiscardStat {
    pub data: u64,
    pub disk: u64,
    pub image: u64,
    pub balloon: u64,
}

/// Compacts a disk by its descriptor. Not mounted, and not to be mounted for it: `Param`. `stop` ends it between rounds.
pub fn discard(
    descriptor: &Path,
    component: &str,
    params: &DiscardParams,
    stop: &mut dyn FnMut() -> bool,
) -> Result<Discarded> {
    let found = find::devices(descriptor, Some(component)).map_err(|e| e.as_kind(Kind::Lock))?;
    if let Some(device) = found.into_iter().find(|d| d.state.runs()) {
        return rounds(&device, &mounted(&device)?, params, stop);
    }
    if !params.automount {
        bail!(Param, "{} is not mounted; --automount mounts it for the time of the work", descriptor.display());
    }
    let folder = super::private_folder::PrivateFolder::make()?;
    let target = Some(folder.path().to_owned());
    let device = mount::mount_descriptor(descriptor, component, &MountParams { target, ..Default::default() })?.device;
    let done = mounted(&device).and_then(|inside| rounds(&device, &inside, params, stop));
    umount::umount_device(device.name(), Some(descriptor))?;
    done
}

/// Compacts a running device by its node and a mount point of it.
pub fn discard_by_dev(
    node: &str,
    mount_point: &Path,
    params: &DiscardParams,
    stop: &mut dyn FnMut() -> bool,
) -> Result<Discarded> {
    let (device, inside) = by_dev(node, mount_point)?;
    rounds(&device, &inside, params, stop)
}

/// The mounted file systems of a device. None: `Param`.
fn mounted(device: &Device) -> Result<Vec<Inside>> {
    let inside = trim::file_systems(device)?;
    if inside.is_empty() {
        bail!(Param, "{} runs, and nothing is mounted from it for writing", device.node().display());
    }
    Ok(inside)
}

fn by_dev(node: &str, mount_point: &Path) -> Result<(Device, Vec<Inside>)> {
    let Some(device) = device::by_node(node)? else { bail!(Device, "{node} is no ploop device") };
    let dev = mount_point.metadata().ctx(Kind::Fstat, || format!("cannot look at {}", mount_point.display()))?.dev();
    let mut inside = mounted(&device)?;
    inside.retain(|one| one.root.metadata().is_ok_and(|m| m.dev() == dev));
    if inside.is_empty() {
        bail!(Param, "{} is no mount point of {node}", mount_point.display());
    }
    Ok((device, inside))
}

fn rounds(
    device: &Device,
    inside: &[Inside],
    params: &DiscardParams,
    stop: &mut dyn FnMut() -> bool,
) -> Result<Discarded> {
    let _operation = report::cancel::begin();
    give_back::refuse(device)?;
    let cluster = device.cluster()?.bytes();
    if params.to_free > 0 && params.to_free < cluster {
        bail!(Param, "{} bytes are to be freed: at least a cluster, {cluster} bytes, is wanted", params.to_free);
    }
    let Some(least) = params.shortest.max(1).checked_next_multiple_of(cluster) else {
        bail!(Param, "extents of {} bytes and more are to be freed: no disk has such", params.shortest);
    };
    maintenance::before(device, Work::Discard)?;
    let mut to_free = params.to_free;
    if params.defrag {
        let grown = defragment(device, inside)?;
        if to_free > 0 {
            to_free += grown;
        }
    }
    device::set_maintenance(device, &[Maintenance::Off, Maintenance::Discard], Maintenance::Discard)?;
    let done = discard_all(device, inside, (least, to_free), stop);
    // Another operation may have ended it.
    let ended = device::set_maintenance(device, &[Maintenance::Discard, Maintenance::Off], Maintenance::Off);
    done.and_then(|freed| ended.map(|()| Discarded { freed, to_free }))
}

/// In rounds, down to extents of `least` bytes, until so many bytes are freed; 0: all.
fn discard_all(
    device: &Device,
    inside: &[Inside],
    (least, to_free): (u64, u64),
    stop: &mut dyn FnMut() -> bool,
) -> Result<u64> {
    let cluster = device.cluster()?.bytes();
    let (mut freed, mut shortest) = (0, least.max(FIRST_ROUND * cluster));
    let mut ended = || stop() || report::cancel::requested();
    loop {
        for one in inside {
            let ranges = trim::worth(device, one)?;
            trim::trim(device, one, ranges.as_deref(), shortest, &mut report::cancel::requested).map_err(failed)?;
        }
        if ended() {
            break;
        }
        let given = give_back::give_back(device, &Options::default(), &mut |_, _| {}).map_err(failed)?;
        let bytes = given.before.saturating_sub(given.after);
        if bytes > 0 {
            report::say(0, format_args!("TRUNCATED: {} cluster-blocks ({bytes} bytes)", bytes / cluster));
        }
        freed += bytes;
        if shortest == least || to_free > 0 && freed >= to_free || ended() {
            break;
        }
        shortest = (shortest / 2).next_multiple_of(cluster).max(least);
    }
    Ok(freed)
}

/// The work itself has failed, unless it was cancelled.
fn failed(e: Error) -> Error {
    if e.kind() == Kind::Abort { e } else { e.as_kind(Kind::Reloc) }
}

/// Defragments the file systems; bytes by which the image has grown. It is never an error that this does not work.
fn defragment(device: &Device, inside: &[Inside]) -> Result<u64> {
    let before = top_bytes(device)?;
    for one in inside.iter().filter(|one| one.fstype == "ext4") {
        if helper::find(DEFRAG).is_none() {
            report::say(1, format_args!("{DEFRAG} is not installed: nothing is defragmented"));
            break;
        }
        if let Err(e) = helper::run(DEFRAG, &[one.target.as_os_str()]) {
            report::warn(format_args!("{} is not defragmented: {e}", one.target.display()));
        }
    }
    Ok(top_bytes(device)?.saturating_sub(before))
}

/// Space of a disk that runs and is mounted; else `Param`.
pub fn stat(descriptor: &Path, component: &str) -> Result<DiscardStat> {
    let found = find::devices(descriptor, Some(component))?;
    let Some(device) = found.into_iter().find(|d| d.state.runs()) else {
        bail!(Param, "{} is not mounted", descriptor.display());
    };
    stat_of(&device, &mounted(&device)?)
}

/// The same by the node of a running device and a mount point of it.
pub fn stat_by_dev(node: &str, mount_point: &Path) -> Result<DiscardStat> {
    let (device, inside) = by_dev(node, mount_point)?;
    stat_of(&device, &inside)
}

fn stat_of(device: &Device, inside: &[Inside]) -> Result<DiscardStat> {
    let Some(first) = inside.first() else { bail!(Param, "{} is not mounted", device.node().display()) };
    let balloon = balloon_size(first)?;
    let disk = (device.sectors * SECTOR).saturating_sub(balloon);
    let free = first.info.free_blocks.saturating_mul(first.info.block_size);
    Ok(DiscardStat { data: disk.saturating_sub(free), disk, image: top_bytes(device)?, balloon })
}

/// Bytes of the balloon file; 0: there is none.
fn balloon_size(inside: &Inside) -> Result<u64> {
    let root = std::os::fd::AsRawFd::as_raw_fd(&inside.root);
    let path = PathBuf::from(format!("/proc/self/fd/{root}")).join(balloon::NAME);
    let opened = OpenOptions::new().read(true).custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK).open(&path);
    let named = || format!("the balloon {} on {}", balloon::NAME, inside.target.display());
    let file = match opened {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        other => other.ctx(Kind::Open, || format!("{} cannot be opened", named()))?,
    };
    let meta = file.metadata().ctx(Kind::Fstat, named)?;
    if !meta.is_file() || meta.nlink() != 1 {
        bail!(Open, "{} is no regular file with one name; remove it", named());
    }
    Ok(meta.len())
}

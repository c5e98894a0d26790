//! Limiting what the users of a running disk have by its balloon: the largest balloon, and a disk "resized" to a size that
//! is not larger than its device. The device and the image keep their size.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::maintenance::{self, Work};
use super::mount::{self, MountParams};
use super::private_folder::PrivateFolder;
use super::{balloon, disk_lock, image_set, partition, recovery};
use crate::bail;
use crate::descriptor::LockedDescriptor;
use crate::device::{self, Device};
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::bat;
use crate::fs::balloon::{FileSystem, Root, Space};
use crate::fs::helper;
use crate::fs::mount::{self as mounting, MountSpec};
use crate::fs::probe::Found;
use crate::report;
use crate::sys::fs_resize;
use crate::units::SECTOR;

/// The file system is smaller than its disk by so many clusters.
const MARGIN: u64 = 4;
/// Bytes of an inode in the tables of the file system, which a smaller one would have less of.
const INODE: u64 = 256;
/// Part of the file system that is reserved for root.
const RESERVED: u64 = 20;

/// Gives a disk the largest balloon that there is room for. One that does not run is mounted for a moment. Needs root.
pub fn largest(descriptor: &Path) -> Result<()> {
    let _operation = report::cancel::begin();
    let mut disk = disk_lock::open(descriptor)?;
    if let Some(device) = image_set::writer(&disk)? {
        return with_root(&device, largest_of);
    }
    attached(&mut disk, |device| with_root(device, largest_of))
}

/// With a device for the moment, of a disk that does not run.
fn attached(disk: &mut LockedDescriptor, work: impl FnOnce(&Device) -> Result<()>) -> Result<()> {
    recovery::before_change(disk)?;
    let device = mount::mount_locked(disk, "", &MountParams::default())?.device;
    let done = work(&device);
    let detached = device::detach(device.name());
    mount::drop_cache(disk);
    done.and(detached)
}

/// [`within_device`] of a disk that does not run.
pub(super) fn within_disk(disk: &mut LockedDescriptor, sectors: u64) -> Result<()> {
    attached(disk, |device| within_device(device, sectors))
}

/// Resizes a disk that runs to a size that is smaller than its device: the balloon takes what is to be taken, or the
/// file system grows.
pub fn within_device(device: &Device, sectors: u64) -> Result<()> {
    maintenance::before(device, Work::Resize)?;
    let cluster = device.cluster()?.bytes();
    let Some(wanted) = (sectors * SECTOR).next_multiple_of(cluster).checked_sub(MARGIN * cluster).filter(|w| *w > 0)
    else {
        bail!(
            Param,
            "a size of {sectors} sectors: more than {MARGIN} clusters, {} sectors, wanted",
            MARGIN * cluster / SECTOR
        )
    };
    with_root(device, |device, root| limit(device, root, wanted))
}

/// Takes the balloon of a disk away, before its file system gets another size. What is neither ext nor XFS, or cannot be
/// mounted, has none.
pub(super) fn deflate(device: &Device) -> Result<()> {
    if !matches!(partition::recognised(&partition::source(device, None)?), Some(Found::Ext { .. } | Found::Xfs)) {
        return Ok(());
    }
    let done = with_root(device, |device, root| match root.balloon_size()? {
        0 => Ok(()),
        _ => balloon::change_locked(device, &balloon::locked(root, false)?, 0),
    });
    match done {
        // Its check, which follows, says what is wrong with it.
        Err(e) if e.kind() == Kind::Mount => {
            report::warn(e);
            Ok(())
        }
        other => other,
    }
}

/// With the root of the file system, which is mounted for a moment if it is mounted nowhere.
fn with_root(device: &Device, work: impl FnOnce(&Device, &Root) -> Result<()>) -> Result<()> {
    if let Ok(root) = balloon::root_of(device) {
        return work(device, &root);
    }
    let folder = PrivateFolder::make()?;
    mounting::mount_device(&partition::source(device, None)?, folder.path(), &MountSpec::default())?;
    let done = Root::open(folder.path()).and_then(|root| work(device, &root));
    let unmounted = mounting::umount(folder.path());
    done.and(unmounted)
}

/// Tries all that is free less 1, 2, 4 and so on clusters.
fn largest_of(device: &Device, root: &Root) -> Result<()> {
    maintenance::before(device, Work::Resize)?;
    let cluster = device.cluster()?.bytes();
    let balloon = balloon::locked(root, true)?;
    let (now, space) = (balloon.size()?, root.space()?);
    let most = now + space.free * space.block;
    let mut less = cluster;
    loop {
        let wanted = most.saturating_sub(less) / space.block * space.block;
        if wanted <= now {
            report::say(0, format_args!("The balloon has {now} bytes: there is no room for a larger one"));
            return Ok(());
        }
        match balloon::change_locked(device, &balloon, wanted / SECTOR) {
            Err(e) if e.errno() == Some(libc::ENOSPC) => less *= 2,
            other => return other,
        }
    }
}

/// Has the users see a file system of `wanted` bytes.
fn limit(device: &Device, root: &Root, wanted: u64) -> Result<()> {
    let space = root.space()?;
    let now = root.balloon_size()?;
    let take = taken(space, wanted);
    let most = now + space.free * space.block;
    let refused = |short: u64| {
        // What the balloon cannot take stays in use.
        let least = (wanted + short).div_ceil(SECTOR) + MARGIN * u64::from(device.cluster_sectors);
        let used = (space.blocks * space.block).saturating_sub(most - now) >> 20;
        Error::new(
            Kind::Param,
            format!(
                "{} has {used} MiB in use: its disk can be resized to {least} sectors at least",
                root.path().display()
            ),
        )
    };
    if take > most {
        return Err(refused(take - most));
    }
    if take != now && (take > 0 || now > 0) {
        let balloon = balloon::locked(root, true)?;
        balloon::change_locked(device, &balloon, take / SECTOR).map_err(|e| match e.errno() {
            // By then it was used, or takes more for the extents of the balloon.
            Some(libc::ENOSPC) => refused(u64::from(device.cluster_sectors) * SECTOR),
            _ => e,
        })?;
    }
    match root.kind {
        FileSystem::Ext => limit_ext(device, root, space, wanted, take > 0),
        FileSystem::Xfs if take > 0 => Ok(()),
        // It is not made smaller.
        FileSystem::Xfs => {
            let grown = fs_resize::grow(&root.folder()?, wanted);
            grown.map(drop).ctx(Kind::ResizeFs, || format!("cannot make the xfs at {} larger", root.path().display()))
        }
    }
}

/// The blocks that an ext file system reserves for root follow its size, and it grows where it has no balloon.
fn limit_ext(device: &Device, root: &Root, space: Space, wanted: u64, has_balloon: bool) -> Result<()> {
    let node = device::partitions(device)?.iter().find(|p| p.rdev == root.dev).map(|p| p.number);
    let node = match node {
        Some(number) => device::partition_node(device, number)?.unwrap_or_else(|| device.node().to_owned()),
        None => device.node().to_owned(),
    };
    let reserved = (wanted / RESERVED / space.block).to_string();
    let set = helper::run("tune2fs", &["-r".as_ref(), reserved.as_ref(), node.as_os_str()])?;
    if set.status != 0 {
        report::warn(format_args!(
            "{} keeps the blocks that it reserves for root: {}",
            node.display(),
            set.complaint()
        ));
    }
    let blocks = wanted / space.block;
    if has_balloon || blocks * space.block <= ext_size(&node)? {
        return Ok(());
    }
    let grown = helper::run("resize2fs", &[node.as_os_str(), blocks.to_string().as_ref()])?;
    match grown.status {
        0 => Ok(()),
        _ => bail!(ResizeFs, "resize2fs {} {blocks} ended with {}", node.display(), grown.complaint()),
    }
}

/// Bytes of the ext file system on a device, by its superblock.
pub(super) fn ext_size(node: &Path) -> Result<u64> {
    let mut sb = [0; 1024];
    let read = File::open(node).and_then(|disk| disk.read_exact_at(&mut sb, 1024));
    read.ctx(Kind::Read, || format!("cannot read the superblock on {}", node.display()))?;
    let word = |at: usize| sb.get(at..at + 4).map_or(0, |b| u64::from(bat::load(b, 0)));
    let blocks = word(0x4) | word(0x150) << 32;
    Ok(blocks.saturating_mul(1024 << word(0x18).min(6)))
}

/// The balloon with which a file system looks as if it had `wanted` bytes.
fn taken(space: Space, wanted: u64) -> u64 {
    let difference = (space.blocks * space.block).saturating_sub(wanted);
    let inodes = space.inodes.saturating_mul(INODE);
    difference.saturating_sub(inodes) / space.block * space.block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_balloon_takes_what_is_more_than_wanted() {
        let space = Space { block: 4096, blocks: 1000, free: 800, inodes: 160 };
        assert_eq!(taken(space, 1000 * 4096), 0);
        assert_eq!(taken(space, 2000 * 4096), 0);
        assert_eq!(taken(space, 500 * 4096), 490 * 4096);
        assert_eq!(taken(space, 995 * 4096), 0);
        assert_eq!(taken(space, 500 * 4096 + 1), 489 * 4096);
    }
}

//! Resizing a disk that does not run, with its partition table and the file system inside.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::mount::{self, MountParams};
use super::private_folder::PrivateFolder;
use super::{disk_lock, grow, image_set, resize_balloon};
use crate::bail;
use crate::device::{self, Device};
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::gpt::{Gpt, Partition, Piece};
use crate::fs::resize;
use crate::report;
use crate::sys::partition;
use crate::units::SECTOR;

/// Gives a disk `sectors`, rounded up to whole clusters: the image grows first, then the partition table, its last
/// partition, and the file system on it. Each step is durable before the next; the same call finishes what an interrupted
/// one has left. Smaller than the disk is: `Param`. Needs root.
pub fn resize_disk(descriptor: &Path, sectors: u64) -> Result<()> {
    let _operation = report::cancel::begin();
    let mut disk = disk_lock::open(descriptor)?;
    if resize_balloon::within_device(&disk, sectors)? {
        return Ok(());
    }
    image_set::refuse_running(&disk, "resized")?;
    let cluster = u64::from(disk.blocksize.sectors());
    let Some(wanted) = sectors.checked_next_multiple_of(cluster) else {
        bail!(Param, "a size of {sectors} sectors is too large")
    };
    if wanted < disk.size_sectors {
        bail!(
            Param,
            "{} has {} sectors: this version makes no disk smaller, {wanted} sectors",
            disk.path.display(),
            disk.size_sectors
        );
    }
    grow::grow_locked(&mut disk, wanted)?;
    let mounted = mount::mount_locked(&disk, "", &MountParams::default())?;
    let device = mounted.device;
    let done = resize_balloon::deflate(&device).and_then(|()| extend(&device, cluster));
    let detached = device::detach(device.name());
    mount::drop_cache(&disk);
    done.map_err(|e| {
        e.context(format_args!(
            "{} has {wanted} sectors now, but what is inside was not enlarged to the end; the same command tries again",
            disk.path.display()
        ))
    })?;
    detached
}

/// The partition table and what is on the last partition; without a table what is on the whole disk.
fn extend(device: &Device, cluster: u64) -> Result<()> {
    let node = device.node();
    let source = match extend_table(node, cluster)? {
        None => node.to_owned(),
        Some(last) => match device::partition_node(device, last)? {
            Some(partition) => partition,
            None => bail!(Device, "{} does not show partition {last} of its table", node.display()),
        },
    };
    let folder = PrivateFolder::make()?;
    match resize::grow(&source, folder.path())? {
        Some(found) => {
            report::say(0, format_args!("{} on {} fills its partition now", found.name(), source.display()));
        }
        None => report::warn(format_args!(
            "no ext, xfs or btrfs was recognised on {}: the partition is larger, what is on it is as it was",
            source.display()
        )),
    }
    Ok(())
}

/// Moves the second copy of a GPT to the end of the disk and extends the last partition. The number of that partition;
/// none: the disk has no GPT.
fn extend_table(node: &Path, cluster: u64) -> Result<Option<u32>> {
    let shown = node.display();
    // The kernel refuses a second exclusive opener: no partition is mounted.
    let options = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).clone();
    let disk = options.open(node).ctx(Kind::Device, || format!("cannot open {shown}"))?;
    let size = partition::size(disk.as_fd()).ctx(Kind::Device, || format!("cannot get the size of {shown}"))?;
    let read = |e| Error::with(Kind::ChangeGpt, format!("cannot read the partition table of {shown}"), e);
    // A table made for a smaller disk has its second copy somewhere in the middle.
    let Some(table) = Gpt::parse(size, |buf, at| disk.read_exact_at(buf, at)).map_err(read)? else { return Ok(None) };
    let moved = table.resize(size / SECTOR)?;
    let last = match moved.extend_last(cluster) {
        Some((extended, last)) => {
            write_table(&disk, node, &extended)?;
            tell_kernel(&disk, node, last)?;
            Some(last)
        }
        None => {
            // Whole or not: a power cut may have torn the first copy, and it was read from the second.
            write_table(&disk, node, &moved)?;
            moved.partitions().max_by_key(|p| p.start + p.length)
        }
    };
    match last {
        Some(last) => Ok(Some(last.number)),
        None => bail!(ChangeGpt, "the partition table of {shown} has no partition"),
    }
}

/// The copy at the end first: at each instant one of the copies is sound.
fn write_table(disk: &File, node: &Path, table: &Gpt) -> Result<()> {
    let write = |piece: &Piece| {
        disk.write_all_at(&piece.bytes, piece.offset)
            .and_then(|()| disk.sync_all())
            .ctx(Kind::ChangeGpt, || format!("cannot write the partition table of {}", node.display()))
    };
    table.encode()?.iter().rev().try_for_each(write)
}

fn tell_kernel(disk: &File, node: &Path, last: Partition) -> Result<()> {
    partition::resize(disk.as_fd(), last.number as i32, last.start, last.length)
        .ctx(Kind::ChangeGpt, || format!("the kernel does not take the new size of {}p{}", node.display(), last.number))
}

//! Making the file system of a disk that does not run smaller, so that the image file shrinks. Device and partition keep their
//! size, so that the file system can be made larger again, except in a disk of one raw image, which is cut.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::compact::pack_top;
use super::mount::{self, MountParams};
use super::private_folder::PrivateFolder;
use super::{disk_lock, image_set, partition_table, recovery, resize_balloon, trim};
use crate::bail;
use crate::descriptor::{Image, ImageMode, LockedDescriptor};
use crate::device::{self, Device};
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::gpt::Gpt;
use crate::fs::resize;
use crate::image::lock::Sharing;
use crate::image::open::Access;
use crate::report;
use crate::sys::{partition, store};
use crate::units::SECTOR;

/// Clusters of a disk that its file system does not get.
const OUTSIDE: u64 = 4;
/// Bytes discarded at once.
const PIECE: u64 = 2 << 30;
const WRITE: Access = Access { write: true, direct: false };

/// Where the file system of a disk is.
struct Content {
    /// Partition or disk.
    source: PathBuf,
    /// On the disk, in sectors; the length of the partition.
    start: u64,
    length: u64,
    table: Option<Gpt>,
}

/// Gives the file system of a disk that does not run the size that one on a disk of `wanted` sectors has, which is not larger
/// than this disk. Then the top image is packed, and its file gets shorter; a single raw image is cut to `wanted`. Less than
/// the files inside need is `Param`, with the least size. Each step is durable before the next; the same call finishes what
/// an interrupted one has left.
pub(super) fn shrink(disk: &mut LockedDescriptor, wanted: u64) -> Result<()> {
    let cluster = u64::from(disk.blocksize.sectors());
    if wanted <= OUTSIDE * cluster {
        bail!(Param, "a size of {wanted} sectors: more than {} wanted, {OUTSIDE} clusters", OUTSIDE * cluster);
    }
    recovery::before_change(disk)?;
    let Some(top) = disk.image(&disk.top).cloned() else { bail!(DiskDescr, "descriptor: the top has no image") };
    let raw = disk.is_raw(&top);
    let device = mount::mount_locked(disk, "", &MountParams::default())?.device;
    let end = resize_balloon::deflate(&device).and_then(|()| shrink_inside(&device, wanted, cluster, raw));
    let detached = device::detach(device.name());
    mount::drop_cache(disk);
    let end = end?;
    detached?;
    if raw {
        return cut(disk, &top, end);
    }
    if disk.mode == ImageMode::Preallocated {
        report::say(0, format_args!("{} is preallocated: it keeps its space", disk.path.display()));
        return Ok(());
    }
    pack_top(disk, &top, None).map(drop)
}

/// The least size that [`resize_disk`](super::resize::resize_disk) can give to a disk, in sectors. Of a running disk it is an
/// estimate: its files change.
pub fn least_size(descriptor: &Path) -> Result<u64> {
    let _operation = report::cancel::begin();
    let mut disk = disk_lock::open(descriptor)?;
    let cluster = u64::from(disk.blocksize.sectors());
    match image_set::writer(&disk)? {
        Some(device) => least_of(&find(&device)?, cluster),
        None => {
            recovery::before_change(&mut disk)?;
            let device = mount::mount_locked(&disk, "", &MountParams::default())?.device;
            let least = find(&device).and_then(|content| least_of(&content, cluster));
            let detached = device::detach(device.name());
            mount::drop_cache(&disk);
            least.and_then(|least| detached.map(|()| least))
        }
    }
}

fn least_of(content: &Content, cluster: u64) -> Result<u64> {
    let bytes = resize::least(&content.source, PrivateFolder::make()?.path())?;
    Ok((bytes.div_ceil(SECTOR) + OUTSIDE * cluster).next_multiple_of(cluster))
}

/// The partition that ends last, or the disk.
fn find(device: &Device) -> Result<Content> {
    let node = device.node();
    let shown = node.display();
    let disk = File::open(node).ctx(Kind::Device, || format!("cannot open {shown}"))?;
    let size = partition::size(disk.as_fd()).ctx(Kind::Device, || format!("cannot get the size of {shown}"))?;
    let table = Gpt::parse(size, |buf, at| disk.read_exact_at(buf, at))
        .map_err(|e| Error::with(Kind::ChangeGpt, format!("cannot read the partition table of {shown}"), e))?;
    let Some(table) = table else {
        return Ok(Content { source: node.to_owned(), start: 0, length: size / SECTOR, table: None });
    };
    let Some(last) = table.partitions().max_by_key(|p| p.start + p.length) else {
        bail!(ChangeGpt, "the partition table of {shown} has no partition");
    };
    let Some(source) = device::partition_node(device, last.number)? else {
        bail!(Device, "{shown} does not show partition {} of its table", last.number);
    };
    Ok(Content { source, start: last.start / SECTOR, length: last.length / SECTOR, table: Some(table) })
}

/// The file system gets its size; what lies behind it is discarded, or, of a raw image, taken from the partition. Returns
/// where the disk may be cut, in sectors.
fn shrink_inside(device: &Device, wanted: u64, cluster: u64, raw: bool) -> Result<u64> {
    let content = find(device)?;
    let shown = content.source.display();
    let inside = wanted - OUTSIDE * cluster;
    if inside > content.length {
        bail!(
            Param,
            "{shown} has {} sectors, for a file system of {inside}: make the partition larger first, by giving the disk its own size",
            content.length
        );
    }
    let least = least_of(&content, cluster)?;
    if wanted < least {
        bail!(
            Param,
            "a size of {wanted} sectors: the files on {shown} need at least {least} ({} MiB); delete some, or take that size",
            (least * SECTOR).div_ceil(1 << 20)
        );
    }
    let found = resize::shrink(&content.source, PrivateFolder::make()?.path(), inside)?;
    report::say(0, format_args!("{} on {shown} has {inside} sectors now", found.name()));
    let node = device.node();
    let options = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).clone();
    let disk = options.open(node).ctx(Kind::Device, || format!("cannot open {}", node.display()))?;
    let end = (content.start + inside).next_multiple_of(cluster);
    if !raw {
        let last = (content.start + content.length) / cluster * cluster;
        let tail = end * SECTOR..last.max(end) * SECTOR;
        let parts = trim::parts_of_the_top(device)?.unwrap_or_else(|| vec![tail.clone(); 1]);
        for part in parts {
            discard(&disk, node, part.start.max(tail.start)..part.end.min(tail.end))?;
        }
        disk.sync_all().ctx(Kind::Fsync, || format!("cannot sync {}", node.display()))?;
        return Ok(wanted);
    }
    let cut = wanted.max(end + cluster);
    match &content.table {
        Some(table) if cut < device.sectors => partition_table::write(&disk, node, &table.cut(cut, end)?)?,
        _ => {}
    }
    Ok(cut)
}

fn discard(disk: &File, node: &Path, bytes: std::ops::Range<u64>) -> Result<()> {
    let mut at = bytes.start;
    while at < bytes.end {
        let len = (bytes.end - at).min(PIECE);
        partition::discard(disk.as_fd(), at, len)
            .ctx(Kind::DevIoc, || format!("{} cannot discard what its file system has left", node.display()))?;
        at += len;
    }
    Ok(())
}

/// Cuts a raw image behind the partition, then the descriptor gets the size.
fn cut(disk: &mut LockedDescriptor, top: &Image, sectors: u64) -> Result<()> {
    let shown = top.file.display();
    let held = image_set::lock_image(disk, &top.file, WRITE, Sharing::Exclusive)?;
    let len = held.file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {shown}"))?.len();
    let bytes = sectors * SECTOR;
    if bytes < len {
        store::set_len(&held.file, bytes)
            .ctx(Kind::Ftruncate, || format!("cannot cut image {shown} to {bytes} bytes"))?;
        store::sync_all(&held.file).ctx(Kind::Fsync, || format!("cannot sync image {shown}"))?;
    }
    if disk.size_sectors == sectors {
        return Ok(());
    }
    let mut next = disk.descriptor.clone();
    next.size_sectors = sectors;
    disk.commit_as(next)
}

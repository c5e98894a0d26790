//! Resizing a disk with its partition table and the file system inside.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::maintenance::{self, Work};
use super::mount::{self, MountParams};
use super::private_folder::PrivateFolder;
use super::{disk_lock, find, grow, image_set, online, partition_table, resize_balloon, shrink};
use crate::bail;
use crate::device::{self, Device};
use crate::error::{Error, IoContext, Kind, Result};
use crate::fs::mounts::Names;
use crate::fs::probe::Found;
use crate::fs::resize;
use crate::report;
use crate::sys::{fs_resize, partition};

/// An ext file system that ends so near to the end of its partition fills it.
const EXT_BLOCK_MAX: u64 = 64 << 10;

/// Gives a disk `sectors`, rounded up to whole clusters. Larger than it is: the image grows first, then the partition table,
/// its last partition, and the file system on it; a running disk stays in use meanwhile. Smaller: see
/// [`shrink`](super::shrink::shrink). Each step is durable before the next; the same call finishes what an interrupted one
/// has left. `offline`: the file system of a disk that does not run is made smaller; else its balloon takes the difference, as
/// that of a running one. Needs root.
pub fn resize_disk(descriptor: &Path, sectors: u64, offline: bool) -> Result<()> {
    let _operation = report::cancel::begin();
    let mut disk = disk_lock::open(descriptor)?;
    let running = image_set::writer(&disk)?;
    let cluster = u64::from(disk.blocksize.sectors());
    let Some(wanted) = sectors.checked_next_multiple_of(cluster) else {
        bail!(Param, "a size of {sectors} sectors is too large")
    };
    if wanted < disk.size_sectors {
        return match running {
            None if offline => shrink::shrink(&mut disk, wanted),
            None => resize_balloon::within_disk(&mut disk, sectors),
            Some(device) => resize_balloon::within_device(&device, sectors),
        };
    }
    if let Some(device) = &running {
        maintenance::before(device, Work::Resize)?;
        resize_balloon::deflate(device)?;
    }
    grow::grow_locked(&mut disk, wanted)?;
    let done = match running {
        Some(device) => extend_running(&device, cluster).map(Ok),
        None => {
            let mounted = mount::mount_locked(&disk, "", &MountParams::default())?;
            let device = mounted.device;
            let done = resize_balloon::deflate(&device).and_then(|()| extend(&device, cluster, true));
            let detached = device::detach(device.name());
            mount::drop_cache(&disk);
            done.map(|()| detached)
        }
    };
    done.map_err(|e| {
        e.context(format_args!(
            "{} has {wanted} sectors now, but what is inside was not enlarged to the end; the same command tries again",
            disk.path.display()
        ))
    })?
}

/// The same of a device in use: only what is mounted of it is spared the check.
fn extend_running(device: &Device, cluster: u64) -> Result<()> {
    let names = find::names(device);
    let used = !online::mounts_that(&|m| names.mounted_by(m))?.is_empty();
    extend(device, cluster, !used)
}

/// The partition table and what is on the last partition; without a table what is on the whole disk. `alone`: nothing is
/// mounted from the device.
fn extend(device: &Device, cluster: u64, alone: bool) -> Result<()> {
    let node = device.node();
    let source = match partition_table::extend(node, cluster, alone)? {
        None => node.to_owned(),
        Some(last) => match device::partition_node(device, last)? {
            Some(partition) => partition,
            None => bail!(Device, "{} does not show partition {last} of its table", node.display()),
        },
    };
    let shown = source.display();
    let found = match if alone { None } else { grow_mounted(device, &source)? } {
        Some(found) => found,
        None => resize::grow(&source, PrivateFolder::make()?.path())?.map(Found::name),
    };
    match found {
        Some(name) => report::say(0, format_args!("{name} on {shown} fills its partition now")),
        None => report::warn(format_args!(
            "no ext, xfs or btrfs was recognised on {shown}: the partition is larger, what is on it is as it was"
        )),
    }
    Ok(())
}

/// The same of a file system that is mounted, in whichever mount namespace. None: it is not mounted; else its name, if it is
/// one that can be made larger.
fn grow_mounted(device: &Device, source: &Path) -> Result<Option<Option<&'static str>>> {
    let shown = source.display();
    let rdev = |path: &Path| fs::metadata(path).map(|m| m.rdev()).ok();
    let Some(number) = rdev(source) else { bail!(Device, "{shown} cannot be looked at") };
    let Names { nodes, .. } = find::names(device);
    let names = Names { devs: vec![number], nodes: nodes.into_iter().filter(|n| rdev(n) == Some(number)).collect() };
    let writable = online::mounts_that(&|m| names.mounted_by(m) && !m.read_only)?;
    let Some(folder) = writable.first() else {
        if online::mounts_that(&|m| names.mounted_by(m))?.is_empty() {
            return Ok(None);
        }
        bail!(ResizeFs, "{shown} is mounted for reading only: mount it for writing, or not at all");
    };
    let partition = File::open(source).ctx(Kind::Device, || format!("cannot open {shown}"))?;
    let bytes = partition::size(partition.as_fd()).ctx(Kind::Device, || format!("cannot get the size of {shown}"))?;
    let grown = fs_resize::grow(folder, bytes);
    // The kernel asks for the capability also where there is nothing to do.
    let fills = |rest: u64| bytes.saturating_sub(rest) < EXT_BLOCK_MAX;
    if grown.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EPERM))
        && resize_balloon::ext_size(source).is_ok_and(fills)
    {
        return Ok(Some(Some("ext4")));
    }
    grown.map(Some).map_err(|e| {
        let why = match e.raw_os_error() {
            Some(libc::ENOSPC) => " (an ext4 whose journal is too small, see the kernel's log)",
            Some(libc::EPERM) => " (for ext4 the kernel wants CAP_SYS_RESOURCE, and a file system without errors)",
            _ => "",
        };
        let text = format!("the mounted file system on {shown} cannot be made larger{why}; unmounted it can");
        Error::with(Kind::ResizeFs, text, e)
    })
}

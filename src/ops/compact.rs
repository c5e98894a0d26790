//! Giving space that the file system inside does not use back to the host, of a disk that does not run.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::compact_running::Estimate;
use super::info::FsInfo;
use super::mount::{self, MountParams};
use super::private_folder::PrivateFolder;
use super::trim::{self, Inside};
use super::{disk_lock, image_set, info, partition, recovery};
use crate::bail;
use crate::descriptor::{Descriptor, Image, ImageMode, LockedDescriptor};
use crate::device::{self, Device};
use crate::error::{IoContext, Kind, Result};
use crate::format::guid;
use crate::fs::mount::{self as mounting, MountSpec};
use crate::fs::probe::Found;
use crate::image::compact::{Packed, pack};
use crate::image::lock::Sharing;
use crate::image::open::Access;
use crate::image::target::read_table;
use crate::report;
use crate::report::progress::Progress;
use crate::sys::host;
use crate::units::{SECTOR, VirtCluster};

/// Between two looks whether the work is cancelled.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

const READ: Access = Access { write: false, direct: false };
const WRITE: Access = Access { write: true, direct: false };

/// How the top image has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compacted {
    pub packed: Packed,
    /// Bytes of the file before and after.
    pub before: u64,
    pub after: u64,
}

/// Compacts the top image of a disk. `trim`: the file system inside first discards what it does not use, for which the disk
/// is mounted for a moment (root alone can). Clusters of zeroes stay where a level below has the cluster. Content and size
/// of the disk do not change, at no instant; an interrupted run is repaired by the next mount or run.
pub fn compact_disk(descriptor: &Path, trim: bool) -> Result<Compacted> {
    compact_disk_slowly(descriptor, trim, None)
}

/// The same, moving at most so many bytes in a second.
pub fn compact_disk_slowly(descriptor: &Path, trim: bool, rate: Option<u64>) -> Result<Compacted> {
    let _operation = report::cancel::begin();
    let mut disk = disk_lock::open(descriptor)?;
    image_set::refuse_running(&disk, "compacted")?;
    recovery::before_change(&mut disk)?;
    recovery::check_files(&disk, &guid::TOP)?;
    let Some(top) = disk.image(&disk.top).cloned() else { bail!(DiskDescr, "descriptor: the top has no image") };
    if disk.is_raw(&top) {
        bail!(Param, "{} is a raw image: it has no clusters to be freed", top.file.display());
    }
    if disk.mode == ImageMode::Preallocated {
        bail!(Param, "{} is preallocated: it keeps the space that its owner has chosen to take", disk.path.display());
    }
    let before = length(&top)?;
    if trim {
        trim_inside(&disk)?;
    }
    let packed = pack_top(&disk, &top, rate)?;
    Ok(Compacted { packed, before, after: length(&top)? })
}

/// Packs the top image, after a repair of what an interrupted operation left in it, at this rate (bytes in a second).
pub(super) fn pack_top(disk: &LockedDescriptor, top: &Image, rate: Option<u64>) -> Result<Packed> {
    let below = below(disk, top)?;
    let held = image_set::lock_image(disk, &top.file, WRITE, Sharing::Exclusive)?;
    image_set::repair_in_place(disk, &top.file)?;
    let mut shown = Progress::in_units("compacting", disk.blocksize.bytes());
    let pace = Pace { begun: host::now(), cluster: disk.blocksize.bytes(), rate };
    pack(&held.file, &held.path, &|cluster| below.contains(&cluster), &mut |done, total| {
        if report::cancel::requested() {
            bail!(Sys, "the compaction of {} was cancelled: it is whole, and can be continued", top.file.display());
        }
        shown.at(done, total);
        pace.at(done);
        Ok(())
    })
}

/// Keeps work on clusters to a rate.
struct Pace {
    begun: Instant,
    cluster: u64,
    /// Bytes in a second.
    rate: Option<u64>,
}

impl Pace {
    fn at(&self, done: u64) {
        let Some(rate) = self.rate else { return };
        let due = Duration::from_secs_f64(done.saturating_mul(self.cluster) as f64 / rate.max(1) as f64);
        let late = due.saturating_sub(host::since(self.begun));
        if !late.is_zero() {
            host::sleep(late.min(LONGEST_PAUSE));
        }
    }
}

/// What compacting a disk that does not run would bring. Its file system is mounted for a moment, unless its use is known.
pub fn estimate(descriptor: &Path, rate: Option<u64>) -> Result<Estimate> {
    estimate_of(descriptor, info::fs_info(descriptor)?, rate)
}

fn estimate_of(descriptor: &Path, info: FsInfo, rate: Option<u64>) -> Result<Estimate> {
    let disk = Descriptor::read(descriptor)?;
    let Some(top) = disk.image(&disk.top) else { bail!(DiskDescr, "descriptor: the top has no image") };
    let meta = fs::symlink_metadata(&top.file);
    let len = meta.ctx(Kind::Fstat, || format!("cannot look at image {}", top.file.display()))?.len();
    let used = info.blocks.saturating_sub(info.free_blocks).saturating_mul(info.block_size);
    Ok(Estimate::new(len, disk.size_sectors.saturating_mul(SECTOR), used, disk.chain(&disk.top)?.len(), rate))
}

/// The same of what is known without mounting it: none if the use of its file system was not remembered.
pub fn known_estimate(descriptor: &Path) -> Result<Option<Estimate>> {
    let folder = descriptor.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    FsInfo::cached(folder).map(|info| estimate_of(descriptor, info, None)).transpose()
}

/// Bytes that the file takes on the host.
fn length(image: &Image) -> Result<u64> {
    let meta = fs::symlink_metadata(&image.file);
    Ok(meta.ctx(Kind::Fstat, || format!("cannot look at image {}", image.file.display()))?.blocks() * 512)
}

/// Clusters that levels below the top have.
fn below(disk: &LockedDescriptor, top: &Image) -> Result<BTreeSet<VirtCluster>> {
    let mut found = BTreeSet::new();
    for image in disk.chain(&disk.top)?.iter().filter(|i| i.guid != top.guid) {
        let held = image_set::lock_image(disk, &image.file, READ, Sharing::Readers)?;
        if disk.is_raw(image) {
            let len =
                held.file.metadata().ctx(Kind::Fstat, || format!("cannot look at {}", image.file.display()))?.len();
            found.extend(0..len.div_ceil(disk.blocksize.bytes()) as VirtCluster);
        } else {
            found.extend(read_table(&held.file, &held.path)?.1.entries.iter().map(|(cluster, _)| *cluster));
        }
    }
    Ok(found)
}

/// Mounts the file system for a moment, and has it discard what it does not use.
fn trim_inside(disk: &LockedDescriptor) -> Result<()> {
    let device = mount::mount_locked(disk, "", &MountParams::default())?.device;
    let trimmed = trim_device(&device);
    let detached = device::detach(device.name());
    mount::drop_cache(disk);
    trimmed?;
    detached
}

/// The same of the file system that is mounted at `point`, from `source`.
fn trim_mounted(device: &Device, source: &Path, point: &Path) -> Result<u64> {
    let root = File::open(point).ctx(Kind::Open, || format!("cannot open {}", point.display()))?;
    let rdev = fs::metadata(source).map(|m| m.rdev()).ok();
    let start = device::partitions(device)?.iter().find(|p| Some(p.rdev) == rdev).map_or(0, |p| p.start);
    let fstype = partition::recognised(source).map_or("", Found::name).to_owned();
    let inside = Inside::of(root, point.to_owned(), fstype, start)?;
    let parts = trim::worth(device, &inside)?;
    trim::trim(device, &inside, parts.as_deref(), device.cluster()?.bytes(), &mut report::cancel::requested)
}

fn trim_device(device: &Device) -> Result<()> {
    let source = partition::source(device, None)?;
    if partition::recognised(&source).is_none() {
        report::warn(format_args!(
            "no ext, xfs or btrfs was recognised on {}: only clusters that hold zeroes already are given back",
            source.display()
        ));
        return Ok(());
    }
    let folder = PrivateFolder::make()?;
    mounting::mount_device(&source, folder.path(), &MountSpec::default())?;
    let trimmed = trim_mounted(device, &source, folder.path());
    mounting::umount(folder.path())?;
    let bytes = trimmed?;
    report::say(0, format_args!("{} MiB inside are not used", bytes >> 20));
    Ok(())
}

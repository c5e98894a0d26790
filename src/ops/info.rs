//! What a disk is and how full it is; what is in an image file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use serde::Serialize;

use super::disk_lock::Disk;
use super::find;
use super::mount::{self, MountParams};
use super::private_folder::PrivateFolder;
use super::umount;
use crate::bail;
use crate::descriptor::LockedDescriptor;
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::bat::{self, Entry};
use crate::format::gpt::Gpt;
use crate::format::header::{self, Header, Version};
use crate::format::limits;
use crate::fs::probe::{self, Found};
pub use crate::fs::stat::FsInfo;
use crate::image::open;
use crate::image::scan::{self, Problem, Visitor};
use crate::report;
use crate::sys::folder::Place;
use crate::sys::reopen::{Access, reopen};
use crate::sys::store;
use crate::units::{ClusterSize, SECTOR};

/// Size and use of the disk's file system. What was remembered at the last unmount serves while nothing runs; else the
/// mounted file system is asked, or it is mounted read-only for a moment.
pub fn fs_info(descriptor: &Path) -> Result<FsInfo> {
    let _operation = report::cancel::begin();
    let folder = match descriptor.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let cached = FsInfo::cached(folder);
    if let Some(info) = cached
        && !descriptor.exists()
    {
        return Ok(info);
    }
    let disk = Disk::look(descriptor)?;
    if let Some(device) = disk.device("")?.filter(|d| d.state.runs()) {
        return match find::mounts_of(&device)?.first() {
            Some(m) => FsInfo::of(&m.target),
            None => bail!(
                DevNotMounted,
                "{} is attached as {}, but its file system is not mounted: its size is not known",
                descriptor.display(),
                device.node().display()
            ),
        };
    }
    if let Some(info) = cached {
        return Ok(info);
    }
    match &disk {
        Disk::Locked(disk) => ask(disk),
        Disk::Merging { .. } => bail!(
            DevNotMounted,
            "snapshots of {} are being merged, and its file system is not mounted: its size is not known",
            descriptor.display()
        ),
    }
}

fn ask(disk: &LockedDescriptor) -> Result<FsInfo> {
    // Beside some disks no folder can be made.
    let private = if disk.is_unlocked() { Some(PrivateFolder::make()?) } else { None };
    let target = match &private {
        Some(folder) => Place::named(folder.path()).ctx(Kind::Mkdir, || folder.path().display().to_string())?,
        None => umount::temporary_mount_point(disk)?,
    };
    match store::make_dir(&target, 0o700) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(e).ctx(Kind::Mkdir, || format!("cannot make {}", target.display()));
        }
        _ => {}
    }
    let folder = target
        .open(OFlag::O_PATH | OFlag::O_DIRECTORY)
        .ctx(Kind::Mkdir, || format!("cannot open {}", target.display()))?;
    // The folder that was opened, whatever has its name by now.
    let point = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
    let params = MountParams { read_only: true, target: Some(point), ..MountParams::default() };
    let mounted = mount::mount_locked(disk, "", &params).inspect_err(|_| umount::remove_mount_point(&target))?;
    let info = match find::mounts_of(&mounted.device).map(|all| all.into_iter().next()) {
        Ok(Some(m)) => FsInfo::of(&m.target),
        Ok(None) => Err(Error::new(Kind::Mount, format!("{} is not mounted any more", target.display()))),
        Err(e) => Err(e),
    };
    let undone = umount::umount_locked(disk, "");
    drop(mounted);
    undone.and(info)
}

/// Size, cluster and version of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec {
    pub sectors: u64,
    /// Sectors.
    pub cluster: u32,
    /// 0: raw.
    pub version: u32,
}

/// What the top of a disk is: from its device if it runs, else from the file.
pub fn spec(descriptor: &Path) -> Result<Spec> {
    let disk = Disk::look(descriptor)?;
    if let Some(device) = disk.device("")?.filter(|d| d.state.runs()) {
        let version = device.version.map_or(0, Version::number);
        return Ok(Spec { sectors: device.sectors, cluster: device.cluster_sectors, version });
    }
    let chain = disk.chain(&disk.top)?;
    let Some(top) = chain.last() else { bail!(DiskDescr, "{} has no images", disk.place().display()) };
    let fd = open::open_level(&top.file, Some(&disk.dir))?;
    let (file, _) =
        reopen(&fd, Access::default()).ctx(Kind::Open, || format!("cannot open image {}", top.file.display()))?;
    if disk.is_raw(top) {
        let len = file.metadata().ctx(Kind::Fstat, || top.file.display().to_string())?.len();
        return Ok(Spec { sectors: len / SECTOR, cluster: disk.blocksize.sectors(), version: 0 });
    }
    // The classic's opener folds all these into one code.
    let header = read_header(&file).map_err(|e| e.as_kind(Kind::Open).context(top.file.display()))?;
    if header.is_marked() {
        bail!(
            Open,
            "{} is marked in use ({:#010x} at offset 44) though nothing runs here: another host runs it, or it was not closed cleanly; mounting it by its descriptor repairs that",
            top.file.display(),
            header.in_use
        );
    }
    Ok(Spec { sectors: header.sectors, cluster: header.cluster.sectors(), version: header.version.number() })
}

/// Node of the device that runs this disk under this component. `Sys` if it is there but not running.
pub fn get_dev(descriptor: &Path, component: &str) -> Result<Option<PathBuf>> {
    let disk = Disk::look(descriptor)?;
    let Some(found) = disk.device(component)? else { return Ok(None) };
    if !found.state.runs() {
        bail!(
            Sys,
            "{} has this disk but does not run (state: {}); see ploop doctor",
            found.node().display(),
            found.state.as_str()
        );
    }
    Ok(Some(found.node().to_owned()))
}

/// Node of the device that runs the disk; empty component.
pub fn device(descriptor: &Path) -> Result<Option<PathBuf>> {
    get_dev(descriptor, "")
}

/// How far a merge of the running disk's snapshots is: clusters looked at, and all.
pub fn merging(descriptor: &Path) -> Result<Option<(u64, u64)>> {
    Ok(find::devices(descriptor, Some(""))?.into_iter().next().and_then(|d| d.merging))
}

/// Largest disk with clusters of so many sectors (0: 2048), in sectors.
pub fn max_size(cluster_sectors: u32) -> Result<u64> {
    let cluster = match cluster_sectors {
        0 => ClusterSize::DEFAULT,
        n => ClusterSize::from_sectors(u64::from(n))?,
    };
    Ok(limits::max_size(cluster))
}

/// An image file by itself.
#[derive(Clone, Debug, Serialize)]
pub struct ImageInfo {
    pub path: PathBuf,
    pub file_bytes: u64,
    pub version: u32,
    #[serde(rename = "type")]
    pub kind: u32,
    pub heads: u32,
    pub cylinders: u32,
    pub cluster_sectors: u32,
    /// `m_Size`: the disk in clusters.
    pub size_clusters: u32,
    pub size_sectors: u64,
    /// `m_DiskInUse`.
    pub in_use_value: u32,
    /// Marked: written now, or not closed cleanly.
    pub in_use: bool,
    pub first_data_sector: u32,
    pub flags: u32,
    pub bat_clusters: u32,
    /// Entries that fit into each cluster of the BAT; 16 fewer into the first.
    pub bat_slots: u32,
    pub bat_used: u64,
    pub stored_bytes: u64,
    /// Entries that a check would complain about.
    pub bad_entries: u64,
    pub gpt: bool,
    /// Where an ext file system begins, in sectors of the disk.
    pub ext_at_sector: Option<u64>,
    /// File system recognised there or on the whole disk.
    pub file_system: Option<String>,
}

struct Count(u64);

impl Visitor for Count {
    fn problem(&mut self, _: scan::Found, _: Problem) -> Result<()> {
        self.0 += 1;
        Ok(())
    }
}

/// Reads an image file's header, table and what its disk begins with. Nothing is written; the image may be in use.
pub fn image_info(path: &Path) -> Result<ImageInfo> {
    let fd = open::open_level(path, None)?;
    let (file, _) =
        reopen(&fd, Access::default()).ctx(Kind::Open, || format!("cannot open image {}", path.display()))?;
    let meta = file.metadata().ctx(Kind::Fstat, || path.display().to_string())?;
    let in_file = |e: crate::error::Error| e.context(path.display());
    let header = read_header(&file).map_err(in_file)?;
    header.check_layout().map_err(in_file)?;
    let mut count = Count(0);
    let scanned = scan::scan(&file, &header, meta.len(), &mut count).map_err(in_file)?;

    let disk = |offset: u64, buf: &mut [u8]| read_disk(&file, &header, offset, buf);
    let bytes = header.sectors * SECTOR;
    let table = Gpt::parse(bytes, |buf, at| disk(at, buf));
    let mut signature = [0; 8];
    let gpt = table.is_ok() && disk(SECTOR, &mut signature).is_ok() && &signature == b"EFI PART";
    let partitions = table.iter().flatten().flat_map(Gpt::partitions);
    let starts = partitions.map(|p| p.start).chain([0]);
    let found = starts.into_iter().find_map(|start| {
        let mut from = |at: u64, buf: &mut [u8]| disk(start + at, buf);
        Some((start, probe::find(&mut from).ok()??))
    });
    Ok(ImageInfo {
        path: path.to_owned(),
        file_bytes: meta.len(),
        version: header.version.number(),
        kind: 2,
        heads: header.heads,
        cylinders: header.cylinders,
        cluster_sectors: header.cluster.sectors(),
        size_clusters: header.size_clusters,
        size_sectors: header.sectors,
        in_use_value: header.in_use,
        in_use: header.is_marked(),
        first_data_sector: header.first_data_sector,
        flags: header.flags,
        bat_clusters: header.first_data(),
        bat_slots: (header.cluster.bytes() / 4) as u32,
        bat_used: scanned.mapped,
        stored_bytes: scanned.mapped * header.cluster.bytes(),
        bad_entries: count.0,
        gpt,
        ext_at_sector: found.filter(|(_, f)| matches!(f, Found::Ext { .. })).map(|(start, _)| start / SECTOR),
        file_system: found.map(|(_, f)| f.name().to_owned()),
    })
}

fn read_header(file: &File) -> Result<Header> {
    let mut bytes = [0; header::SIZE];
    let n = file.read_at(&mut bytes, 0).ctx(Kind::Read, || "the header cannot be read")?;
    Header::parse(&bytes[..n])
}

/// Reads the disk as this one file has it: clusters that it lacks read as zero, whatever lower deltas have.
fn read_disk(file: &File, header: &Header, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
    let size = header.cluster.bytes();
    if offset.checked_add(buf.len() as u64).is_none_or(|end| end > header.sectors * SECTOR) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    while !buf.is_empty() {
        let (cluster, within) = ((offset / size) as u32, offset % size);
        let n = (buf.len() as u64).min(size - within) as usize;
        let (now, rest) = buf.split_at_mut(n);
        let mut word = [0; 4];
        file.read_exact_at(&mut word, bat::entry_offset(cluster))?;
        match bat::decode(header.version, header.cluster, u32::from_le_bytes(word)) {
            Entry::At(place) => file.read_exact_at(now, u64::from(place) * size + within)?,
            _ => now.fill(0),
        }
        offset += n as u64;
        buf = rest;
    }
    Ok(())
}

//! Finding devices by name, node or image, and what to mount of them.
#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::bail;
use crate::device::{Device, State};
use crate::error::{IoContext, Kind, Result};
use crate::server::proto::{Answer, Command, DeviceRecord};
use crate::server::{control, nodes, partitions, runtime};
use crate::sys::file_id::FileId;
use crate::sys::partition;

/// Longest wait for a supervisor's word about its state.
const INFO: Duration = Duration::from_secs(2);
/// How long partitions of a table may take to appear.
const PARTITIONS: Duration = Duration::from_secs(3);

/// All devices, by number, dead ones among them.
pub fn list() -> Result<Vec<Device>> {
    list_of(|_| true)
}

/// Those devices whose records `wanted` picks, by number. The others' supervisors are not asked how they are, which costs
/// more than all the rest where there are many.
pub fn list_of(wanted: impl Fn(&DeviceRecord) -> bool) -> Result<Vec<Device>> {
    let mut found = Vec::new();
    for name in runtime::names()? {
        found.extend(record(&name)?.filter(&wanted).map(with_state));
    }
    Ok(found)
}

/// The device of this name; `None`: there is none.
pub(super) fn by_name(name: &str) -> Result<Option<Device>> {
    Ok(record(name)?.map(with_state))
}

/// Whether nobody serves the device of this name any more.
pub(super) fn is_dead(name: &str) -> bool {
    matches!(record(name), Ok(Some(record)) if !lives(&record))
}

fn with_state(record: DeviceRecord) -> Device {
    let state = state(&record);
    Device { record, state }
}

/// The record of the device of this name; `None`: there is no such device. A folder without a sound record gives one that
/// names no process.
fn record(name: &str) -> Result<Option<DeviceRecord>> {
    let dir = runtime::device_dir(name);
    match fs::symlink_metadata(&dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.ctx(Kind::Open, || format!("cannot look at {}", dir.display()))?,
    };
    match runtime::read_record(&dir) {
        Ok(Some(record)) if record.name == name => Ok(Some(record)),
        // Gone meanwhile.
        _ if fs::symlink_metadata(&dir).is_err() => Ok(None),
        Ok(_) => Ok(Some(DeviceRecord { name: name.into(), node: Path::new("/dev").join(name), ..Default::default() })),
        Err(e) => Err(e),
    }
}

fn lives(record: &DeviceRecord) -> bool {
    record.boot == runtime::boot_id()
        && (runtime::alive(record.supervisor)
            || runtime::alive(record.worker)
            || control::has_listener(&runtime::device_dir(&record.name)))
}

fn state(record: &DeviceRecord) -> State {
    if !lives(record) {
        return State::Dead;
    }
    match record.state.as_str() {
        "starting" => State::Starting,
        "stopped" => State::Stopped,
        "failed" => State::Failed,
        _ if !runtime::backing_is_ours(record) => State::Stopped,
        _ => match control::ask(&runtime::device_dir(&record.name), &Command::Info, INFO) {
            Ok((Answer::Info { failed: true, .. }, _)) => State::Failed,
            Ok((Answer::Info { no_space: true, .. }, _)) => State::NoSpace,
            // The supervisor may just have died; the device works without one.
            _ => State::Running,
        },
    }
}

/// The device with this node (`/dev/ploop0`, `ploop0`, or a partition of it); `None`: not a device of ours.
///
/// A node that exists must be of the very disk that the record names, else it is refused: error 2.
pub fn by_node(node: &str) -> Result<Option<Device>> {
    let name = runtime::name_of(node)?;
    let mut found = by_name(&name)?;
    if found.is_none()
        && let Some((disk, number)) = name.rsplit_once('p')
        && !number.is_empty()
        && number.bytes().all(|b| b.is_ascii_digit())
        && runtime::check_name(disk).is_ok()
    {
        found = by_name(disk)?;
    }
    match &found {
        Some(device) => verify_node(device)?,
        None => {
            if let Some(rdev) = nodes::block_node(&Path::new("/dev").join(&name))
                && runtime::number(&name).is_some()
            {
                let (major, minor) = (nix::sys::stat::major(rdev), nix::sys::stat::minor(rdev));
                bail!(Device, "/dev/{name} ({major}:{minor}) is a stale node: no server stands behind it; remove it");
            }
        }
    }
    Ok(found)
}

/// A running device's node, if it exists, must be its own.
fn verify_node(device: &Device) -> Result<()> {
    let running = matches!(device.state, State::Running | State::NoSpace);
    if running && let Ok(meta) = fs::symlink_metadata(device.node()) {
        let own = meta.file_type().is_block_device() && meta.rdev() == device.record.rdev;
        if !own {
            bail!(Device, "{} is not the node of the device of that name; remove it", device.node().display());
        }
    }
    Ok(())
}

/// Devices whose base is this very file (device and inode number, not the name); with a component: only those that were
/// attached with it (empty: without any).
pub fn by_base(base: &Path, component: Option<&str>) -> Result<Vec<Device>> {
    let id = match FileId::at(base) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.ctx(Kind::Fstat, || format!("cannot look at {}", base.display()))?,
    };
    list_of(|r| r.ids.first() == Some(&id) && component.is_none_or(|c| c == r.component))
}

/// What to mount: `/dev/NAMEp1` if the disk has a GPT, else `/dev/NAME`. The node is made if this process's /dev lacks it.
pub fn mount_source(device: &Device) -> Result<PathBuf> {
    let record = &device.record;
    if !runtime::backing_is_ours(record) {
        bail!(Device, "{} is not running any more", record.node.display());
    }
    let end = Instant::now() + PARTITIONS;
    loop {
        if let Some(first) = partitions::known(&record.backing).iter().find(|p| p.number == 1) {
            let node = PathBuf::from(format!("{}p1", record.node.display()));
            ensure(&node, first.rdev)?;
            return Ok(node);
        }
        ensure(&record.node, record.rdev)?;
        if !has_gpt(record)? {
            return Ok(record.node.clone());
        }
        if Instant::now() >= end {
            bail!(Device, "{} has a GPT without a first partition", record.node.display());
        }
        sleep(Duration::from_millis(20));
    }
}

/// The node exists and has this number.
fn ensure(node: &Path, rdev: u64) -> Result<()> {
    match nodes::block_node(node) {
        Some(number) if number == rdev => Ok(()),
        // The supervisor's may be on its way; equal nodes do not disturb each other.
        _ => nodes::make(node, rdev),
    }
}

/// Opens a device's whole disk for reading, making sure that it is the recorded one.
fn open_verified(record: &DeviceRecord) -> Result<File> {
    let node = record.node.display();
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW).open(&record.node);
    let file = file.ctx(Kind::Device, || format!("cannot open {node}"))?;
    let meta = file.metadata().ctx(Kind::Fstat, || format!("cannot look at {node}"))?;
    let same_disk = record.diskseq == 0 || partition::diskseq(file.as_fd()).is_ok_and(|seq| seq == record.diskseq);
    if !meta.file_type().is_block_device() || meta.rdev() != record.rdev || !same_disk {
        bail!(Device, "{node} is not the disk of {} any more", record.name);
    }
    Ok(file)
}

/// The GPT's signature stands in the second sector.
fn has_gpt(record: &DeviceRecord) -> Result<bool> {
    let mut sector = [0u8; 512];
    match open_verified(record)?.read_exact_at(&mut sector, 512) {
        Ok(()) => Ok(sector.starts_with(b"EFI PART")),
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e).ctx(Kind::Read, || format!("cannot read {}", record.node.display())),
    }
}

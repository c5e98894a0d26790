//! What to mount of a device, and under which names it may be mounted.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::bail;
use crate::device::model::Aliases;
use crate::error::{IoContext, Kind, Result};
use crate::server::proto::DeviceRecord;
use crate::server::{nodes, partitions, runtime};
use crate::sys::partition;

/// How long partitions of a table may take to appear.
const PARTITIONS: Duration = Duration::from_secs(3);

/// The numbers and nodes of the disk and its partitions.
pub(super) fn aliases(record: &DeviceRecord) -> Aliases {
    let mut found = Aliases::default();
    // The disk of the record belongs to another device by now.
    if !runtime::backing_is_ours(record) {
        return found;
    }
    found.devs.push(record.rdev);
    found.nodes.push(record.node.clone());
    found.nodes.push(Path::new("/dev").join(&record.backing));
    for known in partitions::known(&record.backing) {
        found.devs.push(known.rdev);
        found.nodes.push(Path::new("/dev").join(format!("{}p{}", record.backing, known.number)));
    }
    let folder = record.node.parent().unwrap_or(Path::new("/dev"));
    found.nodes.extend(nodes::existing(folder, &record.name).into_iter().map(|(path, _)| path));
    found
}

/// What to mount: `/dev/NAMEp1` if the disk has a GPT, else `/dev/NAME`. The node is made if this process's /dev lacks it.
pub(super) fn mount_source(record: &DeviceRecord) -> Result<PathBuf> {
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
        // The supervisor may be making the same node; two equal nodes do no harm.
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

/// Whether the second sector has the GPT's signature.
fn has_gpt(record: &DeviceRecord) -> Result<bool> {
    let mut sector = [0u8; 512];
    match open_verified(record)?.read_exact_at(&mut sector, 512) {
        Ok(()) => Ok(sector.starts_with(b"EFI PART")),
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e).ctx(Kind::Read, || format!("cannot read {}", record.node.display())),
    }
}

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
use crate::server::partitions::{self, Known};
use crate::server::proto::DeviceRecord;
use crate::server::{nodes, runtime};
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
        found.nodes.push(partition_name(record, known.number));
    }
    found
}

/// What to mount: the first partition if the disk has any, else the disk. The node is made if this process's /dev lacks it.
pub(super) fn mount_source(record: &DeviceRecord) -> Result<PathBuf> {
    match appeared(record)?.first() {
        Some(first) => node_of(record, first),
        None => {
            ensure(&record.node, record.rdev)?;
            Ok(record.node.clone())
        }
    }
}

/// The node of the partition of that number; none: no such partition.
pub(super) fn partition_node(record: &DeviceRecord, number: u32) -> Result<Option<PathBuf>> {
    appeared(record)?.iter().find(|p| p.number == number).map(|p| node_of(record, p)).transpose()
}

fn partition_name(record: &DeviceRecord, number: u32) -> PathBuf {
    PathBuf::from(format!("{}p{number}", record.node.display()))
}

fn node_of(record: &DeviceRecord, partition: &Known) -> Result<PathBuf> {
    let node = partition_name(record, partition.number);
    ensure(&node, partition.rdev)?;
    Ok(node)
}

/// The partitions of the disk, by number. Those of its table are waited for; a table none of whose partitions lies on the
/// disk is an error at once.
fn appeared(record: &DeviceRecord) -> Result<Vec<Known>> {
    if !runtime::backing_is_ours(record) {
        bail!(Device, "{} is not running any more", record.node.display());
    }
    let end = Instant::now() + PARTITIONS;
    loop {
        let known = partitions::known(&record.backing);
        if !known.is_empty() {
            return Ok(known);
        }
        ensure(&record.node, record.rdev)?;
        let disk = open_verified(record)?;
        let table = partitions::in_table(&disk).ctx(Kind::Read, || format!("cannot read {}", record.node.display()))?;
        if table.is_empty() {
            if has_gpt(record, &disk)? {
                bail!(
                    Device,
                    "{} has a GPT that is damaged, or none of whose partitions lies on the disk: its image was cut off, \
                     or the disk made smaller",
                    record.node.display()
                );
            }
            return Ok(known);
        }
        if Instant::now() >= end {
            bail!(Device, "the kernel shows none of the {} partitions of {}", table.len(), record.node.display());
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
fn has_gpt(record: &DeviceRecord, disk: &File) -> Result<bool> {
    let mut sector = [0u8; 512];
    match disk.read_exact_at(&mut sector, 512) {
        Ok(()) => Ok(sector.starts_with(b"EFI PART")),
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e).ctx(Kind::Read, || format!("cannot read {}", record.node.display())),
    }
}

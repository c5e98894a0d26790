//! The partition table of a disk that gets another size.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::gpt::{Gpt, Partition, Piece};
use crate::sys::partition;
use crate::units::SECTOR;

/// Moves the second copy of a GPT to the end of the disk and extends the last partition. The number of that partition;
/// none: the disk has no GPT.
pub(super) fn extend(node: &Path, cluster: u64, alone: bool) -> Result<Option<u32>> {
    let shown = node.display();
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if alone {
        // The kernel refuses a second exclusive opener: no partition is mounted.
        options.custom_flags(libc::O_EXCL);
    }
    let disk = options.open(node).ctx(Kind::Device, || format!("cannot open {shown}"))?;
    let size = partition::size(disk.as_fd()).ctx(Kind::Device, || format!("cannot get the size of {shown}"))?;
    let read = |e| Error::with(Kind::ChangeGpt, format!("cannot read the partition table of {shown}"), e);
    // A table made for a smaller disk has its second copy somewhere in the middle.
    let Some(table) = Gpt::parse(size, |buf, at| disk.read_exact_at(buf, at)).map_err(read)? else { return Ok(None) };
    let moved = table.resize(size / SECTOR)?;
    let last = match moved.extend_last(cluster) {
        Some((extended, last)) => {
            write(&disk, node, &extended)?;
            tell_kernel(&disk, node, last)?;
            Some(last)
        }
        None => {
            // Whole or not: a power cut may have torn the first copy, and it was read from the second.
            write(&disk, node, &moved)?;
            moved.partitions().max_by_key(|p| p.start + p.length)
        }
    };
    match last {
        Some(last) => Ok(Some(last.number)),
        None => bail!(ChangeGpt, "the partition table of {shown} has no partition"),
    }
}

/// The copy at the end first: at each instant one of the copies is sound.
pub(super) fn write(disk: &File, node: &Path, table: &Gpt) -> Result<()> {
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

//! The steps of a change of an image's format version: every BAT entry is rewritten in place, so that the image is flagged
//! and a copy of header and BAT lies beside it meanwhile.

use std::fs::File;
use std::path::Path;

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::format::bat::{self, Entry, Unit};
use crate::format::header::{self, CLOSED_V21, Header, Version};
use crate::report::progress::Progress;
use crate::sys::aligned::{AlignedBuf, read_exact, read_full, write_all};
use crate::sys::fiemap;
use crate::sys::folder::Place;
use crate::sys::store;

use super::scan::{Found, Problem, Visitor, scan};
use super::target::read_table;

/// Suffix of the name of the copy, the classic's.
pub const BACKUP: &str = ".idx";

/// Bytes read or written at once, a multiple of every page.
const CHUNK: u64 = 4 << 20;
const PAGE: u64 = bat::PAGE_BYTES as u64;

/// Reads the header of an image that is to get another version, and makes sure that each entry can be expressed in it:
/// `Param`. An image that is marked in use is `Open`, a damaged one `Format`.
pub fn check(file: &File, name: &Path, to: Version) -> Result<Header> {
    let shown = name.display();
    let (header, table) = read_table(file, name)?;
    if header.is_marked() {
        bail!(
            Open,
            "image {shown} is marked in use ({:#010x} at offset 44): a running device has it, or a crash left it so; check \
             it first (ploop check -d {shown})",
            header.in_use
        );
    }
    if to == Version::V1 && header.sectors > u64::from(u32::MAX) {
        bail!(
            Param,
            "image {shown} has a disk of {} sectors: version 1 has at most {}",
            header.sectors,
            u64::from(u32::MAX)
        );
    }
    let limit = bat::host_cluster_limit(to, header.cluster);
    if table.end > limit {
        bail!(
            Param,
            "image {shown} has data up to its cluster {}: version {} can name {limit}; `ploop compact` moves them to the front",
            table.end,
            to.number()
        );
    }
    Ok(header)
}

/// Bytes of header, BAT, and what lies between them and the data.
fn head_bytes(header: &Header) -> u64 {
    u64::from(header.first_data()) * header.cluster.bytes()
}

/// Copies header and BAT of an image to a new file, durable but for its name.
pub fn back_up(file: &File, name: &Path, header: &Header, to: &Place) -> Result<()> {
    let shown = to.display();
    let backup = store::create_new(to, 0o600).ctx(Kind::Creat, || format!("cannot create {shown}"))?;
    copy_head(file, &backup, 0, head_bytes(header))
        .ctx(Kind::Write, || format!("cannot copy header and BAT of image {} to {shown}", name.display()))?;
    store::sync_all(&backup).ctx(Kind::Fsync, || format!("cannot sync {shown}"))
}

/// Copies `[start, end)`; what is a hole reads as zero in the target.
fn copy_head(from: &File, to: &File, start: u64, end: u64) -> std::io::Result<()> {
    store::set_len(to, end)?;
    let mut buf = AlignedBuf::new(CHUNK.min(end) as usize);
    fiemap::each_data(from, start, end, &mut |data, stop| {
        let (mut at, stop) = (data.max(start), stop.min(end));
        while at < stop {
            let len = (stop - at).min(buf.len() as u64) as usize;
            read_exact(from, &mut buf[..len], at)?;
            write_all(to, &buf[..len], at)?;
            at += len as u64;
        }
        Ok(())
    })
}

/// Writes the header, durably.
fn write_header(file: &File, name: &Path, header: &Header) -> Result<()> {
    write_all(file, &header.encode(), 0)
        .ctx(Kind::Write, || format!("cannot write the header of {}", name.display()))?;
    store::sync_data(file).ctx(Kind::Fsync, || format!("cannot sync image {}", name.display()))
}

/// Marks the image in use and flags it as half converted, durably.
pub fn flag(file: &File, name: &Path, header: &Header) -> Result<()> {
    write_header(file, name, &flagged(header))
}

fn flagged(header: &Header) -> Header {
    Header { in_use: header::IN_USE, flags: header.flags | header::FLAG_CONVERT, ..*header }
}

/// Rewrites the BAT of a flagged image for version `to`, then its signature, durably. It stays flagged.
pub fn rewrite(file: &File, name: &Path, header: &Header, to: Version) -> Result<()> {
    let (old, new) = (Unit::new(header.version, header.cluster), Unit::new(to, header.cluster));
    let table = u64::from(header.table_clusters()) * header.cluster.bytes();
    let mut buf = AlignedBuf::new(CHUNK.min(table) as usize);
    let mut shown = Progress::begin("rewriting the BAT");
    fiemap::each_data(file, 0, table, &mut |start, end| {
        let (mut at, end) = (start / PAGE * PAGE, end.next_multiple_of(PAGE).min(table));
        while at < end {
            let bytes = &mut buf[..(end - at).min(CHUNK).min(table) as usize];
            read_exact(file, bytes, at)?;
            let skip = if at == 0 { header::SIZE } else { 0 };
            let (_, entries) = bytes.split_at_mut(skip);
            let mut changed = false;
            for word in entries.as_chunks_mut::<4>().0 {
                let entry = u32::from_le_bytes(*word);
                if entry == 0 {
                    continue;
                }
                // A slot behind the disk's last cluster may hold anything; it must be 0.
                let converted = match old.decode(entry) {
                    Entry::At(host_cluster) => new.encode(host_cluster).unwrap_or(0),
                    _ => 0,
                };
                *word = converted.to_le_bytes();
                changed = true;
            }
            if changed {
                // The header is written by itself, below.
                write_all(file, entries, at + skip as u64)?;
            }
            at += (entries.len() + skip) as u64;
            shown.at(at, table);
        }
        Ok(())
    })
    .ctx(Kind::Write, || format!("cannot rewrite the BAT of image {}", name.display()))?;
    write_header(file, name, &Header { version: to, ..flagged(header) })
}

/// Takes flag and mark from an image whose BAT fits its signature, durably. `closed`: `m_DiskInUse` as it was before.
pub fn unflag(file: &File, name: &Path, header: &Header, closed: u32) -> Result<()> {
    let in_use = if closed == CLOSED_V21 && header.extension != 0 { CLOSED_V21 } else { 0 };
    write_header(file, name, &Header { in_use, flags: header.flags & !header::FLAG_CONVERT, ..*header })
}

/// The header in a copy of header and BAT, if it is that of an image with this header.
pub fn backup_of(header: &Header, backup: &File) -> Option<Header> {
    let mut head = [0; header::SIZE];
    let got = read_full(backup, &mut head, 0).ok()?;
    let copy = Header::parse(head.get(..got)?).ok()?;
    let same = (copy.cluster, copy.sectors, copy.first_data_sector)
        == (header.cluster, header.sectors, header.first_data_sector);
    (same && copy.check_layout().is_ok() && backup.metadata().ok()?.len() == head_bytes(header)).then_some(copy)
}

/// Brings header and BAT back from their copy; the image stays flagged until [`unflag`]. Returns its header.
pub fn restore(file: &File, name: &Path, copy: &Header, backup: &File) -> Result<Header> {
    let shown = name.display();
    let end = head_bytes(copy);
    let mut buf = AlignedBuf::new(CHUNK.min(end) as usize);
    let mut at = 0;
    while at < end {
        let bytes = &mut buf[..(end - at).min(CHUNK) as usize];
        read_exact(backup, bytes, at)
            .ctx(Kind::Read, || format!("cannot read the copy of the BAT of image {shown}"))?;
        let skip = if at == 0 { header::SIZE } else { 0 };
        write_all(file, bytes.get(skip..).unwrap_or_default(), at + skip as u64)
            .ctx(Kind::Write, || format!("cannot write the BAT of image {shown}"))?;
        at += bytes.len() as u64;
    }
    store::sync_data(file).ctx(Kind::Fsync, || format!("cannot sync image {shown}"))?;
    let header = flagged(copy);
    write_header(file, name, &header)?;
    Ok(header)
}

/// The BAT of a flagged image is sound for the version that its signature names.
pub fn is_whole(file: &File, header: &Header) -> bool {
    struct Strict;
    impl Visitor for Strict {
        fn problem(&mut self, found: Found, problem: Problem) -> Result<()> {
            match problem {
                Problem::BeyondDisk => Ok(()),
                _ => bail!(Format, "entry {} of cluster {}: {problem:?}", found.entry, found.cluster),
            }
        }
    }
    let len = file.metadata().map(|m| m.len()).unwrap_or_default();
    scan(file, header, len, &mut Strict).is_ok()
}

//! A level of a running chain as the target of a merge: prepares it, and finds the BAT pages that the levels above it
//! use.

use std::fs::File;
use std::os::fd::AsRawFd;

use crate::bail;
use crate::engine::api::{AllocConfig, LevelConfig, PageSet, TargetConfig};
use crate::error::{IoContext, Kind, Result};
use crate::format::bat;
use crate::format::header::{self, Header, Version};
use crate::image::grow;
use crate::image::scan::check_reach;
use crate::image::target::Target;
use crate::sys::aligned::{AlignedBuf, read_exact, read_full, write_all};
use crate::sys::{host, store};
use crate::units::SECTOR;

use super::open::{HEAD, alloc_config, cut, write_header};
use super::table::{scan_level, scan_pages, slots_beyond};
use super::{Chain, LevelFile};

/// Makes a level of an opened chain ready to take what the levels above it up to `high` have. Its file must be writable
/// and locked for this worker. The first thing written is its in-use mark, durable before anything else changes; a
/// smaller image loses entries that it has behind its disk and takes the size of the disk of `high`, a raw one becomes as
/// long as that disk.
///
/// `chain` is changed accordingly. When the worker that made this call has exited, the next worker makes it again.
pub fn open_target(
    levels: &[LevelFile],
    chain: &mut Chain,
    (index, high): (usize, usize),
    ahead: u64,
) -> Result<TargetConfig> {
    if index >= high || high >= levels.len() {
        bail!(Param, "levels {index} to {high} of a chain of {} images cannot be merged", levels.len());
    }
    let bytes = disk_bytes(levels, chain, high)?;
    let target = &levels[index];
    let name = target.name.display();
    let len = target.file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {name}"))?.len();
    if target.raw {
        if len < bytes {
            store::set_len(&target.file, bytes)
                .ctx(Kind::Ftruncate, || format!("cannot extend image {name} to {bytes} bytes"))?;
            store::sync_all(&target.file).ctx(Kind::Fsync, || format!("cannot sync image {name}"))?;
        }
        chain.levels[index] = LevelConfig::Raw { bytes: bytes.max(len / SECTOR * SECTOR) };
        let alloc = AllocConfig { limit: u32::MAX, ahead: 1, ..AllocConfig::default() };
        return Ok(TargetConfig { level: index as u8, alloc });
    }
    let mut head = AlignedBuf::new(HEAD);
    let got = read_full(&target.file, &mut head, 0).ctx(Kind::Read, || format!("cannot read image {name}"))?;
    if got < HEAD {
        bail!(Open, "image {name} has {got} bytes: a ploop1 image has at least {HEAD}");
    }
    let mut old = Header::parse(&head).and_then(|h| h.check_layout().map(|()| h))?;
    let Some(version) = chain.version.filter(|v| *v == old.version) else {
        bail!(Format, "image {name} has format version {}: must be that of the chain", old.version.number());
    };
    let sized = Header::sized(version, old.cluster, bytes / SECTOR)?;
    let mut len = len;
    if sized.first_data_sector > old.first_data_sector && old.sectors != bytes / SECTOR {
        (old, len) = make_room(target, &old, bytes / SECTOR)?;
    }
    let grows = old.sectors != bytes / SECTOR;
    let mut scan = scan_level(target, &old, len)?;
    check_reach(&old, scan.end).map_err(|e| e.context(format_args!("image {name}")))?;
    let sized = match grows {
        true => Header {
            sectors: sized.sectors,
            size_clusters: sized.size_clusters,
            heads: sized.heads,
            cylinders: sized.cylinders,
            ..old
        },
        false => old,
    };
    let flags = old.flags & !header::FLAG_EMPTY;
    let marked = Header { in_use: header::IN_USE, flags, extension: 0, ..sized };
    let stale = if grows { slots_beyond(target, &old, len)? } else { Vec::new() };
    let longer = marked.table_clusters() > old.table_clusters();
    if !stale.is_empty() && !host::breach("entries behind the disk are kept") || longer {
        // With the mark first, and the larger disk last.
        write_header(target, &Header { in_use: header::IN_USE, flags, extension: 0, ..old })?;
        clear_slots(target, &stale)?;
        if longer {
            // What lay between the BAT and the data becomes a part of the BAT.
            let size = old.cluster.bytes();
            let grown = u64::from(old.table_clusters()) * size..u64::from(marked.table_clusters()) * size;
            grow::zero(&target.file, &target.name, grown)?;
            store::sync_data(&target.file).ctx(Kind::Fsync, || format!("cannot sync image {name}"))?;
        }
        scan = scan_level(target, &old, len)?;
    }
    if marked != old {
        write_header(target, &marked)?;
    }
    cut(target, u64::from(scan.end) * old.cluster.bytes(), len)?;
    chain.levels[index] = LevelConfig::Ploop {
        v1: old.version == Version::V1,
        clusters: marked.clusters(),
        first_data: marked.first_data(),
        file_clusters: scan.end,
    };
    Ok(TargetConfig { level: index as u8, alloc: alloc_config(&marked, &scan, ahead) })
}

/// Marks the image in use and gives it `sectors`, for whose table data clusters have to be moved: nothing reads or writes the
/// image meanwhile. Returns its header and length.
fn make_room(level: &LevelFile, old: &Header, sectors: u64) -> Result<(Header, u64)> {
    let name = level.name.display();
    write_header(
        level,
        &Header { in_use: header::IN_USE, flags: old.flags & !header::FLAG_EMPTY, extension: 0, ..*old },
    )?;
    // Without direct I/O: header and entries are no whole sectors. Each operation is over when this process is.
    let path = format!("/proc/self/fd/{}", level.file.as_raw_fd());
    let file = File::options().read(true).write(true).open(path);
    let file = file.ctx(Kind::Open, || format!("cannot open image {name} to make it larger"))?;
    let mut target = Target::open(&file, &level.name)?;
    grow::grow(&mut target, sectors)?;
    let len = file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {name}"))?.len();
    Ok((target.header, len))
}

/// Clears these slots of the BAT, durably.
fn clear_slots(level: &LevelFile, slots: &[u64]) -> Result<()> {
    let name = level.name.display();
    let page_of = |slot: u64| bat::offset_of(slot) / bat::PAGE_BYTES as u64;
    for page in slots.chunk_by(|a, b| page_of(*a) == page_of(*b)) {
        let at = page_of(page[0]) * bat::PAGE_BYTES as u64;
        let mut buf = AlignedBuf::new(bat::PAGE_BYTES);
        read_exact(&level.file, &mut buf, at).ctx(Kind::Read, || format!("cannot read the BAT of image {name}"))?;
        for slot in page {
            let within = (bat::offset_of(*slot) - at) as usize;
            buf[within..within + bat::ENTRY_BYTES].fill(0);
        }
        write_all(&level.file, &buf, at).ctx(Kind::Write, || format!("cannot write the BAT of image {name}"))?;
    }
    store::sync_data(&level.file).ctx(Kind::Fsync, || format!("cannot sync the BAT of image {name}"))
}

/// Size of the disk that the level `high` has.
fn disk_bytes(levels: &[LevelFile], chain: &Chain, high: usize) -> Result<u64> {
    if high + 1 == levels.len() {
        return Ok(chain.device_bytes);
    }
    Ok(header_of(&levels[high])?.0.sectors * SECTOR)
}

fn header_of(level: &LevelFile) -> Result<(Header, u64)> {
    let name = level.name.display();
    let mut head = AlignedBuf::new(HEAD);
    let got = read_full(&level.file, &mut head, 0).ctx(Kind::Read, || format!("cannot read image {name}"))?;
    if got < HEAD {
        bail!(Open, "image {name} has {got} bytes: a ploop1 image has at least {HEAD}");
    }
    let header = Header::parse(&head).and_then(|h| h.check_layout().map(|()| h)).map_err(|e| e.context(&name))?;
    let len = level.file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {name}"))?.len();
    Ok((header, len))
}

/// The BAT pages in which any of these levels has entries; with the entries of the top that are in the shared table
/// alone.
pub fn used_pages(levels: &[LevelFile], chain: &Chain, sources: std::ops::RangeInclusive<usize>) -> Result<PageSet> {
    let mut pages = PageSet::new();
    for level in sources {
        let Some(file) = levels.get(level).filter(|l| !l.raw) else {
            bail!(Param, "level {level} is no image that can be merged into another");
        };
        let (header, len) = header_of(file)?;
        scan_pages(file, &header, len, level + 1 == levels.len(), &mut pages)?;
    }
    chain.carried.iter().for_each(|c| pages.insert(bat::page_of(c.cluster)));
    Ok(pages)
}

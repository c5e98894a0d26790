//! Opening a chain.

use std::path::Path;

use crate::bail;
use crate::engine::api::{AllocConfig, LevelConfig};
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::bat;
use crate::format::header::{self, Header, Version};
use crate::image::scan::{Scan, check_reach};
use crate::report;
use crate::sys::aligned::{AlignedBuf, read_full, write_all};
use crate::sys::store;
use crate::units::{ClusterSize, MAX_CHAIN, SECTOR};

use super::table::{scan_carried, scan_level, scan_what_is_there};
use super::{Carried, Chain, LevelFile, Marked, OpenOptions};

/// The part of a file that its header is read and written with: direct I/O needs whole sectors of up to this size.
pub(super) const HEAD: usize = 4096;

enum Kinds {
    Raw { bytes: u64 },
    Ploop { header: Header, len: u64 },
}

/// Opens a chain, base first: validates every level, and makes the top ready for writing if it is to be written.
///
/// The first thing written is the in-use mark, durable before anything else changes; nothing is written when
/// something is not sound. Read-only chains are not written to at all.
pub fn open(levels: &[LevelFile], options: &OpenOptions) -> Result<Chain> {
    let Some(top) = levels.last() else {
        bail!(Param, "a chain without images: needs at least one");
    };
    if levels.len() > MAX_CHAIN {
        bail!(Param, "a chain of {} images: at most {MAX_CHAIN}", levels.len());
    }
    if options.writable && options.marked == Marked::Ignore {
        bail!(Param, "image {}: an in-use mark can be ignored only for reading", top.name.display());
    }
    let takeover = options.carried.is_some();
    let mut kinds = Vec::with_capacity(levels.len());
    for (i, level) in levels.iter().enumerate() {
        kinds.push(identify(level, i)?);
    }
    let mut sync_failed = false;
    // What an earlier process wrote and did not sync must not be relied upon before it is durable. Where the mark is set
    // now, the sync that makes it durable comes before anything is written that relies on the file.
    if options.writable && (takeover || !is_marked_now(kinds.last())) {
        match store::sync_data(&top.file) {
            Err(e) if takeover => {
                report::warn(format_args!("cannot sync image {}: {e}", top.name.display()));
                sync_failed = true;
            }
            other => other.ctx(Kind::Fsync, || format!("cannot sync image {}", top.name.display()))?,
        }
    }
    let cluster = check_together(levels, &kinds, options.raw_cluster)?;
    let was_marked = check_marks(levels, &kinds, options)?;

    let (configs, top_scan, carried) = configure(levels, &kinds, cluster, options)?;
    let mut chain = Chain {
        cluster,
        version: None,
        device_bytes: 0,
        levels: configs,
        header: [0; header::SIZE],
        alloc: AllocConfig::default(),
        carried,
        was_marked,
        sync_failed,
    };
    match (kinds.last(), top_scan) {
        (Some(Kinds::Ploop { header, len }), Some(scan)) => {
            chain.version = Some(header.version);
            chain.device_bytes = header.sectors * SECTOR;
            chain.header = header.encode();
            if options.writable {
                if !takeover {
                    check_reach(header, scan.end).map_err(|e| at_image(e, top))?;
                }
                if !takeover || options.adopts {
                    reserve_table(top, header)?;
                }
                chain.header = prepare_top(top, header, takeover)?;
                chain.alloc = alloc_config(header, &scan, options.ahead);
                if sync_failed || options.failed {
                    // Nothing is cut and no free cluster is used: after a failed sync the durable entries may differ.
                    let held = len.div_ceil(cluster.bytes()).min(u64::from(u32::MAX)) as u32;
                    chain.alloc.end = chain.alloc.end.max(held);
                    chain.alloc.free.clear();
                } else {
                    cut(top, u64::from(scan.end) * cluster.bytes(), *len)?;
                }
                if let Some(LevelConfig::Ploop { file_clusters, .. }) = chain.levels.last_mut() {
                    *file_clusters = chain.alloc.end;
                }
            }
        }
        (Some(Kinds::Raw { bytes }), _) => chain.device_bytes = *bytes,
        _ => {}
    }
    Ok(chain)
}

/// The levels as the engine has them, the scan of the top, and what a takeover carries over.
fn configure(
    levels: &[LevelFile],
    kinds: &[Kinds],
    cluster: ClusterSize,
    options: &OpenOptions,
) -> Result<(Vec<LevelConfig>, Option<Scan>, Vec<Carried>)> {
    let mut configs = Vec::with_capacity(levels.len());
    let mut top_scan = None;
    let mut carried = Vec::new();
    for (i, (level, kind)) in levels.iter().zip(kinds).enumerate() {
        match kind {
            Kinds::Raw { bytes } => configs.push(LevelConfig::Raw { bytes: *bytes }),
            Kinds::Ploop { header, len } => {
                let is_top = i + 1 == levels.len();
                let scan = match (&options.carried, is_top) {
                    (Some(slots), true) => {
                        let (scan, c) = scan_carried(level, header, *len, slots)?;
                        carried = c;
                        Some(scan)
                    }
                    // The first worker scanned it, and it is frozen since: users wait.
                    (Some(_), false) if !options.adopts => None,
                    (_, false) if options.known_below => None,
                    _ if options.marked == Marked::Ignore => Some(scan_what_is_there(level, header, *len)?),
                    _ => Some(scan_level(level, header, *len)?),
                };
                let held = (len / cluster.bytes()).min(u64::from(u32::MAX)) as u32;
                configs.push(LevelConfig::Ploop {
                    v1: header.version == Version::V1,
                    clusters: header.clusters(),
                    first_data: header.first_data(),
                    // Of an image that was cut off each read behind its end fails by itself.
                    file_clusters: if options.marked == Marked::Ignore { u32::MAX } else { held },
                });
                if is_top {
                    top_scan = scan;
                }
            }
        }
    }
    Ok((configs, top_scan, carried))
}

/// What a level is, by itself.
fn identify(level: &LevelFile, index: usize) -> Result<Kinds> {
    let name = level.name.display();
    let len = level.file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {name}"))?.len();
    let mut head = AlignedBuf::new(HEAD);
    let got = read_full(&level.file, &mut head, 0).ctx(Kind::Read, || format!("cannot read image {name}"))?;
    if level.raw {
        if index != 0 {
            bail!(Param, "image {name} is raw and stands at level {index}: only the base can be raw");
        }
        if header::has_signature(&head[..got]) {
            bail!(Param, "image {name} has the signature of a ploop1 image: it is not opened as raw");
        }
        return Ok(Kinds::Raw { bytes: len / SECTOR * SECTOR });
    }
    if got < HEAD {
        bail!(Open, "image {name} has {len} bytes: a ploop1 image has at least {HEAD}");
    }
    let header = Header::parse(&head).and_then(|h| h.check_layout().map(|()| h)).map_err(|e| at_image(e, level))?;
    if header.is_converting() {
        bail!(
            Busy,
            "image {name}: a version conversion was interrupted (flags {:#x} at offset 52): it must be finished or \
             undone first",
            header.flags
        );
    }
    Ok(Kinds::Ploop { header, len })
}

fn at_image(e: Error, level: &LevelFile) -> Error {
    e.context(format_args!("image {}", level.name.display()))
}

/// Checks the rules between the levels; returns the cluster size.
fn check_together(levels: &[LevelFile], kinds: &[Kinds], raw_cluster: Option<ClusterSize>) -> Result<ClusterSize> {
    let mut cluster: Option<(ClusterSize, &Path)> = None;
    let mut version: Option<(Version, &Path)> = None;
    // Size in sectors of the level below.
    let mut below: Option<(u64, &Path)> = None;
    for (level, kind) in levels.iter().zip(kinds) {
        let name = level.name.as_path();
        let shown = name.display();
        let sectors = match kind {
            Kinds::Raw { bytes } => {
                cluster = raw_cluster.map(|c| (c, name));
                bytes / SECTOR
            }
            Kinds::Ploop { header, .. } => {
                if let Some((c, other)) = cluster
                    && c != header.cluster
                {
                    bail!(
                        Param,
                        "image {shown} has clusters of {} sectors, {} of {}: must be the same in a chain",
                        header.cluster.sectors(),
                        other.display(),
                        c.sectors()
                    );
                }
                if let Some((v, other)) = version
                    && v != header.version
                {
                    bail!(
                        Format,
                        "image {shown} has format version {}, {} has {}: must be the same in a chain",
                        header.version.number(),
                        other.display(),
                        v.number()
                    );
                }
                cluster = Some((header.cluster, name));
                version = Some((header.version, name));
                header.sectors
            }
        };
        if let Some((size, other)) = below
            && size > sectors
        {
            bail!(
                Param,
                "image {shown} has {sectors} sectors, {} below it {size}: a lower image must not be larger",
                other.display()
            );
        }
        below = Some((sectors, name));
    }
    match cluster {
        Some((cluster, _)) => Ok(cluster),
        None => bail!(Param, "a raw image has no cluster size of its own: it must be given"),
    }
}

/// Checks the in-use marks; returns whether the top has one.
fn check_marks(levels: &[LevelFile], kinds: &[Kinds], options: &OpenOptions) -> Result<bool> {
    let mut top_marked = false;
    for (i, (level, kind)) in levels.iter().zip(kinds).enumerate() {
        let Kinds::Ploop { header, .. } = kind else { continue };
        let marked = header.is_marked();
        top_marked = marked && i + 1 == levels.len();
        // At a takeover the killed worker of this device has set the mark.
        let own = top_marked && options.carried.is_some();
        if marked && !own && options.marked == Marked::Refuse {
            bail!(
                InUse,
                "image {} is marked in use ({:#010x} at offset 44): it is open elsewhere or was not closed cleanly; \
                 mount its descriptor or run `ploop check -d` on it when no process has it open",
                level.name.display(),
                header.in_use
            );
        }
    }
    Ok(top_marked)
}

/// Whether [`prepare_top`] writes the header of a top that is to be written.
fn is_marked_now(top: Option<&Kinds>) -> bool {
    matches!(top, Some(Kinds::Ploop { header, .. }) if in_use(header) != *header)
}

/// The header of an image while it is written.
fn in_use(header: &Header) -> Header {
    Header {
        in_use: header::IN_USE,
        flags: header.flags & !header::FLAG_EMPTY,
        // The extension is not valid after the first write, and qemu refuses an image with a stale offset.
        extension: 0,
        ..*header
    }
}

/// Marks the top in use, durably; returns its header. At a takeover the mark must be there already.
fn prepare_top(top: &LevelFile, header: &Header, takeover: bool) -> Result<[u8; header::SIZE]> {
    let marked = in_use(header);
    if takeover && header.in_use != header::IN_USE {
        bail!(
            Protocol,
            "image {} was taken over but is not marked in use ({:#010x} at offset 44): it was closed or replaced",
            top.name.display(),
            header.in_use
        );
    }
    if marked != *header {
        write_header(top, &marked)?;
    }
    Ok(marked.encode())
}

/// Takes the space that rewriting header and BAT needs, so that a flush does not meet the lack of it half way: the file
/// may have holes there, or share its blocks with a copy.
fn reserve_table(top: &LevelFile, header: &Header) -> Result<()> {
    let bytes = bat::offset_of(u64::from(header.clusters())).next_multiple_of(HEAD as u64);
    store::reserve(&top.file, bytes).ctx(Kind::Fallocate, || {
        format!(
            "no space for the header and BAT of image {} ({bytes} bytes that are holes or shared with a copy of the \
             file); make room on its file system",
            top.name.display()
        )
    })
}

/// Replaces the header, durably; the rest of the first block stays.
pub(super) fn write_header(top: &LevelFile, header: &Header) -> Result<()> {
    let name = top.name.display();
    let mut head = AlignedBuf::new(HEAD);
    let got = read_full(&top.file, &mut head, 0).ctx(Kind::Read, || format!("cannot read the header of {name}"))?;
    if got < HEAD {
        bail!(Read, "image {name} ends after {got} bytes: a ploop1 image has at least {HEAD}");
    }
    head[..header::SIZE].copy_from_slice(&header.encode());
    write_all(&top.file, &head, 0).ctx(Kind::Write, || format!("cannot write the header of {name}"))?;
    store::sync_data(&top.file).ctx(Kind::Fsync, || format!("cannot sync the header of {name}"))
}

/// Cuts the file behind the last cluster that an entry names.
pub(super) fn cut(top: &LevelFile, end: u64, len: u64) -> Result<()> {
    if end < len {
        let name = top.name.display();
        store::set_len(&top.file, end).ctx(Kind::Ftruncate, || format!("cannot cut image {name} to {end} bytes"))?;
        store::sync_data(&top.file).ctx(Kind::Fsync, || format!("cannot sync image {name}"))?;
    }
    Ok(())
}

pub(super) fn alloc_config(header: &Header, scan: &Scan, ahead: u64) -> AllocConfig {
    AllocConfig {
        end: scan.end,
        free: scan.used.gaps(header.first_data(), scan.end),
        ahead: (ahead / header.cluster.bytes()).clamp(1, u64::from(u32::MAX)) as u32,
        limit: bat::host_cluster_limit(header.version, header.cluster),
    }
}

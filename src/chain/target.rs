//! The level below the top as the target of a merge: made ready, and finished when it has taken everything.

use crate::bail;
use crate::engine::api::{AllocConfig, BAT_PAGE, LevelConfig, MergeConfig};
use crate::error::{IoContext, Kind, Result};
use crate::format::header::{self, Header, Version};
use crate::sys::aligned::{AlignedBuf, read_full, write_all};
use crate::units::SECTOR;

use super::open::{HEAD, alloc_config, cut, write_header};
use super::table::scan_level;
use super::{Chain, LevelFile};

/// Makes the level below the top of an opened writable chain ready to be the target of a merge. Its file must be writable
/// and ours alone. The first thing written is its in-use mark, durable before anything else changes; a smaller image
/// takes the size of the device with it (its table must have room for that), a raw one becomes as long as the device.
///
/// `chain` is changed accordingly. To be used again after the death of the process that did so before.
pub fn open_target(levels: &[LevelFile], chain: &mut Chain, ahead: u64) -> Result<MergeConfig> {
    let Some(index) = levels.len().checked_sub(2) else {
        bail!(Param, "a chain of one image has nothing to merge into");
    };
    let target = &levels[index];
    let name = target.name.display();
    let len = target.file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {name}"))?.len();
    if target.raw {
        if len < chain.device_bytes {
            let bytes = chain.device_bytes;
            target
                .file
                .set_len(bytes)
                .ctx(Kind::Ftruncate, || format!("cannot extend image {name} to {bytes} bytes"))?;
            target.file.sync_all().ctx(Kind::Fsync, || format!("cannot sync image {name}"))?;
        }
        chain.levels[index] = LevelConfig::Raw { bytes: chain.device_bytes };
        let alloc = AllocConfig { limit: u32::MAX, ahead: 1, ..AllocConfig::default() };
        return Ok(MergeConfig { level: index as u8, alloc });
    }
    let mut head = AlignedBuf::new(HEAD);
    let got = read_full(&target.file, &mut head, 0).ctx(Kind::Read, || format!("cannot read image {name}"))?;
    if got < HEAD {
        bail!(Open, "image {name} has {got} bytes: a ploop1 image has at least {HEAD}");
    }
    let old = Header::parse(&head).and_then(|h| h.check_layout().map(|()| h))?;
    let Some(version) = chain.version.filter(|v| *v == old.version) else {
        bail!(Format, "image {name} has format version {}: must be that of the chain", old.version.number());
    };
    let sized = Header::new(version, old.cluster, chain.device_bytes / SECTOR)?;
    let grows = old.sectors != chain.device_bytes / SECTOR;
    if grows && sized.first_data_sector > old.first_data_sector {
        bail!(
            Param,
            "image {name} has {} sectors, the device {}: its table has no room for so many, and cannot grow while the \
             device is running; unmount it and merge then",
            old.sectors,
            chain.device_bytes / SECTOR
        );
    }
    let scan = scan_level(target, &old, len)?;
    let sized = match grows {
        true => Header {
            sectors: chain.device_bytes / SECTOR,
            size_clusters: sized.size_clusters,
            heads: sized.heads,
            cylinders: sized.cylinders,
            ..old
        },
        false => old,
    };
    let flags = old.flags & !header::FLAG_EMPTY;
    let marked = Header { in_use: header::IN_USE, flags, extension: 0, ..sized };
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
    Ok(MergeConfig { level: index as u8, alloc: alloc_config(&marked, &scan, ahead) })
}

/// Makes durable what the target has taken, data before entries. It stays marked in use: it becomes the top.
pub fn finish_target(target: &LevelFile, pages: impl Iterator<Item = (u32, Box<[u8; BAT_PAGE]>)>) -> Result<()> {
    let name = target.name.display();
    let sync = || target.file.sync_all().ctx(Kind::Fsync, || format!("cannot sync image {name}"));
    sync()?;
    let mut buf = AlignedBuf::new(BAT_PAGE);
    for (page, data) in pages {
        let at = u64::from(page) * BAT_PAGE as u64;
        let mut skip = 0;
        if page == 0 {
            // The header stands before the first entries.
            let got = read_full(&target.file, &mut buf, 0).ctx(Kind::Read, || format!("cannot read image {name}"))?;
            if got < BAT_PAGE {
                bail!(Read, "image {name} ends after {got} bytes: a ploop1 image has at least {BAT_PAGE}");
            }
            skip = header::SIZE;
        }
        buf[skip..].copy_from_slice(&data[skip..]);
        write_all(&target.file, &buf, at).ctx(Kind::Write, || format!("cannot write the table of image {name}"))?;
    }
    sync()
}

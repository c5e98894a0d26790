//! Giving an image a larger disk. A longer table needs clusters that have data: these move to the end of the file
//! first.

use std::fs::File;
use std::path::Path;

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::format::bat;
use crate::format::header::{self, Header};
use crate::report::progress::Progress;
use crate::sys::aligned::{AlignedBuf, read_exact, write_all};
use crate::sys::{host, store};
use crate::units::ImageCluster;

use super::target::Target;

/// Bytes moved or zeroed at once.
const CHUNK: u64 = 4 << 20;

/// Grows the disk of an image that is marked in use to `sectors`. The content is the same at
/// every instant: the old header stays valid until the new one is written, and a cluster that moves has its new entry
/// before its old position is zeroed. Added clusters are not allocated. Smaller is `Param`, equal changes nothing.
pub fn grow(target: &mut Target<'_>, sectors: u64) -> Result<()> {
    let old = target.header;
    let name = target.name.display().to_string();
    if sectors < old.sectors {
        bail!(Param, "image {name} has {} sectors: it cannot be made smaller, {sectors}", old.sectors);
    }
    if sectors == old.sectors {
        return Ok(());
    }
    if old.in_use != header::IN_USE {
        bail!(Abort, "image {name} is not marked in use while it is grown");
    }
    let sized = Header::sized(old.version, old.cluster, sectors)?;
    let first_data_sector = sized.first_data_sector.max(old.first_data_sector);
    let new = Header { in_use: old.in_use, flags: old.flags, first_data_sector, ..sized };
    let (old_first, first) = (old.first_data(), new.first_data());
    // Entries behind the old disk's last cluster become those of clusters.
    target.clear_beyond()?;
    // What lay between the BAT and the data becomes a part of the BAT.
    let size = old.cluster.bytes();
    let between = u64::from(old.table_clusters()) * size..u64::from(new.table_clusters().min(old_first)) * size;
    if !between.is_empty() {
        zero(target.file, &target.name, between)?;
        target.sync()?;
    }
    if first > old_first {
        make_room(target, first)?;
    }
    target.write_header(&new)?;
    Ok(())
}

/// The size of the next step towards a disk of `sectors`: for its table at most `moved` bytes of the file have to be moved,
/// or one cluster. A larger size than the format allows is `Param`.
pub fn next_size(header: &Header, sectors: u64, moved: u64) -> Result<u64> {
    let wanted = Header::sized(header.version, header.cluster, sectors)?;
    let size = header.cluster.bytes();
    let table = u64::from(header.first_data()) + (moved / size).max(1);
    if u64::from(wanted.first_data()) <= table {
        return Ok(sectors);
    }
    let clusters = (table * size - bat::offset_of(0)) / 4;
    Ok(sectors.min(clusters * u64::from(header.cluster.sectors())))
}

/// Makes a raw image of `len` bytes `wanted` bytes long, durably. What is added reads as zero, and has its space where the
/// file system can give it.
pub fn grow_raw(file: &File, name: &Path, len: u64, wanted: u64) -> Result<()> {
    let shown = name.display();
    if wanted > len {
        match store::fallocate(file, len, wanted - len) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                store::set_len(file, wanted)
                    .ctx(Kind::Ftruncate, || format!("cannot extend image {shown} to {wanted} bytes"))?;
            }
            Err(e) => {
                // What of it there is now is not needed.
                let _ = store::set_len(file, len);
                return Err(e).ctx(Kind::Fallocate, || format!("cannot extend image {shown} to {wanted} bytes"));
            }
            Ok(()) => {}
        }
    }
    store::sync_all(file).ctx(Kind::Fsync, || format!("cannot sync image {shown}"))
}

/// Empties the clusters before `first` of data, and zeroes them for the table.
fn make_room(target: &mut Target<'_>, first: ImageCluster) -> Result<()> {
    let name = target.name.display().to_string();
    let size = target.cluster().bytes();
    let old_first = target.header.first_data();
    // Host clusters before the new border are not allocated any more.
    for gap in &mut target.table.free {
        gap.start = gap.start.max(first).min(gap.end.max(first));
        gap.end = gap.end.max(gap.start);
    }
    target.table.free.retain(|g| g.start < g.end);
    // Behind the last whole cluster there is no data; a tail that an interrupted grow left would become data.
    let len = target.file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {name}"))?.len();
    let whole = len / size * size;
    if whole != len {
        store::set_len(target.file, whole)
            .ctx(Kind::Ftruncate, || format!("cannot cut image {name} to {whole} bytes"))?;
    }
    target.table.end = target.table.end.max(first);

    let moving: Vec<(usize, u32, u32)> = (target.table.entries.iter().enumerate())
        .filter(|(_, (_, host_cluster))| *host_cluster < first)
        .map(|(i, (cluster, host_cluster))| (i, *cluster, *host_cluster))
        .collect();
    target.check_room(moving.len() as u64)?;
    // Clusters that the file does not have yet: those behind the old end are zeroed, those that move there are written.
    zero(target.file, &target.name, whole.max(u64::from(old_first) * size)..u64::from(first) * size)?;
    let mut moved = Vec::with_capacity(moving.len());
    let mut shown = Progress::in_units("moving clusters", size);
    for (done, &(index, cluster, host_cluster)) in moving.iter().enumerate() {
        shown.at(done as u64, moving.len() as u64);
        let to = target.allocate(1)?.start;
        copy(target, u64::from(host_cluster) * size, u64::from(to) * size)?;
        moved.push((index, cluster, to));
    }
    shown.finish();
    let entries: Vec<(u32, u32)> = moved.iter().map(|(_, cluster, to)| (*cluster, *to)).collect();
    let late = host::breach("moved clusters are named late");
    if !late {
        target.publish(&entries)?;
    }
    for (index, _, to) in moved {
        if let Some(entry) = target.table.entries.get_mut(index) {
            entry.1 = to;
        }
    }
    // From here on no entry names the old host clusters.
    zero(target.file, &target.name, u64::from(old_first) * size..whole.min(u64::from(first) * size))?;
    if late {
        target.publish(&entries)?;
    }
    target.sync()
}

/// Writes zeroes; the bounds are multiples of the cluster.
pub(crate) fn zero(file: &File, name: &Path, bytes: std::ops::Range<u64>) -> Result<()> {
    let mut zeroes = None;
    let mut at = bytes.start;
    let mut shown = Progress::begin("writing zeroes");
    while at < bytes.end {
        shown.at(at - bytes.start, bytes.end - bytes.start);
        let len = (bytes.end - at).min(CHUNK);
        let zeroes = zeroes.get_or_insert_with(|| AlignedBuf::new(CHUNK as usize));
        write_all(file, &zeroes[..len as usize], at)
            .ctx(Kind::Reloc, || format!("cannot zero image {} at offset {at}", name.display()))?;
        at += len;
    }
    shown.finish();
    Ok(())
}

/// Copies a cluster within the file.
pub(super) fn copy(target: &Target<'_>, from: u64, to: u64) -> Result<()> {
    let size = target.cluster().bytes();
    let mut buf = AlignedBuf::new(CHUNK.min(size) as usize);
    let mut done = 0;
    while done < size {
        let len = (size - done).min(CHUNK) as usize;
        let moved = read_exact(target.file, &mut buf[..len], from + done)
            .and_then(|()| write_all(target.file, &buf[..len], to + done));
        moved.ctx(Kind::Reloc, || {
            format!("cannot move a cluster of image {} from offset {from} to {to}", target.name.display())
        })?;
        done += len as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::header::Version;
    use crate::units::ClusterSize;

    #[test]
    fn a_step_moves_little_and_the_last_one_reaches_the_size() {
        let (small, large) = (ClusterSize::from_sectors(64).unwrap(), ClusterSize::DEFAULT);
        for (cluster, version, sectors, steps) in [
            (small, Version::V2, (40 << 30) / 512, 2),
            (small, Version::V2, (1 << 40) / 512, 32),
            (large, Version::V2, (16 << 40) / 512, 16),
            (large, Version::V1, (40 << 30) / 512, 1),
        ] {
            let (mut header, mut done) = (Header::sized(version, cluster, (1 << 30) / 512).unwrap(), 0);
            while header.sectors < sectors {
                let next = next_size(&header, sectors, CHUNK).unwrap();
                let grown = Header::sized(version, cluster, next).unwrap();
                let moved = u64::from(grown.first_data() - header.first_data()) * cluster.bytes();
                assert!(next > header.sectors && moved <= CHUNK, "{next} sectors, {moved} bytes");
                (header, done) = (grown, done + 1);
            }
            assert_eq!((header.sectors, done), (sectors, steps));
        }
        let header = Header::sized(Version::V1, small, 1 << 21).unwrap();
        assert_eq!(next_size(&header, 1 << 40, CHUNK).unwrap_err().kind(), Kind::Param);
    }
}

//! What a check found wrong in a BAT, and how it is repaired: each step leaves an image that is no worse, and no cluster that
//! an entry names loses its bytes.

use std::fs::File;

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::bat::{self, Entry};
use crate::format::header::{CLOSED_V21, Header, Version};
use crate::sys::aligned::{AlignedBuf, read_exact, read_full, write_all};
use crate::sys::store;
use crate::units::{ImageCluster, VirtCluster};

use super::CheckOptions;

use crate::image::scan::{Found, HostClusters, Problem, Scan, Visitor, describe, scan};

/// At most so many findings are reported one by one.
pub const TOLD: usize = 16;

/// Bytes copied at once.
const CHUNK: u64 = 4 << 20;

/// First bytes of a format extension.
const EXTENSION_MAGIC: u64 = 0xAB23_4CEF_23DC_EA87;

/// What a scan found wrong.
#[derive(Default)]
pub struct Findings {
    /// Slots that repair sets to 0.
    pub drop: Vec<u64>,
    /// Of these, how many are entries of the disk: its content changes.
    pub lost: u64,
    /// Clusters of the disk that get a copy of the cluster that another entry names, too.
    pub copy: Vec<(VirtCluster, ImageCluster)>,
    /// Entries name clusters between the BAT and the first data that the header tells.
    pub first_data: bool,
    /// Why the image is damaged beyond what the flags allow to repair.
    pub fatal: Vec<String>,
    pub fatal_count: u64,
    pub notes: Vec<String>,
}

impl Findings {
    /// Something of the BAT is to be written.
    pub fn any(&self) -> bool {
        !self.drop.is_empty() || !self.copy.is_empty() || self.first_data
    }
}

/// Sorts what a scan finds by what the options allow.
pub struct Collect<'a> {
    pub header: &'a Header,
    pub file_len: u64,
    pub options: &'a CheckOptions,
    pub out: Findings,
}

impl<'a> Collect<'a> {
    pub fn new(header: &'a Header, file_len: u64, options: &'a CheckOptions) -> Collect<'a> {
        Collect { header, file_len, options, out: Findings::default() }
    }

    /// Whether this is repaired; what it takes is noted.
    fn repaired(&mut self, found: Found, problem: Problem) -> bool {
        let hard = self.options.hard_force && !self.options.read_only;
        let place = match bat::decode(self.header.version, self.header.cluster, found.entry) {
            Entry::At(place) => Some(place),
            _ => None,
        };
        match (problem, place) {
            (Problem::BeyondDisk, _) => self.out.drop.push(found.cluster),
            (Problem::Twice, Some(place)) if hard => self.out.copy.push((found.cluster as VirtCluster, place)),
            (Problem::InTable, Some(place)) if hard && place >= self.header.table_clusters() => {
                self.out.first_data = true;
            }
            _ if hard => {
                self.out.drop.push(found.cluster);
                self.out.lost += 1;
            }
            _ => return false,
        }
        true
    }
}

impl Visitor for Collect<'_> {
    fn problem(&mut self, found: Found, problem: Problem) -> Result<()> {
        let o = self.options;
        if matches!(problem, Problem::InTable | Problem::Twice) && !o.check && !o.hard_force {
            return Ok(());
        }
        let repaired = self.repaired(found, problem);
        let told = if repaired { &mut self.out.notes } else { &mut self.out.fatal };
        if told.len() < TOLD {
            told.push(describe(self.header, self.file_len, found, problem));
        }
        self.out.fatal_count += u64::from(!repaired);
        Ok(())
    }
}

/// Whether the number of clusters at offset 32 of the header contradicts size and cluster. The classic never reads it;
/// other programs compute the size of the BAT from it.
pub fn contradicts_itself(header: &Header) -> bool {
    let full = (header.sectors / u64::from(header.cluster.sectors())) as u32;
    header.size_clusters != header.clusters() && header.size_clusters != full
}

/// Refuses an image whose header has a smaller disk in one field than in another, and entries of the larger one. `Format`.
pub fn refuse_smaller_disk(file: &File, header: &Header, len: u64, found: &Scan) -> Result<()> {
    struct Count;
    impl Visitor for Count {
        fn problem(&mut self, _: Found, _: Problem) -> Result<()> {
            Ok(())
        }
    }
    if !contradicts_itself(header) || header.size_clusters <= header.clusters() {
        return Ok(());
    }
    let larger = Header { sectors: u64::from(header.size_clusters) * u64::from(header.cluster.sectors()), ..*header };
    if larger.check_layout().is_err() {
        return Ok(());
    }
    let all = scan(file, &larger, len, &mut Count)?.mapped;
    if all > found.mapped {
        bail!(
            Format,
            "the header has {} clusters at offset 32, {} sectors at offset 36 ({} clusters), and {} entries of clusters \
             behind those: the size at offset 36 may be wrong; nothing is repaired; correct the header, as from a copy of it",
            header.size_clusters,
            header.sectors,
            header.clusters(),
            all - found.mapped
        );
    }
    Ok(())
}

/// Refuses repairs that would lose what is there because a field of the header is wrong, not the entries. `Format`.
pub fn refuse_wrong_header(header: &Header, findings: &Findings) -> Result<()> {
    if findings.drop.is_empty() {
        return Ok(());
    }
    if header.is_converting() {
        bail!(
            Busy,
            "its entries are not those of version {}, and a version conversion was interrupted (flags {:#x} at offset 52): no \
             entry is dropped",
            header.version.number(),
            header.flags
        );
    }
    if contradicts_itself(header) {
        bail!(
            Format,
            "{}; the header contradicts itself: {} clusters at offset 32, {} sectors at offset 36, {} sectors for each at offset \
             28. One of them is wrong, and entries that are right could be dropped: nothing is repaired; correct the header, as \
             from a copy of it",
            findings.notes.join("; "),
            header.size_clusters,
            header.sectors,
            header.cluster.sectors()
        );
    }
    Ok(())
}

/// The header with the other version's signature, if no entry is sound for this version and all are for the other.
pub fn other_version(file: &File, header: &Header, len: u64, found: &Scan) -> Option<Header> {
    struct Strict;
    impl Visitor for Strict {
        fn problem(&mut self, _: Found, problem: Problem) -> Result<()> {
            bail!(Format, "{problem:?}")
        }
    }
    let version = if header.version == Version::V1 { Version::V2 } else { Version::V1 };
    let other = Header { version, ..*header };
    let fits = version == Version::V2 || header.sectors <= u64::from(u32::MAX);
    if found.mapped > 0 || !fits {
        return None;
    }
    let sound = scan(file, &other, len, &mut Strict).ok()?;
    (sound.mapped > 0).then_some(other)
}

/// Why the format extension that the header names is none; `Ok` if there is one, or the header names none.
pub fn check_extension(file: &File, header: &Header, len: u64, used: &HostClusters) -> std::result::Result<(), String> {
    if header.in_use != CLOSED_V21 || header.extension == 0 {
        return Ok(());
    }
    let size = header.cluster.bytes();
    let named = format!("the format extension at sector {} (offset 56 of the header)", header.extension);
    let start = header.extension.checked_mul(512).filter(|at| at.checked_add(size).is_some_and(|end| end <= len));
    let Some(start) = start else { return Err(format!("{named} lies behind the end of the file")) };
    let cluster = start / size;
    if cluster < u64::from(header.first_data()) || u32::try_from(cluster).is_ok_and(|c| used.contains(c)) {
        return Err(format!("{named} lies in the BAT, or in a cluster of the disk"));
    }
    let mut magic = [0; 8];
    match read_full(file, &mut magic, start) {
        Ok(8) if u64::from_le_bytes(magic) == EXTENSION_MAGIC => Ok(()),
        _ => Err(format!("{named} does not begin with {EXTENSION_MAGIC:#x}")),
    }
}

fn sync(file: &File) -> Result<()> {
    store::sync_all(file).ctx(Kind::Fsync, || "cannot sync")
}

/// Gives the second user of each cluster a copy, from cluster `end` of the file on; `len`: the file's length. Data first,
/// durably, then the entries.
pub fn copy_shared(
    file: &File,
    header: &Header,
    shared: &[(VirtCluster, ImageCluster)],
    end: u64,
    len: u64,
) -> Result<()> {
    if shared.is_empty() {
        return Ok(());
    }
    let limit = u64::from(bat::host_cluster_limit(header.version, header.cluster));
    if end + shared.len() as u64 > limit {
        bail!(
            Param,
            "{} clusters are used twice: version {} cannot name clusters from {limit} on, where their copies would be",
            shared.len(),
            header.version.number()
        );
    }
    crate::image::complete::check_space(file, shared.len() as u64 * header.cluster.bytes())
        .ctx(Kind::Write, || format!("{} clusters are used twice, and cannot be copied", shared.len()))?;
    let copied = copy_clusters(file, header, shared, end).and_then(|()| {
        #[cfg(test)]
        if crate::image::breach::is("copies are not synced") {
            return Ok(());
        }
        sync(file)
    });
    if let Err(e) = copied {
        // No entry names the copies.
        let _ = store::set_len(file, len);
        return Err(e);
    }
    for (n, (cluster, _)) in shared.iter().enumerate() {
        let Some(entry) = bat::encode(header.version, header.cluster, end as ImageCluster + n as ImageCluster) else {
            return Err(Error::new(Kind::Param, "a cluster that the version cannot name"));
        };
        write_all(file, &entry.to_le_bytes(), bat::entry_offset(*cluster))
            .ctx(Kind::Write, || format!("cannot write the BAT entry of cluster {cluster}"))?;
    }
    sync(file)
}

fn copy_clusters(file: &File, header: &Header, shared: &[(VirtCluster, ImageCluster)], end: u64) -> Result<()> {
    let size = header.cluster.bytes();
    let mut buf = AlignedBuf::new(CHUNK.min(size) as usize);
    for (n, (cluster, from)) in shared.iter().enumerate() {
        let (from, to) = (u64::from(*from) * size, (end + n as u64) * size);
        let mut done = 0;
        while done < size {
            let bytes = &mut buf[..(size - done).min(CHUNK) as usize];
            read_exact(file, bytes, from + done)
                .and_then(|()| write_all(file, bytes, to + done))
                .ctx(Kind::Write, || format!("cannot copy cluster {cluster} from offset {from} to {to}"))?;
            done += bytes.len() as u64;
        }
    }
    Ok(())
}

/// Sets slots to 0, durably.
pub fn drop_slots(file: &File, slots: &[u64]) -> Result<()> {
    if slots.is_empty() {
        return Ok(());
    }
    for index in slots {
        write_all(file, &[0; 4], bat::offset_of(*index))
            .ctx(Kind::Write, || format!("cannot write the BAT entry of cluster {index}"))?;
    }
    sync(file)
}

/// Writes the header, durably.
pub fn write_header(file: &File, header: &Header) -> Result<()> {
    write_all(file, &header.encode(), 0).ctx(Kind::Write, || "cannot write the header")?;
    sync(file)
}

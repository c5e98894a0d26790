//! One pass over an image's BAT: which clusters of the file are taken, and what is wrong.

use std::fs::File;
use std::io;
use std::ops::Range;

use crate::error::{IoContext, Kind, Result};
use crate::format::bat::{self, Entry};
use crate::format::header::{Header, OLD_PARALLELS};
use crate::report::progress::Progress;
use crate::sys::aligned::{AlignedBuf, read_exact};
use crate::sys::fiemap;
use crate::units::{ImageCluster, VirtCluster};

/// Bytes of the BAT read at once.
const CHUNK: u64 = 1 << 20;

/// Most bytes in a row that are looked at without asking for the next hole again.
const PAGE: usize = 4096;

const SEGMENT_BITS: u32 = 1 << 16;

/// A set of image clusters. It takes memory in segments of 8 KiB only where clusters are set, however long the file is
/// and whatever a damaged entry names.
#[derive(Default)]
pub struct HostClusters {
    segments: Vec<Option<Box<[u64; (SEGMENT_BITS / 64) as usize]>>>,
}

impl HostClusters {
    /// Adds a cluster; false if it was in the set.
    pub fn insert(&mut self, host_cluster: ImageCluster) -> bool {
        let segment = (host_cluster / SEGMENT_BITS) as usize;
        if segment >= self.segments.len() {
            self.segments.resize_with(segment + 1, || None);
        }
        let Some(slot) = self.segments.get_mut(segment) else { return false };
        let words = slot.get_or_insert_with(|| Box::new([0; (SEGMENT_BITS / 64) as usize]));
        let bit = host_cluster % SEGMENT_BITS;
        let word = &mut words[(bit / 64) as usize];
        let mask = 1 << (bit % 64);
        let new = *word & mask == 0;
        *word |= mask;
        new
    }

    pub fn contains(&self, host_cluster: ImageCluster) -> bool {
        let bit = host_cluster % SEGMENT_BITS;
        match self.segments.get((host_cluster / SEGMENT_BITS) as usize) {
            Some(Some(words)) => words[(bit / 64) as usize] >> (bit % 64) & 1 == 1,
            _ => false,
        }
    }

    /// Ranges of `[from, to)` that are not in the set, ascending.
    pub fn gaps(&self, from: ImageCluster, to: ImageCluster) -> Vec<Range<ImageCluster>> {
        let mut gaps: Vec<Range<u32>> = Vec::new();
        let mut add = |start: u32, end: u32| match gaps.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => gaps.push(start..end),
        };
        let mut at = from;
        while at < to {
            let bit = at % SEGMENT_BITS;
            let segment = self.segments.get((at / SEGMENT_BITS) as usize).and_then(Option::as_ref);
            // The step: a whole segment if none of its clusters is set, else one word.
            let span = match segment {
                None => SEGMENT_BITS - bit,
                Some(_) => 64 - bit % 64,
            };
            let stop = u64::from(at).saturating_add(u64::from(span)).min(u64::from(to)) as u32;
            match segment.map(|words| words[(bit / 64) as usize]) {
                None | Some(0) => add(at, stop),
                Some(u64::MAX) => {}
                Some(word) => {
                    for host_cluster in at..stop {
                        if word >> (host_cluster % 64) & 1 == 0 {
                            add(host_cluster, host_cluster + 1);
                        }
                    }
                }
            }
            at = stop;
        }
        gaps
    }
}

/// What is wrong with an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Problem {
    /// The slot lies behind the disk's last cluster and should be 0.
    BeyondDisk,
    /// Version 1: not a multiple of the cluster size.
    Misaligned,
    /// The cluster does not lie inside the file.
    BeyondFile,
    /// It names header or BAT.
    InTable,
    /// Another entry names the same cluster.
    Twice,
}

/// A BAT entry as found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    /// The slot; at or beyond [`Header::clusters`] it is no cluster of the disk.
    pub cluster: u64,
    /// The entry's value in the file.
    pub entry: u32,
}

/// Result of a scan.
pub struct Scan {
    /// Clusters named by entries that lie inside the file, the table's own clusters not among them.
    pub used: HostClusters,
    /// One more than the highest of them, at least `l1`.
    pub end: ImageCluster,
    /// How many entries of the disk's own clusters are not 0.
    pub mapped: u64,
}

/// Receives the entries that a scan finds.
pub trait Visitor {
    /// A sound entry of one of the disk's clusters.
    fn entry(&mut self, _cluster: VirtCluster, _host_cluster: ImageCluster) {}
    /// A bad one; an error ends the scan.
    fn problem(&mut self, found: Found, problem: Problem) -> Result<()>;
}

/// Reads the whole table of an image, all slots of its clusters, in large reads that skip holes. `file_len` is the
/// file's length in bytes; the header's words were checked by [`Header::check_layout`].
pub fn scan(file: &File, header: &Header, file_len: u64, visitor: &mut dyn Visitor) -> Result<Scan> {
    let cluster = header.cluster;
    let first_data = header.first_data();
    let data = u64::from(first_data) * cluster.bytes();
    if file_len < data {
        crate::bail!(
            Format,
            "file of {file_len} bytes: its data begins at {data} ({first_data} clusters of {} bytes)",
            cluster.bytes()
        );
    }
    // What lies between the BAT and the data has no meaning.
    let table = u64::from(header.table_clusters()) * cluster.bytes();
    let mut work = Work {
        header,
        file_clusters: file_len / cluster.bytes(),
        visitor,
        out: Scan { used: HostClusters::default(), end: first_data, mapped: 0 },
        failed: None,
    };
    let mut buf = AlignedBuf::new(CHUNK.min(table) as usize);
    let mut shown = Progress::begin("reading the BAT");
    let walked = fiemap::each_data(file, 0, table, &mut |start, end| {
        let mut at = start / PAGE as u64 * PAGE as u64;
        let end = end.next_multiple_of(PAGE as u64).min(table);
        while at < end {
            let len = (end - at).min(buf.len() as u64) as usize;
            read_exact(file, &mut buf[..len], at)?;
            if let Err(e) = work.bytes(at, &buf[..len]) {
                work.failed = Some(e);
                return Err(io::Error::other("stopped"));
            }
            at += len as u64;
            shown.at(at, table);
        }
        Ok(())
    });
    if let Some(e) = work.failed {
        return Err(e);
    }
    walked.ctx(Kind::Read, || format!("cannot read the BAT ({table} bytes at offset 0)"))?;
    Ok(work.out)
}

struct Work<'a> {
    header: &'a Header,
    file_clusters: u64,
    visitor: &'a mut dyn Visitor,
    out: Scan,
    failed: Option<crate::error::Error>,
}

impl Work<'_> {
    /// Looks at a piece of the table that begins at byte `at` of the file, on a page's border.
    fn bytes(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        const ZEROES: [u8; PAGE] = [0; PAGE];
        for (i, page) in bytes.chunks(PAGE).enumerate() {
            if page == &ZEROES[..page.len()] {
                continue;
            }
            let first = at / 4 + (i * PAGE / 4) as u64;
            for (index, word) in (first..).zip(page.as_chunks::<4>().0) {
                let entry = u32::from_le_bytes(*word);
                if entry != 0 && index >= bat::HEADER_ENTRIES {
                    self.entry(index - bat::HEADER_ENTRIES, entry)?;
                }
            }
        }
        Ok(())
    }

    fn entry(&mut self, cluster: u64, entry: u32) -> Result<()> {
        let found = Found { cluster, entry };
        let beyond = cluster >= u64::from(self.header.clusters());
        if beyond {
            self.visitor.problem(found, Problem::BeyondDisk)?;
        }
        let host_cluster = match bat::decode(self.header.version, self.header.cluster, entry) {
            Entry::At(host_cluster) => host_cluster,
            // A slot beyond the disk was reported already; its value does not matter.
            _ if beyond => return Ok(()),
            _ => return self.visitor.problem(found, Problem::Misaligned),
        };
        if u64::from(host_cluster) >= self.file_clusters {
            return if beyond { Ok(()) } else { self.visitor.problem(found, Problem::BeyondFile) };
        }
        if host_cluster < self.header.first_data() {
            return if beyond { Ok(()) } else { self.visitor.problem(found, Problem::InTable) };
        }
        self.out.end = self.out.end.max(host_cluster + 1);
        let new = self.out.used.insert(host_cluster);
        if beyond {
            return Ok(());
        }
        if !new {
            return self.visitor.problem(found, Problem::Twice);
        }
        self.out.mapped += 1;
        self.visitor.entry(cluster as u32, host_cluster);
        Ok(())
    }
}

/// How many clusters of the disk lie behind the end of the file, and how many there are in it.
pub fn cut_off(file: &File, header: &Header, file_len: u64) -> Result<(u64, u64)> {
    struct Missing(u64);
    impl Visitor for Missing {
        fn problem(&mut self, _: Found, problem: Problem) -> Result<()> {
            self.0 += u64::from(problem == Problem::BeyondFile);
            Ok(())
        }
    }
    let mut missing = Missing(0);
    let found = scan(file, header, file_len, &mut missing)?;
    Ok((missing.0, found.mapped))
}

/// Refuses an image whose data lie further behind than its disk can need (`Format`); `end`: of [`Scan::end`]. What writes
/// to an image, or fills its holes, asks this first.
pub fn check_reach(header: &Header, end: ImageCluster) -> Result<()> {
    let reach = header.reach();
    if u64::from(end) > reach {
        crate::bail!(
            Format,
            "its data reach to cluster {end} of the file ({} bytes), a disk of {} clusters needs {reach} at most: filling \
             the holes between would take that space of the host; `ploop check -S` moves the data to the front",
            u64::from(end) * header.cluster.bytes(),
            header.clusters()
        );
    }
    Ok(())
}

/// Entry, value and rule in words.
pub fn describe(header: &Header, file_len: u64, found: Found, problem: Problem) -> String {
    let at = bat::offset_of(found.cluster);
    let value = found.entry;
    let head = format!("BAT entry of cluster {} (offset {at}) is {value}", found.cluster);
    match problem {
        Problem::BeyondDisk => {
            format!("{head}: the disk has {} clusters, entries behind them must be 0", header.clusters())
        }
        Problem::Misaligned => {
            format!(
                "{head}: must be a multiple of the cluster size, {} sectors{OLD_PARALLELS}",
                header.cluster.sectors()
            )
        }
        Problem::BeyondFile => format!(
            "{head}: must lie inside the file, which has {} whole clusters ({file_len} bytes)",
            file_len / header.cluster.bytes()
        ),
        Problem::InTable => {
            format!("{head}: the data begins at cluster {} of the file", header.first_data())
        }
        Problem::Twice => format!("{head}: another cluster's entry has the same value, each must be unique"),
    }
}

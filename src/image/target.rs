//! An image that an operation writes into while no other program uses it: the mark is set first, the table is written
//! after the data, the mark is cleared last.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::format::bat;
use crate::format::header::{self, Header, Version};
use crate::report;
use crate::sys::aligned::{read_exact, write_all};
use crate::sys::store;
use crate::units::{ClusterSize, ImageCluster, VirtCluster};

use super::complete;
use super::scan::{Found, Problem, Visitor, check_reach, describe, scan};
use super::table::write_entries;

/// Entries of a table by cluster, ascending.
pub type Entries = Vec<(VirtCluster, ImageCluster)>;

/// The table of an image.
#[derive(Debug)]
pub struct Table {
    pub entries: Entries,
    /// Slots behind the disk's last cluster that are not 0.
    pub beyond: Vec<u64>,
    /// Clusters below `end` that no entry names.
    pub free: Vec<Range<ImageCluster>>,
    /// One more than the highest cluster in use.
    pub end: ImageCluster,
}

struct Collect<'a> {
    header: &'a Header,
    len: u64,
    entries: Entries,
    beyond: Vec<u64>,
}

impl Visitor for Collect<'_> {
    fn entry(&mut self, cluster: VirtCluster, host_cluster: ImageCluster) {
        self.entries.push((cluster, host_cluster));
    }

    fn problem(&mut self, found: Found, problem: Problem) -> Result<()> {
        if problem == Problem::BeyondDisk {
            self.beyond.push(found.cluster);
            return Ok(());
        }
        bail!(Format, "{}", describe(self.header, self.len, found, problem))
    }
}

/// Reads header and table of a ploop1 image; anything unsound is an error, `Format`.
pub fn read_table(file: &File, name: &Path) -> Result<(Header, Table)> {
    let shown = name.display();
    let mut head = [0; header::SIZE];
    read_exact(file, &mut head, 0).ctx(Kind::Open, || format!("cannot read the header of image {shown}"))?;
    let at_image = |e: crate::error::Error| e.context(format_args!("image {shown}"));
    let header = Header::parse(&head).and_then(|h| h.check_layout().map(|()| h)).map_err(at_image)?;
    if header.is_converting() {
        bail!(Busy, "image {shown}: a version conversion was interrupted: it must be finished or undone first");
    }
    let len = file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {shown}"))?.len();
    let mut collect = Collect { header: &header, len, entries: Vec::new(), beyond: Vec::new() };
    let found = scan(file, &header, len, &mut collect).map_err(at_image)?;
    let table = Table {
        entries: collect.entries,
        beyond: collect.beyond,
        free: found.used.gaps(header.first_data(), found.end),
        end: found.end,
    };
    Ok((header, table))
}

/// The image, while it is written into.
#[derive(Debug)]
pub struct Target<'a> {
    pub file: &'a File,
    pub name: PathBuf,
    pub header: Header,
    pub table: Table,
}

impl<'a> Target<'a> {
    /// Looks at the image; nothing is written yet. One that would fill its file system when it is completed is refused.
    pub fn open(file: &'a File, name: &Path) -> Result<Target<'a>> {
        let target = Target::open_sparse(file, name)?;
        check_reach(&target.header, target.table.end)
            .map_err(|e| e.context(format_args!("image {}", name.display())))?;
        Ok(target)
    }

    /// The same of any image.
    pub fn open_sparse(file: &'a File, name: &Path) -> Result<Target<'a>> {
        let (header, table) = read_table(file, name)?;
        Ok(Target { file, name: name.to_owned(), header, table })
    }

    pub fn cluster(&self) -> ClusterSize {
        self.header.cluster
    }

    /// Marks the image in use, durably.
    pub fn mark(&mut self) -> Result<()> {
        let header = Header {
            in_use: header::IN_USE,
            flags: self.header.flags & !header::FLAG_EMPTY,
            // The extension is not valid after the first write, and other programs refuse an image with a stale offset.
            extension: 0,
            ..self.header
        };
        self.write_header(&header)
    }

    /// Writes the header, durably.
    pub fn write_header(&mut self, header: &Header) -> Result<()> {
        write_all(self.file, &header.encode(), 0)
            .ctx(Kind::Write, || format!("cannot write the header of {}", self.name.display()))?;
        self.sync()?;
        self.header = *header;
        Ok(())
    }

    pub fn sync(&self) -> Result<()> {
        store::sync_data(self.file).ctx(Kind::Fsync, || format!("cannot sync image {}", self.name.display()))
    }

    /// Makes the data durable, then publishes these host clusters (ascending by cluster), durably.
    pub fn publish(&mut self, entries: &[(VirtCluster, ImageCluster)]) -> Result<()> {
        self.sync()?;
        if entries.is_empty() {
            return Ok(());
        }
        let mut values = Vec::with_capacity(entries.len());
        for &(cluster, host_cluster) in entries {
            values.push((cluster, self.value(host_cluster)?));
        }
        write_entries(self.file, &values)
            .ctx(Kind::Write, || format!("cannot write the BAT of {}", self.name.display()))?;
        self.sync()
    }

    /// Clears the slots behind the disk's last cluster, durably: clusters that they name are free from then on.
    pub fn clear_beyond(&mut self) -> Result<()> {
        if self.table.beyond.is_empty() {
            return Ok(());
        }
        for index in std::mem::take(&mut self.table.beyond) {
            write_all(self.file, &[0; 4], bat::offset_of(index))
                .ctx(Kind::Write, || format!("cannot write the BAT of {}", self.name.display()))?;
        }
        self.sync()
    }

    /// Makes the entries of these clusters name nothing, durably.
    pub fn clear(&mut self, clusters: &[VirtCluster]) -> Result<()> {
        if clusters.is_empty() {
            return Ok(());
        }
        let values: Vec<(VirtCluster, u32)> = clusters.iter().map(|cluster| (*cluster, 0)).collect();
        write_entries(self.file, &values)
            .ctx(Kind::Write, || format!("cannot write the BAT of {}", self.name.display()))?;
        self.sync()
    }

    /// Value of an entry that names this host cluster.
    fn value(&self, host_cluster: ImageCluster) -> Result<u32> {
        let (version, cluster) = (self.header.version, self.header.cluster);
        match bat::encode(version, cluster, host_cluster)
            .filter(|_| host_cluster < bat::host_cluster_limit(version, cluster))
        {
            Some(value) => Ok(value),
            None => bail!(
                Param,
                "image {}: version {} cannot name image cluster {host_cluster}",
                self.name.display(),
                version.number()
            ),
        }
    }

    /// Host clusters for so many new clusters exist. `Param`.
    pub fn check_room(&self, clusters: u64) -> Result<()> {
        let limit = u64::from(bat::host_cluster_limit(self.header.version, self.header.cluster));
        let end = u64::from(self.table.end) + clusters;
        if end > limit {
            bail!(
                Param,
                "image {} would need {end} clusters: version {} can name {limit}",
                self.name.display(),
                self.header.version.number()
            );
        }
        Ok(())
    }

    /// Allocates at least one and at most so many clusters in a row: unused ones inside the file first.
    pub fn allocate(&mut self, wanted: u32) -> Result<Range<ImageCluster>> {
        if let Some(gap) = self.table.free.last_mut() {
            let end = gap.end.min(gap.start.saturating_add(wanted));
            let out = gap.start..end;
            gap.start = end;
            if gap.start >= gap.end {
                self.table.free.pop();
            }
            return Ok(out);
        }
        self.check_room(u64::from(wanted))?;
        let out = self.table.end..self.table.end + wanted;
        self.table.end = out.end;
        Ok(out)
    }

    /// Cuts the file behind the last cluster in use, completes, syncs, and clears the mark unless `stay_marked`.
    pub fn close(&mut self, stay_marked: bool) -> Result<()> {
        let name = self.name.display().to_string();
        let end = u64::from(self.table.end) * self.cluster().bytes();
        let len = self.file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {name}"))?.len();
        if len > end {
            // No entry on disk may name what is cut.
            self.sync()?;
            store::set_len(self.file, end)
                .ctx(Kind::Ftruncate, || format!("cannot cut image {name} to {end} bytes"))?;
        }
        // Completing only serves other programs' checks.
        if let Err(e) = complete::complete(self.file, self.cluster(), end) {
            report::warn(format_args!("image {name} stays sparse: {e}"));
        }
        store::sync_all(self.file).ctx(Kind::Fsync, || format!("cannot sync image {name}"))?;
        if stay_marked {
            return Ok(());
        }
        let empty = if self.table.end == self.header.first_data() { header::FLAG_EMPTY } else { 0 };
        let flags = self.header.flags & !header::FLAG_EMPTY | empty;
        self.write_header(&Header { in_use: 0, flags, extension: 0, ..self.header })
    }

    /// Closes an image in the middle of an operation: clusters that are not published are dropped.
    pub fn close_as_it_is(&mut self) -> Result<()> {
        self.reread()?;
        self.close(false)
    }

    /// Header and table as they are in the file.
    pub fn reread(&mut self) -> Result<()> {
        (self.header, self.table) = read_table(self.file, &self.name)?;
        Ok(())
    }

    /// Version and cluster size must be those of another image of the chain.
    pub fn check_like(&self, other: &Header, other_name: &Path) -> Result<()> {
        check_alike(&self.header, &self.name, other, other_name)
    }
}

/// Images of a chain have one cluster size and one version. `Format`.
pub fn check_alike(a: &Header, a_name: &Path, b: &Header, b_name: &Path) -> Result<()> {
    let number = Version::number;
    if a.cluster != b.cluster {
        bail!(
            Format,
            "image {} has clusters of {} sectors, {} of {}: only images with the same can be merged",
            a_name.display(),
            a.cluster.sectors(),
            b_name.display(),
            b.cluster.sectors()
        );
    }
    if a.version != b.version {
        bail!(
            Format,
            "image {} has format version {}, {} has {}: only images of the same version can be merged",
            a_name.display(),
            number(a.version),
            b_name.display(),
            number(b.version)
        );
    }
    Ok(())
}

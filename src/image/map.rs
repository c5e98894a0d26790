//! Where the clusters of a chain are, of images that a worker may be writing to. They are counted in parts of the disk
//! and of each file while the tables are read; of each cluster that has a place one bit is kept.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::format::header::{self, Header};
use crate::report::cancel;
use crate::sys::aligned::read_full;
use crate::sys::fiemap;
use crate::units::{ClusterSize, ImageCluster, VirtCluster};

use super::live;
use super::scan::{Found, HostClusters, Problem, Visitor, scan};

/// An image of the chain, open for reading.
#[derive(Debug)]
pub struct Source {
    pub file: File,
    /// For messages.
    pub name: PathBuf,
    pub raw: bool,
}

/// What an image has.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Level {
    pub level: usize,
    pub raw: bool,
    pub file_bytes: u64,
    /// Clusters of the disk that have a place in this image.
    pub allocated: u64,
    /// Those of them that no image above has.
    pub visible: u64,
    /// Those that an image above has, too.
    pub shadowed: u64,
    /// Clusters of the file that are neither table nor data.
    pub free: u64,
    /// Runs of clusters that follow each other in the disk and in the file.
    pub extents: u64,
    /// Clusters in such a run, on average.
    pub mean_run: f64,
    /// What is wrong with its table; empty: nothing.
    pub damage: String,
    /// Parts of the file, of equal length: clusters that are in use there.
    pub file_parts: Vec<u64>,
    /// Clusters of the file.
    pub file_clusters: u64,
}

/// A part of the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Part {
    pub clusters: u64,
    /// Clusters that have a place in the chain.
    pub allocated: u64,
    /// The level that most of them are read from; of equal ones the highest.
    pub level: Option<usize>,
    #[serde(skip)]
    most: u64,
}

/// Where the clusters of a chain are.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Map {
    pub cluster_bytes: u64,
    /// Clusters of the disk.
    pub clusters: u64,
    /// Base first.
    pub levels: Vec<Level>,
    pub parts: Vec<Part>,
}

impl Map {
    /// Clusters of the disk that have a place in the chain.
    pub fn allocated(&self) -> u64 {
        self.levels.iter().map(|l| l.visible).sum()
    }

    pub fn shadowed(&self) -> u64 {
        self.levels.iter().map(|l| l.shadowed).sum()
    }

    pub fn free(&self) -> u64 {
        self.levels.iter().map(|l| l.free).sum()
    }

    /// Levels whose table is damaged.
    pub fn damaged(&self) -> usize {
        self.levels.iter().filter(|l| !l.damage.is_empty()).count()
    }
}

/// Into how many parts disk and files are divided, if they have as many clusters.
#[derive(Clone, Copy, Debug)]
pub struct Parts {
    pub disk: usize,
    pub file: usize,
}

/// Maps a chain, base first. `raw_cluster`: of a chain that is one raw image.
pub fn map(chain: &[Source], raw_cluster: ClusterSize, parts: Parts) -> Result<Map> {
    let Some(top) = chain.last() else { bail!(Param, "a chain without images: needs at least one") };
    let headers = chain.iter().map(|s| if s.raw { Ok(None) } else { head(s).map(Some) }).collect::<Result<Vec<_>>>()?;
    let top_header = headers.last().copied().flatten();
    let cluster = top_header.map_or(raw_cluster, |h| h.cluster);
    let clusters = match top_header {
        Some(header) => u64::from(header.clusters()),
        None => length(top)?.div_ceil(cluster.bytes()),
    };
    if let Some(at) = headers.iter().position(|h| h.is_some_and(|h| h.cluster != cluster)) {
        let other = headers.get(at).copied().flatten().map_or(0, |h| h.cluster.sectors());
        bail!(
            Format,
            "image {} has clusters of {other} sectors, and {} of {}; all images of a chain must have one size",
            chain.get(at).map_or(Path::new(""), |s| &s.name).display(),
            top.name.display(),
            cluster.sectors()
        );
    }
    let mut work = Work {
        cluster,
        seen: HostClusters::default(),
        grid: Grid { clusters, parts: parts.disk.clamp(1, usize::try_from(clusters.max(1)).unwrap_or(usize::MAX)) },
        disk: Vec::new(),
        file_parts: parts.file.max(1),
    };
    work.disk = work.grid.ranges().map(|r| Part { clusters: r.end - r.start, ..Part::default() }).collect();
    let mut levels = Vec::with_capacity(chain.len());
    for (n, (source, header)) in chain.iter().zip(&headers).enumerate().rev() {
        if cancel::requested() {
            bail!(Abort, "the map of {} was cancelled", top.name.display());
        }
        levels.push(work.level(n, source, header.as_ref())?);
    }
    levels.reverse();
    Ok(Map { cluster_bytes: cluster.bytes(), clusters, levels, parts: work.disk })
}

fn head(source: &Source) -> Result<Header> {
    let shown = source.name.display();
    let named = |e: crate::error::Error| e.context(format_args!("image {shown}"));
    let mut head = [0; header::SIZE];
    let got = read_full(&source.file, &mut head, 0).ctx(Kind::Read, || format!("cannot read image {shown}"))?;
    if got < head.len() {
        bail!(Open, "image {shown} has {got} bytes: the header of a ploop image has {}", head.len());
    }
    let header = Header::parse(&head).map_err(named)?;
    header.check_layout().map_err(named)?;
    Ok(header)
}

fn length(source: &Source) -> Result<u64> {
    Ok(source.file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {}", source.name.display()))?.len())
}

/// Clusters in parts of equal length.
#[derive(Clone, Copy)]
struct Grid {
    clusters: u64,
    parts: usize,
}

impl Grid {
    fn part(&self, cluster: u64) -> usize {
        let at = u128::from(cluster) * self.parts as u128 / u128::from(self.clusters.max(1));
        usize::try_from(at).unwrap_or(usize::MAX).min(self.parts.saturating_sub(1))
    }

    /// The clusters of each part: those that [`part`](Self::part) puts there.
    fn ranges(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let Grid { clusters, parts } = *self;
        let first = move |n: usize| {
            let at = (n as u128 * u128::from(clusters)).div_ceil(parts.max(1) as u128);
            u64::try_from(at).unwrap_or(clusters).min(clusters)
        };
        (0..parts).map(move |n| first(n)..first(n + 1))
    }
}

struct Work {
    cluster: ClusterSize,
    /// Clusters of the disk that the levels above have.
    seen: HostClusters,
    grid: Grid,
    disk: Vec<Part>,
    file_parts: usize,
}

impl Work {
    fn level(&mut self, n: usize, source: &Source, header: Option<&Header>) -> Result<Level> {
        let bytes = length(source)?;
        let file_clusters = bytes / self.cluster.bytes();
        let parts = self.file_parts.min(usize::try_from(file_clusters.max(1)).unwrap_or(usize::MAX));
        let file = Grid { clusters: file_clusters, parts };
        let mut counts = Counts {
            work: self,
            file,
            out: Level { level: n, raw: source.raw, file_bytes: bytes, file_clusters, ..Level::default() },
            here: Vec::new(),
            last: None,
            problems: 0,
        };
        counts.out.file_parts = vec![0; parts];
        counts.here = vec![0; counts.work.disk.len()];
        match header {
            Some(header) => counts.image(source, header, bytes)?,
            None => counts.raw(source, bytes)?,
        }
        let Counts { mut out, here, .. } = counts;
        out.shadowed = out.allocated - out.visible;
        out.mean_run = if out.extents == 0 { 0.0 } else { out.allocated as f64 / out.extents as f64 };
        for (part, count) in self.disk.iter_mut().zip(here).filter(|(_, count)| *count > 0) {
            part.allocated += count;
            if count > part.most {
                (part.most, part.level) = (count, Some(n));
            }
        }
        Ok(out)
    }
}

struct Counts<'a> {
    work: &'a mut Work,
    file: Grid,
    out: Level,
    /// Clusters read from this level, in each part of the disk.
    here: Vec<u64>,
    last: Option<(VirtCluster, ImageCluster)>,
    problems: u64,
}

impl Counts<'_> {
    fn image(&mut self, source: &Source, header: &Header, bytes: u64) -> Result<()> {
        let shown = source.name.display();
        scan(&source.file, header, bytes, self).map_err(|e| e.context(format_args!("image {shown}")))?;
        let taken = u64::from(header.first_data()) + self.out.allocated;
        self.out.free = self.file.clusters.saturating_sub(taken);
        for table in 0..u64::from(header.first_data()).min(self.file.clusters) {
            self.in_file(table);
        }
        if self.problems > 0
            && let Err(e) = live::look_at(&source.file, &source.name)
        {
            if e.kind() != Kind::Format {
                return Err(e);
            }
            self.out.damage = e.to_string();
        }
        Ok(())
    }

    /// Clusters of a raw image are those that have data in its file.
    fn raw(&mut self, source: &Source, bytes: u64) -> Result<()> {
        let size = self.work.cluster.bytes();
        let mut next = 0;
        fiemap::each_data(&source.file, 0, bytes, &mut |start, end| {
            for cluster in (start / size).max(next)..end.div_ceil(size) {
                let Ok(cluster) = u32::try_from(cluster) else { break };
                self.entry(cluster, cluster);
            }
            next = end.div_ceil(size);
            Ok(())
        })
        .ctx(Kind::Read, || format!("cannot ask where {} has data", source.name.display()))
    }

    fn in_file(&mut self, cluster: u64) {
        let part = self.file.part(cluster);
        if let Some(count) = self.out.file_parts.get_mut(part) {
            *count += 1;
        }
    }
}

impl Visitor for Counts<'_> {
    fn entry(&mut self, cluster: VirtCluster, host_cluster: ImageCluster) {
        self.out.allocated += 1;
        let follows =
            self.last.is_some_and(|(c, h)| c.checked_add(1) == Some(cluster) && h.checked_add(1) == Some(host_cluster));
        self.out.extents += u64::from(!follows);
        self.last = Some((cluster, host_cluster));
        self.in_file(u64::from(host_cluster));
        if self.work.seen.insert(cluster) {
            self.out.visible += 1;
            let part = self.work.grid.part(u64::from(cluster));
            if let Some(count) = self.here.get_mut(part) {
                *count += 1;
            }
        }
    }

    fn problem(&mut self, _: Found, _: Problem) -> Result<()> {
        self.problems += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::bat;
    use crate::format::header::Version;
    use crate::image::create::create_delta;
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt;

    const PARTS: Parts = Parts { disk: 4, file: 4 };

    fn small() -> ClusterSize {
        ClusterSize::from_sectors(64).unwrap()
    }

    /// An image of `clusters` whose file has so many data clusters, with these entries.
    fn image(dir: &Path, name: &str, clusters: u64, data: u64, entries: &[(u32, u32)]) -> Source {
        let path = dir.join(name);
        create_delta(&path, Version::V2, small(), clusters * 64).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        file.set_len(file.metadata().unwrap().len() + data * small().bytes()).unwrap();
        for (cluster, place) in entries {
            file.write_all_at(&place.to_le_bytes(), bat::offset_of(u64::from(*cluster))).unwrap();
        }
        Source { file, name: path, raw: false }
    }

    #[test]
    fn clusters_are_counted_by_level_extent_and_part() {
        let dir = tempfile::tempdir().unwrap();
        let base = image(dir.path(), "base", 100, 6, &[(0, 1), (1, 2), (2, 3), (50, 5), (99, 6)]);
        let top = image(dir.path(), "top", 100, 3, &[(1, 3), (2, 2), (75, 1)]);
        let map = map(&[base, top], small(), PARTS).unwrap();
        let of = |l: &Level| (l.allocated, l.visible, l.shadowed, l.free, l.extents, l.file_parts.clone());
        assert_eq!(of(&map.levels[0]), (5, 3, 2, 1, 3, vec![2, 2, 1, 1]));
        assert_eq!(of(&map.levels[1]), (3, 3, 0, 0, 3, vec![1; 4]));
        assert_eq!((map.clusters, map.allocated(), map.shadowed(), map.free(), map.damaged()), (100, 6, 2, 1, 0));
        let parts: Vec<_> = map.parts.iter().map(|p| (p.clusters, p.allocated, p.level)).collect();
        assert_eq!(parts, [(25, 3, Some(1)), (25, 0, None), (25, 1, Some(0)), (25, 2, Some(1))]);
        assert!((map.levels[0].mean_run - 5.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn a_raw_base_has_the_clusters_that_its_file_has() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raw");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        file.set_len(100 * small().bytes()).unwrap();
        file.write_all_at(&vec![7; 2 * small().bytes() as usize], 0).unwrap();
        file.write_all_at(&[7; 10], 90 * small().bytes() + 5000).unwrap();
        let top = image(dir.path(), "top", 100, 1, &[(1, 1)]);
        let map = map(&[Source { file, name: path, raw: true }, top], small(), PARTS).unwrap();
        let base = &map.levels[0];
        assert_eq!((base.allocated, base.visible, base.shadowed, base.free, base.extents), (3, 2, 1, 0, 2));
    }

    #[test]
    fn damage_is_named_and_the_rest_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let bad = image(dir.path(), "bad", 100, 2, &[(0, 1), (1, 1), (2, 77), (3, 2)]);
        let map = map(&[bad], small(), PARTS).unwrap();
        assert_eq!((map.levels[0].allocated, map.damaged()), (2, 1));
        let text = &map.levels[0].damage;
        assert!(text.contains("cluster 1 ") && text.contains("cluster 2 "), "{text}");
    }

    #[test]
    fn what_is_no_image_or_of_another_chain_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8]| {
            std::fs::write(dir.path().join(name), bytes).unwrap();
            Source { file: File::open(dir.path().join(name)).unwrap(), name: name.into(), raw: false }
        };
        let kind = |s: Source| map(&[s], small(), PARTS).unwrap_err().kind();
        assert_eq!(kind(file("empty", b"")), Kind::Open);
        assert_eq!(kind(file("zeroes", &[0; 4096])), Kind::Format);
        let whole = image(dir.path(), "whole", 100_000, 0, &[]);
        whole.file.set_len(5000).unwrap();
        assert_eq!(kind(whole), Kind::Format);
        let path = dir.path().join("large");
        create_delta(&path, Version::V2, ClusterSize::DEFAULT, 204800).unwrap();
        let base = Source { file: File::open(&path).unwrap(), name: path, raw: false };
        let e = map(&[base, image(dir.path(), "top", 100, 0, &[])], small(), PARTS).unwrap_err();
        assert!(e.kind() == Kind::Format && e.to_string().contains("2048 sectors"), "{e}");
    }

    #[test]
    fn sixteen_tebibytes_in_parts() {
        let dir = tempfile::tempdir().unwrap();
        let clusters = (16 << 40) / small().bytes();
        let path = dir.path().join("large");
        let header = Header::new(Version::V2, small(), clusters * 64).unwrap();
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        let table = u64::from(header.first_data());
        file.set_len((table + 2) * small().bytes()).unwrap();
        file.write_all_at(&header.encode(), 0).unwrap();
        for (cluster, place) in [(0, table), (clusters - 1, table + 1)] {
            file.write_all_at(&(place as u32).to_le_bytes(), bat::offset_of(cluster)).unwrap();
        }
        let chain: Vec<Source> =
            (0..127).map(|_| Source { file: file.try_clone().unwrap(), name: path.clone(), raw: false }).collect();
        let map = map(&chain, small(), Parts { disk: 1000, file: 8 }).unwrap();
        assert_eq!((map.allocated(), map.shadowed(), map.parts.len()), (2, 252, 1000));
        assert_eq!(map.parts.iter().map(|p| p.clusters).sum::<u64>(), clusters);
        assert_eq!((map.parts[0].level, map.parts[999].level), (Some(126), Some(126)));
    }
}

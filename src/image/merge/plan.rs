//! The plan of a merge: runs of clusters that can be moved in one piece, with source and target.

use std::fs::File;
use std::ops::Range;

use crate::error::{IoContext, Kind, Result};
use crate::image::target::Entries;
use crate::sys::fiemap::each_data;
use crate::units::{ClusterSize, ImageCluster, VirtCluster};

/// Neighbouring clusters of the disk that stand side by side in one source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// First cluster of the disk.
    pub cluster: VirtCluster,
    pub count: u32,
    /// Index of the source, and where the first cluster stands in it.
    pub source: usize,
    pub from: ImageCluster,
    pub to: Destination,
    /// A hole of the source: reads as zero without being read.
    pub hole: bool,
    /// Zeroes must be written, because an image below has the cluster.
    pub shadows: bool,
}

/// Where a run goes in the target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Destination {
    /// The target has these clusters, side by side from here on.
    Own(ImageCluster),
    /// The target lacks them.
    New,
    /// The target is raw.
    Raw,
}

/// All runs, ascending by cluster.
#[derive(Debug, Default)]
pub struct Plan {
    pub extents: Vec<Extent>,
    /// Of all runs.
    pub bytes: u64,
    /// Clusters that the target may have to get room for.
    pub new: u64,
}

/// Walks along a sorted table.
struct Cursor<'a> {
    entries: &'a [(VirtCluster, ImageCluster)],
    at: usize,
}

impl Cursor<'_> {
    fn peek(&self) -> Option<(VirtCluster, ImageCluster)> {
        self.entries.get(self.at).copied()
    }

    /// The entry of this cluster; clusters are asked for in ascending order.
    fn find(&mut self, cluster: VirtCluster) -> Option<ImageCluster> {
        while self.peek().is_some_and(|(c, _)| c < cluster) {
            self.at += 1;
        }
        self.peek().filter(|(c, _)| *c == cluster).map(|(_, host_cluster)| host_cluster)
    }
}

impl Plan {
    /// `own`: the target's table, none if it is raw; `below`: what images below the target have, none if unknown.
    pub fn new(
        sources: &[&Entries],
        files: &[&File],
        own: Option<&Entries>,
        below: Option<&Entries>,
        cluster: ClusterSize,
    ) -> Result<Plan> {
        let mut cursors: Vec<Cursor<'_>> = sources.iter().map(|e| Cursor { entries: e, at: 0 }).collect();
        let mut own_at = own.map(|e| Cursor { entries: e, at: 0 });
        let mut below_at = below.map(|e| Cursor { entries: e, at: 0 });
        let mut holes = Vec::with_capacity(files.len());
        for file in files {
            holes.push(Data::of(file, cluster)?);
        }
        let mut plan = Plan::default();
        // The lowest cluster that any source has next; of several the topmost source supplies it.
        while let Some(next) = cursors.iter().filter_map(|c| c.peek().map(|(cluster, _)| cluster)).min() {
            let mut supplier = None;
            for (index, cursor) in cursors.iter_mut().enumerate() {
                if let Some((at, host_cluster)) = cursor.peek().filter(|(c, _)| *c == next) {
                    supplier = supplier.or(Some((index, host_cluster)));
                    cursor.at += 1;
                    debug_assert_eq!(at, next);
                }
            }
            let Some((source, from)) = supplier else { break };
            let to = match &mut own_at {
                None => Destination::Raw,
                Some(own) => own.find(next).map_or(Destination::New, Destination::Own),
            };
            let hole = holes.get(source).is_some_and(|d| d.is_hole(from));
            plan.push(Extent {
                cluster: next,
                count: 1,
                source,
                from,
                to,
                hole,
                shadows: to != Destination::New || below_at.as_mut().is_none_or(|b| b.find(next).is_some()),
            });
        }
        if own.is_none() {
            // Into a raw image the order does not matter: the sources are read as they lie, for the host's readahead.
            plan.extents.sort_by_key(|e| (e.source, e.from));
        }
        plan.bytes = plan.extents.iter().map(|r| u64::from(r.count) * cluster.bytes()).sum();
        let new = plan.extents.iter().filter(|r| r.needs_room());
        plan.new = new.map(|r| u64::from(r.count)).sum();
        Ok(plan)
    }

    fn push(&mut self, next: Extent) {
        if let Some(last) = self.extents.last_mut()
            && last.continued_by(&next)
        {
            last.count += 1;
        } else {
            self.extents.push(next);
        }
    }
}

impl Extent {
    fn continued_by(&self, next: &Extent) -> bool {
        let n = self.count;
        self.cluster.checked_add(n) == Some(next.cluster)
            && self.source == next.source
            && self.from.checked_add(n) == Some(next.from)
            && self.hole == next.hole
            && self.shadows == next.shadows
            && match (self.to, next.to) {
                (Destination::Own(a), Destination::Own(b)) => a.checked_add(n) == Some(b),
                (a, b) => a == b,
            }
    }

    /// The target has to get room for it, as far as is known without reading.
    pub fn needs_room(&self) -> bool {
        self.to == Destination::New && (self.shadows || !self.hole)
    }

    /// The part of at most `most` clusters from `skip` on.
    pub fn part(&self, skip: u32, most: u32) -> Extent {
        let to = match self.to {
            Destination::Own(host_cluster) => Destination::Own(host_cluster.saturating_add(skip)),
            other => other,
        };
        Extent {
            cluster: self.cluster + skip,
            from: self.from + skip,
            count: (self.count - skip).min(most),
            to,
            ..*self
        }
    }
}

/// Where a file has data, in clusters, rounded outwards.
struct Data {
    ranges: Vec<Range<u64>>,
}

impl Data {
    fn of(file: &File, cluster: ClusterSize) -> Result<Data> {
        let len = file.metadata().ctx(Kind::Fstat, || "cannot look at a source")?.len();
        let size = cluster.bytes();
        let mut ranges: Vec<Range<u64>> = Vec::new();
        each_data(file, 0, len, &mut |start, end| {
            let (start, end) = (start / size, end.div_ceil(size));
            match ranges.last_mut() {
                Some(last) if last.end >= start => last.end = last.end.max(end),
                _ => ranges.push(start..end),
            }
            Ok(())
        })
        .ctx(Kind::Read, || "cannot find the data of a source")?;
        Ok(Data { ranges })
    }

    fn is_hole(&self, host_cluster: ImageCluster) -> bool {
        let host_cluster = u64::from(host_cluster);
        let at = self.ranges.partition_point(|r| r.end <= host_cluster);
        self.ranges.get(at).is_none_or(|r| r.start > host_cluster)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_topmost_source_supplies_and_neighbours_join() {
        let top: Entries = vec![(1, 10), (2, 11), (5, 12)];
        let low: Entries = vec![(2, 20), (3, 21), (4, 22), (5, 23), (9, 24)];
        let own: Entries = vec![(3, 7), (4, 8), (9, 2)];
        let below: Entries = vec![(1, 1), (2, 1)];
        let file = tempfile::tempfile().unwrap();
        let cluster = ClusterSize::from_sectors(64).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![1; 32 << 15], 0).unwrap();
        let plan = Plan::new(&[&top, &low], &[&file, &file], Some(&own), Some(&below), cluster).unwrap();
        let seen: Vec<_> =
            plan.extents.iter().map(|r| (r.cluster, r.count, r.source, r.from, r.to, r.shadows)).collect();
        assert_eq!(
            seen,
            [
                (1, 2, 0, 10, Destination::New, true),
                (3, 2, 1, 21, Destination::Own(7), true),
                (5, 1, 0, 12, Destination::New, false),
                (9, 1, 1, 24, Destination::Own(2), true),
            ]
        );
        assert_eq!((plan.bytes, plan.new), (6 << 15, 3));
        assert_eq!(
            plan.extents[1].part(1, 5),
            Extent { cluster: 4, from: 22, count: 1, to: Destination::Own(8), ..plan.extents[1] }
        );
    }
}

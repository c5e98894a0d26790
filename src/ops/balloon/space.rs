//! The clusters of the image on which a balloon lies, and giving them back.

use std::fs::File;

use crate::bail;
use crate::device::{self, Device, Piece};
use crate::error::{IoContext, Kind, Result};
use crate::fs::balloon::Balloon;
use crate::image::allocated::allocated;
use crate::report;
use crate::report::progress::Progress;
use crate::sys::fiemap;
use crate::sys::reopen::{Access, reopen};
use crate::units::VirtCluster;

/// So much is discarded while the file system is frozen: in as many bytes of the disk, and ranges of it.
const BATCH_BYTES: u64 = 1 << 30;
const BATCH_RANGES: usize = 1024;

/// An unwritten extent of the balloon.
#[derive(Clone, Copy, Debug)]
struct Held {
    /// Bytes of the disk.
    start: u64,
    end: u64,
    /// Byte of the balloon.
    logical: u64,
}

/// What the top image keeps for a balloon.
#[derive(Debug)]
pub struct Space<'a> {
    device: &'a Device,
    balloon: &'a Balloon,
    partition: u64,
    cluster: u64,
    held: Vec<Held>,
    /// Clusters that lie in the balloon as a whole and that the top has, and no level below it.
    clusters: Vec<VirtCluster>,
}

impl<'a> Space<'a> {
    /// Looks at the whole balloon. What other processes do to the file meanwhile makes the result out of date: it says what
    /// may be given back, not what will be.
    pub fn of(device: &'a Device, balloon: &'a Balloon) -> Result<Space<'a>> {
        let partition = partition_start(device, balloon)?;
        let cluster = device.cluster()?.bytes();
        let size = balloon.size()?;
        let mut held = Vec::new();
        let mut others = 0;
        let mapped = fiemap::each_placed(&balloon.file, 0, size, &mut |placed| {
            match placed.at.filter(|_| placed.extent.unwritten) {
                Some(at) => {
                    let start = at.saturating_add(partition);
                    let end = start.saturating_add(placed.extent.len);
                    held.push(Held { start, end, logical: placed.extent.start });
                }
                None => others += placed.extent.len,
            }
            Ok(())
        });
        mapped.ctx(Kind::DevIoc, || format!("cannot map the blocks of {}", balloon.path().display()))?;
        if others > 0 {
            report::say(
                0,
                format_args!("{others} bytes of {} were written to: they are not given back", balloon.path().display()),
            );
        }
        held.sort_unstable_by_key(|h| h.start);
        let candidates = whole_clusters(&held, cluster);
        let clusters = only_in_top(device, candidates)?;
        Ok(Space { device, balloon, partition, cluster, held, clusters })
    }

    /// Clusters that can be given back.
    pub fn clusters(&self) -> u64 {
        self.clusters.len() as u64
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        self.cluster
    }

    /// Has the image give the clusters up, as far as the balloon still lies on them. How many bytes that were.
    pub fn give_back(&self) -> Result<u64> {
        if self.clusters.is_empty() {
            return Ok(0);
        }
        // Of a description of its own: the lock ends with this process, and not only with the helper.
        let shown = || format!("cannot open {} again", self.balloon.path().display());
        let (file, _) = reopen(&self.balloon.file, Access::default()).ctx(Kind::Open, shown)?;
        let mut discarder = device::discard_balloon(self.device, file)?;
        let mut shown = Progress::begin("giving the balloon's space back");
        let all = self.clusters() * self.cluster;
        let (mut seen, mut bytes) = (0, 0);
        for ranges in batches(&self.clusters, self.cluster) {
            if report::cancel::requested() {
                bail!(Abort, "giving the balloon's space back was cancelled: ploop balloon repair goes on with it");
            }
            self.check_chain()?;
            seen += ranges.iter().map(|r| r.1).sum::<u64>();
            bytes += discarder.discard(&self.piece(ranges))?;
            shown.at(seen, all);
        }
        // The clusters are reused only when the image does not name them any more, durably.
        flush(self.device)?;
        Ok(bytes)
    }

    /// After a snapshot the clusters are those of a lower level, and a discard would only make the new top larger.
    fn check_chain(&self) -> Result<()> {
        let now = device::by_node(self.device.name())?;
        if !now.is_some_and(|now| now.is_same(self.device) && now.ids() == self.device.ids()) {
            bail!(Busy, "the chain of {} was changed meanwhile", self.device.node().display());
        }
        Ok(())
    }

    /// With the part of the file that lies on these ranges.
    fn piece(&self, ranges: Vec<(u64, u64)>) -> Piece {
        let (mut start, mut end) = (u64::MAX, 0);
        let low = ranges.first().map_or(0, |r| r.0);
        let high = ranges.last().map_or(0, |r| r.0 + r.1);
        for held in self.held.iter().filter(|h| h.start < high && h.end > low) {
            start = start.min(held.logical);
            end = end.max(held.logical + (held.end - held.start));
        }
        Piece { start, end, partition: self.partition, cluster: self.cluster, ranges }
    }
}

/// Has the server write the image's table.
fn flush(device: &Device) -> Result<()> {
    let node = device.node();
    File::open(node).and_then(|disk| disk.sync_all()).ctx(Kind::Fsync, || format!("cannot flush {}", node.display()))
}

/// Byte of the disk at which the balloon's file system begins.
fn partition_start(device: &Device, balloon: &Balloon) -> Result<u64> {
    let (dev, _) = balloon.place()?;
    if dev == device.rdev {
        return Ok(0);
    }
    match device::partitions(device)?.iter().find(|p| p.rdev == dev) {
        Some(partition) => Ok(partition.start),
        None => bail!(Param, "{} does not lie on {}", balloon.path().display(), device.node().display()),
    }
}

/// The clusters of the disk that lie in these extents as a whole, ascending.
fn whole_clusters(held: &[Held], cluster: u64) -> Vec<VirtCluster> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for h in held {
        match joined.last_mut() {
            Some(last) if h.start <= last.1 => last.1 = last.1.max(h.end),
            _ => joined.push((h.start, h.end)),
        }
    }
    let whole = joined.iter().flat_map(|(start, end)| start.div_ceil(cluster)..end / cluster);
    whole.filter_map(|c| VirtCluster::try_from(c).ok()).collect()
}

/// Without the top's entry a cluster of a level below would be seen; such clusters stay.
fn only_in_top(device: &Device, candidates: Vec<VirtCluster>) -> Result<Vec<VirtCluster>> {
    if candidates.is_empty() {
        return Ok(candidates);
    }
    flush(device)?;
    let cluster = device.cluster()?.bytes();
    let of_level = |level: usize| {
        let Some(image) = device.images.get(level) else { bail!(Device, "{} has no level {level}", device.name()) };
        let file = device::open_image(device, level)?;
        if !image.raw {
            return allocated(&file, &image.path, &candidates);
        }
        let length = file.metadata().ctx(Kind::Fstat, || format!("cannot look at {}", image.path.display()))?.len();
        Ok(candidates.iter().copied().filter(|c| u64::from(*c) < length.div_ceil(cluster)).collect())
    };
    let top = device.images.len().saturating_sub(1);
    let mut found = of_level(top)?;
    for level in 0..top {
        let below = of_level(level)?;
        found.retain(|c| below.binary_search(c).is_err());
    }
    Ok(found)
}

/// Ranges of the disk, start and length in bytes, in groups.
fn batches(clusters: &[VirtCluster], cluster: u64) -> Vec<Vec<(u64, u64)>> {
    let mut all: Vec<Vec<(u64, u64)>> = Vec::new();
    let mut bytes = 0;
    for &c in clusters {
        let start = u64::from(c) * cluster;
        let full = bytes >= BATCH_BYTES || all.last().is_some_and(|b| b.len() >= BATCH_RANGES);
        if full || all.is_empty() {
            all.push(Vec::new());
            bytes = 0;
        }
        let Some(batch) = all.last_mut() else { break };
        match batch.last_mut() {
            Some(last) if last.0 + last.1 == start => last.1 += cluster,
            _ => batch.push((start, cluster)),
        }
        bytes += cluster;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_clusters_of_joined_extents() {
        let held = |start, end| Held { start, end, logical: 0 };
        assert_eq!(whole_clusters(&[held(5, 12), held(12, 31), held(40, 49)], 10), [1, 2]);
        assert_eq!(whole_clusters(&[held(10, 20), held(30, 50)], 10), [1, 3, 4]);
        assert!(whole_clusters(&[], 10).is_empty());
    }

    #[test]
    fn batches_have_all_clusters_once() {
        let cluster = 1 << 28;
        assert_eq!(batches(&[1, 2, 4], cluster), [vec![(1 << 28, 2 << 28), (4 << 28, 1 << 28)]]);
        let all: Vec<u32> = (0..10).collect();
        let got = batches(&all, cluster);
        assert_eq!(got.len(), 3);
        assert_eq!(got.iter().flatten().map(|r| r.1).sum::<u64>(), 10 << 28);
        assert_eq!(got[1], [(4 << 28, 4 << 28)]);
        let odd: Vec<u32> = (0..5000).step_by(2).collect();
        let got = batches(&odd, 1 << 15);
        assert!(got.len() == 3 && got.iter().all(|b| b.len() <= BATCH_RANGES));
        assert!(batches(&[], 1).is_empty());
    }
}

//! Moving clusters that lie far behind to the front of the file, so that it needs no more space than its disk.

use std::fs::File;
use std::path::Path;

use crate::error::Result;
use crate::format::header::Header;
use crate::units::{ImageCluster, VirtCluster};

use super::grow::copy;
use super::target::Target;

/// Clusters that are moved before their entries are published.
const BATCH: usize = 256;

/// Moves every cluster that lies beyond what a full disk needs to the lowest free cluster of the file, and cuts and closes
/// the image. Returns how many were moved, and the file's length. No other program uses the image. At every instant the
/// content is the same; an interrupted run leaves the image marked in use, and another one goes on.
pub fn pull_in(file: &File, name: &Path) -> Result<(u64, u64)> {
    let mut target = Target::open_sparse(file, name)?;
    target.mark()?;
    if target.header.first_data() > target.header.table_clusters() {
        // What lay between the BAT and the data is free.
        let first_data_sector = target.header.table_clusters() * target.cluster().sectors();
        target.write_header(&Header { first_data_sector, ..target.header })?;
    }
    let moved = moves(&target);
    for batch in moved.chunks(BATCH) {
        let size = target.cluster().bytes();
        for (_, from, to) in batch {
            copy(&target, u64::from(*from) * size, u64::from(*to) * size)?;
        }
        let mut entries: Vec<(VirtCluster, ImageCluster)> = batch.iter().map(|(c, _, to)| (*c, *to)).collect();
        entries.sort_unstable();
        target.publish(&entries)?;
    }
    target.reread()?;
    let end = u64::from(target.table.end) * target.cluster().bytes();
    target.close(false)?;
    Ok((moved.len() as u64, end))
}

/// Cluster, where it lies, where it goes.
fn moves(target: &Target<'_>) -> Vec<(VirtCluster, ImageCluster, ImageCluster)> {
    let first = target.header.first_data();
    let full = first.saturating_add(target.header.clusters());
    let mut used: Vec<ImageCluster> = target.table.entries.iter().map(|(_, at)| *at).collect();
    used.sort_unstable();
    let mut free = (first..full).filter(|at| used.binary_search(at).is_err());
    let far = target.table.entries.iter().filter(|(_, at)| *at >= full);
    far.filter_map(|(cluster, at)| free.next().map(|to| (*cluster, *at, to))).collect()
}

//! Making the file of an image shorter: clusters that hold zeroes are freed, clusters that lie behind move to the front.

use std::fs::File;
use std::path::Path;

use crate::error::{IoContext, Kind, Result};
use crate::format::header::Header;
use crate::sys::aligned::{AlignedBuf, read_exact};
use crate::sys::fiemap;
use crate::units::{ImageCluster, SECTOR, VirtCluster};

use super::grow::copy;
use super::target::Target;

/// Clusters that are moved before their entries are published.
const BATCH: usize = 256;
/// Bytes looked at first, which tell of most clusters that they are not zero, and at once from there on.
const PROBE: u64 = 4096;
const PIECE: u64 = 1 << 20;

/// What [`pack`] has done, in clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// They held zeroes.
    pub freed: u64,
    pub moved: u64,
}

/// Frees each cluster that holds nothing but zeroes and that no level below has (`below`), moves the clusters at the end of
/// the file to the lowest free places, and cuts and closes the image. No other program uses the image. At every instant
/// the content is the same; an interrupted run leaves the image marked in use, and another one goes on. `progress` gets
/// what is done and all there is to do, and ends the work by an error; the image is whole then.
pub fn pack(
    file: &File,
    name: &Path,
    below: &dyn Fn(VirtCluster) -> bool,
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<Packed> {
    let mut target = Target::open(file, name)?;
    target.mark()?;
    match pack_marked(&mut target, below, progress) {
        Ok(packed) => {
            target.reread()?;
            target.close(false)?;
            Ok(packed)
        }
        // What has reached the disk is not known: the mark stays.
        Err(e) if e.kind() == Kind::Fsync => Err(e),
        Err(e) => target.close_as_it_is().and(Err(e)),
    }
}

fn pack_marked(
    target: &mut Target<'_>,
    below: &dyn Fn(VirtCluster) -> bool,
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<Packed> {
    let total = target.table.entries.len() as u64;
    let mut zeroes = Vec::new();
    for (done, (cluster, at)) in target.table.entries.iter().enumerate() {
        progress(done as u64, total)?;
        if !below(*cluster) && is_zero(target, *at)? {
            zeroes.push(*cluster);
        }
    }
    target.clear_beyond()?;
    target.clear(&zeroes)?;
    // The places of these are free only from here on.
    target.reread()?;
    let used = target.table.entries.len() as u32;
    let moved = moves(target, target.header.first_data().saturating_add(used));
    for batch in moved.chunks(BATCH) {
        progress(total, total)?;
        move_clusters(target, batch)?;
    }
    Ok(Packed { freed: zeroes.len() as u64, moved: moved.len() as u64 })
}

/// Whether a cluster of the file holds nothing but zeroes; what the file system knows to be a hole is not read.
fn is_zero(target: &Target<'_>, at: ImageCluster) -> Result<bool> {
    let size = target.cluster().bytes();
    let (start, mut buf, mut zero) = (u64::from(at) * size, AlignedBuf::new(PIECE as usize), true);
    fiemap::each_data(target.file, start, start + size, &mut |from, end| {
        let (mut at, end) = (from / SECTOR * SECTOR, end.next_multiple_of(SECTOR).min(start + size));
        let begin = at;
        while zero && at < end {
            let most = if at == begin { PROBE } else { PIECE };
            let piece = buf.get_mut(..(end - at).min(most) as usize).unwrap_or_default();
            read_exact(target.file, piece, at)?;
            zero = piece.iter().all(|b| *b == 0);
            at += piece.len() as u64;
        }
        Ok(())
    })
    .ctx(Kind::Read, || format!("cannot read image {}", target.name.display()))?;
    Ok(zero)
}

/// Moves every cluster that lies beyond what a full disk needs to the lowest free cluster of the file, and cuts and closes
/// the image. Returns how many were moved, and the file's length. No other program uses the image. At every instant the
/// content is the same; an interrupted run leaves the image marked in use, and another one goes on.
pub fn pull_in(file: &File, name: &Path) -> Result<(u64, u64)> {
    let mut target = Target::open_sparse(file, name)?;
    target.mark()?;
    target.clear_beyond()?;
    if target.header.first_data() > target.header.table_clusters() {
        // What lay between the BAT and the data is free.
        let first_data_sector = target.header.table_clusters() * target.cluster().sectors();
        target.write_header(&Header { first_data_sector, ..target.header })?;
    }
    let full = target.header.first_data().saturating_add(target.header.clusters());
    let moved = moves(&target, full);
    for batch in moved.chunks(BATCH) {
        move_clusters(&mut target, batch)?;
    }
    target.reread()?;
    let end = u64::from(target.table.end) * target.cluster().bytes();
    target.close(false)?;
    Ok((moved.len() as u64, end))
}

/// Cluster, where it lies, where it goes.
type Move = (VirtCluster, ImageCluster, ImageCluster);

/// Copies, and then publishes the new places.
fn move_clusters(target: &mut Target<'_>, batch: &[Move]) -> Result<()> {
    let size = target.cluster().bytes();
    for (_, from, to) in batch {
        copy(target, u64::from(*from) * size, u64::from(*to) * size)?;
    }
    let mut entries: Vec<(VirtCluster, ImageCluster)> = batch.iter().map(|(c, _, to)| (*c, *to)).collect();
    entries.sort_unstable();
    target.publish(&entries)
}

/// Clusters from place `end` on, and free places before it.
fn moves(target: &Target<'_>, end: ImageCluster) -> Vec<Move> {
    let first = target.header.first_data();
    let mut used: Vec<ImageCluster> = target.table.entries.iter().map(|(_, at)| *at).collect();
    used.sort_unstable();
    let mut free = (first..end).filter(|at| used.binary_search(at).is_err());
    let far = target.table.entries.iter().filter(|(_, at)| *at >= end);
    far.filter_map(|(cluster, at)| free.next().map(|to| (*cluster, *at, to))).collect()
}

//! The block allocation table: the position and the meaning of a cluster's entry.
//!
//! The engine, the scans and the operations on closed images use this arithmetic of the BAT.

use std::ops::Range;

use crate::format::version::Version;
use crate::units::{ClusterSize, ImageCluster, VirtCluster};

/// Bytes of the header before the first entry.
pub const HEADER_BYTES: u64 = 64;

/// Bytes of an entry.
pub const ENTRY_BYTES: usize = 4;

/// The header takes the room of this many entries.
pub const HEADER_ENTRIES: u64 = HEADER_BYTES / ENTRY_BYTES as u64;

/// Entries in a page.
pub const ENTRIES: usize = 1024;

/// Bytes of a page: the unit in which a BAT is read and written. Page 0 begins with the header.
pub const PAGE_BYTES: usize = ENTRIES * ENTRY_BYTES;

/// Byte offset of a cluster's entry in the file.
pub fn entry_offset(cluster: VirtCluster) -> u64 {
    offset_of(u64::from(cluster))
}

/// Byte offset of an entry that may lie behind the last cluster that a disk can have.
pub fn offset_of(entry: u64) -> u64 {
    HEADER_BYTES + ENTRY_BYTES as u64 * entry
}

/// The page of the file with the cluster's entry.
pub fn page_of(cluster: VirtCluster) -> u32 {
    ((u64::from(cluster) + HEADER_ENTRIES) / ENTRIES as u64) as u32
}

/// The index in [`page_of`] of the cluster's entry.
pub fn index_of(cluster: VirtCluster) -> usize {
    ((u64::from(cluster) + HEADER_ENTRIES) % ENTRIES as u64) as usize
}

/// Number of pages with the entries of so many clusters.
pub fn pages_for(clusters: u64) -> usize {
    if clusters == 0 { 0 } else { (clusters + HEADER_ENTRIES).div_ceil(ENTRIES as u64) as usize }
}

/// Clusters whose entries are in a page (the end may lie beyond the disk).
pub fn clusters_of(page: u32) -> Range<u64> {
    let end = (u64::from(page) + 1) * ENTRIES as u64 - HEADER_ENTRIES;
    let start = (u64::from(page) * ENTRIES as u64).saturating_sub(HEADER_ENTRIES);
    start..end
}

/// The value at an index of a page; 0 beyond the end of a short one.
pub fn load(page: &[u8], index: usize) -> u32 {
    page.as_chunks().0.get(index).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// Stores a value at an index of a page.
pub fn store(page: &mut [u8], index: usize, value: u32) {
    if let Some(bytes) = page.as_chunks_mut().0.get_mut(index) {
        *bytes = value.to_le_bytes();
    }
}

/// First data cluster (`l1`) of an image with so many virtual clusters.
pub fn first_data(clusters: u64, cluster: ClusterSize) -> u64 {
    let bytes = (HEADER_BYTES + ENTRY_BYTES as u64 * clusters).next_multiple_of(512);
    bytes.div_ceil(cluster.bytes())
}

/// What an entry means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// Not in this image.
    Free,
    /// In this cluster of the file.
    At(ImageCluster),
    /// Version 1: not on a cluster's border.
    Misaligned,
}

/// What an entry counts: sectors in version 1, clusters in version 2.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unit {
    /// The difference between the entries of two neighbouring host clusters.
    step: u32,
}

impl Unit {
    pub fn new(version: Version, cluster: ClusterSize) -> Unit {
        Unit::of(version == Version::V1, cluster.shift())
    }

    /// The unit of version 1 or 2 and a cluster of `1 << cluster_shift` bytes.
    pub fn of(v1: bool, cluster_shift: u32) -> Unit {
        Unit { step: if v1 { 1 << (cluster_shift - 9) } else { 1 } }
    }

    pub fn decode(self, entry: u32) -> Entry {
        match entry {
            0 => Entry::Free,
            n if n.is_multiple_of(self.step) => Entry::At(n / self.step),
            _ => Entry::Misaligned,
        }
    }

    /// Decodes an entry of a file with data from `first_data` to `end`: 0 if the cluster is not in this image, `None`
    /// if the entry is damaged.
    pub fn decode_within(self, entry: u32, first_data: ImageCluster, end: ImageCluster) -> Option<ImageCluster> {
        match self.decode(entry) {
            Entry::Free => Some(0),
            Entry::At(host_cluster) if (first_data..end).contains(&host_cluster) => Some(host_cluster),
            _ => None,
        }
    }

    /// The entry of a cluster that is at `host_cluster`, 0 for 0; none if version 1 cannot express it.
    pub fn encode(self, host_cluster: ImageCluster) -> Option<u32> {
        host_cluster.checked_mul(self.step)
    }

    /// The entry for a host cluster below [`host_cluster_limit`](Self::host_cluster_limit).
    pub fn entry(self, host_cluster: ImageCluster) -> u32 {
        host_cluster * self.step
    }

    /// No image cluster at or beyond this can be named by an entry.
    pub fn host_cluster_limit(self) -> u32 {
        match self.step {
            1 => u32::MAX,
            step => ((1u64 << 32) / u64::from(step)) as u32,
        }
    }
}

/// Decodes an entry.
pub fn decode(version: Version, cluster: ClusterSize, entry: u32) -> Entry {
    Unit::new(version, cluster).decode(entry)
}

/// The entry of a cluster that is at `host_cluster`; none if version 1 cannot express it.
pub fn encode(version: Version, cluster: ClusterSize, host_cluster: ImageCluster) -> Option<u32> {
    Unit::new(version, cluster).encode(host_cluster)
}

/// No image cluster at or beyond this can be named by an entry.
pub fn host_cluster_limit(version: Version, cluster: ClusterSize) -> u32 {
    Unit::new(version, cluster).host_cluster_limit()
}

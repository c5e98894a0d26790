//! The block allocation table: where the entry of a cluster stands, and what it says.

use crate::format::header::Version;
use crate::units::{ClusterSize, ImageCluster, VirtCluster};

/// Bytes of the header before the first entry.
pub const HEADER_BYTES: u64 = 64;

/// The same in slots of the table's u32 array.
pub const HEADER_SLOTS: u64 = 16;

/// Slots in a page of 4096 bytes.
pub const PAGE_SLOTS: u64 = 1024;

/// Entries in a page, as a length.
pub const ENTRIES: usize = PAGE_SLOTS as usize;

/// Byte offset of a cluster's entry in the file.
pub fn entry_offset(cluster: VirtCluster) -> u64 {
    HEADER_BYTES + 4 * u64::from(cluster)
}

/// The 4096-byte page of the file with the cluster's entry.
pub fn page_of(cluster: VirtCluster) -> u32 {
    ((u64::from(cluster) + HEADER_SLOTS) / PAGE_SLOTS) as u32
}

/// The index in [`page_of`] of the cluster's entry.
pub fn index_of(cluster: VirtCluster) -> usize {
    ((u64::from(cluster) + HEADER_SLOTS) % PAGE_SLOTS) as usize
}

/// First data cluster (`l1`) of an image with so many virtual clusters.
pub fn first_data(clusters: u64, cluster: ClusterSize) -> u64 {
    let bytes = (HEADER_BYTES + 4 * clusters).next_multiple_of(512);
    bytes.div_ceil(cluster.bytes())
}

/// Clusters whose entries stand in a page (the end may lie beyond the disk).
pub fn clusters_of(page: u32) -> std::ops::Range<u64> {
    let end = (u64::from(page) + 1) * PAGE_SLOTS - HEADER_SLOTS;
    let start = (u64::from(page) * PAGE_SLOTS).saturating_sub(HEADER_SLOTS);
    start..end
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

/// Decodes an entry.
pub fn decode(version: Version, cluster: ClusterSize, entry: u32) -> Entry {
    match (entry, version) {
        (0, _) => Entry::Free,
        (n, Version::V2) => Entry::At(n),
        (n, Version::V1) if n % cluster.sectors() == 0 => Entry::At(n / cluster.sectors()),
        _ => Entry::Misaligned,
    }
}

/// The entry of a cluster that stands at `place`; none if version 1 cannot express it.
pub fn encode(version: Version, cluster: ClusterSize, place: ImageCluster) -> Option<u32> {
    match version {
        Version::V1 => place.checked_mul(cluster.sectors()),
        Version::V2 => Some(place),
    }
}

/// No image cluster at or beyond this can be named by an entry.
pub fn place_limit(version: Version, cluster: ClusterSize) -> u32 {
    match version {
        Version::V1 => ((1u64 << 32) / u64::from(cluster.sectors())) as u32,
        Version::V2 => u32::MAX,
    }
}

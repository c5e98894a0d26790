//! Images written and read by the format's rules alone, with nothing of the library.

use std::collections::BTreeMap;

pub const SIGNATURES: [&[u8; 16]; 2] = [b"WithoutFreeSpace", b"WithouFreSpacExt"];
pub const IN_USE: u32 = 0x746F_6E59;
pub const CLOSED_21: u32 = 0x312e_3276;
pub const MAGIC: u64 = 0xAB23_4CEF_23DC_EA87;

/// An image file in memory, sound until something damages it.
#[derive(Clone)]
pub struct Image {
    pub bytes: Vec<u8>,
    pub version: u32,
    /// Sectors of a cluster.
    pub bs: u32,
    pub clusters: u32,
    /// Clusters of header and BAT.
    pub l1: u32,
    /// Clusters of the disk with their places in the file.
    pub map: BTreeMap<u32, u32>,
}

/// What a cluster of the disk holds.
pub fn pattern(cluster: u32, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    for (n, sector) in bytes.chunks_mut(512).enumerate() {
        sector.fill((cluster as usize * 37 + n + 1) as u8 | 1);
    }
    bytes
}

impl Image {
    /// `map`: clusters of the disk in the order of their places.
    pub fn new(version: u32, bs: u32, clusters: u32, map: &[u32]) -> Image {
        let size = bs as usize * 512;
        let l1 = (64 + 4 * clusters as usize).next_multiple_of(512).div_ceil(size) as u32;
        let mut image = Image { bytes: vec![0; l1 as usize * size], version, bs, clusters, l1, map: BTreeMap::new() };
        image.bytes[..16].copy_from_slice(SIGNATURES[version as usize - 1]);
        for (at, word) in [(16, 2), (20, 16), (24, 100), (28, bs), (32, clusters), (36, clusters * bs), (48, l1 * bs)] {
            image.put(at, word);
        }
        for (n, cluster) in map.iter().enumerate() {
            image.map.insert(*cluster, l1 + n as u32);
            image.bytes.extend(pattern(*cluster, size));
            image.set(*cluster, l1 + n as u32);
        }
        image.put(52, u32::from(map.is_empty()));
        image
    }

    pub fn size(&self) -> usize {
        self.bs as usize * 512
    }

    /// Places in the file.
    pub fn places(&self) -> u32 {
        (self.bytes.len() / self.size()) as u32
    }

    pub fn put(&mut self, at: usize, word: u32) {
        self.bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }

    pub fn slot(cluster: u32) -> usize {
        64 + 4 * cluster as usize
    }

    /// The entry of a slot, for a place in the file.
    pub fn set(&mut self, cluster: u32, place: u32) {
        self.put(Image::slot(cluster), self.entry(place));
    }

    pub fn entry(&self, place: u32) -> u32 {
        if self.version == 1 { place * self.bs } else { place }
    }

    /// The n-th mapped cluster of the disk, from either end.
    pub fn mapped(&self, n: usize) -> u32 {
        *self.map.keys().nth(n).unwrap()
    }

    /// The cluster whose place is the last of the file.
    pub fn last_placed(&self) -> u32 {
        *self.map.iter().max_by_key(|(_, place)| **place).unwrap().0
    }
}

/// What a file shows as a disk: clusters with their bytes, those that the entries name soundly. None: no header.
pub fn read(bytes: &[u8]) -> Option<BTreeMap<u32, Vec<u8>>> {
    let word = |at: usize| bytes.get(at..at + 4).map(|b| u32::from_le_bytes(b.try_into().unwrap()));
    let version = SIGNATURES.iter().position(|s| bytes.starts_with(*s))? + 1;
    let bs = word(28).filter(|bs| bs.is_power_of_two() && (64..=131_072).contains(bs))?;
    let size = bs as usize * 512;
    let sectors = u64::from(word(36)?) | if version == 2 { u64::from(word(40)?) << 32 } else { 0 };
    let mut disk = BTreeMap::new();
    for cluster in 0..sectors.div_ceil(u64::from(bs)).min(1 << 16) as u32 {
        let Some(entry) = word(Image::slot(cluster)) else { break };
        let place = match version {
            1 if !entry.is_multiple_of(bs) => continue,
            1 => entry / bs,
            _ => entry,
        } as usize;
        if place == 0 {
            continue;
        }
        if let Some(content) = place.checked_mul(size).and_then(|at| bytes.get(at..at + size)) {
            disk.insert(cluster, content.to_vec());
        }
    }
    Some(disk)
}

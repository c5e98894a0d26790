//! Simulated chains: how they are made, and an independent reader of what they hold.

use std::cell::RefCell;
use std::rc::Rc;

use crate::engine::api::LevelConfig;

use crate::disk::{Arena, META, POISON, SECTOR, SimFile, Stamp};
use crate::testing::rng::Rng;

pub const PAGE_SECTORS: u64 = 8;
/// Words of the header, in BAT entries.
pub const HEADER_WORDS: u32 = 16;
pub const IN_USE: u32 = 0x746f_6e59;

/// Shape of one level.
#[derive(Clone, Copy, Debug)]
pub struct Level {
    /// Bytes of a raw file; `None`: a ploop1 image.
    pub raw: Option<u64>,
    pub clusters: u32,
    pub first_data: u32,
}

/// Shape of a chain.
#[derive(Clone, Debug)]
pub struct Shape {
    pub shift: u32,
    /// Sectors of a cluster.
    pub spc: u64,
    pub v1: bool,
    pub levels: Vec<Level>,
    /// Sectors of the device.
    pub sectors: u64,
    /// Virtual clusters that the load goes to.
    pub hot: Vec<u32>,
}

impl Shape {
    pub fn random(rng: &mut Rng) -> Shape {
        let shift = rng.pick(&[15, 15, 15, 16]);
        let spc = 1u64 << (shift - 9);
        let clusters = match rng.below(4) {
            0 => rng.between(4, 40),
            1 => rng.between(1000, 1020),
            2 => rng.between(2030, 2100),
            _ => rng.between(40, 300),
        } as u32;
        let short = if rng.coin() { rng.below(spc) } else { 0 };
        let sectors = u64::from(clusters) * spc - short;
        let depth = rng.pick(&[1, 1, 2, 2, 3, 4, 5, 6]);
        let raw_base = rng.below(4) == 0;
        let mut levels = Vec::new();
        for i in 0..depth {
            let top = i + 1 == depth;
            let n = if top || rng.coin() { clusters } else { rng.between(1, u64::from(clusters)) as u32 };
            let n = levels.last().map_or(n, |l: &Level| n.max(l.clusters));
            if i == 0 && raw_base {
                let bytes = match (top, rng.below(3)) {
                    (true, _) => sectors * SECTOR,
                    (_, 0) => (u64::from(n) * spc - rng.below(spc)) * SECTOR,
                    _ => u64::from(n) * spc * SECTOR,
                };
                levels.push(Level { raw: Some(bytes.min(sectors * SECTOR)), clusters: n, first_data: 0 });
            } else {
                levels.push(Level { raw: None, clusters: n, first_data: first_data(n, spc) });
            }
        }
        let hot = hot_clusters(clusters, rng);
        Shape { shift, spc, v1: rng.below(4) == 0, levels, sectors, hot }
    }

    pub fn top(&self) -> usize {
        self.levels.len() - 1
    }

    pub fn raw_top(&self) -> bool {
        self.levels[self.top()].raw.is_some()
    }

    pub fn clusters(&self) -> u32 {
        self.sectors.div_ceil(self.spc) as u32
    }

    pub fn bat_pages(&self, level: usize) -> u32 {
        (self.levels[level].clusters + HEADER_WORDS).div_ceil(1024)
    }

    /// From the host cluster of a cluster to the entry on disk.
    pub fn entry(&self, host_cluster: u32) -> u32 {
        if self.v1 { host_cluster * self.spc as u32 } else { host_cluster }
    }

    /// From the entry on disk to the host cluster; an entry that lies within a cluster has none.
    pub fn host_cluster(&self, entry: u32) -> Option<u32> {
        match self.v1 {
            true if !entry.is_multiple_of(self.spc as u32) => None,
            true => Some(entry / self.spc as u32),
            false => Some(entry),
        }
    }

    pub fn level_configs(&self, files: &[SimFile]) -> Vec<LevelConfig> {
        let make = |(l, f): (&Level, &SimFile)| match l.raw {
            Some(bytes) => LevelConfig::Raw { bytes },
            None => LevelConfig::Ploop {
                v1: self.v1,
                clusters: l.clusters,
                first_data: l.first_data,
                file_clusters: (f.len() / self.spc) as u32,
            },
        };
        self.levels.iter().zip(files).map(make).collect()
    }
}

fn first_data(clusters: u32, spc: u64) -> u32 {
    let header = (64 + 4 * u64::from(clusters)).next_multiple_of(SECTOR);
    header.div_ceil(spc * SECTOR) as u32
}

fn hot_clusters(clusters: u32, rng: &mut Rng) -> Vec<u32> {
    let mut hot = vec![0, clusters - 1];
    for edge in [1008, 1008 + 1024] {
        if edge < clusters {
            hot.extend([edge - 1, edge]);
        }
    }
    let start = rng.below(u64::from(clusters)) as u32;
    let run = rng.between(2, 12) as u32;
    hot.extend((start..start + run).filter(|c| *c < clusters));
    hot.sort_unstable();
    hot.dedup();
    hot
}

/// The files of a chain, base first, and the bytes behind their stamps.
#[derive(Clone)]
pub struct Chain {
    pub files: Vec<SimFile>,
    pub arena: Rc<RefCell<Arena>>,
}

/// A value that names its writer and its position, so that a wrong one explains itself.
pub fn stamp(serial: u64, sector: u64) -> Stamp {
    (serial << 24) | sector
}

impl Chain {
    pub fn build(shape: &Shape, rng: &mut Rng) -> Chain {
        let arena = Rc::new(RefCell::new(Arena::default()));
        let mut files = Vec::new();
        for (i, level) in shape.levels.iter().enumerate() {
            files.push(match level.raw {
                Some(bytes) => build_raw(bytes / SECTOR, rng),
                None => build_image(shape, i, &mut arena.borrow_mut(), rng),
            });
        }
        Chain { files, arena }
    }

    /// The entry for a cluster in a BAT sector of that stamp.
    pub fn entry_in(&self, stamp: Stamp, cluster: u32) -> u32 {
        let bytes = self.arena.borrow().bytes(stamp);
        let at = ((cluster + HEADER_WORDS) % 128 * 4) as usize;
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    }

    /// Reads a sector of the device from the levels below `level`.
    pub fn read_below(&self, shape: &Shape, level: usize, sector: u64) -> Stamp {
        (0..level).rev().find_map(|l| self.read_level(shape, l, sector, false)).unwrap_or(0)
    }

    /// Reads a sector of the device; `stable`: as it would be found after the worst power cut (of the top).
    pub fn read(&self, shape: &Shape, sector: u64, stable: bool) -> Stamp {
        let top = shape.top();
        self.read_level(shape, top, sector, stable).unwrap_or_else(|| self.read_below(shape, top, sector))
    }

    pub fn read_level(&self, shape: &Shape, level: usize, sector: u64, stable: bool) -> Option<Stamp> {
        let file = &self.files[level];
        let read = |s: u64| match stable {
            true => file.read_durable(s),
            false if s < file.len() => file.read(s),
            false => POISON | 0xbad,
        };
        if let Some(bytes) = shape.levels[level].raw {
            return Some(if sector < bytes / SECTOR { read(sector) } else { 0 });
        }
        let cluster = (sector / shape.spc) as u32;
        if cluster >= shape.levels[level].clusters {
            return None;
        }
        let entry = self.entry_in(read(bat_sector(cluster)), cluster);
        if entry == 0 {
            return None;
        }
        let Some(host_cluster) = shape.host_cluster(entry) else { return Some(POISON | 0xbad1) };
        Some(read(u64::from(host_cluster) * shape.spc + sector % shape.spc))
    }

    /// Host clusters that the entries of an image name now, in the order of its clusters.
    pub fn host_clusters(&self, shape: &Shape, level: usize) -> Vec<(u32, u32)> {
        let file = &self.files[level];
        let arena = self.arena.borrow();
        let mut out = Vec::new();
        let mut block = [0; 512];
        for cluster in 0..shape.levels[level].clusters {
            let word = cluster + HEADER_WORDS;
            if cluster == 0 || word.is_multiple_of(128) {
                block = arena.bytes(file.read(bat_sector(cluster)));
            }
            let at = (word % 128 * 4) as usize;
            let entry = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
            if entry != 0 {
                out.push((cluster, shape.host_cluster(entry).unwrap_or(u32::MAX)));
            }
        }
        out
    }

    pub fn header(&self, level: usize) -> [u8; 64] {
        let mut header = [0; 64];
        header.copy_from_slice(&self.arena.borrow().bytes(self.files[level].read(0))[..64]);
        header
    }

    /// The first sector of an image with the in-use mark set or cleared.
    pub fn marked(&self, level: usize, in_use: bool) -> Stamp {
        let mut bytes = self.arena.borrow().bytes(self.files[level].read(0));
        bytes[44..48].copy_from_slice(&if in_use { IN_USE } else { 0 }.to_le_bytes());
        self.arena.borrow_mut().intern(&bytes)
    }

    pub fn is_marked(&self, level: usize) -> bool {
        self.header(level)[44..48] == IN_USE.to_le_bytes()
    }
}

/// Sector of the file that holds the entry of a cluster.
pub fn bat_sector(cluster: u32) -> u64 {
    u64::from((cluster + HEADER_WORDS) / 128)
}

fn build_raw(sectors: u64, rng: &mut Rng) -> SimFile {
    let mut f = SimFile::new(sectors);
    for s in 0..sectors {
        f.preset(s, if rng.below(64) < 20 { 0 } else { stamp(1, s) });
    }
    f
}

fn build_image(shape: &Shape, level: usize, arena: &mut Arena, rng: &mut Rng) -> SimFile {
    let Level { clusters, first_data, .. } = shape.levels[level];
    let top = level == shape.top();
    // Much to copy up: what lower levels have the top often lacks.
    let share = if top && level > 0 { rng.pick(&[0, 0, 100, 400]) } else { rng.pick(&[0, 100, 400, 900]) };
    let mut mapped: Vec<u32> = shape.hot.iter().copied().filter(|c| *c < clusters && rng.permille(share)).collect();
    for _ in 0..rng.below(6) {
        mapped.push(rng.below(u64::from(clusters)) as u32);
    }
    mapped.sort_unstable();
    mapped.dedup();
    // The host clusters: in any order, with gaps that nothing names.
    let gaps = if rng.coin() { rng.below(6) } else { 0 };
    let mut host_clusters: Vec<u32> = (first_data..first_data + mapped.len() as u32 + gaps as u32).collect();
    for i in (1..host_clusters.len()).rev() {
        host_clusters.swap(i, rng.index(i + 1));
    }
    let tail = if top && rng.below(3) == 0 { rng.below(3 * shape.spc) } else { 0 };
    let end = host_clusters.iter().max().map_or(first_data, |m| m + 1);
    let mut f = SimFile::new(u64::from(end) * shape.spc + tail);
    for s in 0..u64::from(end) * shape.spc + tail {
        f.preset(s, POISON | rng.below(1 << 30));
    }
    let mut bat = vec![0u8; (u64::from(first_data) * shape.spc * SECTOR) as usize];
    bat[..64].copy_from_slice(&header_bytes(shape, clusters, first_data));
    for (c, p) in mapped.iter().zip(&host_clusters) {
        let at = 4 * (c + HEADER_WORDS) as usize;
        bat[at..at + 4].copy_from_slice(&shape.entry(*p).to_le_bytes());
        let blank = rng.below(8) == 0;
        for s in 0..shape.spc {
            let at = u64::from(*c) * shape.spc + s;
            let value = if blank || rng.below(64) == 0 { 0 } else { stamp(2 + level as u64, at) };
            f.preset(u64::from(*p) * shape.spc + s, value);
        }
    }
    for (i, block) in bat.chunks(512).enumerate() {
        f.preset(i as u64, arena.intern(block));
    }
    debug_assert!(f.read(0) & META != 0);
    f
}

fn header_bytes(shape: &Shape, clusters: u32, first_data: u32) -> [u8; 64] {
    let mut h = [0u8; 64];
    h[..16].copy_from_slice(if shape.v1 { b"WithoutFreeSpace" } else { b"WithouFreSpacExt" });
    let mut word = |at: usize, v: u32| h[at..at + 4].copy_from_slice(&v.to_le_bytes());
    word(16, 2);
    word(28, shape.spc as u32);
    word(32, clusters);
    word(36, (u64::from(clusters) * shape.spc) as u32);
    word(48, first_data * shape.spc as u32);
    h
}

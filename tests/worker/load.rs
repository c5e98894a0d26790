//! Verified load: each thread owns regions of the file, rewrites them with stamped data and reads them back at once.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ploop::sys::aligned::AlignedBuf;

use crate::common::rng::Rng;

/// Fills sectors so that each tells where it belongs and when it was written.
pub fn stamp(buf: &mut [u8], offset: u64, seq: u64) {
    for (i, sector) in buf.chunks_mut(512).enumerate() {
        for (j, word) in sector.chunks_mut(8).enumerate() {
            let v = match j % 3 {
                0 => offset + i as u64 * 512,
                1 => seq,
                _ => !seq ^ j as u64,
            };
            word.copy_from_slice(&v.to_le_bytes());
        }
    }
}

/// A region as its owner knows it.
#[derive(Clone, Copy)]
pub struct Region {
    pub offset: u64,
    pub len: usize,
    /// What was written last; 0: zeroes.
    pub seq: u64,
}

/// Reads a region and compares.
pub fn check(file: &File, r: &Region, buf: &mut AlignedBuf, wanted: &mut [u8]) -> Result<(), String> {
    let got = &mut buf[..r.len];
    got.fill(0xee);
    file.read_exact_at(got, r.offset).map_err(|e| format!("read at {}: {e}", r.offset))?;
    let wanted = &mut wanted[..r.len];
    if r.seq == 0 {
        wanted.fill(0);
    } else {
        stamp(wanted, r.offset, r.seq);
    }
    if let Some(at) = (0..r.len).find(|&i| got[i] != wanted[i]) {
        let word = at & !511;
        return Err(format!(
            "region {}+{} differs at byte {at}: found {:x?}, wanted {:x?} (write {})",
            r.offset,
            r.len,
            &got[word..word + 24],
            &wanted[word..word + 24],
            r.seq
        ));
    }
    Ok(())
}

/// One thread of load over its regions until told to stop.
pub fn work(file: &File, regions: &mut [Region], seed: u64, stop: &AtomicBool, ops: &AtomicU64) -> Result<(), String> {
    use nix::fcntl::{FallocateFlags, fallocate};
    let mut random = Rng::new(seed);
    let longest = regions.iter().map(|r| r.len).max().unwrap_or(512);
    let mut buf = AlignedBuf::new(longest);
    let mut wanted = vec![0; longest];
    let mut seq = seed << 32;
    while !stop.load(Ordering::Relaxed) {
        let i = random.below(regions.len() as u64) as usize;
        let r = &mut regions[i];
        match random.below(100) {
            n @ 0..=64 => {
                // Small ones several times without a look: an old one that comes late is seen.
                for _ in 0..=if r.len <= 4096 { n % 12 } else { 0 } {
                    seq += 1;
                    stamp(&mut buf[..r.len], r.offset, seq);
                    file.write_all_at(&buf[..r.len], r.offset).map_err(|e| format!("write at {}: {e}", r.offset))?;
                    r.seq = seq;
                }
            }
            65 => {
                let mode = if seq.is_multiple_of(2) {
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE
                } else {
                    FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE
                };
                fallocate(file, mode, r.offset as i64, r.len as i64)
                    .map_err(|e| format!("zeroing at {}: {e}", r.offset))?;
                r.seq = 0;
            }
            66 => file.sync_data().map_err(|e| format!("sync: {e}"))?,
            _ => {}
        }
        check(file, r, &mut buf, &mut wanted)?;
        ops.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Divides a file of `bytes` among threads: some small hot regions and some large ones each, across cluster borders.
pub fn regions(bytes: u64, threads: usize) -> Vec<Vec<Region>> {
    let share = (bytes / threads as u64) & !0xffff;
    (0..threads as u64)
        .map(|t| {
            let base = t * share;
            let mut out = Vec::new();
            let mut at = base + 512 * t;
            for len in [512, 4096, 4096, 8192, 16384, 512, 65536, 131072, 300 * 512, 4096, 700 * 512, 4096] {
                if at + len > base + share {
                    break;
                }
                out.push(Region { offset: at, len: len as usize, seq: 0 });
                at += len + share / 16 / 512 * 512;
            }
            out
        })
        .collect()
}

//! A disk on a faulty file: its users' writes, what it may hold, and a reader of the image that shares no code with the
//! library.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use ploop::sys::aligned::AlignedBuf;

pub const BLOCK: u64 = 4096;
pub const CLUSTER: u64 = 32 * 1024;
/// Virtual clusters of the disk.
pub const CLUSTERS: u32 = 2048;
/// The first clusters are in the file from the beginning, block `b` full of `OLD ^ b`.
pub const MAPPED: u32 = 4;
const OLD: u8 = 0x40;

/// Makes the image; or a delta for the top of it, which has the second cluster alone.
pub fn make(path: &Path, delta: bool) {
    let mapped = if delta { 1..2 } else { 0..MAPPED };
    let mut bytes = vec![0u8; (1 + mapped.len()) * CLUSTER as usize];
    bytes[..16].copy_from_slice(b"WithouFreSpacExt");
    let sectors = CLUSTERS * 64;
    for (at, word) in [(16, 2), (20, 16), (24, 130), (28, 64), (32, CLUSTERS), (36, sectors), (48, 64)] {
        bytes[at..at + 4].copy_from_slice(&u32::to_le_bytes(word));
    }
    for (n, i) in mapped.enumerate() {
        let at = 64 + 4 * i as usize;
        bytes[at..at + 4].copy_from_slice(&(1 + n as u32).to_le_bytes());
        for b in 0..CLUSTER / BLOCK {
            let at = ((1 + n as u64) * CLUSTER + b * BLOCK) as usize;
            bytes[at..at + BLOCK as usize].fill(OLD ^ (u64::from(i) * CLUSTER / BLOCK + b) as u8);
        }
    }
    std::fs::write(path, bytes).expect("image");
}

/// Whether the image is marked in use.
pub fn is_marked(path: &Path) -> bool {
    let mut word = [0; 4];
    File::open(path).expect("image").read_exact_at(&mut word, 44).expect("header");
    word != [0; 4]
}

/// What a chain (top first) holds at a block: each byte of it, if they are all the same.
fn chain_block(chain: &[&Path], block: u64) -> Option<u8> {
    let Some((path, below)) = chain.split_first() else { return Some(0) };
    let file = File::open(path).expect("image");
    let mut entry = [0; 4];
    let cluster = block * BLOCK / CLUSTER;
    file.read_exact_at(&mut entry, 64 + 4 * cluster).expect("entry");
    let place = u64::from(u32::from_le_bytes(entry));
    if place == 0 {
        return chain_block(below, block);
    }
    let mut data = vec![0; BLOCK as usize];
    file.read_exact_at(&mut data, place * CLUSTER + block * BLOCK % CLUSTER).expect("data of an entry");
    data.iter().all(|b| *b == data[0]).then_some(data[0])
}

/// Values that a block may have.
#[derive(Clone, Debug)]
struct Block {
    /// The last one that a flush covered.
    flushed: u8,
    /// Later ones, in their order; whether they were answered well.
    later: Vec<(u8, bool)>,
}

/// A user of the device, and what he knows.
pub struct User {
    node: Option<File>,
    blocks: BTreeMap<u64, Block>,
    /// Errors that he saw.
    pub errors: Vec<String>,
}

impl User {
    pub fn new(node: &Path) -> User {
        let node = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(node).expect("device");
        User { node: Some(node), blocks: BTreeMap::new(), errors: Vec::new() }
    }

    /// Closes the device; what he knows stays.
    pub fn done(mut self) -> User {
        self.node = None;
        self
    }

    fn node(&self) -> &File {
        self.node.as_ref().expect("still open")
    }

    fn known(&mut self, block: u64) -> &mut Block {
        let old = if block < u64::from(MAPPED) * CLUSTER / BLOCK { OLD ^ block as u8 } else { 0 };
        self.blocks.entry(block).or_insert(Block { flushed: old, later: Vec::new() })
    }

    pub fn write(&mut self, block: u64, value: u8) {
        let mut buf = AlignedBuf::new(BLOCK as usize);
        buf.fill(value);
        let result = self.node().write_all_at(&buf, block * BLOCK);
        self.note(block, value, result, "write");
    }

    /// Discards a whole cluster.
    pub fn zero(&mut self, cluster: u64) {
        let from = cluster * CLUSTER;
        // The page cache of a block device turns punching into a discard or zeroes.
        let flags = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let result = nix::fcntl::fallocate(self.node(), flags, from as i64, CLUSTER as i64).map_err(io::Error::from);
        let ok = result.is_ok();
        for block in from / BLOCK..(from + CLUSTER) / BLOCK {
            self.known(block).later.push((0, ok));
        }
        if let Err(e) = result {
            self.errors.push(format!("zero of cluster {cluster}: {e}"));
        }
    }

    fn note(&mut self, block: u64, value: u8, result: io::Result<()>, what: &str) {
        self.known(block).later.push((value, result.is_ok()));
        if let Err(e) = result {
            self.errors.push(format!("{what} of block {block}: {e}"));
        }
    }

    pub fn flush(&mut self) -> bool {
        let result = self.node().sync_all();
        if let Err(e) = &result {
            self.errors.push(format!("flush: {e}"));
            return false;
        }
        for block in self.blocks.values_mut() {
            // What failed may have arrived all the same.
            if let Some(at) = block.later.iter().rposition(|(_, ok)| *ok) {
                block.flushed = block.later[at].0;
                block.later.drain(..=at);
            }
        }
        true
    }

    /// Reads every block that was ever of interest, and compares.
    pub fn read_all(&mut self) {
        let blocks: Vec<u64> = self.blocks.keys().copied().collect();
        for block in blocks {
            let mut buf = AlignedBuf::new(BLOCK as usize);
            match self.node().read_exact_at(&mut buf, block * BLOCK) {
                Err(e) => self.errors.push(format!("read of block {block}: {e}")),
                Ok(()) => self.must_admit(block, buf.iter().all(|b| *b == buf[0]).then_some(buf[0]), false),
            }
        }
    }

    /// The last value answered well, or one whose fate is unknown; after a crash also what the last flush left.
    #[track_caller]
    fn must_admit(&self, block: u64, value: Option<u8>, crashed: bool) {
        let Some(known) = self.blocks.get(&block) else { return };
        let last_good = known.later.iter().rposition(|(_, ok)| *ok);
        let first = if crashed { 0 } else { last_good.unwrap_or(0) };
        let mut may: Vec<u8> = known.later[first..].iter().map(|(v, _)| *v).collect();
        if crashed || last_good.is_none() {
            may.push(known.flushed);
        }
        // A write that failed can have been torn.
        let torn = value.is_none() && known.later[first..].iter().any(|(_, ok)| !ok);
        assert!(torn || value.is_some_and(|v| may.contains(&v)), "block {block} holds {value:x?}, may hold {may:x?}");
    }

    /// Compares with the images, top first, after the device is gone.
    #[track_caller]
    pub fn compare(&self, chain: &[&Path], crashed: bool) {
        for block in self.blocks.keys() {
            self.must_admit(*block, chain_block(chain, *block), crashed);
        }
    }
}

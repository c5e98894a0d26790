//! A whole image file: checked, a copy repaired, opened, and if it opens read and written like any other; then closed, checked and read
//! again.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use ploop::chain::{self, LevelFile, Marked};
use ploop::engine::api::RequestKind;
use ploop::image::check::{CheckOptions, check_file};

use crate::Target;
use crate::drive::Drive;
use crate::mutate::Rng;
use crate::repair;

const CLUSTER: usize = 32 * 1024;
const BLOCK: u64 = 4096;

/// An input is eight bytes for the file's length, then its first bytes; what follows in the file is a pattern.
pub struct Images {
    dir: tempfile::TempDir,
    path: PathBuf,
}

impl Images {
    pub fn new() -> Images {
        // In memory where that can be had: nothing here is about disks.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("folder");
        let path = dir.path().join("image");
        Images { dir, path }
    }
}

fn image(v1: bool, clusters: u32, map: &[(u32, u32)], places: u32) -> Vec<u8> {
    let l1 = (64 + 4 * clusters as usize).next_multiple_of(512).div_ceil(CLUSTER) as u32;
    let mut bytes = vec![0; 64 + 4 * clusters as usize];
    bytes[..16].copy_from_slice(if v1 { b"WithoutFreeSpace" } else { b"WithouFreSpacExt" });
    for (at, word) in [(16, 2), (20, 16), (24, 100), (28, 64), (32, clusters), (36, clusters * 64), (48, l1 * 64)] {
        bytes[at..at + 4].copy_from_slice(&u32::to_le_bytes(word));
    }
    for (cluster, place) in map {
        let entry = (l1 + place) * if v1 { 64 } else { 1 };
        let at = 64 + 4 * *cluster as usize;
        bytes[at..at + 4].copy_from_slice(&entry.to_le_bytes());
    }
    let len = u64::from(l1 + places) * CLUSTER as u64;
    [len.to_le_bytes().to_vec(), bytes].concat()
}

fn fill(file: &File, from: u64, len: u64) {
    let mut block = vec![0u8; BLOCK as usize];
    let mut at = from;
    while at < len {
        let n = (BLOCK - at % BLOCK).min(len - at);
        block[..n as usize].fill((at / BLOCK) as u8 | 1);
        file.write_all_at(&block[..n as usize], at).expect("fill");
        at += n;
    }
}

impl Target for Images {
    const NAME: &'static str = "image";
    const WORDS: usize = 14;

    fn seeds(&self) -> Vec<Vec<u8>> {
        vec![
            image(false, 40, &[(0, 0), (1, 1), (7, 2), (39, 3)], 4),
            image(true, 40, &[(0, 2), (1, 0), (38, 1)], 5),
            image(false, 1100, &[(0, 0), (1007, 1), (1008, 3), (1099, 2)], 6),
            image(false, 9000, &[(0, 0), (8999, 1)], 2),
            image(false, 3, &[], 0),
        ]
    }

    fn words(&self) -> &'static [&'static [u8]] {
        &[b"WithoutFreeSpace", b"WithouFreSpacExt", b"Ynot", b"v2.1", b"\x40\0\0\0", b"\0\x08\0\0"]
    }

    fn head(&self, input: &[u8]) -> usize {
        input.len().min(8 + 64 + 64)
    }

    fn run(&mut self, input: &[u8], rng: &mut Rng) -> String {
        let (len, head) = input.split_at_checked(8).unwrap_or((&[], input));
        let len = len.try_into().map_or(head.len() as u64, u64::from_le_bytes).min(8 << 20);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&self.path);
        let file = file.expect("file");
        let head = &head[..head.len().min(len as usize)];
        file.set_len(len).expect("length");
        file.write_all_at(head, 0).expect("write");
        // The rest of the table reads as zero, what follows is other data.
        let table = (head.len() as u64).next_multiple_of(CLUSTER as u64);
        if len - table.min(len) < 2 << 20 {
            fill(&file, table.min(len), len);
        }
        let before = std::fs::read(&self.path).expect("read");
        let only_look =
            CheckOptions { force: true, check: true, read_only: true, repair_sparse: false, ..CheckOptions::default() };
        let judged = check_file(&self.path, None, &only_look);
        assert_eq!(std::fs::read(&self.path).expect("read"), before, "a look has changed the image");
        let judged =
            judged.map_or_else(|e| e.to_string().replace(&*self.path.to_string_lossy(), ""), |_| "fine".into());
        let writable = rng.below(4) != 0;
        let marked = if rng.below(2) == 0 { Marked::Refuse } else { Marked::Recover };
        let repaired = repair::try_one(&self.dir.path().join("copy"), &before, rng);
        let judged = format!("{judged} / {repaired}");
        let options = chain::OpenOptions { writable, marked, ahead: 0, ..chain::OpenOptions::default() };
        let files = [LevelFile { file, name: "image".into(), raw: false, direct: false }];
        let opened = match chain::open(&files, &options) {
            Ok(opened) => opened,
            Err(e) => {
                // Refused before a byte was written.
                assert_eq!(std::fs::read(&self.path).expect("read"), before, "refused ({e}), and yet it has changed");
                return format!("{e} / {judged}");
            }
        };
        let outcome = self.use_it(opened, &files, writable, rng);
        if !writable {
            assert_eq!(std::fs::read(&self.path).expect("read"), before, "a reader has changed the image");
        }
        format!("{outcome} / {judged}")
    }
}

impl Images {
    /// I/O on an opened image, against a model of what it must read.
    fn use_it(&self, opened: chain::Chain, files: &[LevelFile], writable: bool, rng: &mut Rng) -> String {
        let size = opened.device_bytes / BLOCK * BLOCK;
        if size == 0 {
            return "open, less than a block".into();
        }
        let mut drive = Drive::new(&opened, files, writable);
        let mut model: HashMap<u64, Vec<u8>> = HashMap::new();
        // Few blocks, so that they meet; the first and last among them.
        let mut blocks: Vec<u64> = (0..12).map(|_| rng.below(size / BLOCK)).collect();
        blocks.extend([0, size / BLOCK - 1, 7 * 8, 8 * 8 + 3].into_iter().filter(|b| *b < size / BLOCK));
        let mut refused = 0;
        for round in 0..40u64 {
            let block = blocks[rng.index(blocks.len())];
            let (at, kind) = (block * BLOCK, rng.below(10));
            match kind {
                0..=3 => {
                    if let Ok(got) = drive.now(RequestKind::Read, at, vec![0xee; BLOCK as usize], rng) {
                        let known = model.entry(block).or_insert_with(|| got.clone());
                        assert!(*known == got, "block {block} reads otherwise than before");
                    }
                }
                4..=6 => {
                    let data = vec![round as u8 ^ 0x5a; BLOCK as usize];
                    match drive.now(RequestKind::Write, at, data.clone(), rng) {
                        Ok(_) => drop(model.insert(block, data)),
                        Err(_) => refused += 1,
                    }
                }
                7 => {
                    // A whole cluster, if it lies in the disk.
                    let cluster = opened.cluster.bytes();
                    let start = at / cluster * cluster;
                    let len = cluster.min(size - start);
                    if len <= 4 << 20 && drive.now(RequestKind::Zero, start, vec![0; len as usize], rng).is_ok() {
                        for b in start / BLOCK..(start + len) / BLOCK {
                            if let Some(known) = model.get_mut(&b) {
                                known.fill(0);
                            }
                        }
                    } else if len <= 4 << 20 {
                        refused += 1;
                        model.retain(|b, _| *b < start / BLOCK || *b >= (start + len) / BLOCK);
                    }
                }
                8 => drop(drive.now(RequestKind::Flush, 0, Vec::new(), rng)),
                _ => {
                    drive.tick();
                    // Two at once.
                    let a = drive.send(RequestKind::Write, at, vec![1; BLOCK as usize]);
                    let b = drive.send(RequestKind::Read, at, vec![0xee; BLOCK as usize]);
                    drive.settle(rng);
                    let _ = drive.end_of(b);
                    match drive.end_of(a).0 {
                        Ok(()) => drop(model.insert(block, vec![1; BLOCK as usize])),
                        Err(_) => refused += 1,
                    }
                }
            }
        }
        let end = match drive.close(rng) {
            Ok(end) => end,
            Err(e) => return format!("open, closing fails with {e}"),
        };
        if !writable {
            return "open for reading".into();
        }
        chain::close(&files[0], &opened, end).expect("what was opened can be closed");
        // What we closed is sound, and holds what was written.
        let strict = CheckOptions { force: true, check: true, read_only: true, ..CheckOptions::default() };
        let name = self.dir.path().join("image");
        if let Err(e) = check_file(&name, None, &strict) {
            // A slot behind the disk's end is another's, and left alone.
            let text = e.to_string();
            let others = ["entries behind them must be 0", "of clusters behind those", "the header contradicts itself"];
            assert!(others.iter().any(|o| text.contains(o)), "closed, and check says: {e}");
        }
        let options = chain::OpenOptions::default();
        let again = chain::open(files, &options).expect("what was closed can be opened");
        let mut drive = Drive::new(&again, files, false);
        for (block, want) in &model {
            let got = drive.now(RequestKind::Read, block * BLOCK, vec![0xee; BLOCK as usize], rng);
            assert_eq!(got.as_ref(), Ok(want), "block {block} after closing and opening");
        }
        format!("open for writing, {}", if refused > 0 { "writes refused" } else { "well" })
    }
}

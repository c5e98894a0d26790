//! Repairs stopped at each of their steps, by a kill and by power cuts: no cluster that an entry names soundly loses its bytes,
//! and the repair can be made again.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{CheckOptions, check_file};
use crate::descriptor::ImageMode;
use crate::format::bat;
use crate::format::header::{IN_USE, Version};
use crate::image::breach;
use crate::image::content::Piece;
use crate::image::create::{Params, build};
use crate::sys::store::record::{self, Thing};
use crate::testing::rng::Rng;
use crate::units::ClusterSize;

const CLUSTER: u64 = 32768;

const HARD: CheckOptions = CheckOptions {
    force: true,
    hard_force: true,
    drop_inuse: true,
    check: true,
    repair_sparse: false,
    read_only: false,
    raw: false,
    raw_blocksize: None,
};

/// Clusters with their bytes, of which each must be of one value.
fn shown(path: &Path) -> BTreeMap<u32, u8> {
    let bytes = fs::read(path).unwrap();
    let mut out = BTreeMap::new();
    for cluster in 0..300 {
        let at = bat::entry_offset(cluster) as usize;
        let place = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        if let Some(content) = bytes.get(place * CLUSTER as usize..(place + 1) * CLUSTER as usize).filter(|_| place > 0)
        {
            assert!(content.iter().all(|b| *b == content[0]), "cluster {cluster} at {place} is mixed");
            out.insert(cluster, content[0]);
        }
    }
    out
}

/// An image, marked in use, with clusters that are used twice, an entry behind the end, one behind the disk, and a tail.
fn damaged(dir: &Path) -> PathBuf {
    let path = dir.join("image");
    let data: Vec<u8> = (0..4 * CLUSTER).map(|i| (i / CLUSTER) as u8 + 1).collect();
    let cluster = ClusterSize::from_sectors(64).unwrap();
    let params = Params { version: Version::V2, cluster, sectors: 64 * 300, mode: ImageMode::Expanded };
    build(&path, &params, &[Piece::bytes(5 * CLUSTER, &data)], &mut |_, _| Ok(())).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    let put = |at: u64, word: u32| file.write_all_at(&word.to_le_bytes(), at).unwrap();
    put(bat::entry_offset(20), 2);
    put(bat::entry_offset(21), 2);
    put(bat::entry_offset(30), 999);
    put(bat::entry_offset(300), 3);
    put(44, IN_USE);
    file.write_all_at(&[0xEE; CLUSTER as usize + 7], 5 * CLUSTER).unwrap();
    path
}

/// Repairs at every step of a repair that stopped there; the number of crashes.
fn crashes() -> usize {
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let path = damaged(dir.path());
    let want = shown(&path);
    assert_eq!(want, BTreeMap::from([(5, 1), (6, 2), (7, 3), (8, 4), (20, 2), (21, 2)]));
    let guard = record::start(dir.path(), None);
    check_file(&path, None, &HARD).unwrap();
    assert_eq!(shown(&path), want);
    let mut made = 0;
    let mut coins = Rng::new(1);
    for at in 0..=guard.0.steps() {
        for n in 0..6 {
            let mut choose = |_: Thing, step: usize| match n {
                0 => true,
                1 => false,
                2 => step + 1 == at,
                _ => coins.coin(),
            };
            let left = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
            guard.0.crash(at, left.path(), &mut choose);
            let path = left.path().join("image");
            assert_eq!(shown(&path), want, "stopped after step {at}, {n}");
            check_file(&path, None, &HARD).unwrap_or_else(|e| panic!("stopped after step {at}, {n}: {e}"));
            assert_eq!(shown(&path), want, "stopped after step {at}, {n}, and repaired again");
            let look = CheckOptions { read_only: true, drop_inuse: false, ..HARD };
            check_file(&path, None, &look).unwrap_or_else(|e| panic!("stopped after step {at}, {n}, repaired: {e}"));
            made += 1;
        }
    }
    made
}

#[test]
fn crashes_of_repairs() {
    println!("{} crashes", crashes());
}

#[test]
fn crashes_find_a_repair_that_names_a_copy_before_it_is_durable() {
    breach::set(Some("copies are not synced"));
    let found = std::panic::catch_unwind(crashes);
    breach::set(None);
    assert!(found.is_err(), "no crash finds it");
}

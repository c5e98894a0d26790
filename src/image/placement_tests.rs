//! Where the data of an image lie in its file: later than needed, or so far behind that the file is all holes.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::check::{CheckOptions, CheckReport, check_file};
use super::compact::pull_in;
use super::create::{Params, create};
use super::grow::grow;
use super::target::{Target, read_table};
use crate::descriptor::ImageMode;
use crate::error::{Kind, Result};
use crate::format::bat;
use crate::format::header::{Header, Version};
use crate::sys::store::record;
use crate::units::ClusterSize;

const CLUSTER: u64 = 32768;
const CLUSTERS: u64 = 100;
const FAR: u32 = 200_000;

/// An image of 100 clusters whose data begin at `first`, with these clusters (each full of its number + 1) at these
/// clusters of the file, and rubbish between the BAT and the data.
fn image(dir: &Path, version: Version, first: u32, entries: &[(u32, u32)]) -> PathBuf {
    let path = dir.join("a");
    let cluster = ClusterSize::from_sectors(64).unwrap();
    let params = Params { version, cluster, sectors: CLUSTERS * 64, mode: ImageMode::Expanded };
    create(&path, &params, &mut |_, _| Ok(())).unwrap();
    let file = open(&path);
    let mut header = read_table(&file, &path).unwrap().0;
    (header.first_data_sector, header.flags) = (first * 64, 0);
    file.write_all_at(&header.encode(), 0).unwrap();
    for gap in 1..first.min(20) {
        file.write_all_at(&[0xEE; CLUSTER as usize], u64::from(gap) * CLUSTER).unwrap();
    }
    let end = entries.iter().map(|e| e.1 + 1).max().unwrap_or(first);
    file.set_len(u64::from(end) * CLUSTER).unwrap();
    for &(cluster, at) in entries {
        let entry = bat::encode(version, header.cluster, at).unwrap();
        file.write_all_at(&entry.to_le_bytes(), bat::entry_offset(cluster)).unwrap();
        file.write_all_at(&[cluster as u8 + 1; CLUSTER as usize], u64::from(at) * CLUSTER).unwrap();
    }
    path
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// Clusters that are mapped; each must have its content.
fn content(path: &Path) -> Vec<u32> {
    let file = open(path);
    let (_, table) = read_table(&file, path).unwrap();
    for &(cluster, at) in &table.entries {
        let mut bytes = [0; CLUSTER as usize];
        file.read_exact_at(&mut bytes, u64::from(at) * CLUSTER).unwrap();
        assert!(bytes.iter().all(|b| *b == cluster as u8 + 1), "cluster {cluster} at {at}");
    }
    table.entries.iter().map(|(cluster, _)| *cluster).collect()
}

fn check(path: &Path, repair_sparse: bool, read_only: bool) -> Result<CheckReport> {
    check_file(path, None, &CheckOptions { force: true, check: true, repair_sparse, read_only, ..Default::default() })
}

#[test]
fn what_lies_between_the_bat_and_the_data_means_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for version in [Version::V1, Version::V2] {
        let path = image(dir.path(), version, 5, &[(3, 5), (99, 6)]);
        check(&path, true, false).unwrap();
        assert_eq!(content(&path), [3, 99]);
        let file = open(&path);
        let header = read_table(&file, &path).unwrap().0;
        assert_eq!(header.first_data(), 5);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_disk_grows_into_what_lies_between_the_bat_and_the_data() {
    let dir = tempfile::tempdir().unwrap();
    // The table takes one cluster for 8176 clusters of the disk.
    for (sectors, first) in [(64 * 200, 5), (64 * 8177 + 3, 5), (64 * 30_000, 5), (64 * 60_000, 8)] {
        let path = image(dir.path(), Version::V2, 5, &[(3, 5), (99, 6)]);
        let file = open(&path);
        let mut target = Target::open(&file, &path).unwrap();
        target.mark().unwrap();
        grow(&mut target, sectors).unwrap();
        target.close(false).unwrap();
        check(&path, false, false).or_else(|_| check(&path, true, false)).unwrap();
        let header = read_table(&file, &path).unwrap().0;
        assert_eq!((header.sectors, header.first_data()), (sectors, first));
        assert_eq!(content(&path), [3, 99], "{sectors} sectors");
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn an_image_that_would_fill_the_host_is_refused_until_check_has_moved_its_data() {
    let dir = tempfile::tempdir().unwrap();
    let far = [(0, FAR), (3, 1), (7, FAR - 1), (99, 150)];
    let all_far = [(0, FAR + 1), (5, FAR)];
    for (first, entries) in [(1, &far[..]), (FAR, &all_far[..])] {
        let path = image(dir.path(), Version::V2, first, entries);
        let mapped = content(&path);
        let file = open(&path);
        let size = file.metadata().unwrap().blocks();
        for refused in [check(&path, false, false), check(&path, true, true)] {
            let e = refused.unwrap_err();
            assert_eq!(e.kind(), Kind::Format);
            assert!(e.to_string().contains("`ploop check -S` moves"), "{e}");
        }
        assert_eq!(Target::open(&file, &path).unwrap_err().kind(), Kind::Format);
        // Not forced, as before a mount.
        let plain = check_file(&path, None, &CheckOptions::default()).unwrap_err();
        assert!(plain.to_string().contains(&path.display().to_string()), "{plain}");
        assert_eq!(file.metadata().unwrap().blocks(), size, "nothing was filled");
        check(&path, true, false).unwrap();
        assert_eq!(content(&path), mapped);
        let (header, table) = read_table(&file, &path).unwrap();
        assert_eq!((header.is_marked(), header.first_data()), (false, 1));
        assert!(table.end <= 101, "{}", table.end);
        assert_eq!(file.metadata().unwrap().len(), u64::from(table.end) * CLUSTER);
        check(&path, true, true).unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn what_a_busy_disk_can_need_is_no_sparse_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), Version::V2, 1, &[(0, 3 * CLUSTERS as u32)]);
    check(&path, true, false).unwrap();
    assert_eq!(read_table(&open(&path), &path).unwrap().1.entries, [(0, 300)]);
    let reach = Header::new(Version::V2, ClusterSize::from_sectors(64).unwrap(), 64 * CLUSTERS).unwrap().reach();
    assert!(reach * CLUSTER < 300 << 20, "{reach}");
}

/// Whatever of the steps before a power cut is durable: the content is there, and another run comes to its end.
#[test]
fn data_that_moves_to_the_front_survives_a_power_cut() {
    for (version, first) in [(Version::V1, 1), (Version::V2, 3)] {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), version, first, &[(0, 130), (3, 4), (7, 131), (8, 3), (99, 140)]);
        let want = content(&path);
        let guard = record::start(dir.path(), None);
        assert_eq!(pull_in(&open(&path), &path).unwrap().0, 3);
        assert!(guard.0.steps() > 8, "{}", guard.0.steps());
        for at in 0..=guard.0.steps() {
            for durable in 0..8 {
                let left = tempfile::tempdir().unwrap();
                guard.0.crash(at, left.path(), &mut |_, step| durable >> (step % 3) & 1 == 1);
                let path = left.path().join("a");
                assert_eq!(content(&path), want, "after step {at}");
                pull_in(&open(&path), &path).unwrap();
                assert_eq!(content(&path), want, "after step {at} and another run");
                let (header, table) = read_table(&open(&path), &path).unwrap();
                assert!(!header.is_marked() && table.end <= 101, "after step {at}: {}", table.end);
            }
        }
    }
}

//! Disks for tests: made, written to and read without a device.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::descriptor::{Descriptor, FILE_NAME, ImageMode};
use crate::format::bat;
use crate::format::guid::{self, Guid};
use crate::format::header::{FLAG_EMPTY, Header, Version};
use crate::image::create::{Params, create};
use crate::image::target::read_table;
use crate::units::{ClusterSize, SECTOR};

pub fn g(n: u32) -> Guid {
    Guid::parse(&format!("{{{n:08x}-2222-4333-8444-555555555555}}")).unwrap()
}

/// A folder on a disk: that of `$PLOOP_TEST_DIR`, to try another file system, or the tree's.
pub fn folder() -> tempfile::TempDir {
    match std::env::var_os("PLOOP_TEST_DIR") {
        Some(dir) => tempfile::tempdir_in(dir).unwrap(),
        None => tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap(),
    }
}

pub fn small() -> ClusterSize {
    ClusterSize::from_sectors(64).unwrap()
}

/// Makes a disk of one image in this folder; returns the path of its descriptor.
pub fn make_disk(dir: &Path, version: Version, mode: ImageMode, cluster: ClusterSize, clusters: u64) -> PathBuf {
    let dir = dir.canonicalize().unwrap();
    let image = dir.join("root.hdd");
    let sectors = clusters * u64::from(cluster.sectors());
    create(&image, &Params { version, cluster, sectors, mode }, &mut |_, _| Ok(())).unwrap();
    let path = dir.join(FILE_NAME);
    Descriptor::new_base(&image, sectors, cluster, mode).unwrap().commit_new(&path).unwrap();
    path
}

/// Overwrites a whole cluster in the image of a snapshot, as an engine would.
pub fn put(dd: &Path, guid: &Guid, cluster: u32, fill: u8) {
    let disk = Descriptor::read(dd).unwrap();
    let image = disk.image(guid).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&image.file).unwrap();
    let size = disk.blocksize.bytes();
    let data = vec![fill; size as usize];
    if disk.is_raw(image) {
        file.write_all_at(&data, u64::from(cluster) * size).unwrap();
        return;
    }
    let (header, table) = read_table(&file, &image.file).unwrap();
    assert!(cluster < header.clusters());
    let place = match table.entries.iter().find(|e| e.0 == cluster) {
        Some((_, place)) => *place,
        None => table.end,
    };
    file.write_all_at(&data, u64::from(place) * size).unwrap();
    let entry = bat::encode(header.version, header.cluster, place).unwrap();
    file.write_all_at(&entry.to_le_bytes(), bat::entry_offset(cluster)).unwrap();
    file.write_all_at(&Header { flags: header.flags & !FLAG_EMPTY, ..header }.encode(), 0).unwrap();
    file.sync_all().unwrap();
}

/// What a snapshot shows: the first byte of each cluster that is not zero; each cluster must be of one value throughout.
pub fn content(dd: &Path, guid: &Guid) -> BTreeMap<u32, u8> {
    let disk = Descriptor::read(dd).unwrap();
    disk.check_tree().unwrap();
    let size = disk.blocksize.bytes();
    let mut out = BTreeMap::new();
    let mut buf = vec![0; size as usize];
    // A cluster of an upper image hides those below, which can have any content while a merge is under way.
    let mut seen = BTreeSet::new();
    for image in disk.chain(guid).unwrap().into_iter().rev() {
        let file = std::fs::File::open(&image.file).unwrap_or_else(|e| panic!("{}: {e}", image.file.display()));
        let places: Vec<(u32, u64)> = match disk.is_raw(image) {
            true => {
                let len = file.metadata().unwrap().len();
                (0..len.div_ceil(size)).map(|c| (c as u32, c * size)).collect()
            }
            false => {
                let (_, table) = read_table(&file, &image.file).unwrap();
                table.entries.iter().map(|(c, place)| (*c, u64::from(*place) * size)).collect()
            }
        };
        for (cluster, at) in places {
            if !seen.insert(cluster) {
                continue;
            }
            let got = crate::sys::aligned::read_full(&file, &mut buf, at).unwrap();
            assert!(buf[..got] == vec![buf[0]; got], "cluster {cluster} of {} is mixed", image.file.display());
            if got > 0 && buf[0] != 0 {
                out.insert(cluster, buf[0]);
            }
        }
    }
    out
}

pub fn map(pairs: &[(u32, u8)]) -> BTreeMap<u32, u8> {
    pairs.iter().copied().collect()
}

/// The disk's size as the top image says it, in clusters, and as the descriptor says it.
pub fn sizes(dd: &Path) -> (u64, u64) {
    let disk = Descriptor::read(dd).unwrap();
    let top = disk.image(&guid::TOP).unwrap();
    let bs = u64::from(disk.blocksize.sectors());
    let sectors = match disk.is_raw(top) {
        true => top.file.metadata().unwrap().len() / SECTOR,
        false => crate::image::check::read_header(&top.file, None).unwrap().sectors,
    };
    (sectors / bs, disk.size_sectors / bs)
}

/// Files of the folder but descriptor and lock, ascending.
pub fn files(dd: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dd.parent().unwrap())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n != FILE_NAME && n != "DiskDescriptor.xml.lck")
        .collect();
    names.sort();
    names
}

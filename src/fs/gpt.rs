//! The GUID partition table of a new disk, as the classic tool writes it: one partition, named `primary`, from the first
//! cluster to the last whole one that leaves a cluster free.

use std::io;

use uuid::Uuid;

use crate::error::{Error, Kind, Result};
use crate::units::{ClusterSize, SECTOR};

/// Bytes of one partition entry and how many a table made by us has.
const ENTRY: usize = 128;
const ENTRIES: usize = 128;
const HEADER: usize = 92;
/// Sectors of the entry array, of the front copy (MBR, header, entries) and of the copy at the end (entries, header).
const ARRAY_SECTORS: u64 = (ENTRY * ENTRIES) as u64 / SECTOR;
const FRONT_SECTORS: u64 = 2 + ARRAY_SECTORS;
const BACK_SECTORS: u64 = 1 + ARRAY_SECTORS;

/// Type of the partition: Linux file system data.
const LINUX_DATA: Uuid = Uuid::from_u128(0x0FC63DAF_8483_4772_8E79_3D69D8477DE4);
/// The classic takes this word as the partition's name.
const NAME: &str = "primary";

/// Bytes that belong at a byte offset of the disk.
#[derive(Clone, Debug)]
pub struct Piece {
    pub offset: u64,
    pub bytes: Vec<u8>,
}

/// Where the only partition of a new disk lies, in sectors, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub disk: u64,
    pub first: u64,
    pub last: u64,
}

impl Layout {
    /// The classic layout of a disk of `disk` sectors. `Param` if it does not exceed two clusters.
    pub fn single(disk: u64, cluster: ClusterSize) -> Result<Layout> {
        let bs = u64::from(cluster.sectors());
        if disk <= 2 * bs {
            return Err(Error::new(
                Kind::Param,
                format!(
                    "a disk of {disk} sectors is too small for a partition: with clusters of {bs} sectors it must have more than {}; use a larger size, a smaller cluster (-b) or no file system (-t none)",
                    2 * bs
                ),
            ));
        }
        Ok(Layout { disk, first: bs, last: (disk - bs) / bs * bs - 1 })
    }

    /// Sectors of the partition.
    pub fn sectors(&self) -> u64 {
        self.last + 1 - self.first
    }

    /// The two stretches of the disk that hold the table, with new random GUIDs.
    pub fn pieces(&self) -> [Piece; 2] {
        self.pieces_with(Uuid::new_v4(), Uuid::new_v4())
    }

    fn pieces_with(&self, disk_guid: Uuid, partition_guid: Uuid) -> [Piece; 2] {
        let array = self.entries(partition_guid);
        let crc = crc32fast::hash(&array);
        let back_array = self.disk - BACK_SECTORS;

        let mut front = self.protective_mbr();
        front.extend(self.header(1, self.disk - 1, 2, &disk_guid, crc));
        front.extend(&array);
        let mut back = array;
        back.extend(self.header(self.disk - 1, 1, back_array, &disk_guid, crc));
        [Piece { offset: 0, bytes: front }, Piece { offset: back_array * SECTOR, bytes: back }]
    }

    fn protective_mbr(&self) -> Vec<u8> {
        let mut mbr = vec![0; SECTOR as usize];
        let count = u32::try_from(self.disk - 1).unwrap_or(u32::MAX);
        let entry = &mut mbr[446..462];
        entry[1..4].copy_from_slice(&[0x00, 0x02, 0x00]);
        entry[4] = 0xEE;
        entry[5..8].copy_from_slice(&[0xFF, 0xFF, 0xFF]);
        entry[8..12].copy_from_slice(&1u32.to_le_bytes());
        entry[12..16].copy_from_slice(&count.to_le_bytes());
        mbr[510..].copy_from_slice(&[0x55, 0xAA]);
        mbr
    }

    fn entries(&self, partition_guid: Uuid) -> Vec<u8> {
        let mut array = vec![0; ENTRY * ENTRIES];
        array[..16].copy_from_slice(&LINUX_DATA.to_bytes_le());
        array[16..32].copy_from_slice(&partition_guid.to_bytes_le());
        array[32..40].copy_from_slice(&self.first.to_le_bytes());
        array[40..48].copy_from_slice(&self.last.to_le_bytes());
        for (i, unit) in NAME.encode_utf16().enumerate() {
            array[56 + 2 * i..58 + 2 * i].copy_from_slice(&unit.to_le_bytes());
        }
        array
    }

    fn header(&self, own: u64, other: u64, array: u64, disk_guid: &Uuid, array_crc: u32) -> Vec<u8> {
        let mut h = vec![0; SECTOR as usize];
        h[..8].copy_from_slice(b"EFI PART");
        h[8..12].copy_from_slice(&0x0001_0000u32.to_le_bytes());
        h[12..16].copy_from_slice(&(HEADER as u32).to_le_bytes());
        h[24..32].copy_from_slice(&own.to_le_bytes());
        h[32..40].copy_from_slice(&other.to_le_bytes());
        h[40..48].copy_from_slice(&FRONT_SECTORS.to_le_bytes());
        h[48..56].copy_from_slice(&(self.disk - BACK_SECTORS - 1).to_le_bytes());
        h[56..72].copy_from_slice(&disk_guid.to_bytes_le());
        h[72..80].copy_from_slice(&array.to_le_bytes());
        h[80..84].copy_from_slice(&(ENTRIES as u32).to_le_bytes());
        h[84..88].copy_from_slice(&(ENTRY as u32).to_le_bytes());
        h[88..92].copy_from_slice(&array_crc.to_le_bytes());
        let crc = crc32fast::hash(&h[..HEADER]);
        h[16..20].copy_from_slice(&crc.to_le_bytes());
        h
    }
}

/// Reads bytes of a disk at a byte offset, all or nothing.
pub type ReadAt<'a> = dyn FnMut(u64, &mut [u8]) -> io::Result<()> + 'a;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::partitions::{Entry, read_gpt};

    fn disk(sectors: u64, pieces: &[Piece]) -> Vec<u8> {
        let mut d = vec![0; (sectors * SECTOR) as usize];
        for p in pieces {
            d[p.offset as usize..p.offset as usize + p.bytes.len()].copy_from_slice(&p.bytes);
        }
        d
    }

    fn partitions(d: &[u8]) -> Vec<Entry> {
        read_gpt(d.len() as u64, |buf, at| {
            buf.copy_from_slice(&d[at as usize..at as usize + buf.len()]);
            Ok(())
        })
        .unwrap()
    }

    #[test]
    fn layout_leaves_a_cluster_at_each_end() {
        let layout = Layout::single(20_971_520, ClusterSize::DEFAULT).unwrap();
        assert_eq!((layout.first, layout.last), (2048, 20_971_520 - 2048 - 1));
        assert_eq!(Layout::single(4096, ClusterSize::DEFAULT).unwrap_err().kind(), Kind::Param);
        assert_eq!(Layout::single(6144, ClusterSize::DEFAULT).unwrap().sectors(), 2048);
    }

    #[test]
    fn both_copies_are_read_as_written() {
        let layout = Layout::single(8192, ClusterSize::from_sectors(64).unwrap()).unwrap();
        let want = [Entry { number: 1, start: 64 * SECTOR, length: (8192 - 128) * SECTOR }];
        let mut d = disk(8192, &layout.pieces());
        assert_eq!(partitions(&d), want);
        let name: Vec<u8> = "primary".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(d[1024 + 56..1024 + 56 + name.len()], name);
        d[512 + 40] ^= 1;
        assert_eq!(partitions(&d), want, "the copy at the end");
    }

    #[test]
    fn another_tool_finds_no_fault() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk");
        let layout = Layout::single(65536, ClusterSize::DEFAULT).unwrap();
        std::fs::write(&file, disk(65536, &layout.pieces())).unwrap();
        let args = ["-s", "-m"].map(std::ffi::OsStr::new);
        let args = [&args[..], &[file.as_os_str(), "unit".as_ref(), "s".as_ref(), "print".as_ref()]].concat();
        let seen = crate::fs::helper::run("parted", &args).unwrap();
        if seen.status == crate::fs::helper::NOT_STARTED {
            crate::testing::skip::skip("parted is not installed");
            return;
        }
        assert_eq!((seen.status, seen.err.as_str()), (0, ""), "{}", seen.out);
        assert!(seen.out.contains(":65536s:") && seen.out.contains(":gpt:"), "{}", seen.out);
        assert!(seen.out.contains("1:2048s:63487s:61440s::primary:;"), "{}", seen.out);
    }
}

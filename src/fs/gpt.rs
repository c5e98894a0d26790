//! The GUID partition table: written as the classic tool writes it (one partition, named `primary`, from the first
//! cluster to the last whole one that leaves a cluster free), read with every check sum proved.

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

/// A partition found on a disk; positions in logical sectors of that disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// From 1, as in the node's name.
    pub number: u32,
    pub first: u64,
    pub last: u64,
    pub name: String,
}

/// A valid table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Bytes of a logical sector for which the table was made.
    pub sector: u64,
    pub partitions: Vec<Partition>,
    /// The first copy was damaged, the one at the end was taken.
    pub from_backup: bool,
}

/// Reads bytes of a disk at a byte offset, all or nothing.
pub type ReadAt<'a> = dyn FnMut(u64, &mut [u8]) -> io::Result<()> + 'a;

/// The table of a disk of `bytes` bytes with logical sectors of `sector` bytes. None if there is no signature where
/// one belongs; a table with wrong check sums or impossible partitions in both copies is an error (`Format`).
pub fn read(read_at: &mut ReadAt<'_>, bytes: u64, sector: u64) -> Result<Option<Table>> {
    let sectors = bytes / sector;
    if sectors < 6 {
        return Ok(None);
    }
    let mut signature = [0; 8];
    read_or(read_at, sector, &mut signature)?;
    if &signature != b"EFI PART" {
        return Ok(None);
    }
    let primary = match read_copy(read_at, 1, sectors, sector) {
        Ok(partitions) => return Ok(Some(Table { sector, partitions, from_backup: false })),
        Err(e) if e.kind() == Kind::Format => e,
        Err(e) => return Err(e),
    };
    match read_copy(read_at, sectors - 1, sectors, sector) {
        Ok(partitions) => Ok(Some(Table { sector, partitions, from_backup: true })),
        Err(backup) if backup.kind() == Kind::Format => {
            Err(Error::new(Kind::Format, format!("{primary}; the copy at the end: {backup}")))
        }
        Err(e) => Err(e),
    }
}

fn read_or(read_at: &mut ReadAt<'_>, offset: u64, buf: &mut [u8]) -> Result<()> {
    let len = buf.len();
    read_at(offset, buf)
        .map_err(|e| Error::with(Kind::Read, format!("partition table: {len} bytes at {offset} cannot be read"), e))
}

fn read_copy(read_at: &mut ReadAt<'_>, own: u64, sectors: u64, sector: u64) -> Result<Vec<Partition>> {
    let bad = |what: String| Error::new(Kind::Format, format!("partition table at sector {own}: {what}"));
    let mut header = vec![0; sector as usize];
    read_or(read_at, own * sector, &mut header)?;
    let u32_at = |h: &[u8], at: usize| u32::from_le_bytes([h[at], h[at + 1], h[at + 2], h[at + 3]]);
    let u64_at = |h: &[u8], at: usize| u64::from(u32_at(h, at)) | u64::from(u32_at(h, at + 4)) << 32;

    if &header[..8] != b"EFI PART" {
        return Err(bad("no signature".into()));
    }
    let size = u32_at(&header, 12) as usize;
    if !(HEADER..=header.len()).contains(&size) {
        return Err(bad(format!("header of {size} bytes, wanted {HEADER} to {}", header.len())));
    }
    let stored = u32_at(&header, 16);
    header[16..20].fill(0);
    let seen = crc32fast::hash(&header[..size]);
    if seen != stored {
        return Err(bad(format!("check sum of the header is {seen:#010x}, the header says {stored:#010x}")));
    }
    let place = u64_at(&header, 24);
    if place != own {
        return Err(bad(format!("the header says it is sector {place}")));
    }
    let (first_usable, last_usable) = (u64_at(&header, 40), u64_at(&header, 48));
    let (array, count, entry) = (u64_at(&header, 72), u32_at(&header, 80), u32_at(&header, 84));
    // Bounds before anything is allocated by the header's word: the standard's entry sizes are 128 * 2^n.
    if !(128..=4096).contains(&entry) || !entry.is_power_of_two() || count == 0 || count > 1024 {
        return Err(bad(format!("{count} entries of {entry} bytes")));
    }
    let len = u64::from(count) * u64::from(entry);
    if array < 2 || array.checked_add(len.div_ceil(sector)).is_none_or(|end| end > sectors) {
        return Err(bad(format!("entries at sector {array} do not fit a disk of {sectors} sectors")));
    }
    let mut entries = vec![0; len as usize];
    read_or(read_at, array * sector, &mut entries)?;
    let (seen, stored) = (crc32fast::hash(&entries), u32_at(&header, 88));
    if seen != stored {
        return Err(bad(format!("check sum of the entries is {seen:#010x}, the header says {stored:#010x}")));
    }

    let mut found = Vec::new();
    for (i, e) in entries.chunks_exact(entry as usize).enumerate() {
        if e[..16].iter().all(|b| *b == 0) {
            continue;
        }
        let (first, last) = (u64_at(e, 32), u64_at(e, 40));
        if first < first_usable || first > last || last > last_usable || last >= sectors {
            return Err(bad(format!(
                "partition {} from sector {first} to {last} does not lie in the usable sectors {first_usable} to {last_usable} of {sectors}",
                i + 1
            )));
        }
        let units: Vec<u16> =
            e[56..128].chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).take_while(|u| *u != 0).collect();
        found.push(Partition { number: i as u32 + 1, first, last, name: String::from_utf16_lossy(&units) });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(sectors: u64, pieces: &[Piece]) -> Vec<u8> {
        let mut d = vec![0; (sectors * SECTOR) as usize];
        for p in pieces {
            d[p.offset as usize..p.offset as usize + p.bytes.len()].copy_from_slice(&p.bytes);
        }
        d
    }

    fn parse(d: &[u8]) -> Result<Option<Table>> {
        let mut at = |o: u64, buf: &mut [u8]| -> io::Result<()> {
            let o = o as usize;
            buf.copy_from_slice(d.get(o..o + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        };
        read(&mut at, d.len() as u64, SECTOR)
    }

    #[test]
    fn layout_leaves_a_cluster_at_each_end() {
        let layout = Layout::single(20_971_520, ClusterSize::DEFAULT).unwrap();
        assert_eq!((layout.first, layout.last), (2048, 20_971_520 - 2048 - 1));
        assert_eq!(Layout::single(4096, ClusterSize::DEFAULT).unwrap_err().kind(), Kind::Param);
        assert_eq!(Layout::single(6144, ClusterSize::DEFAULT).unwrap().sectors(), 2048);
    }

    #[test]
    fn what_is_written_is_read() {
        let layout = Layout::single(8192, ClusterSize::from_sectors(64).unwrap()).unwrap();
        let d = disk(8192, &layout.pieces());
        let table = parse(&d).unwrap().unwrap();
        assert!(!table.from_backup);
        assert_eq!(table.partitions, [Partition { number: 1, first: 64, last: 8127, name: "primary".into() }]);
    }

    #[test]
    fn backup_serves_when_the_first_copy_is_damaged() {
        let layout = Layout::single(8192, ClusterSize::from_sectors(64).unwrap()).unwrap();
        let mut d = disk(8192, &layout.pieces());
        d[512 + 40] ^= 1;
        assert!(parse(&d).unwrap().unwrap().from_backup);
        let end = d.len();
        d[end - 512 + 40] ^= 1;
        assert_eq!(parse(&d).unwrap_err().kind(), Kind::Format);
    }

    #[test]
    fn no_byte_of_the_first_copy_can_change_unseen() {
        let layout = Layout::single(512, ClusterSize::from_sectors(64).unwrap()).unwrap();
        let good = disk(512, &layout.pieces());
        for at in (512..512 + HEADER).chain(1024..1024 + 256) {
            let mut d = good.clone();
            d[at] ^= 0x10;
            match parse(&d) {
                Ok(Some(t)) => assert!(t.from_backup, "byte {at}"),
                Ok(None) => assert!(at < 520, "byte {at}"),
                Err(e) => panic!("byte {at}: {e}"),
            }
        }
    }

    #[test]
    fn a_disk_without_table_has_none() {
        assert_eq!(parse(&vec![0; 65536]).unwrap(), None);
        assert_eq!(parse(&[0; 512]).unwrap(), None);
    }
}

//! The GUID partition table: protective MBR, header and entries in front, entries and header at the end of the disk.
//!
//! A table that was read keeps all bytes of its entries and of the MBR, so that writing it back changes only what was
//! asked for. A new table is that of the classic tool: one partition, named `primary`.

use std::io;

use uuid::Uuid;

use crate::bail;
use crate::error::Result;
use crate::units::{ClusterSize, SECTOR};

/// Bytes of one partition entry and how many a new table has.
const ENTRY: usize = 128;
const ENTRIES: usize = 128;
const HEADER: usize = 92;
/// Sector of the entries in front, behind MBR and header, in a new table.
const FRONT_TABLE: u64 = 2;
/// Largest entry array that is read.
const MAX_TABLE: u64 = 1 << 20;
/// Most partitions that a table shows; the usual size of a GPT.
const MAX_PARTITIONS: usize = 128;
/// Smallest disk that is searched for a table.
const MIN_SECTORS: u64 = 6;

const SIGNATURE: &[u8; 8] = b"EFI PART";
/// Type of a protective MBR entry.
const PROTECTIVE: u8 = 0xEE;
/// Type of the partition of a new table: Linux file system data.
const LINUX_DATA: Uuid = Uuid::from_u128(0x0FC63DAF_8483_4772_8E79_3D69D8477DE4);
/// The classic names the partition so.
const NAME: &str = "primary";

const SECTOR_BYTES: usize = SECTOR as usize;
type Sector = [u8; SECTOR_BYTES];

/// Bytes that belong at a byte offset of the disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Piece {
    pub offset: u64,
    pub bytes: Vec<u8>,
}

/// A partition of a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Partition {
    /// From 1.
    pub number: u32,
    /// Bytes.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

/// A partition table; numbers are sectors.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Gpt {
    /// Size of the disk: its last sector is the second header.
    disk: u64,
    guid: Uuid,
    first_usable: u64,
    last_usable: u64,
    /// Where the first copy of the entries begins.
    front_table: u64,
    entry_len: usize,
    entries: Vec<u8>,
    mbr: Sector,
}

impl Gpt {
    /// The classic table of a new disk of `disk` sectors, with random GUIDs: one partition from the first cluster to the
    /// last whole one that leaves a cluster free. `Param` if the disk does not exceed two clusters.
    pub fn single(disk: u64, cluster: ClusterSize) -> Result<Gpt> {
        let bs = u64::from(cluster.sectors());
        if disk <= 2 * bs {
            bail!(
                Param,
                "a disk of {disk} sectors is too small for a partition: with clusters of {bs} sectors it must have more than {}; use a larger size, a smaller cluster (-b) or no file system (-t none)",
                2 * bs
            );
        }
        let (first, last) = (bs, (disk - bs) / bs * bs - 1);
        let mut entries = vec![0; ENTRY * ENTRIES];
        entries[..16].copy_from_slice(&LINUX_DATA.to_bytes_le());
        entries[16..32].copy_from_slice(&Uuid::new_v4().to_bytes_le());
        entries[32..40].copy_from_slice(&first.to_le_bytes());
        entries[40..48].copy_from_slice(&last.to_le_bytes());
        for (unit, at) in NAME.encode_utf16().zip((56..).step_by(2)) {
            entries[at..at + 2].copy_from_slice(&unit.to_le_bytes());
        }
        let table = sectors_of(entries.len());
        Ok(Gpt {
            disk,
            guid: Uuid::new_v4(),
            first_usable: FRONT_TABLE + table,
            last_usable: disk - table - 2,
            front_table: FRONT_TABLE,
            entry_len: ENTRY,
            entries,
            mbr: protective_mbr(disk),
        })
    }

    /// The table of a disk of `size` bytes: by its first header, else by the copy at the end; `None`: there is no sound
    /// one. A table is used only after its checksum and its place on the disk are checked. `read` fills a buffer of
    /// whole sectors from a byte offset.
    pub fn parse(size: u64, mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>) -> io::Result<Option<Gpt>> {
        let disk = size / SECTOR;
        if disk < MIN_SECTORS {
            return Ok(None);
        }
        let mut mbr = [0; SECTOR_BYTES];
        read(&mut mbr, 0)?;
        // Only a protective MBR announces a GPT; a stale one behind another table is not looked for.
        let protective = (0..4).any(|i| mbr[446 + 16 * i + 4] == PROTECTIVE);
        if mbr[510..] != [0x55, 0xAA] || !protective {
            return Ok(None);
        }
        for lba in [1, disk - 1] {
            let mut bytes = [0; SECTOR_BYTES];
            read(&mut bytes, lba * SECTOR)?;
            let Some(header) = Header::parse(&bytes, lba, disk) else { continue };
            let mut entries = vec![0; header.table_len.next_multiple_of(SECTOR_BYTES)];
            read(&mut entries, header.table * SECTOR)?;
            entries.truncate(header.table_len);
            if crc32fast::hash(&entries) != header.table_sum {
                continue;
            }
            return Ok(Some(Gpt {
                disk,
                guid: header.guid,
                first_usable: header.first_usable,
                last_usable: header.last_usable,
                front_table: if lba == 1 { header.table } else { FRONT_TABLE },
                entry_len: header.entry_len,
                entries,
                mbr,
            }));
        }
        Ok(None)
    }

    /// Its partitions, without those that do not lie on the disk.
    pub fn partitions(&self) -> impl Iterator<Item = Partition> + '_ {
        self.used()
            .take_while(|(number, ..)| *number as usize <= MAX_PARTITIONS)
            .filter(|(_, first, last)| first <= last && *last < self.disk)
            .map(|(number, first, last)| Partition {
                number,
                start: first * SECTOR,
                length: (last - first + 1) * SECTOR,
            })
    }

    /// Number, first and last sector of each entry in use, unchecked.
    fn used(&self) -> impl Iterator<Item = (u32, u64, u64)> + '_ {
        (1..)
            .zip(self.entries.chunks_exact(self.entry_len))
            .filter(|(_, entry)| entry[..16] != [0; 16])
            .map(|(number, entry)| (number, le64(entry, 32), le64(entry, 40)))
    }

    /// The table of the same partitions on a disk of `disk` sectors: the second copy moves to the new end, the space
    /// between becomes usable. `ChangeGpt`: a partition ends beyond it, or the table itself has no place.
    pub fn resize(&self, disk: u64) -> Result<Gpt> {
        let table = sectors_of(self.entries.len());
        if disk < table + 3 {
            bail!(ChangeGpt, "a disk of {disk} sectors has no place for a partition table of {table} sectors");
        }
        let mut new = Gpt { disk, last_usable: disk - table - 2, ..self.clone() };
        if let Some((number, _, last)) = self.used().find(|(_, _, last)| *last > new.last_usable) {
            bail!(
                ChangeGpt,
                "partition {number} ends at sector {last}: on a disk of {disk} sectors the last usable one is {}",
                new.last_usable
            );
        }
        // A protective entry beside other entries keeps its range.
        if (1..4).all(|i| new.mbr[446 + 16 * i + 4] == 0) && new.mbr[446 + 4] == PROTECTIVE {
            new.mbr[446 + 12..446 + 16].copy_from_slice(&protective_count(disk).to_le_bytes());
        }
        new.check()?;
        Ok(new)
    }

    /// The table with the partition that ends last extended to the end of the disk: to the last multiple of `align` sectors
    /// that leaves as many free, as [`single`](Self::single) has it. `None`: it reaches so far already, or there is none.
    pub fn extend_last(&self, align: u64) -> Option<(Gpt, Partition)> {
        let (number, first, last) = self.used().filter(|(_, f, l)| f <= l).max_by_key(|(_, _, last)| *last)?;
        let end = (self.disk.checked_sub(align)? / align * align).checked_sub(1)?.min(self.last_usable);
        if end <= last {
            return None;
        }
        let mut new = self.clone();
        let at = (number as usize - 1) * self.entry_len + 40;
        new.entries.get_mut(at..at + 8)?.copy_from_slice(&end.to_le_bytes());
        Some((new, Partition { number, start: first * SECTOR, length: (end - first + 1) * SECTOR }))
    }

    /// The table on a smaller disk of `disk` sectors, the partition that ends last cut to end before sector `end`.
    pub fn cut(&self, disk: u64, end: u64) -> Result<Gpt> {
        let mut new = self.clone();
        let last = self.used().filter(|(_, f, l)| f <= l).max_by_key(|(_, _, last)| *last);
        let Some((number, first, last)) = last else { return new.resize(disk) };
        if end <= first || end > last + 1 {
            bail!(ChangeGpt, "partition {number} has sectors {first} to {last}: it cannot be cut to end before {end}");
        }
        let at = (number as usize - 1) * self.entry_len + 40;
        if let Some(bytes) = new.entries.get_mut(at..at + 8) {
            bytes.copy_from_slice(&(end - 1).to_le_bytes());
        }
        new.resize(disk)
    }

    /// The pieces of the disk with the table, the piece at the end last. A caller that moves the end writes and syncs
    /// that piece first, so that a crash leaves a sound copy. `ChangeGpt`: the pieces would overlap.
    pub fn encode(&self) -> Result<Vec<Piece>> {
        self.check()?;
        let sum = crc32fast::hash(&self.entries);
        let mut array = self.entries.clone();
        array.resize(array.len().next_multiple_of(SECTOR_BYTES), 0);
        let end = self.disk - 1;
        let back_table = end - sectors_of(array.len());

        let mut front = self.mbr.to_vec();
        front.extend(self.header(1, end, self.front_table, sum));
        let mut back = array.clone();
        back.extend(self.header(end, 1, back_table, sum));
        let mut pieces = vec![Piece { offset: 0, bytes: front }];
        match self.front_table {
            FRONT_TABLE => pieces[0].bytes.extend(array),
            other => pieces.push(Piece { offset: other * SECTOR, bytes: array }),
        }
        pieces.push(Piece { offset: back_table * SECTOR, bytes: back });
        Ok(pieces)
    }

    /// Both copies have a place of their own, outside of the usable space.
    fn check(&self) -> Result<()> {
        let table = sectors_of(self.entries.len());
        let front = self.front_table >= FRONT_TABLE
            && self.front_table.checked_add(table).is_some_and(|end| end <= self.first_usable);
        let usable = self.first_usable <= self.last_usable;
        let back = self.last_usable.checked_add(table + 2).is_some_and(|end| end <= self.disk);
        if !front || !usable || !back || self.disk > u64::MAX / SECTOR {
            bail!(
                ChangeGpt,
                "a partition table of {table} sectors from sector {} does not fit around the usable sectors {} to {} of a disk of {}",
                self.front_table,
                self.first_usable,
                self.last_usable,
                self.disk
            );
        }
        Ok(())
    }

    fn header(&self, own: u64, other: u64, table: u64, table_sum: u32) -> Sector {
        let mut h = [0; SECTOR_BYTES];
        let mut put = |at: usize, bytes: &[u8]| h[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, SIGNATURE);
        put(8, &0x0001_0000u32.to_le_bytes());
        put(12, &(HEADER as u32).to_le_bytes());
        put(24, &own.to_le_bytes());
        put(32, &other.to_le_bytes());
        put(40, &self.first_usable.to_le_bytes());
        put(48, &self.last_usable.to_le_bytes());
        put(56, &self.guid.to_bytes_le());
        put(72, &table.to_le_bytes());
        put(80, &((self.entries.len() / self.entry_len) as u32).to_le_bytes());
        put(84, &(self.entry_len as u32).to_le_bytes());
        put(88, &table_sum.to_le_bytes());
        let sum = crc32fast::hash(&h[..HEADER]);
        h[16..20].copy_from_slice(&sum.to_le_bytes());
        h
    }
}

/// A sound header, decoded.
struct Header {
    guid: Uuid,
    first_usable: u64,
    last_usable: u64,
    table: u64,
    /// Bytes of the entries.
    table_len: usize,
    entry_len: usize,
    table_sum: u32,
}

impl Header {
    /// `None`: no header of sector `lba`, or one whose table is too large or not on the disk.
    fn parse(bytes: &Sector, lba: u64, disk: u64) -> Option<Header> {
        let len = le32(bytes, 12) as usize;
        if &bytes[..8] != SIGNATURE || !(HEADER..=SECTOR_BYTES).contains(&len) || le64(bytes, 24) != lba {
            return None;
        }
        let mut sealed = *bytes;
        sealed[16..20].fill(0);
        if crc32fast::hash(&sealed[..len]) != le32(bytes, 16) {
            return None;
        }
        let (count, entry_len, table) = (u64::from(le32(bytes, 80)), u64::from(le32(bytes, 84)), le64(bytes, 72));
        let table_len = count.saturating_mul(entry_len);
        let sectors = table_len.div_ceil(SECTOR);
        let fits = sectors <= disk && table <= disk - sectors;
        if !(128..=4096).contains(&entry_len) || entry_len % 8 != 0 || table_len > MAX_TABLE || !fits {
            return None;
        }
        Some(Header {
            guid: Uuid::from_bytes_le(bytes[56..72].try_into().ok()?),
            first_usable: le64(bytes, 40),
            last_usable: le64(bytes, 48),
            table,
            table_len: table_len as usize,
            entry_len: entry_len as usize,
            table_sum: le32(bytes, 88),
        })
    }
}

fn protective_count(disk: u64) -> u32 {
    u32::try_from(disk - 1).unwrap_or(u32::MAX)
}

fn protective_mbr(disk: u64) -> Sector {
    let mut mbr = [0; SECTOR_BYTES];
    let entry = &mut mbr[446..462];
    entry[1..4].copy_from_slice(&[0x00, 0x02, 0x00]);
    entry[4] = PROTECTIVE;
    entry[5..8].copy_from_slice(&[0xFF, 0xFF, 0xFF]);
    entry[8..12].copy_from_slice(&1u32.to_le_bytes());
    entry[12..16].copy_from_slice(&protective_count(disk).to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xAA]);
    mbr
}

fn sectors_of(bytes: usize) -> u64 {
    (bytes as u64).div_ceil(SECTOR)
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests;

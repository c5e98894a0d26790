//! Partitions of a device: what the kernel knows, and what the partition table says where the kernel cannot read it.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::sys::stat::makedev;

use crate::server::runtime::parse_dev;
use crate::sys::partition;
use crate::units::SECTOR;

/// A partition that the kernel shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Known {
    pub number: u32,
    pub rdev: u64,
    /// Bytes.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

/// A partition of a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    pub number: u32,
    /// Bytes.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

/// Most partitions that are made from a table; the usual size of a GPT.
const MAX_ENTRIES: u64 = 128;

/// Largest table that is read.
const MAX_TABLE: u64 = 1 << 20;

/// Partitions of disk `backing` as the kernel has them now, by number. Opens no device.
pub fn known(backing: &str) -> Vec<Known> {
    known_in(&Path::new("/sys/block").join(backing))
}

fn known_in(disk: &Path) -> Vec<Known> {
    let Ok(entries) = fs::read_dir(disk) else { return Vec::new() };
    let mut all: Vec<Known> = entries
        .filter_map(|entry| {
            let dir = entry.ok()?.path();
            let number = |file| fs::read_to_string(dir.join(file)).ok()?.trim().parse::<u64>().ok();
            let (major, minor) = parse_dev(&fs::read_to_string(dir.join("dev")).ok()?)?;
            Some(Known {
                number: number("partition")?.try_into().ok()?,
                rdev: makedev(major, minor),
                start: number("start")? * SECTOR,
                length: number("size")? * SECTOR,
            })
        })
        .collect();
    all.sort_by_key(|p| p.number);
    all
}

/// Tells the kernel of the partitions in the disk's GPT if it shows none: then it has no parser for it. Else the
/// program that changes the table keeps the kernel informed, and we must not interfere.
pub fn scan(backing: &str, disk: &File) -> io::Result<()> {
    if !known(backing).is_empty() {
        return Ok(());
    }
    let size = partition::size(disk.as_fd())?;
    for entry in read_gpt(size, |buf, at| disk.read_exact_at(buf, at))? {
        match partition::add(disk.as_fd(), entry.number as i32, entry.start, entry.length) {
            // Overlaps another entry, or another process was faster.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            other => other?,
        }
    }
    Ok(())
}

/// Gives back partitions that were taken away.
pub fn restore(disk: &File, partitions: &[Known]) {
    for p in partitions {
        // One that is there again needs no help.
        let _ = partition::add(disk.as_fd(), p.number as i32, p.start, p.length);
    }
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// Entries of the GPT of a disk of `size` bytes, from its first header, else from the copy at the end; none if there is
/// no sound one. Nothing in a table is believed before its checksum and its place on the disk fit.
pub fn read_gpt(size: u64, mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>) -> io::Result<Vec<Entry>> {
    let sectors = size / SECTOR;
    if sectors < 6 {
        return Ok(Vec::new());
    }
    let mut mbr = [0u8; SECTOR as usize];
    read(&mut mbr, 0)?;
    // Only a protective MBR announces a GPT; a stale one behind another table is not looked for.
    let protective = (0..4).any(|i| mbr[446 + 16 * i + 4] == 0xee);
    if mbr[510..] != [0x55, 0xaa] || !protective {
        return Ok(Vec::new());
    }
    for lba in [1, sectors - 1] {
        let mut header = [0u8; SECTOR as usize];
        read(&mut header, lba * SECTOR)?;
        let header_len = le32(&header, 12) as usize;
        let (entries, entry_len) = (u64::from(le32(&header, 80)), u64::from(le32(&header, 84)));
        if &header[..8] != b"EFI PART" || !(92..=SECTOR as usize).contains(&header_len) || le64(&header, 24) != lba {
            continue;
        }
        let mut sealed = header;
        sealed[16..20].fill(0);
        if crc32fast::hash(&sealed[..header_len]) != le32(&header, 16) {
            continue;
        }
        let table_lba = le64(&header, 72);
        let table_len = entries.saturating_mul(entry_len);
        let fits = table_len.div_ceil(SECTOR) <= sectors && table_lba <= sectors - table_len.div_ceil(SECTOR);
        if !(128..=4096).contains(&entry_len) || entry_len % 8 != 0 || table_len > MAX_TABLE || !fits {
            continue;
        }
        // Whole sectors: the device may not take less.
        let mut table = vec![0u8; (table_len.next_multiple_of(SECTOR)) as usize];
        read(&mut table, table_lba * SECTOR)?;
        table.truncate(table_len as usize);
        if crc32fast::hash(&table) != le32(&header, 88) {
            continue;
        }
        let used = table.chunks_exact(entry_len as usize).zip(1u32..).take(MAX_ENTRIES as usize);
        return Ok(used
            .filter(|(entry, _)| entry[..16] != [0; 16])
            .filter_map(|(entry, number)| {
                let (first, last) = (le64(entry, 32), le64(entry, 40));
                (first <= last && last < sectors).then(|| Entry {
                    number,
                    start: first * SECTOR,
                    length: (last - first + 1) * SECTOR,
                })
            })
            .collect());
    }
    Ok(Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECTORS: u64 = 4096;

    /// A disk with one table: header at `lba`, entries at `table`.
    fn disk(lba: u64, table: u64, parts: &[(u64, u64)]) -> Vec<u8> {
        let mut disk = vec![0u8; (SECTORS * SECTOR) as usize];
        disk[446 + 4] = 0xee;
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        let at = (table * SECTOR) as usize;
        for (i, (first, last)) in parts.iter().enumerate() {
            let entry = &mut disk[at + i * 128..][..128];
            entry[0] = 1;
            entry[32..40].copy_from_slice(&first.to_le_bytes());
            entry[40..48].copy_from_slice(&last.to_le_bytes());
        }
        let table_sum = crc32fast::hash(&disk[at..at + 128 * 128]);
        let mut header = [0u8; 92];
        header[..8].copy_from_slice(b"EFI PART");
        header[12..16].copy_from_slice(&92u32.to_le_bytes());
        header[24..32].copy_from_slice(&lba.to_le_bytes());
        header[72..80].copy_from_slice(&table.to_le_bytes());
        header[80..84].copy_from_slice(&128u32.to_le_bytes());
        header[84..88].copy_from_slice(&128u32.to_le_bytes());
        header[88..92].copy_from_slice(&table_sum.to_le_bytes());
        let sum = crc32fast::hash(&header);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        disk[(lba * SECTOR) as usize..][..92].copy_from_slice(&header);
        disk
    }

    fn entries(disk: &[u8]) -> Vec<Entry> {
        read_gpt(disk.len() as u64, |buf, at| {
            buf.copy_from_slice(&disk[at as usize..at as usize + buf.len()]);
            Ok(())
        })
        .unwrap()
    }

    #[test]
    fn first_and_second_header() {
        let want = [
            Entry { number: 1, start: 2048 * 512, length: 1024 * 512 },
            Entry { number: 2, start: 40 * 512, length: 512 },
        ];
        assert_eq!(entries(&disk(1, 2, &[(2048, 3071), (40, 40)])), want);
        assert_eq!(entries(&disk(SECTORS - 1, SECTORS - 33, &[(2048, 3071), (40, 40)])), want);
    }

    #[test]
    fn damage_and_nonsense_give_nothing() {
        let good = disk(1, 2, &[(2048, 3071)]);
        for at in [446 + 4, 510, 512, 512 + 12, 512 + 17, 512 + 40, 512 + 72, 512 + 80, 512 + 84, 1024, 1024 + 33] {
            let mut bad = good.clone();
            bad[at] ^= 0xff;
            assert!(entries(&bad).is_empty(), "byte {at}");
        }
        assert!(entries(&disk(1, 2, &[(3071, 2048), (5, SECTORS)])).is_empty());
        assert!(entries(&disk(1, 2, &[(5, 6)])[..512 * 5]).is_empty());
    }

    #[test]
    fn kernel_view() {
        let dir = tempfile::tempdir().unwrap();
        for (name, number, dev) in [("loop5p2", "2\n", "259:1\n"), ("loop5p1", "1\n", "259:7\n")] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("partition"), number).unwrap();
            fs::write(dir.path().join(name).join("dev"), dev).unwrap();
            fs::write(dir.path().join(name).join("start"), "2048\n").unwrap();
            fs::write(dir.path().join(name).join("size"), "8\n").unwrap();
        }
        fs::create_dir(dir.path().join("queue")).unwrap();
        let known = |number, minor| Known { number, rdev: makedev(259, minor), start: 1 << 20, length: 4096 };
        assert_eq!(known_in(dir.path()), [known(1, 7), known(2, 1)]);
    }
}

//! The partition table of the PC's BIOS in the first sector (MBR), with its chain of logical partitions.

use std::io;

use crate::units::SECTOR;

use super::gpt::Partition;

const SECTOR_BYTES: usize = SECTOR as usize;
/// Types of an entry that holds further tables.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// Type of the entry that stands before a GPT.
const PROTECTIVE: u8 = 0xee;
/// First number of a logical partition.
const FIRST_LOGICAL: u32 = 5;
/// Most logical partitions that are read, so that a chain that runs in a circle ends.
const MAX_LOGICAL: u32 = 60;

/// Type, first sector, number of sectors.
type Entry = (u8, u64, u64);

/// Partitions of a disk of `size` bytes by number, without those that do not lie on it. Empty: no such table, or one that
/// stands before a GPT. `read` fills a buffer of whole sectors from a byte offset.
pub fn parse(size: u64, mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>) -> io::Result<Vec<Partition>> {
    let disk = size / SECTOR;
    let mut found = Vec::new();
    let Some(primary) = table(disk, 0, &mut read)? else { return Ok(found) };
    if primary.iter().any(|(kind, ..)| *kind == PROTECTIVE) {
        return Ok(found);
    }
    let mut add = |number, first: u64, count: u64| {
        if count > 0 && first > 0 && first.checked_add(count).is_some_and(|end| end <= disk) {
            found.push(Partition { number, start: first * SECTOR, length: count * SECTOR });
        }
    };
    for (number, (kind, first, count)) in (1..).zip(primary) {
        if kind != 0 && !EXTENDED.contains(&kind) {
            add(number, first, count);
        }
    }
    let extended = primary.into_iter().find(|(kind, first, _)| EXTENDED.contains(kind) && *first > 0);
    let Some((_, base, _)) = extended else { return Ok(found) };
    let (mut at, mut number) = (base, FIRST_LOGICAL);
    while number < FIRST_LOGICAL + MAX_LOGICAL {
        let Some([logical, next, ..]) = table(disk, at, &mut read)? else { break };
        if logical.0 != 0 && logical.2 > 0 {
            add(number, at + logical.1, logical.2);
            number += 1;
        }
        if !EXTENDED.contains(&next.0) || next.1 == 0 || base + next.1 == at {
            break;
        }
        at = base + next.1;
    }
    Ok(found)
}

/// The four entries of the table in this sector; none if it has none or lies beyond the disk.
fn table(
    disk: u64,
    sector: u64,
    read: &mut impl FnMut(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<Option<[Entry; 4]>> {
    if sector >= disk {
        return Ok(None);
    }
    let mut bytes = [0; SECTOR_BYTES];
    read(&mut bytes, sector * SECTOR)?;
    let raw = [446, 462, 478, 494].map(|at| bytes.get(at..at + 16).unwrap_or_default());
    // A boot sector of a file system has the same last two bytes: its code gives no flags 0 and 0x80 in all four places.
    let flags = raw.iter().all(|e| matches!(e.first(), Some(0 | 0x80)));
    if bytes[510..] != [0x55, 0xaa] || !flags {
        return Ok(None);
    }
    let le32 = |e: &[u8], at: usize| e.iter().skip(at).take(4).rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
    Ok(Some(raw.map(|e| (e.get(4).copied().unwrap_or(0), le32(e, 8), le32(e, 12)))))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sector of a table, and its entries: flag, type, start, count.
    type Table<'a> = (u64, &'a [(u8, u8, u32, u32)]);

    /// What is found on a disk of 1000 sectors with these tables.
    fn parsed(tables: &[Table<'_>]) -> Vec<(u32, u64, u64)> {
        let mut disk = vec![0; 1000 * SECTOR_BYTES];
        for (sector, entries) in tables {
            let sector = &mut disk[*sector as usize * SECTOR_BYTES..][..SECTOR_BYTES];
            for (i, (flag, kind, start, count)) in entries.iter().enumerate() {
                let e = &mut sector[446 + 16 * i..][..16];
                (e[0], e[4]) = (*flag, *kind);
                e[8..12].copy_from_slice(&start.to_le_bytes());
                e[12..].copy_from_slice(&count.to_le_bytes());
            }
            sector[510..].copy_from_slice(&[0x55, 0xaa]);
        }
        let read = |buf: &mut [u8], at: u64| {
            buf.copy_from_slice(&disk[at as usize..at as usize + buf.len()]);
            Ok(())
        };
        let found = parse(disk.len() as u64, read).unwrap();
        found.iter().map(|p| (p.number, p.start / SECTOR, p.length / SECTOR)).collect()
    }

    #[test]
    fn primary_and_logical_partitions() {
        assert_eq!(parsed(&[]), []);
        assert_eq!(parsed(&[(0, &[(0x80, 0x83, 10, 90), (0, 0x82, 100, 50)])]), [(1, 10, 90), (2, 100, 50)]);
        // Beyond the end of the disk, and without length.
        assert_eq!(parsed(&[(0, &[(0, 0x83, 950, 51), (0, 0x83, 950, 50), (0, 0x83, 5, 0)])]), [(2, 950, 50)]);
        let logical: &[Table<'_>] = &[
            (0, &[(0, 0x83, 10, 90), (0, 0x0f, 200, 800)]),
            (200, &[(0, 0x83, 8, 92), (0, 0x05, 100, 100)]),
            (300, &[(0, 0x83, 4, 20), (0, 0x00, 0, 0)]),
        ];
        assert_eq!(parsed(logical), [(1, 10, 90), (5, 208, 92), (6, 304, 20)]);
    }

    #[test]
    fn what_is_no_table_and_what_runs_in_a_circle() {
        assert_eq!(parsed(&[(0, &[(0, 0xee, 1, 999)])]), [], "a GPT follows");
        assert_eq!(parsed(&[(0, &[(0x33, 0x83, 10, 90)])]), [], "a boot sector");
        let circle: &[Table<'_>] = &[
            (0, &[(0, 0x05, 200, 800)]),
            (200, &[(0, 0x83, 8, 92), (0, 0x05, 100, 100)]),
            (300, &[(0, 0x83, 4, 20), (0, 0x05, 0, 100)]),
        ];
        assert_eq!(parsed(circle), [(5, 208, 92), (6, 304, 20)]);
        let long: &[Table<'_>] = &[
            (0, &[(0, 0x05, 200, 800)]),
            (200, &[(0, 0x83, 8, 92), (0, 0x05, 100, 100)]),
            (300, &[(0, 0x83, 4, 20), (0, 0x05, 200, 100)]),
            (400, &[(0, 0x83, 4, 20), (0, 0x05, 100, 100)]),
        ];
        assert_eq!(parsed(long).len(), MAX_LOGICAL as usize);
    }
}

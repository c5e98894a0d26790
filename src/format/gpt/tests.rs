use proptest::prelude::*;

use super::*;
use crate::error::Kind;

const DISK: u64 = 4096;

fn disk(gpt: &Gpt, sectors: u64) -> Vec<u8> {
    let mut d = vec![0; (sectors * SECTOR) as usize];
    for p in gpt.encode().unwrap() {
        d[p.offset as usize..][..p.bytes.len()].copy_from_slice(&p.bytes);
    }
    d
}

fn parse(d: &[u8]) -> Option<Gpt> {
    Gpt::parse(d.len() as u64, |buf, at| {
        buf.copy_from_slice(&d[at as usize..at as usize + buf.len()]);
        Ok(())
    })
    .unwrap()
}

fn partitions(d: &[u8]) -> Vec<Partition> {
    parse(d).iter().flat_map(Gpt::partitions).collect()
}

/// A disk with one table by hand: header at `lba`, entries at `table`.
fn by_hand(lba: u64, table: u64, parts: &[(u64, u64)]) -> Vec<u8> {
    let mut disk = vec![0u8; (DISK * SECTOR) as usize];
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

/// Changes a header field and makes its checksum right again.
fn with_field(d: &mut [u8], lba: u64, at: usize, bytes: &[u8]) {
    let header = &mut d[(lba * SECTOR) as usize..][..HEADER];
    header[at..at + bytes.len()].copy_from_slice(bytes);
    header[16..20].fill(0);
    let sum = crc32fast::hash(header);
    header[16..20].copy_from_slice(&sum.to_le_bytes());
}

#[test]
fn a_new_table_leaves_a_cluster_at_each_end() {
    let of = |disk, cluster| Gpt::single(disk, cluster).map(|g| g.partitions().next().unwrap());
    let got = of(20_971_520, ClusterSize::DEFAULT).unwrap();
    assert_eq!(got, Partition { number: 1, start: 2048 * SECTOR, length: (20_971_520 - 2 * 2048) * SECTOR });
    assert_eq!(of(4096, ClusterSize::DEFAULT).unwrap_err().kind(), Kind::Param);
    assert_eq!(of(6144, ClusterSize::DEFAULT).unwrap().length, 2048 * SECTOR);
}

#[test]
fn both_copies_are_read_as_written() {
    let gpt = Gpt::single(8192, ClusterSize::from_sectors(64).unwrap()).unwrap();
    let want = [Partition { number: 1, start: 64 * SECTOR, length: (8192 - 128) * SECTOR }];
    let mut d = disk(&gpt, 8192);
    assert_eq!(partitions(&d), want);
    let name: Vec<u8> = "primary".encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert_eq!(d[1024 + 56..1024 + 56 + name.len()], name);
    d[512 + 40] ^= 1;
    assert_eq!(partitions(&d), want, "the copy at the end");
}

#[test]
fn first_and_second_header() {
    let want = [
        Partition { number: 1, start: 2048 * 512, length: 1024 * 512 },
        Partition { number: 2, start: 40 * 512, length: 512 },
    ];
    assert_eq!(partitions(&by_hand(1, 2, &[(2048, 3071), (40, 40)])), want);
    assert_eq!(partitions(&by_hand(DISK - 1, DISK - 33, &[(2048, 3071), (40, 40)])), want);
}

#[test]
fn damage_and_nonsense_give_nothing() {
    let good = by_hand(1, 2, &[(2048, 3071)]);
    for at in [446 + 4, 510, 512, 512 + 12, 512 + 17, 512 + 40, 512 + 72, 512 + 80, 512 + 84, 1024, 1024 + 33] {
        let mut bad = good.clone();
        bad[at] ^= 0xff;
        assert_eq!(partitions(&bad), [], "byte {at}");
    }
    assert_eq!(partitions(&by_hand(1, 2, &[(3071, 2048), (5, DISK)])), []);
    assert_eq!(partitions(&by_hand(1, 2, &[(5, 6)])[..512 * 5]), []);
}

#[test]
fn hostile_sizes_are_bounded() {
    let good = by_hand(1, 2, &[(2048, 3071)]);
    let fields: [(usize, &[u8]); 6] = [
        (72, &u64::MAX.to_le_bytes()),
        (72, &(DISK - 31).to_le_bytes()),
        (80, &u32::MAX.to_le_bytes()),
        (84, &u32::MAX.to_le_bytes()),
        (84, &0u32.to_le_bytes()),
        (80, &(MAX_TABLE as u32 / 128 + 1).to_le_bytes()),
    ];
    for (at, value) in fields {
        let mut bad = good.clone();
        with_field(&mut bad, 1, at, value);
        assert_eq!(parse(&bad), None, "{value:?} at {at}");
    }
    // Partitions and usable sectors outside of the disk are read, not written.
    for (at, value) in [(40, u64::MAX), (48, u64::MAX), (40, 0)] {
        let mut odd = good.clone();
        with_field(&mut odd, 1, 40, &34u64.to_le_bytes());
        with_field(&mut odd, 1, 48, &(DISK - 34).to_le_bytes());
        assert!(parse(&odd).unwrap().encode().is_ok());
        with_field(&mut odd, 1, at, &value.to_le_bytes());
        assert_eq!(parse(&odd).unwrap().encode().unwrap_err().kind(), Kind::ChangeGpt, "{value} at {at}");
    }
    // A disk of which nothing can be addressed.
    assert!(Gpt::parse(u64::MAX, |_, _| Err(io::ErrorKind::UnexpectedEof.into())).is_err());
    let gpt = Gpt::single(8192, ClusterSize::DEFAULT).unwrap();
    assert_eq!(gpt.resize(u64::MAX).unwrap_err().kind(), Kind::ChangeGpt);
    assert_eq!(gpt.resize(0).unwrap_err().kind(), Kind::ChangeGpt);
}

#[test]
fn a_table_follows_the_end_of_its_disk() {
    let gpt = Gpt::single(8192, ClusterSize::DEFAULT).unwrap();
    let grown = gpt.resize(16384).unwrap();
    let d = disk(&grown, 16384);
    assert_eq!(parse(&d).as_ref(), Some(&grown));
    assert_eq!((grown.last_usable, le32(&d, 446 + 12)), (16384 - 34, 16383));
    assert_eq!((le64(&d, 512 + 32), le64(&d, 16383 * 512 + 24)), (16383, 16383));
    assert_eq!(partitions(&d), gpt.partitions().collect::<Vec<_>>());
    assert_eq!(grown.resize(8192).unwrap(), gpt);

    // The disk has grown already: its second header stands in the middle.
    let mut longer = disk(&gpt, 8192);
    longer.resize(16384 * 512, 0);
    assert_eq!(parse(&longer).unwrap().resize(16384).unwrap(), grown);

    // The partition ends with sector 6143.
    assert!(gpt.resize(6144 + 33).is_ok());
    assert_eq!(gpt.resize(6144 + 32).unwrap_err().kind(), Kind::ChangeGpt);
    // Beside another entry of the MBR the protective one stays.
    let mut hybrid = gpt.clone();
    hybrid.mbr[446 + 16 + 4] = 0x83;
    assert_eq!(hybrid.resize(16384).unwrap().mbr, hybrid.mbr);
    let huge = gpt.resize(1 << 40).unwrap();
    assert_eq!(le32(&huge.mbr, 446 + 12), u32::MAX);
}

prop_compose! {
    fn tables()(
        guid in any::<u128>(),
        gap in 0u64..3,
        entry_len in (16usize..40).prop_map(|n| n * 8),
        count in 0usize..140,
        fill in any::<u64>(),
        used in proptest::collection::vec((0usize..140, 0u64..DISK, 0u64..DISK), 0..6),
        spare in (0u64..9, 0u64..9),
        boot in any::<u8>(),
    ) -> Gpt {
        let mut entries = vec![0; entry_len * count];
        for (i, first, last) in used {
            let Some(entry) = entries.chunks_exact_mut(entry_len).nth(i) else { continue };
            entry.fill(fill as u8);
            entry[..16].fill(1);
            entry[32..40].copy_from_slice(&first.to_le_bytes());
            entry[40..48].copy_from_slice(&last.to_le_bytes());
        }
        let (table, front_table) = (sectors_of(entries.len()), FRONT_TABLE + gap);
        let mut mbr = protective_mbr(DISK);
        mbr[..440].fill(boot);
        Gpt {
            disk: DISK,
            guid: Uuid::from_u128(guid),
            first_usable: front_table + table + spare.0,
            last_usable: DISK - 2 - table - spare.1,
            front_table,
            entry_len,
            entries,
            mbr,
        }
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read(gpt in tables(), damaged in 0usize..HEADER, flip in 1u8..) {
        let mut d = disk(&gpt, DISK);
        prop_assert_eq!(parse(&d), Some(gpt.clone()));
        d[SECTOR_BYTES + damaged] ^= flip;
        let backup = Gpt { front_table: FRONT_TABLE, ..gpt };
        prop_assert_eq!(parse(&d), Some(backup));
    }

    #[test]
    fn a_disk_that_grows_keeps_its_partitions(gpt in tables(), by in 1u64..5000) {
        let before: Vec<_> = gpt.partitions().collect();
        if let Ok(grown) = gpt.resize(DISK + by) {
            prop_assert_eq!(grown.partitions().collect::<Vec<_>>(), before);
            prop_assert_eq!(grown.entries.clone(), gpt.entries.clone());
            prop_assert_eq!(parse(&disk(&grown, DISK + by)), Some(grown));
        }
    }

    #[test]
    fn any_bytes_are_read_within_the_disk(
        head in proptest::collection::vec(any::<u8>(), HEADER),
        size in prop_oneof![0u64..1 << 24, any::<u64>()],
        seal in any::<bool>(),
    ) {
        let mut front = [0; 2 * SECTOR_BYTES];
        front[..SECTOR_BYTES].copy_from_slice(&protective_mbr(2));
        front[SECTOR_BYTES..][..HEADER].copy_from_slice(&head);
        if seal {
            with_field(&mut front, 1, 0, SIGNATURE);
            with_field(&mut front, 1, 12, &(HEADER as u32).to_le_bytes());
            with_field(&mut front, 1, 24, &1u64.to_le_bytes());
            with_field(&mut front, 1, 80, &(u32::from(head[80]) + 1).to_le_bytes());
            with_field(&mut front, 1, 84, &128u32.to_le_bytes());
        }
        let got = Gpt::parse(size, |buf, at| {
            assert!(buf.len() as u64 <= MAX_TABLE && at.checked_add(buf.len() as u64).is_some_and(|end| end <= size));
            for (b, i) in buf.iter_mut().zip(at..) {
                *b = front.get(i as usize).copied().unwrap_or(0);
            }
            Ok(())
        });
        prop_assert!(got.is_ok());
    }
}

#[test]
fn the_last_partition_follows_the_end_of_the_disk() {
    let cluster = ClusterSize::DEFAULT;
    let align = u64::from(cluster.sectors());
    let small = Gpt::single(100 * align, cluster).unwrap();
    for disk in [200 * align, 3000 * align + 8] {
        let (grown, last) = small.resize(disk).unwrap().extend_last(align).unwrap();
        // Just as a new table of that disk has it.
        let wanted: Vec<Partition> = Gpt::single(disk, cluster).unwrap().partitions().collect();
        assert_eq!((grown.partitions().collect::<Vec<_>>(), last), (wanted.clone(), wanted[0]));
        grown.encode().unwrap();
        assert_eq!(grown.extend_last(align), None);
    }
    assert_eq!(small.extend_last(align), None);
    let mut empty = small.resize(200 * align).unwrap();
    empty.entries.fill(0);
    assert_eq!(empty.extend_last(align), None);
}

#[test]
fn a_table_is_cut_to_a_smaller_disk_behind_its_last_partition() {
    let cluster = ClusterSize::DEFAULT;
    let align = u64::from(cluster.sectors());
    let large = Gpt::single(200 * align, cluster).unwrap();
    let cut = large.cut(100 * align, 99 * align).unwrap();
    let wanted: Vec<Partition> = Gpt::single(100 * align, cluster).unwrap().partitions().collect();
    assert_eq!(cut.partitions().collect::<Vec<_>>(), wanted);
    cut.encode().unwrap();
    // No place for the second copy, nothing left of the partition, more than it had.
    for (disk, end) in [(99 * align, 99 * align), (100 * align, align), (200 * align, 200 * align)] {
        assert!(large.cut(disk, end).is_err(), "{disk} {end}");
    }
}

/// The pieces are written in reverse, each durable before the next: a power cut leaves any part of the sectors of one.
#[test]
fn a_power_cut_while_the_table_grows_leaves_the_old_or_the_new_one() {
    let cluster = ClusterSize::DEFAULT;
    let align = u64::from(cluster.sectors());
    let old = Gpt::single(4 * align, cluster).unwrap();
    let (new, _) = old.resize(6 * align).unwrap().extend_last(align).unwrap();
    let mut before = disk(&old, 4 * align);
    before.resize((6 * align * SECTOR) as usize, 0);
    let (was, will) = (partitions(&before), new.partitions().collect::<Vec<_>>());
    assert_ne!(was, will);
    let mut state = 1_u64;
    for piece in new.encode().unwrap().iter().rev() {
        for round in 0..200 {
            let mut torn = before.clone();
            for (i, sector) in piece.bytes.chunks(SECTOR_BYTES).enumerate() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                // In some rounds only one sector is there, or only one is missing.
                let there = match round {
                    0..40 => i == round,
                    40..80 => i != round - 40,
                    _ => state >> 63 == 1,
                };
                if there {
                    torn[piece.offset as usize + i * SECTOR_BYTES..][..sector.len()].copy_from_slice(sector);
                }
            }
            let found = partitions(&torn);
            assert!(found == was || found == will, "round {round}: {found:?}");
        }
        before[piece.offset as usize..][..piece.bytes.len()].copy_from_slice(&piece.bytes);
    }
    assert_eq!(partitions(&before), will);
}

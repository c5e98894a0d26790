use proptest::prelude::*;

use super::bat::{self, Entry};
use super::geometry::{Geometry, chs};
use super::guid::{self, Guid};
use super::header::{self, Header, Version};
use super::limits;
use crate::error::Kind;
use crate::units::ClusterSize;

fn cluster(sectors: u64) -> ClusterSize {
    ClusterSize::from_sectors(sectors).unwrap()
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
}

const GOLDEN_V2: &str = "57697468 6f754672 65537061 63457874 02000000 10000000 00a00000 00080000
    00280000 00004001 00000000 00000000 00080000 01000000 00000000 00000000";
const GOLDEN_V1: &str = "57697468 6f757446 72656553 70616365 02000000 10000000 82200000 80000000
    00000100 00008000 00000000 00000000 80020000 01000000 00000000 00000000";

#[test]
fn a_file_of_another_format_is_named_in_readable_text() {
    let error = |begin: &[u8]| {
        let mut b = begin.to_vec();
        b.resize(header::SIZE, 0);
        Header::parse(&b).unwrap_err().to_string()
    };
    let xml = error(b"<?xml version=\"1.0\"?>");
    assert!(xml.contains("'<?xml version=\"1'") && xml.contains("an XML file"), "{xml}");
    assert!(error(b"\xef\xbb\xbf<?xml?>").contains("an XML file"));
    let text = error(b"it's \\ \t\xff\0");
    assert!(text.contains("Type Plain"), "{text}");
    assert!(text.contains(r"'it's \ \x09\xff\x00"), "{text}");
}

#[test]
fn headers_of_the_classic() {
    let v2 = Header::new(Version::V2, cluster(2048), 20_971_520).unwrap();
    assert_eq!(v2.encode().to_vec(), bytes(GOLDEN_V2));
    assert_eq!(Header::parse(&bytes(GOLDEN_V2)).unwrap(), v2);
    assert_eq!((v2.clusters(), v2.first_data()), (10240, 1));
    let v1 = Header::new(Version::V1, cluster(128), 8_388_608).unwrap();
    assert_eq!(v1.encode().to_vec(), bytes(GOLDEN_V1));
    assert_eq!(Header::parse(&bytes(GOLDEN_V1)).unwrap(), v1);
    assert_eq!((v1.clusters(), v1.first_data()), (65536, 5));
    for h in [v1, v2] {
        h.check_layout().unwrap();
        assert!(!h.is_marked() && !h.is_converting());
    }
}

#[test]
fn geometry_thresholds() {
    let g = |cylinders, heads| Geometry { cylinders, heads };
    assert_eq!(chs(20_971_520), g(40960, 16));
    assert_eq!(chs(8_388_608), g(8322, 16));
    // The middle rule's borders do not belong to it.
    assert_eq!(chs(1_032_192), g(1024, 16));
    assert_eq!(chs(1_032_193), g(1024, 16));
    assert_eq!(chs(16_777_215), g(16644, 16));
    assert_eq!(chs(16_777_216), g(32768, 16));
    // 64 sectors: 2 tracks of 32.
    assert_eq!(chs(64), g(1, 2));
    // An odd number of tracks has no heads that fit.
    assert_eq!(chs(32), g(32, 1));
    assert_eq!(chs(7), g(7, 1));
    // Cylinders are cut to 32 bits.
    assert_eq!(chs((1 << 32) * 7 + 1), g(1, 1));
}

#[test]
fn layout_of_large_disks() {
    // 16 TiB of 32 KiB clusters: 2 GiB of BAT.
    let h = Header::new(Version::V2, cluster(64), limits::MAX_FS_SECTORS).unwrap();
    assert_eq!(h.clusters(), 1 << 29);
    assert_eq!(h.first_data(), 65537);
    h.check_layout().unwrap();
    // The header's 64 bytes decide at the border of a cluster.
    assert_eq!(bat::first_data(8176, cluster(64)), 1);
    assert_eq!(bat::first_data(8177, cluster(64)), 2);
    assert_eq!(bat::first_data(8176 + 8192, cluster(64)), 2);
    assert_eq!(bat::first_data(262_128, cluster(2048)), 1);
}

#[test]
fn places_of_entries() {
    assert_eq!((bat::page_of(0), bat::index_of(0)), (0, 16));
    assert_eq!((bat::page_of(1007), bat::index_of(1007)), (0, 1023));
    assert_eq!((bat::page_of(1008), bat::index_of(1008)), (1, 0));
    assert_eq!(bat::page_of(u32::MAX), 4_194_304);
    assert_eq!(bat::decode(Version::V1, cluster(128), 0), Entry::Free);
    assert_eq!(bat::decode(Version::V1, cluster(128), 640), Entry::At(5));
    assert_eq!(bat::decode(Version::V1, cluster(128), 641), Entry::Misaligned);
    assert_eq!(bat::decode(Version::V1, cluster(128), u32::MAX), Entry::Misaligned);
    assert_eq!(bat::decode(Version::V2, cluster(128), 641), Entry::At(641));
    assert_eq!(bat::encode(Version::V1, cluster(128), 5), Some(640));
    let limit = bat::host_cluster_limit(Version::V1, cluster(128));
    assert!(bat::encode(Version::V1, cluster(128), limit - 1).is_some());
    assert!(bat::encode(Version::V1, cluster(128), limit).is_none());
    assert_eq!(bat::host_cluster_limit(Version::V1, cluster(131_072)), 32768);
}

#[test]
fn sizes() {
    let c = cluster(2048);
    assert_eq!(limits::round_size(Version::V2, c, 1).unwrap(), 2048);
    assert_eq!(limits::round_size(Version::V2, c, 2048).unwrap(), 2048);
    assert_eq!(limits::round_size(Version::V2, c, 2049).unwrap(), 4096);
    // Version 1 rounds down where rounding up would pass 2^32.
    assert_eq!(limits::round_size(Version::V1, c, 0xffff_ffff).unwrap(), 0xffff_f800);
    assert_eq!(limits::round_size(Version::V1, c, 0x1_0000_0000).unwrap_err().kind(), Kind::Param);
    assert_eq!(limits::round_size(Version::V2, c, 0).unwrap_err().kind(), Kind::Param);
    assert_eq!(limits::max_size(c), 34_359_738_368);
    assert_eq!(Header::new(Version::V1, c, 0x1_8000_0000).unwrap_err().kind(), Kind::Param);
}

#[test]
fn bad_headers_name_place_and_value() {
    let good = Header::new(Version::V2, cluster(64), 64 * 100).unwrap().encode();
    let broken = |at: usize, value: u32| {
        let mut b = good;
        b[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let e = Header::parse(&b).and_then(|h| h.check_layout()).unwrap_err();
        assert_eq!(e.kind(), Kind::Format, "{e}");
        e.to_string()
    };
    assert!(broken(0, 0).contains("offset 0"));
    assert!(broken(16, 3).contains("type 3"));
    for bs in [0, 32, 63, 96, 262_144, u32::MAX] {
        assert!(broken(28, bs).contains(&format!("{bs} sectors")));
    }
    assert!(broken(48, 0).contains("offset 48"));
    assert!(broken(48, 65).contains("offset 48"));
    let mut old = Header::new(Version::V1, cluster(64), 64 * 100).unwrap().encode();
    old[48..52].fill(0);
    assert!(Header::parse(&old).unwrap_err().to_string().contains("qemu-img convert -f parallels"));
    // The table of a larger disk would reach into the data.
    assert!(broken(36, 64 * 8177).contains("must be at least 128"));
    assert!(broken(36, 0).contains("disk size 0"));
    assert!(broken(40, u32::MAX).contains("disk size"));
    assert_eq!(Header::parse(&good[..63]).unwrap_err().kind(), Kind::Read);
}

#[test]
fn data_may_begin_later_than_the_table_needs() {
    let mut h = Header::new(Version::V2, cluster(64), 64 * 100).unwrap();
    assert_eq!((h.first_data(), h.table_clusters()), (1, 1));
    h.first_data_sector = 5 * 64;
    let h = Header::parse(&h.encode()).unwrap();
    h.check_layout().unwrap();
    assert_eq!((h.first_data(), h.table_clusters()), (5, 1));
    // However late it begins, the image reaches no further.
    assert_eq!(h.reach(), 1 + 3 * 100 + 8192);
}

#[test]
fn a_size_is_kept_to_the_sector_where_that_is_wanted() {
    for sectors in [1, 6403, 6464, 64 * 8176 + 1] {
        let exact = Header::sized(Version::V2, cluster(64), sectors).unwrap();
        exact.check_layout().unwrap();
        let rounded = Header::new(Version::V2, cluster(64), sectors).unwrap();
        assert_eq!(exact.sectors, sectors);
        assert_eq!(Header { sectors: rounded.sectors, ..exact }, rounded);
    }
}

#[test]
fn marks() {
    let mut h = Header::new(Version::V2, cluster(64), 6400).unwrap();
    for (word, marked) in [(0, false), (header::IN_USE, true), (header::CLOSED_V21, false), (1, true), (77, true)] {
        h.in_use = word;
        assert_eq!(h.is_marked(), marked, "{word:#x}");
        assert_eq!(Header::parse(&h.encode()).unwrap(), h);
    }
    assert_eq!(&header::IN_USE.to_le_bytes(), b"Ynot");
    assert_eq!(&header::CLOSED_V21.to_le_bytes(), b"v2.1");
}

#[test]
fn disks_of_qemu_may_end_inside_a_cluster() {
    let mut h = Header::new(Version::V2, cluster(2048), 21504).unwrap();
    assert_eq!(h.sectors, 22528);
    h.sectors = 21504;
    assert_eq!(h.clusters(), 11);
    h.check_layout().unwrap();
}

#[test]
fn guids() {
    let upper = "{5FBAABE3-6958-40FF-92A7-860E329AAB41}";
    let g = Guid::parse(upper).unwrap();
    assert_eq!(g, guid::TOP);
    assert_eq!(g.to_string(), upper);
    assert_eq!(Guid::parse(&upper[1..37]).unwrap(), guid::TOP);
    assert!(guid::NONE.is_none());
    let set: std::collections::HashSet<Guid> = [g, guid::TOP].into();
    assert_eq!(set.len(), 1);
    for bad in [
        "",
        "{}",
        "{5fbaabe3-6958-40ff-92a7-860e329aab41",
        "5fbaabe3-6958-40ff-92a7-860e329aab41}",
        "{5fbaabe3-6958-40ff-92a7-860e329aab4g}",
        "{5fbaabe36958-40ff-92a7-860e329aab41-}",
        "(5fbaabe3-6958-40ff-92a7-860e329aab41)",
        "5fbaabe3-6958-40ff-92a7-860e329aab\u{e9}",
    ] {
        assert_eq!(Guid::parse(bad).unwrap_err().kind(), Kind::Param, "{bad}");
    }
    let made = Guid::generate();
    let text = made.as_str();
    assert_eq!(text, text.to_lowercase());
    assert_eq!(&text[15..16], "4");
    assert!(matches!(&text[20..21], "8" | "9" | "a" | "b"));
    assert_ne!(made, Guid::generate());
}

proptest! {
    #[test]
    fn any_bytes_parse_or_fail(b in proptest::collection::vec(any::<u8>(), 0..80)) {
        let _ = Header::parse(&b);
    }

    #[test]
    fn damaged_headers_do_not_panic(at in 0usize..64, value in any::<u8>(), size in 1u64..1 << 40, shift in 6u32..18) {
        if let Ok(h) = Header::new(Version::V2, cluster(1 << shift), size) {
            let mut b = h.encode();
            b[at] = value;
            if let Ok(h) = Header::parse(&b) {
                let _ = (h.check_layout(), h.clusters(), h.first_data(), h.is_marked());
                prop_assert_eq!(&h.encode()[..16], &b[..16]);
            }
        }
    }

    #[test]
    fn headers_come_back(size in 1u64..1 << 42, shift in 6u32..18, v1 in any::<bool>()) {
        let version = if v1 { Version::V1 } else { Version::V2 };
        if let Ok(h) = Header::new(version, cluster(1 << shift), size) {
            prop_assert_eq!(Header::parse(&h.encode()).unwrap(), h);
            prop_assert!(h.check_layout().is_ok());
            prop_assert!(h.sectors >= size && h.sectors - size < 1 << shift);
        } else {
            prop_assert!(v1 || size.div_ceil(1 << shift) > u64::from(u32::MAX));
        }
    }

    #[test]
    fn any_text_parses_as_guid_or_fails(text in ".{0,40}") {
        if let Ok(g) = Guid::parse(&text) {
            prop_assert_eq!(Guid::parse(g.as_str()).unwrap(), g);
        }
    }

    #[test]
    fn entries_come_back(host_cluster in 1u32.., shift in 6u32..18, v1 in any::<bool>()) {
        let version = if v1 { Version::V1 } else { Version::V2 };
        let c = cluster(1 << shift);
        match bat::encode(version, c, host_cluster) {
            Some(entry) => prop_assert_eq!(bat::decode(version, c, entry), Entry::At(host_cluster)),
            None => prop_assert!(host_cluster >= bat::host_cluster_limit(version, c)),
        }
    }
}

#[test]
fn pages_of_a_table() {
    assert_eq!([0, 1, 1008, 1009, 1 << 32].map(bat::pages_for), [0, 1, 1, 2, 4_194_305]);
    assert_eq!((bat::clusters_of(0), bat::clusters_of(1)), (0..1008, 1008..2032));
    let unit = bat::Unit::of(true, 16);
    let mut page = [0; bat::PAGE_BYTES];
    bat::store(&mut page, 1023, unit.entry(7));
    assert_eq!((bat::load(&page, 1023), &page[4092..]), (7 * 128, &[0x80, 3, 0, 0][..]));
    assert_eq!(bat::load(&page[..100], 25), 0);
    assert_eq!(unit.decode_within(7 * 128, 1, 8), Some(7));
    assert_eq!(unit.decode_within(0, 1, 8), Some(0));
    for damaged in [7 * 128 + 1, 8 * 128, 128] {
        assert_eq!(unit.decode_within(damaged, 2, 8), None);
    }
}

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use proptest::prelude::*;

use super::check::{CheckOptions, check_file};
use super::complete::{complete, first_gap};
use super::content::{Piece, Source};
use super::create::{Built, Params, build, create};
use super::open::{lexical, open_level};
use super::scan::HostClusters;
use crate::descriptor::ImageMode;
use crate::error::{Error, Kind, Result};
use crate::format::bat::{self, Entry};
use crate::format::header::{self, Header, Version};
use crate::units::ClusterSize;

const CLUSTER: u64 = 32768;

fn params(mode: ImageMode) -> Params {
    let cluster = ClusterSize::from_sectors(64).unwrap();
    Params { version: Version::V2, cluster, sectors: 64 * 300, mode }
}

fn quiet(_: u64, _: u64) -> Result<()> {
    Ok(())
}

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// The disk in an image, read by the rules of the format alone.
fn disk(path: &Path, raw: bool) -> Vec<u8> {
    let bytes = std::fs::read(path).unwrap();
    if raw {
        return bytes;
    }
    let h = Header::parse(&bytes).unwrap();
    let size = h.cluster.bytes() as usize;
    let mut out = vec![0; h.sectors as usize * 512];
    for c in 0..h.clusters() {
        let at = bat::entry_offset(c) as usize;
        let entry = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        if let Entry::At(host_cluster) = bat::decode(h.version, h.cluster, entry) {
            out[c as usize * size..][..size].copy_from_slice(&bytes[host_cluster as usize * size..][..size]);
        }
    }
    out
}

#[test]
fn empty_images() {
    let d = dir();
    let p = d.path().join("a");
    let made = create(&p, &params(ImageMode::Expanded), &mut quiet).unwrap();
    let bytes = std::fs::read(&p).unwrap();
    assert_eq!(bytes.len() as u64, CLUSTER);
    assert_eq!(made.bytes, CLUSTER);
    let h = Header::new(Version::V2, ClusterSize::from_sectors(64).unwrap(), 64 * 300).unwrap();
    assert_eq!(bytes[..64], h.encode());
    assert!(bytes[64..].iter().all(|b| *b == 0));
    let meta = std::fs::metadata(&p).unwrap();
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    assert!(meta.blocks() * 512 >= CLUSTER);
    // What is there stays.
    let e = create(&p, &params(ImageMode::Raw), &mut quiet).unwrap_err();
    assert_eq!(e.kind(), Kind::Param);
    assert_eq!(std::fs::read(&p).unwrap(), bytes);
    let zero = Params { sectors: 0, ..params(ImageMode::Raw) };
    assert_eq!(create(&d.path().join("b"), &zero, &mut quiet).unwrap_err().kind(), Kind::Param);
    assert!(!d.path().join("b").exists());
}

#[test]
fn preallocated_and_raw_images() {
    let d = dir();
    for version in [Version::V1, Version::V2] {
        let p = d.path().join(format!("p{}", version.number()));
        let wanted = Params { version, sectors: 64 * 9000 - 5, ..params(ImageMode::Preallocated) };
        let made = create(&p, &wanted, &mut quiet).unwrap();
        assert_eq!(made.sectors, 64 * 9000);
        let f = File::open(&p).unwrap();
        let mut head = vec![0; 2 * CLUSTER as usize];
        f.read_exact_at(&mut head, 0).unwrap();
        let h = Header::parse(&head).unwrap();
        assert_eq!((h.first_data(), h.flags), (2, 0));
        assert_eq!(f.metadata().unwrap().len(), 9002 * CLUSTER);
        assert!(f.metadata().unwrap().blocks() * 512 >= 9000 * CLUSTER);
        for c in [0u32, 8175, 8176, 8999] {
            let at = bat::entry_offset(c) as usize;
            let entry = u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
            assert_eq!(bat::decode(version, h.cluster, entry), Entry::At(2 + c));
        }
        assert!(head[bat::entry_offset(9000) as usize..].iter().all(|b| *b == 0));
        check_file(&p, None, &CheckOptions { force: true, check: true, read_only: true, ..Default::default() })
            .unwrap();
    }
    let p = d.path().join("raw");
    let made = create(&p, &Params { sectors: 65, ..params(ImageMode::Raw) }, &mut quiet).unwrap();
    assert_eq!(made, Built { sectors: 128, header: None, bytes: 65536, id: made.id });
    assert_eq!(std::fs::read(&p).unwrap(), vec![0; 65536]);
    let raw = CheckOptions { raw: true, raw_blocksize: Some(64), ..Default::default() };
    check_file(&p, None, &raw).unwrap();
    // Version 1 cannot name the last clusters of its largest disk when all of them have a host cluster.
    let huge = Params { version: Version::V1, sectors: 0xffff_ffff, ..params(ImageMode::Preallocated) };
    assert_eq!(create(&d.path().join("huge"), &huge, &mut quiet).unwrap_err().kind(), Kind::Param);
    assert!(!d.path().join("huge").exists());
}

#[test]
fn content() {
    let d = dir();
    let source_path = d.path().join("source");
    let source = File::create_new(&source_path).unwrap();
    source.write_all_at(&[0xaa; 5000], 100).unwrap();
    source.write_all_at(&[0xbb; 10], 40 * CLUSTER).unwrap();
    // Data, and zero all the same.
    source.write_all_at(&vec![0; 3 * CLUSTER as usize], 100 * CLUSTER).unwrap();
    source.write_all_at(&vec![0xcc; 4 << 20], 120 * CLUSTER + 77 * 512).unwrap();
    source.set_len(280 * CLUSTER).unwrap();
    let source = File::open(&source_path).unwrap();
    let shift = 2 * CLUSTER;
    let pieces = [
        Piece::bytes(299 * CLUSTER + 512, &[0xdd; 1000]),
        Piece::bytes(0, &[0xee; 512]),
        Piece::file(shift, &source, 290 * CLUSTER),
    ];
    let mut want = vec![0; 300 * CLUSTER as usize];
    want[..512].fill(0xee);
    want[299 * CLUSTER as usize + 512..][..1000].fill(0xdd);
    let from = std::fs::read(&source_path).unwrap();
    want[shift as usize..][..from.len()].copy_from_slice(&from);
    for mode in [ImageMode::Expanded, ImageMode::Preallocated, ImageMode::Raw] {
        for version in [Version::V1, Version::V2] {
            let p = d.path().join(format!("{mode:?}{}", version.number()));
            let mut told = (0, 0);
            let made = build(&p, &Params { version, ..params(mode) }, &pieces, &mut |done, total| {
                assert!(told.0 <= done && done <= total);
                told = (done, total);
                Ok(())
            })
            .unwrap();
            assert_eq!(told.0, told.1);
            let raw = mode == ImageMode::Raw;
            assert!(disk(&p, raw) == want, "{mode:?}");
            let options = CheckOptions {
                force: true,
                check: true,
                read_only: true,
                raw,
                raw_blocksize: Some(64),
                ..Default::default()
            };
            let report = check_file(&p, None, &options).unwrap();
            assert_eq!(report.notes, Vec::<String>::new());
            if mode == ImageMode::Expanded {
                // 1 + 1 + 1 + (128 or 129) + 1 clusters with data, and the table.
                assert!((133..=135).contains(&(made.bytes / CLUSTER)), "{}", made.bytes / CLUSTER);
                assert_eq!(made.header.unwrap().flags, 0);
            }
        }
    }
}

#[test]
fn bad_content() {
    let d = dir();
    let p = d.path().join("a");
    let file = tempfile::tempfile().unwrap();
    let refused = |pieces: &[Piece<'_>]| {
        assert_eq!(build(&p, &params(ImageMode::Expanded), pieces, &mut quiet).unwrap_err().kind(), Kind::Param);
        assert!(!p.exists());
    };
    refused(&[Piece::bytes(0, &[1; 513]), Piece::bytes(512, &[1; 512])]);
    refused(&[Piece::bytes(300 * CLUSTER - 1, &[1; 2])]);
    refused(&[Piece::file(u64::MAX, &file, 2)]);
    refused(&[Piece { device_offset: 0, len: 3, source: Source::Bytes(&[1; 2]) }]);
    // Cancelled: nothing stays behind.
    for mode in [ImageMode::Expanded, ImageMode::Preallocated, ImageMode::Raw] {
        let mut stop = |_, _| Err(Error::new(Kind::Abort, "cancelled"));
        let e = build(&p, &params(mode), &[Piece::bytes(0, &[1; 2])], &mut stop).unwrap_err();
        assert_eq!(e.kind(), Kind::Abort);
        assert!(!p.exists());
    }
}

fn on_ext4(path: &Path) -> bool {
    let fs = nix::sys::statfs::statfs(path).unwrap();
    fs.filesystem_type() == nix::sys::statfs::EXT4_SUPER_MAGIC
}

#[test]
fn completing_fills_and_changes_nothing() {
    let d = dir();
    let p = d.path().join("a");
    let cluster = ClusterSize::from_sectors(64).unwrap();
    let f = File::options().read(true).write(true).create_new(true).open(&p).unwrap();
    f.set_len(40 * CLUSTER).unwrap();
    f.write_all_at(&[1; 100], 0).unwrap();
    f.write_all_at(&[2; 5000], 5 * CLUSTER + 8192).unwrap();
    // Unwritten space over a border, with data in it.
    nix::fcntl::fallocate(&f, nix::fcntl::FallocateFlags::empty(), 20 * CLUSTER as i64 + 4096, 6 * CLUSTER as i64)
        .unwrap();
    f.write_all_at(&[3; 4096], 22 * CLUSTER + 4096).unwrap();
    let before = std::fs::read(&p).unwrap();
    assert!(first_gap(&f, cluster, 40 * CLUSTER).unwrap().is_some());
    complete(&f, cluster, 40 * CLUSTER).unwrap();
    assert!(std::fs::read(&p).unwrap() == before);
    if on_ext4(d.path()) {
        // Elsewhere reserved space may look like a hole.
        assert_eq!(first_gap(&f, cluster, 40 * CLUSTER).unwrap(), None);
    }
    assert!(f.metadata().unwrap().blocks() * 512 >= 40 * CLUSTER);
}

#[test]
fn completing_needs_space_for_all_or_does_nothing() {
    let d = dir();
    let p = d.path().join("a");
    let cluster = ClusterSize::DEFAULT;
    let f = File::options().read(true).write(true).create_new(true).open(&p).unwrap();
    // No host has so much.
    let len = 15u64 << 40;
    f.set_len(len).unwrap();
    let e = complete(&f, cluster, len).unwrap_err();
    assert_eq!(e.kind(), std::io::ErrorKind::StorageFull);
    assert_eq!(f.metadata().unwrap().blocks(), 0);
}

struct Checked {
    dir: tempfile::TempDir,
}

impl Checked {
    /// An image with 3 clusters of data, changed by `change`, checked with these flags; the code, 0 for success.
    fn run(&self, flags: &str, change: impl Fn(&File)) -> (i32, bool) {
        let p = self.dir.path().join("c");
        let _ = std::fs::remove_file(&p);
        let pieces = [Piece::bytes(5 * CLUSTER, &[1; 3 * CLUSTER as usize])];
        build(&p, &params(ImageMode::Expanded), &pieces, &mut quiet).unwrap();
        change(&File::options().read(true).write(true).open(&p).unwrap());
        let before = std::fs::read(&p).unwrap();
        let has = |c| flags.contains(c);
        let options = CheckOptions {
            force: has('f'),
            hard_force: has('F'),
            drop_inuse: has('d'),
            check: has('c'),
            repair_sparse: has('S'),
            read_only: has('r'),
            raw: has('R'),
            raw_blocksize: has('b').then_some(64),
        };
        let code = check_file(&p, None, &options).map_or_else(|e| e.code(), |_| 0);
        let changed = std::fs::read(&p).unwrap() != before;
        assert!(!(changed && has('r')), "-r wrote");
        if code == 0 && !has('r') && has('f') {
            let again = check_file(&p, None, &CheckOptions { read_only: true, ..options });
            assert_eq!(again.map_or_else(|e| e.code(), |_| 0), 0);
        }
        (code, changed)
    }
}

fn put(f: &File, at: u64, value: u32) {
    f.write_all_at(&value.to_le_bytes(), at).unwrap();
}

#[test]
fn exit_codes_of_check() {
    let c = Checked { dir: dir() };
    let entry = bat::entry_offset;
    let none = |_: &File| {};
    for flags in ["", "f", "fc", "fcr", "fcdS", "Rb", "F"] {
        assert_eq!(c.run(flags, none), (0, false), "{flags}");
    }
    assert_eq!(c.run("R", none).0, 38);
    let short = |n| move |f: &File| f.set_len(n).unwrap();
    assert_eq!(c.run("f", short(63)).0, 6);
    assert_eq!(c.run("f", short(10000)).0, 6);
    assert_eq!(c.run("", |f| put(f, 0, 0)).0, 11);
    assert_eq!(c.run("", |f| put(f, 48, 65)).0, 11);
    // Data may begin later, but not behind a cluster that an entry names.
    assert_eq!(c.run("fc", |f| put(f, 48, 128)).0, 11);
    // Marked.
    let marked = |f: &File| put(f, 44, header::IN_USE);
    assert_eq!(c.run("", marked), (37, false));
    assert_eq!(c.run("f", marked), (37, false));
    assert_eq!(c.run("d", marked), (0, true));
    assert_eq!(c.run("dr", marked), (7, false));
    assert_eq!(c.run("d", |f| (put(f, 44, header::IN_USE), put(f, 52, 2)).0).0, 17);
    assert_eq!(c.run("f", |f| put(f, 44, header::CLOSED_V21)), (0, false));
    // The flag that says "empty".
    let flagged = |f: &File| put(f, 52, header::FLAG_EMPTY);
    assert_eq!(c.run("", flagged), (0, false));
    assert_eq!(c.run("fr", flagged), (7, false));
    assert_eq!(c.run("f", flagged), (0, true));
    // Entries.
    for (at, value) in [(entry(0), 77), (entry(0), u32::MAX)] {
        let change = |f: &File| put(f, at, value);
        assert_eq!(c.run("", change), (0, false));
        assert_eq!(c.run("f", change), (11, false));
        assert_eq!(c.run("Fr", change), (11, false));
        assert_eq!(c.run("F", change), (0, true));
    }
    let beyond = |f: &File| put(f, entry(300), 2);
    assert_eq!(c.run("fr", beyond), (11, false));
    assert_eq!(c.run("f", beyond), (0, true));
    for value in [1, 2] {
        let twice = |f: &File| put(f, entry(0), value);
        assert_eq!(c.run("f", twice), (0, false));
        assert_eq!(c.run("fc", twice), (11, false));
        assert_eq!(c.run("Fcr", twice), (11, false));
        assert_eq!(c.run("Fc", twice), (0, true));
        assert_eq!(c.run("F", twice), (0, true));
    }
    // A tail.
    let tail = |f: &File| f.write_all_at(&[0; 2 * CLUSTER as usize], 4 * CLUSTER).unwrap();
    assert_eq!(c.run("fr", tail), (0, false));
    assert_eq!(c.run("f", tail), (0, true));
    // Clusters of a format extension are no tail.
    let extension = |f: &File| {
        tail(f);
        put(f, 44, header::CLOSED_V21);
        put(f, 56, 5 * 64);
        f.write_all_at(&0xAB23_4CEF_23DC_EA87_u64.to_le_bytes(), 5 * CLUSTER).unwrap();
    };
    assert_eq!(c.run("f", extension), (0, false));
    assert_eq!(check_file(Path::new("/nonexistent/x"), None, &Default::default()).unwrap_err().code(), 4);
}

#[test]
fn sparse_images() {
    let c = Checked { dir: dir() };
    if !on_ext4(c.dir.path()) {
        crate::testing::skip::skip_on_this_file_system("not on ext4");
        return;
    }
    let punch = |f: &File| {
        let mode = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        nix::fcntl::fallocate(f, mode, 2 * CLUSTER as i64 + 4096, 4096).unwrap();
    };
    assert_eq!(c.run("", punch), (11, false));
    assert_eq!(c.run("f", punch), (11, false));
    assert_eq!(c.run("rS", punch), (11, false));
    assert_eq!(c.run("S", punch), (0, false));
    assert_eq!(c.run("Rb", punch).0, 11);
}

#[test]
fn places() {
    let mut p = HostClusters::default();
    for n in [0, 1, 63, 64, 65, 70_000, 200_000, u32::MAX] {
        assert!(!p.contains(n));
        assert!(p.insert(n));
        assert!(!p.insert(n));
        assert!(p.contains(n));
    }
    let one = |r: std::ops::Range<u32>| Vec::from_iter([r]);
    assert_eq!(p.gaps(0, 66), one(2..63));
    assert_eq!(p.gaps(1, 200_001), [2..63, 66..70_000, 70_001..200_000]);
    assert_eq!(p.gaps(200_000, u32::MAX), one(200_001..u32::MAX));
    assert_eq!(p.gaps(5, 5), []);
    assert_eq!(HostClusters::default().gaps(1, 200_000), one(1..200_000));
}

#[test]
fn images_of_strangers() {
    let d = dir();
    let root = d.path().canonicalize().unwrap();
    let folder = root.join("disk");
    let sub = folder.join("sub");
    std::fs::create_dir_all(&sub).unwrap();
    let outside = root.join("outside");
    for p in [&folder.join("a"), &sub.join("b"), &outside] {
        std::fs::write(p, "x").unwrap();
    }
    symlink(&outside, folder.join("link")).unwrap();
    symlink(&root, folder.join("way")).unwrap();
    symlink(&outside, root.join("outer-link")).unwrap();
    let ok = |p: &Path| open_level(p, Some(&crate::sys::folder::Folder::new(&folder))).map(|_| ());
    ok(&folder.join("a")).unwrap();
    ok(&sub.join("b")).unwrap();
    ok(&sub.join("../a")).unwrap();
    ok(&folder.join("../outside")).unwrap();
    ok(&outside).unwrap();
    for bad in ["link", "way/outside", "sub", "none", "a/b", "way/disk/a"] {
        let e = ok(&folder.join(bad)).unwrap_err();
        assert_eq!(e.kind(), Kind::Open, "{bad}: {e}");
    }
    assert_eq!(ok(&root.join("outer-link")).unwrap_err().kind(), Kind::Open);
    assert_eq!(ok(Path::new("/dev/null")).unwrap_err().kind(), Kind::Open);
    // The user named the file: links are followed; devices and folders are refused all the same.
    open_level(&root.join("outer-link"), None).unwrap();
    assert_eq!(open_level(Path::new("/dev/null"), None).unwrap_err().kind(), Kind::Open);
    assert_eq!(open_level(&folder, None).unwrap_err().kind(), Kind::Open);
    if nix::unistd::geteuid().is_root() {
        std::os::unix::fs::chown(&outside, Some(12345), None).unwrap();
        let e = ok(&outside).unwrap_err();
        assert!(e.to_string().contains("12345"), "{e}");
        std::os::unix::fs::chown(&folder, Some(12345), None).unwrap();
        ok(&outside).unwrap();
        // Not even root's files: else the descriptor of an untrusted user could make root open them.
        std::os::unix::fs::chown(&outside, Some(0), None).unwrap();
        assert_eq!(ok(&outside).unwrap_err().kind(), Kind::Open);
        ok(&folder.join("a")).unwrap();
        std::os::unix::fs::chown(&outside, Some(12345), None).unwrap();
        assert_eq!(std::fs::metadata(&outside).unwrap().uid(), 12345);
    }
    assert_eq!(lexical(Path::new("/a//b/./../c/")), Path::new("/a/c"));
    assert_eq!(lexical(Path::new("/../a")), Path::new("/a"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_content_comes_back(
        pieces in proptest::collection::vec((0u64..300 * 64, 1usize..300, 1u8..), 0..12),
        mode in prop_oneof![Just(ImageMode::Expanded), Just(ImageMode::Preallocated), Just(ImageMode::Raw)],
        shift in 6u32..9,
    ) {
        let d = dir();
        let p = d.path().join("a");
        let cluster = ClusterSize::from_sectors(1 << shift).unwrap();
        let wanted = Params { cluster, ..params(mode) };
        let mut want = vec![0; 64 * 300 * 512];
        let mut taken: Vec<(u64, Vec<u8>)> = Vec::new();
        for (sector, sectors, value) in pieces {
            let (at, len) = (sector * 512, sectors * 512);
            if at as usize + len > want.len() || want[at as usize..at as usize + len].iter().any(|b| *b != 0) {
                continue;
            }
            want[at as usize..at as usize + len].fill(value);
            taken.push((at, vec![value; len]));
        }
        let pieces: Vec<_> = taken.iter().map(|(at, b)| Piece::bytes(*at, b)).collect();
        build(&p, &wanted, &pieces, &mut quiet).unwrap();
        let mut got = disk(&p, mode == ImageMode::Raw);
        got.truncate(want.len());
        prop_assert!(got == want);
        let options = CheckOptions {
            force: true,
            check: true,
            read_only: true,
            raw: mode == ImageMode::Raw,
            raw_blocksize: Some(u64::from(cluster.sectors())),
            ..Default::default()
        };
        prop_assert!(check_file(&p, None, &options).is_ok());
    }
}

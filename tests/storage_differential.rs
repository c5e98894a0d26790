//! Images and descriptors against other makers' programs: Debian's `ploop` 1.15 and `qemu-img`. Where one is not installed
//! its tests are skipped, which fails in CI.

#[path = "common/mod.rs"]
mod common;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::rng::Rng;
use ploop::chain::{self, LevelFile, Marked};
use ploop::descriptor::{Descriptor, ImageMode};
use ploop::format::header::Version;
use ploop::format::{bat, guid};
use ploop::image::check::{CheckOptions, check_file};
use ploop::image::content::Piece;
use ploop::image::create::{Params, build, create};
use ploop::ops::grow;
use ploop::units::ClusterSize;

const PLOOP: &str = "/usr/sbin/ploop";

/// Runs the classic, if it is there. It copies about 4 KiB behind its arguments, which must be there to copy.
fn classic(args: &[&str], dir: &Path) -> Option<Output> {
    if !common::skip::program(PLOOP) {
        return None;
    }
    let out = Command::new(PLOOP).args(args).current_dir(dir).env("PADDING", "x".repeat(9000)).output().unwrap();
    Some(out)
}

fn classic_code(args: &[&str], dir: &Path) -> Option<i32> {
    let out = classic(args, dir)?;
    print!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    Some(out.status.code().unwrap_or(-1))
}

fn qemu(args: &[&str], dir: &Path) -> Option<()> {
    match Command::new("qemu-img").args(args).current_dir(dir).output() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            common::skip::skip("qemu-img is not installed");
            None
        }
        out => {
            let out = out.unwrap();
            assert!(out.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&out.stderr));
            Some(())
        }
    }
}

fn level(path: &Path) -> LevelFile {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    LevelFile { file, name: path.to_owned(), raw: false, direct: false }
}

fn quiet(_: u64, _: u64) -> ploop::Result<()> {
    Ok(())
}

fn params(version: Version, cluster: u64, sectors: u64, mode: ImageMode) -> Params {
    Params { version, cluster: ClusterSize::from_sectors(cluster).unwrap(), sectors, mode }
}

/// A raw disk with scattered data.
fn scattered(path: &Path, bytes: u64, pieces: u64) {
    let f = File::create_new(path).unwrap();
    f.set_len(bytes).unwrap();
    let mut random = Rng::new(bytes + pieces);
    for i in 0..pieces {
        let len = 512 * (1 + random.below(200));
        let at = random.below((bytes - len) / 512) * 512;
        f.write_all_at(&vec![i as u8 | 1; len as usize], at).unwrap();
    }
}

/// Opens and closes an image as a server does that gets no request.
fn open_and_close(path: &Path) {
    let top = level(path);
    let options = chain::OpenOptions { writable: true, marked: Marked::Recover, ..Default::default() };
    let chain = chain::open(std::slice::from_ref(&top), &options).unwrap();
    chain::close(&top, &chain, chain.alloc.end).unwrap();
}

#[test]
fn images_of_qemu_pass_the_classic_check_once_closed() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for size in ["10752K", "64M", "9000M"] {
        let name = format!("new-{size}");
        if qemu(&["create", "-q", "-f", "parallels", &name, size], d).is_none() {
            return;
        }
        open_and_close(&d.join(&name));
        assert!(matches!(classic_code(&["check", "-f", &name], d), None | Some(0)));
        qemu(&["check", "-q", "-f", "parallels", &name], d).unwrap();
    }
    scattered(&d.join("raw"), 300 << 20, 60);
    for cluster in ["65536", "1048576", "67108864"] {
        let name = format!("converted-{cluster}");
        let option = format!("cluster_size={cluster}");
        qemu(&["convert", "-q", "-O", "parallels", "-o", &option, "raw", &name], d).unwrap();
        open_and_close(&d.join(&name));
        assert!(matches!(classic_code(&["check", "-f", &name], d), None | Some(0)), "{name}");
        qemu(&["compare", "-q", "-f", "raw", "-F", "parallels", "raw", &name], d).unwrap();
        let flags = CheckOptions { force: true, check: true, read_only: true, ..Default::default() };
        check_file(&d.join(&name), None, &flags).unwrap();
    }
}

#[test]
fn images_with_content_are_read_alike() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let bytes = 200u64 << 20;
    scattered(&d.join("raw"), bytes, 40);
    let raw = File::open(d.join("raw")).unwrap();
    for (version, cluster) in
        [(Version::V1, 64), (Version::V2, 64), (Version::V1, 2048), (Version::V2, 2048), (Version::V2, 131_072)]
    {
        for mode in [ImageMode::Expanded, ImageMode::Preallocated] {
            let name = format!("{mode:?}-{}-{cluster}", version.number());
            let wanted = params(version, cluster, bytes / 512, mode);
            build(&d.join(&name), &wanted, &[Piece::file(0, &raw, bytes)], &mut quiet).unwrap();
            assert!(matches!(classic_code(&["check", "-f", "-c", "-r", &name], d), None | Some(0)), "{name}");
            let size = ploop::image::check::read_header(&d.join(&name), None).unwrap().sectors * 512;
            if qemu(&["check", "-q", "-f", "parallels", &name], d).is_some() {
                if size == bytes {
                    qemu(&["compare", "-q", "-f", "raw", "-F", "parallels", "raw", &name], d).unwrap();
                } else {
                    qemu(&["convert", "-q", "-f", "parallels", "-O", "raw", &name, "back"], d).unwrap();
                    qemu(&["resize", "-q", "-f", "raw", "--shrink", "back", &bytes.to_string()], d).unwrap();
                    qemu(&["compare", "-q", "-f", "raw", "-F", "raw", "raw", "back"], d).unwrap();
                }
            }
            std::fs::remove_file(d.join(&name)).unwrap();
        }
    }
}

/// The classic and we grow copies of the same image: the content stays, each accepts what the other has made, and the same
/// is refused.
#[test]
fn images_grow_as_with_the_classic() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let bytes = 40u64 << 20;
    scattered(&d.join("raw"), bytes, 30);
    let raw = File::open(d.join("raw")).unwrap();
    let kinds = [(Version::V1, 64), (Version::V1, 2048), (Version::V2, 64), (Version::V2, 2048)];
    for (version, cluster) in kinds {
        let start = params(version, cluster, bytes / 512, ImageMode::Expanded);
        for copy in ["ours", "theirs"] {
            build(&d.join(copy), &start, &[Piece::file(0, &raw, bytes)], &mut quiet).unwrap();
        }
        // Each time the table needs more clusters, but for the last.
        for sectors in [64u64 << 11, 3 << 21, 9 << 21, (9 << 21) + cluster] {
            let size = sectors.to_string();
            match classic_code(&["grow", "-s", &size, "theirs"], d) {
                None => return,
                code => assert_eq!(code, Some(0), "{size}"),
            }
            grow::grow_image(&d.join("ours"), false, sectors).unwrap();
            for copy in ["ours", "theirs"] {
                assert_eq!(classic_code(&["check", "-f", "-c", "-r", copy], d), Some(0), "{copy} {size}");
                let found = check_file(&d.join(copy), None, &CheckOptions { force: true, ..Default::default() });
                assert!(found.is_ok(), "{copy} {size}: {found:?}");
                if qemu(&["convert", "-q", "-f", "parallels", "-O", "raw", copy, "back"], d).is_some() {
                    assert_eq!(std::fs::metadata(d.join("back")).unwrap().len(), sectors * 512);
                    let (was, is) = (digest(&raw, 0, bytes), digest(&File::open(d.join("back")).unwrap(), 0, bytes));
                    assert_eq!(was, is, "{copy} {size}");
                }
            }
        }
        // Smaller; no multiple of the cluster.
        for sectors in [64u64 << 11, (10 << 21) + 8] {
            assert_eq!(classic_code(&["grow", "-s", &sectors.to_string(), "theirs"], d), Some(38));
            let e = grow::grow_image(&d.join("ours"), false, sectors).unwrap_err();
            assert_eq!(e.code(), 38, "{e}");
        }
        let marked = File::options().write(true).open(d.join("ours")).unwrap();
        put(&marked, 44, ploop::format::header::IN_USE);
        std::fs::copy(d.join("ours"), d.join("theirs")).unwrap();
        let code = classic_code(&["grow", "-s", "20g", "theirs"], d);
        assert_eq!(code, Some(grow::grow_image(&d.join("ours"), false, 20 << 21).unwrap_err().code()));
        for copy in ["ours", "theirs"] {
            std::fs::remove_file(d.join(copy)).unwrap();
        }
    }
    for copy in ["ours", "theirs"] {
        std::fs::copy(d.join("raw"), d.join(copy)).unwrap();
    }
    let sectors = (bytes >> 9) + 2049;
    assert_eq!(classic_code(&["grow", "-s", &sectors.to_string(), "-f", "raw", "theirs"], d), Some(0));
    grow::grow_image(&d.join("ours"), true, sectors).unwrap();
    assert!(std::fs::read(d.join("ours")).unwrap() == std::fs::read(d.join("theirs")).unwrap());
}

#[test]
fn preallocated_images_pass_after_scattered_writes() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for (cluster, seed) in [(64, 1), (2048, 2), (131_072, 3)] {
        let name = format!("p{cluster}");
        let path = d.join(&name);
        create(&path, &params(Version::V1, cluster, 700 << 11, ImageMode::Preallocated), &mut quiet).unwrap();
        assert!(matches!(classic_code(&["check", "-f", "-r", &name], d), None | Some(0)), "{name}");
        let top = level(&path);
        let options = chain::OpenOptions { writable: true, ..Default::default() };
        let chain = chain::open(std::slice::from_ref(&top), &options).unwrap();
        let mut random = Rng::new(seed);
        let table = u64::from(ploop::image::check::read_header(&path, None).unwrap().first_data_sector) * 512;
        let len = top.file.metadata().unwrap().len();
        for _ in 0..40 {
            let at = table + random.below((len - table) / 4096 - 8) * 4096;
            top.file.write_all_at(&[7; 3 * 4096], at).unwrap();
        }
        let before = digest(&top.file, table, len);
        chain::close(&top, &chain, chain.alloc.end).unwrap();
        assert_eq!(digest(&top.file, table, len), before);
        assert!(matches!(classic_code(&["check", "-f", &name], d), None | Some(0)), "{name}");
        std::fs::remove_file(&path).unwrap();
    }
}

fn digest(file: &File, from: u64, to: u64) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    let mut buf = vec![0; 1 << 20];
    let mut at = from;
    while at < to {
        let n = (to - at).min(1 << 20) as usize;
        file.read_exact_at(&mut buf[..n], at).unwrap();
        sum.update(&buf[..n]);
        at += n as u64;
    }
    sum.finalize()
}

#[test]
fn new_disks_equal_those_of_the_classic() {
    let dir = tempfile::tempdir().unwrap();
    let mut n = 0;
    for cluster in [64u64, 128, 2048, 131_072] {
        for sectors in [1u64, 131_072, 1_032_192, 1_032_193, 8_388_609, 16_777_216, 123_456_789] {
            n += 1;
            let theirs = dir.path().join(format!("theirs{n}"));
            std::fs::create_dir(&theirs).unwrap();
            let (size, bs) = (sectors.to_string(), cluster.to_string());
            let args = ["init", "-s", &size, "-b", &bs, "-t", "none", "-v", "1", "root.hds"];
            match classic_code(&args, &theirs) {
                None => return,
                code => assert_eq!(code, Some(0)),
            }
            let ours = dir.path().join(format!("ours{n}.hds"));
            let wanted = params(Version::V1, cluster, sectors, ImageMode::Expanded);
            let made = create(&ours, &wanted, &mut quiet).unwrap();
            assert!(std::fs::read(&ours).unwrap() == std::fs::read(theirs.join("root.hds")).unwrap(), "{args:?}");
            let image = theirs.canonicalize().unwrap().join("root.hds");
            let d = Descriptor::new_base(&image, made.sectors, wanted.cluster, ImageMode::Expanded).unwrap();
            let xml = std::fs::read_to_string(theirs.join("DiskDescriptor.xml")).unwrap();
            assert_eq!(d.to_xml().unwrap(), xml);
            std::fs::remove_file(&ours).unwrap();
            std::fs::remove_dir_all(&theirs).unwrap();
        }
    }
}

#[test]
fn descriptors_of_the_classic_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path().canonicalize().unwrap();
    let init = ["init", "-s", "64M", "-t", "none", "caf\u{e9} & co.hds"];
    match classic_code(&init, &d) {
        None => return,
        code => assert_eq!(code, Some(0)),
    }
    let dd = d.join("DiskDescriptor.xml");
    for _ in 0..3 {
        assert_eq!(classic_code(&["snapshot", "DiskDescriptor.xml"], &d), Some(0));
        let xml = std::fs::read_to_string(&dd).unwrap();
        let read = Descriptor::read(&dd).unwrap();
        assert_eq!(read.to_xml().unwrap(), xml);
        read.check_tree().unwrap();
        let levels: Vec<LevelFile> = read.chain(&guid::TOP).unwrap().iter().map(|i| level(&i.file)).collect();
        let options = chain::OpenOptions { writable: true, ..Default::default() };
        let chain = chain::open(&levels, &options).unwrap();
        chain::close(&levels[levels.len() - 1], &chain, chain.alloc.end).unwrap();
        // What we store is what they read.
        read.commit(&dd).unwrap();
        assert_eq!(classic_code(&["check", "DiskDescriptor.xml"], &d), Some(0));
    }
}

/// A change of an image with 3 clusters of data and a table of 300.
type Change = fn(&File);

fn put(f: &File, at: u64, value: u32) {
    f.write_all_at(&value.to_le_bytes(), at).unwrap();
}

const CHANGES: [(&str, Change); 14] = [
    ("clean", |_| {}),
    ("signature", |f| put(f, 0, 0)),
    ("type", |f| put(f, 16, 3)),
    ("cluster size", |f| put(f, 28, 63)),
    ("no first data", |f| put(f, 48, 0)),
    ("misaligned first data", |f| put(f, 48, 65)),
    ("short", |f| f.set_len(40).unwrap()),
    ("marked", |f| put(f, 44, 0x746F_6E59)),
    ("converting", |f| {
        put(f, 44, 0x746F_6E59);
        put(f, 52, 2);
    }),
    ("flag", |f| put(f, 52, 1)),
    ("beyond the file", |f| put(f, bat::entry_offset(0), 64 * 77)),
    ("misaligned", |f| put(f, bat::entry_offset(0), 65)),
    ("beyond the disk", |f| put(f, bat::entry_offset(301), 64)),
    ("hole", |f| {
        let mode = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        nix::fcntl::fallocate(f, mode, 2 * 32768 + 4096, 4096).unwrap();
    }),
];

#[test]
fn check_answers_the_classic_codes() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let flag_sets =
        ["", "-f", "-r", "-fr", "-fc", "-fcr", "-d", "-dr", "-fd", "-F", "-Fr", "-S", "-cdS", "-cdSf", "-R"];
    let path = d.join("image");
    let make = |change: Change| -> PathBuf {
        let _ = std::fs::remove_file(&path);
        let pieces = [Piece::bytes(5 * 32768, &[1; 3 * 32768])];
        build(&path, &params(Version::V1, 64, 64 * 300, ImageMode::Expanded), &pieces, &mut quiet).unwrap();
        change(&OpenOptions::new().read(true).write(true).open(&path).unwrap());
        path.clone()
    };
    for (what, change) in CHANGES {
        for flags in flag_sets {
            make(change);
            let mut args = vec!["check"];
            if !flags.is_empty() {
                args.push(flags);
            }
            args.push("image");
            let Some(theirs) = classic_code(&args, d) else { return };
            let theirs_after = std::fs::read(&path).unwrap();
            make(change);
            let has = |c| flags.contains(c);
            let options = CheckOptions {
                force: has('f'),
                hard_force: has('F'),
                drop_inuse: has('d'),
                check: has('c'),
                repair_sparse: has('S'),
                read_only: has('r'),
                raw: has('R'),
                raw_blocksize: None,
            };
            let ours = check_file(&path, None, &options).map_or_else(|e| e.code(), |_| 0);
            assert_eq!(ours, theirs, "{what} {flags}");
            // What both repaired is the same.
            if ours == 0 {
                assert!(std::fs::read(&path).unwrap() == theirs_after, "{what} {flags}");
            }
        }
    }
}

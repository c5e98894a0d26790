//! What is tested.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ploop::chain::Marked;
use ploop::server::proto::{FromWorker, ToWorker};
use ploop::sys::aligned::AlignedBuf;

use super::common::{self, rng::Rng};
use super::load::{self, Region};
use super::rig::{Options, Rig, make_image};

type Scene = fn(&Path);

pub const ALL: &[(&str, Scene)] = &[
    ("data", data),
    ("delta", delta),
    ("read_only", read_only),
    ("one_writer", one_writer),
    ("marks", marks),
    ("new_supervisor", new_supervisor),
    ("no_space", no_space),
    ("waiting_request_outlives_panics", waiting_request_outlives_panics),
    ("kills", kills),
    ("kills_in_a_chain", kills_in_a_chain),
    ("kills_on_tmpfs", kills_on_tmpfs),
    ("kills_with_large_sectors", kills_with_large_sectors),
];

/// Those that are told apart by where requests are kept, once more with slots.
pub const WITH_SLOTS: &[(&str, Scene)] = &[
    ("data_slots", data),
    ("new_supervisor_slots", new_supervisor),
    ("no_space_slots", no_space),
    ("waiting_request_outlives_panics_slots", waiting_request_outlives_panics),
    ("kills_slots", kills),
    ("kills_in_a_chain_slots", kills_in_a_chain),
    ("kills_of_hot_blocks_slots", kills_of_hot_blocks),
    ("kills_in_adoption_slots", kills_in_adoption),
];

const MIB: u64 = 1 << 20;

fn image(dir: &Path, name: &str, cluster_sectors: u64, mib: u64) -> PathBuf {
    let path = dir.join(name);
    make_image(&path, cluster_sectors, mib * 2048);
    path
}

/// Debian's own program, where there is one, finds nothing wrong.
fn check_by_others(path: &Path) {
    if Path::new("/usr/sbin/ploop").exists() {
        let out = Command::new("/usr/sbin/ploop").args(["check", "-F", "-r"]).arg(path).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success(), "ploop check: {}: {text}{}", out.status, String::from_utf8_lossy(&out.stderr));
    }
}

fn data(dir: &Path) {
    let top = image(dir, "top", 2048, 64);
    let mut rig = Rig::new(&dir.join("file"), std::slice::from_ref(&top), &Options::default());
    rig.serve(false);
    let ready = rig.ready.clone().unwrap();
    assert_eq!((ready.device_bytes, ready.cluster_sectors, ready.fmt_version), (64 * MIB, 2048, 2));
    assert!(!ready.was_marked);
    let file = rig.open();
    assert_eq!(file.metadata().unwrap().len(), 64 * MIB);
    let mut buf = AlignedBuf::new(2 << 20);
    let mut wanted = vec![0; 2 << 20];
    let mut all = Vec::new();
    for (seq, (offset, len)) in
        [(0, 512), (MIB - 512, 1024), (3 * MIB + 4096, 1 << 20), (10 * MIB, 2 << 20)].iter().enumerate()
    {
        let r = Region { offset: *offset, len: *len, seq: seq as u64 + 1 };
        load::check(&file, &Region { seq: 0, ..r }, &mut buf, &mut wanted).unwrap();
        load::stamp(&mut buf[..r.len], r.offset, r.seq);
        file.write_all_at(&buf[..r.len], r.offset).unwrap();
        all.push(r);
    }
    file.sync_data().unwrap();
    all.push(Region { offset: 20 * MIB, len: 1 << 20, seq: 0 });
    for r in &all {
        load::check(&file, r, &mut buf, &mut wanted).unwrap();
    }
    assert_eq!(file.read_at(&mut buf[..8192], 64 * MIB - 4096).unwrap(), 4096);
    assert_eq!(file.read_at(&mut buf[..4096], 64 * MIB).unwrap(), 0);
    assert!(file.write_at(&buf[..8192], 64 * MIB - 4096).is_err());
    assert_eq!(file.read_at(&mut buf[..100], 0).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    assert!(matches!(rig.ask(&ToWorker::Flush), FromWorker::Flushed { error: None }));
    println!("{} kB resident", rig.resident());
    assert!(rig.resident() < 40 << 10, "{} kB resident", rig.resident());
    drop(file);
    rig.close();
    check_by_others(&top);

    let mut again = Rig::new(&dir.join("again"), std::slice::from_ref(&top), &Options::default());
    again.serve(false);
    assert!(!again.ready.as_ref().unwrap().was_marked);
    let file = again.open();
    for r in &all {
        load::check(&file, r, &mut buf, &mut wanted).unwrap();
    }
    drop(file);
    again.close();
}

fn delta(dir: &Path) {
    let base = image(dir, "base", 2048, 32);
    let mut buf = AlignedBuf::new(2 << 20);
    let mut wanted = vec![0; 2 << 20];
    let below = Region { offset: 5 * MIB, len: 2 << 20, seq: 77 };
    let mut rig = Rig::new(&dir.join("one"), std::slice::from_ref(&base), &Options::default());
    rig.serve(false);
    load::stamp(&mut buf[..below.len], below.offset, below.seq);
    rig.open().write_all_at(&buf[..below.len], below.offset).unwrap();
    rig.close();
    drop(rig);
    let before = std::fs::read(&base).unwrap();
    let top = image(dir, "top", 2048, 32);
    let mut rig = Rig::new(&dir.join("two"), &[base.clone(), top.clone()], &Options::default());
    rig.serve(false);
    let file = rig.open();
    load::check(&file, &below, &mut buf, &mut wanted).unwrap();
    let over = Region { offset: 6 * MIB - 4096, len: 8192, seq: 99 };
    load::stamp(&mut buf[..over.len], over.offset, over.seq);
    file.write_all_at(&buf[..over.len], over.offset).unwrap();
    file.read_exact_at(&mut buf[..below.len], below.offset).unwrap();
    load::stamp(&mut wanted[..below.len], below.offset, below.seq);
    load::stamp(&mut wanted[MIB as usize - 4096..][..8192], over.offset, over.seq);
    assert!(buf[..below.len] == wanted[..below.len]);
    drop(file);
    rig.close();
    assert!(std::fs::read(&base).unwrap() == before);
    check_by_others(&top);
}

fn read_only(dir: &Path) {
    let top = image(dir, "top", 2048, 16);
    let before = (std::fs::read(&top).unwrap(), std::fs::metadata(&top).unwrap());
    let options = Options { read_only: true, ..Options::default() };
    let mut rig = Rig::new(&dir.join("file"), std::slice::from_ref(&top), &options);
    rig.serve(false);
    let file = rig.open();
    let mut buf = AlignedBuf::new(4096);
    file.read_exact_at(&mut buf[..4096], 4096).unwrap();
    assert_eq!(file.write_at(&buf[..4096], 0).unwrap_err().raw_os_error(), Some(libc::EROFS));
    file.sync_data().unwrap();
    rig.replace();
    file.read_exact_at(&mut buf[..4096], 4096).unwrap();
    drop(file);
    rig.close();
    let after = std::fs::metadata(&top).unwrap();
    assert!(std::fs::read(&top).unwrap() == before.0);
    assert_eq!(after.mtime_nsec(), before.1.mtime_nsec());
}

fn one_writer(dir: &Path) {
    let top = image(dir, "top", 2048, 16);
    let mut first = Rig::new(&dir.join("first"), std::slice::from_ref(&top), &Options::default());
    first.serve(false);
    for read_only in [false, true] {
        let options = Options { read_only, marked: Marked::Recover, ..Options::default() };
        let mut second = Rig::new(&dir.join(format!("second{read_only}")), std::slice::from_ref(&top), &options);
        match second.start(false) {
            FromWorker::Failed { code: 37, message } => assert!(message.contains("in use"), "{message}"),
            other => panic!("{other:?}"),
        }
    }
    first.close();
}

fn marks(dir: &Path) {
    let top = image(dir, "top", 2048, 16);
    let mut first = Rig::new(&dir.join("first"), std::slice::from_ref(&top), &Options::default());
    first.serve(false);
    drop(first);
    let mut second = Rig::new(&dir.join("second"), std::slice::from_ref(&top), &Options::default());
    assert!(matches!(second.start(false), FromWorker::Failed { code: 37, .. }));
    let options = Options { marked: Marked::Recover, ..Options::default() };
    let mut third = Rig::new(&dir.join("third"), std::slice::from_ref(&top), &options);
    third.serve(false);
    assert!(third.ready.as_ref().unwrap().was_marked);
    third.close();
    check_by_others(&top);
}

fn new_supervisor(dir: &Path) {
    let top = image(dir, "top", 2048, 16);
    let report = dir.join("report");
    let mut rig = Rig::new(&dir.join("file"), std::slice::from_ref(&top), &Options::default());
    rig.report_to(&report);
    rig.serve(false);
    let slots = rig.keeps_slots();
    let mut child = rig.abandon();
    let end = Instant::now() + Duration::from_secs(10);
    while !report.exists() && Instant::now() < end {
        thread::sleep(Duration::from_millis(20));
    }
    let text = std::fs::read_to_string(&report).unwrap();
    let count = if slots { 8 } else { 6 };
    let wanted = format!("{count} descriptors, takeover true: [Flushed {{ error: None }}, Closed {{ error: None }}]");
    assert_eq!(text, wanted);
    assert!(child.wait().unwrap().success());
    check_by_others(&top);
}

/// Writes that find no space wait; reads go on meanwhile, whatever the waiting writes hold; space ends it.
fn no_space(dir: &Path) {
    let fs = small_fs(dir, 160, 512);
    let top = image(&fs, "top", 2048, 256);
    let mut rig = Rig::new(&dir.join("file"), std::slice::from_ref(&top), &Options::default());
    rig.serve(false);
    let file = rig.open();
    let mut buf = AlignedBuf::new(1 << 20);
    let mut wanted = vec![0; 1 << 20];
    let first = Region { offset: 0, len: 1 << 20, seq: 5 };
    load::stamp(&mut buf[..first.len], first.offset, first.seq);
    file.write_all_at(&buf[..first.len], first.offset).unwrap();
    let ballast = fill(&fs, 10);
    let regions: Vec<_> = (0..110u64).map(|i| Region { offset: (100 + i) * MIB, len: 1 << 20, seq: 100 + i }).collect();
    thread::scope(|s| {
        for r in &regions {
            let file = &file;
            s.spawn(move || {
                let mut buf = AlignedBuf::new(r.len);
                load::stamp(&mut buf[..r.len], r.offset, r.seq);
                file.write_all_at(&buf[..r.len], r.offset).unwrap();
            });
        }
        let end = Instant::now() + Duration::from_secs(20);
        while !rig.shm().status().no_space && Instant::now() < end {
            thread::sleep(Duration::from_millis(50));
        }
        assert!(rig.shm().status().no_space);
        thread::sleep(Duration::from_secs(3));
        for _ in 0..5 {
            let start = Instant::now();
            load::check(&file, &first, &mut buf, &mut wanted).unwrap();
            assert!(start.elapsed() < Duration::from_secs(2), "a read took {:?}", start.elapsed());
        }
        rig.replace();
        load::check(&file, &first, &mut buf, &mut wanted).unwrap();
        println!("{} kB while writes wait", rig.resident());
        std::fs::remove_file(&ballast).unwrap();
    });
    for r in &regions {
        load::check(&file, r, &mut buf, &mut wanted).unwrap();
    }
    thread::sleep(Duration::from_millis(2500));
    assert!(!rig.shm().status().no_space);
    assert!(rig.resident() < 40 << 10, "{} kB resident", rig.resident());
    drop(file);
    rig.close();
    drop(rig);
    check_by_others(&top);
    run("umount", &[&fs]);
}

/// A request that no worker was working on when it panicked is not given up, however many workers panic.
fn waiting_request_outlives_panics(dir: &Path) {
    let fs = small_fs(dir, 160, 512);
    let top = image(&fs, "top", 2048, 256);
    let mut rig = Rig::new(&dir.join("file"), std::slice::from_ref(&top), &Options::default());
    rig.serve(false);
    let file = rig.open();
    let buf = AlignedBuf::new(1 << 20);
    file.write_all_at(&buf[..4096], 0).unwrap();
    let ballast = fill(&fs, 2);
    thread::scope(|s| {
        let held = s.spawn(|| {
            let mut error = None;
            // More than what was allocated ahead.
            for i in 0..128 {
                if let Err(e) = file.write_all_at(&buf[..4096], (100 + i) * MIB) {
                    error = e.raw_os_error();
                    break;
                }
            }
            error
        });
        let end = Instant::now() + Duration::from_secs(20);
        while !rig.shm().status().no_space && Instant::now() < end {
            thread::sleep(Duration::from_millis(50));
        }
        for _ in 0..2 {
            rig.replace();
        }
        for death in 1..=4 {
            rig.shm().set_panicked();
            rig.replace();
            thread::sleep(Duration::from_millis(200));
            assert!(!held.is_finished(), "given up after {death} panics");
        }
        std::fs::remove_file(&ballast).unwrap();
        assert_eq!(held.join().unwrap(), None);
    });
    file.write_all_at(&buf[..1 << 20], 100 * MIB).unwrap();
    drop(file);
    rig.close();
    drop(rig);
    check_by_others(&top);
    run("umount", &[&fs]);
}

fn run(program: &str, args: &[&Path]) {
    assert!(Command::new(program).args(args).status().unwrap().success(), "{program}");
}

/// An ext4 file system of its own, on a loop device that goes with its mount.
fn small_fs(dir: &Path, mib: u64, sector: u32) -> PathBuf {
    let (disk, fs) = (dir.join("disk"), dir.join("fs"));
    std::fs::File::create(&disk).unwrap().set_len(mib * MIB).unwrap();
    std::fs::create_dir(&fs).unwrap();
    let sectors = sector.to_string();
    let args = ["-f", "--show", "--sector-size", &sectors];
    let made = Command::new("losetup").args(args).arg(&disk).output().unwrap();
    let dev = PathBuf::from(String::from_utf8(made.stdout).unwrap().trim());
    run("mkfs.ext4", &["-q".as_ref(), "-m0".as_ref(), &dev]);
    run("mount", &[&dev, &fs]);
    // It stays until the file system is unmounted.
    run("losetup", &["-d".as_ref(), &dev]);
    fs
}

/// Leaves so much space in a file system.
fn fill(fs: &Path, mib: u64) -> PathBuf {
    let ballast = fs.join("ballast");
    let left = nix::sys::statvfs::statvfs(fs).unwrap();
    let len = left.blocks_available() * left.block_size() - mib * MIB;
    let file = std::fs::File::create(&ballast).unwrap();
    nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, len as i64).unwrap();
    ballast
}

/// Direct I/O is accepted there, but has no meaning; there is no FIEMAP and no zeroing of ranges.
fn kills_on_tmpfs(dir: &Path) {
    let fs = dir.join("fs");
    std::fs::create_dir(&fs).unwrap();
    run("mount", &["-t".as_ref(), "tmpfs".as_ref(), "none".as_ref(), &fs]);
    let top = image(&fs, "top", 512, 128);
    kill_under_load(dir, &[top]);
    run("umount", &[&fs]);
}

/// Direct I/O would need 4096 bytes at least: the page cache is used.
fn kills_with_large_sectors(dir: &Path) {
    let fs = small_fs(dir, 400, 4096);
    let top = image(&fs, "top", 2048, 128);
    kill_under_load(dir, &[top]);
    run("umount", &[&fs]);
}

pub fn kill_count() -> u32 {
    let usual = match std::env::var("PLOOP_TEST").as_deref() {
        Ok("full") => 150,
        Ok("ci") => 8,
        _ => 25,
    };
    std::env::var("KILLS").ok().and_then(|k| k.parse().ok()).unwrap_or(usual)
}

fn kills(dir: &Path) {
    let top = image(dir, "top", 2048, 256);
    kill_under_load(dir, &[top]);
}

fn kills_in_a_chain(dir: &Path) {
    let images = ["base", "middle", "top"].map(|n| image(dir, n, 256, 128));
    // Something in every level.
    for n in 1..=2 {
        let mut rig = Rig::new(&dir.join(format!("fill{n}")), &images[..n], &Options::default());
        rig.serve(false);
        let file = rig.open();
        let mut buf = AlignedBuf::new(1 << 20);
        let mut random = Rng::new(n as u64);
        for _ in 0..40 {
            let offset = random.below(127 * 2048) * 512;
            buf.fill(0);
            file.write_all_at(&buf[..1 << 20], offset).unwrap();
        }
        drop(file);
        rig.close();
    }
    kill_under_load(dir, &images);
}

/// A write that is executed once more after its answer would land over a newer one.
fn kills_of_hot_blocks(dir: &Path) {
    let top = image(dir, "top", 2048, 64);
    kill_under(dir, &[top], &|_| hot_regions(0), &|rig, random| {
        thread::sleep(Duration::from_millis(20 + random.below(80)));
        rig.replace()
    });
}

/// Successors die, too, before, while and after they take over what the one before has left.
fn kills_in_adoption(dir: &Path) {
    let top = image(dir, "top", 2048, 64);
    let regions = |bytes| [load::regions(bytes / 2, 8), hot_regions(bytes / 2)].concat();
    kill_under(dir, &[top], &regions, &|rig, random| {
        thread::sleep(Duration::from_millis(10 + random.below(60)));
        let pauses: Vec<_> = (0..4).map(|_| Duration::from_micros(random.below(30_000))).collect();
        rig.replace_after(&pauses)
    });
}

/// Sixteen threads with three small blocks each, from `at` on.
fn hot_regions(at: u64) -> Vec<Vec<Region>> {
    let block = |t: u64, n: u64| Region { offset: at + (t * 3 + n) * 4096, len: 4096, seq: 0 };
    (0..16).map(|t| (0..3).map(|n| block(t, n)).collect()).collect()
}

/// Kills workers at random instants.
fn kill_under_load(dir: &Path, images: &[PathBuf]) {
    kill_under(dir, images, &|bytes| load::regions(bytes, 16), &|rig, random| {
        thread::sleep(Duration::from_millis(20 + random.below(230)));
        rig.replace()
    });
}

/// Has workers killed while threads write and verify; then closes and reads everything again.
fn kill_under(
    dir: &Path,
    images: &[PathBuf],
    regions: &dyn Fn(u64) -> Vec<Vec<Region>>,
    kill: &dyn Fn(&mut Rig, &mut Rng) -> Duration,
) {
    let mut rig = Rig::new(&dir.join("file"), images, &Options::default());
    rig.serve(false);
    let bytes = rig.ready.as_ref().unwrap().device_bytes;
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&rig.file).unwrap();
    let mut regions = regions(bytes);
    let (stop, ops) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut pauses = Vec::new();
    thread::scope(|s| {
        let threads: Vec<_> = regions
            .iter_mut()
            .enumerate()
            .map(|(t, mine)| {
                let (file, stop, ops) = (&file, &stop, &ops);
                s.spawn(move || load::work(file, mine, t as u64 + 1, stop, ops))
            })
            .collect();
        let seed = common::seed::one(None, common::seed::fresh());
        println!("PLOOP_SEED={}", seed.0);
        let mut random = Rng::new(seed.0);
        for _ in 0..kill_count() {
            pauses.push(kill(&mut rig, &mut random));
            if threads.iter().any(|t| t.is_finished()) {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        for t in threads {
            t.join().unwrap().unwrap();
        }
    });
    pauses.sort();
    println!(
        "{} kills, {} verified operations, pause median {:?}, longest {:?}",
        pauses.len(),
        ops.load(Ordering::Relaxed),
        pauses[pauses.len() / 2],
        pauses[pauses.len() - 1]
    );
    assert!(!rig.shm().failed());
    let mut buf = AlignedBuf::new(1 << 20);
    let mut wanted = vec![0; 1 << 20];
    for r in regions.iter().flatten() {
        load::check(&file, r, &mut buf, &mut wanted).unwrap();
    }
    drop(file);
    rig.close();
    drop(rig);
    check_by_others(images.last().unwrap());
    let mut rig = Rig::new(&dir.join("again"), images, &Options::default());
    rig.serve(false);
    let file = rig.open();
    for r in regions.iter().flatten() {
        load::check(&file, r, &mut buf, &mut wanted).unwrap();
    }
    drop(file);
    rig.close();
}

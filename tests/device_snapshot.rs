//! Snapshots of a running disk, with a mounted file system and fio at work in it.

mod device_common;

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use device_common::common::rng::Rng;
use device_common::*;
use ploop::descriptor::Descriptor;
use ploop::device::{self, Device, served};
use ploop::format::guid::{self, Guid};
use ploop::image::check::read_header;
use ploop::server::proto::ProcessId;
use ploop::server::runtime;

/// The command, in a world without the caller's environment.
fn ploop() -> Command {
    Command::new(env!("CARGO_BIN_EXE_ploop"))
}

/// A disk with a file system, mounted; everything goes with the value.
struct Disk {
    t: Bench,
    dd: PathBuf,
    target: PathBuf,
    node: String,
}

impl Disk {
    fn new(name: &str, size: &str, more: &[&str]) -> Option<Disk> {
        let t = Bench::new(name)?;
        for program in ["fio", "mkfs.ext4", "e2fsck"] {
            if !common::skip::program(program) {
                return None;
            }
        }
        let image = t.dir.path().join("root.hds");
        run(ploop().args(["init", "-s", size]).args(more).arg(&image));
        let dd = t.dir.path().join("DiskDescriptor.xml");
        let target = t.dir.path().join("mnt");
        fs::create_dir(&target).unwrap();
        let node = format!("/dev/ploop-test-{}-{name}", std::process::id());
        run(ploop().args(["mount", "-d", &node, "-m"]).arg(&target).arg(&dd));
        Some(Disk { t, dd, target, node })
    }

    fn device(&self) -> Device {
        device::by_node(&self.node).unwrap().unwrap()
    }

    fn descriptor(&self) -> Descriptor {
        Descriptor::read(&self.dd).unwrap()
    }

    fn top(&self) -> PathBuf {
        self.descriptor().image(&guid::TOP).unwrap().file.clone()
    }

    fn snapshot(&self) -> Guid {
        let guid = Guid::generate();
        run(ploop().args(["snapshot", "-u", &guid.to_string()]).arg(&self.dd));
        guid
    }

    /// SHA-256 of the content of a snapshot, by a device of its own.
    fn content(&self, guid: &Guid) -> String {
        let component = format!("look-{}", Guid::generate());
        run(ploop().args(["mount", "-r", "-u", &guid.to_string(), "-c", &component]).arg(&self.dd));
        let found = device::by_base(&self.descriptor().images[0].file, Some(&component)).unwrap();
        let sum = sha256(found[0].node());
        run(ploop().args(["umount", "-c", &component]).arg(&self.dd));
        sum
    }

    fn umount(&self) {
        self.umount_by(ploop().args(["umount"]).arg(&self.dd));
    }

    /// Processes in mount namespaces of their own, which others make at the same time, keep a copy of the mount.
    fn umount_by(&self, command: &mut Command) {
        within(90, "the end of the device", || output(command).status.success().then_some(()));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Whatever is still mounted of it, wherever.
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let inside = self.t.dir.path().to_str().unwrap_or("-").to_owned();
        for line in mounts.lines().rev() {
            if let Some(point) = line.split(' ').nth(4).filter(|p| p.starts_with(&inside)) {
                let _ = output(Command::new("umount").arg("-l").arg(point));
            }
        }
    }
}

fn sha256(path: &Path) -> String {
    let text = run(Command::new("sha256sum").arg(path));
    text.split(' ').next().unwrap().to_string()
}

/// fio with verification, again and again until it is told to stop.
struct Fio {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<usize>,
}

impl Fio {
    fn start(target: &Path) -> Fio {
        let stop = Arc::new(AtomicBool::new(false));
        let (told, target) = (stop.clone(), target.to_owned());
        let thread = std::thread::spawn(move || {
            let mut rounds = 0;
            // Where it leaves its state.
            let aux = target.parent().unwrap_or(Path::new("/tmp")).to_owned();
            while !told.load(Ordering::Relaxed) {
                let text = run(Command::new("fio")
                    .args(["--name=v", "--size=24m", "--rw=randrw", "--bs=4k", "--direct=1", "--ioengine=psync"])
                    .args(["--numjobs=2", "--verify=crc32c", "--verify_backlog=256", "--verify_fatal=1", "--fsync=64"])
                    .args(["--time_based", "--runtime=4", "--group_reporting"])
                    .arg(format!("--aux-path={}", aux.display()))
                    .arg(format!("--directory={}", target.display())));
                assert!(text.contains("err= 0") && !text.contains("verify: bad"), "{text}");
                rounds += 1;
            }
            rounds
        });
        Fio { stop, thread }
    }

    /// Nothing was wrong in so many rounds.
    fn end(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// A snapshot as it must stay.
struct Taken {
    guid: Guid,
    file: PathBuf,
    sum: String,
    mtime: (i64, i64),
    content: String,
}

fn mtime(path: &Path) -> (i64, i64) {
    let meta = fs::metadata(path).unwrap();
    (meta.mtime(), meta.mtime_nsec())
}

/// The file of a snapshot just taken: closed, whole, as other programs want it.
fn check_frozen(disk: &Disk, guid: &Guid, file: PathBuf) -> Taken {
    assert_eq!(read_header(&file, None).unwrap().in_use, 0, "{}", file.display());
    let (sum, mtime) = (sha256(&file), mtime(&file));
    let copy = disk.t.dir.path().join("copy");
    fs::copy(&file, &copy).unwrap();
    // Its environment has to be long: see its bug with short ones.
    run(Command::new("env")
        .arg(format!("PADDING={}", "x".repeat(5000)))
        .args(["/usr/sbin/ploop", "check", "-c", "-f", "-r"])
        .arg(&copy));
    fs::remove_file(&copy).unwrap();
    let content = disk.content(guid);
    Taken { guid: *guid, file, sum, mtime, content }
}

#[test]
fn snapshots_at_random_moments() {
    let Some(disk) = Disk::new("snapshots_at_random_moments", "384m", &[]) else { return };
    let n = count(3, 6, 50);
    let fio = Fio::start(&disk.target);
    let mut taken: Vec<Taken> = Vec::new();
    let mut times = Vec::new();
    for i in 0..n {
        pause(150 + 97 * (i as u64 * 7 % 11));
        fs::write(disk.target.join(format!("marker-{i}")), format!("content {i}")).unwrap();
        File::open(disk.target.join(format!("marker-{i}"))).unwrap().sync_all().unwrap();
        let old = disk.top();
        let start = Instant::now();
        let guid = disk.snapshot();
        times.push(start.elapsed().as_millis());
        taken.push(check_frozen(&disk, &guid, old));
        assert_eq!(disk.descriptor().images.len(), i + 2);
        assert_eq!(disk.device().images.len(), i + 2);
    }
    let rounds = fio.end();
    // Nothing has touched them since.
    for t in &taken {
        assert_eq!((sha256(&t.file), mtime(&t.file)), (t.sum.clone(), t.mtime), "{}", t.file.display());
    }
    // What was flushed is in them, what came later is not, and the file systems were at rest.
    let side = disk.t.dir.path().join("side");
    fs::create_dir(&side).unwrap();
    for i in [0, n / 2, n - 1] {
        let t = &taken[i];
        run(ploop().args(["mount", "-r", "-u", &t.guid.to_string(), "-c", "side", "-m"]).arg(&side).arg(&disk.dd));
        let mut text = String::new();
        File::open(side.join(format!("marker-{i}"))).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, format!("content {i}"));
        assert!(!side.join(format!("marker-{}", i + 1)).exists());
        let found = device::by_base(&disk.descriptor().images[0].file, Some("side")).unwrap();
        let part = device::mount_source(&found[0]).unwrap();
        run(Command::new("e2fsck").args(["-fn"]).arg(part));
        run(ploop().args(["umount", "-c", "side"]).arg(&disk.dd));
        assert_eq!(disk.content(&t.guid), t.content);
    }
    disk.umount();
    for t in &taken {
        disk.t.sound_delta(&t.file);
    }
    println!("{n} snapshots in {rounds} rounds of fio, the command took {times:?} ms");
}

/// Snapshots taken at random moments are merged in random order while the disk is written to, two of them being looked
/// at meanwhile.
#[test]
fn merged_in_random_order() {
    let Some(disk) = Disk::new("merged_in_random_order", "384m", &[]) else { return };
    let n = count(3, 5, 50);
    let fio = Fio::start(&disk.target);
    let mut taken: Vec<(Guid, String)> = Vec::new();
    for i in 0..n {
        pause(100 + 61 * (i as u64 * 5 % 7));
        let guid = disk.snapshot();
        let content = disk.content(&guid);
        taken.push((guid, content));
    }
    // Two stay mounted: what they need cannot be merged, the rest can.
    let mut watched = Vec::new();
    for (name, at) in [("early", 0), ("middle", n / 2)] {
        let side = disk.t.dir.path().join(name);
        fs::create_dir(&side).unwrap();
        run(ploop().args(["mount", "-r", "-u", &taken[at].0.to_string(), "-c", name, "-m"]).arg(&side).arg(&disk.dd));
        let found = device::by_base(&disk.descriptor().images[0].file, Some(name)).unwrap();
        watched.push((name, taken[at].clone(), found[0].node().to_path_buf()));
    }
    let refused = output(ploop().args(["snapshot-merge", "-u", &taken[n / 2].0.to_string()]).arg(&disk.dd));
    assert_eq!(refused.status.code(), Some(17), "{refused:?}");
    let refused = output(ploop().args(["snapshot-merge", "-u", &taken[1].0.to_string()]).arg(&disk.dd));
    assert_eq!(refused.status.code(), Some(17), "{refused:?}");
    let snapshots = disk.descriptor().snapshots;
    assert!(snapshots.iter().all(|s| !s.temporary), "{snapshots:?}");

    // Above the upper one: in an order that depends on nothing the engine knows.
    let mut times = Vec::new();
    let seed = common::seed::one(None, common::seed::fresh());
    let mut rng = Rng::new(seed.0);
    let mut above: Vec<(Guid, String)> = taken[n / 2 + 1..].to_vec();
    let merge = |pool: &mut Vec<(Guid, String)>, rng: &mut Rng, lowest: usize, times: &mut Vec<u128>| {
        // Into what is below it: the GUID of what is below disappears.
        let at = lowest + 1 + rng.index(pool.len() - lowest - 1);
        let start = Instant::now();
        run(ploop().args(["snapshot-merge", "-u", &pool[at].0.to_string()]).arg(&disk.dd));
        times.push(start.elapsed().as_millis());
        pool.remove(at - 1);
        assert_eq!(disk.content(&pool[at - 1].0), pool[at - 1].1, "content of a merged snapshot");
    };
    while above.len() > 1 {
        merge(&mut above, &mut rng, 0, &mut times);
        for (_, (_, content), node) in &watched {
            assert_eq!(sha256(node), *content);
        }
    }
    for (name, (guid, content), node) in &watched {
        assert_eq!(sha256(node), *content);
        run(ploop().args(["umount", "-c", name]).arg(&disk.dd));
        assert_eq!(disk.content(guid), *content);
    }
    let mut all = taken[..=n / 2].to_vec();
    all.extend(above);
    while all.len() > 2 {
        merge(&mut all, &mut rng, 0, &mut times);
    }
    // A range, then the top, so that one image is left.
    run(ploop().args(["snapshot-merge", "-A"]).arg(&disk.dd));
    assert_eq!(disk.descriptor().images.len(), 1);
    assert_eq!(disk.device().images.len(), 1);
    let rounds = fio.end();
    disk.umount();
    disk.t.sound(&disk.top());
    println!("{n} snapshots merged in {rounds} rounds of fio, each took {times:?} ms");
}

fn kill_process(id: ProcessId) -> bool {
    runtime::alive(id)
        && nix::sys::signal::kill(nix::unistd::Pid::from_raw(id.pid), nix::sys::signal::Signal::SIGKILL).is_ok()
}

/// Worker, supervisor, helper or caller is killed in the middle of a merge of frozen levels, or of a snapshot: retrying the
/// operation finishes it, if it was not finished anyway.
#[test]
fn killed_in_the_middle() {
    let Some(disk) = Disk::new("killed_in_the_middle", "256m", &[]) else { return };
    let fio = Fio::start(&disk.target);
    let bulk = |name: &str| {
        run(Command::new("dd")
            .args(["if=/dev/urandom", "bs=1M", "count=16", "conv=fsync", "status=none"])
            .arg(format!("of={}", disk.target.join(name).display())));
    };
    let rounds = count(2, 8, 60);
    let (mut killed, mut again, mut thawed) = (0, 0, 0);
    for round in 0..rounds {
        // A base, a snapshot to be merged into, one to be merged.
        bulk("a");
        let lower = disk.snapshot();
        bulk("b");
        let upper = disk.snapshot();
        let content = disk.content(&upper);
        let before = served::record(&disk.device()).clone();
        let delay = 5 + (round as u64 * 37) % 240;
        let snapshots = round % 4 == 3;
        let new = Guid::generate().to_string();
        let upper_text = upper.to_string();
        let args = match snapshots {
            true => ["snapshot", "-u", new.as_str()],
            false => ["snapshot-merge", "-u", upper_text.as_str()],
        };
        let mut caller = ploop().args(args).arg(&disk.dd).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let who = ["helper", "supervisor", "worker", "caller"][round / 2 % 4];
        let hit = match who {
            // The one that merges, or the one that holds the freeze, as soon as it is there.
            "helper" => {
                let end = Instant::now() + Duration::from_secs(5);
                let mut found = None;
                while found.is_none() && Instant::now() < end {
                    found = children(before.supervisor, "helper").first().copied();
                }
                pause(delay % 16);
                found.is_some_and(kill_process)
            }
            "supervisor" => {
                pause(delay);
                kill_process(before.supervisor)
            }
            "worker" => {
                pause(delay);
                kill_process(before.worker)
            }
            _ => {
                pause(delay);
                caller.kill().is_ok()
            }
        };
        killed += usize::from(hit);
        let status = caller.wait().unwrap();
        // Whatever became of it, nothing stays frozen.
        let pulse = disk.target.join("pulse");
        run(Command::new("timeout").args(["90", "sh", "-c", "echo x > \"$0\""]).arg(&pulse));
        thawed += 1;
        println!("round {round}: {} {who} killed after {delay} ms ({hit}): {status}", args[0]);
        let done = || match snapshots {
            true => disk.descriptor().snapshots.iter().any(|s| s.guid.to_string() == new),
            false => disk.descriptor().snapshot(&lower).is_none(),
        };
        assert!(!status.success() || done());
        // The server may be at it without the caller.
        let retried = within(90, "an end", || {
            if done() {
                return Some(false);
            }
            let retry = output(ploop().args(args).arg(&disk.dd));
            println!("   again: {} {}", retry.status, String::from_utf8_lossy(&retry.stderr));
            (retry.status.success() || done()).then_some(true)
        });
        again += usize::from(retried);
        assert_eq!(disk.content(&upper), content);
        let now = within(30, "supervisor and worker", || {
            let r = record(disk.device().name());
            (runtime::alive(r.supervisor) && runtime::alive(r.worker)).then_some(r)
        });
        assert_eq!(now.diskseq, before.diskseq);
        // Back to one image, the top's merge included.
        within(90, "one image", || {
            let all = output(ploop().args(["snapshot-merge", "-A"]).arg(&disk.dd));
            (all.status.success() && disk.descriptor().images.len() == 1).then_some(())
        });
    }
    let fio = fio.end();
    disk.umount();
    run(Command::new("/usr/sbin/ploop").args(["check", "-f"]).arg(disk.top()));
    println!("{killed} killed in {rounds} rounds, {fio} of fio; {again} done again, {thawed} times thawed");
}

/// Snapshots beside the running disk, a copy in the place of an image, a snapshot for a backup.
#[test]
fn beside_the_running_disk() {
    let Some(disk) = Disk::new("beside_the_running_disk", "256m", &[]) else { return };
    let fio = Fio::start(&disk.target);
    let taken: Vec<(Guid, PathBuf, String)> = (0..3)
        .map(|_| {
            pause(400);
            let file = disk.top();
            let guid = disk.snapshot();
            (guid, file, disk.content(&guid))
        })
        .collect();
    // Any number of them, without names.
    let base = disk.descriptor().images[0].file.clone();
    for (guid, ..) in [&taken[0], &taken[1], &taken[1]] {
        run(ploop().args(["mount", "-r", "-u", &guid.to_string()]).arg(&disk.dd));
    }
    let mut beside: Vec<Device> = device::by_base(&base, None).unwrap();
    beside.retain(|d| d.read_only);
    assert_eq!(beside.len(), 3);
    for device in &beside {
        let of = taken.iter().find(|t| device.component().starts_with(&t.0.to_string())).unwrap();
        assert_eq!(sha256(device.node()), of.2);
        run(ploop().args(["umount", "-d"]).arg(device.node()));
    }

    // A copy takes the place of an image, and of its name; what is none does not.
    let copy = disk.t.dir.path().join("copy");
    let replace = |args: &[&str], of: &Guid| {
        output(ploop().args(["replace", "-u", &of.to_string(), "-i"]).arg(&copy).args(args).arg(&disk.dd))
    };
    fs::copy(&taken[1].1, &copy).unwrap();
    assert_eq!(replace(&[], &taken[2].0).status.code(), Some(11));
    assert_eq!(replace(&[], &guid::TOP).status.code(), Some(38));
    let done = replace(&[], &taken[1].0);
    assert!(done.status.success(), "{done:?}");
    assert_eq!(disk.descriptor().image(&taken[1].0).unwrap().file, copy);
    assert_eq!(disk.device().images[1].path, copy);
    fs::remove_file(&taken[1].1).unwrap();
    assert_eq!(disk.content(&taken[1].0), taken[1].2);
    // Back, under the name.
    let second = disk.t.dir.path().join("second");
    fs::create_dir(&second).unwrap();
    let again = second.join("again");
    fs::copy(&copy, &again).unwrap();
    let inode = fs::metadata(&again).unwrap().ino();
    run(ploop().args(["replace", "-u", &taken[1].0.to_string(), "-k", "-i"]).arg(&again).arg(&disk.dd));
    assert_eq!(fs::metadata(&copy).unwrap().ino(), inode);
    assert!(!again.exists());
    assert_eq!(disk.device().images[1].id.ino, inode);
    assert_eq!(disk.content(&taken[2].0), taken[2].2);
    // By device.
    fs::copy(&taken[0].1, &again).unwrap();
    run(ploop().args(["replace", "-d", &disk.node, "-l", "0", "-i"]).arg(&again));
    assert_eq!(disk.device().images[0].path, again);
    fs::copy(&taken[0].1, second.join("third")).unwrap();
    run(ploop().args(["replace", "-d", &disk.node, "-l", "0", "-i"]).arg(second.join("third")));
    // The descriptor was not told: by its base nothing runs, but locks tell that the top is in use.
    let refused = output(ploop().arg("snapshot").arg(&disk.dd));
    assert_eq!(refused.status.code(), Some(17), "{refused:?}");
    run(ploop().args(["replace", "-d", &disk.node, "-l", "0", "-i"]).arg(&taken[0].1));

    // A temporary snapshot lives while it is mounted.
    let side = disk.t.dir.path().join("side");
    fs::create_dir(&side).unwrap();
    fs::write(disk.target.join("before"), "x").unwrap();
    let id = Guid::generate().to_string();
    run(ploop().args(["tsnapshot", "-u", &id, "-c", "backup", "-m"]).arg(&side).arg(&disk.dd));
    fs::write(disk.target.join("after"), "x").unwrap();
    assert!(side.join("before").exists() && !side.join("after").exists());
    assert_eq!(disk.descriptor().snapshots.iter().filter(|s| s.temporary).count(), 1);
    run(ploop().args(["umount", "-m"]).arg(&side));
    // It goes with the next operation.
    let last = disk.snapshot();
    assert!(disk.descriptor().snapshots.iter().all(|s| !s.temporary), "{:?}", disk.descriptor().snapshots);
    assert_eq!(disk.descriptor().images.len(), 5);
    run(ploop().args(["snapshot-delete", "-u", &last.to_string()]).arg(&disk.dd));
    assert_eq!(disk.descriptor().images.len(), 4);
    // Into a new file.
    let moved = disk.t.dir.path().join("moved");
    run(ploop().args(["snapshot-merge", "-u", &taken[2].0.to_string(), "-n"]).arg(&moved).arg(&disk.dd));
    assert_eq!(disk.descriptor().image(&taken[2].0).unwrap().file, moved);
    assert!(!copy.exists());
    assert_eq!(disk.content(&taken[2].0), taken[2].2);
    fio.end();
    disk.umount();
    disk.t.sound_delta(&moved);
}

/// How long a writer on the mounted file system is kept waiting.
#[test]
fn a_snapshot_is_a_short_pause() {
    let Some(disk) = Disk::new("a_snapshot_is_a_short_pause", "384m", &[]) else { return };
    let n = count(1, 4, 20);
    let stop = AtomicBool::new(false);
    let waits = std::thread::scope(|s| {
        let writer = s.spawn(|| {
            let mut options = OpenOptions::new();
            let file = options.write(true).create(true).custom_flags(libc::O_DIRECT).open(disk.target.join("pulse"));
            let file = file.unwrap();
            let buf = ploop::sys::aligned::AlignedBuf::new(4096);
            let mut waits = Vec::new();
            for i in 0u64.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let start = Instant::now();
                file.write_all_at(&buf, i * 4096 % (16 << 20)).unwrap();
                waits.push((start, start.elapsed()));
            }
            waits
        });
        let mut spans = Vec::new();
        let kinds = ["nothing", "a freeze alone", "a snapshot", "one without a freeze"];
        for round in 0..n * kinds.len() {
            pause(300);
            let start = Instant::now();
            match kinds[round % kinds.len()] {
                "nothing" => pause(200),
                "a freeze alone" => {
                    let both = "fsfreeze -f \"$0\"; fsfreeze -u \"$0\"";
                    run(Command::new("sh").args(["-c", both]).arg(&disk.target));
                }
                // By device, so that both kinds of snapshot can follow each other.
                kind => {
                    let file = disk.t.dir.path().join(format!("delta-{round}"));
                    let freeze: &[&str] = if kind == "a snapshot" { &["-F"] } else { &[] };
                    run(ploop().arg("snapshot").args(freeze).args(["-d", &disk.node]).arg(&file));
                }
            }
            spans.push((kinds[round % kinds.len()], start, Instant::now()));
        }
        pause(200);
        stop.store(true, Ordering::Relaxed);
        let waits = writer.join().unwrap();
        let longest = |from: Instant, to: Instant| {
            let met = waits.iter().filter(|(start, took)| *start < to && *start + *took > from);
            met.map(|(_, took)| took.as_millis()).max()
        };
        let of = |kind: &str| {
            let mut all: Vec<u128> =
                spans.iter().filter(|s| s.0 == kind).map(|s| longest(s.1, s.2).unwrap_or(0)).collect();
            all.sort_unstable();
            all
        };
        kinds.map(|kind| (kind, of(kind)))
    });
    println!("longest waits of a writer during each of {n}, in ms: {waits:?}");
    disk.umount_by(ploop().args(["umount", "-d", &disk.node]));
}

//! Random kills: in each life of a disk the worker, the supervisor, both, a helper or the caller is killed at a random moment, at
//! mount, in I/O, in a takeover or at umount.
//!
//! Nothing hangs, nothing is left over, no byte is wrong. I/O fails only where worker and supervisor are dead at once;
//! even then all that was answered, flushed or not, is there again after the next mount. `PLOOP_TEST=full` 800 lives, `ci` 40, else 20;
//! `LIVES=N` sets the number, `PLOOP_SEED=N` repeats a run's choices.

mod device_common;

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use device_common::common::rng::Rng;
use device_common::load::kill_process;
use device_common::*;
use ploop::device::{self, Device, State, served};
use ploop::server::proto::{DeviceRecord, ProcessId};
use ploop::server::runtime;
use ploop::sys::aligned::AlignedBuf;

const LANES: u64 = 3;
const SLOTS: u64 = 24;
const BLOCK: usize = 4096;
/// Blocks of a lane lie in clusters of their own, so that the image grows.
const SPREAD: u64 = 1 << 20;

fn at(lane: u64, slot: u64) -> u64 {
    (lane * SLOTS + slot) * SPREAD + slot % 5 * BLOCK as u64
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Phase {
    Mount,
    Io,
    Takeover,
    Umount,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Victim {
    Worker,
    Supervisor,
    Both,
    Helper,
    Caller,
}

/// What a block may hold: the number of the last write that was answered, and of one after it that was not; 0: zeroes.
#[derive(Clone)]
struct Lane {
    number: u64,
    next: u64,
    slots: Vec<Vec<u64>>,
}

impl Lane {
    fn new(number: u64) -> Lane {
        Lane { number, next: 1, slots: vec![vec![0]; SLOTS as usize] }
    }

    fn content(&self, n: u64) -> Vec<u8> {
        if n == 0 { vec![0; BLOCK] } else { pattern(self.number << 40 | n, BLOCK) }
    }

    /// Writes, flushes and reads back until told to stop. Ends with an error where I/O does.
    fn work(&mut self, node: &Path, stop: &AtomicBool) -> io::Result<()> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(node)?;
        let mut buf = AlignedBuf::new(BLOCK);
        while !stop.load(Ordering::Relaxed) {
            let (n, slot) = (self.next, self.next * 7 % SLOTS);
            let data = self.content(n);
            buf.copy_from_slice(&data);
            self.next += 1;
            self.slots[slot as usize].push(n);
            file.write_all_at(&buf, at(self.number, slot))?;
            // Nothing older comes back, whichever processes are killed.
            let before = std::mem::replace(&mut self.slots[slot as usize], vec![n]);
            buf.fill(0);
            file.read_exact_at(&mut buf, at(self.number, slot))?;
            assert!(
                buf[..] == data[..],
                "lane {} slot {slot}: write {n} is not what is read, of {before:?}",
                self.number
            );
            if n % 13 == 0 {
                file.sync_data()?;
            }
        }
        file.sync_data()
    }

    /// Each block holds one of the writes that it may hold; from now on exactly that.
    fn check(&mut self, node: &Path, life: &str) {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(node).unwrap();
        let mut buf = AlignedBuf::new(BLOCK);
        for slot in 0..SLOTS {
            if let Err(e) = file.read_exact_at(&mut buf, at(self.number, slot)) {
                let name = node.file_name().unwrap().to_str().unwrap();
                panic!("{life}: lane {} slot {slot}: {e}; {:?}", self.number, device::by_node(name));
            }
            let may = &self.slots[slot as usize];
            let found = may.iter().rev().find(|n| self.content(**n)[..] == buf[..]).copied();
            let Some(found) = found else {
                let older = (0..self.next).rev().find(|n| self.content(*n)[..] == buf[..]);
                panic!("{life}: lane {} slot {slot} holds write {older:?}, one of {may:?} wanted", self.number);
            };
            self.slots[slot as usize] = vec![found];
        }
    }
}

struct Disk {
    t: Bench,
    dd: PathBuf,
    image: PathBuf,
    node: PathBuf,
}

fn ploop() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ploop"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn ended(child: &mut Child, what: &str) -> ExitStatus {
    within(90, what, || child.try_wait().unwrap())
}

impl Disk {
    fn new(name: &str) -> Option<Disk> {
        let t = Bench::new(name)?;
        let image = t.dir.path().join("root.hdd");
        run(Command::new(env!("CARGO_BIN_EXE_ploop")).args(["init", "-s", "256m", "-t", "none"]).arg(&image));
        let dd = t.dir.path().join("DiskDescriptor.xml");
        let node = PathBuf::from(format!("/dev/ploop-test-{}-{name}", std::process::id()));
        Some(Disk { t, dd, image, node })
    }

    fn mount(&self) -> Child {
        ploop().args(["mount", "-d"]).arg(&self.node).arg(&self.dd).spawn().unwrap()
    }

    fn umount(&self) -> Child {
        ploop().args(["umount", "-d"]).arg(&self.node).spawn().unwrap()
    }

    fn name(&self) -> &str {
        self.node.file_name().unwrap().to_str().unwrap()
    }

    fn record(&self) -> Option<DeviceRecord> {
        runtime::read_record(&runtime::device_dir(self.name())).ok().flatten()
    }

    fn device(&self) -> Option<Device> {
        device::by_node(self.name()).ok().flatten()
    }

    /// A device that serves.
    fn serving(&self) -> Option<Device> {
        self.device().filter(|d| d.state == State::Running && self.node.exists())
    }

    /// A device that serves, mounted again if there is none. `settling`: a mount failed, and may be undoing itself.
    fn running(&self, settling: bool) -> Device {
        within(90, "a device that serves", || {
            let Some(device) = self.serving() else {
                ended(&mut self.mount(), "mount");
                return None;
            };
            if settling {
                pause(400);
            }
            self.serving().filter(|d| served::record(d).diskseq == served::record(&device).diskseq)
        })
    }

    /// Unmounted, whatever was left.
    fn ended(&self) {
        within(90, "the end of the device", || {
            if self.device().is_none() && self.record().is_none() {
                return Some(());
            }
            ended(&mut self.umount(), "umount");
            None
        });
    }

    /// Kills; answers how many processes, and whether worker and supervisor may be dead at once.
    fn strike(&self, victim: Victim, caller: Option<&mut Child>, worker_is_dead: bool) -> (usize, bool) {
        let Some(r) = self.record() else {
            let killed = victim == Victim::Caller && caller.is_some_and(|c| c.kill().is_ok());
            return (usize::from(killed), false);
        };
        let hit = |id: ProcessId| {
            let alive = id.pid > 0 && runtime::alive(id);
            if alive {
                kill_process(id);
            }
            usize::from(alive)
        };
        let struck = match victim {
            Victim::Worker => (hit(r.worker), false),
            Victim::Supervisor => (hit(r.supervisor), worker_is_dead),
            Victim::Both => (hit(r.supervisor) + hit(r.worker), true),
            Victim::Helper => (children(r.supervisor, "helper").into_iter().map(hit).sum(), false),
            Victim::Caller => (caller.map_or(0, |c| usize::from(c.kill().is_ok())), false),
        };
        // Until then the device looks like one that serves.
        if victim == Victim::Both {
            within(10, "the end of both", || {
                (!runtime::alive(r.supervisor) && !runtime::alive(r.worker)).then_some(())
            });
        }
        struck
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|n| n.parse().ok())
}

#[test]
fn killed_at_any_time() {
    let Some(disk) = Disk::new("killed_at_any_time") else { return };
    let lives = number("LIVES").unwrap_or(count(40, 20, 800));
    let seed = common::seed::one(Some("LIVES_SEED"), common::seed::fresh());
    println!("PLOOP_SEED={}", seed.0);
    let mut random = Rng::new(seed.0);
    let mut lanes: Vec<Lane> = (0..LANES).map(Lane::new).collect();
    let (mut kills, mut failed, mut longest) = (0, 0, Duration::ZERO);
    use {Phase::*, Victim::*};
    for number in 0..lives {
        let phase = [Mount, Io, Takeover, Umount][number as usize % 4];
        let victim = match ([Worker, Supervisor, Both, Helper, Caller][random.below(5) as usize], phase) {
            // Nobody calls, and helpers are rare.
            (Helper | Caller, Io | Takeover) => Worker,
            (victim, _) => victim,
        };
        let life = format!("life {number}: {victim:?} killed at {phase:?}");
        let start = Instant::now();

        let mut caller = disk.mount();
        if phase == Mount {
            pause(random.below(160));
            kills += disk.strike(victim, Some(&mut caller), false).0;
        }
        let status = ended(&mut caller, "mount");
        assert!(phase == Mount || status.success(), "{life}: mount: {status}");
        let life = format!("{life}, mount: {status}");
        let device = disk.running(!status.success());
        lanes.iter_mut().for_each(|l| l.check(device.node(), &life));

        let stop = Arc::new(AtomicBool::new(false));
        let mut may_fail = false;
        let results: Vec<io::Result<()>> = std::thread::scope(|s| {
            let threads: Vec<_> = lanes.iter_mut().map(|l| s.spawn(|| l.work(device.node(), &stop))).collect();
            pause(20 + random.below(120));
            match phase {
                Io => {
                    let (n, both) = disk.strike(victim, None, false);
                    (kills, may_fail) = (kills + n, both);
                }
                Takeover => {
                    kills += disk.strike(Worker, None, false).0;
                    pause(random.below(45));
                    let (n, both) = disk.strike(victim, None, true);
                    (kills, may_fail) = (kills + n, both);
                }
                Mount | Umount => {}
            }
            pause(40 + random.below(100));
            stop.store(true, Ordering::Relaxed);
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        for e in results.into_iter().filter_map(Result::err) {
            assert!(may_fail, "{life}: {e}");
            failed += 1;
        }

        if phase == Umount {
            let mut caller = disk.umount();
            pause(random.below(110));
            kills += disk.strike(victim, Some(&mut caller), false).0;
            ended(&mut caller, "umount");
        }
        disk.ended();
        longest = longest.max(start.elapsed());
        println!("{life}: {:?}", start.elapsed());
    }
    // What is still on its way out has an end.
    within(30, "loop devices without a mount of ours", || {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        (!mounts.contains(disk.name())).then_some(())
    });
    let device = disk.running(false);
    lanes.iter_mut().for_each(|l| l.check(device.node(), "at the end"));
    disk.ended();
    disk.t.assert_gone(&device);
    disk.t.sound(&disk.image);
    println!(
        "{kills} kills in {lives} lives, {failed} writers failed with both servers dead; the longest life {longest:?}"
    );
    assert!(kills > lives as usize / 2, "{kills} kills in {lives} lives");
}

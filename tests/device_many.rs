//! Many devices at once, made and ended by eight processes in parallel, with I/O on all: right names, right content,
//! nothing left, and what each one costs.
//!
//! 24 devices; `PLOOP_TEST=ci` 100, `PLOOP_TEST=full` 500, as far as there is memory (`MANY=N` sets the number).

mod device_common;

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use device_common::*;
use ploop::device::{self, Device};
use ploop::format::header::{Header, Version};
use ploop::server::proto::ProcessId;
use ploop::server::runtime;
use ploop::units::ClusterSize;

const PROCESSES: usize = 8;
const CHILD: &str = "PLOOP_TEST_MANY";
/// What one device is assumed to take when the number is chosen, in MiB: what the servers take and the kernel for them.
const EACH: usize = 36;

/// Sizes in sectors: nine disks of ten have 10 GiB, the tenth 16 TiB.
fn sectors(i: usize) -> u64 {
    if i % 10 == 9 { 16 << 31 } else { 10 << 21 }
}

fn image(dir: &Path, i: usize) -> PathBuf {
    let path = dir.join(format!("{i}.hdd"));
    let header = Header::new(Version::V2, ClusterSize::DEFAULT, sectors(i)).unwrap();
    let file = fs::File::create(&path).unwrap();
    file.set_len(u64::from(header.first_data()) * ClusterSize::DEFAULT.bytes()).unwrap();
    file.write_all_at(&header.encode(), 0).unwrap();
    path
}

/// Places in a disk that are written, all over it.
fn places(i: usize) -> Vec<u64> {
    let bytes = sectors(i) * 512;
    [0, bytes / 3, bytes / 2 + (1 << 20), bytes - (1 << 20)].map(|at| at / 4096 * 4096).to_vec()
}

fn say(line: &str) {
    println!("@{line}");
    std::io::stdout().flush().unwrap();
}

/// Not a test by itself: one of the processes. Does a step with each of its disks when it is told to.
#[test]
fn child() {
    let Some(job) = std::env::var_os(CHILD) else { return };
    let job = job.into_string().unwrap();
    let [dir, first, end] = job.split('|').collect::<Vec<_>>()[..] else { panic!("{job}") };
    let (dir, mine) = (PathBuf::from(dir), first.parse::<usize>().unwrap()..end.parse::<usize>().unwrap());
    let Some(mut t) = Bench::new("child") else { return };
    // The folder is the parent's: what is forgotten ends with it.
    t.dir = tempfile::tempdir_in(&dir).unwrap();
    let mut devices: Vec<(usize, Device)> = Vec::new();
    for line in std::io::stdin().lines() {
        match line.unwrap().as_str() {
            "attach" => {
                for i in mine.clone() {
                    let device = t.attach_numbered(&dir.join(format!("{i}.hdd"))).unwrap();
                    for at in places(i) {
                        write_at(device.node(), at, &pattern(at ^ i as u64, 64 << 10));
                    }
                    say(&format!("device {} {i}", device.name()));
                    devices.push((i, device));
                }
                say("done");
            }
            "load" => {
                for round in 0..4u64 {
                    for (i, device) in &devices {
                        for at in places(*i) {
                            write_at(device.node(), at + (round + 1) * (64 << 10), &pattern(round, 4096));
                        }
                    }
                }
                say("done");
            }
            "detach" => {
                for (i, device) in devices.drain(..) {
                    for at in places(i) {
                        assert_eq!(read_at(device.node(), at, 64 << 10), pattern(at ^ i as u64, 64 << 10), "disk {i}");
                    }
                    device::detach(device.name()).unwrap();
                }
                say("done");
            }
            _ => break,
        }
    }
}

struct Process {
    child: Child,
    say: ChildStdin,
    hear: BufReader<ChildStdout>,
}

impl Process {
    fn start(dir: &Path, mine: std::ops::Range<usize>) -> Process {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "--nocapture", "child"]);
        command.env(CHILD, format!("{}|{}|{}", dir.display(), mine.start, mine.end));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (say, hear) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Process { child, say, hear }
    }

    /// What it says until it is done.
    fn told(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            assert!(self.hear.read_line(&mut line).unwrap() > 0, "a process ended: {lines:?}");
            match line.find('@').map(|at| line[at + 1..].trim()) {
                Some("done") => return lines,
                Some(word) => lines.push(word.to_owned()),
                None => {}
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// All at the same time; how long it took, and what they said.
fn all(processes: &mut [Process], word: &str) -> (Duration, Vec<String>) {
    let start = Instant::now();
    for p in processes.iter_mut() {
        writeln!(p.say, "{word}").unwrap();
    }
    let said = processes.iter_mut().flat_map(|p| p.told()).collect();
    (start.elapsed(), said)
}

/// Proportional memory in KiB.
fn pss(id: ProcessId) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", id.pid)).unwrap();
    let line = text.lines().find(|l| l.starts_with("Pss:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// CPU time in ticks of 10 ms.
fn ticks(id: ProcessId) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/stat", id.pid)).unwrap();
    let fields: Vec<&str> = text.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

fn number() -> usize {
    let wanted = match std::env::var("MANY").ok().and_then(|s| s.parse().ok()) {
        Some(n) => n,
        None => match std::env::var("PLOOP_TEST").as_deref() {
            Ok("full") => 500,
            Ok("ci") => 100,
            _ => 24,
        },
    };
    let info = fs::read_to_string("/proc/meminfo").unwrap();
    let line = info.lines().find(|l| l.starts_with("MemAvailable:")).unwrap();
    let kib: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    let fits = (kib / 1024 * 5 / 6 / EACH).max(PROCESSES);
    if fits < wanted {
        println!("only {fits} of {wanted} devices: {} MiB of memory are available", kib / 1024);
    }
    wanted.min(fits)
}

#[test]
fn many_devices_at_once() {
    let Some(t) = Bench::new("many_devices_at_once") else { return };
    let count = number();
    let dir = t.dir.path();
    for i in 0..count {
        image(dir, i);
    }
    let cut = |p: usize| p * count / PROCESSES;
    let mut processes: Vec<Process> = (0..PROCESSES).map(|p| Process::start(dir, cut(p)..cut(p + 1))).collect();
    let (attaching, said) = all(&mut processes, "attach");
    let devices: Vec<(String, usize)> = said
        .iter()
        .filter_map(|l| l.strip_prefix("device "))
        .map(|l| l.split_once(' ').map(|(name, i)| (name.to_owned(), i.parse().unwrap())).unwrap())
        .collect();
    assert_eq!(devices.len(), count);
    assert_eq!(devices.iter().map(|(n, _)| n).collect::<HashSet<_>>().len(), count, "two devices have one name");
    let mut loops = HashSet::new();
    let mut costs: Vec<(u64, u64, u64)> = Vec::new();
    let records: Vec<_> = devices.iter().map(|(name, i)| (record(name), *i)).collect();
    for (r, i) in &records {
        assert_eq!(r.levels[0].path, dir.join(format!("{i}.hdd")), "{} is another disk", r.name);
        assert_eq!(r.size_sectors, sectors(*i));
        assert!(loops.insert(r.backing.clone()), "{} is behind two devices", r.backing);
    }
    let cpu = |records: &[(ploop::server::proto::DeviceRecord, usize)]| -> u64 {
        records.iter().map(|(r, _)| ticks(r.supervisor) + ticks(r.worker)).sum()
    };
    let born = cpu(&records);
    let (loading, _) = all(&mut processes, "load");
    let loaded = cpu(&records);
    std::thread::sleep(Duration::from_secs(5));
    let idle = cpu(&records) - loaded;
    for (r, i) in &records {
        costs.push((sectors(*i), pss(r.supervisor), pss(r.worker)));
    }
    let (detaching, _) = all(&mut processes, "detach");
    for p in &mut processes {
        writeln!(p.say, "end").unwrap();
        assert!(p.child.wait().unwrap().success());
    }
    for (r, _) in &records {
        let gone = || !runtime::alive(r.supervisor) && !runtime::alive(r.worker);
        within(10, "the end of a server", || gone().then_some(()));
        let there = device::by_node(&r.name).unwrap();
        // The number may be somebody else's by now.
        assert!(there.is_none_or(|d| d.instance != r.token), "{} is still there", r.name);
    }
    println!(
        "{count} devices, {PROCESSES} processes: attached in {:.1} s, loaded in {:.1} s, detached in {:.1} s; CPU per device: \
         {:.0} ms until attached and written, {:.0} ms under load, {:.2} % idle",
        attaching.as_secs_f64(),
        loading.as_secs_f64(),
        detaching.as_secs_f64(),
        born as f64 * 10.0 / count as f64,
        (loaded - born) as f64 * 10.0 / count as f64,
        idle as f64 / 5.0 / count as f64,
    );
    for (name, size) in [("10 GiB", 10 << 21), ("16 TiB", 16u64 << 31)] {
        let mut of: Vec<(u64, u64)> = costs.iter().filter(|c| c.0 == size).map(|c| (c.1, c.2)).collect();
        of.sort_by_key(|c| c.0 + c.1);
        if let (Some(median), Some(most)) = (of.get(of.len() / 2), of.last()) {
            println!(
                "PSS of a {name} disk: supervisor {} KiB + worker {} KiB, at most {} KiB together",
                median.0,
                median.1,
                most.0 + most.1
            );
            assert!(most.0 + most.1 < 64 << 10, "a device of {name} takes {} KiB", most.0 + most.1);
        }
    }
}

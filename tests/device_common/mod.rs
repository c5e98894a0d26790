//! What the device tests share: a scratch folder, images, checks that nothing is left.
#![allow(dead_code)]

#[path = "../common/mod.rs"]
pub mod common;
pub mod load;
pub mod served_file;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ploop::device::{self, AttachSpec, Device, Level, served};
use ploop::server::proto::Marked;
use ploop::server::{nodes, runtime};

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A scratch folder for one test; devices that the test forgot end with it.
pub struct Bench {
    pub dir: tempfile::TempDir,
    /// Devices keep their requests in slots, whatever the kernel can do.
    pub slots: bool,
}

impl Bench {
    /// `None` where there can be no devices and the test may be skipped (`common::skip`).
    pub fn new(name: &str) -> Option<Bench> {
        if !common::skip::devices_for(name) {
            return None;
        }
        let dir = tempfile::Builder::new().prefix("ploop-device-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let slots = std::env::var("PLOOP_TAKEOVER").is_ok_and(|way| way == "slots");
        Some(Bench { dir, slots })
    }

    /// Like [`new`](Self::new), for devices that keep their requests in slots.
    pub fn with_slots(name: &str) -> Option<Bench> {
        let mut bench = Bench::new(name)?;
        bench.slots = true;
        Some(bench)
    }

    /// An empty image, made by qemu-img.
    pub fn image(&self, name: &str, size: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        run(Command::new("qemu-img").args(["create", "-q", "-f", "parallels"]).arg(&path).arg(size));
        path
    }

    pub fn spec(&self, image: &Path) -> AttachSpec {
        let fd = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(image).unwrap();
        AttachSpec {
            levels: vec![Level { path: image.into(), raw: false, fd: fd.into() }],
            raw_cluster: None,
            read_only: false,
            marked: Marked::Refuse,
            component: String::new(),
            descriptor: None,
            // Nobody else who uses devices at the same time takes this name after us.
            device: Some(format!("ploop-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))),
            trace: false,
            until_unmounted: false,
            auto_compact: false,
            slots: self.slots,
        }
    }

    /// Attaches under the next free number.
    pub fn attach_numbered(&self, image: &Path) -> ploop::Result<Device> {
        device::attach(AttachSpec { device: None, ..self.spec(image) })
    }

    pub fn attach(&self, image: &Path) -> ploop::Result<Device> {
        device::attach(self.spec(image))
    }

    /// Nothing of the device is left.
    pub fn assert_gone(&self, device: &Device) {
        let r = served::record(device);
        // A number may be somebody else's by now.
        if runtime::number(&r.name).is_none() {
            assert!(nodes::existing(Path::new("/dev"), &r.name).is_empty(), "nodes of {} are left", r.name);
            assert!(!runtime::device_dir(&r.name).exists(), "the folder of {} is left", r.name);
            assert!(device::by_node(&r.name).unwrap().is_none());
        }
        let (bound, identity) =
            (Path::new("/sys/block").join(&r.backing).join("loop"), runtime::disk_identity(&r.backing));
        let left = bound.exists() && identity.is_some_and(|(_, seq)| seq == r.diskseq);
        assert!(!left, "{} is still bound", r.backing);
        let end = Instant::now() + Duration::from_secs(2);
        // The helper removes the unbound block device after the answer.
        while runtime::disk_identity(&r.backing).is_some_and(|(_, seq)| seq <= r.diskseq + 1) {
            assert!(Instant::now() < end, "{} is left", r.backing);
            pause(5);
        }
        while runtime::alive(r.supervisor) || runtime::alive(r.worker) {
            assert!(Instant::now() < end, "processes of {} are left", r.name);
            pause(5);
        }
    }

    /// Debian's ploop and qemu have nothing to complain about.
    pub fn sound(&self, image: &Path) {
        run(Command::new("qemu-img").args(["check", "-q", "-f", "parallels"]).arg(image));
        run(Command::new("/usr/sbin/ploop").args(["check", "-f"]).arg(image));
    }

    /// The same for a delta that may stand on others.
    pub fn sound_delta(&self, image: &Path) {
        run(Command::new("qemu-img").args(["check", "-q", "-f", "parallels"]).arg(image));
        run(Command::new("/usr/sbin/ploop").args(["check", "-c", "-f", "-r"]).arg(image));
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let ours = |d: &Device| d.top().starts_with(self.dir.path());
        for device in device::list().unwrap_or_default().iter().filter(|d| ours(d)) {
            if device::detach(device.name()).is_err() {
                let _ = device::abort(device.name());
                let _ = device::clean(device.name());
            }
        }
    }
}

/// A count: reduced in CI, usual, or full, by `$PLOOP_TEST`.
pub fn count<T>(ci: T, usual: T, full: T) -> T {
    match common::counts() {
        common::Counts::Full => full,
        common::Counts::Reduced => ci,
        common::Counts::Usual => usual,
    }
}

pub fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

/// Waits until `done` says so.
pub fn within<T>(seconds: u64, what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(Instant::now() < end, "{what}: not within {seconds} s");
        pause(10);
    }
}

/// Runs a program under a time limit; it must succeed.
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a program under a time limit of two minutes.
pub fn output(command: &mut Command) -> Output {
    let mut limited = Command::new("timeout");
    limited.args(["-k", "5", "120"]).arg(command.get_program()).args(command.get_args());
    limited.stdin(Stdio::null()).output().unwrap()
}

/// Bytes that are known again, and nowhere zero for long.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

/// Writes to a device and flushes.
pub fn write_at(node: &Path, at: u64, data: &[u8]) {
    let file = OpenOptions::new().write(true).open(node).unwrap();
    file.write_all_at(data, at).unwrap();
    file.sync_all().unwrap();
}

/// Reads from a device, past the page cache of earlier openers.
pub fn read_at(node: &Path, at: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    File::open(node).unwrap().read_exact_at(&mut data, at).unwrap();
    data
}

/// Kills a process of ours, by number and start time, and waits for its end.
pub fn kill(id: ploop::server::proto::ProcessId) {
    assert!(runtime::alive(id), "process {id:?} is not there");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(id.pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    within(10, "the end of a killed process", || (!runtime::alive(id)).then_some(()));
}

/// Processes that a supervisor has started, by what they do (`worker`, `helper`), and that have not exited.
pub fn children(supervisor: ploop::server::proto::ProcessId, mode: &str) -> Vec<ploop::server::proto::ProcessId> {
    let path = format!("/proc/{0}/task/{0}/children", supervisor.pid);
    let text = fs::read_to_string(path).unwrap_or_default();
    // Behind the mode stands the name of the device.
    let does = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|b| *b == 0).nth(1) == Some(mode.as_bytes())
    };
    let pids = text.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(does);
    pids.filter_map(runtime::process).filter(|id| runtime::alive(*id)).collect()
}

/// The worker that a supervisor started last, this one aside.
pub fn next_worker(
    supervisor: ploop::server::proto::ProcessId,
    but: ploop::server::proto::ProcessId,
) -> Option<ploop::server::proto::ProcessId> {
    children(supervisor, "worker").into_iter().find(|id| id.pid != but.pid)
}

/// The record as it stands now.
pub fn record(name: &str) -> ploop::server::proto::DeviceRecord {
    let dir = runtime::device_dir(name);
    within(5, "a whole record", || fs::exists(&dir).ok().and_then(|_| runtime::read_record(&dir).ok().flatten()))
}

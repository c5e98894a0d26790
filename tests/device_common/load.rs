//! Writers that verify, and chains that change under them.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ploop::device::{self, AttachSpec, Device, Level, NewLevel};
use ploop::image::check::read_header;
use ploop::image::create::create_delta;
use ploop::server::proto::{Command, Marked, ProcessId};
use ploop::server::{control, runtime};

use super::*;

pub const LANES: u64 = 3;
pub const SLOTS: u64 = 16;
pub const BLOCK: u64 = 64 << 10;

/// Rewrites blocks and reads them back until told to stop; answers the number of the last write to each slot.
pub fn writer(
    node: &Path,
    lane: u64,
    stop: &Arc<AtomicBool>,
) -> std::thread::JoinHandle<std::io::Result<Vec<Option<u64>>>> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(node).unwrap();
    let stop = stop.clone();
    std::thread::spawn(move || {
        let mut last = vec![None; SLOTS as usize];
        let mut n = 0;
        let mut buf = ploop::sys::aligned::AlignedBuf::new(BLOCK as usize);
        while !stop.load(Ordering::Relaxed) {
            let slot = n * 7 % SLOTS;
            let at = (lane * SLOTS + slot) * BLOCK;
            let data = pattern(lane << 32 | n, BLOCK as usize);
            buf.copy_from_slice(&data);
            file.write_all_at(&buf, at)?;
            if n % 11 == 0 {
                file.sync_data()?;
            }
            buf.fill(0);
            file.read_exact_at(&mut buf, at)?;
            assert_eq!(&buf[..], &data[..], "lane {lane} write {n}");
            last[slot as usize] = Some(n);
            n += 1;
        }
        file.sync_all()?;
        Ok(last)
    })
}

/// The last writes of the writers are on the device.
pub fn check_lanes(node: &Path, lanes: &[Vec<Option<u64>>]) {
    for (lane, last) in lanes.iter().enumerate() {
        for (slot, n) in last.iter().enumerate() {
            let lane = lane as u64;
            if let Some(n) = n {
                let got = read_at(node, (lane * SLOTS + slot as u64) * BLOCK, BLOCK as usize);
                assert_eq!(got, pattern(lane << 32 | n, BLOCK as usize), "lane {lane} slot {slot} write {n}");
            }
        }
    }
}

pub struct Load {
    stop: Arc<AtomicBool>,
    lanes: Vec<std::thread::JoinHandle<std::io::Result<Vec<Option<u64>>>>>,
}

impl Load {
    pub fn start(node: &Path) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let lanes = (0..LANES).map(|lane| writer(node, lane, &stop)).collect();
        Load { stop, lanes }
    }

    pub fn end(self) -> Vec<Vec<Option<u64>>> {
        self.stop.store(true, Ordering::Relaxed);
        self.lanes.into_iter().map(|l| l.join().unwrap().unwrap()).collect()
    }
}

pub fn path_fd(path: &Path) -> OwnedFd {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path).unwrap().into()
}

pub fn new_delta(t: &Bench, like: &Path, name: &str) -> PathBuf {
    let header = read_header(like, None).unwrap();
    let path = t.dir.path().join(name);
    create_delta(&path, header.version, header.cluster, header.sectors).unwrap();
    path
}

pub fn with_new_top(device: &Device, path: &Path) -> Vec<NewLevel> {
    let mut levels: Vec<NewLevel> = (0..device.images.len()).map(NewLevel::Kept).collect();
    levels.push(NewLevel::File { path: path.into(), raw: false, fd: path_fd(path) });
    levels
}

pub fn now(device: &Device) -> Device {
    device::by_node(device.name()).unwrap().unwrap()
}

/// Who must be alive is.
pub fn settled(name: &str) -> ploop::server::proto::DeviceRecord {
    within(30, "supervisor and worker", || {
        let r = record(name);
        let fine = runtime::alive(r.supervisor) && runtime::alive(r.worker) && r.state == "running";
        (fine && control::ask(&runtime::device_dir(name), &Command::Info, Duration::from_secs(5)).is_ok()).then_some(r)
    })
}

pub fn attach_chain(t: &Bench, files: &[PathBuf], marked: Marked) -> Device {
    let first = t.spec(&files[0]);
    let levels = files.iter().map(|f| Level { path: f.clone(), raw: false, fd: path_fd(f) }).collect();
    device::attach(AttachSpec { levels, marked, ..first }).unwrap()
}

pub fn now_or(device: &Device) -> Device {
    device::by_node(device.name()).unwrap().unwrap_or_else(|| device.clone())
}

/// Sends SIGKILL to exactly this process if it runs, and does not wait for its exit: tests kill two in a row.
pub fn kill_process(id: ProcessId) {
    if runtime::alive(id) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(id.pid), nix::sys::signal::Signal::SIGKILL);
    }
}

//! Unmounting every disk of the machine, as before it is switched off, within a time limit. A disk with images of
//! another disk in its file system waits for that disk; disks that do not depend on each other are unmounted at the
//! same time.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::deleted::Deleted;
use super::find;
use super::umount::Umount;
use crate::device::{self, Device, State};
use crate::error::{Error, Kind, Result};
use crate::fs::mount;
use crate::fs::mounts::{self, Mount, Names};
use crate::report;

/// Disks that are unmounted at the same time.
const AT_ONCE: usize = 16;
/// Pause before a disk that was busy is tried again.
const PAUSE: Duration = Duration::from_secs(1);
/// The same where each try copies deleted images.
const PAUSE_WITH_COPIES: Duration = Duration::from_secs(20);

/// The result for one disk.
#[derive(Debug)]
pub struct Outcome {
    /// Without `/dev/`.
    pub name: String,
    pub base: PathBuf,
    /// None: detached, its image closed cleanly.
    pub error: Option<Error>,
    /// The device is gone; with an error its image is marked in use.
    pub gone: bool,
}

/// Unmounts all disks, whichever user mounted them, and waits for the processes that use them no longer than `limit`.
/// Other file systems that are mounted inside theirs are unmounted too. Returns one outcome for each disk, in the order
/// in which they ended.
///
/// What has begun when the limit is over goes on: a server closes its image also if the caller has exited.
pub fn umount_all(limit: Duration, how: Umount) -> Result<Vec<Outcome>> {
    let end = Instant::now() + limit;
    let (tell, hear) = channel();
    let mut work = Work { how, end, tell, hear, running: HashMap::new(), tried: HashMap::new(), outcomes: Vec::new() };
    loop {
        let devices: Vec<Device> = device::list()?.into_iter().filter(|d| !work.is_settled(d.name())).collect();
        if devices.is_empty() && work.running.is_empty() {
            return Ok(work.outcomes);
        }
        if Instant::now() >= end {
            work.give_up(&devices);
            return Ok(work.outcomes);
        }
        let table = mounts::read()?;
        let places: Vec<Place> = devices.iter().map(|d| Place::of(d, &table)).collect();
        for (i, device) in devices.iter().enumerate() {
            let above = places.iter().enumerate().any(|(j, other)| i != j && other.lies_on(&places[i]));
            if !above && work.may_begin(device.name()) {
                work.begin(device, &places);
            }
        }
        work.wait();
    }
}

struct Work {
    how: Umount,
    end: Instant,
    tell: Sender<(String, Result<()>)>,
    hear: Receiver<(String, Result<()>)>,
    /// Name -> base.
    running: HashMap<String, PathBuf>,
    /// When a busy disk was tried last, and the error of that try.
    tried: HashMap<String, (Instant, Error)>,
    outcomes: Vec<Outcome>,
}

impl Work {
    fn is_settled(&self, name: &str) -> bool {
        self.running.contains_key(name) || self.outcomes.iter().any(|o| o.name == name)
    }

    fn may_begin(&self, name: &str) -> bool {
        // Each try with deleted images copies them.
        let pause = if self.how.deleted == Deleted::Save { PAUSE_WITH_COPIES } else { PAUSE };
        self.running.len() < AT_ONCE && self.tried.get(name).is_none_or(|(when, _)| when.elapsed() >= pause)
    }

    fn begin(&mut self, device: &Device, places: &[Place]) {
        let (name, base) = (device.name().to_owned(), device.base().to_owned());
        self.running.insert(name.clone(), base);
        let all: Vec<Names> = places.iter().map(|p| p.names.clone()).collect();
        let (how, tell, device) = (self.how, self.tell.clone(), device.clone());
        let (of, teller) = (name.clone(), tell.clone());
        let started = thread::Builder::new().spawn(move || {
            let ended = one(how, &device, &all);
            // After the limit the receiver is gone.
            let _ = teller.send((of, ended));
        });
        if let Err(e) = started {
            let _ = tell.send((name, Err(Error::with(Kind::Sys, "cannot start a thread", e))));
        }
    }

    /// Waits until an unmount has ended, or for at most `PAUSE`.
    fn wait(&mut self) {
        let left = self.end.saturating_duration_since(Instant::now());
        let (name, ended) = match self.hear.recv_timeout(left.min(PAUSE)) {
            Ok(heard) => heard,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return,
        };
        let base = self.running.remove(&name).unwrap_or_default();
        match ended {
            Ok(()) => self.outcomes.push(Outcome { name, base, error: None, gone: true }),
            Err(e) => match device::by_node(&name) {
                // The device is gone: its last flush failed, or it could not be closed cleanly.
                Ok(None) => self.outcomes.push(Outcome { name, base, error: Some(e), gone: true }),
                _ => drop(self.tried.insert(name, (Instant::now(), e))),
            },
        }
    }

    fn give_up(&mut self, devices: &[Device]) {
        for device in devices {
            let name = device.name().to_owned();
            let error = self.tried.remove(&name).map(|(_, e)| e).unwrap_or_else(|| {
                Error::new(Kind::Busy, format!("{name} was not reached: a disk that lies on it is still there"))
            });
            self.outcomes.push(Outcome { name, base: device.base().to_owned(), error: Some(error), gone: false });
        }
        for (name, base) in self.running.drain() {
            // For a disk that is tried once more, the error of the last try says more.
            let error = self.tried.remove(&name).map(|(_, e)| e).unwrap_or_else(|| {
                Error::new(Kind::Busy, format!("{name} is not done within the time limit; what has begun goes on"))
            });
            self.outcomes.push(Outcome { name, base, error: Some(error), gone: false });
        }
    }
}

/// Where a disk's files and mounts are.
struct Place {
    names: Names,
    targets: Vec<PathBuf>,
    /// Device numbers of the file systems with its images.
    hosts: Vec<u64>,
}

impl Place {
    fn of(device: &Device, table: &[Mount]) -> Place {
        let names = find::names(device);
        let targets = table.iter().filter(|m| names.mounted_by(m)).map(|m| m.target.clone()).collect();
        Place { names, targets, hosts: device.images.iter().map(|i| i.id.dev).collect() }
    }

    /// An image of this disk, or a mount of it, is in the other's file system.
    fn lies_on(&self, other: &Place) -> bool {
        let image = self.hosts.iter().any(|host| other.names.devs.contains(host));
        image || self.targets.iter().any(|t| other.targets.iter().any(|o| t != o && t.starts_with(o)))
    }
}

fn one(how: Umount, device: &Device, all: &[Names]) -> Result<()> {
    let names = find::names(device);
    if mounts::read()?.iter().any(|m| names.mounted_by(m) && m.target == Path::new("/")) {
        crate::bail!(Umount, "the root file system is mounted from {}, which stays", device.node().display());
    }
    if device.state == State::Starting {
        crate::bail!(Busy, "{} is being attached", device.node().display());
    }
    clear(&names, all)?;
    how.node(device.name(), None)
}

/// Unmounts other file systems that are mounted in the file systems of a disk, or over them. Other ploop disks are
/// unmounted by themselves.
fn clear(names: &Names, all: &[Names]) -> Result<()> {
    let mut before = usize::MAX;
    loop {
        let table = mounts::read()?;
        let is_disk = |m: &Mount| all.iter().any(|n| n.mounted_by(m));
        let below = |at: usize, m: &Mount| {
            let under = |(i, o): (usize, &Mount)| i < at && names.mounted_by(o) && m.target.starts_with(&o.target);
            !is_disk(m) && table.iter().enumerate().any(under)
        };
        let inside: Vec<&Mount> = table.iter().enumerate().filter(|(i, m)| below(*i, m)).map(|(_, m)| m).collect();
        let Some(last) = inside.last() else { return Ok(()) };
        if inside.len() >= before {
            crate::bail!(Umount, "{} stays mounted", last.target.display());
        }
        before = inside.len();
        report::say(1, format_args!("{} ({}) is unmounted first", last.target.display(), last.fstype));
        mount::umount(&last.target)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(dev: u64, host: u64, target: &str) -> Place {
        let names = Names { devs: vec![dev], ..Names::default() };
        Place { names, targets: vec![target.into()], hosts: vec![host] }
    }

    #[test]
    fn what_lies_on_another_disk_goes_first() {
        let host = place(1, 100, "/vz/a");
        let image_inside = place(2, 1, "/srv");
        let mounted_inside = place(3, 100, "/vz/a/b");
        let beside = place(4, 100, "/vz/ab");
        assert!(image_inside.lies_on(&host) && mounted_inside.lies_on(&host));
        assert!(!beside.lies_on(&host) && !host.lies_on(&beside) && !host.lies_on(&image_inside));
        assert!(!host.lies_on(&host), "the same mount point is the same place");
    }
}

//! What is wrong with devices, and what is left of those that have no record.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::finding::{Finding, Grade, bad, good, word};
use super::remount::remount;
use crate::device::{self, Device, Leak, State};
use crate::error::Result;
use crate::fs::holders;
use crate::fs::mounts;
use crate::ops::deleted;
use crate::sys::host;

/// A device that is being made or ended is no leak: what is left after this time is one.
const SETTLED: Duration = Duration::from_secs(1);

/// Devices, each with what its state asks for, and what is left of others.
pub fn devices() -> Vec<Finding> {
    let devices = match device::list() {
        Ok(devices) => devices,
        Err(e) => return vec![bad(Grade::Warning, "devices", e.to_string(), "run it as root")],
    };
    let stopped = match device::stopped() {
        Ok(devices) => devices.iter().map(stopped).collect(),
        Err(e) => vec![bad(Grade::Warning, "stopped devices", e.to_string(), "look at the file that is named")],
    };
    let unflushed = device::all_unflushed();
    devices.iter().map(one).chain(stopped).chain(unflushed.iter().map(self::unflushed)).chain(leaks()).collect()
}

/// A device that `ploop stop` has stopped.
fn stopped(d: &Device) -> Finding {
    let subject = d.node().display().to_string();
    match device::changed(d) {
        Ok(()) => good(
            &subject,
            format!(
                "stopped, of {}: ploop start -d {subject} attaches it again, ploop clear -d {subject} forgets it",
                d.top().display()
            ),
        ),
        Err(e) => bad(
            Grade::Warning,
            &subject,
            format!("stopped, and cannot be started: {e}"),
            format!("ploop clear -d {subject}"),
        ),
    }
}

/// One device, by its node or name. `Device`: there is none.
pub(super) fn device(node: &str) -> Result<Device> {
    match device::by_node(node)? {
        Some(device) => Ok(device),
        None => crate::bail!(Device, "{node} is no ploop device; ploop doctor without it shows all that is there"),
    }
}

/// What is left of devices that no record names.
fn leaks() -> Vec<Finding> {
    let first = device::leaks();
    if first.is_empty() {
        return Vec::new();
    }
    host::sleep(SETTLED);
    let now = device::leaks();
    now.iter().filter(|leak| first.contains(leak)).map(leaked).collect()
}

fn leaked(leak: &Leak) -> Finding {
    match leak {
        Leak::Server { pid } => bad(
            Grade::Warning,
            "leaked server",
            format!("process {pid} of ploop-server holds /dev/fuse, but serves no device that is known"),
            "end it; what it had answered stays in the image",
        )
        .cured_by(format!("kill -9 {pid}")),
        Leak::BlockDevice { node, of } => {
            let points = mounts_of(node);
            let umounts: String = points.iter().rev().map(|p| format!("umount {}; ", word(p))).collect();
            let mounted = points.first().map(|p| format!(", and mounted at {}", p.display())).unwrap_or_default();
            bad(
                Grade::Warning,
                "leaked device",
                format!("{} is bound to the disk of {}, which no server serves{mounted}", node.display(), of.display()),
                "unbind it",
            )
            .cured_by(format!("{umounts}losetup -d {}", word(node)))
        }
        Leak::Node { path } => {
            bad(Grade::Warning, "stale node", format!("{} leads to no ploop device", path.display()), "remove it")
                .cured_by(format!("rm {}", word(path)))
        }
    }
}

/// Where a block device, or a partition of it, is mounted.
fn mounts_of(node: &Path) -> Vec<PathBuf> {
    let Some(name) = node.file_name().and_then(|n| n.to_str()) else { return Vec::new() };
    let number = |path: PathBuf| {
        let text = std::fs::read_to_string(path.join("dev")).ok()?;
        let (major, minor) = text.trim().split_once(':')?;
        Some(nix::sys::stat::makedev(major.parse().ok()?, minor.parse().ok()?))
    };
    let disk = Path::new("/sys/block").join(name);
    let parts = std::fs::read_dir(&disk).into_iter().flatten().flatten().map(|e| e.path());
    let devs: Vec<u64> =
        parts.filter(|p| p.join("partition").exists()).chain([disk.clone()]).filter_map(number).collect();
    let all = mounts::read().unwrap_or_default();
    all.into_iter().filter(|m| devs.contains(&m.dev)).map(|m| m.target).collect()
}

/// Changes that wait for the next mount.
fn unflushed((folder, images): &(PathBuf, Vec<PathBuf>)) -> Finding {
    let image = images.last().map_or("an image".into(), |i| i.display().to_string());
    let found = bad(
        Grade::Warning,
        &folder.display().to_string(),
        format!("the last changes of {image}, whose server was killed, wait for the next mount"),
        format!(
            "mount it for writing before the host is rebooted; if the image is gone for good: rm -r {}",
            folder.display()
        ),
    );
    let Some(base) = images.first() else { return found };
    let beside = base.with_file_name(crate::descriptor::FILE_NAME);
    let names_it = crate::descriptor::Descriptor::read(&beside)
        .is_ok_and(|d| images.last().is_some_and(|top| d.image(&d.top).is_some_and(|i| i.file == *top)));
    match names_it {
        true => found.cured_by(format!("ploop mount {0} && ploop umount {0}", word(&beside))),
        false => {
            let chain: Vec<String> = images.iter().map(|i| word(i)).collect();
            found.cured_by(format!("ploop mount {} && ploop umount {}", chain.join(" "), word(base)))
        }
    }
}

/// What a device's state asks for.
pub(super) fn one(d: &Device) -> Finding {
    let subject = d.node().display().to_string();
    let of = match d.images.is_empty() {
        true => "no record of its image".to_string(),
        false => format!("{} of {}", d.state.as_str(), d.top().display()),
    };
    if matches!(d.state, State::Running | State::Starting) {
        return running(d, &subject, of);
    }
    let grade = if d.state == State::Failed { Grade::Missing } else { Grade::Warning };
    let found = bad(grade, &subject, of, remedy(d, &subject));
    found.cured_if(cure(d, &subject))
}

fn running(d: &Device, subject: &str, of: String) -> Finding {
    if !device::is_supervised(d) && d.state != State::Starting {
        // A device works without a supervisor, but no process would start a new worker.
        return bad(
            Grade::Warning,
            subject,
            format!("{of}, without a supervisor"),
            "wait some seconds: the worker starts one",
        );
    }
    if holders::ends_with_its_last_user(&d.disk) {
        return bad(
            Grade::Warning,
            subject,
            format!("{of}, but `losetup -d` or `losetup -D` was called: it ends when its last user closes it"),
            format!(
                "nothing is lost, its image is closed cleanly then; ploop umount -d {subject}, then mount it again"
            ),
        )
        .cured_if(remount(d));
    }
    match deleted::trouble(d) {
        Some((what, remedy)) => {
            let found = bad(Grade::Warning, subject, format!("{of}, but {what}"), remedy);
            match (deleted::of(d).is_empty(), deleted::moved(d).first()) {
                (false, _) => found.cured_by(format!("ploop umount --save-deleted -d {}", word(d.node()))),
                (true, Some((old, new))) => found.cured_by(format!("mv -n {} {}", word(new), word(old))),
                _ => found,
            }
        }
        None => good(subject, format!("{of}{}", served_by(d))),
    }
}

/// The processes that serve a device.
fn served_by(d: &Device) -> String {
    let all: Vec<String> = device::processes(d).iter().map(|p| format!("{} {}", p.role, p.pid)).collect();
    if all.is_empty() { String::new() } else { format!(" ({})", all.join(", ")) }
}

fn cure(d: &Device, subject: &str) -> Option<String> {
    match &d.state {
        State::Stalled => {
            let still = device::processes(d).into_iter().filter(|p| p.stands_still).map(|p| p.pid.to_string());
            let still: Vec<String> = still.collect();
            (!still.is_empty()).then(|| format!("kill -CONT {}", still.join(" ")))
        }
        State::Dead if d.images.is_empty() => Some(format!("ploop umount -d {subject}")),
        State::Dead => remount(d),
        // A reload of one that failed lets waiting writes go on: the image has to be looked at first.
        _ => None,
    }
}

fn remedy(d: &Device, subject: &str) -> String {
    match &d.state {
        State::NoSpace => format!(
            "writes wait for space: free some on the file system of {}, or raise its quota; they go on by themselves",
            d.top().display()
        ),
        State::Stalled => "a process that serves it does not answer (stopped or stuck), and its I/O waits: look for state T or D in `ps ax | grep ploop-server`; `kill -CONT PID` lets a stopped one go on, `kill -9 PID` has it replaced, and nothing is lost by either. A worker that stands still for a minute is replaced by itself".into(),
        State::Failed => format!(
            "writes cannot be made durable, or no worker can serve it: read the kernel's and the system's log. If its I/O waits and the image is right again: ploop reload {subject}. Else save what can still be read, then ploop umount -d {subject}, or ploop umount --abort {subject} if that hangs"
        ),
        State::Stopped => format!("the image is being closed; if that lasts, ploop umount -d {subject}"),
        State::Dead => format!(
            "its processes were killed: unmount what is left (umount MOUNTPOINT), then ploop umount -d {subject}, and mount it again before the host is rebooted: then what was answered is there (where the image lies on a network file system: what was flushed)"
        ),
        _ => "this version does not know that state, a newer one serves it: use the ploop that is installed with its server".into(),
    }
}

//! What this machine offers, what is missing and how to get it, and what is wrong with devices.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::deleted;
use crate::device::{self, Device, State};
use crate::fs::{helper, holders};

/// Result of one check.
#[derive(Clone, Debug)]
pub struct Finding {
    pub subject: String,
    pub grade: Grade,
    /// What was seen.
    pub text: String,
    /// What to do, if it is not in order.
    pub remedy: Option<String>,
}

/// How bad it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub enum Grade {
    Good,
    /// Works, but not as well as it could, or needs a look.
    Warning,
    /// Something cannot work.
    Missing,
}

fn good(subject: &str, text: impl Into<String>) -> Finding {
    Finding { subject: subject.into(), grade: Grade::Good, text: text.into(), remedy: None }
}

fn bad(grade: Grade, subject: &str, text: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { subject: subject.into(), grade, text: text.into(), remedy: Some(remedy.into()) }
}

/// What making and mounting disks needs.
pub fn machine() -> Vec<Finding> {
    let mut all = vec![kernel(), rights()];
    all.push(node("FUSE", "/dev/fuse", "fuse", "c 10 229"));
    all.push(node("loop devices", "/dev/loop-control", "loop", "c 10 237"));
    all.extend(server());
    all.push(driver());
    all.push(takeover());
    all.push(program("mke2fs", "making file systems", "e2fsprogs", Grade::Missing));
    all.push(program("fsck.ext4", "checking file systems (mount -F)", "e2fsprogs", Grade::Warning));
    all.extend(request_timeouts());
    all
}

fn kernel() -> Finding {
    match nix::sys::utsname::uname() {
        Ok(u) => good("kernel", format!("Linux {}", u.release().to_string_lossy())),
        Err(e) => bad(Grade::Warning, "kernel", format!("uname: {e}"), "look at the kernel's log"),
    }
}

/// How requests of a killed server are executed. The kernel says what it can do at the first mount; until then its
/// version decides.
fn takeover() -> Finding {
    let wanted = match device::slots_wanted() {
        Ok(wanted) => wanted,
        Err(e) => return bad(Grade::Warning, "takeover", e.to_string(), "unset PLOOP_TAKEOVER"),
    };
    let release = nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
    good(
        "takeover",
        match (wanted, resends(&release)) {
            (true, _) => "requests of a killed server are kept in slots, as $PLOOP_TAKEOVER asks",
            (false, true) => "the kernel sends the requests of a killed server again",
            (false, false) => "requests of a killed server are kept in slots (Linux 6.9 and later send them again)",
        },
    )
}

/// Whether a kernel of this release sends requests again. Distributions can have removed or backported that.
fn resends(release: &str) -> bool {
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    (parts.next(), parts.next()) >= (Some(6), Some(9))
}

const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;

/// In the effective set.
fn has(capability: u32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bits = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    bits.and_then(|b| u64::from_str_radix(b.trim(), 16).ok()).is_some_and(|b| b >> capability & 1 == 1)
}

fn rights() -> Finding {
    if !nix::unistd::geteuid().is_root() {
        let text =
            format!("user {} is not root; disks can be made and checked, but not mounted", nix::unistd::geteuid());
        return bad(Grade::Missing, "rights", text, "run it as root (sudo ploop ...)");
    }
    if !has(CAP_SYS_ADMIN) {
        return bad(
            Grade::Missing,
            "rights",
            "root, but without CAP_SYS_ADMIN (in a container?)",
            "run it on the host, or give the container that right and the devices /dev/fuse and /dev/loop*",
        );
    }
    if !has(CAP_SYS_RESOURCE) {
        return bad(
            Grade::Warning,
            "rights",
            "root, but without CAP_SYS_RESOURCE: short of memory, the kernel may let a disk's server wait for that disk",
            "mount disks where root has that right",
        );
    }
    good("rights", "root")
}

fn node(subject: &str, path: &str, module: &str, numbers: &str) -> Finding {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK).open(path);
    match opened {
        Ok(_) => good(subject, path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => bad(
            Grade::Missing,
            subject,
            format!("{path} is not there"),
            format!("modprobe {module}; if that succeeds and the node is still missing: mknod {path} {numbers}"),
        ),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            bad(Grade::Missing, subject, format!("{path}: {e}"), "run it as root, on the host")
        }
        Err(e) => bad(
            Grade::Missing,
            subject,
            format!("{path}: {e}"),
            format!("modprobe {module}; a kernel without that module has to be replaced by one that has it"),
        ),
    }
}

/// The driver that new devices get.
fn driver() -> Finding {
    let driver = match device::driver() {
        Ok(driver) => driver,
        Err(e) => return bad(Grade::Missing, "driver", e.to_string(), "unset PLOOP_DRIVER"),
    };
    let shown = format!("{} ({})", driver.name(), driver.summary());
    match driver.probe() {
        Ok(_) => good("driver", shown),
        Err(e) => bad(Grade::Missing, "driver", format!("{shown}: {e}"), "see the other lines for what it needs"),
    }
}

/// The program whose processes serve devices, if the driver has one.
fn server() -> Option<Finding> {
    Some(match device::driver().ok()?.program()? {
        Ok(path) => good("ploop-server", path.display().to_string()),
        Err(e) => bad(
            Grade::Missing,
            "ploop-server",
            e.to_string(),
            "build or install the whole package (cargo build builds it), or name the program in $PLOOP_SERVER",
        ),
    })
}

fn program(name: &str, what: &str, package: &str, grade: Grade) -> Finding {
    match helper::find(name) {
        Some(path) => good(name, path.display().to_string()),
        None => bad(
            grade,
            name,
            format!("not found; {what} needs it"),
            format!("apt-get install {package} (or the package of that name of your distribution)"),
        ),
    }
}

/// With such a limit the kernel ends a FUSE connection whose server does not answer in time, and the disk fails.
fn request_timeouts() -> Option<Finding> {
    let name = ["default_request_timeout", "max_request_timeout"].into_iter().find(|name| {
        let value = fs::read_to_string(Path::new("/proc/sys/fs/fuse").join(name)).unwrap_or_default();
        value.trim().parse::<u64>().is_ok_and(|v| v != 0)
    })?;
    Some(bad(
        Grade::Warning,
        "FUSE limits",
        format!("fs.fuse.{name} is set: a disk whose server is away for longer is lost to its users"),
        format!("sysctl fs.fuse.{name}=0"),
    ))
}

/// Devices, each with what its state asks for.
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
    devices.iter().map(one).chain(stopped).chain(unflushed.iter().map(unflushed_changes)).collect()
}

/// Changes that wait for the next mount.
fn unflushed_changes((folder, images): &(PathBuf, Vec<PathBuf>)) -> Finding {
    let image = images.last().map_or("an image".into(), |i| i.display().to_string());
    bad(
        Grade::Warning,
        &folder.display().to_string(),
        format!("the last changes of {image}, whose server was killed, wait for the next mount"),
        format!(
            "mount it for writing before the host is rebooted; if the image is gone for good: rm -r {}",
            folder.display()
        ),
    )
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

fn one(d: &Device) -> Finding {
    let subject = d.node().display().to_string();
    let of = match d.images.is_empty() {
        true => "no record of its image".to_string(),
        false => format!("{} of {}", d.state.as_str(), d.top().display()),
    };
    let remedy = match &d.state {
        State::Running | State::Starting => {
            // A device works without a supervisor, but no process would start a new worker.
            return match device::is_supervised(d) || d.state == State::Starting {
                true if holders::ends_with_its_last_user(&d.disk) => bad(
                    Grade::Warning,
                    &subject,
                    format!("{of}, but `losetup -d` or `losetup -D` was called: it ends when its last user closes it"),
                    format!(
                        "nothing is lost, its image is closed cleanly then; ploop umount -d {subject}, then mount it again"
                    ),
                ),
                true => match deleted::trouble(d) {
                    Some((what, remedy)) => bad(Grade::Warning, &subject, format!("{of}, but {what}"), remedy),
                    None => good(&subject, of),
                },
                false => bad(
                    Grade::Warning,
                    &subject,
                    format!("{of}, without a supervisor"),
                    "wait some seconds: the worker starts one",
                ),
            };
        }
        State::NoSpace => format!(
            "writes wait for space: free some on the file system of {}, or raise its quota; they go on by themselves",
            d.top().display()
        ),
        State::Stalled => "a process that serves it does not answer (stopped or stuck), and its I/O waits: look for state T or D in `ps ax | grep ploop-server`; `kill -CONT PID` lets a stopped one go on, `kill -9 PID` has it replaced, and nothing is lost by either. A worker that stands still for a minute is replaced by itself".into(),
        State::Unknown(_) => "this version does not know that state, a newer one serves it: use the ploop that is installed with its server".into(),
        State::Failed => format!(
            "writes cannot be made durable, or no worker can serve it: read the kernel's and the system's log. If its I/O waits and the image is right again: ploop reload {subject}. Else save what can still be read, then ploop umount -d {subject}, or ploop umount --abort {subject} if that hangs"
        ),
        State::Stopped => format!("the image is being closed; if that lasts, ploop umount -d {subject}"),
        State::Dead => format!(
            "its processes were killed: unmount what is left (umount MOUNTPOINT), then ploop umount -d {subject}, and mount it again before the host is rebooted: then what was answered is there (where the image lies on a network file system: what was flushed)"
        ),
    };
    let grade = if d.state == State::Failed { Grade::Missing } else { Grade::Warning };
    bad(grade, &subject, of, remedy)
}

#[cfg(test)]
mod tests {
    #[test]
    fn kernels_that_send_requests_again() {
        for (release, can) in [
            ("6.18.44-fc", true),
            ("6.9.0-rc1", true),
            ("7.0", true),
            ("6.8.0-31-generic", false),
            ("5.14.0-427.el9", false),
        ] {
            assert_eq!(super::resends(release), can, "{release}");
        }
        assert!(!super::resends(""));
    }
}

//! What this machine offers, what is missing and how to get it, and what is wrong with devices and disks.

mod device;
mod disk;
mod finding;
mod leftovers;
mod remount;

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::device as devices_of_drivers;
use crate::fs::helper;

pub use device::devices;
pub use disk::disk;
pub use finding::{Finding, Grade};

use finding::{bad, good};

/// What is wrong with the disks that devices run, without what is wrong with the devices.
pub fn disks_of_devices() -> Vec<Finding> {
    let devices = devices_of_drivers::list().unwrap_or_default();
    let mut disks: Vec<_> = devices.iter().filter_map(|d| d.descriptor.clone()).collect();
    disks.sort();
    disks.dedup();
    let nodes: Vec<String> = devices.iter().map(|d| d.node().display().to_string()).collect();
    let wrong = |f: &Finding| f.grade != Grade::Good && !nodes.contains(&f.subject);
    disks.iter().flat_map(|path| disk(path)).filter(wrong).collect()
}

/// One page on a device, and on the disk that it runs.
pub fn device_and_disk(node: &str) -> crate::error::Result<Vec<Finding>> {
    let found = device::device(node)?;
    let mut page = found.descriptor.as_deref().map(disk).unwrap_or_default();
    if !page.iter().any(|f| f.subject == found.node().display().to_string()) {
        page.insert(0, device::one(&found));
    }
    Ok(page)
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
    let wanted = match devices_of_drivers::slots_wanted() {
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
    let driver = match devices_of_drivers::driver() {
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
    Some(match devices_of_drivers::driver().ok()?.program()? {
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

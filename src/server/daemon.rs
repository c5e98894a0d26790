//! Detaching from the caller: a server must outlive the process, session, container and limits it was started from.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};

use crate::error::{IoContext, Kind, Result};
use crate::server::runtime;
use crate::sys::{host, process};

/// Longest wait for systemd.
const SYSTEMD_LIMIT: Duration = Duration::from_secs(10);

/// Our units' names begin so.
const UNIT: &str = "ploop-server-";

/// Descriptors that a server may need: 127 deltas, twice, clients and what it always has.
const FILES: u64 = 4096;

/// Leaves session, folder, namespaces, control group and limits of the process that started this one. For the first
/// lines of a single-threaded program.
pub fn detach_from_caller() -> Result<()> {
    if host::is_simulated() {
        return Ok(());
    }
    // Fails only for the leader of a group, which a process just spawned is not.
    let _ = nix::unistd::setsid();
    process::reset_signals();
    umask(Mode::from_bits_truncate(0o022));
    enter_host()?;
    leave_cgroup();
    // A disk that a backup mounts with low priority may be a container's later on.
    process::reset_scheduling();
    for (resource, value) in [
        (Resource::RLIMIT_NOFILE, FILES),
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_FSIZE, libc::RLIM_INFINITY),
        (Resource::RLIMIT_MEMLOCK, libc::RLIM_INFINITY),
        (Resource::RLIMIT_AS, libc::RLIM_INFINITY),
        (Resource::RLIMIT_DATA, libc::RLIM_INFINITY),
        (Resource::RLIMIT_CPU, libc::RLIM_INFINITY),
        (Resource::RLIMIT_NPROC, libc::RLIM_INFINITY),
        (Resource::RLIMIT_SIGPENDING, 4096),
    ] {
        if setrlimit(resource, value, value).is_err() {
            // Without CAP_SYS_RESOURCE the hard limit is what there is.
            if let Ok((_, hard)) = getrlimit(resource) {
                let _ = setrlimit(resource, hard.min(value), hard);
            }
        }
    }
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    let _ = process::set_io_flusher();
    Ok(())
}

/// Into the mount namespace of process 1, and its /. For single-threaded programs.
pub fn enter_host() -> Result<()> {
    if host::is_simulated() {
        return Ok(());
    }
    match fs::metadata("/proc/1/ns/mnt") {
        Ok(_) => join_first("mnt", CloneFlags::CLONE_NEWNS)?,
        // Process 1 may not be looked at.
        Err(_) => join_kernel(),
    }
    // Events of block devices reach the first network namespace only; without them a slower way works too.
    let _ = join_first("net", CloneFlags::CLONE_NEWNET);
    nix::unistd::chdir("/").ctx(Kind::Sys, || "cannot change to /")
}

/// Keeps all memory of this process, present and future, out of reach of the swapper.
pub fn lock_memory() {
    if host::is_simulated() {
        return;
    }
    // Refused only without privileges; then the device works, but not under memory pressure that it causes itself.
    let _ = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE);
}

/// The kernel's own threads are in the first mount namespace, that of process 1 on a host (a container does not see them).
/// It is entered if /run and /dev are the same there, since the caller looks for the device in those. Else this process stays
/// where it is: then the device works, and keeps the caller's namespace.
fn join_kernel() {
    let kernel = fs::read_to_string("/proc/2/stat").is_ok_and(|stat| stat.starts_with("2 (kthreadd) S 0 "));
    let inode = |path: &str| fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    if !kernel || inode("/proc/2/ns/mnt") == inode("/proc/self/ns/mnt") {
        return;
    }
    let (Ok(own), Ok(first)) = (File::open("/proc/self/ns/mnt"), File::open("/proc/2/ns/mnt")) else { return };
    let seen = || ["/run", "/dev", runtime::RUN].map(inode);
    let before = seen();
    let root = File::open("/");
    if setns(first, CloneFlags::CLONE_NEWNS).is_ok() && seen() != before {
        let _ = setns(own, CloneFlags::CLONE_NEWNS);
        if let Ok(root) = root {
            // Of a process in a chroot the way back leads to the root of the namespace.
            let _ = nix::unistd::fchdir(&root).and_then(|()| nix::unistd::chroot("."));
        }
    }
}

fn join_first(kind: &str, flag: CloneFlags) -> Result<()> {
    if runtime::in_host_namespace(kind) {
        return Ok(());
    }
    let path = format!("/proc/1/ns/{kind}");
    let ns = File::open(&path).ctx(Kind::Sys, || format!("cannot open {path}"))?;
    setns(ns, flag).ctx(Kind::Sys, || format!("cannot enter the namespace {path}"))
}

/// Into a unit of systemd's, else into the root of every hierarchy. Best effort: a device in the caller's group works
/// until that group is killed or frozen.
fn leave_cgroup() {
    // A new supervisor is in the unit of its predecessor.
    if fs::read_to_string("/proc/self/cgroup").is_ok_and(|own| own.contains(UNIT)) {
        return;
    }
    let systemd = Path::new("/run/systemd/system").is_dir()
        && fs::read_to_string("/proc/1/comm").is_ok_and(|name| name.trim() == "systemd");
    if systemd && start_scope() {
        return;
    }
    let (Ok(own), Ok(mounts)) = (fs::read_to_string("/proc/self/cgroup"), fs::read_to_string("/proc/self/mountinfo"))
    else {
        return;
    };
    for root in hierarchies_to_leave(&own, &mounts) {
        // 0: the writer.
        let _ = fs::write(Path::new(&root).join("cgroup.procs"), "0");
    }
}

/// Mount points of the hierarchies in which `own` (/proc/self/cgroup) is not the root.
fn hierarchies_to_leave(own: &str, mountinfo: &str) -> Vec<String> {
    let mut mounts = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let left: Vec<&str> = left.split(' ').collect();
        let right: Vec<&str> = right.split(' ').collect();
        if let ([_, _, _, "/", point, ..], [kind @ ("cgroup" | "cgroup2"), _, options, ..]) = (&left[..], &right[..]) {
            mounts.push((*kind, (*point).to_string(), options.split(',').collect::<Vec<_>>()));
        }
    }
    let mut roots = Vec::new();
    for line in own.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        if path == "/" {
            continue;
        }
        let found = mounts.iter().find(|(kind, _, options)| match controllers {
            "" => *kind == "cgroup2",
            list => *kind == "cgroup" && list.split(',').all(|c| options.contains(&c)),
        });
        roots.extend(found.map(|(_, point, _)| point.clone()));
    }
    roots
}

/// Asks systemd for a scope of our own in system.slice.
fn start_scope() -> bool {
    let pid = std::process::id().to_string();
    let unit = format!("{UNIT}{pid}.scope");
    #[rustfmt::skip]
    let args = [
        "--system", "--quiet", "call", "org.freedesktop.systemd1", "/org/freedesktop/systemd1",
        "org.freedesktop.systemd1.Manager", "StartTransientUnit", "ssa(sv)a(sa(sv))", unit.as_str(), "fail",
        "5", "PIDs", "au", "1", pid.as_str(), "Slice", "s", "system.slice", "DefaultDependencies", "b", "false",
        "SendSIGKILL", "b", "false", "Description", "s", "ploop device server", "0",
    ];
    let child =
        Command::new("busctl").args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let Ok(mut child) = child else { return false };
    let end = Instant::now() + SYSTEMD_LIMIT;
    let accepted = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status.success(),
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                break false;
            }
        }
    };
    // The job is only queued by the call; we are moved a little later.
    while accepted && Instant::now() < end {
        if fs::read_to_string("/proc/self/cgroup").is_ok_and(|own| own.contains(&unit)) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies() {
        let mounts = "30 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      31 30 0:27 / /sys/fs/cgroup/memory rw,relatime shared:1 - cgroup cgroup rw,memory\n\
                      32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      33 30 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
                      34 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      35 30 0:27 /a /elsewhere rw - cgroup cgroup rw,memory\n";
        let own = "4:memory:/a/b\n3:cpu,cpuacct:/\n2:name=systemd:/user.slice\n0::/x:y\nnonsense\n";
        assert_eq!(
            hierarchies_to_leave(own, mounts),
            ["/sys/fs/cgroup/memory", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"]
        );
        assert!(hierarchies_to_leave("0::/x\n", "").is_empty());
    }
}

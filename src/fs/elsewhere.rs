//! Mounts of a device in the mount namespaces of other processes: containers, units with file systems of their own.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use super::mounts::{self, Mount, Names};
use crate::error::{Error, Kind, Result};
use crate::report;
use crate::sys::{host, processes};

/// How long a process that uses a mount there is waited for, and the time between two tries.
const MOMENT: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(100);

/// A mount namespace, by a process in it, with its mounts of a device.
struct Elsewhere {
    pid: String,
    process: PathBuf,
    mounts: Vec<Mount>,
}

/// Unmounts a device in all other mount namespaces in which it is left, as long as no process uses it there. `Umount`:
/// one does.
pub fn umount_all(names: &Names) -> Result<()> {
    if host::is_simulated() {
        return Ok(());
    }
    for there in find(names) {
        for mount in there.mounts.iter().rev() {
            let outcome = umount_within_a_moment(&there.process, &mount.target);
            let at = format!(
                "{} in the mount namespace of process {}",
                mount.target.display(),
                processes::shown(&there.pid)
            );
            match outcome {
                Ok(()) => report::say(0, format_args!("Unmounted {at}")),
                // It went by itself: the namespace ended, or the mount follows one of ours.
                Err(Errno::EINVAL | Errno::ENOENT | Errno::ESRCH) => {}
                Err(errno) => {
                    let node = names.nodes.first().map(|n| n.display().to_string()).unwrap_or_default();
                    let why = match errno {
                        Errno::EBUSY => format!("is in use{}", super::mount::users(&[mount.dev])),
                        _ => format!("cannot be unmounted ({})", errno.desc()),
                    };
                    let enter = format!("nsenter -t {} -m umount {}", there.pid, mount.target.display());
                    return Err(Error::new(
                        Kind::Umount,
                        format!(
                            "{node} is mounted at {at} too, where it {why}; end what uses it there, or unmount it: {enter}"
                        ),
                    ));
                }
            }
        }
    }
    Ok(())
}

/// Each namespace but our own once, if the device is mounted there.
fn find(names: &Names) -> Vec<Elsewhere> {
    let mut seen: BTreeSet<u64> = fs::metadata("/proc/self/ns/mnt").iter().map(MetadataExt::ino).collect();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().filter(|n| n.bytes().all(|b| b.is_ascii_digit())).map(String::from)
        else {
            continue;
        };
        let process = entry.path();
        // A process that ends meanwhile, or that may not be looked at.
        let Ok(ns) = fs::metadata(process.join("ns/mnt")) else { continue };
        if !seen.insert(ns.ino()) {
            continue;
        }
        let all = mounts::read_of(&process).unwrap_or_default();
        let mounts: Vec<Mount> = all.into_iter().filter(|m| names.mounted_by(m)).collect();
        if !mounts.is_empty() {
            found.push(Elsewhere { pid, process, mounts });
        }
    }
    found
}

/// A process that uses the mount may be about to end.
fn umount_within_a_moment(process: &Path, target: &Path) -> nix::Result<()> {
    let end = host::now() + MOMENT;
    loop {
        match umount(process, target) {
            Err(Errno::EBUSY) if host::now() < end && !report::cancel::requested() => host::sleep(LOOK),
            other => return other,
        }
    }
}

/// Unmounts `target` as the process of that folder in /proc sees it. In a thread of its own, which enters the namespace and
/// ends.
fn umount(process: &Path, target: &Path) -> nix::Result<()> {
    let errno = |e: std::io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(nix::libc::EIO));
    let namespace = File::open(process.join("ns/mnt")).map_err(errno)?;
    let root = File::open(process.join("root")).map_err(errno)?;
    let target = target.to_owned();
    let enter = move || {
        // From here on folder and root of this thread are its own.
        unshare(CloneFlags::CLONE_FS)?;
        setns(namespace, CloneFlags::CLONE_NEWNS)?;
        nix::unistd::fchdir(&root)?;
        nix::unistd::chroot(".")?;
        umount2(&target, MntFlags::UMOUNT_NOFOLLOW)
    };
    let entered = thread::Builder::new().spawn(enter).map_err(|_| Errno::EAGAIN)?;
    entered.join().unwrap_or(Err(Errno::EIO))
}

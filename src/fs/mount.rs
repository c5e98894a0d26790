//! Mounting and unmounting the inner file system.

use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::helper;
use super::mounts::{self, Mount, Names};
use super::probe::{self, Found};
use super::twins;
use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::report;
use crate::sys::{processes, statx};

/// How to mount.
#[derive(Clone, Debug, Default)]
pub struct MountSpec {
    /// None: what the superblock says, `ext4` if nothing is recognised.
    pub fstype: Option<String>,
    pub read_only: bool,
    pub noatime: bool,
    /// Journalled user and group quota.
    pub quota: bool,
    /// Options as after `mount -o`.
    pub options: Option<String>,
}

/// Options of `-o` that are flags for the kernel, not text for the file system: the flag, and whether it is set.
const WORDS: [(&str, MsFlags, bool); 25] = [
    ("ro", MsFlags::MS_RDONLY, true),
    ("rw", MsFlags::MS_RDONLY, false),
    ("noatime", MsFlags::MS_NOATIME, true),
    ("atime", MsFlags::MS_NOATIME, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, true),
    ("diratime", MsFlags::MS_NODIRATIME, false),
    ("relatime", MsFlags::MS_RELATIME, true),
    ("strictatime", MsFlags::MS_STRICTATIME, true),
    ("lazytime", MsFlags::MS_LAZYTIME, true),
    ("nosuid", MsFlags::MS_NOSUID, true),
    ("suid", MsFlags::MS_NOSUID, false),
    ("nodev", MsFlags::MS_NODEV, true),
    ("dev", MsFlags::MS_NODEV, false),
    ("noexec", MsFlags::MS_NOEXEC, true),
    ("exec", MsFlags::MS_NOEXEC, false),
    ("sync", MsFlags::MS_SYNCHRONOUS, true),
    ("async", MsFlags::MS_SYNCHRONOUS, false),
    ("dirsync", MsFlags::MS_DIRSYNC, true),
    ("mand", MsFlags::MS_MANDLOCK, true),
    ("nomand", MsFlags::MS_MANDLOCK, false),
    ("norelatime", MsFlags::MS_RELATIME, false),
    ("nostrictatime", MsFlags::MS_STRICTATIME, false),
    ("nolazytime", MsFlags::MS_LAZYTIME, false),
    ("silent", MsFlags::MS_SILENT, true),
    ("loud", MsFlags::MS_SILENT, false),
];

/// Options that mean something to mount(8) or to fstab only.
fn for_fstab_only(word: &str) -> bool {
    matches!(
        word,
        "" | "defaults" | "auto" | "noauto" | "user" | "nouser" | "users" | "owner" | "group" | "_netdev" | "nofail"
    ) || ["x-", "X-", "comment=", "helper=", "uhelper="].iter().any(|prefix| word.starts_with(prefix))
}

/// Options of OpenVZ's kernel that ask for nothing which a disk needs elsewhere; quota in files is known to ext alone, and
/// means nothing where nothing is written.
fn for_openvz_only(word: &str, fstype: &str, read_only: bool) -> bool {
    let name = word.split('=').next().unwrap_or_default();
    match name {
        "balloon_ino" | "pfcache" | "pfcache_csum" | "nopfcache_csum" => true,
        "usrjquota" | "grpjquota" | "jqfmt" => read_only || !fstype.starts_with("ext"),
        _ => false,
    }
}

/// Leaves those out, with a warning.
fn drop_foreign(data: &mut Vec<&str>, fstype: &str, read_only: bool) {
    data.retain(|word| {
        let foreign = for_openvz_only(word, fstype, read_only);
        if foreign {
            report::warn(format_args!("mount option {word} is of OpenVZ's kernel, not of {fstype} here: left out"));
        }
        !foreign
    });
}

/// Kernel flags and the text left for the file system.
fn split(options: &str) -> (MsFlags, Vec<&str>) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for word in options.split(',').filter(|w| !for_fstab_only(w)) {
        match WORDS.iter().find(|(name, ..)| *name == word) {
            Some((_, flag, on)) => flags.set(*flag, *on),
            None => data.push(word),
        }
    }
    (flags, data)
}

/// Mounts `device` at `target`. Nothing is mounted after an error.
pub fn mount_device(device: &Path, target: &Path, spec: &MountSpec) -> Result<()> {
    let found = probe::device(device).ctx(Kind::Mount, || format!("{} cannot be read", device.display()))?;
    let fstype = spec.fstype.as_deref().or(found.map(Found::name)).unwrap_or("ext4");
    let (mut flags, mut data) = split(spec.options.as_deref().unwrap_or_default());
    drop_foreign(&mut data, fstype, spec.read_only);
    flags.set(MsFlags::MS_RDONLY, spec.read_only || flags.contains(MsFlags::MS_RDONLY));
    flags.set(MsFlags::MS_NOATIME, spec.noatime || flags.contains(MsFlags::MS_NOATIME));

    // Of a device that cannot be written a journal cannot be replayed: what is there is shown as it is. ext says in its
    // superblock that there is something to replay; xfs and btrfs are tried once more with the option if they refuse.
    let skip_replay = found.filter(|_| spec.read_only).and_then(Found::without_replay);
    let ext = matches!(found, Some(Found::Ext { .. }));
    if let Some(option) = skip_replay.filter(|o| ext && !data.contains(o)) {
        report::say(0, format_args!("The journal on {} has to be replayed; mounting with {option}", device.display()));
        data.push(option);
    }
    beside_twin(device, fstype, flags, spec.read_only, &mut data)?;
    let shown = format!("{} at {} as {fstype}, options \"{}\"", device.display(), target.display(), data.join(","));
    report::say(0, format_args!("Mounting {shown}{}", if spec.read_only { ", read-only" } else { "" }));
    let mut result = call(device, target, fstype, flags, &data);
    if result.is_err()
        && let Some(option) = skip_replay.filter(|o| !ext && !data.contains(o))
    {
        data.push(option);
        result = call(device, target, fstype, flags, &data);
    }
    result.map_err(|errno| refused(errno, &shown, found, fstype))?;

    if spec.quota {
        let mut with_quota = vec!["usrjquota=aquota.user", "grpjquota=aquota.group", "jqfmt=vfsv0"];
        with_quota.extend(&data);
        let remounted = call(device, target, fstype, flags | MsFlags::MS_REMOUNT, &with_quota);
        if let Err(errno) = remounted {
            let _ = umount2(target, MntFlags::empty());
            return Err(errno).ctx(Kind::Mount, || format!("quota cannot be switched on for {shown}"));
        }
    }
    Ok(())
}

/// A copy of a file system that may be mounted at the same time. A read-only XFS is told not to be known by its UUID; what
/// the kernel would take for the other one is refused. `Mount`.
fn beside_twin(device: &Path, fstype: &str, flags: MsFlags, look: bool, data: &mut Vec<&str>) -> Result<()> {
    match fstype {
        "xfs" if !data.contains(&"nouuid") => {
            // What is mounted of a read-only device is left out of the kernel's list: the disk itself can be mounted later.
            let twin = if look { None } else { twins::of_xfs(device) };
            if look || (twin.is_some() && flags.contains(MsFlags::MS_RDONLY)) {
                data.push("nouuid");
            } else if let Some(target) = twin {
                bail!(
                    Mount,
                    "the XFS on {} has the UUID of the one that is mounted at {}: mount it read-only (-r), with -o nouuid, or give \
                     it a UUID of its own: ploop mount it without -m, then xfs_admin -U generate on its partition",
                    device.display(),
                    target.display()
                );
            }
            Ok(())
        }
        "btrfs" => match twins::of_btrfs(device) {
            Some(devices) => bail!(
                Mount,
                "the btrfs on {} has the UUID of one that is mounted (from {}), for which this kernel would take it: unmount that \
                 first, or give this one a UUID of its own: ploop mount it without -m, then btrfstune -u on its partition",
                device.display(),
                devices.join(", ")
            ),
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

/// Changes the options of what is mounted at a mount point: those given, and the usual ones for the rest.
pub fn remount(mount: &Mount, options: &str) -> Result<()> {
    let rest: Vec<&str> = options.split(',').filter(|w| *w != "remount").collect();
    let rest = rest.join(",");
    let (flags, mut data) = split(&rest);
    drop_foreign(&mut data, &mount.fstype, false);
    call(&mount.source, &mount.target, &mount.fstype, flags | MsFlags::MS_REMOUNT, &data).map_err(|errno| {
        let hint = match errno {
            Errno::EROFS | Errno::EACCES if !flags.contains(MsFlags::MS_RDONLY) => {
                "; the device is read-only: unmount it, then mount it for writing"
            }
            Errno::EBUSY => "; files are open for writing there",
            _ => "",
        };
        let what = format!("cannot remount {} with options \"{options}\"{hint}", mount.target.display());
        Error::with(Kind::Mount, what, std::io::Error::from_raw_os_error(errno as i32))
    })
}

fn call(device: &Path, target: &Path, fstype: &str, flags: MsFlags, data: &[&str]) -> nix::Result<()> {
    let data = data.join(",");
    mount(Some(device), target, Some(fstype), flags, (!data.is_empty()).then_some(data.as_str()))
}

fn refused(errno: Errno, shown: &str, found: Option<Found>, fstype: &str) -> Error {
    let hint = match (errno, found) {
        (Errno::ENODEV, _) => format!("; this kernel has no file system {fstype} (modprobe {fstype}?)"),
        (_, Some(found)) if found.name() != fstype && !(fstype.starts_with("ext") && found.name() == "ext4") => {
            format!("; the superblock there is of {}", found.name())
        }
        (_, None) => "; no ext, xfs or btrfs file system was recognised there".to_string(),
        (Errno::EINVAL, Some(_)) => "; the kernel's log (dmesg) says more".to_string(),
        (Errno::EPERM, _) => "; mounting needs root (CAP_SYS_ADMIN)".to_string(),
        (Errno::EUCLEAN, _) => "; the file system is damaged, check it (ploop mount -F, or e2fsck)".to_string(),
        _ => String::new(),
    };
    Error::with(Kind::Mount, format!("cannot mount {shown}{hint}"), std::io::Error::from_raw_os_error(errno as i32))
}

/// `fsck.ext4 -p` on a device that is not mounted, `-n` if it cannot be written. The program's status if it is below 4
/// (1 to 3: repaired), else `Fsck`.
pub fn fsck(device: &Path, read_only: bool) -> Result<i32> {
    let how = if read_only { "-n" } else { "-p" };
    let outcome = helper::run("fsck.ext4", &[how.as_ref(), device.as_os_str()])?;
    match outcome.status {
        0..4 => Ok(outcome.status),
        helper::NOT_STARTED => Err(Error::new(
            Kind::Fsck,
            format!("fsck.ext4 cannot be run on {}: {}; install e2fsprogs", device.display(), outcome.err),
        )),
        _ => Err(Error::new(
            Kind::Fsck,
            format!(
                "fsck.ext4 {how} on {} ended with {}; the disk is detached again: attach it without mounting (ploop mount without -m and \
                 -F) and run e2fsck on its device to see and repair the damage",
                device.display(),
                outcome.complaint()
            ),
        )),
    }
}

/// How often and how long a busy mount point is waited for.
const TRIES: u32 = 6;
const PAUSE: Duration = Duration::from_secs(1);

/// Unmounts one mount point, waiting six seconds for its users. `Umount`.
pub fn umount(target: &Path) -> Result<()> {
    report::say(0, format_args!("Unmounting {}", target.display()));
    for attempt in 0..=TRIES {
        match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => return Ok(()),
            // Another process has unmounted it meanwhile.
            Err(Errno::EINVAL) if !still_mounted(target)? => return Ok(()),
            Err(Errno::EBUSY) if attempt < TRIES && !report::cancel::requested() => sleep(PAUSE),
            Err(Errno::EBUSY) => {
                return Err(Error::new(
                    Kind::Umount,
                    format!("{} is in use{}; end these processes and try again", target.display(), users_at(target)),
                ));
            }
            Err(errno) => return Err(errno).ctx(Kind::Umount, || format!("cannot unmount {}", target.display())),
        }
    }
    Ok(())
}

/// Detaches a mount from the tree at once; the kernel ends it when no process uses it any more. `Umount`.
pub fn umount_lazily(target: &Path) -> Result<()> {
    match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Err(Errno::EINVAL) => Ok(()),
        other => other.ctx(Kind::Umount, || format!("cannot unmount {}", target.display())),
    }
}

/// What keeps a mount of this namespace busy.
fn users_at(target: &Path) -> String {
    let table = mounts::read().unwrap_or_default();
    if let Some(m) = table.iter().rev().find(|m| m.target != target && m.target.starts_with(target)) {
        return format!(": {} is mounted in it", m.target.display());
    }
    // Of btrfs files have other numbers than the mount.
    let mounted = table.iter().rev().find(|m| m.target == target).map(|m| m.dev);
    let devs: Vec<u64> = mounted.into_iter().chain(statx::cached_dev(target)).collect();
    users(&devs)
}

fn still_mounted(target: &Path) -> Result<bool> {
    Ok(mounts::read()?.iter().any(|m| m.target == target))
}

/// The processes that use a file system, for a message: ` by process 12 (bash), ...`.
pub(super) fn users(devs: &[u64]) -> String {
    let found = processes::using(devs);
    let named: Vec<String> = found.iter().take(8).map(|pid| processes::shown(pid)).collect();
    match named.is_empty() {
        true => ", by no process that /proc shows".into(),
        false => format!(" by process {}", named.join(", ")),
    }
}

/// Unmounts all mounts of a device in the mount namespace of the calling process, last mounted first.
pub fn umount_all(names: &Names) -> Result<()> {
    let mut before = usize::MAX;
    loop {
        // Read anew each time: one unmount can end further mounts (shared mounts).
        let table = mounts::read()?;
        let ours = table.iter().filter(|m| names.mounted_by(m)).count();
        let Some(last) = table.iter().rev().find(|m| names.mounted_by(m)) else { return Ok(()) };
        if ours >= before {
            return Err(Error::new(Kind::Umount, format!("{} stays mounted", last.target.display())));
        }
        before = ours;
        if let Some(above) = table.iter().rev().find(|m| m.target == last.target)
            && !names.mounted_by(above)
        {
            return Err(Error::new(
                Kind::Umount,
                format!(
                    "{} cannot be unmounted: {} ({}) is mounted over it; unmount that first",
                    last.target.display(),
                    above.source.display(),
                    above.fstype
                ),
            ));
        }
        umount(&last.target)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_openvz_are_left_out_where_they_cannot_matter() {
        let all = ["balloon_ino=12", "data=ordered", "pfcache_csum", "usrjquota=aquota.user", "usrquota"];
        let left = |fstype, read_only| {
            let mut data = all.to_vec();
            drop_foreign(&mut data, fstype, read_only);
            data
        };
        assert_eq!(left("ext4", false), ["data=ordered", "usrjquota=aquota.user", "usrquota"]);
        assert_eq!(left("ext4", true), ["data=ordered", "usrquota"]);
        assert_eq!(left("xfs", false), ["data=ordered", "usrquota"]);
    }

    #[test]
    fn words_become_flags_and_the_rest_stays() {
        let (flags, data) = split("rw,noatime,defaults,data=ordered,x-systemd.automount,ro,,nodev");
        assert_eq!(flags, MsFlags::MS_NOATIME | MsFlags::MS_RDONLY | MsFlags::MS_NODEV);
        assert_eq!(data, ["data=ordered"]);
        assert_eq!(split("ro,rw").0, MsFlags::empty());
    }
}

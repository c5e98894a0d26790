//! What is wrong with one disk: its descriptor, its images, the devices that run it, and what interrupted operations left.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::device::one;
use super::finding::{Finding, Grade, bad, good, word};
use super::leftovers::{self, Known};
use crate::descriptor::{self, Descriptor, Image, ImageMode};
use crate::device::{self, Device, State};
use crate::error::{Error, Kind};
use crate::format::guid::Guid;
use crate::format::header::Header;
use crate::image::check::read_header;
use crate::image::lock::{self, Sharing};
use crate::image::open::Access;
use crate::ops::{find, image_set, online, temporary_snapshot, umount};
use crate::sys::file_id::FileId;
use crate::sys::folder::Place;
use crate::sys::{file_lock, processes};

/// One page on a disk. Nothing is changed.
pub fn disk(path: &Path) -> Vec<Finding> {
    let place = match Descriptor::find(path) {
        Ok(place) => place,
        Err(e) => return vec![unreadable(path, None, &e)],
    };
    let disk = match Descriptor::read_at(&place) {
        Ok(disk) => disk,
        Err(e) => return vec![unreadable(path, Some(&place), &e)],
    };
    let shown = path.display().to_string();
    if let Err(e) = disk.check_tree() {
        let remedy = "the tree of its snapshots is not sound: put a backup of the descriptor in its place";
        return vec![bad(Grade::Missing, &shown, e.to_string(), remedy)];
    }
    let devices = match find::devices_of(&place, &disk, None) {
        // Only root can make devices, and only root may look at them.
        Err(_) if !nix::unistd::geteuid().is_root() => Vec::new(),
        Ok(devices) => devices,
        Err(e) => return vec![bad(Grade::Warning, &shown, e.to_string(), "run it as root")],
    };
    let mut found = levels(&disk, &devices);
    found.extend(devices.iter().map(one));
    let lock = Lock::of(&place);
    if let Lock::Held(by) = &lock {
        found.push(good("lock", format!("held by {by}: an operation on the disk is under way")));
        return found;
    }
    found.extend(waiting(&disk, &place));
    let page = Page { place: &place, disk: &disk, devices: &devices };
    page.left_mounted(&mut found);
    page.images(&mut found);
    page.agreement(&mut found);
    page.snapshots(&mut found);
    found.extend(leftovers::of(&Known { place: &place, disk: &disk, runs: page.runs() }));
    if let Lock::Unknown = lock {
        // An operation that this user cannot see may be under way.
        found.iter_mut().for_each(|f| f.cure = None);
    }
    // Held until here: no operation has begun meanwhile.
    drop(lock);
    found
}

/// A command only where `restore-descriptor` can help: without a descriptor, or with one that was cut.
fn unreadable(path: &Path, place: Option<&Place>, e: &Error) -> Finding {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let found = |remedy: &str| bad(Grade::Missing, &path.display().to_string(), e.to_string(), remedy);
    let anew = "make it anew from the device that runs the disk, from its backup or from the images";
    if path.file_name().is_none_or(|name| name != descriptor::FILE_NAME) || !folder.is_dir() {
        return found(anew);
    }
    let restore = format!("ploop restore-descriptor {}", word(folder));
    if e.errno() == Some(libc::ENOENT) {
        // A link that leads nowhere is in the way.
        return found(anew).cured_if(path.symlink_metadata().is_err().then_some(restore));
    }
    match place.map(Descriptor::is_cut) {
        Some(Ok(true)) => {
            // The damaged one is kept under this name.
            let aside = folder.join(DAMAGED);
            match aside.symlink_metadata().is_ok() {
                true => found(anew).cured_by(format!("mv -n {} {} && {restore}", word(&aside), word(&free(&aside)))),
                false => found(anew).cured_by(restore),
            }
        }
        _ => {
            found("it is not damaged, but refused: use a program that knows such disks, or put its backup in its place")
        }
    }
}

/// Names of descriptors that were put aside.
const DAMAGED: &str = "DiskDescriptor.xml.damaged";

/// A name like this one that no file has; an empty one if there are very many, which mv refuses.
fn free(path: &Path) -> PathBuf {
    let numbered = (1..1000).map(|n| {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{n}"));
        PathBuf::from(name)
    });
    let mut all = std::iter::once(path.to_owned()).chain(numbered);
    all.find(|p| p.symlink_metadata().is_err()).unwrap_or_default()
}

/// The lock on the descriptor.
enum Lock {
    /// By this process, or there is nothing to lock.
    Ours(#[allow(dead_code, reason = "held until it is dropped")] Option<Flock<File>>),
    /// The processes that hold it.
    Held(String),
    /// This process may not look at it.
    Unknown,
}

impl Lock {
    fn of(place: &Place) -> Lock {
        let path = descriptor::lock_path(&place.path());
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = match File::options().read(true).custom_flags(flags).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Lock::Ours(None),
            Err(_) => return Lock::Unknown,
        };
        if !file.metadata().is_ok_and(|m| m.is_file()) {
            return Lock::Unknown;
        }
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Err((file, nix::errno::Errno::EWOULDBLOCK)) => {
                let id = FileId::of(&file).ok();
                Lock::Held(id.and_then(|id| locked_by(&id)).unwrap_or_else(|| "a process that is not known".into()))
            }
            Ok(lock) => Lock::Ours(Some(lock)),
            Err(_) => Lock::Ours(None),
        }
    }
}

/// The processes with a lock on this file, `123 (ploop)`, as far as /proc/locks tells them.
fn locked_by(file: &FileId) -> Option<String> {
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    let shown: Vec<String> = file_lock::holders(&locks, *file).iter().map(|pid| processes::shown(pid)).collect();
    (!shown.is_empty()).then(|| shown.join(", "))
}

/// Which level is which file, and what has it.
fn levels(disk: &Descriptor, devices: &[Device]) -> Vec<Finding> {
    let Ok(chain) = disk.chain(&disk.top) else { return Vec::new() };
    let level = |(n, image): (usize, &&Image)| {
        let id = FileId::at(&image.file).ok();
        let runs = devices.iter().filter(|d| id.is_some_and(|id| d.level_of(id).is_some()));
        let users: Vec<String> = runs.map(|d| format!(", in {}", d.node().display())).collect();
        let held = match (id, users.is_empty()) {
            (Some(id), true) => locked_by(&id).map(|by| format!(", locked by {by}")).unwrap_or_default(),
            _ => String::new(),
        };
        let state = match read_header(&image.file, Some(&disk.dir)) {
            _ if disk.is_raw(image) => ", raw",
            Ok(header) if header.is_marked() => ", marked in use",
            _ => "",
        };
        good(&format!("level {n}"), format!("{} {}{state}{held}{}", image.file.display(), image.guid, users.concat()))
    };
    chain.iter().enumerate().map(level).collect()
}

/// Changes of the disk that wait for the next mount.
fn waiting(disk: &Descriptor, place: &Place) -> Option<Finding> {
    let files: Vec<FileId> = disk.images.iter().filter_map(|i| FileId::at(&i.file).ok()).collect();
    let (_, folder) = device::unflushed(&files).ok().flatten()?;
    // A dead device has them: its own finding says what to do.
    if find::devices_of(place, disk, None).is_ok_and(|all| !all.is_empty()) {
        return None;
    }
    let dd = word(&place.path());
    let text = format!("its last changes, whose server was killed, wait in {} for the next mount", folder.display());
    let remedy = "mount it for writing before the host is rebooted";
    Some(bad(Grade::Warning, "unflushed", text, remedy).cured_by(format!("ploop mount {dd} && ploop umount {dd}")))
}

/// Only this machine writes to the file system.
fn is_local(file: &File) -> bool {
    const LOCAL: [u32; 8] = [
        0xEF53,      // ext2, ext3, ext4
        0x5846_5342, // xfs
        0x9123_683E, // btrfs
        0x0102_1994, // tmpfs
        0x794C_7630, // overlay
        0x2FC1_2FC1, // zfs
        0xF2F5_2010, // f2fs
        0xCA45_1A4E, // bcachefs
    ];
    let found = nix::sys::statfs::fstatfs(file).map(|s| s.filesystem_type());
    found.is_ok_and(|found| LOCAL.contains(&(found.0 as u32)))
}

/// Without braces, which shells would want quoted.
fn bare(guid: &Guid) -> String {
    guid.to_string().replace(['{', '}'], "")
}

struct Page<'a> {
    place: &'a Place,
    disk: &'a Descriptor,
    devices: &'a [Device],
}

impl Page<'_> {
    fn dd(&self) -> String {
        word(&self.place.path())
    }

    /// A device runs it, or has not been removed yet.
    fn runs(&self) -> bool {
        !self.devices.is_empty()
    }

    /// Devices that an interrupted operation has mounted for a moment.
    fn left_mounted(&self, found: &mut Vec<Finding>) {
        let Ok(point) = umount::temporary_mount_point(self.disk) else { return };
        for device in self.devices.iter().filter(|d| d.state.runs()) {
            let mounts = find::mounts_of(device).unwrap_or_default();
            if mounts.iter().any(|m| m.target == point.path()) {
                let text = format!(
                    "{} is mounted at {}, left by an interrupted operation",
                    device.node().display(),
                    point.display()
                );
                // By the descriptor: that removes the folder, too.
                let cure = match device.component() {
                    "" => format!("ploop umount {}", self.dd()),
                    _ => format!("ploop umount -d {}", word(device.node())),
                };
                found.push(bad(Grade::Warning, "leaked device", text, "unmount it").cured_by(cure));
            }
        }
    }

    fn images(&self, found: &mut Vec<Finding>) {
        let on_chain: Vec<Guid> =
            self.disk.chain(&self.disk.top).map(|c| c.iter().map(|i| i.guid).collect()).unwrap_or_default();
        for image in &self.disk.images {
            let shown = image.file.display();
            if image.file.symlink_metadata().is_err() {
                // A device that runs it says what became of it.
                if !self.runs() {
                    let text = format!("{shown} of snapshot {} is not there", image.guid);
                    let remedy = "bring it back: the disk needs it. If it has another name now, mv it to this one";
                    found.push(bad(Grade::Missing, "missing image", text, remedy));
                }
                continue;
            }
            if self.disk.is_raw(image) {
                continue;
            }
            let check = match on_chain.contains(&image.guid) {
                true => format!("ploop check {}", self.dd()),
                false => format!("ploop check -u {} {}", bare(&image.guid), self.dd()),
            };
            match read_header(&image.file, Some(&self.disk.dir)) {
                Err(e) => {
                    let remedy = format!("copy the file first; ploop check -f -r {shown} tells more");
                    found.push(bad(Grade::Missing, "damaged image", e.to_string(), remedy));
                }
                Ok(header) => found.extend(self.mark(image, &header, check)),
            }
        }
    }

    /// `check`: the command that checks the image and clears the mark.
    fn mark(&self, image: &Image, header: &Header, check: String) -> Option<Finding> {
        let shown = image.file.display();
        if !header.is_marked() && !header.is_converting() || self.runs() {
            return None;
        }
        // Another disk may run it, or its changes wait: then the mark is right.
        let id = FileId::at(&image.file).ok()?;
        let used = !image_set::users(&image.file).is_ok_and(|u| u.is_empty());
        if used || device::unflushed(&[id]).ok().flatten().is_some() {
            return None;
        }
        let held = lock::lock_image(&image.file, Some(&self.disk.dir), Access::default(), Sharing::Exclusive);
        if let Err(e) = &held
            && e.kind() == Kind::Busy
        {
            let by = locked_by(&id).map(|by| format!(", locked by {by}")).unwrap_or_default();
            return Some(good("in-use mark", format!("{shown} is in use by a program of this machine{by}")));
        }
        let text = match header.is_converting() {
            true => format!("{shown} is half converted to another version"),
            false => format!("{shown} is marked in use, but no device of this machine runs it"),
        };
        let found = |remedy: &str| bad(Grade::Warning, "in-use mark", text.clone(), remedy);
        // Devices and other users' processes are seen by root only; locks of other machines may not be seen at all.
        match held.is_ok_and(|held| is_local(&held.file)) && nix::unistd::geteuid().is_root() {
            true => Some(found("it is checked, and the mark goes").cured_by(check)),
            false => Some(found(&format!(
                "only if no other machine and no other program runs it, which cannot be seen from here: {check} checks it, and \
                 the mark goes"
            ))),
        }
    }

    /// Descriptor and images say the same.
    fn agreement(&self, found: &mut Vec<Finding>) {
        let disk = self.disk;
        let Ok(chain) = disk.chain(&disk.top) else { return };
        let headers: Vec<(&Image, Header)> = (chain.iter())
            .filter(|i| !disk.is_raw(i))
            .filter_map(|i| Some((*i, read_header(&i.file, Some(&disk.dir)).ok()?)))
            .collect();
        let disagree = |text: String, remedy: &str| bad(Grade::Warning, "disagreement", text, remedy);
        if let Some((image, header)) = headers.iter().find(|(_, h)| h.cluster != disk.blocksize) {
            let text = format!(
                "{} has clusters of {} sectors, the descriptor says {}",
                image.file.display(),
                header.cluster.sectors(),
                disk.blocksize.sectors()
            );
            let remedy = "the image is right: put a backup of the descriptor in its place, or make it anew";
            let one = disk.images.len() == 1 && disk.mode != ImageMode::Raw && !self.runs();
            found.push(match one {
                true => disagree(text, remedy).cured_by(format!(
                    "mv -n {} {} && ploop restore-descriptor {} {}",
                    self.dd(),
                    word(&free(&disk.dir.join(DAMAGED))),
                    word(disk.dir.path()),
                    word(&image.file)
                )),
                false => disagree(text, remedy),
            });
            return;
        }
        if let Some(pair) = headers.windows(2).find(|p| matches!(p, [(_, a), (_, b)] if a.version != b.version))
            && let [(lower, _), (upper, _)] = pair
        {
            let text = format!("{} and {} have different versions", lower.file.display(), upper.file.display());
            found.push(disagree(text, "all images of a chain must have one: one of them belongs to another disk"));
        }
        if let Some((image, header)) = headers.last().filter(|(i, _)| i.guid == disk.top) {
            // A last cluster that is not whole may be counted as whole in one of them.
            let whole = |sectors: u64| sectors.next_multiple_of(u64::from(disk.blocksize.sectors()));
            if whole(header.sectors) != whole(disk.size_sectors) {
                let text = format!(
                    "{} has {} sectors, the descriptor says {}",
                    image.file.display(),
                    header.sectors,
                    disk.size_sectors
                );
                found.push(
                    disagree(text, "the image is right: mounts take its size; this corrects the descriptor")
                        .cured_by(format!("ploop grow -s {} {}", header.sectors, self.dd())),
                );
            }
        }
        for device in
            self.devices.iter().filter(|d| d.component().is_empty() && d.state == State::Running && !d.read_only)
        {
            if let Err(e) = online::check_chain(disk, device).map_err(|e| e.to_string())
                // Images that were deleted or renamed are the device's own finding.
                && !self.disk.images.iter().any(|i| i.file.symlink_metadata().is_err())
            {
                found.push(disagree(e, "find out first which of them is right"));
            }
        }
    }

    fn snapshots(&self, found: &mut Vec<Finding>) {
        for snapshot in self.disk.snapshots.iter().filter(|s| s.temporary) {
            let guid = &snapshot.guid;
            if let Some((from, to)) = self.disk.unfinished_merge(guid) {
                if !self.devices.iter().any(|d| d.merging.is_some()) {
                    let text = format!("{guid} is half merged: an interrupted merge of {from} has changed its content");
                    let cure = format!("ploop snapshot-merge -u {} -U {} {}", bare(&from), bare(&to), self.dd());
                    let remedy = "finish the merge; the next mount does that, too";
                    found.push(bad(Grade::Warning, "snapshot", text, remedy).cured_by(cure));
                }
                continue;
            }
            let children = self.disk.children(guid).len();
            if children > 1 {
                found
                    .push(good("snapshot", format!("{guid} is deleted, and stays for the {children} snapshots on it")));
                continue;
            }
            found.extend(self.unheld(guid));
        }
    }

    /// A temporary snapshot that nothing uses.
    fn unheld(&self, guid: &Guid) -> Option<Finding> {
        let image = self.disk.image(guid)?;
        let id = FileId::at(&image.file).ok()?;
        let shows = |d: &&Device| d.top_id() == Some(id);
        let idle: Vec<&Device> = self.devices.iter().filter(shows).collect();
        if idle.iter().any(|d| d.state.runs() && !temporary_snapshot::idle(d))
            || self.devices.iter().any(|d| d.merging.is_some())
        {
            return None;
        }
        let umounts: String = idle.iter().map(|d| format!("ploop umount -d {} && ", word(d.node()))).collect();
        let bare = bare(guid);
        let text = format!("{guid} is temporary, and no process holds it ({})", image.file.display());
        Some(
            bad(Grade::Warning, "snapshot", text, "it is merged away; the next mount of the disk does that, too")
                .cured_by(format!("{umounts}ploop snapshot-delete -u {bare} {}", self.dd())),
        )
    }
}

//! What interrupted operations have left beside a disk. No operation on the disk is under way: the caller holds the lock.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::finding::{Finding, Grade, bad, word};
use crate::descriptor::{Descriptor, Image};
use crate::fs::mounts;
use crate::image::check::read_header;
use crate::image::version;
use crate::ops::orphans::OrphanKind;
use crate::ops::{convert_recovery, merge, online, orphans, scratch};
use crate::sys::folder::Place;
use crate::sys::{file_lock, store};

/// Of a file while a copy is received.
const RECEIVING: &str = ".receiving";
/// Of a deleted image while it is copied back.
const SAVING: &str = ".saving";

/// What is known of a disk.
pub(super) struct Known<'a> {
    pub place: &'a Place,
    pub disk: &'a Descriptor,
    /// A device runs it.
    pub runs: bool,
}

/// All of them. A command is given only where nothing can be lost by it: nothing with the header of an image is removed, and what
/// may be the only copy of something is left to the user.
pub(super) fn of(known: &Known<'_>) -> Vec<Finding> {
    let Known { place, disk, .. } = known;
    let check = format!("ploop check {}", word(&place.path()));
    let mut found = Vec::new();
    for suffix in [".tmp", ".tmp.tmp"] {
        let tmp = place.suffixed(suffix);
        if is_file(&tmp.path()) {
            let cure = when_idle(known, &check);
            let remedy = format!("{cure} removes it");
            found.push(left(&tmp.path(), "change of the descriptor", remedy).cured_by(cure));
        }
    }
    let converting = disk.images.iter().any(|i| read_header(&i.file, Some(&disk.dir)).is_ok_and(|h| h.is_converting()));
    for image in &disk.images {
        let copy = beside(&image.file, version::BACKUP);
        if is_file(&copy) {
            found.push(backup(known, image, &copy, converting.then(|| when_idle(known, &check))));
        }
        let raw = beside(&image.file, convert_recovery::SCRATCH);
        if is_file(&raw) && !disk.images.iter().any(|i| i.file == raw) && usage(&raw) != Use::Busy {
            let remedy = format!("if {} is whole: {}", image.file.display(), remove(&raw));
            let sound =
                read_header(&image.file, Some(&disk.dir)).is_ok() && usage(&raw) == Use::Free && is_worthless(&raw);
            found.push(left(&raw, "conversion to raw", remedy).cured_if(sound.then(|| remove(&raw))));
        }
        // Users, too, give copies of images such a name.
        let raw = beside(&image.file, ".tmp");
        if is_file(&raw) && !is_file(&place.suffixed(".tmp").path()) && usage(&raw) != Use::Busy {
            let remedy =
                format!("if it is no copy that is wanted, and {} is whole: {}", image.file.display(), remove(&raw));
            found.push(left(&raw, "conversion to raw", remedy));
        }
    }
    if let Ok(first) = disk.first_image() {
        let point = beside(&first.file, ".mnt");
        if point.is_dir() && !mounts::is_mount_point(&point).unwrap_or(true) {
            let cure = format!("rmdir {}", word(&point));
            found.push(left(&point, "operation that needed its file system", cure.clone()).cured_by(cure));
        }
    }
    for name in disk.dir.names().unwrap_or_default() {
        if let Some(by) = interrupted(&name) {
            let path = disk.dir.join(&name);
            if !disk.images.iter().any(|i| i.file == path) && usage(&path) != Use::Busy {
                found.push(unfinished(known, &path, by));
            }
        }
    }
    found.extend(orphans_of(known));
    found
}

fn left(path: &Path, by: &str, remedy: impl Into<String>) -> Finding {
    bad(Grade::Warning, "leftover", format!("{} was left by an interrupted {by}", path.display()), remedy)
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// The copy of an image's header and BAT from before a conversion. `check`: the command that finishes or undoes the conversion.
fn backup(known: &Known<'_>, image: &Image, copy: &Path, check: Option<String>) -> Finding {
    let disk = known.disk;
    let text = |remedy: String| left(copy, "conversion to another version", remedy);
    if let Some(check) = check {
        return text(check.clone()).cured_by(check);
    }
    let readable = |i: &Image| disk.is_raw(i) || read_header(&i.file, Some(&disk.dir)).is_ok();
    // The image has all that is in the copy: its own header and BAT are sound.
    let sound = || {
        let header = read_header(&image.file, Some(&disk.dir)).ok()?;
        let file = open_user_file(&image.file).ok()?;
        version::backup_of(&header, &open_user_file(copy).ok()?)?;
        version::is_whole(&file, &header).then_some(())
    };
    match disk.images.iter().all(readable) && usage(copy) == Use::Free && sound().is_some() {
        true => text(remove(copy)).cured_by(remove(copy)),
        false => text(format!(
            "it may be the only sound header and table of {}: keep it until that is checked, and remove it then",
            image.file.display()
        )),
    }
}

/// What has one of the names of [`interrupted`].
fn unfinished(known: &Known<'_>, path: &Path, by: &str) -> Finding {
    let without = |suffix: &str| path.as_os_str().as_bytes().strip_suffix(suffix.as_bytes()).map(OsStr::from_bytes);
    let found = |remedy: String| left(path, by, remedy);
    if let Some(image) = without(online::REPLACING) {
        // The file is the user's.
        let cure = format!("mv -n {} {}", word(path), word(&beside(Path::new(image), ".new")));
        return found(format!("it gets another name: {cure}")).cured_by(cure);
    }
    if let Some(image) = without(SAVING) {
        return saved(known, path, Path::new(image));
    }
    if let Some(target) = without(RECEIVING) {
        let target = Path::new(target);
        let again = match is_file(path) {
            true => "copy again".to_string(),
            false => format!(
                "receive again into {0}: what is there is used (ploop receive --kept {1} lists it)",
                target.display(),
                word(target)
            ),
        };
        return found(format!("{again}; only if no copy is under way and it is not wanted: {}", remove(path)));
    }
    let free = usage(path) == Use::Free && is_worthless(path);
    found(format!("if no program uses it: {}", remove(path))).cured_if(free.then(|| remove(path)))
}

/// The copy of a deleted image: it may be all that there is.
fn saved(known: &Known<'_>, path: &Path, image: &Path) -> Finding {
    let found = |remedy: String| left(path, "umount --save-deleted", remedy);
    let has_header = |path: &Path| read_header(path, Some(&known.disk.dir)).is_ok();
    let back = format!("mv -n {} {}", word(path), word(image));
    // The header comes last into the copy: with it, it was once whole.
    let whole = usage(path) == Use::Free && has_header(path);
    let there = image.symlink_metadata().is_ok();
    match (known.runs, there) {
        (true, _) => found(format!(
            "a device runs the disk: if it has the deleted image still, ploop umount --save-deleted copies that again, after {}",
            remove(path)
        )),
        (false, false) => found(format!("{} is not there, and this is a copy of it: {back}", image.display()))
            .cured_if(whole.then_some(back)),
        (false, true) => found(format!(
            "{} is there again; if that is the right one and not older than the copy: {}",
            image.display(),
            remove(path)
        ))
        .cured_if((has_header(image) && usage(path) == Use::Free && is_worthless(path)).then(|| remove(path))),
    }
}

/// A command that changes the disk, for when it does not run.
fn when_idle(known: &Known<'_>, command: &str) -> String {
    let dd = word(&known.place.path());
    if known.runs { format!("ploop umount {dd} && {command}") } else { command.to_owned() }
}

/// The operation that gives its files such names until they are whole.
fn interrupted(name: &OsStr) -> Option<&'static str> {
    let name = name.as_bytes();
    let ends = |suffix: &str| name.ends_with(suffix.as_bytes());
    Some(match () {
        () if ends(merge::SCRATCH) => "merge",
        () if ends(RECEIVING) => "copy",
        () if ends(SAVING) => "umount --save-deleted",
        () if ends(online::REPLACING) => "replacement of an image",
        () if name.starts_with(scratch::NAME.as_bytes()) => "creation",
        () if name.starts_with(store::PRIVATE.as_bytes()) => "removal",
        () => return None,
    })
}

fn is_file(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|m| m.is_file())
}

fn remove(path: &Path) -> String {
    let recursive = if path.symlink_metadata().is_ok_and(|m| m.is_dir()) { "-r " } else { "" };
    format!("rm {recursive}{}", word(path))
}

/// Nothing that could be wanted is in it: a file that has no header of an image, a folder with nothing but a lock.
fn is_worthless(path: &Path) -> bool {
    if is_file(path) {
        return read_header(path, None).is_err();
    }
    let Ok(entries) = std::fs::read_dir(path) else { return false };
    entries.into_iter().all(|e| e.is_ok_and(|e| e.file_name() == "lock"))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Free,
    Busy,
    /// It is neither file nor folder, or may not be opened.
    Unknown,
}

/// An open of a pipe must not wait, and a link not lead elsewhere.
fn open_user_file(path: &Path) -> std::io::Result<File> {
    File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)
}

/// A program that writes to such a file, or makes a disk in such a folder, holds a lock: on the file, on the folder, or on a file
/// in it.
fn usage(path: &Path) -> Use {
    let one = |path: &Path| {
        let Ok(file) = open_user_file(path) else { return Use::Unknown };
        if !file.metadata().is_ok_and(|m| m.is_file() || m.is_dir()) {
            return Use::Unknown;
        }
        match file_lock::exclusive(&file, false) {
            Ok(()) => Use::Free,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Use::Busy,
            Err(_) => Use::Unknown,
        }
    };
    let inside = path.join("lock");
    match one(path) {
        Use::Free if inside.symlink_metadata().is_ok() => one(&inside),
        own => own,
    }
}

fn orphans_of(known: &Known<'_>) -> Vec<Finding> {
    let Known { place, disk, runs } = known;
    let Ok(first) = disk.first_image() else { return Vec::new() };
    let all = orphans::unnamed(disk, place, &first.file);
    let command = format!("ploop check --remove-orphans {}", word(&place.path()));
    // The command removes all of them. Where an image is missing, one of them may be it.
    let harmless = !runs
        && all.iter().all(|o| o.kind != OrphanKind::Removable)
        && disk.images.iter().all(|i| i.file.symlink_metadata().is_ok());
    let one = |orphan: orphans::Orphan| {
        let text = format!(
            "{} looks like a delta of this disk, but is not in its descriptor ({})",
            orphan.path.display(),
            orphan.content
        );
        let found = |remedy: &str| bad(Grade::Warning, "orphan delta", text.clone(), remedy);
        match orphan.kind {
            OrphanKind::Empty if harmless => {
                found("nothing is in it; it is removed with all others of its kind").cured_by(&command)
            }
            OrphanKind::Empty | OrphanKind::Removable => found(&format!(
                "if it is not wanted, and the disk is not mounted, it is removed with all others of its kind: {command}"
            )),
            OrphanKind::Elsewhere => found(
                "it may belong to another disk, whose descriptor is elsewhere: leave it there unless it is known to be of none",
            ),
            OrphanKind::Unsound => found("it is no sound image of this disk: look what it is, and move it away"),
        }
    };
    all.into_iter().map(one).collect()
}

//! What interrupted operations have left beside a disk. No operation on the disk is under way: the caller holds the lock.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::finding::{Finding, Grade, bad, word};
use crate::descriptor::Descriptor;
use crate::fs::mounts;
use crate::image::check::read_header;
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

/// All of them.
pub(super) fn of(known: &Known<'_>) -> Vec<Finding> {
    let Known { place, disk, .. } = known;
    let check = format!("ploop check {}", word(&place.path()));
    let mut found = Vec::new();
    let mut left = |path: &Path, by: &str, cure: String| {
        let text = format!("{} was left by an interrupted {by}", path.display());
        found.push(bad(Grade::Warning, "leftover", text, format!("{cure}, when no program uses it")).cured_by(cure));
    };
    for suffix in [".tmp", ".tmp.tmp"] {
        let tmp = place.suffixed(suffix);
        if is_file(&tmp.path()) {
            left(&tmp.path(), "change of the descriptor", when_idle(known, &check));
        }
    }
    let converting = disk.images.iter().any(|i| read_header(&i.file, Some(&disk.dir)).is_ok_and(|h| h.is_converting()));
    for image in &disk.images {
        let beside = |suffix: &str| {
            let mut name = image.file.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        let copy = beside(crate::image::version::BACKUP);
        if is_file(&copy) {
            let cure = if converting { when_idle(known, &check) } else { remove(&copy) };
            left(&copy, "conversion to another version", cure);
        }
        let raw = beside(convert_recovery::SCRATCH);
        if is_file(&raw) && !disk.images.iter().any(|i| i.file == raw) {
            left(&raw, "conversion to raw", remove(&raw));
        }
        let raw = beside(".tmp");
        if is_file(&raw) && !is_file(&place.suffixed(".tmp").path()) {
            left(&raw, "conversion to raw", remove(&raw));
        }
    }
    if let Ok(first) = disk.first_image() {
        let mut point = first.file.as_os_str().to_owned();
        point.push(".mnt");
        let point = PathBuf::from(point);
        if point.is_dir() && !mounts::is_mount_point(&point).unwrap_or(true) {
            left(&point, "operation that needed its file system", format!("rmdir {}", word(&point)));
        }
    }
    for name in disk.dir.names().unwrap_or_default() {
        if let Some(by) = interrupted(&name) {
            let path = disk.dir.join(&name);
            if !disk.images.iter().any(|i| i.file == path) && !in_use(&path) {
                let cure = match path.as_os_str().as_bytes().strip_suffix(online::REPLACING.as_bytes()) {
                    // The file is the user's.
                    Some(image) => {
                        let aside = [image, b".new"].concat();
                        format!("mv -n {} {}", word(&path), word(Path::new(OsStr::from_bytes(&aside))))
                    }
                    None => remove(&path),
                };
                left(&path, by, cure);
            }
        }
    }
    found.extend(orphans_of(known));
    found
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

/// A program that writes to such a file, or makes a disk in such a folder, holds a lock.
fn in_use(path: &Path) -> bool {
    let of_folder = path.join("lock");
    let file = if of_folder.is_file() { of_folder } else { path.to_owned() };
    if !is_file(&file) {
        return false;
    }
    std::fs::File::open(&file).is_ok_and(|file| file_lock::exclusive(&file, false).is_err())
}

fn orphans_of(known: &Known<'_>) -> Vec<Finding> {
    let Known { place, disk, runs } = known;
    let Ok(first) = disk.first_image() else { return Vec::new() };
    let dd = word(&place.path());
    orphans::unnamed(disk, place, &first.file)
        .into_iter()
        .map(|orphan| {
            let text = format!(
                "{} looks like a delta of this disk, but is not in its descriptor ({})",
                orphan.path.display(),
                orphan.content
            );
            let found = |remedy: &str| bad(Grade::Warning, "orphan delta", text.clone(), remedy);
            match (orphan.removable, runs) {
                (true, false) => found("if it is not wanted, it is removed with all others of its kind")
                    .cured_by(format!("ploop check --remove-orphans {dd}")),
                (true, true) => found(&format!(
                    "when the disk is unmounted, and it is not wanted: ploop check --remove-orphans {dd}"
                )),
                (false, _) => {
                    found("it is no sound image of this disk: look what it is; if it is not wanted, remove it")
                        .cured_by(remove(&orphan.path))
                }
            }
        })
        .collect()
}

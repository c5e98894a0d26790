//! Files that look like deltas of a disk and are not: an interrupted operation can have left them. They are reported,
//! and removed only if the user asks for that.

use std::ffi::{OsStr, OsString};
use std::fs::{self};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{image_set, merge};
use crate::bail;
use crate::descriptor::{self, Descriptor, LockedDescriptor};
use crate::error::{IoContext, Kind, Result};
use crate::format::guid::Guid;
use crate::image::check::read_header;
use crate::image::lock::{self, Sharing};
use crate::image::open::{Access, open_level, reopen};
use crate::image::scan::{self, Visitor};
use crate::report;
use crate::sys::file_id::FileId;
use crate::sys::folder::{Folder, Place};
use crate::sys::store;

/// Reports all leftovers beside the first image, and removes orphan deltas if `remove` is set. A delta that another
/// descriptor names or another process uses stays; the first such delta is the error, returned after all were tried.
pub fn leftovers(disk: &LockedDescriptor, remove: bool) -> Result<()> {
    let first = &disk.first_image()?.file;
    let mut kept = None;
    for path in orphans(disk, first) {
        let what = content(&path, &disk.dir);
        if !remove {
            report::warn(format_args!(
                "{} looks like a delta of this disk but is not in its descriptor ({what}); an interrupted operation can have \
                 left it. If it is not wanted: ploop check --remove-orphans {}",
                path.display(),
                disk.path.display()
            ));
            continue;
        }
        match remove_one(disk, &path) {
            Ok(()) => report::say(0, format_args!("Removed {} ({what})", path.display())),
            Err(e) => {
                report::warn(&e);
                kept.get_or_insert(e);
            }
        }
    }
    let beside = |path: &Path, suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let mut side = vec![beside(&disk.path, ".tmp")];
    side.extend([".tmp", ".idx", ".mnt"].map(|suffix| beside(first, suffix)));
    // Files that merges were writing, and folders in which files are removed.
    let interrupted = |name: &OsString| {
        name.as_bytes().ends_with(merge::SCRATCH.as_bytes()) || name.as_bytes().starts_with(store::PRIVATE.as_bytes())
    };
    let names = disk.dir.names().unwrap_or_default().into_iter();
    side.extend(names.filter(interrupted).map(|name| disk.dir.join(name)));
    for path in side.iter().filter(|p| p.symlink_metadata().is_ok()) {
        report::warn(format_args!("{} was left by an interrupted operation", path.display()));
    }
    kept.map_or(Ok(()), Err)
}

/// `<first image>.{GUID}` beside the first image, files that the descriptor does not name in any way.
fn orphans(disk: &Descriptor, first: &Path) -> Vec<PathBuf> {
    let (Some(folder), Some(stem)) = (first.parent(), first.file_name()) else { return Vec::new() };
    let is_delta = |name: &OsStr| {
        let rest = name.as_bytes().strip_prefix(stem.as_bytes()).and_then(|r| r.strip_prefix(b"."));
        let text = rest.and_then(|r| std::str::from_utf8(r).ok());
        text.is_some_and(|t| t.starts_with('{') && Guid::parse(t).is_ok())
    };
    let own: Vec<_> = disk.images.iter().filter_map(|i| FileId::at(&i.file).ok()).collect();
    let strange = |path: &PathBuf| {
        let there = fs::symlink_metadata(path);
        there.is_ok_and(|m| m.is_file() && !own.contains(&FileId::from(&m)))
            && !disk.images.iter().any(|i| i.file == *path)
    };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> =
        entries.filter(|e| is_delta(&e.file_name())).map(|e| e.path()).filter(strange).collect();
    found.sort();
    found
}

/// A file that looks like a delta of a disk whose descriptor does not name it; no other descriptor and no process does.
pub(super) struct Orphan {
    pub path: PathBuf,
    /// What is in it.
    pub content: String,
    pub kind: OrphanKind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum OrphanKind {
    /// `check --remove-orphans` removes it; nothing is in it, and it is not marked.
    Empty,
    /// `check --remove-orphans` removes it.
    Removable,
    /// It is outside the descriptor's folder, where descriptors of other disks are not known.
    Elsewhere,
    /// It is no sound image of this disk.
    Unsound,
}

/// Those beside the first image. Nothing is written, and no lock is kept.
pub(super) fn unnamed(disk: &Descriptor, place: &Place, first: &Path) -> Vec<Orphan> {
    let free = |path: &PathBuf| {
        let held = lock::lock_image(path, Some(&disk.dir), Access::default(), Sharing::Exclusive);
        let busy = held.is_err_and(|e| e.kind() == Kind::Busy);
        !busy && image_set::users(path).is_ok_and(|u| u.is_empty()) && other_owner(&disk.dir, place, path).is_none()
    };
    let described = |path: PathBuf| {
        let sound = read_header(&path, Some(&disk.dir)).is_ok_and(|h| h.cluster == disk.blocksize);
        let content = content(&path, &disk.dir);
        let kind = match () {
            () if path.parent() != Some(disk.dir.path()) => OrphanKind::Elsewhere,
            () if !sound => OrphanKind::Unsound,
            () if content == EMPTY => OrphanKind::Empty,
            () => OrphanKind::Removable,
        };
        Orphan { content, kind, path }
    };
    orphans(disk, first).into_iter().filter(free).map(described).collect()
}

const EMPTY: &str = "empty";

/// What the file has in it, for messages.
fn content(path: &Path, dir: &Folder) -> String {
    let used = || -> Result<u64> {
        let header = read_header(path, Some(dir))?;
        let fd = open_level(path, Some(dir))?;
        let (file, _) = reopen(&fd, Access::default()).ctx(Kind::Open, || path.display().to_string())?;
        let len = file.metadata().ctx(Kind::Fstat, || path.display().to_string())?.len();
        let mut quiet = Quiet;
        Ok(scan::scan(&file, &header, len, &mut quiet)?.mapped * header.cluster.bytes())
    };
    let marked = if read_header(path, Some(dir)).is_ok_and(|h| h.is_marked()) { ", marked in use" } else { "" };
    match used() {
        Ok(0) => format!("{EMPTY}{marked}"),
        Ok(bytes) => format!("{bytes} bytes of data{marked}"),
        Err(_) => "no readable image".into(),
    }
}

struct Quiet;

impl Visitor for Quiet {
    fn problem(&mut self, _: scan::Found, _: scan::Problem) -> Result<()> {
        Ok(())
    }
}

/// Removes an orphan if no process uses it and no other descriptor in the folder names it.
fn remove_one(disk: &LockedDescriptor, path: &Path) -> Result<()> {
    let shown = path.display();
    if path.parent() != Some(disk.dir.path()) {
        bail!(Param, "{shown} stays: outside the descriptor's own folder it may belong to another disk");
    }
    if let Some(device) = image_set::users(path)?.first() {
        bail!(InUse, "{shown} stays: it is part of {}, but not in the descriptor", device.node().display());
    }
    let held = lock::lock_image(path, Some(&disk.dir), Access::default(), Sharing::Exclusive)
        .map_err(|e| e.as_kind(Kind::InUse).context("an orphan stays"))?;
    let header = read_header(path, Some(&disk.dir)).map_err(|e| e.context("an orphan stays, it is no sound image"))?;
    if header.cluster != disk.blocksize {
        bail!(
            Format,
            "{shown} stays: it has clusters of {} sectors and this disk {}",
            header.cluster.sectors(),
            disk.blocksize.sectors()
        );
    }
    if let Some(other) = other_owner(&disk.dir, &disk.place, path) {
        bail!(InUse, "{shown} stays: {} names it", other.display());
    }
    let file = held.id()?;
    let removed = disk.dir.place(path).and_then(|place| store::unlink_file(&place, file));
    removed.ctx(Kind::Unlink, || format!("cannot remove {shown}"))?;
    descriptor::sync_folder(&disk.dir)?;
    drop(held);
    Ok(())
}

/// Another descriptor in the folder, a copy put aside perhaps, that names the file.
fn other_owner(dir: &Folder, own: &Place, path: &Path) -> Option<PathBuf> {
    let names = dir.names().ok()?;
    let found = names.into_iter().map(|name| dir.entry(name)).find(|other| {
        let name = other.name.as_bytes();
        let maybe = other != own && name.windows(4).any(|w| w.eq_ignore_ascii_case(b".xml"));
        maybe && Descriptor::read_at(other).is_ok_and(|d| d.images.iter().any(|i| i.file == path))
    });
    found.map(|other| other.path())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor::ImageMode;
    use crate::format::header::Version;
    use crate::image::create::create_delta;
    use crate::ops::create::{CreateParams, create_image};
    use crate::units::ClusterSize;

    #[test]
    fn only_orphans_without_users_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().canonicalize().unwrap();
        let cluster = ClusterSize::from_sectors(64).unwrap();
        let first = folder.join("root.hdd");
        create_image(&CreateParams {
            image: first.clone(),
            sectors: 6400,
            cluster,
            version: Version::V2,
            mode: ImageMode::Expanded,
            fs: None,
            without_partition: false,
        })
        .unwrap();
        let dd = folder.join("DiskDescriptor.xml");
        let named = |n: u8| folder.join(format!("root.hdd.{{11111111-2222-4333-8444-5555555555{n:02}}}"));
        for n in 0..3 {
            create_delta(&named(n), Version::V2, cluster, 6400).unwrap();
        }
        // Of a descriptor put aside; one of another kind; ones that are no deltas at all.
        let aside = fs::read_to_string(&dd).unwrap().replace("root.hdd<", &format!("{}<", named(1).display()));
        fs::write(folder.join("old.xml.bak"), aside).unwrap();
        create_delta(&named(3), Version::V2, ClusterSize::DEFAULT, 6400).unwrap();
        fs::write(named(4), "mine").unwrap();
        std::os::unix::fs::symlink(named(0), named(5)).unwrap();
        fs::write(folder.join("root.hdd.bak"), "x").unwrap();
        let lock =
            lock::lock_image(&named(2), None, Access { write: true, direct: false }, Sharing::Exclusive).unwrap();

        let disk = LockedDescriptor::open(&dd).unwrap();
        assert_eq!(orphans(&disk, &first), [named(0), named(1), named(2), named(3), named(4)]);
        leftovers(&disk, false).unwrap();
        assert!(named(0).exists());
        leftovers(&disk, true).unwrap_err();
        let left: Vec<bool> = (0..6).map(|n| named(n).symlink_metadata().is_ok()).collect();
        assert_eq!(left, [false, true, true, true, true, true]);
        drop(lock);
        leftovers(&disk, true).unwrap_err();
        assert!(!named(2).exists() && named(1).exists() && first.exists());
    }
}

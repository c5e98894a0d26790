//! The table in which mount(8) and umount(8) remember what the kernel does not know of a mount: /run/mount/utab. A line of
//! it makes umount(8) call the helper of this program.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use super::mounts::escape;
use crate::sys::file_lock;

const FOLDER: &str = "/run/mount";
const FILE: &str = "utab";
/// What makes umount(8) call `umount.ploop`.
const HELPER: &[u8] = b"helper=ploop";

/// `source`, as the kernel names it, was mounted at `target` by the helper of this program.
pub fn add(source: &Path, target: &Path) -> io::Result<()> {
    add_in(Path::new(FOLDER), source, target)
}

/// The helper's mount at `target` has gone.
pub fn remove(target: &Path) -> io::Result<()> {
    match fs::symlink_metadata(Path::new(FOLDER).join(FILE)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => change(Path::new(FOLDER), target, &[]),
    }
}

fn add_in(folder: &Path, source: &Path, target: &Path) -> io::Result<()> {
    let mut line = OsString::from("SRC=");
    line.push(escape(source));
    line.push(" TARGET=");
    line.push(escape(target));
    line.push(" ROOT=/ OPTS=helper=ploop\n");
    DirBuilder::new().mode(0o755).recursive(true).create(folder)?;
    change(folder, target, line.as_bytes())
}

/// Under the lock of mount(8): the lines of this helper for `target` go, and `more` comes.
fn change(folder: &Path, target: &Path, more: &[u8]) -> io::Result<()> {
    let lock = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o644)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(folder.join("utab.lock"))?;
    file_lock::exclusive(&lock, true)?;
    let path = folder.join(FILE);
    let old = match fs::read(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        other => other?,
    };
    let target = escape(target).into_vec();
    let mut new: Vec<u8> =
        old.split_inclusive(|b| *b == b'\n').filter(|l| !ours(l, &target)).flatten().copied().collect();
    new.extend_from_slice(more);
    if new == old {
        return Ok(());
    }
    let temporary = folder.join(format!("utab.ploop-{}", std::process::id()));
    let written = write(&temporary, &new).and_then(|()| fs::rename(&temporary, &path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file: File = OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(path)?;
    file.write_all(content)
}

fn ours(line: &[u8], target: &[u8]) -> bool {
    let mut fields = line.trim_ascii_end().split(|b| *b == b' ');
    let options = |f: &[u8]| f.strip_prefix(b"OPTS=").is_some_and(|o| o.split(|b| *b == b',').any(|w| w == HELPER));
    fields.clone().any(|f| f.strip_prefix(b"TARGET=") == Some(target)) && fields.any(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_helper_come_and_go_beside_those_of_other_programs() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("mount");
        let read = || fs::read_to_string(folder.join(FILE)).unwrap();
        let other = "SRC=/dev/sda TARGET=/m\\040x ROOT=/ OPTS=uhelper=udisks2\n";
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join(FILE), other).unwrap();
        let target = Path::new("/m x");
        let line = |n: u32| format!("SRC=/dev/ploop{n}p1 TARGET=/m\\040x ROOT=/ OPTS=helper=ploop\n");
        add_in(&folder, Path::new("/dev/ploop0p1"), target).unwrap();
        assert_eq!(read(), format!("{other}{}", line(0)));
        // A stale line is replaced.
        add_in(&folder, Path::new("/dev/ploop1p1"), target).unwrap();
        assert_eq!(read(), format!("{other}{}", line(1)));
        change(&folder, Path::new("/m"), &[]).unwrap();
        assert_eq!(read(), format!("{other}{}", line(1)));
        change(&folder, target, &[]).unwrap();
        assert_eq!(read(), other);
        // Where there is no table yet it is made.
        let fresh = dir.path().join("run/mount");
        add_in(&fresh, Path::new("/dev/ploop0p1"), target).unwrap();
        assert_eq!(fs::read_to_string(fresh.join(FILE)).unwrap(), line(0));
    }
}

//! Device nodes: /dev/NAME and /dev/NAMEpK for every partition, 0660 root:disk.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::{Gid, Uid};

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::server::partitions::Known;
use crate::sys::host;

/// The nodes of one device. Nothing that this did not make is ever replaced or removed.
pub struct Nodes {
    dir: PathBuf,
    name: String,
    made: BTreeMap<PathBuf, u64>,
}

impl Nodes {
    /// For a device without nodes; an existing node of the name belongs to another program.
    pub fn new(dir: &Path, name: &str) -> Nodes {
        Nodes { dir: dir.into(), name: name.into(), made: BTreeMap::new() }
    }

    /// For a device whose former supervisor made nodes: block nodes of its names are its own.
    pub fn existing(dir: &Path, name: &str) -> Nodes {
        let mut nodes = Nodes::new(dir, name);
        for (path, rdev) in existing(dir, name) {
            nodes.made.insert(path, rdev);
        }
        nodes
    }

    /// Node of the whole disk.
    pub fn disk(&self) -> PathBuf {
        self.dir.join(&self.name)
    }

    fn partition(&self, number: u32) -> PathBuf {
        self.dir.join(format!("{}p{number}", self.name))
    }

    /// Makes the nodes match the disk and its partitions.
    pub fn update(&mut self, rdev: u64, partitions: &[Known]) -> Result<()> {
        let mut wanted: BTreeMap<PathBuf, u64> =
            partitions.iter().map(|p| (self.partition(p.number), p.rdev)).collect();
        wanted.insert(self.disk(), rdev);
        // Old ones first: a node that names a missing partition or one of another disk must not be there for an instant
        // longer.
        let stale: Vec<PathBuf> =
            self.made.iter().filter(|(path, rdev)| wanted.get(*path) != Some(rdev)).map(|(p, _)| p.clone()).collect();
        for path in stale {
            self.remove(&path);
        }
        let mut result = Ok(());
        for (path, rdev) in wanted {
            if self.made.get(&path) == Some(&rdev) && block_node(&path) == Some(rdev) {
                continue;
            }
            match make(&path, rdev) {
                Ok(()) => drop(self.made.insert(path, rdev)),
                Err(e) => result = Err(e),
            }
        }
        result
    }

    /// Removes all nodes.
    pub fn clear(&mut self) {
        for path in self.made.keys().cloned().collect::<Vec<_>>() {
            self.remove(&path);
        }
    }

    fn remove(&mut self, path: &Path) {
        if let Some(rdev) = self.made.remove(path)
            && block_node(path) == Some(rdev)
        {
            let _ = fs::remove_file(path);
        }
    }
}

/// Device number of a block node; none for anything else, links included.
pub fn block_node(path: &Path) -> Option<u64> {
    let meta = fs::symlink_metadata(path).ok()?;
    meta.file_type().is_block_device().then(|| meta.rdev())
}

/// Block nodes /dev/NAME and /dev/NAMEpK that exist.
pub fn existing(dir: &Path, name: &str) -> Vec<(PathBuf, u64)> {
    let ours = |file: &str| match file.strip_prefix(name) {
        Some("") => true,
        Some(rest) => rest.strip_prefix('p').is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())),
        None => false,
    };
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries
        .flatten()
        .filter(|e| e.file_name().to_str().is_some_and(ours))
        .filter_map(|e| Some((e.path(), block_node(&e.path())?)))
        .collect()
}

/// Makes a node under a temporary name and gives it its own if that is free. An equal node that exists is accepted.
pub fn make(path: &Path, rdev: u64) -> Result<()> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let temporary = path.with_file_name(format!(".{name}.new-{}", host::pid()));
    let make = || -> io::Result<bool> {
        let _ = fs::remove_file(&temporary);
        mknod(&temporary, SFlag::S_IFBLK, Mode::from_bits_truncate(0o600), rdev)?;
        nix::unistd::chown(&temporary, Some(Uid::from_raw(0)), Some(disk_group()))?;
        fs::set_permissions(&temporary, std::os::unix::fs::PermissionsExt::from_mode(0o660))?;
        match renameat2(AT_FDCWD, &temporary, AT_FDCWD, path, RenameFlags::RENAME_NOREPLACE) {
            Err(nix::Error::EEXIST) => Ok(false),
            other => Ok(other.map(|()| true)?),
        }
    };
    let made = make();
    if !matches!(made, Ok(true)) {
        let _ = fs::remove_file(&temporary);
    }
    if !made.ctx(Kind::Mknod, || format!("cannot make the node {}", path.display()))? && block_node(path) != Some(rdev)
    {
        bail!(Mknod, "{} exists and is not a node of this device; it is left alone", path.display());
    }
    Ok(())
}

/// Group `disk`; by /etc/group alone, since a server must not load name service modules. 6 where there is none.
fn disk_group() -> Gid {
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let id = groups.lines().find_map(|l| l.strip_prefix("disk:")?.split(':').nth(1)?.parse().ok());
    Gid::from_raw(id.unwrap_or(6))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_follow_and_strangers_stay() {
        let dir = tempfile::tempdir().unwrap();
        let probe = dir.path().join("x");
        if mknod(&probe, SFlag::S_IFBLK, Mode::from_bits_truncate(0o600), nix::sys::stat::makedev(7, 1)).is_err() {
            crate::testing::skip::skip("making device nodes needs root");
            return;
        }
        let rdev = nix::sys::stat::makedev(259, 200);
        let part = |number, rdev| Known { number, rdev, start: 0, length: 512 };
        let mut nodes = Nodes::new(dir.path(), "ploop3");
        nodes.update(rdev, &[part(1, rdev + 1), part(2, rdev + 2)]).unwrap();
        assert_eq!(existing(dir.path(), "ploop3").len(), 3);
        let meta = fs::metadata(nodes.disk()).unwrap();
        assert_eq!((meta.mode() & 0o777, meta.uid(), meta.rdev()), (0o660, 0, rdev));

        nodes.update(rdev, &[part(2, rdev + 3)]).unwrap();
        assert_eq!(block_node(&dir.path().join("ploop3p2")), Some(rdev + 3));
        assert_eq!(block_node(&dir.path().join("ploop3p1")), None);

        let strange = dir.path().join("ploop3p1");
        fs::write(&strange, "mine").unwrap();
        assert_eq!(nodes.update(rdev, &[part(1, rdev + 1)]).unwrap_err().kind(), Kind::Mknod);
        let mut adopted = Nodes::existing(dir.path(), "ploop3");
        adopted.clear();
        assert_eq!(fs::read(&strange).unwrap(), b"mine");
        assert!(existing(dir.path(), "ploop3").is_empty() && probe.exists());
        // No temporary names are left.
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}

//! Copies of one file system: a snapshot beside its disk, a clone of a template. The kernel tells file systems of some types
//! by their UUID, and mounts no second one, or takes it for the first.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use super::mounts;
use super::probe::{self, Found};

/// Where another XFS with the UUID of the one on `device` is mounted, and known to the kernel by it; none: nowhere in this
/// mount namespace.
pub fn of_xfs(device: &Path) -> Option<PathBuf> {
    let uuid = uuid(device, Found::Xfs)?;
    let own = fs::metadata(device).ok()?.rdev();
    let same = |mount: &mounts::Mount| {
        let node = PathBuf::from(format!("/dev/block/{}:{}", major(mount.dev), minor(mount.dev)));
        let node = if node.exists() { node } else { mount.source.clone() };
        let is_it = fs::metadata(&node).is_ok_and(|m| m.rdev() == mount.dev);
        is_it && self::uuid(&node, Found::Xfs) == Some(uuid)
    };
    let table = mounts::read().ok()?;
    let known = |m: &mounts::Mount| m.fstype == "xfs" && !m.options.split(',').any(|o| o == "nouuid");
    table.into_iter().find(|m| known(m) && m.dev != own && same(m)).map(|m| m.target)
}

/// The devices of a mounted btrfs that has the UUID of the one on `device`, which is not one of them. None also where the
/// kernel can tell two of one device each apart (temp_fsid, 6.7).
pub fn of_btrfs(device: &Path) -> Option<Vec<String>> {
    let rdev = fs::metadata(device).ok()?.rdev();
    let own = fs::read_link(format!("/sys/dev/block/{}:{}", major(rdev), minor(rdev))).ok()?;
    of_btrfs_in(Path::new("/sys/fs/btrfs"), &uuid(device, Found::Btrfs)?, own.file_name()?.to_str()?)
}

fn of_btrfs_in(sys: &Path, uuid: &[u8; 16], own: &str) -> Option<Vec<String>> {
    let devices = sys.join(uuid::Uuid::from_bytes(*uuid).hyphenated().to_string()).join("devices");
    let entries = fs::read_dir(devices).ok()?;
    let used: Vec<String> = entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
    let tells_apart = used.len() == 1 && sys.join("features/temp_fsid").exists();
    (!used.is_empty() && !used.iter().any(|name| name == own) && !tells_apart).then_some(used)
}

/// The UUID in the superblock, if the file system is of that type.
fn uuid(device: &Path, wanted: Found) -> Option<[u8; 16]> {
    let file = fs::File::open(device).ok()?;
    let mut read = |offset: u64, buf: &mut [u8]| -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&file, buf, offset)
    };
    if probe::find(&mut read).ok()?? != wanted {
        return None;
    }
    let mut uuid = [0; 16];
    read(if wanted == Found::Btrfs { 65536 + 32 } else { 32 }, &mut uuid).ok()?;
    Some(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_btrfs_with_the_uuid_of_a_mounted_one() {
        let sys = tempfile::tempdir().unwrap();
        let mut disk = vec![0u8; 128 << 10];
        disk[65536 + 64..65536 + 72].copy_from_slice(b"_BHRfS_M");
        disk[65536 + 32..65536 + 48].copy_from_slice(&[0xAB; 16]);
        let image = sys.path().join("image");
        fs::write(&image, &disk).unwrap();
        let id = uuid(&image, Found::Btrfs).unwrap();
        assert_eq!(id, [0xAB; 16]);
        assert_eq!(uuid(&image, Found::Xfs), None);
        assert_eq!(of_btrfs_in(sys.path(), &id, "loop1"), None);
        let devices = sys.path().join("abababab-abab-abab-abab-abababababab/devices");
        fs::create_dir_all(devices.join("loop10000p1")).unwrap();
        assert_eq!(of_btrfs_in(sys.path(), &id, "loop1"), Some(vec!["loop10000p1".into()]));
        // It is mounted itself already.
        assert_eq!(of_btrfs_in(sys.path(), &id, "loop10000p1"), None);
        fs::create_dir_all(sys.path().join("features/temp_fsid")).unwrap();
        assert_eq!(of_btrfs_in(sys.path(), &id, "loop1"), None);
        fs::create_dir_all(devices.join("sdb")).unwrap();
        assert_eq!(of_btrfs_in(sys.path(), &id, "loop1").map(|d| d.len()), Some(2));
    }
}

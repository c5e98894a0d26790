//! Block devices that stand on another one: device-mapper (LVM, LUKS), md and the like, and loop devices over it.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, makedev, minor};

/// One of them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Holder {
    /// `/dev/loop3`, `/dev/mapper/secret`.
    pub node: PathBuf,
    /// The command that ends it.
    pub end: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} ({})", self.node.display(), self.end)
    }
}

/// What stands on the disk of this device number, or on a partition of it. Where /sys cannot be read: nothing.
pub fn of(rdev: u64) -> Vec<Holder> {
    of_in(Path::new("/sys"), rdev)
}

/// The kernel ends this block device when its last user closes it: `losetup -d` or `losetup -D` asked for that.
pub fn ends_with_its_last_user(disk: &str) -> bool {
    let flag = fs::read_to_string(Path::new("/sys/block").join(disk).join("loop/autoclear"));
    flag.is_ok_and(|flag| flag.trim() == "1")
}

fn of_in(sys: &Path, rdev: u64) -> Vec<Holder> {
    let disk = sys.join(format!("dev/block/{}:{}", major(rdev), minor(rdev)));
    let mut parts = vec![disk.clone()];
    parts.extend(entries(&disk).filter(|dir| dir.join("partition").exists()));
    let numbers: Vec<u64> = parts.iter().filter_map(|dir| number(&fs::read_to_string(dir.join("dev")).ok()?)).collect();
    let mut found: Vec<Holder> = parts
        .iter()
        .flat_map(|dir| entries(&dir.join("holders")))
        .filter_map(|holder| Some(named(sys, holder.file_name()?.to_str()?)))
        .collect();
    for block in entries(&sys.join("block")) {
        let Some(name) = block.file_name().and_then(|n| n.to_str()).filter(|n| n.starts_with("loop")) else { continue };
        let Ok(backing) = fs::read_to_string(block.join("loop/backing_file")) else { continue };
        let over = fs::metadata(backing.trim_end_matches('\n'));
        if over.is_ok_and(|m| m.file_type().is_block_device() && numbers.contains(&m.rdev())) {
            let node = Path::new("/dev").join(name);
            found.push(Holder { end: format!("losetup -d {}", node.display()), node });
        }
    }
    found.dedup();
    found
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn number(text: &str) -> Option<u64> {
    let (major, minor) = text.trim().split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

fn named(sys: &Path, name: &str) -> Holder {
    let of = |file: &str| fs::read_to_string(sys.join("block").join(name).join(file)).unwrap_or_default();
    let (mapped, uuid) = (of("dm/name"), of("dm/uuid"));
    let mapped = mapped.trim();
    if mapped.is_empty() {
        let node = Path::new("/dev").join(name);
        let end = match name.starts_with("md") {
            true => format!("mdadm --stop {}", node.display()),
            false => "end it first".into(),
        };
        return Holder { node, end };
    }
    let end = match uuid.split('-').next() {
        Some("CRYPT") => format!("cryptsetup close {mapped}"),
        Some("LVM") => format!("lvchange -an /dev/mapper/{mapped}"),
        _ => format!("dmsetup remove {mapped}"),
    };
    Holder { node: Path::new("/dev/mapper").join(mapped), end }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_of_the_disk_and_of_its_partitions() {
        let sys = tempfile::tempdir().unwrap();
        let file = |path: &str, text: &str| {
            let path = sys.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        file("dev/block/7:5/dev", "7:5\n");
        file("dev/block/7:5/loop5p1/partition", "1\n");
        file("dev/block/7:5/loop5p1/dev", "259:0\n");
        file("dev/block/7:5/loop5p1/holders/dm-3", "");
        file("dev/block/7:5/queue/holders/dm-9", "");
        file("dev/block/7:5/holders/md0", "");
        file("block/dm-3/dm/name", "secret\n");
        file("block/dm-3/dm/uuid", "CRYPT-LUKS2-1234-secret\n");
        file("block/loop6/loop/backing_file", "/dev/null\n");
        let found: Vec<String> = of_in(sys.path(), makedev(7, 5)).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["/dev/md0 (mdadm --stop /dev/md0)", "/dev/mapper/secret (cryptsetup close secret)"]);
        assert!(of_in(sys.path(), makedev(7, 6)).is_empty());
    }
}

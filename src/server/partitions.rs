//! Partitions of a device: those that the kernel knows, and those that it has to be given because it cannot read the table.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::sys::stat::makedev;

use crate::format::gpt::{Gpt, Partition};
use crate::format::mbr;
use crate::server::sysfs::parse_dev;
use crate::sys::partition;
use crate::units::SECTOR;

/// A partition that the kernel shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Known {
    pub number: u32,
    pub rdev: u64,
    /// Bytes.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

/// Partitions of disk `backing` as the kernel has them now, by number. Opens no device.
pub fn known(backing: &str) -> Vec<Known> {
    known_in(&Path::new("/sys/block").join(backing))
}

fn known_in(disk: &Path) -> Vec<Known> {
    let Ok(entries) = fs::read_dir(disk) else { return Vec::new() };
    let name = disk.file_name().unwrap_or_default().as_bytes();
    let mut all: Vec<Known> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            // Among some thirty attributes of the disk.
            if !entry.file_name().as_bytes().starts_with(name) {
                return None;
            }
            let dir = entry.path();
            let number = |file| fs::read_to_string(dir.join(file)).ok()?.trim().parse::<u64>().ok();
            let (major, minor) = parse_dev(&fs::read_to_string(dir.join("dev")).ok()?)?;
            Some(Known {
                number: number("partition")?.try_into().ok()?,
                rdev: makedev(major, minor),
                start: number("start")? * SECTOR,
                length: number("size")? * SECTOR,
            })
        })
        .collect();
    all.sort_by_key(|p| p.number);
    all
}

/// Partitions of the disk's GPT, else of its MBR, by number.
pub fn in_table(disk: &File) -> io::Result<Vec<Partition>> {
    let size = partition::size(disk.as_fd())?;
    let mut read = |buf: &mut [u8], at: u64| disk.read_exact_at(buf, at);
    match Gpt::parse(size, &mut read)? {
        Some(table) => Ok(table.partitions().collect()),
        None => mbr::parse(size, &mut read),
    }
}

/// Gives the kernel the partitions of the disk's table if it shows none: then it has no parser for it. Else the program that
/// changes the table keeps the kernel informed, and we must not interfere.
pub fn scan(backing: &str, disk: &File) -> io::Result<()> {
    if !known(backing).is_empty() {
        return Ok(());
    }
    for p in in_table(disk)? {
        match partition::add(disk.as_fd(), p.number as i32, p.start, p.length) {
            // Overlaps another entry, or another process was faster.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            other => other?,
        }
    }
    Ok(())
}

/// Gives back partitions that were taken away.
pub fn restore(disk: &File, partitions: &[Known]) {
    for p in partitions {
        // One that is there again needs no help.
        let _ = partition::add(disk.as_fd(), p.number as i32, p.start, p.length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_view() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("loop5");
        for (name, number, dev) in [("loop5p2", "2\n", "259:1\n"), ("loop5p1", "1\n", "259:7\n")] {
            fs::create_dir_all(disk.join(name)).unwrap();
            fs::write(disk.join(name).join("partition"), number).unwrap();
            fs::write(disk.join(name).join("dev"), dev).unwrap();
            fs::write(disk.join(name).join("start"), "2048\n").unwrap();
            fs::write(disk.join(name).join("size"), "8\n").unwrap();
        }
        fs::create_dir(disk.join("queue")).unwrap();
        let known = |number, minor| Known { number, rdev: makedev(259, minor), start: 1 << 20, length: 4096 };
        assert_eq!(known_in(&disk), [known(1, 7), known(2, 1)]);
    }
}

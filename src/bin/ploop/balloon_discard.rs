//! `ploop balloon discard`: the classic's way to compact a running disk.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use ploop::error::Kind;
use ploop::ops::discard::{self, DiscardParams, DiscardStat};
use ploop::ops::find;

use crate::getopt::Parsed;
use crate::{Command, Fail, disk, result, values};

const AUTOMOUNT: char = '\u{11}';
const TO_FREE: char = '\u{12}';
const MIN_BLOCK: char = '\u{13}';
const DEFRAG: char = '\u{14}';
const STAT: char = '\u{15}';

pub const COMMAND: Command = Command {
    name: "balloon discard",
    short: "d:m:",
    long: &[
        ("automount", false, AUTOMOUNT),
        ("to-free", true, TO_FREE),
        ("min-block", true, MIN_BLOCK),
        ("defrag", false, DEFRAG),
        ("stat", false, STAT),
    ],
    usage: USAGE,
    run,
};

const USAGE: &str = "\
Usage: ploop balloon discard [--to-free SIZE] [--min-block SIZE] [--defrag] [--automount] DiskDescriptor.xml
       ploop balloon discard [--to-free SIZE] [--min-block SIZE] { -d DEVICE | -m DIR }
       ploop balloon discard --stat { DiskDescriptor.xml | -d DEVICE | -m DIR }

Gives space that the file system inside a mounted disk does not use back to the host; the longest free extents first. ploop
compact does the same, at a limited rate.

  --automount       mount a disk that is not mounted, for the time of the work
  --to-free SIZE    end when so much is freed: a number and K, M, G or T (without: sectors)
  --min-block SIZE  the shortest free extent that is worth freeing; the cluster
  --defrag          defragment the file system first, if e4defrag2 is installed
  --stat            only tell the sizes of balloon, data, disk and image

For example:
  ploop balloon discard /vz/1/DiskDescriptor.xml
";

/// Wrong use: this command alone has status 1 for it.
fn misuse<T>(message: &str) -> Result<T, Fail> {
    if !message.is_empty() {
        eprintln!("ploop balloon discard: {message}");
    }
    eprint!("{USAGE}");
    Err(Fail::Status(1))
}

enum Target {
    Disk(PathBuf),
    Mounted(String, PathBuf),
}

fn run(parsed: Parsed) -> Result<(), Fail> {
    let (mut device, mut folder, mut stat) = (None, None, false);
    let mut params = DiscardParams::default();
    for (option, value) in &parsed.options {
        let bytes = |value: &OsStr| values::size(value).map(|sectors| sectors.saturating_mul(512));
        match *option {
            'd' => device = Some(values::text(value, "device name")?),
            'm' => folder = Some(PathBuf::from(value)),
            AUTOMOUNT => params.automount = true,
            TO_FREE => params.to_free = bytes(value)?,
            MIN_BLOCK => params.shortest = bytes(value)?,
            DEFRAG => params.defrag = true,
            _ => stat = true,
        }
    }
    let target = match (device, folder, &parsed.operands[..]) {
        (None, None, [operand]) => Target::Disk(PathBuf::from(disk::meant(operand)?)),
        (Some(device), Some(folder), []) => Target::Mounted(device, folder),
        (Some(device), None, []) => match find::mnt_by_dev(&device) {
            Ok(Some(folder)) => Target::Mounted(device, folder),
            Ok(None) => return misuse(&format!("{device} is not mounted")),
            Err(e) => return misuse(&e.to_string()),
        },
        (None, Some(folder), []) => match find::by_mount_point(&folder)? {
            Some((device, _)) => Target::Mounted(values::text(device.node().as_os_str(), "device name")?, folder),
            None => return misuse(&format!("{} is no mount point of a ploop device", folder.display())),
        },
        _ => return misuse(""),
    };
    if let Target::Disk(path) = &target
        && !path.exists()
    {
        eprintln!("ploop balloon discard: there is no {}", path.display());
        return Err(Fail::Status(Kind::DiskDescr as u8));
    }
    if stat {
        return show(match &target {
            Target::Disk(path) => discard::stat(path, "")?,
            Target::Mounted(device, folder) => discard::stat_by_dev(device, folder)?,
        });
    }
    let mut stop = || false;
    let done = match &target {
        Target::Disk(path) => discard::discard(path, "", &params, &mut stop),
        Target::Mounted(device, folder) => {
            // As the classic: by device it neither mounts nor defragments.
            let params = DiscardParams { automount: false, defrag: false, ..params };
            discard::discard_by_dev(device, Path::new(folder), &params, &mut stop)
        }
    };
    match done {
        Ok(_) => Ok(()),
        // The classic's status when the work itself has failed.
        Err(e) if e.kind() == Kind::Reloc => {
            ploop::report::error(&e);
            Err(Fail::Status(255))
        }
        Err(e) => Err(e.into()),
    }
}

fn show(stat: DiscardStat) -> Result<(), Fail> {
    let line = |name: &str, bytes: u64| format!("{name:<14}{:>8}MB", bytes >> 20);
    result(format_args!(
        "{}\n{}\n{}\n{}",
        line("Balloon size:", stat.balloon),
        line("Data size:", stat.data),
        line("Ploop size:", stat.disk),
        line("Image size:", stat.image)
    ))
}

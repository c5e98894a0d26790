//! `ploop umount`: unmounts the file system, detaches the device, closes the image.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use ploop::error::{Error, Kind};
use ploop::ops::deleted::Deleted;
use ploop::ops::find;
use ploop::ops::umount::{self, Umount};
use ploop::ops::umount_all::umount_all;
use ploop::report;

use crate::getopt::Parsed;
use crate::{Command, Fail, disk, mistake, misuse, values};

pub const COMMAND: Command = Command {
    name: "umount",
    short: "d:m:c:",
    long: &[
        ("abort", true, ABORT),
        ("all", false, ALL),
        ("timeout", true, TIMEOUT),
        ("save-deleted", false, SAVE),
        ("discard-deleted", false, DISCARD),
    ],
    usage: "\
Usage: ploop umount [DELETED] -d DEVICE
       ploop umount [DELETED] -m DIR
       ploop umount [DELETED] [-c NAME] DiskDescriptor.xml
       ploop umount [DELETED] [-c NAME] BASE_FILE
       ploop umount [DELETED] DIR | DEVICE
       ploop umount --abort DEVICE
       ploop umount [DELETED] --all [--timeout SECONDS]

Unmounts the file system wherever it is mounted, detaches the device, closes the image.

  -d DEVICE        by device, like /dev/ploop0
  -m DIR           by mount point
  -c NAME          the mount of this component
  --abort DEVICE   give up a device whose server cannot serve it any more: waiting I/O fails. Writes that were answered
                   are kept for the next mount, unless a sync of the image had failed
  --all            all disks of this machine, with all that is mounted inside them; a disk whose file system has
                   images of other disks comes after those; says which are still there at the end, and why
  --timeout SECONDS
                   with --all: how long their users are waited for (60)

A disk with an image that was deleted meanwhile is not unmounted without one of these (DELETED): its server alone has
the file.

  --save-deleted     copy the image back under its name
  --discard-deleted  let it go

For example:
  ploop umount /mnt
",
    run,
};

const ABORT: char = '\u{11}';
const ALL: char = '\u{12}';
const TIMEOUT: char = '\u{13}';
const SAVE: char = '\u{14}';
const DISCARD: char = '\u{15}';
/// Seconds for `--all`.
const PATIENCE: u64 = 60;

fn run(parsed: Parsed) -> Result<(), Fail> {
    let mut device = None;
    let mut folder = None;
    let mut component = String::new();
    let mut abort = None;
    let mut all = false;
    let mut patience = None;
    let mut how = Umount::default();
    for (option, value) in parsed.options {
        match option {
            'd' => device = Some(values::text(&value, "device name")?),
            'm' => folder = Some(value),
            'c' => component = values::text(&value, "component name")?,
            ALL => all = true,
            TIMEOUT => patience = Some(values::number(&value, "time limit")?),
            SAVE => how.deleted = Deleted::Save,
            DISCARD => how.deleted = Deleted::Discard,
            ABORT => abort = Some(values::text(&value, "device name")?),
            _ => return misuse(),
        }
    }
    if all {
        let others = device.is_some() || folder.is_some() || abort.is_some() || !parsed.operands.is_empty();
        if others || !component.is_empty() {
            return misuse();
        }
        return everything(Duration::from_secs(patience.unwrap_or(PATIENCE)), how);
    }
    if patience.is_some() {
        return misuse();
    }
    if let Some(device) = abort {
        return Ok(umount::abort(&device)?);
    }
    if let Some(device) = device {
        return Ok(how.node(&device, None)?);
    }
    if let Some(folder) = folder {
        return Ok(how.mountpoint(Path::new(&folder))?);
    }
    let [given] = &parsed.operands[..] else { return misuse() };
    // A mount point or a device, as umount(8) takes them.
    if !values::is_descriptor(given) && component.is_empty() {
        if find::by_mount_point(Path::new(given))?.is_some() {
            return Ok(how.mountpoint(Path::new(given))?);
        }
        if given.as_bytes().starts_with(b"/dev/") {
            return Ok(how.node(&values::text(given, "device name")?, None)?);
        }
    }
    let disk = disk::meant(given)?;
    if Path::new(&disk).is_dir() {
        return Err(mistake(format!(
            "folder {} has no DiskDescriptor.xml in it, and no ploop device is mounted on it",
            Path::new(&disk).display()
        )));
    }
    match values::is_descriptor(&disk) {
        true => how.descriptor(Path::new(&disk), &component)?,
        false => how.base(Path::new(&disk), &component)?,
    }
    Ok(())
}

/// Unmounts all disks; prints one line for each disk that failed. The error is `Umount` if a disk is still there, else
/// that of the first disk.
fn everything(limit: Duration, how: Umount) -> Result<(), Fail> {
    let outcomes = umount_all(limit, how)?;
    let count = outcomes.len();
    let left = outcomes.iter().filter(|o| !o.gone).count();
    let mut first = None;
    for o in outcomes {
        let Some(error) = o.error else { continue };
        let what = if o.gone { "is gone, its image stays marked in use" } else { "is still there" };
        report::warn(format_args!("{} ({}) {what}: {error}", o.name, o.base.display()));
        first.get_or_insert(error.kind());
    }
    if left > 0 {
        return Err(Error::new(Kind::Umount, format!("{left} of {count} disks are still there")).into());
    }
    match first {
        Some(kind) => {
            Err(Error::new(kind, "all disks are detached, but not all images closed cleanly; see ploop check").into())
        }
        None => {
            report::say(0, format_args!("{count} disks are detached"));
            Ok(())
        }
    }
}

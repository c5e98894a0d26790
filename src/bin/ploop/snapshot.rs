//! `ploop snapshot`, `tsnapshot`, `snapshot-delete` and `snapshot-switch`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use ploop::format::guid::Guid;
use ploop::ops::snapshot::{self, SnapshotParams, TemporaryParams};
use ploop::ops::switch::{self, SwitchParams};

use crate::getopt::Parsed;
use crate::{Command, Fail, misuse, result, values};

pub const SNAPSHOT: Command = Command {
    name: "snapshot",
    short: "u:d:F",
    long: &[],
    usage: "\
Usage: ploop snapshot [-u UUID] DiskDescriptor.xml
       ploop snapshot [-F] -d DEVICE FILE

The first form takes a snapshot of a disk, mounted or not; the file system of a mounted one is brought to rest first.
The second one puts a new image FILE on top of a running device; no descriptor is changed.

  -u UUID    of the snapshot; else a random one
  -d DEVICE  like /dev/ploop0
  -F         bring the file system of the device to rest first

For example:
  ploop snapshot /vz/1/DiskDescriptor.xml
",
    run: take,
};

pub const TSNAPSHOT: Command = Command {
    name: "tsnapshot",
    short: "u:c:m:o:",
    long: &[],
    usage: "\
Usage: ploop tsnapshot -u UUID -c NAME [-m DIR [-o OPTIONS]] DiskDescriptor.xml

Takes a snapshot and mounts it read-only, for backups. After it is unmounted, the next mount of the disk or operation on
its snapshots removes it.

  -u UUID  of the snapshot
  -c NAME  component: a name for this additional mount, given again to umount
  -m DIR   mount its file system here; without it only the device is made
  -o OPTIONS
           mount options

For example:
  ploop tsnapshot -u 11111111-2222-4333-8444-555555555555 -c backup -m /mnt /vz/1/DiskDescriptor.xml
",
    run: take_temporary,
};

pub const SWITCH: Command = Command {
    name: "snapshot-switch",
    short: "u:D",
    long: &[],
    usage: "\
Usage: ploop snapshot-switch -u UUID [-D] DiskDescriptor.xml

Goes back to a snapshot: what was written since is dropped. The disk must not be mounted.

  -u UUID  of the snapshot
  -D       keep what was written since as another snapshot

For example:
  ploop snapshot-switch -u 11111111-2222-4333-8444-555555555555 /vz/1/DiskDescriptor.xml
",
    run: switch_to,
};

pub const DELETE: Command = Command {
    name: "snapshot-delete",
    short: "u:",
    long: &[],
    usage: "\
Usage: ploop snapshot-delete -u UUID DiskDescriptor.xml

Deletes a snapshot. Deltas that stand on it keep their content. A snapshot on which several deltas stand is removed when
only one of them is left.

For example:
  ploop snapshot-delete -u 11111111-2222-4333-8444-555555555555 /vz/1/DiskDescriptor.xml
",
    run: delete,
};

/// The one operand, if it is a descriptor.
fn descriptor(operands: &[OsString]) -> Result<&Path, Fail> {
    match operands {
        [one] if values::is_descriptor(one) => Ok(Path::new(one)),
        _ => misuse(),
    }
}

fn take(parsed: Parsed) -> Result<(), Fail> {
    let mut guid = None;
    let mut device = None;
    let mut sync = false;
    for (option, value) in &parsed.options {
        match option {
            'u' => guid = Some(values::guid(value)?),
            'd' => device = Some(values::text(value, "device name")?),
            'F' => sync = true,
            _ => return misuse(),
        }
    }
    if let Some(device) = device {
        let [file] = &parsed.operands[..] else { return misuse() };
        return Ok(ploop::ops::device_chain::put_on_top(&device, Path::new(file), sync)?);
    }
    let params = SnapshotParams { guid: guid.unwrap_or_else(Guid::generate), snap_dir: None, temporary: false };
    Ok(snapshot::create(descriptor(&parsed.operands)?, "", &params)?)
}

fn take_temporary(parsed: Parsed) -> Result<(), Fail> {
    let mut guid = None;
    let mut component = None;
    let mut target = None;
    let mut options = None;
    for (option, value) in &parsed.options {
        match option {
            'u' => guid = Some(values::guid(value)?),
            'c' => component = Some(values::text(value, "component name")?),
            'm' => target = Some(PathBuf::from(value)),
            'o' => options = Some(values::text(value, "mount options")?),
            _ => return misuse(),
        }
    }
    let (Some(guid), Some(component)) = (guid, component) else { return misuse() };
    let params = TemporaryParams { guid, snap_dir: None, target, options, with_holder: false };
    let taken = snapshot::create_temporary(descriptor(&parsed.operands)?, &component, &params)?;
    result(format_args!("{guid} is mounted as {}", taken.device))
}

/// The GUID, which must be given, and whether there was another option.
fn named(parsed: &Parsed) -> Result<(Guid, bool), Fail> {
    let mut guid = None;
    let mut other = false;
    for (option, value) in &parsed.options {
        match option {
            'u' => guid = Some(values::guid(value)?),
            _ => other = true,
        }
    }
    match guid {
        Some(guid) => Ok((guid, other)),
        None => misuse(),
    }
}

fn switch_to(parsed: Parsed) -> Result<(), Fail> {
    let (guid, keep_top) = named(&parsed)?;
    let params = SwitchParams { guid, guid_old: None, keep_top, no_new_top: false };
    Ok(switch::switch(descriptor(&parsed.operands)?, "", &params)?)
}

fn delete(parsed: Parsed) -> Result<(), Fail> {
    let (guid, _) = named(&parsed)?;
    Ok(snapshot::delete(descriptor(&parsed.operands)?, &guid)?)
}

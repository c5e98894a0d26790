//! `ploop umount`: the file system and the device go, the image is closed.

use std::path::Path;

use ploop::ops::umount;

use crate::getopt::Parsed;
use crate::{Command, Fail, misuse, values};

pub const COMMAND: Command = Command {
    name: "umount",
    short: "d:m:c:",
    long: &[("abort", true, ABORT)],
    usage: "\
Usage: ploop umount -d DEVICE
       ploop umount -m DIR
       ploop umount [-c NAME] DiskDescriptor.xml
       ploop umount [-c NAME] BASE_FILE
       ploop umount --abort DEVICE

Unmounts the file system wherever it is mounted, detaches the device, closes the image.

  -d DEVICE        by device, like /dev/ploop0
  -m DIR           by mount point
  -c NAME          the mount of this component
  --abort DEVICE   give up a device whose server cannot serve it any more: waiting I/O fails, what was not flushed is
                   lost. The image stays marked in use; mounting it by its descriptor repairs it
",
    run,
};

const ABORT: char = '\u{11}';

fn run(parsed: Parsed) -> Result<(), Fail> {
    let mut device = None;
    let mut folder = None;
    let mut component = String::new();
    let mut abort = None;
    for (option, value) in parsed.options {
        match option {
            'd' => device = Some(values::text(&value, "device name")?),
            'm' => folder = Some(value),
            'c' => component = values::text(&value, "component name")?,
            ABORT => abort = Some(values::text(&value, "device name")?),
            _ => return misuse(),
        }
    }
    if let Some(device) = abort {
        return Ok(umount::abort(&device)?);
    }
    if let Some(device) = device {
        return Ok(umount::umount_device(&device, None)?);
    }
    if let Some(folder) = folder {
        return Ok(umount::umount_mountpoint(Path::new(&folder))?);
    }
    let [disk] = &parsed.operands[..] else { return misuse() };
    match values::is_descriptor(disk) {
        true => umount::umount_descriptor(Path::new(disk), &component)?,
        false => umount::umount_base(Path::new(disk), &component)?,
    }
    Ok(())
}

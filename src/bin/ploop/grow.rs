//! `ploop grow`: a larger disk; what is inside stays as it is.

use std::path::Path;

use ploop::descriptor::ImageMode;
use ploop::ops::grow;

use crate::getopt::Parsed;
use crate::{Command, Fail, mistake, misuse, values};

pub const COMMAND: Command = Command {
    name: "grow",
    short: "s:d:f:",
    long: &[("size", true, 's'), ("device", true, 'd'), ("format", true, 'f')],
    usage: "\
Usage: ploop grow -s SIZE { DiskDescriptor.xml | -d DEVICE | [-f raw] FILE }

Makes a disk larger, by its top image, whether it is mounted or not, or a single image file that no device uses. Neither the
partition table nor the file system inside are changed (ploop resize does that, too). The device of a mounted disk is
larger at once. Interrupted, it is finished by the same command.

  -s, --size SIZE    the new size: a number and K, M, G or T (without: sectors); for a ploop image a multiple of
                     its cluster
  -d, --device DEV   the disk that runs as this device
  -f, --format raw   FILE is a raw image

For example, with the disk /vz/1/DiskDescriptor.xml, or the one that is mounted as /dev/ploop0:
  ploop grow -s 32g /vz/1/DiskDescriptor.xml
  ploop grow -s 32g -d /dev/ploop0
",
    run,
};

fn run(parsed: Parsed) -> Result<(), Fail> {
    let (mut size, mut raw, mut device) = (None, false, None);
    for (option, value) in &parsed.options {
        match option {
            's' => size = Some(values::size(value)?),
            'd' => device = Some(values::text(value, "device name")?),
            'f' => raw = values::format(value)? == ImageMode::Raw,
            _ => return misuse(),
        }
    }
    let Some(size) = size.filter(|size| *size > 0) else {
        return Err(Fail::Usage(Some("ploop grow: the new size is missing, or 0 (-s)".into())));
    };
    if let Some(device) = device {
        if raw {
            return Err(mistake("ploop grow: -f raw is for files, not for devices (-d)"));
        }
        return match parsed.operands[..] {
            [] => Ok(grow::grow_device(&device, size)?),
            _ => misuse(),
        };
    }
    let [file] = &parsed.operands[..] else { return misuse() };
    match values::is_descriptor(file) {
        true => Ok(grow::grow_disk(Path::new(file), size)?),
        false => Ok(grow::grow_image(Path::new(file), raw, size)?),
    }
}

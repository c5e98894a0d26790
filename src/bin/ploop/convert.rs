//! `ploop convert`: another format or version for a disk.

use std::path::Path;

use ploop::format::header::Version;
use ploop::ops::convert;

use crate::getopt::Parsed;
use crate::{Command, Fail, mistake, misuse, values};

pub const COMMAND: Command = Command {
    name: "convert",
    short: "f:v:",
    long: &[("format", true, 'f'), ("version", true, 'v')],
    usage: "\
Usage: ploop convert { -f FORMAT | -v VERSION } DiskDescriptor.xml

Changes the format of a disk that is not mounted; its content stays.

  -f, --format FORMAT    of the base image: raw, expanded or preallocated. A raw disk stays raw
  -v, --version VERSION  of all images: 1 or 2

To raw and to preallocated take the space of the whole disk on the host; to raw, beside that of the image for as long as
it runs. An interrupted conversion is finished or undone by the next operation on the disk.

For example, with the disk /vz/1/DiskDescriptor.xml:
  ploop convert -f raw /vz/1/DiskDescriptor.xml
",
    run,
};

fn run(parsed: Parsed) -> Result<(), Fail> {
    let (mut format, mut version) = (None, None);
    for (option, value) in &parsed.options {
        match option {
            'f' => format = Some(values::format(value)?),
            'v' => {
                version = Some(match values::number(value, "version")? {
                    1 => Version::V1,
                    2 => Version::V2,
                    n => return Err(mistake(format!("Incorrect version {n}: must be 1 or 2"))),
                })
            }
            _ => return misuse(),
        }
    }
    let Some(disk) = parsed.operands.first() else { return misuse() };
    match (format, version) {
        (Some(format), None) => Ok(convert::convert_disk(Path::new(disk), format)?),
        (None, Some(version)) => Ok(convert::change_version(Path::new(disk), version)?),
        _ => Err(Fail::Usage(Some("ploop convert: exactly one of -f and -v is needed".into()))),
    }
}

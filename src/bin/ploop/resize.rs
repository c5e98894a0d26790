//! `ploop resize`: a larger disk with a larger file system.

use std::path::Path;

use ploop::ops::{resize, resize_balloon};

use crate::getopt::Parsed;
use crate::{Command, Fail, misuse, values};

pub const COMMAND: Command = Command {
    name: "resize",
    short: "s:b",
    long: &[("size", true, 's'), ("balloon", false, 'b')],
    usage: "\
Usage: ploop resize -s SIZE DiskDescriptor.xml
       ploop resize -b DiskDescriptor.xml

Makes a disk that is not mounted larger, with its partition table, its last partition, and the file system on it (ext,
xfs, btrfs), whose programs it needs. Interrupted, it is finished by the same command. Needs root.

A mounted disk with ext4 gets a smaller size by its balloon (see ploop balloon): its users see a smaller file system, the
device stays as large as it is, and the same command with a larger size takes the balloon away again.

  -s, --size SIZE    the new size: a number and K, M, G or T (without: sectors); rounded up to whole clusters
  -b, --balloon      the largest balloon that there is room for

For example:
  ploop resize -s 32g /vz/1/DiskDescriptor.xml
",
    run,
};

fn run(parsed: Parsed) -> Result<(), Fail> {
    let (mut size, mut balloon) = (None, false);
    for (option, value) in &parsed.options {
        match option {
            's' => size = Some(values::size(value)?),
            'b' => balloon = true,
            _ => return misuse(),
        }
    }
    let [descriptor] = &parsed.operands[..] else { return misuse() };
    match size {
        Some(size) if size > 0 => Ok(resize::resize_disk(Path::new(descriptor), size)?),
        None if balloon => Ok(resize_balloon::largest(Path::new(descriptor))?),
        _ => Err(Fail::Usage(Some("ploop resize: the new size is missing, or 0 (-s)".into()))),
    }
}

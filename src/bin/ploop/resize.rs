//! `ploop resize`: a larger or smaller disk with its file system.

use std::path::Path;

use ploop::ops::{resize, resize_balloon, shrink};

use crate::getopt::Parsed;
use crate::{Command, Fail, misuse, result, values};

pub const COMMAND: Command = Command {
    name: "resize",
    short: "s:b",
    long: &[("size", true, 's'), ("balloon", false, 'b'), ("minimum", false, 'm')],
    usage: "\
Usage: ploop resize { -s SIZE | --minimum } DiskDescriptor.xml
       ploop resize -b DiskDescriptor.xml

Larger than the disk is: makes it larger, mounted or not, with its partition table, its last partition, and the file system
on it (ext, xfs, btrfs). Smaller: makes the file system (ext, btrfs) of a disk that is not mounted smaller, so that its image
file shrinks; the disk keeps its size and can be filled again by another resize. Interrupted, it is finished by the same
command. Needs root, and the programs of the file system.

A mounted disk with ext4 gets a smaller size by its balloon (see ploop balloon): its users see a smaller file system, the
device stays as large as it is, and the same command with a larger size takes the balloon away again.

  -s, --size SIZE    the new size: a number and K, M, G or T (without: sectors); rounded up to whole clusters
  -b, --balloon      the largest balloon that there is room for
      --minimum      tells the least size that can be given, in sectors

For example:
  ploop resize -s 32g /vz/1/DiskDescriptor.xml
",
    run,
};

fn run(parsed: Parsed) -> Result<(), Fail> {
    let (mut size, mut balloon, mut minimum) = (None, false, false);
    for (option, value) in &parsed.options {
        match option {
            's' => size = Some(values::size(value)?),
            'b' => balloon = true,
            'm' => minimum = true,
            _ => return misuse(),
        }
    }
    let [descriptor] = &parsed.operands[..] else { return misuse() };
    let descriptor = Path::new(descriptor);
    match size {
        None if minimum => result(shrink::least_size(descriptor)?),
        Some(_) if minimum => misuse(),
        Some(size) if size > 0 => Ok(resize::resize_disk(descriptor, size, true)?),
        None if balloon => Ok(resize_balloon::largest(descriptor)?),
        _ => Err(Fail::Usage(Some("ploop resize: the new size is missing, or 0 (-s)".into()))),
    }
}

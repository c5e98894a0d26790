//! `ploop resize`: a larger or smaller disk with its file system.

use std::path::Path;

use ploop::ops::{resize, shrink};

use crate::getopt::Parsed;
use crate::{Command, Fail, mistake, misuse, values};

pub const COMMAND: Command = Command {
    name: "resize",
    short: "s:b",
    long: &[("size", true, 's'), ("balloon", false, 'b'), ("minimum", false, 'm')],
    usage: "\
Usage: ploop resize { -s SIZE | --minimum } DiskDescriptor.xml

Larger than the disk is: makes it larger, mounted or not, with its partition table, its last partition, and the file system
on it (ext, xfs, btrfs). Smaller: makes the file system (ext, btrfs) of a disk that is not mounted smaller, so that its image
file shrinks; the disk keeps its size and can be filled again by another resize. Interrupted, it is finished by the same
command. Needs root, and the programs of the file system.

  -s, --size SIZE    the new size: a number and K, M, G or T (without: sectors); rounded up to whole clusters
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
    if minimum {
        let ([descriptor], None) = (&parsed.operands[..], size) else { return misuse() };
        let least = shrink::least_size(Path::new(descriptor))?;
        println!("{least}");
        return Ok(());
    }
    let size = match size {
        Some(size) if size > 0 => size,
        _ if balloon => {
            return Err(mistake(format!(
                "ploop resize: this version ({}) has no balloon (-b) yet; give a size (-s)",
                env!("CARGO_PKG_VERSION")
            )));
        }
        _ => return Err(Fail::Usage(Some("ploop resize: the new size is missing, or 0 (-s)".into()))),
    };
    let [descriptor] = &parsed.operands[..] else { return misuse() };
    Ok(resize::resize_disk(Path::new(descriptor), size, true)?)
}

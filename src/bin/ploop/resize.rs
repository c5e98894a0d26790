//! `ploop resize`: a larger disk with a larger file system.

use std::path::Path;

use ploop::ops::resize;

use crate::getopt::Parsed;
use crate::{Command, Fail, mistake, misuse, values};

pub const COMMAND: Command = Command {
    name: "resize",
    short: "s:b",
    long: &[("size", true, 's'), ("balloon", false, 'b')],
    usage: "\
Usage: ploop resize -s SIZE DiskDescriptor.xml

Makes a disk that is not mounted larger, with its partition table, its last partition, and the file system on it (ext,
xfs, btrfs), whose programs it needs. Interrupted, it is finished by the same command. Needs root.

  -s, --size SIZE    the new size: a number and K, M, G or T (without: sectors); rounded up to whole clusters

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
    Ok(resize::resize_disk(Path::new(descriptor), size)?)
}

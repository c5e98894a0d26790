//! `ploop compact`: space that is not used inside goes back to the host.

use std::path::Path;

use ploop::ops::compact;

use crate::getopt::Parsed;
use crate::{Command, Fail, misuse, result};

const NO_TRIM: char = '\u{11}';

pub const COMMAND: Command = Command {
    name: "compact",
    short: "",
    long: &[("no-trim", false, NO_TRIM)],
    usage: "\
Usage: ploop compact [--no-trim] DiskDescriptor.xml

Gives space that the file system inside does not use back to the host, of a disk that is not mounted: the file system
discards what it does not use, clusters of zeroes are freed, the clusters at the end of the top image move into their
places, and the file is cut. What is in the disk does not change. It can be interrupted at any time. Needs root; not for
preallocated disks and raw images.

  --no-trim    do not mount the file system (then root is not needed); free only what is zero already

For example:
  ploop compact /vz/1/DiskDescriptor.xml
",
    run,
};

fn run(parsed: Parsed) -> Result<(), Fail> {
    let [descriptor] = &parsed.operands[..] else { return misuse() };
    let trim = parsed.options.iter().all(|(option, _)| *option != NO_TRIM);
    let done = compact::compact_disk(Path::new(descriptor), trim)?;
    result(format_args!(
        "{} clusters freed, {} moved; the file takes {} MiB, it took {}",
        done.packed.freed,
        done.packed.moved,
        done.after >> 20,
        done.before >> 20
    ))
}

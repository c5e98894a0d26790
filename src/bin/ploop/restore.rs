//! `ploop restore-descriptor`: a lost DiskDescriptor.xml made anew.

use std::path::Path;

use ploop::descriptor::ImageMode;
use ploop::ops::restore;

use crate::getopt::Parsed;
use crate::{Command, Fail, misuse, values};

pub const COMMAND: Command = Command {
    name: "restore-descriptor",
    short: "f:b:",
    long: &[("format", true, 'f'), ("blocksize", true, 'b')],
    usage: "\
Usage: ploop restore-descriptor [-f raw|ploop1] [-b CLUSTER] DIR FILE

Stores DIR/DiskDescriptor.xml for the image FILE, as for a disk without snapshots. A descriptor that is there stays.

  -f, --format FORMAT      ploop1 (or expanded; default), raw
  -b, --blocksize CLUSTER  cluster of a raw image in sectors; default: the largest of 2048 to 64 that divides its size

For example:
  ploop restore-descriptor /vz/private/1/root.hdd /vz/private/1/root.hdd/root.hds
",
    run,
};

fn run(parsed: Parsed) -> Result<(), Fail> {
    let (mut raw, mut cluster) = (false, None);
    for (option, value) in &parsed.options {
        match option {
            'f' => raw = values::format(value)? == ImageMode::Raw,
            'b' => cluster = Some(values::cluster(value)?),
            _ => return misuse(),
        }
    }
    let [folder, image] = &parsed.operands[..] else { return misuse() };
    Ok(restore::restore_descriptor(Path::new(folder), Path::new(image), raw, cluster.filter(|_| raw))?)
}

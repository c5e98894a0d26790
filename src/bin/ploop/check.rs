//! `ploop check`: look for damage in an image, or in all images of a disk.

use std::path::Path;

use ploop::ops::check::{self, CheckOptions};

use crate::getopt::{Long, Parsed};
use crate::{Command, Fail, misuse, result, values};

const SHORT: &str = "fFcrsdSRb:u:";
const LONG: &[Long] = &[
    ("force", false, 'f'),
    ("hard-force", false, 'F'),
    ("check", false, 'c'),
    ("ro", false, 'r'),
    ("silent", false, 's'),
    ("drop-inuse", false, 'd'),
    ("repair-sparse", false, 'S'),
    ("raw", false, 'R'),
    ("blocksize", true, 'b'),
    ("uuid", true, 'u'),
    ("remove-orphans", false, ORPHANS),
];
const ORPHANS: char = '\u{11}';
const USAGE: &str = "\
Usage: ploop check [-u UUID] [--remove-orphans] DiskDescriptor.xml
       ploop check [-fFcrsdS] [-R -b CLUSTER] FILE

The first form checks all images of a disk that is not mounted, up to snapshot UUID, clears the mark that a crash
left and fills holes. It reports deltas beside the disk that the descriptor does not name; an interrupted operation
can have left them. --remove-orphans removes those that no process uses and no other descriptor names.

The second form checks a single image file:

  -f, --force          also if the image is clean
  -F, --hard-force     drop entries that point nowhere (what they named is lost)
  -c, --check          look for clusters used twice, and for unused ones
  -r, --ro             change nothing
  -s, --silent         say nothing if the image is clean
  -d, --drop-inuse     clear the in-use mark if all is well
  -S, --repair-sparse  fill holes; move data that lie far behind to the front
  -R, --raw            the image is raw, its cluster size (sectors) is given by
  -b, --blocksize CLUSTER
";

pub const COMMAND: Command = Command { name: "check", short: SHORT, long: LONG, usage: USAGE, run };

/// The old name.
pub const FSCK: Command = Command { name: "fsck", short: SHORT, long: LONG, usage: USAGE, run: run_fsck };

fn run_fsck(parsed: Parsed) -> Result<(), Fail> {
    eprintln!("Warning: ploop fsck is an old name; use ploop check");
    run(parsed)
}

fn run(parsed: Parsed) -> Result<(), Fail> {
    let [file] = &parsed.operands[..] else { return misuse() };
    match values::is_descriptor(file) {
        true => run_disk(Path::new(file), &parsed),
        false => run_file(Path::new(file), &parsed),
    }
}

fn run_disk(descriptor: &Path, parsed: &Parsed) -> Result<(), Fail> {
    let mut guid = None;
    let mut remove_orphans = false;
    for (option, value) in &parsed.options {
        match *option {
            ORPHANS => remove_orphans = true,
            'u' => guid = Some(values::guid(value)?),
            other => eprintln!("Warning: option -{other} has no meaning for a descriptor, ignored"),
        }
    }
    match remove_orphans {
        true => check::check_disk_and_remove_orphans(descriptor, guid.as_ref())?,
        false => check::check_disk(descriptor, guid.as_ref())?,
    }
    Ok(())
}

fn run_file(file: &Path, parsed: &Parsed) -> Result<(), Fail> {
    let mut options = CheckOptions::default();
    let mut silent = false;
    for (option, value) in &parsed.options {
        match *option {
            'f' => options.force = true,
            'F' => options.hard_force = true,
            'c' => options.check = true,
            'r' => options.read_only = true,
            's' => silent = true,
            'd' => options.drop_inuse = true,
            'S' => options.repair_sparse = true,
            'R' => options.raw = true,
            'b' => options.raw_blocksize = Some(values::number(value, "cluster size")?),
            ORPHANS => return Err(crate::mistake("--remove-orphans is for a DiskDescriptor.xml")),
            'u' => return Err(crate::mistake("-u is for a DiskDescriptor.xml; an image file is one snapshot")),
            _ => return misuse(),
        }
    }
    let found = check::check_image(file, &options)?;
    if found.skipped && !silent {
        result(format_args!("Image {} is clean, check skipped; -f checks it all the same", file.display()))?;
    }
    Ok(())
}

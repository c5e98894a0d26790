//! `ploop check`: look for damage in an image, or in all images of a disk.

use std::path::Path;

use ploop::ops::check::{self, CheckOptions, CheckReport};
use ploop::report;
use serde_json::json;

use crate::getopt::{Long, Parsed};
use crate::{Command, Fail, json, misuse, result, values};

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
    json::OPTION,
];
const ORPHANS: char = '\u{11}';
const USAGE: &str = "\
Usage: ploop check [-u UUID] [-r | --remove-orphans] [--json] DiskDescriptor.xml
       ploop check [-fFcrsdS] [-R -b CLUSTER] [--json] FILE

The first form checks all images of a disk that is not mounted, up to snapshot UUID, clears the mark that a crash
left and fills holes. It reports deltas beside the disk that the descriptor does not name; an interrupted operation
can have left them. --remove-orphans removes those that no process uses and no other descriptor names. With -r nothing is
changed, and a disk that runs is checked while it is used.

The second form checks a single image file:

  -f, --force          also if the image is clean
  -F, --hard-force     drop entries that point nowhere (what they named is lost); copy clusters that are used twice
  -c, --check          look for clusters used twice, and for unused ones
  -r, --ro             change nothing
  -s, --silent         say nothing if the image is clean
  -d, --drop-inuse     clear the in-use mark if all is well
  -S, --repair-sparse  fill holes; move data that lie far behind to the front
  -R, --raw            the image is raw, its cluster size (sectors) is given by
  -b, --blocksize CLUSTER

  --json               the result for programs

For example:
  ploop check /vz/1/DiskDescriptor.xml
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
    let file = Path::new(file);
    let for_programs = json::wanted(&parsed);
    if for_programs {
        report::set_verbose_level(report::NO_STDOUT);
    }
    let found = match values::is_descriptor(file.as_os_str()) {
        true => run_disk(file, &parsed).map(|()| None),
        false => run_file(file, &parsed).map(Some),
    };
    if for_programs {
        return show(file, found);
    }
    if let Some(found) = found?
        && found.skipped
        && !parsed.options.iter().any(|(o, _)| *o == 's')
    {
        result(format_args!("Image {} is clean, check skipped; -f checks it all the same", file.display()))?;
    }
    Ok(())
}

/// What a check ended with; its error is part of the output, and its status that of the command.
fn show(file: &Path, found: Result<Option<CheckReport>, Fail>) -> Result<(), Fail> {
    let (found, error) = match found {
        Ok(found) => (found, None),
        Err(Fail::Library(e)) => (None, Some(e)),
        Err(other) => return Err(other),
    };
    let content = json!({
        "file": json::path(file),
        "status": error.as_ref().map_or(0, |e| e.code()),
        "error": error.as_ref().map(ToString::to_string),
        "skipped": found.as_ref().is_some_and(|f| f.skipped),
        "notes": found.map(|f| f.notes).unwrap_or_default(),
    });
    json::show("check", content)?;
    match error {
        Some(e) => Err(Fail::Library(e)),
        None => Ok(()),
    }
}

fn run_disk(descriptor: &Path, parsed: &Parsed) -> Result<(), Fail> {
    let mut guid = None;
    let (mut remove_orphans, mut look) = (false, false);
    for (option, value) in &parsed.options {
        match *option {
            ORPHANS => remove_orphans = true,
            'r' => look = true,
            'u' => guid = Some(values::guid(value)?),
            json::LETTER => {}
            other => eprintln!("Warning: option -{other} has no meaning for a descriptor, ignored"),
        }
    }
    match (remove_orphans, look) {
        (true, true) => return Err(crate::mistake("--remove-orphans removes files, -r changes nothing")),
        (true, false) => check::check_disk_and_remove_orphans(descriptor, guid.as_ref())?,
        (false, true) => check::look_at_disk(descriptor, guid.as_ref())?,
        (false, false) => check::check_disk(descriptor, guid.as_ref())?,
    }
    Ok(())
}

fn run_file(file: &Path, parsed: &Parsed) -> Result<CheckReport, Fail> {
    let mut options = CheckOptions::default();
    for (option, value) in &parsed.options {
        match *option {
            'f' => options.force = true,
            'F' => options.hard_force = true,
            'c' => options.check = true,
            'r' => options.read_only = true,
            // For the line that says so.
            's' | json::LETTER => {}
            'd' => options.drop_inuse = true,
            'S' => options.repair_sparse = true,
            'R' => options.raw = true,
            'b' => options.raw_blocksize = Some(values::number(value, "cluster size")?),
            ORPHANS => return Err(crate::mistake("--remove-orphans is for a DiskDescriptor.xml")),
            'u' => return Err(crate::mistake("-u is for a DiskDescriptor.xml; an image file is one snapshot")),
            _ => return misuse(),
        }
    }
    Ok(check::check_image(file, &options)?)
}

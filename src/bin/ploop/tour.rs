//! `ploop tour`: see all of it work.

use std::path::{Path, PathBuf};

use ploop::error::{Error, Kind};
use ploop::ops::doctor::{self, Grade};
use ploop::ops::tour;

use crate::getopt::Parsed;
use crate::{Command, Fail, misuse, result};

pub const COMMAND: Command = Command {
    name: "tour",
    short: "",
    long: &[],
    usage: "\
Usage: ploop tour [DIR]

Makes a disk in a temporary folder (in DIR, else in $TMPDIR or /tmp; 600 MB), mounts it, writes, unmounts,
mounts again, compares and measures. Shows each command and what came of it, and cleans up. Needs root.
Exit status 0: all of it worked; 2: something is missing here, it says what; else the code of the step that failed.

For example:
  ploop tour /var/tmp
",
    run,
};

/// Something is missing on this machine.
const NOT_HERE: u8 = Kind::Device as u8;

fn run(parsed: Parsed) -> Result<(), Fail> {
    let parent = match &parsed.operands[..] {
        [] => std::env::temp_dir(),
        [one] => PathBuf::from(one),
        _ => return misuse(),
    };
    result("What this machine has:\n")?;
    let machine = doctor::machine();
    super::doctor::show(&machine)?;
    if machine.iter().any(|f| f.grade == Grade::Missing) {
        result("\nThe tour needs what is missing above; install it and run the tour again.")?;
        return Err(Fail::Status(NOT_HERE));
    }
    let program =
        std::env::current_exe().map_err(|e| Error::with(Kind::Sys, "the program's own file cannot be found", e))?;
    let mut show = |line: &str| {
        // The process that reads the output may have exited; the tour must still remove what it made.
        let _ = result(line);
    };
    if let Err(e) = tour::run(&program, Path::new(&parent), &mut show) {
        result(format_args!("\nThe tour stops: {e}"))?;
        return Err(Fail::Status(e.code() as u8));
    }
    result("\nAll of it worked, and nothing is left behind. ploop --help shows the commands.")
}

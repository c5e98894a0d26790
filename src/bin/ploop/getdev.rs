//! `ploop getdev`: the minor that the next device would have.

use ploop::device;
use ploop::report;

use crate::getopt::Parsed;
use crate::{Command, Fail, misuse, result};

pub const COMMAND: Command = Command {
    name: "getdev",
    short: "",
    long: &[],
    usage: "\
Usage: ploop getdev

Prints the minor of the next device that is made without a name of its own: /dev/ploopN has minor N * 16.

For example:
  ploop getdev
",
    run,
};

fn run(parsed: Parsed) -> Result<(), Fail> {
    if !parsed.operands.is_empty() {
        return misuse();
    }
    match device::reserve_minor() {
        Ok((minor, _reserved)) => result(format_args!("Next unused minor: {minor}")),
        Err(e) => {
            report::error(&e);
            Err(Fail::Status(1))
        }
    }
}

//! `ploop copy`: the top image of a running disk, to another file or machine.

use std::ffi::OsStr;
use std::path::Path;

use ploop::ops::copy;

use crate::getopt::Parsed;
use crate::{Command, Fail, later, misuse, values};

pub const COMMAND: Command = Command {
    name: "copy",
    short: "s:d:F:o:i:f:",
    long: &[],
    usage: "\
Usage: ploop copy -d FILE [-i FD] [-f FD]

Receives a copy of an image, as `ploop copy -s` of versions 1.12 to 1.15 sends it, into the new file FILE. It grows as
FILE.receiving, and is FILE when all of it has come and is durable. If the stream ends too early nothing remains.

  -d FILE    the file to make; it must not exist
  -i FD      the descriptor that the copy comes from, a pipe or socket (standard input)
  -f FD      the descriptor for answers to the sender, a pipe or socket (none)

For example, on the machine that receives:
  socat TCP-LISTEN:4455 EXEC:'ploop copy -d /vz/1/root.hds'
",
    run,
};

fn run(parsed: Parsed) -> Result<(), Fail> {
    let (mut file, mut input, mut feedback, mut sends) = (None, 0, None, false);
    for (option, value) in &parsed.options {
        match option {
            'd' => file = Some(value),
            'i' => input = descriptor(value)?,
            'f' => feedback = Some(descriptor(value)?),
            's' => sends = true,
            // Of the sender.
            'F' | 'o' => {}
            _ => return misuse(),
        }
    }
    if sends {
        return Err(Fail::Status(later::not_yet("copy -s")));
    }
    let Some(file) = file else { return misuse() };
    copy::receive_by_number(Path::new(file), input, feedback)?;
    Ok(())
}

fn descriptor(value: &OsStr) -> Result<i32, Fail> {
    let number = values::number(value, "descriptor")?;
    i32::try_from(number).map_err(|_| crate::mistake(format!("ploop copy: there is no descriptor {number}")))
}

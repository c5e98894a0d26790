//! `ploop copy`: the top image of a running disk, to another file or machine.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use ploop::ops::copy::{self, chain};

use crate::getopt::Parsed;
use crate::{Command, Fail, disk, misuse, values};

pub const COMMAND: Command = Command {
    name: "copy",
    short: "s:d:F:o:i:f:",
    long: &[("chain", false, 'C')],
    usage: "\
Usage: ploop copy -s DEVICE [-F COMMAND] {-d FILE | [-o FD] [-f FD]}
       ploop copy -d FILE [-i FD] [-f FD]
       ploop copy --chain -s DiskDescriptor.xml [-F COMMAND] {-d DIR | [-o FD]}
       ploop copy --chain -d DIR [-i FD]

Copies the top image of a device while it is in use, to another file or machine; versions 1.12 to 1.15 at the other end will
do. What is written meanwhile is sent again, until little is left; then COMMAND stops what writes, the file systems are
frozen for a moment, and the rest follows. The device goes on. Deltas below the top do not change: copy them before.

  -s DEVICE  send the top image of this device
  -F COMMAND for the shell; it ends what writes to the device. If it fails so does the copy (12). Its output goes to standard
             error if the copy goes to standard output
  -d FILE    the file to make, which must not exist. It grows as FILE.receiving, and is FILE when all of it has come and is
             durable. If the copy ends too early nothing remains
  -o FD      the descriptor that the copy goes to, a pipe or socket (standard output)
  -i FD      the descriptor that the copy comes from, a pipe or socket (standard input)
  -f FD      the descriptor for the receiver's answers, a pipe or socket (none)
  --chain    a disk with all its snapshots instead, into a new folder: as ploop send and ploop receive, or both at once

For example, on the machine that receives, and on the one that sends:
  socat TCP-LISTEN:4455 EXEC:'ploop copy -d /vz/1/root.hds -f 1'
  socat TCP:HOST:4455 EXEC:'ploop copy -s /dev/ploop0 -f 0'
",
    run,
};

fn run(parsed: Parsed) -> Result<(), Fail> {
    let (mut file, mut input, mut output, mut feedback) = (None, 0, 1, None);
    let (mut device, mut stop, mut chain) = (None, None, false);
    for (option, value) in &parsed.options {
        match option {
            'd' => file = Some(value),
            'i' => input = descriptor("copy", value)?,
            'f' => feedback = Some(descriptor("copy", value)?),
            's' => device = Some(value),
            'F' => stop = Some(value.as_os_str()),
            'o' => output = descriptor("copy", value)?,
            'C' => chain = true,
            _ => return misuse(),
        }
    }
    if chain {
        if feedback.is_some() {
            return misuse();
        }
        return whole_disk(device, file, stop, (input, output));
    }
    match (device, file) {
        (Some(device), Some(file)) => drop(copy::send_to_file(Path::new(device), Path::new(file), stop)?),
        (Some(device), None) => drop(copy::send_by_number(Path::new(device), output, stop, feedback)?),
        (None, Some(file)) => drop(copy::receive_by_number(Path::new(file), input, feedback)?),
        (None, None) => return misuse(),
    }
    Ok(())
}

/// With all its snapshots.
fn whole_disk(
    source: Option<&OsString>,
    dir: Option<&OsString>,
    stop: Option<&OsStr>,
    (input, output): (i32, i32),
) -> Result<(), Fail> {
    let source = source.map(|source| disk::meant(source)).transpose()?;
    if source.as_ref().is_some_and(|source| !values::is_descriptor(source)) {
        return misuse();
    }
    match (source, dir) {
        (Some(source), Some(dir)) => drop(chain::copy_here(Path::new(&source), Path::new(dir), stop)?),
        (Some(source), None) => {
            let options = chain::Options { stop, ..chain::Options::default() };
            chain::send_by_number(Path::new(&source), output, &options)?;
        }
        (None, Some(dir)) => drop(chain::receive_by_number(Path::new(dir), input)?),
        (None, None) => return misuse(),
    }
    Ok(())
}

/// The number of an open descriptor.
pub fn descriptor(command: &str, value: &OsStr) -> Result<i32, Fail> {
    let number = values::number(value, "descriptor")?;
    i32::try_from(number).map_err(|_| crate::mistake(format!("ploop {command}: there is no descriptor {number}")))
}

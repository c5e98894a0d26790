//! `ploop list`: devices.

use std::os::unix::ffi::OsStrExt;

use ploop::ops::list;

use crate::getopt::Parsed;
use crate::{Command, Fail, misuse, write_out};

pub const COMMAND: Command = Command {
    name: "list",
    short: "a",
    long: &[],
    usage: "\
Usage: ploop list [-a]

One line for each device: its name, the base image, the mount point (with -a), the component name.
A device that is not in order says so in one more column.

  -a   with mount points
",
    run,
};

fn run(parsed: Parsed) -> Result<(), Fail> {
    if !parsed.operands.is_empty() {
        return misuse();
    }
    let all = parsed.options.iter().any(|(o, _)| *o == 'a');
    for device in list::devices(all)? {
        // The name in twelve columns, the rest separated by single blanks, an empty field too: scripts count on it.
        let mut line = format!("{:<12} ", device.name).into_bytes();
        line.extend(device.base.as_os_str().as_bytes());
        line.push(b' ');
        line.extend(device.mount_point.iter().flat_map(|m| m.as_os_str().as_bytes()));
        line.push(b' ');
        line.extend(device.component.as_bytes());
        if let Some(state) = device.trouble {
            line.extend(format!(" {state}").bytes());
        }
        line.push(b'\n');
        write_out(&line)?;
    }
    Ok(())
}

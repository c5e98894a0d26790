//! `ploop reload`: after an upgrade, processes of the new program serve the running devices.

use ploop::ops::reload;

use crate::getopt::Parsed;
use crate::{Command, Fail, misuse, values};

pub const COMMAND: Command = Command {
    name: "reload",
    short: "a",
    long: &[],
    usage: "\
Usage: ploop reload DEVICE
       ploop reload -a

Replaces the processes that serve a device by those of the ploop-server that is installed now, for upgrades. The device
stays, its I/O waits for a moment. If the new program cannot serve it the old one goes on. Where no process could serve it
(state failed, I/O waits) another try is made, once the image is right again.

  -a   all devices that run

For example:
  ploop reload -a
",
    run,
};

fn run(parsed: Parsed) -> Result<(), Fail> {
    let all = parsed.options.iter().any(|(option, _)| *option == 'a');
    match (&parsed.operands[..], all) {
        ([], true) => Ok(reload::reload_all()?),
        ([device], false) => Ok(reload::reload(&values::text(device, "device name")?)?),
        _ => misuse(),
    }
}

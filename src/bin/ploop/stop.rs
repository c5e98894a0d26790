//! `ploop stop`, `start`, `clear`, `delete`: a device that is detached and attached again under its name.

use ploop::ops::stopped;
use ploop::units::MAX_CHAIN;

use crate::getopt::Parsed;
use crate::{Command, Fail, mistake, misuse, values};

pub const STOP: Command = Command {
    name: "stop",
    short: "d:",
    long: &[],
    usage: "\
Usage: ploop stop -d DEVICE

Detaches a device that is not in use and closes its images, but keeps its name and what it takes to start it again. Its
disk can be read and mounted read-only meanwhile; ploop start refuses files that have changed. A reboot forgets it.

  -d DEVICE  the device

For example:
  ploop stop -d /dev/ploop0
",
    run: |parsed| Ok(stopped::stop(&device(parsed)?)?),
};

pub const START: Command = Command {
    name: "start",
    short: "d:",
    long: &[],
    usage: "\
Usage: ploop start -d DEVICE

Attaches a device again that ploop stop has stopped, with the images and options that it had.

  -d DEVICE  the device

For example:
  ploop start -d /dev/ploop0
",
    run: |parsed| Ok(stopped::start(&device(parsed)?)?),
};

pub const CLEAR: Command = Command {
    name: "clear",
    short: "d:",
    long: &[],
    usage: "\
Usage: ploop clear -d DEVICE

Forgets a device that ploop stop has stopped; its images stay as they are.

  -d DEVICE  the device

For example:
  ploop clear -d /dev/ploop0
",
    run: |parsed| Ok(stopped::clear(&device(parsed)?)?),
};

pub const DELETE: Command = Command {
    name: "delete",
    short: "d:l:",
    long: &[],
    usage: "\
Usage: ploop delete -d DEVICE -l LEVEL

Drops an image from a device that ploop stop has stopped. The file stays, and what it has is not moved anywhere. If it
was the top the device is read-only from then on; with its only image the device is forgotten.

  -d DEVICE  the device
  -l LEVEL   0 is the base, the highest one the top

For example:
  ploop delete -d /dev/ploop0 -l 1
",
    run: delete,
};

pub const RM: Command = Command {
    name: "rm",
    usage: "\
Usage: ploop rm -d DEVICE -l LEVEL

The same as ploop delete: drops an image from a device that ploop stop has stopped.

  -d DEVICE  the device
  -l LEVEL   0 is the base, the highest one the top

For example:
  ploop rm -d /dev/ploop0 -l 1
",
    ..DELETE
};

/// The device of a command that has no other option.
fn device(parsed: Parsed) -> Result<String, Fail> {
    match (parsed.options.last(), &parsed.operands[..]) {
        (Some(('d', value)), []) => values::text(value, "device name"),
        _ => misuse(),
    }
}

fn delete(parsed: Parsed) -> Result<(), Fail> {
    let (mut device, mut level) = (None, None);
    for (option, value) in &parsed.options {
        match option {
            'd' => device = Some(values::text(value, "device name")?),
            'l' => level = Some(values::number(value, "level")?),
            _ => return misuse(),
        }
    }
    let (Some(device), Some(level), []) = (device, level, &parsed.operands[..]) else { return misuse() };
    match usize::try_from(level) {
        Ok(level) if level <= MAX_CHAIN => Ok(stopped::drop_level(&device, level)?),
        _ => Err(mistake(format!("Incorrect level {level}: must be 0 to {MAX_CHAIN}"))),
    }
}

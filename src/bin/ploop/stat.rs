//! `ploop stat`: counters of a device.

use std::io::{self, Read};

use ploop::error::{Error, Kind};
use ploop::ops::stat;

use crate::getopt::Parsed;
use crate::{Command, Fail, misuse, result, values};

pub const COMMAND: Command = Command {
    name: "stat",
    short: "cld:",
    long: &[],
    usage: "\
Usage: ploop stat [-c | -l] -d DEVICE

Shows counters of a running device, by the names of the classic driver where it has the same: requests that came (bio_in)
and were answered (bio_out), clusters that the top image got (bio_alloc), and copied from a lower one (bio_cows).

  -d DEVICE  the device
  -c         set all counters to 0
  -l         set counters from lines `name value` on standard input; names that are not there are told and passed over

For example:
  ploop stat -d ploop0
",
    run,
};

/// No more is read.
const INPUT_MAX: u64 = 1 << 20;

fn run(parsed: Parsed) -> Result<(), Fail> {
    let (mut device, mut clear, mut load) = (None, false, false);
    for (option, value) in &parsed.options {
        match option {
            'd' => device = Some(values::text(value, "device name")?),
            'c' => clear = true,
            'l' => load = true,
            _ => return misuse(),
        }
    }
    let (Some(device), false, []) = (device, clear && load, &parsed.operands[..]) else { return misuse() };
    if clear {
        return Ok(stat::clear_counters(&device)?);
    }
    if load {
        return from_input(&device);
    }
    for (name, value) in stat::counters(&device)? {
        result(format_args!("{name:<20}\t{value}"))?;
    }
    Ok(())
}

fn from_input(device: &str) -> Result<(), Fail> {
    // The device first: without one nothing is read.
    stat::counters(device)?;
    let mut text = Vec::new();
    let read = io::stdin().lock().take(INPUT_MAX).read_to_end(&mut text);
    read.map_err(|e| Error::with(Kind::Read, "standard input cannot be read", e))?;
    let mut values = Vec::new();
    for line in String::from_utf8_lossy(&text).lines().filter(|l| !l.trim().is_empty()) {
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next().map(str::parse), words.next()) {
            (Some(name), Some(Ok(value)), None) => values.push((name.to_owned(), value)),
            _ => eprintln!("ploop stat: line {line:?} is passed over: a name and a number are wanted"),
        }
    }
    for unknown in stat::set_counters(device, &values)? {
        eprintln!("ploop stat: {device} has no counter {unknown}");
    }
    Ok(())
}

//! `ploop compact`: space that is not used inside goes back to the host.

use std::ffi::OsStr;
use std::path::Path;

use ploop::ops::compact;
use ploop::ops::compact_running::{self, Estimate};
use ploop::ops::give_back::{Options, Rates};
use serde::Serialize;

use crate::getopt::Parsed;
use crate::{Command, Fail, json, misuse, result, values};

const NO_TRIM: char = '\u{11}';
const RATE: char = '\u{12}';
const ESTIMATE: char = '\u{13}';
const ALL: char = '\u{14}';
const FULL_SPEED: char = '\u{15}';

pub const COMMAND: Command = Command {
    name: "compact",
    short: "",
    long: &[
        ("no-trim", false, NO_TRIM),
        ("rate", true, RATE),
        ("estimate", false, ESTIMATE),
        ("all", false, ALL),
        ("full-speed", false, FULL_SPEED),
        json::OPTION,
    ],
    usage: "\
Usage: ploop compact [--no-trim] [--rate SIZE] [--full-speed] { DiskDescriptor.xml | DEVICE }
       ploop compact [--no-trim] [--rate SIZE] [--full-speed] --all
       ploop compact --estimate [--rate SIZE] [--json] { DiskDescriptor.xml | DEVICE }

Gives space that the file system inside does not use back to the host: the file system discards it, the clusters at the
end of the top image move into free places, and the file is cut. What is in the disk does not change. The disk may be
mounted and in use; one that is not is mounted for a moment, and clusters of zeroes are freed, too. It can be interrupted
at any time. Needs root; not for preallocated disks and raw images.

  --no-trim     the file system discards nothing; only what is free, or zero, already is given back
  --rate SIZE   move at most so many bytes in a second: a number and K, M, G or T
  --full-speed  move without a pause while the disk is in use, with the usual priority; else at most 16 MiB in a second
                then, with the lowest priority for processor and disks
  --all         all disks that are mounted now, one after the other
  --estimate    only tell what it would bring, about, and how long it would take
  --json        the estimate for programs

For example:
  ploop compact /vz/1/DiskDescriptor.xml
",
    run,
};

fn run(parsed: Parsed) -> Result<(), Fail> {
    let (mut trim, mut rate, mut estimate, mut all, mut full) = (true, None, false, false, false);
    for (option, value) in &parsed.options {
        match *option {
            NO_TRIM => trim = false,
            RATE => rate = Some(values::size(value)?.saturating_mul(512).max(1)),
            ESTIMATE => estimate = true,
            ALL => all = true,
            FULL_SPEED => full = true,
            _ => {}
        }
    }
    if json::wanted(&parsed) && !estimate || estimate && all {
        return misuse();
    }
    let options = match full {
        true => Options { rates: Rates { most: rate, busy: rate } },
        false => Options::limited(rate),
    };
    if !full && !estimate {
        compact_running::lower_priority();
    }
    match (&parsed.operands[..], all) {
        ([], true) => compact_all(trim, &options),
        ([operand], false) if estimate => show(of(operand, rate)?, json::wanted(&parsed)),
        ([operand], false) => one(operand, trim, &options),
        _ => misuse(),
    }
}

/// The node of a device is no descriptor.
fn is_device(operand: &OsStr) -> bool {
    Path::new(operand).starts_with("/dev")
}

fn one(operand: &OsStr, trim: bool, options: &Options) -> Result<(), Fail> {
    let device = match is_device(operand) {
        true => Some(compact_running::device_named(&values::text(operand, "device name")?)?),
        false => compact_running::device_of(Path::new(operand))?,
    };
    let Some(device) = device else {
        let done = compact::compact_disk_slowly(Path::new(operand), trim, options.rates.most)?;
        return result(format_args!(
            "{} clusters freed, {} moved; the file takes {} MiB, it took {}",
            done.packed.freed,
            done.packed.moved,
            done.after >> 20,
            done.before >> 20
        ));
    };
    let given = compact_running::compact(&device, trim, options)?.given;
    result(format_args!(
        "{} clusters moved; the file has {} MiB, it had {}",
        given.moved,
        given.after >> 20,
        given.before >> 20
    ))
}

/// Compacts all mounted disks; the first error is the command's, the other disks are compacted all the same.
fn compact_all(trim: bool, options: &Options) -> Result<(), Fail> {
    let mut failed = None;
    for device in compact_running::candidates()? {
        match compact_running::compact(&device, trim, options) {
            Ok(done) => result(format_args!(
                "{}: {} clusters moved; the file has {} MiB, it had {}",
                device.node().display(),
                done.given.moved,
                done.given.after >> 20,
                done.given.before >> 20
            ))?,
            Err(e) if ploop::report::cancel::requested() => return Err(e.into()),
            Err(e) => {
                ploop::report::error(&e);
                failed.get_or_insert(e.code() as u8);
            }
        }
    }
    failed.map_or(Ok(()), |status| Err(Fail::Status(status)))
}

fn of(operand: &OsStr, rate: Option<u64>) -> Result<Estimate, Fail> {
    let device = match is_device(operand) {
        true => Some(compact_running::device_named(&values::text(operand, "device name")?)?),
        false => compact_running::device_of(Path::new(operand))?,
    };
    Ok(match device {
        Some(device) => compact_running::estimate(&device, rate)?,
        None => compact::estimate(Path::new(operand), rate)?,
    })
}

/// An estimate, for programs.
#[derive(Serialize)]
struct Shown {
    bytes: u64,
    seconds: u64,
    image_bytes: u64,
    used_bytes: u64,
}

fn show(estimate: Estimate, json: bool) -> Result<(), Fail> {
    let Estimate { image_bytes, used_bytes, bytes, time } = estimate;
    if json {
        let content = Shown { bytes, seconds: time.as_secs(), image_bytes, used_bytes };
        return json::show("compact-estimate", content);
    }
    result(format_args!(
        "about {} of {} MiB can be given back, in about {} s",
        bytes >> 20,
        image_bytes >> 20,
        time.as_secs()
    ))
}

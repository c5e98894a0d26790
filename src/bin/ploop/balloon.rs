//! `ploop balloon`, and the program `ploop-balloon`: the balloon of a running disk.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use ploop::error::{Error, Kind};
use ploop::ops::balloon::{self, Target};

use crate::getopt::Parsed;
use crate::{CONSOLE, Command, Fail, balloon_discard, disk, ended, misuse, result, run, values, version, write_out};

const USAGE: &str = "\
Usage: ploop balloon show     TARGET
       ploop balloon status   TARGET
       ploop balloon change   -s SIZE TARGET
       ploop balloon check    TARGET
       ploop balloon repair   TARGET
       ploop balloon clear    TARGET
       ploop balloon complete TARGET
       ploop balloon discard  [OPTIONS] TARGET

The balloon is a hidden file in the root of the ext4 or xfs on a mounted disk. What it takes the users of the disk cannot take, and
the image gives its space back to the host. Root inside can delete the file: it is no limit for root.

  show      how large it is
  status    what is under way: OFF, or BALLOON, FBLOADED, RELOC, MERGE, GROW, TRACK, DISCARD
  change    make it larger or smaller; made where it is missing
  check     how much of the image it still keeps
  repair    have the image give that up, after an interrupted change
  clear     end the state BALLOON that an interrupted change has left, without repair
  complete  finish what FBLOADED, RELOC or DISCARD stands for
  discard   give back what the file system does not use; see ploop balloon discard --help

TARGET is -d DEVICE, -m DIR, both, or a DiskDescriptor.xml.

  -s, --size SIZE  the new size: a number and K, M, G or T (without: sectors); 0 takes the balloon away
  -f               has no effect

For example:
  ploop balloon change -s 2g /vz/1/DiskDescriptor.xml
";

const fn command(name: &'static str, run: fn(Parsed) -> Result<(), Fail>) -> Command {
    Command { name, short: "d:m:f", long: &[], usage: USAGE, run }
}

pub const COMMANDS: [&Command; 8] = [
    &command("balloon show", show),
    &command("balloon status", status),
    &command("balloon clear", clear),
    &Command { name: "balloon change", short: "d:m:fs:", long: &[("size", true, 's')], usage: USAGE, run: change },
    &command("balloon complete", complete),
    &command("balloon check", |parsed| check(parsed, false)),
    &command("balloon repair", |parsed| check(parsed, true)),
    &balloon_discard::COMMAND,
];

/// Runs one of its commands; the exit status.
pub fn main(args: &[OsString]) -> u8 {
    ploop::report::set_verbose_level(CONSOLE);
    let Some((name, args)) = args.split_first() else { return ended(USAGE, misuse()) };
    match COMMANDS.iter().find(|c| c.name.strip_prefix("balloon ").is_some_and(|n| name == n)) {
        Some(command) => run(command, args),
        None if name == "--help" || name == "-h" => ended(USAGE, write_out(USAGE.as_bytes())),
        None if name == "--version" => ended(USAGE, version()),
        None => {
            let message = format!("ploop balloon: unknown command {}", name.to_string_lossy());
            ended(USAGE, Err(Fail::Usage(Some(message))))
        }
    }
}

/// The target, and the size if one is given.
fn parse(parsed: Parsed) -> Result<(Target, Option<u64>), Fail> {
    let (mut device, mut folder, mut size) = (None, None, None);
    for (option, value) in parsed.options {
        match option {
            'd' => device = Some(values::text(&value, "device name")?),
            'm' => folder = Some(value),
            's' => size = Some(values::size(&value)?),
            'f' => {}
            _ => return misuse(),
        }
    }
    let found = match (device, folder, &parsed.operands[..]) {
        (Some(device), Some(folder), []) => return Ok((Target::by_both(&device, Path::new(&folder))?, size)),
        (Some(device), None, []) => Target::by_device(&device),
        (None, Some(folder), []) => Target::by_mount(Path::new(&folder)),
        (None, None, [operand]) => by_disk(operand)?,
        _ => return misuse(),
    };
    Ok((found.map_err(wrong_use)?, size))
}

fn by_disk(operand: &OsStr) -> Result<Result<Target, Error>, Fail> {
    Ok(Target::by_disk(Path::new(&disk::meant(operand)?)))
}

/// A target that is not there is a wrong use.
fn wrong_use(e: Error) -> Fail {
    match e.kind() {
        Kind::Param => Fail::Usage(Some(e.to_string())),
        _ => Fail::Library(e),
    }
}

fn show(parsed: Parsed) -> Result<(), Fail> {
    let (target, _) = parse(parsed)?;
    result(format_args!("Current size of hidden balloon is {} bytes", balloon::size(&target.root)?))
}

fn status(parsed: Parsed) -> Result<(), Fail> {
    let (target, _) = parse(parsed)?;
    result(format_args!("Current state of in-kernel maintenance: {}", target.device.maintenance()))
}

fn clear(parsed: Parsed) -> Result<(), Fail> {
    let (target, _) = parse(parsed)?;
    balloon::clear(&target)?;
    result("Current state of in-kernel maintenance is OFF now")
}

fn change(parsed: Parsed) -> Result<(), Fail> {
    let (target, size) = match parse(parsed)? {
        (target, Some(size)) => (target, size),
        _ => return Err(Fail::Usage(Some("ploop balloon change: the new size is missing (-s)".into()))),
    };
    Ok(balloon::change(&target, size)?)
}

fn complete(parsed: Parsed) -> Result<(), Fail> {
    let (target, _) = parse(parsed)?;
    Ok(balloon::complete(&target).map(drop)?)
}

fn check(parsed: Parsed, repair: bool) -> Result<(), Fail> {
    let (target, _) = parse(parsed)?;
    Ok(balloon::check_or_repair(&target.device, &target.root, repair).map(drop)?)
}

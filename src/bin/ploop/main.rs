//! The `ploop` command: finds the command by name, runs it, turns its end into an exit status. One file per command.
//! Links named `mount.ploop`, `umount.ploop` and `ploop-balloon` make it these tools.

#![forbid(unsafe_code)]

mod balloon;
mod balloon_discard;
mod check;
mod compact;
mod completion;
mod convert;
mod copy;
mod disk;
mod doctor;
mod getdev;
mod getopt;
mod grow;
mod helpers;
mod info;
mod init;
mod json;
mod later;
mod list;
#[cfg(test)]
mod manual_tests;
mod map;
mod merge;
mod mount;
mod reload;
mod replace;
mod resize;
mod restore;
mod send;
mod snapshot;
mod snapshot_list;
mod stat;
mod stop;
mod tour;
mod umount;
mod values;

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command as Process, ExitCode};

use ploop::error::{Error, Kind};
use ploop::report;
use ploop::report::progress::{self, Wanted};
use ploop::sys::signals;

use getopt::{HELP, Long, PROGRESS, Parsed, VERSION};

/// How a command fails.
pub enum Fail {
    /// Wrong use: the message if there is one, then the command's usage, on stderr; status 38.
    Usage(Option<String>),
    /// A wrong argument: the message on stderr; status 38.
    Mistake(String),
    /// The library's error, shown by its log.
    Library(Error),
    /// The message is shown already.
    Status(u8),
}

impl From<Error> for Fail {
    fn from(e: Error) -> Fail {
        Fail::Library(e)
    }
}

/// A wrong argument.
pub fn mistake(message: impl Into<String>) -> Fail {
    Fail::Mistake(message.into())
}

/// Wrong use of the command.
pub fn misuse<T>() -> Result<T, Fail> {
    Err(Fail::Usage(None))
}

/// Result data, on stdout whatever the level is.
pub fn result(text: impl std::fmt::Display) -> Result<(), Fail> {
    write_out(format!("{text}\n").as_bytes())
}

/// The same for bytes that need not be UTF-8.
pub fn write_out(bytes: &[u8]) -> Result<(), Fail> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        // The process that read the output has closed the pipe. 141 is 128 + SIGPIPE, as in a shell.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Err(Fail::Status(141)),
        Err(e) => Err(Fail::Library(Error::with(Kind::Write, "standard output cannot be written", e))),
    }
}

/// A command: its name, its letters and long options, its usage, what it does.
pub struct Command {
    pub name: &'static str,
    pub short: &'static str,
    pub long: &'static [Long],
    pub usage: &'static str,
    pub run: fn(Parsed) -> Result<(), Fail>,
}

const COMMANDS: [&Command; 35] = [
    &init::COMMAND,
    &mount::COMMAND,
    &umount::COMMAND,
    &list::COMMAND,
    &info::COMMAND,
    &check::COMMAND,
    &check::FSCK,
    &map::COMMAND,
    &snapshot::SNAPSHOT,
    &snapshot::TSNAPSHOT,
    &snapshot::SWITCH,
    &snapshot::DELETE,
    &snapshot_list::COMMAND,
    &merge::SNAPSHOTS,
    &merge::IMAGES,
    &replace::COMMAND,
    &resize::COMMAND,
    &grow::COMMAND,
    &compact::COMMAND,
    &convert::COMMAND,
    &stop::STOP,
    &stop::START,
    &stop::CLEAR,
    &stop::DELETE,
    &stop::RM,
    &stat::COMMAND,
    &getdev::COMMAND,
    &copy::COMMAND,
    &send::SEND,
    &send::RECEIVE,
    &restore::COMMAND,
    &tour::COMMAND,
    &doctor::COMMAND,
    &reload::COMMAND,
    &completion::COMMAND,
];

/// Commands whose single operand is a disk.
const ON_A_DISK: [&str; 18] = [
    mount::COMMAND.name,
    info::COMMAND.name,
    check::COMMAND.name,
    check::FSCK.name,
    map::COMMAND.name,
    snapshot::SNAPSHOT.name,
    snapshot::TSNAPSHOT.name,
    snapshot::SWITCH.name,
    snapshot::DELETE.name,
    snapshot_list::COMMAND.name,
    merge::SNAPSHOTS.name,
    replace::COMMAND.name,
    grow::COMMAND.name,
    resize::COMMAND.name,
    compact::COMMAND.name,
    convert::COMMAND.name,
    doctor::COMMAND.name,
    send::SEND.name,
];

/// The console level until `-v` says otherwise.
const CONSOLE: i32 = 3;

const SUMMARY: &str = "\
Usage: ploop [-v...] COMMAND [options] ARGUMENTS

  ploop init -s SIZE FILE            make a disk: an image, and DiskDescriptor.xml beside it
  ploop mount [-r] [-m DIR] DISK     make it a block device, and mount its file system
  ploop umount { DIR | DEVICE | DISK }   unmount it, detach the device, close the images
  ploop list [-a]                    devices
  ploop info [-s] [-d] DISK          how full it is, its size, its device
  ploop info --image FILE            what is in an image file
  ploop check { DISK | FILE }        look for damage
  ploop map { DISK | DEVICE | FILE }  where its clusters are, as a picture
  ploop snapshot [-u UUID] DISK      keep what is in it now, under a name
  ploop tsnapshot ... DISK           the same for as long as it is mounted, for backups
  ploop snapshot-list DISK           its snapshots
  ploop snapshot-switch -u UUID DISK  go back to one
  ploop snapshot-delete -u UUID DISK  forget one
  ploop snapshot-merge [...] DISK    put one into what it stands on
  ploop merge TOP [...] BASE         the same with image files
  ploop replace ... -i FILE DISK     put a copy in the place of an image
  ploop resize -s SIZE DISK          make a disk and its file system larger
  ploop grow -s SIZE DISK            make a disk larger; its file system stays as it is
  ploop compact { DISK | DEVICE }    give space that is not used inside back
  ploop balloon show|change|... DISK  take space from a mounted disk, and give it back
  ploop copy -s DEVICE ...           send the top image of a device in use; -d: to a file
  ploop copy -d FILE                 receive a copy of an image
  ploop send DISK                    send a disk with its snapshots to another machine
  ploop receive DIR                  receive one
  ploop convert -f FORMAT DISK       make a disk raw or preallocated, or -v VERSION: another version
  ploop restore-descriptor DIR FILE  make a lost DiskDescriptor.xml anew
  ploop stop -d DEVICE               detach a device, but keep its name and images in mind
  ploop start -d DEVICE              attach it again
  ploop clear -d DEVICE              forget it
  ploop delete -d DEVICE -l LEVEL    drop an image of a stopped device
  ploop rm -d DEVICE -l LEVEL        the same
  ploop stat [-c|-l] -d DEVICE       counters of a device
  ploop getdev                       the minor that the next device would have
  ploop tour                         see all of it work, in a temporary folder
  ploop doctor [DISK | DEVICE]       what this machine offers; what is wrong with devices and disks
  ploop reload { DEVICE | -a }       serve running devices by the program that is installed now
  ploop completion bash|zsh|fish     the script by which a shell completes all this

Long work shows how far it is: as a bar on a terminal, with -v as a line now and then; --progress json: for programs.

DISK is a DiskDescriptor.xml, the folder in which it lies, or the id of a container; mount also takes a bare image FILE.
ploop COMMAND --help tells more; so does the manual page ploop(8).
";

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let program = args.next().unwrap_or_default();
    let args: Vec<OsString> = args.collect();
    signals::cancel_on_termination();
    report::set_verbose_level(CONSOLE);
    let status = match Path::new(&program).file_name().and_then(OsStr::to_str) {
        // mount(8) and umount(8) know a helper's status 32 alone.
        Some("mount.ploop") => return ExitCode::from(helpers::mount(&args)),
        Some("umount.ploop") => return ExitCode::from(helpers::umount(&args)),
        Some("ploop-balloon") => balloon::main(&args),
        _ => ploop_command(&args),
    };
    ExitCode::from(stopped().unwrap_or(status))
}

/// The status of a command that SIGINT, SIGTERM or SIGHUP asked to stop, whatever it had done until then: 128 and the
/// signal's number, as in a shell. Its messages say what was done.
fn stopped() -> Option<u8> {
    signals::received().and_then(|s| u8::try_from(128 + s).ok())
}

fn ploop_command(args: &[OsString]) -> u8 {
    let mut level = CONSOLE;
    let mut shown = Wanted::default();
    let mut rest = args;
    while let Some((first, tail)) = rest.split_first() {
        match global(first.as_bytes(), level) {
            Some(Global::Level(new)) => level = new,
            Some(Global::Progress(value)) => {
                let (value, behind) = match (value, tail.split_first()) {
                    (Some(value), _) => (value, tail),
                    (None, Some((next, behind))) => (next.as_os_str(), behind),
                    (None, None) => return ended(SUMMARY, misuse()),
                };
                match values::progress(value) {
                    Ok(wanted) => shown = wanted,
                    Err(e) => return ended(SUMMARY, Err(e)),
                }
                rest = behind;
                continue;
            }
            Some(Global::Help) => return ended(SUMMARY, write_out(SUMMARY.as_bytes())),
            Some(Global::Version) => return ended(SUMMARY, version()),
            Some(Global::Bad) => {
                eprintln!("ploop: unknown option {}", first.to_string_lossy());
                return ended(SUMMARY, misuse());
            }
            None => break,
        }
        rest = tail;
    }
    report::set_verbose_level(level);
    progress::show(shown, level);
    let Some((name, args)) = rest.split_first() else { return ended(SUMMARY, misuse()) };
    match COMMANDS.iter().find(|c| name == c.name) {
        Some(command) => run(command, args),
        None if name == "balloon" => balloon::main(args),
        None => external(name, args),
    }
}

/// Runs one command with its arguments.
pub fn run(command: &Command, args: &[OsString]) -> u8 {
    let operation = report::cancel::begin();
    let parsed = match getopt::parse(args, command.short, command.long) {
        Ok(parsed) => parsed,
        Err(message) => {
            let status = ended(command.usage, Err(Fail::Usage(Some(format!("ploop {}: {message}", command.name)))));
            return if command.name == snapshot_list::COMMAND.name { snapshot_list::FAILED } else { status };
        }
    };
    let (shown, options): (Vec<_>, Vec<_>) = parsed.options.into_iter().partition(|(o, _)| *o == PROGRESS);
    let parsed = Parsed { options, ..parsed };
    if let Some((_, value)) = shown.last() {
        match values::progress(value) {
            Ok(wanted) => progress::show(wanted, report::verbose_level()),
            Err(e) => return ended(command.usage, Err(e)),
        }
    }
    let asked = parsed.options.iter().find(|(o, _)| matches!(*o, HELP | VERSION));
    let end = match asked {
        Some((HELP, _)) => write_out(command.usage.as_bytes()),
        Some(_) => version(),
        None => taken(command, parsed).and_then(command.run),
    };
    let done = end.is_ok();
    let status = ended(command.usage, end);
    operation.end(done);
    status
}

/// What the operands of a command on one disk mean.
fn taken(command: &Command, mut parsed: Parsed) -> Result<Parsed, Fail> {
    if ON_A_DISK.contains(&command.name)
        && let [operand] = &mut parsed.operands[..]
    {
        *operand = disk::meant(operand).map_err(|e| match e {
            // As for an image that is missing.
            Fail::Mistake(text) if command.name == mount::COMMAND.name => Error::new(Kind::Mount, text).into(),
            other => other,
        })?;
    }
    Ok(parsed)
}

fn version() -> Result<(), Fail> {
    result(format_args!("ploop {}", env!("CARGO_PKG_VERSION")))
}

fn ended(usage: &str, end: Result<(), Fail>) -> u8 {
    const PARAM: u8 = Kind::Param as u8;
    match end {
        Ok(()) => 0,
        Err(Fail::Usage(message)) => {
            if let Some(message) = message {
                eprintln!("{message}");
            }
            eprint!("{usage}");
            PARAM
        }
        Err(Fail::Mistake(message)) => {
            eprintln!("{message}");
            PARAM
        }
        Err(Fail::Library(e)) => {
            report::error(&e);
            e.code() as u8
        }
        Err(Fail::Status(status)) => status,
    }
}

enum Global<'a> {
    Level(i32),
    /// How it is shown; none: the next argument says so.
    Progress(Option<&'a OsStr>),
    Help,
    Version,
    Bad,
}

/// An option before the command; none when the command begins.
fn global(arg: &[u8], level: i32) -> Option<Global<'_>> {
    let option = arg.strip_prefix(b"-")?;
    Some(match option {
        b"-help" => Global::Help,
        b"-version" => Global::Version,
        b"-progress" => Global::Progress(None),
        [b'-', b'p', b'r', b'o', b'g', b'r', b'e', b's', b's', b'=', value @ ..] => {
            Global::Progress(Some(OsStr::from_bytes(value)))
        }
        // -v, -vv and so on.
        _ if !option.is_empty() && option.iter().all(|b| *b == b'v') => {
            Global::Level(level.saturating_add(i32::try_from(option.len()).unwrap_or(i32::MAX)))
        }
        // -v3, -v-1.
        [b'v', number @ ..] => match std::str::from_utf8(number).ok().and_then(|n| n.parse().ok()) {
            Some(level) => Global::Level(level),
            None => Global::Bad,
        },
        _ => Global::Bad,
    })
}

/// A command that this program does not have: runs `ploop-NAME` from PATH with the remaining arguments.
fn external(name: &OsStr, args: &[OsString]) -> u8 {
    let mut program = OsString::from("ploop-");
    program.push(name);
    if !name.as_bytes().contains(&b'/') {
        let error = Process::new(&program).args(args).exec();
        if error.kind() != io::ErrorKind::NotFound {
            eprintln!("ploop: {} cannot be run: {error}", program.to_string_lossy());
        }
    }
    match later::is_classic(name) {
        true => later::not_yet(&name.to_string_lossy()),
        false => {
            let message = format!("ploop: unknown command {}", name.to_string_lossy());
            ended(SUMMARY, Err(Fail::Usage(Some(message))))
        }
    }
}

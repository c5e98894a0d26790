//! The candidates for the last of some words.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::Path;

use ploop::device;
use ploop::ops::snapshot_list::{self, ListParams};
use ploop::ops::{list, snapshot_list::Row};
use ploop::report;

use crate::getopt;
use crate::{COMMANDS, Command, balloon, disk, values};

/// Its commands have a second word.
const BALLOON: &str = "balloon";

/// What a word can be.
#[derive(Debug, PartialEq, Eq)]
pub enum Candidate {
    Word(String, String),
    /// The shell looks for files, or folders.
    Files,
    Folders,
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Candidate::Word(word, about) if about.is_empty() => f.write_str(word),
            Candidate::Word(word, about) => write!(f, "{word}\t{about}"),
            Candidate::Files => f.write_str(":files"),
            Candidate::Folders => f.write_str(":folders"),
        }
    }
}

/// What an option's argument, or an operand, is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// A snapshot of the disk that another word names.
    Snapshot,
    Device,
    MountPoint,
    Folder,
    File,
    OneOf(&'static [&'static str]),
    /// A number, a size, a new name.
    Free,
}

const PROGRESS: Kind = Kind::OneOf(&["auto", "json", "none"]);
const FORMATS: Kind = Kind::OneOf(&["expanded", "preallocated", "raw"]);

/// The argument of an option.
fn argument(command: &str, letter: char) -> Kind {
    match (command, letter) {
        ("snapshot" | "tsnapshot", 'u') => Kind::Free,
        (_, 'u' | 'U') => Kind::Snapshot,
        // The name of a device that is to be made.
        ("mount", 'd') => Kind::Free,
        ("copy", 'd') => Kind::File,
        ("umount" | "replace", 'm') => Kind::MountPoint,
        (name, 'm') if name.starts_with(BALLOON) => Kind::MountPoint,
        (_, 'm') => Kind::Folder,
        (_, 'd') => Kind::Device,
        ("copy" | "send" | "receive", 'f' | 'i' | 'o') => Kind::Free,
        ("send", 'k') => Kind::File,
        ("restore-descriptor" | "grow" | "merge", 'f') => Kind::OneOf(&["raw", "ploop1"]),
        (_, 'f') => FORMATS,
        ("init", 't') => Kind::OneOf(&["ext4", "ext3", "none"]),
        ("init", 'v') | ("convert", 'v') => Kind::OneOf(&["1", "2"]),
        ("snapshot-list", 'o') => Kind::OneOf(&["uuid", "parent_uuid", "current", "fname", "size", "used", "date"]),
        ("replace", 'o' | 'i') | (_, 'n') => Kind::File,
        _ => Kind::Free,
    }
}

/// The argument of a long option that no letter stands for.
fn long_argument(name: &str) -> Kind {
    match name {
        "abort" => Kind::Device,
        "progress" => PROGRESS,
        "image" | "svg" => Kind::File,
        _ => Kind::Free,
    }
}

fn operand(command: &str) -> Kind {
    match command {
        "umount" => Kind::MountPoint,
        "reload" => Kind::Device,
        "stop" | "start" | "clear" | "delete" | "rm" | "stat" | "getdev" => Kind::Free,
        "tour" | "receive" => Kind::Folder,
        "list" => Kind::Free,
        "completion" => Kind::OneOf(&["bash", "zsh", "fish"]),
        _ => Kind::File,
    }
}

/// Candidates for the last word; the words follow the program's name.
pub fn candidates(words: &[OsString]) -> Vec<Candidate> {
    // Messages of what is asked here do not belong on the terminal.
    report::set_verbose_level(report::NO_CONSOLE);
    let Some((last, before)) = words.split_last() else { return Vec::new() };
    let mut rest = before;
    while let Some((first, behind)) = rest.split_first().filter(|(w, _)| w.to_string_lossy().starts_with('-')) {
        rest = behind;
        if first == "--progress" {
            // The word behind it is its argument.
            match rest.split_first() {
                Some((_, behind)) => rest = behind,
                None => return of_kind(PROGRESS, &[], &last.to_string_lossy()),
            }
        }
    }
    let mut before = rest.iter();
    let Some(command) = before.next() else { return commands(last) };
    let command = match command == BALLOON {
        false => COMMANDS.iter().find(|c| command == c.name),
        true => match before.next() {
            Some(word) => balloon::COMMANDS.iter().find(|c| sub_command(c).is_some_and(|name| word == name)),
            None => {
                let fitting = balloon::COMMANDS.iter().filter_map(|c| sub_command(c)).map(|name| (name, ""));
                return fitting_words(fitting, last);
            }
        },
    };
    let Some(command) = command else { return vec![Candidate::Files] };
    let before: Vec<&OsString> = before.collect();
    let typed = last.to_string_lossy();
    let kind = match waits(command, &before) {
        Some(kind) => kind,
        None if typed.starts_with('-') => return options(command, &typed),
        None => operand(command.name),
    };
    of_kind(kind, &before, &typed)
}

fn commands(last: &OsStr) -> Vec<Candidate> {
    let globals = ["-v", "--progress", "--help", "--version"].map(|o| (o, ""));
    let all = COMMANDS.iter().map(|c| c.name).chain([BALLOON]).map(|name| (name, about(name)));
    fitting_words(all.chain(globals), last)
}

/// Those that begin as typed; options only where one is begun.
fn fitting_words(words: impl Iterator<Item = (&'static str, &'static str)>, last: &OsStr) -> Vec<Candidate> {
    let typed = last.to_string_lossy();
    let fitting = words.filter(|(name, _)| name.starts_with(typed.as_ref()));
    let shown = |(name, _): &(&str, &str)| !name.starts_with('-') || typed.starts_with('-');
    fitting.filter(shown).map(|(name, about)| Candidate::Word(name.into(), about.into())).collect()
}

/// The second word of a balloon command.
fn sub_command(command: &Command) -> Option<&'static str> {
    command.name.split_once(' ').map(|(_, name)| name)
}

/// The line of the summary that tells what the command does.
fn about(command: &str) -> &'static str {
    let start = format!("  ploop {command} ");
    let line = crate::SUMMARY.lines().find(|l| l.starts_with(&start)).unwrap_or_default();
    line.trim_start().split_once("  ").map_or("", |(_, about)| about.trim_start())
}

/// The kind of the argument that the last of these words, an option, still wants.
fn waits(command: &Command, before: &[&OsString]) -> Option<Kind> {
    let mut wanted = None;
    for word in before {
        let word = word.to_string_lossy();
        if wanted.take().is_some() {
            continue;
        }
        if word == "--" {
            return None;
        } else if let Some(name) = word.strip_prefix("--") {
            let known = command.long.iter().chain(&[("progress", true, getopt::PROGRESS)]);
            let found = known.into_iter().find(|(long, takes, _)| *takes && *long == name);
            wanted = found.map(|(long, _, letter)| match letter.is_ascii_alphabetic() {
                true => argument(command.name, *letter),
                false => long_argument(long),
            });
        } else if let Some(letters) = word.strip_prefix('-') {
            let takes = |l: char| command.short.split_once(l).is_some_and(|(_, rest)| rest.starts_with(':'));
            // One that takes an argument ends the bundle; what follows it in the word is the argument.
            wanted = match letters.find(takes) {
                Some(at) if at + 1 == letters.len() => letters.chars().last().map(|l| argument(command.name, l)),
                _ => None,
            };
        }
    }
    wanted
}

/// Options that begin so, with what the usage says of them.
fn options(command: &Command, typed: &str) -> Vec<Candidate> {
    let letters = command.short.chars().filter(|c| *c != ':').map(|c| format!("-{c}"));
    let longs =
        command.long.iter().map(|(name, ..)| *name).chain(["progress", "help", "version"]).map(|n| format!("--{n}"));
    let named = letters.chain(longs).filter(|o| o.starts_with(typed));
    named.map(|o| Candidate::Word(o.clone(), explained(command.usage, &o).into())).collect()
}

/// What the line of the usage that begins with an option says.
fn explained<'a>(usage: &'a str, option: &str) -> &'a str {
    let mut lines = usage.lines().filter(|l| l.starts_with("  -") || l.starts_with("    -"));
    lines
        .find_map(|line| {
            let (names, about) = line.trim_start().split_once("  ")?;
            names.split([' ', ',']).any(|name| name == option).then(|| about.trim_start())
        })
        .unwrap_or_default()
}

fn of_kind(kind: Kind, before: &[&OsString], typed: &str) -> Vec<Candidate> {
    let word = |word: String, about: String| Candidate::Word(word, about);
    let mut found: Vec<Candidate> = match kind {
        Kind::Free => Vec::new(),
        Kind::File => vec![Candidate::Files],
        Kind::Folder => vec![Candidate::Folders],
        Kind::OneOf(names) => names.iter().map(|n| word((*n).into(), String::new())).collect(),
        Kind::Device => device::list()
            .unwrap_or_default()
            .iter()
            .chain(&device::stopped().unwrap_or_default())
            .map(|d| word(d.node().display().to_string(), d.base().display().to_string()))
            .collect(),
        Kind::MountPoint => list::devices(true)
            .unwrap_or_default()
            .into_iter()
            .flat_map(|l| l.mount_points.into_iter().map(move |m| (m, l.base.clone())))
            .map(|(m, base)| word(m.display().to_string(), base.display().to_string()))
            .chain([Candidate::Files])
            .collect(),
        Kind::Snapshot => snapshots(before).iter().map(|r| word(plain(r), what(r))).collect(),
    };
    found.retain(|c| !matches!(c, Candidate::Word(w, _) if !w.starts_with(typed)));
    found
}

/// Without braces, which shells would want quoted.
fn plain(row: &Row) -> String {
    row.guid.to_string().trim_matches(['{', '}']).to_owned()
}

fn what(row: &Row) -> String {
    let kind = match (row.current, row.temporary) {
        (true, _) => "top",
        (_, true) => "temporary",
        _ => "snapshot",
    };
    format!("{kind}, {}", row.file.display())
}

/// Of the disk that one of these words names, else of the one in the current folder.
fn snapshots(before: &[&OsString]) -> Vec<Row> {
    let named = before.iter().filter_map(|w| disk::meant(w).ok()).find(|w| values::is_descriptor(w));
    let here = || disk::meant(OsStr::new(".")).ok().filter(|w| values::is_descriptor(w));
    let Some(descriptor) = named.or_else(here) else { return Vec::new() };
    snapshot_list::snapshots(Path::new(&descriptor), &ListParams::default()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        candidates(&words).into_iter().map(|c| c.to_string().split('\t').next().unwrap().to_owned()).collect()
    }

    #[test]
    fn commands_and_their_options() {
        assert_eq!(words("snapshot-"), ["snapshot-switch", "snapshot-delete", "snapshot-list", "snapshot-merge"]);
        assert_eq!(words("-v3 res"), ["resize", "restore-descriptor"]);
        assert!(words("").contains(&"mount".to_owned()) && !words("").contains(&"--help".to_owned()));
        assert_eq!(words("--"), ["--progress", "--help", "--version"]);
        assert_eq!(words("check --re"), ["--repair-sparse", "--remove-orphans"]);
        assert_eq!(words("snapshot-switch -"), ["-u", "-D", "--progress", "--help", "--version"]);
        assert_eq!(words("nonsense "), [":files"]);
        let told = candidates(&["check", "--fo"].map(OsString::from));
        assert_eq!(told, [Candidate::Word("--force".into(), "also if the image is clean".into())]);
    }

    #[test]
    fn arguments() {
        assert_eq!(words("init -f r"), ["raw"]);
        assert_eq!(words("init -nf "), ["expanded", "preallocated", "raw"]);
        assert_eq!(words("init -nfraw "), [":files"]);
        assert_eq!(words("init -s "), [""; 0]);
        assert_eq!(words("merge --progress "), ["auto", "json", "none"]);
        assert_eq!(words("--progress "), ["auto", "json", "none"]);
        assert_eq!(words("--progress json rel"), ["reload"]);
        assert_eq!(words("init -s 10g "), [":files"]);
        assert_eq!(words("init -- -f "), [":files"]);
        assert_eq!(words("mount -m "), [":folders"]);
        assert_eq!(words("info --image "), [":files"]);
        assert_eq!(words("completion "), ["bash", "zsh", "fish"]);
        assert_eq!(words("balloon c"), ["clear", "change", "complete", "check"]);
        assert_eq!(words("balloon change --s"), ["--size"]);
    }

    #[test]
    fn every_command_is_explained() {
        for name in COMMANDS.iter().map(|c| c.name).chain([BALLOON]).filter(|n| *n != "fsck") {
            assert!(!about(name).is_empty(), "{name} is not in the summary");
        }
    }
}

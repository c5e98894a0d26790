//! The manual pages name the commands and options that the programs take, and no others.

use std::collections::BTreeSet;
use std::ffi::OsString;

use crate::{COMMANDS, Command, balloon, getopt, helpers};

const MANUAL: &str = include_str!("../../../man/ploop.8");
const BALLOON: &str = include_str!("../../../man/ploop-balloon.8");
const HELPERS: &str = include_str!("../../../man/mount.ploop.8");

fn all() -> impl Iterator<Item = &'static Command> {
    COMMANDS.into_iter().chain(balloon::COMMANDS)
}

/// The word under which the manual of ploop has it.
fn headword(command: &Command) -> &'static str {
    command.name.split(' ').next().unwrap_or_default()
}

/// The same in that of ploop-balloon.
fn second_word(command: &Command) -> &'static str {
    command.name.split(' ').nth(1).unwrap_or_default()
}

/// A section of a page.
fn section<'a>(page: &'a str, title: &str) -> &'a str {
    page.split("\n.SH ").find(|s| s.starts_with(&format!("{title}\n"))).unwrap()
}

/// The texts of the COMMANDS section: the commands that a text is about, and all its words.
fn texts(page: &str) -> Vec<(BTreeSet<String>, BTreeSet<String>)> {
    let mut texts: Vec<(BTreeSet<String>, BTreeSet<String>)> = Vec::new();
    let (mut depth, mut heading) = (0, false);
    for line in section(page, "COMMANDS").lines().skip(1) {
        match line.split(' ').next().unwrap_or_default() {
            ".RS" => depth += 1,
            ".RE" => depth -= 1,
            ".TP" if depth == 0 => {
                texts.push(Default::default());
                heading = true;
            }
            ".TQ" if depth == 0 => heading = true,
            ".PP" if depth == 0 => break,
            _ => {
                let Some((commands, words)) = texts.last_mut() else { continue };
                let plain = plain(line);
                let mut found = words_of(&plain);
                if std::mem::take(&mut heading) {
                    commands.extend(found.next().map(String::from));
                }
                words.extend(found.map(String::from));
            }
        }
    }
    texts
}

fn words_of(plain: &str) -> impl Iterator<Item = &str> {
    plain.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').filter(|w| !w.is_empty())
}

/// Without the marks of the typesetter.
fn plain(line: &str) -> String {
    let text = match line.strip_prefix('.') {
        Some(request) => request.split_once(' ').map_or("", |(_, rest)| rest),
        None => line,
    };
    let mut out = text.replace("\\-", "-").replace('"', " ");
    for font in ["\\fB", "\\fI", "\\fR", "\\fP"] {
        out = out.replace(font, "");
    }
    out
}

/// The letters of an option string of getopt.
fn letters(short: &str) -> BTreeSet<char> {
    short.chars().filter(|c| *c != ':').collect()
}

/// Commands and options that a page does not have.
fn missing(
    page: &str,
    commands: impl Iterator<Item = &'static Command>,
    headword: fn(&Command) -> &str,
) -> Vec<String> {
    let texts = texts(page);
    let of = |name: &str| -> BTreeSet<&String> {
        texts.iter().filter(|(commands, _)| commands.contains(name)).flat_map(|(_, words)| words).collect()
    };
    let mut missing = Vec::new();
    for command in commands {
        let words = of(headword(command));
        let named = |letter: char| {
            words.iter().any(|w| w.strip_prefix('-').is_some_and(|l| !l.starts_with('-') && l.contains(letter)))
        };
        // A section of its own tells of --json.
        let named_long = |long: &str| long == "json" || words.contains(&format!("--{long}"));
        if words.is_empty() {
            missing.push(command.name.to_owned());
            continue;
        }
        let letters = letters(command.short).into_iter().filter(|c| !named(*c));
        missing.extend(letters.map(|c| format!("{} -{c}", command.name)));
        let longs = command.long.iter().filter(|(long, ..)| !named_long(long));
        missing.extend(longs.map(|(long, ..)| format!("{} --{long}", command.name)));
    }
    missing
}

/// A word like `-x`.
fn letter(word: &str) -> Option<char> {
    match word.as_bytes() {
        [b'-', letter] if letter.is_ascii_alphabetic() => Some(char::from(*letter)),
        _ => None,
    }
}

#[test]
fn the_manual_has_every_command_and_option() {
    let missing = missing(MANUAL, all().filter(|c| c.name != "fsck"), headword);
    assert!(missing.is_empty() && MANUAL.contains(".SH OUTPUT FOR PROGRAMS"), "missing: {missing:?}");
}

#[test]
fn the_manual_of_ploop_balloon_has_every_command_and_option() {
    assert_eq!(missing(BALLOON, balloon::COMMANDS.into_iter(), second_word), [""; 0]);
}

#[test]
fn the_manual_has_no_command_or_option_that_is_not_there() {
    let known: BTreeSet<String> = all().flat_map(|c| c.long).map(|(n, ..)| format!("--{n}")).collect();
    for (commands, words) in texts(MANUAL) {
        let about: Vec<_> = all().filter(|c| commands.contains(headword(c))).collect();
        let known_names: BTreeSet<_> = about.iter().map(|c| headword(c)).collect();
        assert_eq!(known_names.len(), commands.len(), "{commands:?}");
        for word in words.iter().filter(|w| w.starts_with("--") && w.len() > 2) {
            assert!(known.contains(word) || word == "--help", "{commands:?}: {word}");
        }
        // Options of other commands are named where one leads to the other.
        for letter in words.iter().filter_map(|w| letter(w)) {
            assert!(all().any(|c| letters(c.short).contains(&letter)), "{commands:?}: -{letter}");
        }
    }
}

#[test]
fn the_manual_of_ploop_balloon_has_no_command_or_option_that_is_not_there() {
    for (commands, words) in texts(BALLOON) {
        let about: Vec<_> = balloon::COMMANDS.into_iter().filter(|c| commands.contains(second_word(c))).collect();
        assert_eq!(about.len(), commands.len(), "{commands:?}");
        let longs: BTreeSet<String> = about.iter().flat_map(|c| c.long).map(|(n, ..)| format!("--{n}")).collect();
        let letters: BTreeSet<char> = about.iter().flat_map(|c| letters(c.short)).collect();
        for word in &words {
            assert!(!word.starts_with("--") || longs.contains(word), "{commands:?}: {word}");
            assert!(letter(word).is_none_or(|l| letters.contains(&l)), "{commands:?}: {word}");
        }
    }
}

#[test]
fn the_manual_of_the_helpers_of_mount_has_the_options_that_they_take() {
    // A line after .TP at the outer level heads the text of an option, or of several.
    let (mut depth, mut named, mut after) = (0, BTreeSet::new(), "");
    for line in section(HELPERS, "OPTIONS").lines().skip(1) {
        depth += i32::from(line == ".RS") - i32::from(line == ".RE");
        if after == ".TP" && depth == 0 {
            named.extend(words_of(&plain(line)).filter_map(letter));
        }
        after = line;
    }
    assert_eq!(named, letters(helpers::LETTERS));
}

#[test]
fn help_of_each_command_ends_with_an_example_that_it_takes() {
    for command in all().filter(|c| c.name != "fsck") {
        let Some((_, text)) = command.usage.split_once("For example") else {
            panic!("ploop {} --help has no example (\"For example\")", command.name)
        };
        let about = match command.name.strip_prefix("balloon ") {
            // These have one text.
            Some(name) if name != "discard" => "balloon",
            _ => command.name,
        };
        let line = text.lines().find_map(|l| l.split_once(&format!("ploop {about}")));
        let Some((_, arguments)) = line else { panic!("the example of ploop {} is of another command", command.name) };
        let words = arguments.split(['\'', ')', '>']).next().unwrap_or_default();
        let mut words: Vec<OsString> = words.split_whitespace().map(OsString::from).collect();
        let by = match about {
            "balloon" => {
                let name = words.remove(0);
                balloon::COMMANDS.into_iter().find(|c| name == second_word(c)).unwrap()
            }
            _ => command,
        };
        getopt::parse(&words, by.short, by.long).unwrap_or_else(|e| panic!("{}: {e}: {words:?}", command.name));
    }
}

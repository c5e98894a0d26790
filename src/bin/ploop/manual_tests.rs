//! The manual names the commands and options that the program takes, and no others.

use std::collections::BTreeSet;

use crate::{COMMANDS, Command, balloon};

const MANUAL: &str = include_str!("../../../man/ploop.8");

fn all() -> impl Iterator<Item = &'static Command> {
    COMMANDS.into_iter().chain(balloon::COMMANDS)
}

/// The word under which the manual has it.
fn headword(command: &Command) -> &'static str {
    command.name.split(' ').next().unwrap_or_default()
}

/// The texts of the COMMANDS section: the commands that a text is about, and all its words.
fn texts() -> Vec<(BTreeSet<String>, BTreeSet<String>)> {
    let section = MANUAL.split("\n.SH ").find(|s| s.starts_with("COMMANDS\n")).unwrap();
    let mut texts: Vec<(BTreeSet<String>, BTreeSet<String>)> = Vec::new();
    let (mut depth, mut heading) = (0, false);
    for line in section.lines().skip(1) {
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
                let mut found = plain.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').filter(|w| !w.is_empty());
                if std::mem::take(&mut heading) {
                    commands.extend(found.next().map(String::from));
                }
                words.extend(found.map(String::from));
            }
        }
    }
    texts
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

#[test]
fn the_manual_has_every_command_and_option() {
    let texts = texts();
    let of = |name: &str| -> BTreeSet<&String> {
        texts.iter().filter(|(commands, _)| commands.contains(name)).flat_map(|(_, words)| words).collect()
    };
    let mut missing = Vec::new();
    for command in all().filter(|c| c.name != "fsck") {
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
        let letters = command.short.chars().filter(|c| *c != ':' && !named(*c));
        missing.extend(letters.map(|c| format!("{} -{c}", command.name)));
        let longs = command.long.iter().filter(|(long, ..)| !named_long(long));
        missing.extend(longs.map(|(long, ..)| format!("{} --{long}", command.name)));
    }
    assert!(missing.is_empty() && MANUAL.contains(".SH OUTPUT FOR PROGRAMS"), "missing: {missing:?}");
}

#[test]
fn the_manual_has_no_command_or_option_that_is_not_there() {
    let known: BTreeSet<String> = all().flat_map(|c| c.long).map(|(n, ..)| format!("--{n}")).collect();
    for (commands, words) in texts() {
        let about: Vec<_> = all().filter(|c| commands.contains(headword(c))).collect();
        let known_names: BTreeSet<_> = about.iter().map(|c| headword(c)).collect();
        assert_eq!(known_names.len(), commands.len(), "{commands:?}");
        for word in words.iter().filter(|w| w.starts_with("--") && w.len() > 2) {
            assert!(known.contains(word) || word == "--help", "{commands:?}: {word}");
        }
        let letters: BTreeSet<char> = about.iter().flat_map(|c| c.short.chars()).filter(|c| *c != ':').collect();
        let dash = |w: &&String| w.len() == 2 && w.starts_with('-') && w.as_bytes()[1].is_ascii_alphabetic();
        for word in words.iter().filter(dash) {
            let letter = char::from(word.as_bytes()[1]);
            // Options of other commands are named where one leads to the other.
            let known = letters.contains(&letter) || all().any(|c| c.short.contains(letter));
            assert!(known, "{commands:?}: {word}");
        }
    }
}

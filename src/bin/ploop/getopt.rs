//! Option parsing as GNU getopt does it: options may follow operands, short ones may be bundled, long ones shortened.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Every command knows these two.
pub const HELP: char = '\u{1}';
pub const VERSION: char = '\u{2}';
/// How progress is shown; every command knows it, too.
pub const PROGRESS: char = '\u{3}';

/// A long option: its name, whether an argument is required, and the letter it stands for.
pub type Long = (&'static str, bool, char);

/// Options that act on all disks of the machine: a slip of the hand must not become one of them.
const NEVER_SHORTENED: [&str; 1] = ["all"];

/// What was found on a command line.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// In their order; the argument if the option takes one.
    pub options: Vec<(char, OsString)>,
    pub operands: Vec<OsString>,
}

/// Parses the arguments after the command's name. `short` is a getopt string: letters, a colon after those that take an
/// argument. The error is the text that getopt prints, without the program's name.
pub fn parse(args: &[OsString], short: &str, long: &[Long]) -> Result<Parsed, String> {
    let mut parsed = Parsed::default();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let bytes = arg.as_bytes();
        if bytes == b"--" {
            parsed.operands.extend(rest.cloned());
            break;
        } else if let Some(name) = bytes.strip_prefix(b"--") {
            parsed.options.push(long_option(name, long, &mut rest)?);
        } else if bytes.len() > 1 && bytes[0] == b'-' {
            short_options(&bytes[1..], short, &mut rest, &mut parsed.options)?;
        } else {
            parsed.operands.push(arg.clone());
        }
    }
    Ok(parsed)
}

fn short_options<'a>(
    mut letters: &[u8],
    short: &str,
    rest: &mut impl Iterator<Item = &'a OsString>,
    options: &mut Vec<(char, OsString)>,
) -> Result<(), String> {
    while let Some((first, tail)) = letters.split_first() {
        let letter = char::from(*first);
        let at = short.find(letter).filter(|_| letter != ':');
        let Some(at) = at else { return Err(format!("invalid option -- '{letter}'")) };
        if !short[at + 1..].starts_with(':') {
            options.push((letter, OsString::new()));
            letters = tail;
            continue;
        }
        let argument = match tail.is_empty() {
            false => OsString::from_vec(tail.to_vec()),
            true => rest.next().cloned().ok_or_else(|| format!("option requires an argument -- '{letter}'"))?,
        };
        options.push((letter, argument));
        break;
    }
    Ok(())
}

fn long_option<'a>(
    given: &[u8],
    long: &[Long],
    rest: &mut impl Iterator<Item = &'a OsString>,
) -> Result<(char, OsString), String> {
    let (name, value) = match given.iter().position(|b| *b == b'=') {
        Some(at) => (&given[..at], Some(OsStr::from_bytes(&given[at + 1..]).to_owned())),
        None => (given, None),
    };
    let shown = String::from_utf8_lossy(name);
    let known =
        long.iter().copied().chain([("help", false, HELP), ("version", false, VERSION), ("progress", true, PROGRESS)]);
    let mut matching: Vec<Long> = known.filter(|(n, ..)| n.as_bytes().starts_with(name)).collect();
    if let Some(exact) = matching.iter().copied().find(|(n, ..)| n.as_bytes() == name) {
        matching = vec![exact];
    } else if matching.len() > 1 {
        // What a command's own options could be shortened to stays theirs.
        matching.retain(|(.., letter)| *letter != PROGRESS);
    }
    let (full, wants, letter) = match matching[..] {
        [one] => one,
        [] => return Err(format!("unrecognized option '--{shown}'")),
        [(_, _, first), ..] if matching.iter().all(|(_, _, l)| *l == first) => matching[0],
        _ => {
            let names: Vec<String> = matching.iter().map(|(n, ..)| format!("'--{n}'")).collect();
            return Err(format!("option '--{shown}' is ambiguous; possibilities: {}", names.join(" ")));
        }
    };
    if name != full.as_bytes() && NEVER_SHORTENED.contains(&full) {
        return Err(format!(
            "option '--{shown}' is not taken for '--{full}', which acts on all disks: write it in full"
        ));
    }
    match (wants, value) {
        (false, Some(_)) => Err(format!("option '--{full}' doesn't allow an argument")),
        (false, None) => Ok((letter, OsString::new())),
        (true, Some(value)) => Ok((letter, value)),
        (true, None) => match rest.next() {
            Some(value) => Ok((letter, value.clone())),
            None => Err(format!("option '--{full}' requires an argument")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Parsed = (Vec<(char, String)>, Vec<String>);

    fn run(args: &[&str]) -> Result<Parsed, String> {
        let args: Vec<OsString> = args.iter().map(OsString::from).collect();
        let long = [
            ("force", false, 'f'),
            ("hard-force", false, 'F'),
            ("blocksize", true, 'b'),
            ("abort", true, 'x'),
            ("all", false, 'a'),
        ];
        let text = |s: OsString| s.into_string().unwrap();
        let p = parse(&args, "fFb:r", &long)?;
        Ok((p.options.into_iter().map(|(c, v)| (c, text(v))).collect(), p.operands.into_iter().map(text).collect()))
    }

    #[test]
    fn options_may_follow_operands_and_be_bundled() {
        let (o, r) = run(&["one", "-rfb7", "two", "-b", "8", "-", "--", "-f"]).unwrap();
        let want = [('r', ""), ('f', ""), ('b', "7"), ('b', "8")].map(|(c, v)| (c, v.to_string()));
        assert_eq!(o, want);
        assert_eq!(r, ["one", "two", "-", "-f"]);
    }

    #[test]
    fn long_options_may_be_shortened() {
        let (o, _) = run(&["--fo", "--blocksize=9", "--b", "10", "--hel"]).unwrap();
        let want = [('f', ""), ('b', "9"), ('b', "10"), (HELP, "")].map(|(c, v)| (c, v.to_string()));
        assert_eq!(o, want);
    }

    #[test]
    fn progress_takes_no_shortened_option_away() {
        let of = |args: &[&str]| {
            let args: Vec<OsString> = args.iter().map(OsString::from).collect();
            parse(&args, "", &[("partition", true, 'p')]).map(|p| p.options[0].0)
        };
        assert_eq!((of(&["--p", "1"]), of(&["--prog", "json"])), (Ok('p'), Ok(PROGRESS)));
    }

    #[test]
    fn an_option_that_acts_on_all_disks_is_written_in_full() {
        assert_eq!(run(&["--all"]).unwrap().0, [('a', String::new())]);
        for (short, text) in [("--al", "write it in full"), ("--a", "is ambiguous"), ("--al=1", "write it in full")] {
            let error = run(&[short]).unwrap_err();
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn mistakes() {
        for (args, text) in [
            (&["-x"][..], "invalid option -- 'x'"),
            (&["-f:"], "invalid option -- ':'"),
            (&["-b"], "option requires an argument -- 'b'"),
            (&["--blocksize"], "option '--blocksize' requires an argument"),
            (&["--nope"], "unrecognized option '--nope'"),
            (&["--force=1"], "option '--force' doesn't allow an argument"),
            (&["--h"], "option '--h' is ambiguous; possibilities: '--hard-force' '--help'"),
        ] {
            assert_eq!(run(args).unwrap_err(), text);
        }
    }
}

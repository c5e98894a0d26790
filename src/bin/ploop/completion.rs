//! `ploop completion`: scripts for shells, and what they ask for.
//!
//! The scripts know nothing of the command: they hand over the words typed so far, and this answers with the candidates for the last
//! one, from the same tables that the command line is parsed by.

mod words;

use std::io::Write;

use crate::getopt::Parsed;
use crate::{Command, Fail, misuse, write_out};

pub const COMMAND: Command = Command {
    name: "completion",
    short: "",
    long: &[],
    usage: "\
Usage: ploop completion bash|zsh|fish

Prints the script that lets this shell complete commands, options, devices, mount points and the GUIDs of a disk's snapshots.
install.sh installs it; without, for example:

  . <(ploop completion bash)                                       in ~/.bashrc
  ploop completion zsh > ~/.zfunc/_ploop                           with ~/.zfunc in fpath
  ploop completion fish > ~/.config/fish/completions/ploop.fish
",
    run,
};

const SCRIPTS: [(&str, &str); 3] = [
    ("bash", include_str!("completion/ploop.bash")),
    ("zsh", include_str!("completion/ploop.zsh")),
    ("fish", include_str!("completion/ploop.fish")),
];

/// How the scripts ask.
const ASK: &str = "words";

fn run(parsed: Parsed) -> Result<(), Fail> {
    let [first, rest @ ..] = &parsed.operands[..] else { return misuse() };
    if first == ASK {
        let mut out = Vec::new();
        for candidate in words::candidates(rest) {
            let _ = writeln!(out, "{candidate}");
        }
        return write_out(&out);
    }
    let script = SCRIPTS.iter().find(|(shell, _)| first == shell).filter(|_| rest.is_empty());
    match script {
        Some((_, text)) => write_out(text.as_bytes()),
        None => misuse(),
    }
}

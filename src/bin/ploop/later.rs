//! Commands of the classic tools that this version does not have.

use std::ffi::OsStr;

use ploop::error::Kind;

const CLASSIC: [&str; 3] = ["encrypt", "degrade", "fscheck"];

/// Is it a command of the classic tool?
pub fn is_classic(name: &OsStr) -> bool {
    name.to_str().is_some_and(|n| CLASSIC.contains(&n))
}

/// Says that a command is not there; the exit status.
pub fn not_yet(name: &str) -> u8 {
    eprintln!(
        "ploop {name}: this version ({}) does not have this command yet; ploop --help shows those it has",
        env!("CARGO_PKG_VERSION")
    );
    Kind::Param as u8
}

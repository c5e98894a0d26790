//! Output for programs (`--json`): one object, whose member `schema` names its kind and version. Within a version members are
//! only added.

use std::path::Path;

use serde::Serialize;

use crate::getopt::{Long, Parsed};
use crate::{Fail, mistake, result};

/// The letter that `--json` stands for.
pub const LETTER: char = '\u{1d}';
pub const OPTION: Long = ("json", false, LETTER);

#[derive(Serialize)]
struct Output<T> {
    schema: String,
    #[serde(flatten)]
    content: T,
}

/// Whether the output is for a program.
pub fn wanted(parsed: &Parsed) -> bool {
    parsed.options.iter().any(|(option, _)| *option == LETTER)
}

/// Prints an object of version 1 of its kind.
pub fn show(kind: &str, content: impl Serialize) -> Result<(), Fail> {
    let output = Output { schema: format!("ploop-{kind}-1"), content };
    match serde_json::to_string_pretty(&output) {
        Ok(text) => result(text),
        Err(e) => Err(mistake(format!("{kind} cannot be shown as JSON: {e}"))),
    }
}

/// A path as text: what is not UTF-8 in it is replaced.
pub fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

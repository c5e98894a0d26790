//! The plan of the house as a test: which room may import from which, no cycles between files, and sizes.
//!
//! `cargo test --test layering -- --include-ignored --nocapture` lists every violation with its file and line.

mod examples;
mod lex;
mod modules;
mod rules;
mod source;

use std::path::Path;

use modules::{Tree, read_all};

fn sources() -> Vec<(String, String)> {
    read_all(Path::new(env!("CARGO_MANIFEST_DIR")))
}

fn none(what: &str, violations: &[String]) {
    assert!(violations.is_empty(), "{} {what}:\n{}", violations.len(), violations.join("\n"));
}

#[test]
fn no_room_imports_from_one_above_and_no_files_in_a_circle() {
    none("imports against the plan", &rules::layering(&Tree::new(&sources())));
}

#[test]
fn files_and_functions_are_short() {
    let sources = sources();
    let lines: Vec<(String, usize)> = sources.iter().map(|(p, text)| (p.clone(), text.lines().count())).collect();
    none("files and functions against the plan", &rules::sizes(&Tree::new(&sources), &lines));
}

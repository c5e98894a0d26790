//! What every test binary may use, and the unit tests of the library as `crate::testing`: the one generator of
//! pseudo-random numbers, the one way to name a seed, and the one place that decides what a skipped test is.
#![allow(dead_code)] // each binary uses its part

pub mod rng;
pub mod seed;
pub mod skip;

/// What `$PLOOP_TEST` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counts {
    /// `ci`: reduced counts; a skipped device test or differential test fails.
    Reduced,
    /// Not set: the counts for work on the code; skipped tests pass and say so.
    Usual,
    /// `full`: the counts that an acceptance names; skipped tests fail as under `ci`.
    Full,
}

pub fn counts() -> Counts {
    match std::env::var("PLOOP_TEST").as_deref() {
        Ok("full") => Counts::Full,
        Ok("ci") => Counts::Reduced,
        _ => Counts::Usual,
    }
}

/// The name of the running test: its thread has it, or, where the harness runs tests in the main thread, the command line.
pub fn test_name() -> String {
    match std::thread::current().name() {
        Some(name) if name != "main" => name.to_owned(),
        _ => std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default(),
    }
}

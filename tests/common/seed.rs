//! One way to name a seed: `PLOOP_SEED=N` replays in every seeded test (older names are aliases, see CONTRIBUTING.md), and
//! a seeded test that fails prints the command that replays it.
//!
//! A test whose choices follow from constants alone is not seeded: running it again replays it.

use std::ops::RangeInclusive;

/// The seed that the environment asks for, by `$PLOOP_SEED` or the test's own `alias`.
pub fn asked(alias: Option<&str>) -> Option<u64> {
    [Some("PLOOP_SEED"), alias].into_iter().flatten().find_map(|name| {
        let text = std::env::var(name).ok()?;
        Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
    })
}

/// The command that runs the current test with a seed.
pub fn replay(seed: u64) -> String {
    // The library's unit tests are compiled as the crate `ploop`, those under tests/ by the name of their binary.
    let binary = match env!("CARGO_CRATE_NAME") {
        "ploop" => "--lib".to_owned(),
        name => format!("--test {name}"),
    };
    format!("PLOOP_SEED={seed} cargo test {binary} {}", super::test_name()).trim_end().to_owned()
}

/// The seed of a test that makes one run: dropped by a panic, it prints the command that replays the run.
pub struct Seed(pub u64);

/// The seed asked for, else `usual`.
pub fn one(alias: Option<&str>, usual: u64) -> Seed {
    Seed(asked(alias).unwrap_or(usual))
}

/// A seed that no run before had.
pub fn fresh() -> u64 {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    clock.map_or(1, |d| d.as_nanos() as u64) ^ u64::from(std::process::id()) << 40
}

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("replay: {}", replay(self.0));
        }
    }
}

/// The seeds of a test that makes a run each: dropped by a panic, it prints the command that replays the current run.
pub struct Seeds {
    left: RangeInclusive<u64>,
    current: Option<u64>,
}

/// The seed asked for alone, else all of `usual`.
pub fn each(usual: RangeInclusive<u64>) -> Seeds {
    Seeds { left: asked(None).map_or(usual, |seed| seed..=seed), current: None }
}

impl Iterator for Seeds {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.current = self.left.next();
        self.current
    }
}

impl Drop for Seeds {
    fn drop(&mut self) {
        if let (true, Some(seed)) = (std::thread::panicking(), self.current) {
            eprintln!("replay: {}", replay(seed));
        }
    }
}

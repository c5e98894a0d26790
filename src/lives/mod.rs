//! The simulation of whole lives: caller, supervisor, workers, helpers and the host's files, with any process killed and
//! the power cut between any two steps.
//!
//! What runs is the code of library and server itself, on real files and sockets. Only what is listed in `sys::host` is
//! simulated: time, waiting, processes; and the kernel's block device, by a transport of its own.
//!
//! `PLOOP_SEED=N LIVES=1 PLOOP_TRACE=1 cargo test --lib lives::lives -- --nocapture` shows one life, step by step;
//! `BREACH=WORD` chooses among the defects that are put back, in this test and in that of all of them.

mod checks;
mod life;
mod model;
mod operations;
mod plan;
mod restarts;
mod schedule;
pub mod transport;
mod view;
pub mod world;

pub use transport::BLOCK_DEVICES;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::testing::{Counts, counts};

/// Defects that are put back, each of which some seed must find; in CI only those that few seeds find.
const BREACHES: [(&str, bool); 16] = [
    ("a merge's own mark is refused", true),
    ("the folder of a commit is not synced", true),
    ("requests are not sent again", true),
    ("the journal is not given to the supervisor", true),
    ("the record keeps the old chain", true),
    ("a change is made twice", true),
    ("the former top stays marked", true),
    ("no supervisor is started", true),
    ("moved clusters are named late", false),
    ("the block device keeps its size", true),
    ("the outcome of a merge is reported once", false),
    ("a reload ends the supervisor", false),
    ("close is not noted", false),
    ("changes are dropped with the device", true),
    ("the journal is lost with the supervisor", false),
    ("space is given back by one worker alone", false),
];

/// Seeds in which a breach must be found.
const SEEDS: u64 = 500;

#[test]
fn each_breach_of_a_life_is_found() {
    if !nix::unistd::geteuid().is_root() {
        crate::testing::skip::skip("servers work for root only");
        return;
    }
    let all = matches!(counts(), Counts::Full);
    let next = AtomicUsize::new(0);
    let unfound = Mutex::new(Vec::new());
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                while let Some((breach, quick)) = BREACHES.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let wanted = std::env::var("BREACH").map_or(*quick || all, |wanted| breach.contains(&wanted));
                    if !wanted {
                        continue;
                    }
                    match (0..SEEDS).find_map(|seed| life::live(seed, Some(breach)).err().map(|why| (seed, why))) {
                        Some((seed, why)) => {
                            println!("{breach}: seed {seed}: {}", why.lines().next().unwrap_or_default())
                        }
                        None => unfound.lock().expect("a lock").push(*breach),
                    }
                }
            });
        }
    });
    let unfound = unfound.into_inner().expect("a lock");
    assert!(unfound.is_empty(), "not found in {SEEDS} seeds: {unfound:?}");
}

#[test]
fn lives() {
    if !nix::unistd::geteuid().is_root() {
        crate::testing::skip::skip("servers work for root only");
        return;
    }
    let first: u64 = std::env::var("PLOOP_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    let usual = if matches!(counts(), Counts::Full) { 100_000 } else { 400 };
    let count: u64 = std::env::var("LIVES").ok().and_then(|s| s.parse().ok()).unwrap_or(usual);
    // With a defect put back, to see what it does in a life.
    let word = std::env::var("BREACH").ok();
    let breach =
        word.and_then(|word| BREACHES.iter().find(|(breach, _)| breach.contains(&word)).map(|(breach, _)| *breach));
    let failed = Mutex::new(Vec::new());
    let next = AtomicU64::new(first);
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        return;
                    }
                    if let Err(why) = life::live(seed, breach) {
                        println!("{why}\n");
                        println!("replay: PLOOP_SEED={seed} LIVES=1 PLOOP_TRACE=1 cargo test --lib lives::lives -- --nocapture");
                        failed.lock().expect("a lock").push(seed);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().expect("a lock");
    println!("{count} lives, {} steps", life::STEPS.load(Ordering::Relaxed));
    assert!(failed.is_empty(), "seeds {failed:?} failed");
}

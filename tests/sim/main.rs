//! The engine in a simulated world: every run follows from its seed.
//!
//! The engine's sources are compiled here once more, because only a test's build of them can break its rules on purpose
//! (`engine::breach`).
//!
//! `PLOOP_TEST=ci` runs 1,200 seeds, `PLOOP_TEST=full` 100,000, otherwise 50. `PLOOP_SEED=N cargo test --test sim the_engine`
//! replays one and prints what happened (`SIM_LIVE=1`: at once; `SIM_SEED` is the older name). `SIM_FIRST=N` begins with that seed, `SIM_VERBOSE=1`
//! tells how far it is, `SIM_STOP=1` ends with the first failure,
//! `SIM_BREAK=NAME` looks for one breach only (with `PLOOP_SEED`: in that run, and prints it).

mod act;
mod background;
mod broken;
mod checks;
mod copier;
mod cover;
mod disk;
#[allow(dead_code)] // part of the library, compiled here with its breaches
#[path = "../../src/engine/mod.rs"]
mod engine;
mod give_back;
mod image;
mod load;
mod naive;
mod oracle;
mod recover;
/// The engine, compiled here as a part of this crate, finds the library's formats under this path.
mod format {
    pub use ploop::format::*;
}
mod rest;
mod table;
#[path = "../common/mod.rs"]
mod testing;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use broken::{Break, Broken};
use cover::Cover;
use engine::Engine;
use engine::api::{Action, Carried, Config, Event, Status};
use engine::breach;
use table::Table;
use world::{Machine, Maker, Violation, World};

impl Machine for Engine<Table> {
    fn step(&mut self, event: Event<'_>, actions: &mut Vec<Action>) {
        Engine::step(self, event, actions);
    }

    fn status(&self) -> Status {
        Engine::status(self)
    }

    fn works_in_background(&self) -> bool {
        true
    }
}

fn real(config: Config, carried: Vec<Carried>, table: Table) -> Box<dyn Machine> {
    Box::new(Engine::new(config, carried, table))
}

/// One run. The error says which rule was violated.
fn run(seed: u64, maker: Maker, broken: Break, traced: bool) -> Result<Cover, String> {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(seed, maker, broken, traced);
        world.run();
        world.cover
    }));
    outcome.map_err(|e| match e.downcast::<Violation>() {
        Ok(v) => v.0,
        Err(e) => {
            let text = e.downcast_ref::<String>().cloned();
            let text = text.or_else(|| e.downcast_ref::<&str>().map(|s| s.to_string()));
            format!("seed {seed}: panic: {}", text.unwrap_or_default())
        }
    })
}

fn seeds() -> u64 {
    match testing::counts() {
        testing::Counts::Full => 100_000,
        testing::Counts::Reduced => 1200,
        testing::Counts::Usual => 50,
    }
}

/// The one seed to run, and to say what happens in.
fn asked() -> Option<u64> {
    testing::seed::asked(Some("SIM_SEED"))
}

/// A step of the engine that never ends cannot be stopped, but it can be named: the whole test is aborted.
fn watch(seed: Arc<AtomicU64>) {
    std::thread::spawn(move || {
        let (mut last, mut since) = (u64::MAX, 0);
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let now = seed.load(Ordering::Relaxed);
            since = if now == last { since + 1 } else { 0 };
            last = now;
            if now == u64::MAX {
                return;
            }
            if since > 120 {
                eprintln!("seed {now} does not end: PLOOP_SEED={now} SIM_LIVE=1 cargo test --test sim the_engine");
                std::process::abort();
            }
        }
    });
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Runs many seeds (or the one asked for); returns what they met.
fn many(maker: Maker, seeds: u64) -> Cover {
    if let Some(seed) = asked() {
        match run(seed, maker, Break::None, true) {
            Ok(cover) => println!("seed {seed} passes\n{}", cover.table()),
            Err(text) => panic!("{text}\nreplay: {}", testing::seed::replay(seed)),
        }
        return Cover::default();
    }
    let first = std::env::var("SIM_FIRST").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    let (verbose, stop) = (std::env::var_os("SIM_VERBOSE").is_some(), std::env::var_os("SIM_STOP").is_some());
    let next = AtomicU64::new(first);
    let results = Mutex::new((Cover::default(), Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let current = Arc::new(AtomicU64::new(u64::MAX - 1));
                watch(current.clone());
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + seeds || stop && !lock(&results).1.is_empty() {
                        break;
                    }
                    current.store(seed, Ordering::Relaxed);
                    if verbose {
                        eprintln!("seed {seed}");
                    }
                    let outcome = run(seed, maker, Break::None, false);
                    let mut results = lock(&results);
                    match outcome {
                        Ok(c) => results.0.add(&c),
                        Err(text) => {
                            if verbose {
                                eprintln!("{text}");
                            }
                            results.1.push(text);
                        }
                    }
                }
                current.store(u64::MAX, Ordering::Relaxed);
            });
        }
    });
    let (cover, failures) = results.into_inner().unwrap_or_else(|e| e.into_inner());
    let shown: Vec<&str> = failures.iter().take(20).map(String::as_str).collect();
    let count = failures.len();
    assert!(
        failures.is_empty(),
        "{}\n{count} of {seeds} seeds fail; replay: PLOOP_SEED=N cargo test --test sim the_engine",
        shown.join("\n")
    );
    cover
}

#[test]
fn the_model_passes() {
    for seed in 0..seeds().min(50) {
        if let Err(text) = run(seed, naive::make, Break::None, false) {
            panic!("{text}");
        }
    }
}

#[test]
fn the_engine_passes() {
    let cover = many(real, seeds());
    println!("{}", cover.table());
    // Fifty seeds need not meet everything.
    if seeds() >= 200 && asked().is_none() {
        let missing = cover.missing(&[cover::WANTED, background::WANTED, copier::WANTED].concat());
        assert!(missing.is_empty(), "never happened: {missing:?}");
    }
}

fn make_broken(how: Break) -> Maker {
    macro_rules! makers {
        ($($name:ident)*) => {
            match how {
                Break::None => real,
                $(Break::$name => |c, carried, t| Broken::wrap(real, Break::$name, c, carried, t),)*
            }
        };
    }
    makers!(ForgetStore TornWrite LazySync NoBarrier LoseCarried ReuseTooEarly UsedAsFree ForgetFailure EarlyFlush EarlyZero
        NoZero NoDataSync EntryBeforeData SwallowSyncError SwallowBatError NoBatWrite NoZeroRange LoseReply TwoReplies
        LoseInUse ReadBelow NoBatSync JoinRunningCycle ShortZero ForgetCopyUp
        SwallowReadError HoldFlush NoTick TrustBatAfterFailure UnsyncedMark)
}

#[test]
fn each_breach_is_found() {
    let only = std::env::var("SIM_BREAK").ok();
    for how in broken::ALL.iter().filter(|h| only.as_ref().is_none_or(|o| format!("{h:?}") == *o)) {
        search(&format!("{how:?}"), SEEDS, |seed, traced| run(seed, make_broken(*how), *how, traced));
    }
}

#[test]
fn each_broken_rule_of_the_engine_is_found() {
    let only = std::env::var("SIM_BREAK").ok();
    let wanted = |rule: &breach::Breach| match &only {
        Some(only) => format!("{rule:?}") == *only,
        None => testing::counts() == testing::Counts::Full || !RARE.contains(rule),
    };
    for rule in breach::ALL.iter().filter(|r| wanted(r)) {
        let seeds = if RARE.contains(rule) { 8 * SEEDS } else { SEEDS };
        search(&format!("{rule:?}"), seeds, |seed, traced| {
            breach::set(Some(*rule));
            let outcome = run(seed, real, Break::None, traced);
            breach::set(None);
            outcome
        });
    }
}

/// In which a breach must be found.
const SEEDS: u64 = 500;
/// Found in some thousand seeds: looked for with the full counts only.
const RARE: [breach::Breach; 1] = [breach::Breach::TrustTargetAfterKill];

/// A breach is found in so many seeds or fewer, and again when the seed that found it is replayed.
fn search(name: &str, seeds: u64, run: impl Fn(u64, bool) -> Result<Cover, String>) {
    if let Some(seed) = asked() {
        println!("{name}: {}", run(seed, true).err().unwrap_or_else(|| format!("seed {seed} does not find it")));
        return;
    }
    let Some((seed, text)) = (0..seeds).find_map(|seed| Some((seed, run(seed, false).err()?))) else {
        panic!("{name} was not found in {seeds} seeds");
    };
    println!("{name}: {text}");
    let again = run(seed, false).err();
    assert_eq!(again.as_ref(), Some(&text), "{name}: seed {seed} replayed");
}

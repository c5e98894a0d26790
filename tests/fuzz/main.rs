//! Fuzzing of what strangers can hand in: images (header and table, then I/O on what opens), descriptors, messages on the
//! control socket.
//!
//! A mutation fuzzer of our own that follows from a seed. What an input leads to (its error, numbers left out) serves as
//! coverage: an input that leads somewhere new is kept and mutated further. The corpus in tests/fuzz/corpus comes first.
//!
//! `PLOOP_FUZZ_SECONDS`: for so long each (an hour in full; 2 s otherwise); `PLOOP_SEED`; `PLOOP_FUZZ_KEEP=1`
//! writes the inputs that led somewhere new into the corpus; `PLOOP_FUZZ_WATCHED=1` sets no limits of time and address
//! space, for valgrind and AddressSanitizer. A failing input is left in target/tmp/fuzz-TARGET-failed:
//! put it into the corpus, and it is replayed first.

#[path = "../common/mod.rs"]
mod common;
mod descriptor;
mod drive;
mod image;
mod messages;
mod mutate;
mod repair;

use std::collections::HashSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mutate::{Mutator, Rng};

/// No input may take more of a CPU.
const SLOW: Duration = Duration::from_secs(10);

/// Largest input that is mutated further: an hour's worth of them has to fit into memory.
const POOLED: usize = 64 << 10;

/// Largest input that goes into the corpus.
const KEPT: usize = 6000;

/// Inputs that are mutated further.
const POOL: usize = 4000;

/// What fuzzing of one kind of input is.
pub trait Target {
    const NAME: &'static str;
    /// So many words tell one outcome from another.
    const WORDS: usize;
    /// Inputs that are right, or nearly.
    fn seeds(&self) -> Vec<Vec<u8>>;
    /// Words that mutations put in.
    fn words(&self) -> &'static [&'static [u8]];
    /// Where the bytes that decide are: a mutation before the returned offset is likelier.
    fn head(&self, input: &[u8]) -> usize {
        input.len()
    }
    /// Tries an input. Panics if something is wrong; else says where it led.
    fn run(&mut self, input: &[u8], rng: &mut Rng) -> String;
}

fn seconds() -> u64 {
    match std::env::var("PLOOP_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok()) {
        Some(n) => n,
        None if common::counts() == common::Counts::Full => 3600,
        None => 2,
    }
}

/// Of this thread: how busy others are does not matter.
fn cpu_time() -> Duration {
    let clock = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID;
    nix::time::clock_gettime(clock).map_or(Duration::ZERO, Duration::from)
}

fn corpus(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(name)
}

/// Numbers and names that differ from input to input say nothing about where it led.
fn signature(text: &str, count: usize) -> String {
    // What is quoted may hold quotes.
    let mut plain = text.to_owned();
    for quote in ['\'', '`', '"'] {
        if let (Some(first), Some(last)) = (plain.find(quote), plain.rfind(quote)) {
            plain.replace_range(first..=last, "");
        }
    }
    // Our own words are plain; what comes from the input need not be.
    let own = |w: &&str| w.bytes().all(|b| b.is_ascii_lowercase() || b",.:;-()".contains(&b)) || *w == "/";
    let words = plain.split_whitespace().take(24).filter(own);
    words.take(count).collect::<Vec<_>>().join(" ")
}

fn fuzz<T: Target>(mut target: T) {
    // Valgrind and AddressSanitizer need address space and time of their own.
    let watched = std::env::var_os("PLOOP_FUZZ_WATCHED").is_some();
    if !watched {
        // What a header says must not become an allocation.
        let limit = 3 << 30;
        let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_AS, limit, limit);
    }
    let replayed = common::seed::one(Some("PLOOP_FUZZ_SEED"), 1);
    let seed = replayed.0;
    let mut rng = Rng::new(seed);
    let mut files: Vec<PathBuf> =
        fs::read_dir(corpus(T::NAME)).map(|d| d.flatten().map(|e| e.path()).collect()).unwrap_or_default();
    files.sort();
    let kept: Vec<Vec<u8>> = files.iter().filter_map(|p| fs::read(p).ok()).collect();
    let from_corpus = kept.len();
    let mut pool: Vec<Vec<u8>> = target.seeds().into_iter().chain(kept).collect();
    let mutator = Mutator { words: target.words() };
    let failed = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{}-failed", T::NAME));
    let mut seen = HashSet::new();
    let end = Instant::now() + Duration::from_secs(seconds());
    let mut runs = 0u64;
    while runs < pool.len() as u64 || Instant::now() < end {
        let first = pool.get(runs as usize).filter(|_| runs < 100_000).cloned();
        let fresh = first.is_none();
        let input = first.unwrap_or_else(|| {
            let at = rng.index(pool.len());
            let head = target.head(&pool[at]);
            mutator.mutate(&pool[at], head, &pool, &mut rng)
        });
        runs += 1;
        let began = cpu_time();
        let mut own = Rng::new(rng.next());
        let outcome = catch_unwind(AssertUnwindSafe(|| target.run(&input, &mut own)));
        let took = cpu_time() - began;
        let slow = !watched && took > SLOW;
        if outcome.is_err() || slow {
            fs::write(&failed, &input).expect("failing input");
        }
        let Ok(outcome) = outcome else {
            panic!("input {runs} of seed {seed} fails; it is in {}", failed.display());
        };
        assert!(!slow, "input {runs} of seed {seed} took {took:?}; it is in {}", failed.display());
        if seen.insert(signature(&outcome, T::WORDS)) && fresh && input.len() < POOLED {
            if std::env::var_os("PLOOP_FUZZ_KEEP").is_some() && input.len() <= KEPT {
                let _ = fs::create_dir_all(corpus(T::NAME));
                let _ = fs::write(corpus(T::NAME).join(format!("{:08x}", mutate::hash(&input) as u32)), &input);
            }
            if pool.len() < POOL {
                pool.push(input);
            } else {
                let at = rng.index(pool.len());
                pool[at] = input;
            }
        }
    }
    let bytes: usize = pool.iter().map(Vec::len).sum();
    println!(
        "{}: {runs} inputs ({from_corpus} of the corpus), seed {seed}, led to {} places; {} of {bytes} bytes kept",
        T::NAME,
        seen.len(),
        pool.len()
    );
    if std::env::var_os("PLOOP_FUZZ_SHOW").is_some() {
        let mut places: Vec<String> = seen.into_iter().collect();
        places.sort();
        println!("{}", places.join("\n"));
    }
}

#[test]
fn images() {
    ploop::report::set_verbose_level(-2);
    fuzz(image::Images::new());
}

#[test]
fn descriptors() {
    ploop::report::set_verbose_level(-2);
    fuzz(descriptor::Descriptors::new());
}

#[test]
fn control_messages() {
    fuzz(messages::Messages::new());
}

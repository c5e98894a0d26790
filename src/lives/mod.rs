//! The simulation of whole lives: caller, supervisor, workers, helpers and the host's files, with any process killed and
//! the power cut between any two steps.
//!
//! What runs is the code of library and server itself, on real files and sockets. Only what is listed in `sys::host` is
//! simulated: time, waiting, processes; and the kernel's block device, by a transport of its own.

mod life;
mod model;
pub mod transport;
pub mod world;

pub use transport::BLOCK_DEVICES;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

#[test]
fn lives() {
    if !nix::unistd::geteuid().is_root() {
        crate::testing::skip::skip("servers work for root only");
        return;
    }
    let first: u64 = std::env::var("PLOOP_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    let count: u64 = std::env::var("LIVES").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
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
                    if let Err(why) = life::live(seed, None) {
                        println!("{why}\n");
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

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

#[test]
fn lives() {
    if !nix::unistd::geteuid().is_root() {
        crate::testing::skip::skip("servers work for root only");
        return;
    }
    let first: u64 = std::env::var("PLOOP_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    let count: u64 = std::env::var("LIVES").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let mut failed = Vec::new();
    for seed in first..first + count {
        if let Err(why) = life::live(seed, None) {
            println!("{why}\n");
            failed.push(seed);
        }
    }
    assert!(failed.is_empty(), "seeds {failed:?} failed");
}

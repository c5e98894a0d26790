//! A chain of deltas, opened: validated, marked in use, and described for the engine; and closed again.

#![forbid(unsafe_code)]

mod close;
mod open;
mod table;
mod target;

use std::fs::File;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::engine::api::{AllocConfig, Carried, LevelConfig};
use crate::format::header::Version;
use crate::units::ClusterSize;

pub use close::{close, finish, is_closed};
pub use open::open;
pub use target::{open_target, used_pages};

#[cfg(test)]
mod tests;

/// What to do with an in-use mark on the top.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Marked {
    /// Error 37, nothing written (file lists).
    Refuse,
    /// Check and go on (mounts by descriptor); read-only mounts write nothing.
    Recover,
    /// Read-only look at an image that another host may be writing, or that was cut off (`-r --force`): what lies behind
    /// the end of the file cannot be read.
    Ignore,
}

/// A file of a chain, open.
#[derive(Debug)]
pub struct LevelFile {
    /// Open for reading, the top of a writable chain also for writing. No code uses the file position.
    pub file: File,
    /// For messages.
    pub name: PathBuf,
    /// Without header and BAT; only the base can be.
    pub raw: bool,
    /// O_DIRECT is on.
    pub direct: bool,
}

/// How to open a chain.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    pub writable: bool,
    /// Cluster size of a raw base; needed where there is no delta above it.
    pub raw_cluster: Option<ClusterSize>,
    pub marked: Marked,
    /// Set at a takeover: the entries in the shared table of the killed worker, as (slot, cluster, image cluster or 0).
    pub carried: Option<Vec<(usize, u32, u32)>>,
    /// At a takeover: the worker before was one of another device, which has ended; other programs may have been at the
    /// images since.
    pub adopts: bool,
    /// At a takeover: a sync has failed before, so that the BAT that is read need not be the durable one.
    pub failed: bool,
    /// The levels below the top were scanned by an earlier worker of the same device; no program has written them
    /// since.
    pub known_below: bool,
    /// Bytes to allocate ahead at once; at least one cluster is.
    pub ahead: u64,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            writable: false,
            raw_cluster: None,
            marked: Marked::Refuse,
            carried: None,
            adopts: false,
            failed: false,
            known_below: false,
            ahead: 64 << 20,
        }
    }
}

/// An opened chain, as the engine needs it.
#[derive(Clone, Debug)]
pub struct Chain {
    pub cluster: ClusterSize,
    /// Of all its ploop1 images; none for a raw disk.
    pub version: Option<Version>,
    pub device_bytes: u64,
    /// Base first.
    pub levels: Vec<LevelConfig>,
    /// Header of the top as it is on disk; zeroes for a raw disk.
    pub header: [u8; 64],
    pub alloc: AllocConfig,
    /// Changes of the BAT that a takeover brings along.
    pub carried: Vec<Carried>,
    /// The top carried the in-use mark before.
    pub was_marked: bool,
    /// At a takeover the top could not be synced: reads and writes go on, every flush has to fail.
    pub sync_failed: bool,
}

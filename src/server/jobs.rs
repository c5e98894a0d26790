//! What helpers are asked to do, and what they report.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::server::transport::{Binding, Patience, Transport, Wanted};

/// What a helper is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Job {
    /// Bind a block device to the connection in the folder `dir`. Events: `Chosen` each time one is made, then it waits
    /// for [`Go`]; `Attached`, when its partitions are known.
    Attach { transport: Transport, dir: PathBuf, wanted: Wanted },
    /// Undo an attach that was killed or gave up.
    UndoAttach { backing: String, rdev: u64 },
    /// Unbind. Events: `Opened`, then it waits for [`Go`]; `Done`.
    Detach { binding: Binding, patience: Patience },
    /// Partitions from the table, where the kernel has no parser.
    Scan { binding: Binding },
    /// The block device takes over the size that the worker serves.
    SetCapacity { binding: Binding },
    /// Remove what an exited server left; if `wait`, also once it is mounted for a moment only.
    Clean {
        name: String,
        #[serde(default)]
        wait: bool,
    },
    /// All requests of a connection fail from now on.
    Abort { transport: Transport, connection: u64 },
    /// Hold file systems frozen; see [`freeze::hold`](super::freeze::hold) for the descriptors that come with it.
    Freeze,
    /// Write back what those file systems have in memory, wait for [`Go`], then do as `Freeze`.
    PrepareFreeze,
    /// Discard what a balloon file lies on; see [`balloon::serve`](super::balloon::serve).
    DiscardBalloon { binding: Binding },
}

/// What a helper reports.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum JobEvent {
    Chosen(Binding),
    Attached(Binding),
    Opened,
    Frozen,
    Done,
    Error { code: i32, message: String },
}

/// Lets a waiting helper go on.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Go;

//! Running devices: attaching an image chain, finding, naming, detaching devices and cleaning up after dead ones.
//!
//! What a name means is never taken from the name: a device is the record in /run/ploop/NAME together with the number
//! and the sequence number of the disk behind, and both are compared with the kernel's before anything is done.
#![forbid(unsafe_code)]

mod attach;
mod clean;
mod find;
mod lock;
pub mod merge;
mod switch;

pub use attach::{AttachSpec, Level, attach};
pub use clean::{abort, clean, detach, hold_for_space};
pub use find::{by_base, by_node, list, list_of, mount_source};
pub use switch::{CommitFile, NewLevel, SwitchSpec, reload, switch, switch_prepared};

use std::path::Path;

use crate::server::proto::DeviceRecord;

/// What a device is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Being attached; not to be used yet.
    Starting,
    Running,
    /// Running; writes wait for space on the file system of the image.
    NoSpace,
    /// No worker can serve it, or its writes can no longer be made durable.
    Failed,
    /// The block device is gone, the image is being closed.
    Stopped,
    /// Its server is gone (killed, or of an earlier boot): only [`clean`] helps.
    Dead,
}

impl State {
    /// One word for lists.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Running => "running",
            State::NoSpace => "no-space",
            State::Failed => "failed",
            State::Stopped => "stopped",
            State::Dead => "dead",
        }
    }
}

/// A device, as it was when it was looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    pub record: DeviceRecord,
    pub state: State,
}

impl Device {
    /// `ploop0`.
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// `/dev/ploop0`.
    pub fn node(&self) -> &Path {
        &self.record.node
    }

    /// File of the base image, as it was named at attach.
    pub fn base(&self) -> &Path {
        self.record.levels.first().map_or(Path::new(""), |l| &l.path)
    }

    /// File of the top image, as it was named at attach.
    pub fn top(&self) -> &Path {
        self.record.levels.last().map_or(Path::new(""), |l| &l.path)
    }

    /// Empty for the main use of an image.
    pub fn component(&self) -> &str {
        &self.record.component
    }
}

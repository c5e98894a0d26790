//! Running devices: attaching an image chain, finding, naming, detaching devices and cleaning up after dead ones.
//!
//! What serves a device is a [`Driver`]; the functions of this module go to the driver that serves the device in question,
//! and [`attach`] to the one that [`driver`] chooses. Above this module nothing depends on which driver it is.
#![forbid(unsafe_code)]

mod driver;
mod model;
mod registry;
pub mod served;
mod spec;
mod state;

pub use crate::chain::Marked;
pub use driver::{Capabilities, Driver, Freeze, Tracker, Unmerged, Watch};
pub use model::{Aliases, Device, Image, Partition};
pub use registry::{
    abort, aliases, attach, base_has_name, by_base, by_node, clean, detach, driver, freeze, hold_for_space,
    is_supervised, list, list_of, mount_source, partitions, reload, relocate, set_size, switch, switch_prepared, track,
};
pub use served::slots_wanted;
pub use spec::{AttachSpec, CommitFile, Level, NewLevel, SwitchSpec};
pub use state::State;

/// Merging levels of a running device.
pub mod merge {
    pub use super::driver::{Unmerged, Watch};
    pub use super::registry::{merge_levels, merge_top};
}

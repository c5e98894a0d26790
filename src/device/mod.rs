//! Running devices: attaching an image chain, finding, naming, detaching devices, and removing what killed servers
//! left.
//!
//! A [`Driver`] serves a device. The functions of this module call the driver of the device in question; [`attach`]
//! calls the one that [`driver`] chooses. Code above this module does not depend on the driver.
#![forbid(unsafe_code)]

mod driver;
mod model;
mod registry;
pub mod served;
mod spec;
mod state;

pub use crate::chain::Marked;
pub use crate::engine::api::GivenBack;
pub use crate::format::balloon_piece::Piece;
pub use crate::format::maintenance::Maintenance;
pub use driver::{BalloonDiscard, Capabilities, Driver, Freeze, Rates, Tracker, Unmerged, Watch};
pub use model::{Aliases, Device, Image, Leak, Partition, ServerProcess, Whereabouts};
pub use registry::{
    abort, aliases, all_unflushed, attach, base_name, by_base, by_node, changed, clean, counters, detach,
    discard_balloon, driver, drop_level, find_stopped, forget, freeze, give_back, hold_for_space, is_supervised, leaks,
    limit_top, list, list_of, mount_source, open_image, partition_node, partitions, processes, reload, reserve_minor,
    set_counters, set_maintenance, set_size, start, start_merges, stop, stopped, switch, switch_prepared, track,
    unflushed, whereabouts,
};
pub use served::slots_wanted;
pub use spec::{AttachSpec, CommitFile, Level, NewLevel, SwitchSpec};
pub use state::State;

/// Merging levels of a running device.
pub mod merge {
    pub use super::driver::{Unmerged, Watch};
    pub use super::registry::{merge_levels, merge_top};
}

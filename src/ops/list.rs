//! All devices, for users and scripts.

use std::path::PathBuf;

use super::find;
use crate::device::{self, State};
use crate::error::Result;

/// One device.
#[derive(Clone, Debug)]
pub struct Line {
    /// Without `/dev/`.
    pub name: String,
    pub base: PathBuf,
    /// The first one first.
    pub mount_points: Vec<PathBuf>,
    pub component: String,
    /// As `running`.
    pub state: String,
    /// The state, if it is not in order.
    pub trouble: Option<String>,
    /// Snapshots of it are being merged: clusters looked at, and all.
    pub merging: Option<(u64, u64)>,
}

/// Devices by number; their mount points if asked for.
pub fn devices(with_mounts: bool) -> Result<Vec<Line>> {
    device::list()?
        .into_iter()
        .map(|d| {
            let mount_points = match with_mounts {
                true => find::mounts_of(&d)?.into_iter().map(|m| m.target).collect(),
                false => Vec::new(),
            };
            Ok(Line {
                merging: d.merging,
                name: d.name().to_owned(),
                base: find::base_of(&d),
                mount_points,
                state: d.state.as_str().to_owned(),
                component: d.component().to_owned(),
                trouble: (d.state != State::Running).then(|| d.state.as_str().to_owned()),
            })
        })
        .collect()
}

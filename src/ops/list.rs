//! All devices, for users and scripts.

use std::path::PathBuf;

use super::find;
use crate::device::{self, Device, State};
use crate::error::Result;
use crate::fs::mounts;

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
    let devices = device::list()?;
    let mounts = if with_mounts { mounts::read()? } else { Vec::new() };
    let line = |d: Device| Line {
        merging: d.merging,
        name: d.name().to_owned(),
        base: find::base_of(&d),
        mount_points: if with_mounts { find::mounts_among(&mounts, &d) } else { Vec::new() }
            .into_iter()
            .map(|m| m.target)
            .collect(),
        state: d.state.as_str().to_owned(),
        component: d.component().to_owned(),
        trouble: (d.state != State::Running).then(|| d.state.as_str().to_owned()),
    };
    Ok(devices.into_iter().map(line).collect())
}

//! All devices, for users and scripts.

use std::path::PathBuf;

use super::{deleted, find};
use crate::device::{self, Device, State};
use crate::error::Result;
use crate::fs::{holders, mounts};

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
    /// The state, if it is not in order, or that the device ends with its last user, or that images were deleted.
    pub trouble: Option<String>,
    /// Snapshots of it are being merged: clusters looked at, and all.
    pub merging: Option<(u64, u64)>,
    /// Images that were deleted while the device runs.
    pub deleted: Vec<PathBuf>,
}

/// Devices by number; their mount points if asked for.
pub fn devices(with_mounts: bool) -> Result<Vec<Line>> {
    let devices = device::list()?;
    let mounts = if with_mounts { mounts::read()? } else { Vec::new() };
    let line = |d: Device| {
        let mount_points = if with_mounts { find::mounts_among(&mounts, &d) } else { Vec::new() };
        let deleted: Vec<PathBuf> = deleted::of(&d).into_iter().map(|l| l.path).collect();
        let ending = d.state == State::Running && holders::ends_with_its_last_user(&d.disk);
        let state = if ending { "ending" } else { d.state.as_str() };
        let state = (ending || d.state != State::Running).then(|| state.to_owned());
        Line {
            merging: d.merging,
            name: d.name().to_owned(),
            base: find::base_of(&d),
            mount_points: mount_points.into_iter().map(|m| m.target).collect(),
            state: d.state.as_str().to_owned(),
            component: d.component().to_owned(),
            trouble: state.or_else(|| (!deleted.is_empty()).then(|| "deleted".to_owned())),
            deleted,
        }
    };
    let mut lines: Vec<Line> = devices.into_iter().map(line).collect();
    let stopped = device::stopped()?;
    if !stopped.is_empty() {
        lines.extend(stopped.into_iter().map(stopped_line));
        lines.sort_by_key(|l| (number(&l.name).is_none(), number(&l.name), l.name.clone()));
    }
    Ok(lines)
}

/// N of `ploopN`.
fn number(name: &str) -> Option<u32> {
    name.strip_prefix("ploop")?.parse().ok()
}

/// A device that `ploop start` attaches again.
fn stopped_line(device: Device) -> Line {
    Line {
        name: device.name().to_owned(),
        base: device.base().to_owned(),
        mount_points: Vec::new(),
        component: device.component().to_owned(),
        state: device.state.as_str().to_owned(),
        trouble: Some(device.state.as_str().to_owned()),
        merging: None,
        deleted: Vec::new(),
    }
}

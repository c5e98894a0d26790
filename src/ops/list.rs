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
    pub mount_point: Option<PathBuf>,
    pub component: String,
    /// Its state, if it is not in order.
    pub trouble: Option<String>,
}

/// Devices by number; their first mount points if asked for.
pub fn devices(with_mounts: bool) -> Result<Vec<Line>> {
    device::list()?
        .into_iter()
        .map(|d| {
            let mount_point = match with_mounts {
                true => find::mounts_of(&d)?.into_iter().next().map(|m| m.target),
                false => None,
            };
            Ok(Line {
                name: d.name().to_owned(),
                base: find::base_of(&d),
                mount_point,
                component: d.component().to_owned(),
                trouble: (d.state != State::Running).then(|| d.state.as_str().to_owned()),
            })
        })
        .collect()
}

//! Replacing an image of a disk by an identical one.

use std::path::{Path, PathBuf};

use crate::bail;
use crate::error::Result;
use crate::format::guid::Guid;
use crate::units::Level;

/// Which image.
#[derive(Clone, Debug)]
pub enum Which {
    /// That of a snapshot.
    Guid(Guid),
    /// That with this file.
    File(PathBuf),
    /// That at this level of the running device.
    Level(Level),
}

/// Replaces an image by `new`. `keep_name`: the new file gets the old one's name.
pub fn replace(_descriptor: &Path, _component: &str, _which: &Which, _new: &Path, _keep_name: bool) -> Result<()> {
    bail!(Param, "this version cannot replace images yet")
}

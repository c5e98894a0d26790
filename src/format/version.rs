//! The versions of the format.

use crate::bail;
use crate::error::Result;

/// Version of the format: what BAT entries count.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub enum Version {
    /// Sectors; sizes below 2 TiB.
    V1,
    /// Clusters.
    V2,
}

impl Version {
    /// 1 or 2.
    pub fn number(self) -> u32 {
        match self {
            Version::V1 => 1,
            Version::V2 => 2,
        }
    }

    /// From 1 or 2.
    pub fn from_number(n: u32) -> Result<Version> {
        match n {
            1 => Ok(Version::V1),
            2 => Ok(Version::V2),
            _ => bail!(Param, "format version {n}: must be 1 or 2"),
        }
    }
}

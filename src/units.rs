//! Units: a number's unit stays in its type.

use crate::error::{Error, Kind, Result};

/// Bytes in a sector. Always 512, whatever the host device says.
pub const SECTOR: u64 = 512;

/// Size of a cluster: a power of two from 32 KiB to 64 MiB. Default 1 MiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ClusterSize {
    shift: u8,
}

impl ClusterSize {
    /// Smallest legal cluster, in sectors.
    pub const MIN_SECTORS: u32 = 64;
    /// Largest legal cluster, in sectors.
    pub const MAX_SECTORS: u32 = 131_072;
    /// 1 MiB.
    pub const DEFAULT: ClusterSize = ClusterSize { shift: 20 };

    /// From the classic `blocksize`, in sectors.
    pub fn from_sectors(sectors: u64) -> Result<Self> {
        let legal = (u64::from(Self::MIN_SECTORS)..=u64::from(Self::MAX_SECTORS)).contains(&sectors);
        if !legal || !sectors.is_power_of_two() {
            return Err(Error::new(
                Kind::Param,
                format!(
                    "cluster size of {sectors} sectors: must be a power of two from {} to {}",
                    Self::MIN_SECTORS,
                    Self::MAX_SECTORS
                ),
            ));
        }
        Ok(ClusterSize { shift: sectors.trailing_zeros() as u8 + 9 })
    }

    /// The classic `blocksize`: sectors in a cluster.
    pub fn sectors(self) -> u32 {
        1 << (self.shift - 9)
    }

    /// Bytes in a cluster.
    pub fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// log2 of [`bytes`](Self::bytes).
    pub fn shift(self) -> u32 {
        u32::from(self.shift)
    }
}

/// Index of a cluster of the virtual disk.
pub type VirtCluster = u32;

/// Index of a cluster of an image file; the header is in cluster 0.
pub type ImageCluster = u32;

/// Position of a delta in its chain: 0 is the base.
pub type Level = u8;

/// Most deltas that a chain may have.
pub const MAX_CHAIN: usize = 127;

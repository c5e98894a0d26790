//! How large a disk may be, and how a wanted size is rounded.

use crate::bail;
use crate::error::Result;
use crate::format::version::Version;
use crate::units::ClusterSize;

/// Largest disk that is made with a file system: 16 TiB, in sectors.
pub const MAX_FS_SECTORS: u64 = 34_359_738_368;

/// Largest disk of the format, in sectors.
pub fn format_max(version: Version, cluster: ClusterSize) -> u64 {
    match version {
        Version::V1 => u64::from(u32::MAX),
        Version::V2 => u64::from(u32::MAX) * u64::from(cluster.sectors()),
    }
}

/// Result of `ploop_get_max_size`, in sectors: the format's maximum for the default version (2), capped.
pub fn max_size(cluster: ClusterSize) -> u64 {
    format_max(Version::V2, cluster).min(MAX_FS_SECTORS)
}

/// The size of a new disk: rounded up to a cluster, or down where rounding up would pass the format's maximum.
pub fn round_size(version: Version, cluster: ClusterSize, sectors: u64) -> Result<u64> {
    let max = format_max(version, cluster);
    let bs = u64::from(cluster.sectors());
    if sectors == 0 {
        bail!(Param, "disk size 0: must be at least one sector");
    }
    if sectors > max {
        bail!(
            Param,
            "disk size {sectors} sectors: a version {} image with clusters of {bs} sectors has at most {max}",
            version.number()
        );
    }
    let up = sectors.div_ceil(bs) * bs;
    Ok(if up > max { sectors / bs * bs } else { up })
}

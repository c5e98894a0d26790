//! The 64-byte header of a ploop1 image.

use crate::bail;
use crate::error::{Error, Kind, Result};
use crate::format::{bat, geometry, limits};
use crate::units::ClusterSize;

pub use crate::format::version::Version;

/// Bytes of the header.
pub const SIZE: usize = 64;

/// `m_DiskInUse`: open for writing, or not closed cleanly.
pub const IN_USE: u32 = 0x746F_6E59;

/// `m_DiskInUse`: closed cleanly, and the format extension is valid ("v2.1").
pub const CLOSED_V21: u32 = 0x312e_3276;

/// `m_Flags`: no data cluster was ever allocated. Not to be trusted when reading.
pub const FLAG_EMPTY: u32 = 0x1;

/// `m_Flags`: a version conversion was interrupted.
pub const FLAG_CONVERT: u32 = 0x2;

const SIGNATURE_V1: &[u8; 16] = b"WithoutFreeSpace";
const SIGNATURE_V2: &[u8; 16] = b"WithouFreSpacExt";
const TYPE: u32 = 2;

/// Bytes of a file that an image may reach beyond what its disk can need.
const REACH_SLACK: u64 = 256 << 20;

/// A decoded header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    pub version: Version,
    pub heads: u32,
    pub cylinders: u32,
    /// `m_Sectors`.
    pub cluster: ClusterSize,
    /// `m_Size`: virtual clusters. Kept, but [`Header::clusters`] decides.
    pub size_clusters: u32,
    /// `m_SizeInSectors`.
    pub sectors: u64,
    /// `m_DiskInUse`.
    pub in_use: u32,
    /// `m_FirstBlockOffset`, in sectors.
    pub first_data_sector: u32,
    /// `m_Flags`.
    pub flags: u32,
    /// `m_FormatExtensionOffset`, in sectors.
    pub extension: u64,
}

/// Whether these bytes begin with a signature of a ploop1 image.
pub fn has_signature(bytes: &[u8]) -> bool {
    bytes.starts_with(SIGNATURE_V1) || bytes.starts_with(SIGNATURE_V2)
}

fn u32_at(bytes: &[u8; SIZE], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; SIZE], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// Bytes for a message: printable characters as they are, all others by number.
fn shown(bytes: &[u8]) -> String {
    let one = |b: &u8| match b {
        b' '..=b'~' => char::from(*b).to_string(),
        _ => format!("\\x{b:02x}"),
    };
    bytes.iter().map(one).collect()
}

/// What to do with an image of version 1 whose clusters are not aligned.
pub const OLD_PARALLELS: &str = "; old images of Parallels are not aligned so: `qemu-img convert -f parallels -O parallels OLD NEW` \
                                 makes one that is";

/// The error for a file that is no ploop1 image; it names the format if that is known.
fn foreign(b: &[u8; SIZE]) -> Error {
    let shown = shown(&b[..16]);
    Error::new(
        Kind::Format,
        if b.starts_with(b"QFI\xfb") {
            format!(
                "signature '{shown}' at offset 0 is that of a qcow2 image: must be a ploop1 image; \
                 `qemu-img convert -O parallels` makes one of it"
            )
        } else if b.starts_with(b"LUKS") {
            format!("signature '{shown}' at offset 0 is that of a LUKS container: encrypted disks are not supported")
        } else if b.trim_ascii_start().starts_with(b"<?xml") || b.starts_with(b"\xef\xbb\xbf<?xml") {
            format!(
                "signature '{shown}' at offset 0 is that of an XML file: must be a ploop1 image; if it is a descriptor, \
                 its elements File name the images"
            )
        } else {
            format!(
                "signature '{shown}' at offset 0: a ploop1 image begins with 'WithoutFreeSpace' or 'WithouFreSpacExt'; \
                 a raw image has Type Plain in its descriptor, and without one needs -f raw"
            )
        },
    )
}

impl Header {
    /// Header of a new, empty image: not in use, flagged empty. `sectors` is rounded up to a cluster.
    pub fn new(version: Version, cluster: ClusterSize, sectors: u64) -> Result<Header> {
        let bs = u64::from(cluster.sectors());
        let too_large = || {
            let max = limits::format_max(version, cluster);
            Error::new(
                Kind::Param,
                format!("disk size {sectors} sectors: version {} has at most {max}", version.number()),
            )
        };
        if sectors == 0 {
            bail!(Param, "disk size 0: must be at least one sector");
        }
        let clusters = sectors.div_ceil(bs);
        let size_clusters = u32::try_from(clusters).map_err(|_| too_large())?;
        let size = clusters * bs;
        if version == Version::V1 && size > u64::from(u32::MAX) {
            return Err(too_large());
        }
        let first_data = bat::first_data(clusters, cluster) * bs;
        let geometry = geometry::chs(size);
        Ok(Header {
            version,
            heads: geometry.heads,
            cylinders: geometry.cylinders,
            cluster,
            size_clusters,
            sectors: size,
            in_use: 0,
            // At most 16 GiB of BAT.
            first_data_sector: u32::try_from(first_data).map_err(|_| too_large())?,
            flags: FLAG_EMPTY,
            extension: 0,
        })
    }

    /// The same with the size to the sector: the last cluster is perhaps partial.
    pub fn sized(version: Version, cluster: ClusterSize, sectors: u64) -> Result<Header> {
        Ok(Header { sectors, ..Header::new(version, cluster, sectors)? })
    }

    /// Decodes the first 64 bytes and checks each field; [`check_layout`](Self::check_layout) checks that the fields
    /// fit together.
    pub fn parse(bytes: &[u8]) -> Result<Header> {
        let Some(b) = bytes.first_chunk::<SIZE>() else {
            bail!(Read, "header of {} bytes: a ploop1 image begins with {SIZE}", bytes.len());
        };
        let version = if b.starts_with(SIGNATURE_V1) {
            Version::V1
        } else if b.starts_with(SIGNATURE_V2) {
            Version::V2
        } else {
            return Err(foreign(b));
        };
        let kind = u32_at(b, 16);
        if kind != TYPE {
            bail!(Format, "image type {kind} at offset 16 of the header: must be {TYPE}");
        }
        let tracks = u32_at(b, 28);
        let cluster = ClusterSize::from_sectors(u64::from(tracks))
            .map_err(|e| e.as_kind(Kind::Format).context("offset 28 of the header"))?;
        let first_data_sector = u32_at(b, 48);
        if first_data_sector == 0 || !first_data_sector.is_multiple_of(cluster.sectors()) {
            let old = if version == Version::V1 { OLD_PARALLELS } else { "" };
            bail!(
                Format,
                "first data sector {first_data_sector} at offset 48 of the header: must be a multiple of the cluster \
                 size, {} sectors, and not 0{old}",
                cluster.sectors()
            );
        }
        Ok(Header {
            version,
            heads: u32_at(b, 20),
            cylinders: u32_at(b, 24),
            cluster,
            size_clusters: u32_at(b, 32),
            // Version 1 leaves the upper half unused.
            sectors: match version {
                Version::V1 => u64::from(u32_at(b, 36)),
                Version::V2 => u64_at(b, 36),
            },
            in_use: u32_at(b, 44),
            first_data_sector,
            flags: u32_at(b, 52),
            extension: u64_at(b, 56),
        })
    }

    /// The bytes of this header.
    pub fn encode(&self) -> [u8; SIZE] {
        let mut b = [0; SIZE];
        b[..16].copy_from_slice(match self.version {
            Version::V1 => SIGNATURE_V1,
            Version::V2 => SIGNATURE_V2,
        });
        let mut put = |at: usize, value: u32| b[at..at + 4].copy_from_slice(&value.to_le_bytes());
        put(16, TYPE);
        put(20, self.heads);
        put(24, self.cylinders);
        put(28, self.cluster.sectors());
        put(32, self.size_clusters);
        put(36, self.sectors as u32);
        if self.version == Version::V2 {
            put(40, (self.sectors >> 32) as u32);
        }
        put(44, self.in_use);
        put(48, self.first_data_sector);
        put(52, self.flags);
        put(56, self.extension as u32);
        put(60, (self.extension >> 32) as u32);
        b
    }

    /// Whether size and start of the data agree: the data begins in the first whole cluster after the BAT, or later. With
    /// a smaller value part of the BAT would be taken for data.
    pub fn check_layout(&self) -> Result<()> {
        let bs = u64::from(self.cluster.sectors());
        let clusters = self.sectors.div_ceil(bs);
        if clusters == 0 {
            bail!(Format, "disk size 0 at offset 36 of the header: must be at least one sector");
        }
        if clusters > u64::from(u32::MAX) {
            bail!(
                Format,
                "disk size {} sectors at offset 36 of the header: at most {} clusters of {bs} sectors",
                self.sectors,
                u32::MAX
            );
        }
        let want = bat::first_data(clusters, self.cluster) * bs;
        if u64::from(self.first_data_sector) < want {
            bail!(
                Format,
                "first data sector {} at offset 48 of the header: must be at least {want} for {clusters} clusters of \
                 {bs} sectors",
                self.first_data_sector
            );
        }
        Ok(())
    }

    /// Virtual clusters, the last one perhaps partial (qemu makes such images).
    pub fn clusters(&self) -> u32 {
        let clusters = self.sectors.div_ceil(u64::from(self.cluster.sectors()));
        clusters.min(u64::from(u32::MAX)) as u32
    }

    /// Clusters of the file that header and BAT fill. Clusters between them and the first data cluster belong to nothing.
    pub fn table_clusters(&self) -> u32 {
        let clusters = bat::first_data(u64::from(self.clusters()), self.cluster);
        clusters.min(u64::from(self.first_data())) as u32
    }

    /// No cluster of data lies at or beyond this cluster of the file, whatever program wrote the image: a change of an
    /// entry that is not durable yet can hold up to three clusters of the file for one of the disk. An image that reaches
    /// further was made to be sparse, and would fill its file system when it is completed.
    pub fn reach(&self) -> u64 {
        let slack = REACH_SLACK / self.cluster.bytes();
        u64::from(self.table_clusters()) + 3 * u64::from(self.clusters()) + slack
    }

    /// First data cluster of the file (`l1`): header and BAT lie before it.
    pub fn first_data(&self) -> u32 {
        self.first_data_sector / self.cluster.sectors()
    }

    pub fn cluster(&self) -> ClusterSize {
        self.cluster
    }

    /// Not closed cleanly: in use, or an undocumented value. "v2.1" is a clean state.
    pub fn is_marked(&self) -> bool {
        self.in_use != 0 && self.in_use != CLOSED_V21
    }

    /// A version conversion was interrupted.
    pub fn is_converting(&self) -> bool {
        self.flags & FLAG_CONVERT != 0
    }
}

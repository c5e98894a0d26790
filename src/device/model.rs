//! A device, whichever driver serves it.

use std::path::{Path, PathBuf};

use crate::device::state::State;
use crate::error::Result;
use crate::format::header::Version;
use crate::format::maintenance::Maintenance;
use crate::server::proto::DeviceRecord;
use crate::sys::file_id::FileId;
use crate::units::ClusterSize;

/// One image of a running chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// As it was named when it became part of the chain.
    pub path: PathBuf,
    pub id: FileId,
    pub raw: bool,
}

/// Where the file of a running chain is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// The name that the device has of it leads to it.
    InPlace,
    /// It has this name now.
    Moved(PathBuf),
    /// It has no name any more: only the processes that serve the device have it. `was`: its last name.
    Deleted { was: PathBuf },
    /// It cannot be found out, or it has a name that is not known.
    Unknown,
}

/// A device, as it was when it was looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// `ploop0`.
    pub name: String,
    /// `/dev/ploop0`.
    pub node: PathBuf,
    pub state: State,
    /// Levels of it are being merged: clusters looked at, and all.
    pub merging: Option<(u64, u64)>,
    /// The chain, base first. Empty: the driver has lost its description.
    pub images: Vec<Image>,
    /// Empty for the main use of an image.
    pub component: String,
    /// The DiskDescriptor.xml that the chain comes from.
    pub descriptor: Option<PathBuf>,
    pub read_only: bool,
    /// Size of the disk in sectors.
    pub sectors: u64,
    /// Cluster size in sectors, see [`Device::cluster`].
    pub cluster_sectors: u32,
    /// Format of the top; none: raw.
    pub version: Option<Version>,
    /// The kernel's name of the block device, as in /sys/block: `loop10000`.
    pub disk: String,
    /// Number of that block device (st_rdev).
    pub rdev: u64,
    /// Random, made at attach: a later device of the same name has another one.
    pub instance: String,
    pub(super) detail: Detail,
}

/// The driver's own record of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Detail {
    Served(DeviceRecord),
}

impl Device {
    /// `ploop0`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `/dev/ploop0`.
    pub fn node(&self) -> &Path {
        &self.node
    }

    /// File of the base image, as it was named at attach.
    pub fn base(&self) -> &Path {
        self.images.first().map_or(Path::new(""), |i| &i.path)
    }

    /// File of the top image, as it was named at attach.
    pub fn top(&self) -> &Path {
        self.images.last().map_or(Path::new(""), |i| &i.path)
    }

    /// Empty for the main use of an image.
    pub fn component(&self) -> &str {
        &self.component
    }

    /// `Param` if the driver has lost the device's description.
    pub fn cluster(&self) -> Result<ClusterSize> {
        ClusterSize::from_sectors(u64::from(self.cluster_sectors))
    }

    /// What is being done to it, or was left by a program that has ended.
    pub fn maintenance(&self) -> Maintenance {
        let Detail::Served(record) = &self.detail;
        match Maintenance::from_word(&record.maintenance) {
            Maintenance::Off if self.merging.is_some() => Maintenance::Merge,
            state => state,
        }
    }

    /// Identities of the images, base first.
    pub fn ids(&self) -> Vec<FileId> {
        self.images.iter().map(|i| i.id).collect()
    }

    /// The level whose image is this file, whatever its name.
    pub fn level_of(&self, id: FileId) -> Option<usize> {
        self.images.iter().position(|i| i.id == id)
    }

    pub fn base_id(&self) -> Option<FileId> {
        self.images.first().map(|i| i.id)
    }

    pub fn top_id(&self) -> Option<FileId> {
        self.images.last().map(|i| i.id)
    }

    /// The file that the device writes to; none: it is read-only.
    pub fn written_id(&self) -> Option<FileId> {
        self.top_id().filter(|_| !self.read_only)
    }

    /// Both are the same attached device, though perhaps in different states.
    pub fn is_same(&self, other: &Device) -> bool {
        self.name == other.name && self.instance == other.instance
    }
}

/// The numbers and nodes by which a device and its partitions are known to the mount table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Aliases {
    pub devs: Vec<u64>,
    pub nodes: Vec<PathBuf>,
}

/// What is left of a device that has no record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leak {
    /// A process of the server's program that holds a connection of the kernel.
    Server { pid: i32 },
    /// A block device over the image of this name.
    BlockDevice { node: PathBuf, of: PathBuf },
    /// A node that leads to no device.
    Node { path: PathBuf },
}

/// A process that serves a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerProcess {
    /// `supervisor`, `worker`.
    pub role: &'static str,
    pub pid: i32,
    /// It is stopped, or waits in the kernel.
    pub stands_still: bool,
}

/// A partition of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Partition {
    pub number: u32,
    pub rdev: u64,
    /// Bytes.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

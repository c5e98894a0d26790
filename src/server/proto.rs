//! Messages between the library, the supervisor and the worker: JSON in frames of a SEQPACKET socket, at most
//! [`MAX_FRAME`] bytes each, descriptors beside the first one by SCM_RIGHTS.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use crate::chain::Marked;

/// No frame is larger.
pub const MAX_FRAME: usize = 256 * 1024;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LevelName {
    pub path: PathBuf,
    pub raw: bool,
}

/// Library to supervisor, first frame; with it one O_PATH descriptor for each level, base first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AttachRequest {
    pub levels: Vec<LevelName>,
    /// Cluster size in sectors for a raw base.
    pub raw_cluster: Option<u32>,
    pub read_only: bool,
    pub marked: Marked,
    pub component: String,
    pub descriptor: Option<PathBuf>,
    /// `/dev/NAME` asked for by the user.
    pub device: Option<String>,
    pub trace: bool,
    /// Seconds after which a write that finds no space fails; none: never.
    pub no_space_timeout: Option<u64>,
    /// Device and inode number of each level's file, base first.
    pub ids: Vec<(u64, u64)>,
    /// Made up by the library, to know the device by if the answer gets lost.
    #[serde(default)]
    pub token: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant)]
pub enum AttachReply {
    Ready(DeviceRecord),
    Error { code: i32, message: String },
}

/// What /run/ploop/NAME/state holds, and what the control socket tells.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct DeviceRecord {
    /// Layout of this record.
    pub version: u32,
    /// `ploop0`, or the last part of the name that the user gave.
    pub name: String,
    /// The node, `/dev/ploop0`.
    pub node: PathBuf,
    /// Name in /sys/block of the device behind, `loop10000`.
    pub backing: String,
    /// Device number of it (st_rdev).
    pub rdev: u64,
    /// BLKGETDISKSEQ of it, 0 where the kernel has none.
    pub diskseq: u64,
    /// FUSE connection number.
    pub connection: u64,
    pub supervisor: ProcessId,
    pub worker: ProcessId,
    pub levels: Vec<LevelName>,
    /// Device and inode number of each level's file.
    pub ids: Vec<(u64, u64)>,
    pub descriptor: Option<PathBuf>,
    pub component: String,
    pub read_only: bool,
    pub size_sectors: u64,
    pub cluster_sectors: u32,
    /// 0 raw, 1, 2.
    pub fmt_version: u32,
    /// `starting`, `running`, `stopped`, `failed`.
    pub state: String,
    /// Boot of the host that the device belongs to (/proc/sys/kernel/random/boot_id).
    #[serde(default)]
    pub boot: String,
    /// The one of the request.
    #[serde(default)]
    pub token: String,
}

/// A process that cannot be mistaken for a later one of the same number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: i32,
    /// Field 22 of /proc/PID/stat.
    pub start_time: u64,
}

/// What the kernel and we agreed on in FUSE_INIT; a successor needs it, because INIT is not repeated.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct FuseSession {
    pub minor: u32,
    pub max_write: u32,
    pub flags: u64,
}

/// Supervisor to worker, first frame. With it, in this order: /dev/fuse, the shared memory, the witness (a description
/// of the top opened at attach and used for nothing but asking, after a worker's death, whether write-back failed; for
/// a read-only device /dev/null), the server's binary, the listening control socket, and one O_PATH descriptor for each
/// level, base first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkerStart {
    pub attach: AttachRequest,
    pub takeover: bool,
    pub fuse: FuseSession,
    pub device_name: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant)]
pub enum ToWorker {
    Start(WorkerStart),
    /// The block device is gone: complete, flush, unmark, answer `Closed`, exit.
    Close,
    /// Flush and answer `Flushed`.
    Flush,
    /// Whether writes that find no space wait for it.
    HoldForSpace(bool),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromWorker {
    Ready(WorkerReady),
    /// The chain cannot be opened.
    Failed {
        code: i32,
        message: String,
    },
    Flushed {
        error: Option<(i32, String)>,
    },
    /// The top and the level below it agree now (and go on doing so), or the merge has ended before its time.
    Merged {
        error: Option<(i32, String)>,
    },
    /// An error: the in-use mark stays.
    Closed {
        error: Option<(i32, String)>,
    },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkerReady {
    pub device_bytes: u64,
    pub cluster_sectors: u32,
    /// 0 raw, 1, 2.
    pub fmt_version: u32,
    /// The top carried the in-use mark.
    pub was_marked: bool,
    /// Direct I/O on every file of the chain.
    pub direct: bool,
}

/// Client to supervisor, on /run/ploop/NAME/control; one answer each.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Command {
    Info,
    /// Detach, close the image cleanly, forget the device. Busy: error 3, nothing changed.
    Stop,
    Flush,
    /// Whether writes that find no space wait for it (the rule) or fail; a device that cannot be stopped because they
    /// wait is stopped after this.
    HoldForSpace(bool),
    /// Give up a device that cannot be served any more: I/O fails from now on.
    Abort,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant)]
pub enum Answer {
    Info { record: DeviceRecord, no_space: bool, failed: bool },
    Done,
    Error { code: i32, message: String },
}

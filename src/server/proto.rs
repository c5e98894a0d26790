//! Messages between the library, the supervisor and the worker: JSON in frames of a SEQPACKET socket, at most
//! [`MAX_FRAME`] bytes each, descriptors beside the first one by SCM_RIGHTS.

use std::path::PathBuf;

use crate::server::transport::Session;
use crate::sys::file_id::FileId;
use serde::{Deserialize, Serialize};

pub use crate::chain::Marked;
pub use crate::descriptor::commit_by_fd::CommitNames;
use crate::error::Error;
use crate::server::give_back::{GaveBack, GiveBackOrder};
use crate::server::greeting::{self, Greeting};
pub use crate::server::maintenance::MaintenanceChange;
use crate::server::remote_error::RemoteError;
pub use crate::server::roles::Role;
use crate::server::track::{TrackOrder, TrackReport};

/// What this build knows.
pub fn own_greeting() -> Greeting {
    Greeting::of::<Command, ToWorker>()
}

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
    /// The device ends with its last mount, as soon as there was one.
    #[serde(default)]
    pub until_unmounted: bool,
    /// The worker gives space of the top back by itself.
    #[serde(default)]
    pub auto_compact: bool,
    /// Seconds after which a write that finds no space fails; none: never.
    pub no_space_timeout: Option<u64>,
    /// Unanswered requests are kept in slots even where the kernel could give them out again.
    #[serde(default)]
    pub slots: bool,
    /// Device and inode number of each level's file, base first.
    pub ids: Vec<FileId>,
    /// Made up by the library, to know the device by if the answer gets lost.
    #[serde(default)]
    pub token: String,
    /// Changes of the top wait that a killed device has left: this one takes them over.
    #[serde(default)]
    pub unflushed: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant)]
pub enum AttachReply {
    Ready(DeviceRecord),
    Error { code: i32, message: String },
}

/// What /run/ploop/NAME/state holds, and what the control socket reports.
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
    /// The connection's number: see `transport::Connection`.
    pub connection: u64,
    pub supervisor: ProcessId,
    pub worker: ProcessId,
    pub levels: Vec<LevelName>,
    /// Device and inode number of each level's file.
    pub ids: Vec<FileId>,
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
    /// Unanswered requests are kept in slots: the kernel cannot give them out again, or is not to.
    #[serde(default)]
    pub slots: bool,
    /// [`Maintenance`](crate::format::maintenance::Maintenance); empty: none.
    #[serde(default)]
    pub maintenance: String,
    /// The device is being stopped, and is to be started again from its record.
    #[serde(default)]
    pub keep: bool,
    /// What the supervisor understands; a client reads it before it sends a command.
    #[serde(default)]
    pub greeting: Greeting,
}

impl DeviceRecord {
    /// The error for a command that the supervisor does not know: `None` if it does.
    pub fn refuse(&self, command: &Command) -> Option<Error> {
        self.greeting.refuse(command, &format!("the server of {}", self.name))
    }
}

/// A process that cannot be mistaken for a later one of the same number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: i32,
    /// Field 22 of /proc/PID/stat.
    pub start_time: u64,
}

/// Supervisor to worker, first frame; also from a worker to the supervisor that it starts. With it descriptors of the
/// [`roles`](Self::roles) that are listed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkerStart {
    pub attach: AttachRequest,
    pub takeover: bool,
    /// The first worker of a device takes over from one of a device whose processes were all killed.
    #[serde(default)]
    pub adopts: bool,
    #[serde(rename = "fuse")]
    pub session: Session,
    pub device_name: String,
    /// The worker is to take over in a change of the chain.
    #[serde(default)]
    pub succeed: Option<Succession>,
    /// From a worker to the supervisor that it starts: it has retired in favour of this change.
    #[serde(default)]
    pub retired: Option<ChainSwitch>,
    /// This level was the top before: it is to be completed and unmarked while the device runs.
    #[serde(default)]
    pub finish: Option<usize>,
    /// [`ChainSwitch::token`] of the change that led to this chain.
    #[serde(default)]
    pub token: u64,
    /// The top is being merged into the level below it; this change follows when the two agree.
    #[serde(default)]
    pub merge: Option<ChainSwitch>,
    /// The levels that are merged, into the lowest of them; none: the top into the level below it.
    #[serde(default)]
    pub merge_range: Option<(usize, usize)>,
    /// What the descriptors beside this message are for, in their order. Empty: the sender is of version 1 or 2, and
    /// they go by position.
    #[serde(default)]
    pub roles: Vec<Role>,
    /// Of versions 1 and 2: how many descriptors belong to the commit that follows a merge.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub merge_fds: usize,
    /// Of versions 1 and 2: how many, the last ones, are the journal that a worker left: see [`FromWorker::Journal`].
    #[serde(default, skip_serializing_if = "is_zero")]
    pub slot_fds: usize,
    /// What the sender understands.
    #[serde(default)]
    pub greeting: Greeting,
}

impl WorkerStart {
    /// The merge under way: its target, and the highest level that is merged into it.
    pub fn merged_levels(&self) -> Option<(usize, usize)> {
        self.merge.as_ref()?;
        let top = self.attach.levels.len().checked_sub(1)?;
        Some(self.merge_range.unwrap_or((top.checked_sub(1)?, top)))
    }

    /// For the first worker of a device.
    pub fn new(attach: AttachRequest, session: Session, device_name: String) -> WorkerStart {
        WorkerStart {
            attach,
            takeover: false,
            adopts: false,
            session,
            device_name,
            succeed: None,
            retired: None,
            finish: None,
            token: 0,
            merge: None,
            merge_range: None,
            roles: Vec::new(),
            merge_fds: 0,
            slot_fds: 0,
            greeting: own_greeting(),
        }
    }
}

/// How a worker takes over in a change of the chain.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Succession {
    /// Everything that needs no image is prepared first, and then `Go` is waited for.
    #[serde(default)]
    pub wait: bool,
    /// The top is another file than before, which no process has written yet.
    pub new_top: bool,
    pub commit: Option<CommitNames>,
    /// See [`ChainSwitch::grow`].
    #[serde(default)]
    pub grow: Option<u64>,
    /// See [`ChainSwitch::linger`].
    #[serde(default)]
    #[cfg_attr(not(debug_assertions), serde(skip))]
    pub linger: u64,
}

/// A change of the chain that a running device serves. With it descriptors of the [`roles`](Self::roles) that are
/// listed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ChainSwitch {
    /// The chain afterwards, base first.
    pub levels: Vec<SwitchLevel>,
    /// Device and inode numbers of the chain that must be running.
    pub expected: Vec<FileId>,
    /// What makes the change permanent.
    pub commit: Option<CommitNames>,
    /// Made up by the caller, not 0: a change that is requested twice is made once.
    pub token: u64,
    /// When everything is prepared the initiator gets `Prepared`, and the supervisor waits for its `Go`.
    #[serde(default)]
    pub ask: bool,
    /// The top, and with it the disk, gets so many sectors before the change is committed; in a change that keeps all levels.
    #[serde(default)]
    pub grow: Option<u64>,
    /// Milliseconds by which each step is drawn out; for tests, which kill processes meanwhile. A release build neither
    /// sends nor reads it.
    #[serde(default)]
    #[cfg_attr(not(debug_assertions), serde(skip))]
    pub linger: u64,
    /// What the descriptors beside this message are for, in their order. Empty: the sender is of version 1 or 2; first
    /// come those of the new levels, then folder, new file and lock of the commit.
    #[serde(default)]
    pub roles: Vec<Role>,
}

impl ChainSwitch {
    /// Levels that the running chain does not have.
    pub fn new_levels(&self) -> usize {
        self.levels.iter().filter(|l| l.from.is_none()).count()
    }
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SwitchLevel {
    pub name: LevelName,
    pub id: FileId,
    /// The level of the running chain that it is; none: a new one.
    pub from: Option<usize>,
}

/// A merge of frozen levels of a running chain into the lowest of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MergeOrder {
    /// Takes what those above it have, up to `high`, which is below a writable top.
    pub low: usize,
    pub high: usize,
    /// The change to the chain without the levels above `low`; its descriptors come with the order.
    #[serde(rename = "swap")]
    pub switch: ChainSwitch,
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
    /// Give space of the top's file back; answered by `GaveBack`.
    GiveBack(GiveBackOrder),
    CancelGiveBack,
    Track(TrackOrder),
    /// Answer what was read, flush, let go of the images (the top stays marked in use), answer `Retired`, and wait to
    /// be killed. With the descriptors of the change.
    Retire(ChainSwitch),
    /// The worker before has retired: take over.
    Go,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromWorker {
    Ready(WorkerReady),
    /// Beside it the request journal of this worker, a table and the data: from here on they, and no others, are what a
    /// successor needs. Sent once in a worker's life, before the first request is read, answered or executed; a later
    /// supervisor gets it from the one before, or from the worker that starts it.
    #[serde(rename = "Slots")]
    Journal,
    /// `Go` is waited for.
    Prepared,
    /// The answer to `Retire`. An error: the worker can serve no more, and the chain stays as it was.
    Retired {
        error: Option<RemoteError>,
    },
    /// The change of the chain is made; `Ready` follows. A warning: it may not survive a power cut.
    Switched {
        warning: Option<String>,
    },
    /// The former top is complete and unmarked, or why it is not.
    Finished {
        error: Option<RemoteError>,
    },
    /// The chain cannot be opened.
    Failed {
        code: i32,
        message: String,
    },
    Flushed {
        error: Option<RemoteError>,
    },
    /// The top and the level below it agree now (and go on doing so), or the merge has ended before its time.
    Merged {
        error: Option<RemoteError>,
    },
    /// An order to give space back has come to its end.
    GaveBack {
        token: u64,
        outcome: GaveBack,
    },
    Tracked(TrackReport),
    /// An error: the in-use mark stays.
    Closed {
        error: Option<RemoteError>,
    },
    /// The worker does not know this message of the supervisor, which is of version 2 or later.
    Unsupported {
        what: String,
        version: u32,
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
    /// What the worker understands.
    #[serde(default)]
    pub greeting: Greeting,
}

/// Client to supervisor, on /run/ploop/NAME/control; one answer each.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Command {
    Info,
    /// Detach, close the image cleanly, forget the device. Busy: error 3, nothing changed.
    Stop,
    /// The same, but keep a record from which the device can be started again; see [`stopped`](super::stopped).
    StopAndKeep,
    Flush,
    /// Whether writes that find no space wait for it (the rule) or fail; a device that cannot be stopped because they
    /// wait is stopped after this.
    HoldForSpace(bool),
    /// Give up a device that cannot be served any more: I/O fails from now on.
    Abort,
    /// Serve another chain. Answers: `Switched` as soon as I/O goes on, then `Done` once the former top is complete, or
    /// `Error` instead of either.
    Switch(ChainSwitch),
    /// Hold the file systems frozen that the files lie on whose descriptors follow the first one, a socket on which the
    /// initiator and the process that does it go on talking.
    Freeze,
    /// Like `Freeze`, but write back what is in memory now, and freeze when the initiator sends [`Go`](super::jobs::Go).
    PrepareFreeze,
    /// Merge the top into the level below it, then serve the chain without it. Goes on when the client is gone;
    /// requested again with the same token it is waited for. Answers as for `Switch`, or `NotMerged`.
    Merge(ChainSwitch),
    /// Merge frozen levels. Answers as for `Switch`, or `NotMerged`.
    MergeLevels(MergeOrder),
    /// Move the top's clusters to the front of its file, and cut it. Goes on when the client is gone; requested again it is
    /// waited for, by another client too. Answer: `GaveBack`.
    GiveBack(GiveBackOrder),
    /// The client with this token waits for that no longer: its `GiveBack` is answered with an error. The last one ends it.
    CancelGiveBack(u64),
    /// Track what is written to the top's file until the connection is closed; see [`track`](super::track).
    Track,
    /// End a merge before its time: `Done`, and `Merge` is answered with an error. None under way: `Done`.
    CancelMerge,
    /// Serve the same chain with a larger top ([`ChainSwitch::grow`]), and give the block device that size. Answers as for
    /// `Switch`.
    Grow(ChainSwitch),
    /// Replace worker and supervisor by new processes of the program whose O_PATH descriptor comes with it. Where no
    /// worker could serve: try once more, and answer how that went.
    Reload {
        token: u64,
    },
    /// Set the maintenance state: `Done`, or error 17 if it is another one than those from which it may be left.
    Maintenance(MaintenanceChange),
    /// The top's file may have so many sectors, 0: any number; so do the tops that follow it.
    LimitTop {
        sectors: u64,
    },
    /// Start a [helper](super::balloon) that discards what a balloon file lies on; with a socket on which it talks to the
    /// initiator.
    DiscardBalloon,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant)]
pub enum Answer {
    Info {
        record: DeviceRecord,
        no_space: bool,
        failed: bool,
        /// Clusters that a merge of the top has looked at, of how many; bytes of a merge of frozen levels.
        #[serde(default)]
        merging: Option<(u64, u64)>,
        /// The same of space that is given back.
        #[serde(default)]
        giving_back: Option<(u64, u64)>,
        /// Seconds for which the worker has shown no sign of running.
        #[serde(default)]
        stalled: Option<u64>,
        /// Counters of the worker: names and values.
        #[serde(default)]
        counters: Vec<(String, u64)>,
    },
    /// Requests are held as soon as the initiator sends `Go`.
    Prepared,
    Switched {
        warning: Option<String>,
    },
    Done,
    /// The device goes on in any case.
    GaveBack(GaveBack),
    Tracked(TrackReport),
    /// The chain is as it was. Untouched: so is the image that was to take everything.
    NotMerged {
        code: i32,
        message: String,
        untouched: bool,
    },
    Error {
        code: i32,
        message: String,
    },
    /// The supervisor does not know this command. A client of version 1 sends no such command.
    Unsupported {
        what: String,
        version: u32,
    },
}

impl Answer {
    /// The error that it reports, if it does; [`Answer::NotMerged`] counts as an outcome.
    pub fn into_result(self) -> crate::error::Result<Answer> {
        match self {
            Answer::Error { code, message } => Err(RemoteError { code, message }.into()),
            Answer::Unsupported { what, version } => Err(greeting::unsupported(&what, "the device's server", version)),
            other => Ok(other),
        }
    }
}

impl From<RemoteError> for Answer {
    fn from(e: RemoteError) -> Answer {
        Answer::Error { code: e.code, message: e.message }
    }
}

#[cfg(test)]
mod tests;

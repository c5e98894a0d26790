//! The engine's events and actions, and the state that it shares with the worker that takes over.
//!
//! The caller (a worker with real files, or the simulation) owns the request buffers, the bounce buffers and the files.
//! It feeds [`Event`]s and carries out the [`Action`]s, in any order and concurrently, except that `ZeroFill`,
//! `Overlay` and `Reply` take effect at once and in the order given: they are memory operations without a completion.
//! Every other action has an [`OpId`] and must be answered with exactly one `Done` or `BatRead` event.
//!
//! All offsets and lengths are bytes and multiples of 512.

pub use super::background::pages::PageSet;

/// A request in flight, numbered by the caller. The caller can reuse the number after its `Reply`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct ReqId(pub u32);

/// A file operation in flight, numbered by the engine.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct OpId(pub u32);

/// A bounce buffer of [`Config::bounce_bytes`], owned by the caller, lent to the engine: 0 .. `Config::bounces`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct BounceId(pub u16);

/// A positive errno.
pub type Errno = i32;

/// Bytes of one BAT page: the unit in which a BAT is read and written. Page `p` is the file range
/// `[p * 4096, (p + 1) * 4096)`; page 0 begins with the 64-byte header.
pub const BAT_PAGE: usize = crate::format::bat::PAGE_BYTES;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RequestKind {
    Read,
    Write,
    /// The range reads as zero afterwards (punch, write-zeroes). Up to 4 GiB.
    Zero,
    /// What was answered before is on stable storage when this is answered.
    Flush,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    pub id: ReqId,
    pub kind: RequestKind,
    pub offset: u64,
    pub len: u64,
}

#[derive(Debug)]
pub enum Event<'a> {
    Request(Request),
    /// A file operation ended: all of its bytes were transferred, or it failed. The caller continues short transfers
    /// itself; a read that meets the end of the file is EIO.
    Done {
        op: OpId,
        result: Result<(), Errno>,
    },
    /// A `ReadBat` ended.
    BatRead {
        op: OpId,
        result: Result<&'a [u8], Errno>,
    },
    /// About once a second: ages changes of the BAT, retries operations that failed with ENOSPC or EDQUOT.
    Tick,
    /// Whether writes that find no space wait for it (the rule) or fail (while the device is being stopped).
    WaitForSpace(bool),
    Background(BackgroundControl),
    /// Give space of the top's file back; answered by one [`Action::GaveBack`]. Refused (EBUSY) while other background
    /// work is under way.
    GiveBack(GiveBackConfig),
    /// Tracks which clusters of the top's file are written; answered by one [`Action::Tracked`], but for the end.
    Track(TrackControl),
    /// The caller sends no more requests. When all are answered and all changes are durable, the engine emits `Closed`.
    Close,
}

/// Where the bytes of a read go to or those of a write come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Buf {
    /// The data buffer of a request, from this byte on.
    Request {
        req: ReqId,
        off: u64,
    },
    Bounce {
        id: BounceId,
        off: u32,
    },
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Answer the request. Nothing refers to its buffer any more.
    Reply { req: ReqId, result: Result<(), Errno> },
    /// Zeroes into the data buffer of a read request.
    ZeroFill { req: ReqId, off: u64, len: u64 },
    /// Copy bytes of a write request's buffer (or zeroes, if `None`) into a bounce buffer.
    Overlay { bounce: BounceId, at: u32, from: Option<(ReqId, u64)>, len: u32 },
    /// Read from the file of a level.
    Read { op: OpId, level: u8, file_off: u64, len: u64, to: Buf },
    /// Write to the file of a level: the top, or the target of a merge. It never changes the length of an image; it may
    /// extend a raw file within its size.
    Write { op: OpId, level: u8, file_off: u64, len: u64, from: Buf },
    /// Read `len` (up to [`BAT_PAGE`]) bytes at `page * 4096` of a level's file; answered by `BatRead`.
    ReadBat { op: OpId, level: u8, page: u32, len: u32 },
    /// Write one page of a level's BAT, of the top or of the target of a merge, at `page * 4096`.
    WriteBat { op: OpId, level: u8, page: u32, data: Box<[u8; BAT_PAGE]> },
    /// Make a level's file at least `file_off + len` bytes long; `[file_off, file_off + len)`, beyond its old end, is
    /// allocated and reads as zero.
    Fallocate { op: OpId, level: u8, file_off: u64, len: u64 },
    /// The range of a level's file, inside it, reads as zero afterwards; allocated if the file system can do that.
    ZeroRange { op: OpId, level: u8, file_off: u64, len: u64 },
    /// Cut the top's file to so many bytes: nothing behind is named by memory or by the durable BAT, or in flight. An error:
    /// the file is as long as before.
    Truncate { op: OpId, level: u8, len: u64 },
    /// Data and length of a level's file, as far as written by operations completed before now, on stable storage.
    /// ENOSPC or EDQUOT of the top's file mean that nothing of it is lost and that a later sync covers it; where the
    /// caller does not know that it reports another error, which is final.
    Sync { op: OpId, level: u8 },
    /// Make a range of one level's file appear in another's, sharing its space. If the file systems cannot do that it
    /// fails, and nothing has changed.
    Clone { op: OpId, from: u8, from_off: u64, level: u8, file_off: u64, len: u64 },
    /// Background work: all is done and durable (a merged top is kept equal to its target from now on, until the engine
    /// is closed), or the work was given up (ECANCELED: because of `Close` or [`BackgroundControl::Cancel`]). Can be
    /// emitted twice: a merge of the top can fail after it was done.
    BackgroundDone { result: Result<(), Errno> },
    /// Answer to [`Event::GiveBack`]. An error: clusters may have been moved, and the file cut, all the same (ECANCELED:
    /// because of `Close` or [`BackgroundControl::Cancel`]).
    GaveBack { result: Result<GivenBack, Errno> },
    /// Answer to [`Event::Track`]; `begun`: to [`TrackControl::Begin`].
    Tracked { begun: bool, result: Result<Tracked, Errno> },
    /// Answer to `Close`. An error: a flush failed, the image must stay marked in use.
    Closed { result: Result<(), Errno> },
}

/// One delta of the chain, as the engine needs it.
#[derive(Clone, Debug)]
pub enum LevelConfig {
    /// A raw base of so many bytes (a multiple of 512). Bytes beyond read as zero.
    Raw { bytes: u64 },
    /// A ploop1 image.
    Ploop {
        /// BAT entries count sectors (version 1) or clusters (version 2).
        v1: bool,
        /// Virtual clusters that this image has entries for.
        clusters: u32,
        /// First data cluster of the file (`l1`).
        first_data: u32,
        /// Whole clusters that the file has; an entry at or beyond is damage. Ignored for the writable top.
        file_clusters: u32,
    },
}

/// Result of the scan of the top's BAT; see `chain::open`.
#[derive(Clone, Debug, Default)]
pub struct AllocConfig {
    /// One more than the highest cluster that any entry (on disk or in the shared table) names; at least `first_data`.
    /// The file has been cut to this length.
    pub end: u32,
    /// Clusters below `end` that nothing names, ascending. Their content is unknown.
    pub free: Vec<std::ops::Range<u32>>,
    /// How many clusters to allocate ahead at once.
    pub ahead: u32,
    /// No cluster at or beyond this (version 1: 2^32 sectors; else `u32::MAX`).
    pub limit: u32,
}

#[derive(Clone, Debug)]
pub struct Config {
    /// log2 of the cluster size in bytes.
    pub cluster_shift: u32,
    /// Bytes of the device; the last cluster may be partial.
    pub device_bytes: u64,
    /// Base first.
    pub levels: Vec<LevelConfig>,
    pub writable: bool,
    /// The header of the top as it is on disk (marked in use); it is the begin of page 0 whenever that is written.
    pub header: [u8; 64],
    pub alloc: AllocConfig,
    pub bounces: u16,
    pub bounce_bytes: u32,
    /// Pages of the map (8 KiB each) kept in memory before clean idle ones are dropped.
    pub map_pages: usize,
    /// Ticks after which a changed BAT page is written without a flush (5).
    pub bat_age: u32,
    /// An earlier sync failed or is not known to have worked: every flush fails.
    pub failed: bool,
    /// Long work to be done while requests are served.
    pub background: Option<BackgroundConfig>,
}

/// Long work on the clusters of the chain while the device is in use; see [`background`](super::background). The worker
/// that takes over gets the same configuration, and goes on from the progress in the shared table.
#[derive(Clone, Debug)]
pub struct BackgroundConfig {
    pub work: BackgroundWork,
}

#[derive(Clone, Debug)]
pub enum BackgroundWork {
    /// The writable top into the level below it. `pages`: the BAT pages of the top that have entries, on disk or in the
    /// shared table.
    MergeTop { target: TargetConfig, pages: PageSet },
    /// The levels above the target up to `high`, all of them frozen, into the target. `pages`: the BAT pages in which
    /// any of them has entries.
    MergeFrozen { high: u8, target: TargetConfig, pages: PageSet },
}

/// How space is given back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GiveBackConfig {
    /// Clusters moved between two ticks; 0: without limit.
    pub per_tick: u32,
    /// The same while requests come.
    pub per_busy_tick: u32,
}

/// What came of giving space back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GivenBack {
    /// Clusters moved.
    pub moved: u64,
    /// Bytes of the file before and after.
    pub before: u64,
    pub after: u64,
}

/// What a copier of the top's file wants. Clusters are those of the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TrackControl {
    /// From now on; nothing counts as written, or all does: where a worker takes over. Begun again, it starts anew. Refused
    /// (EBUSY) while background work is under way.
    Begin {
        all: bool,
    },
    /// What was written of these clusters, in at most so many runs; it does not count as written from now on.
    Take {
        from: u32,
        to: u32,
        most: u32,
    },
    End,
}

/// Clusters of the top's file that were written.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tracked {
    /// Up to the last one in use; of a raw file, those of its device.
    pub clusters: u32,
    /// Taken: ascending runs.
    pub dirty: Vec<std::ops::Range<u32>>,
}

/// The level that a merge writes to.
#[derive(Clone, Debug)]
pub struct TargetConfig {
    /// Below the levels that are merged into it. Its file is writable, marked in use and locked for this worker. A raw
    /// one is as long as the disk of the highest of them, an image has entries for all of it.
    pub level: u8,
    /// Space in that file, as for the top.
    pub alloc: AllocConfig,
}

/// What the caller asks of background work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackgroundControl {
    /// No more copies are begun.
    Pause,
    Resume,
    /// The work is given up; the chain stays as it was.
    Cancel,
}

/// Number of 64-bit words in the shared table for the progress of background work.
pub const PROGRESS_WORDS: usize = 128;

/// The last of these words: not 0 while the outcome of a sync of a merge's target is unknown.
pub const SYNC_WORD: usize = PROGRESS_WORDS - 1;

/// State that outlives the worker: the changes of the BAT that are not durable yet, and the outcome of syncs.
///
/// A slot contains `cluster << 32 | entry`: "the entry of `cluster` is `entry`" (0: not allocated), or
/// [`Shared::FREE`]. The worker that takes over reads the BAT from disk and applies the slots to it: the result is the
/// map of the worker that exited.
pub trait Shared: Send {
    /// An unused slot.
    const FREE: u64 = u64::MAX;
    fn slots(&self) -> usize;
    fn load(&self, slot: usize) -> u64;
    /// One atomic store (release).
    fn store(&self, slot: usize, value: u64);
    /// Records the state, before a sync or BAT write is issued and after its end.
    fn set_sync_state(&self, state: SyncState);
    fn sync_state(&self) -> SyncState;
    /// One of [`PROGRESS_WORDS`] words in which background work notes how far it is; 0 before it begins.
    fn progress(&self, word: usize) -> u64;
    /// One atomic store (release).
    fn set_progress(&self, word: usize, value: u64);
    /// Sectors that the top's file may have, which can change at any time; 0: no such limit.
    fn file_limit(&self) -> u64 {
        0
    }
}

/// Outcome of the last cycle of syncs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum SyncState {
    Idle = 0,
    /// Issued, not ended: the worker that takes over must find out whether it worked, or count it as failed.
    Running = 1,
    Failed = 2,
}

/// A BAT change found in the shared table at a takeover.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Carried {
    pub slot: usize,
    pub cluster: u32,
    /// Image cluster, 0: not allocated.
    pub host_cluster: u32,
    /// The entry on disk, which a completed sync has made durable.
    pub durable: u32,
}

/// State of the engine, for `list`, `doctor` and tests.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Status {
    /// An operation waits for space on the host file system.
    pub no_space: bool,
    /// A sync or BAT write failed: flushes fail until the device is closed.
    pub failed: bool,
    /// One more than the highest host cluster in use or possibly named by the durable BAT.
    pub alloc_end: u32,
    /// Clusters below `alloc_end` that are free for use.
    pub free: u32,
    /// Entries changed and not durable.
    pub dirty: u32,
    /// Requests not answered.
    pub requests: u32,
    pub reads: u64,
    pub writes: u64,
    pub zeroes: u64,
    pub flushes: u64,
    pub copied_up: u64,
    pub allocated: u64,
    /// Clusters that background work has looked at, of all of the device; and those that it has copied.
    pub background_seen: u64,
    pub background_copied: u64,
}

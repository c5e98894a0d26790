//! What a worker leaves to its successor: atomic 64-bit words in memory that the supervisor keeps, a file in the device's
//! folder ([`unflushed`](super::unflushed)) or, where that cannot be, a sealed memfd.
//!
//! The layout has a version; a worker that finds another one does not touch it. Every change is one atomic store, so
//! that a kill at any instant leaves either the old or the new word.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use crate::bail;
use crate::engine::api::{PROGRESS_WORDS, Shared, Status, SyncState};
use crate::error::{IoContext, Kind, Result};
use crate::sys::clock;
use crate::sys::file_id::FileId;
use crate::sys::shared_words::{self, SharedWords};

/// "ploopshm"
const MAGIC: u64 = u64::from_le_bytes(*b"ploopshm");
const VERSION: u64 = 1;

/// Changes of the BAT that may wait to become durable.
pub const SLOTS: usize = if cfg!(test) { 8192 } else { 131_072 };

// Word numbers.
const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 1;
const AT_SYNC: usize = 2;
const AT_FAILED: usize = 3;
const AT_PANICKED: usize = 4;
const AT_NO_SPACE: usize = 5;
const AT_SWITCHED: usize = 6;
const AT_READING: usize = 7;
const AT_COUNTERS: usize = 8;
const AT_MARKS: usize = 32;
const AT_POISON: usize = 128;
/// Behind the poison counts; a server that does not know these words leaves them alone.
const AT_BACKGROUND: usize = 1664;
const AT_CLOSING: usize = 1665;
const AT_SERVING: usize = 1666;
const AT_HEARTBEAT: usize = 1667;
const AT_PROGRESS: usize = 1672;
const AT_ORIGIN: usize = 1800;
const AT_ALIVE: usize = 1808;
const AT_CLOCK: usize = 1809;
const AT_ASKED: usize = 1810;
const AT_SEEN: usize = 1811;
const AT_FILE_LIMIT: usize = 1812;
const AT_SLOTS: usize = 2048;

/// Where the top of [`Origin`] stands, in bytes.
pub const TOP_OFFSET: u64 = (AT_ORIGIN * 8) as u64;

/// At [`AT_ASKED`].
const ASKED_FILE_SYSTEM: u64 = u64::MAX;

/// SharedWords of the whole.
const WORDS: usize = AT_SLOTS + SLOTS;
/// Bytes of the whole.
pub const SIZE: usize = WORDS * 8;

/// Threads that can name the request they are working on.
pub const MARKS: usize = 8;
const MARK_WORDS: usize = 4;

const POISON_ENTRIES: usize = 384;
const POISON_WORDS: usize = 4;
/// Worker exits that a request may cause before it is answered EIO.
pub const MAX_WORKER_EXITS: u64 = 3;

/// Makes the memory for a new device: no change, nothing failed.
pub fn create() -> Result<OwnedFd> {
    let made = shared_words::create(c"ploop-worker", WORDS).and_then(begin);
    made.ctx(Kind::Malloc, || format!("cannot make shared memory of {SIZE} bytes"))
}

/// The same in a file, which must not exist yet.
pub fn create_file(path: &Path) -> io::Result<OwnedFd> {
    shared_words::create_file(path, WORDS).and_then(begin)
}

/// Opens what [`create_file`] has made.
pub fn open_file(path: &Path) -> Result<(OwnedFd, Shm)> {
    use std::os::fd::AsFd;
    let fd = shared_words::open_file(path, WORDS).ctx(Kind::Open, || format!("cannot use {}", path.display()))?;
    let shm = Shm::map(fd.as_fd())?;
    Ok((fd, shm))
}

fn begin(fd: OwnedFd) -> io::Result<OwnedFd> {
    use std::os::fd::AsFd;
    let w = SharedWords::map(fd.as_fd(), WORDS)?;
    for slot in &w[AT_SLOTS..] {
        slot.store(Shm::FREE, Relaxed);
    }
    w[AT_VERSION].store(VERSION, Relaxed);
    w[AT_MAGIC].store(MAGIC, Release);
    Ok(fd)
}

/// The memory, mapped. Clones share the mapping.
#[derive(Clone, Debug)]
pub struct Shm {
    words: Arc<SharedWords>,
}

/// What the changes in the table belong to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Origin {
    /// The file that they change; the default: no worker has opened it yet.
    pub top: FileId,
    /// Of all files of the chain.
    pub chain: u64,
    /// Of the host's boot.
    pub boot: u64,
}

/// What identifies a request over all the workers that are given it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestKey {
    unique: u64,
    offset: u64,
    /// Length and operation code.
    len: u64,
}

impl RequestKey {
    /// `unique` and `opcode` as the transport has them, `unique` without what changes when the kernel gives out the
    /// request again.
    pub fn new(unique: u64, opcode: u32, offset: u64, len: u64) -> RequestKey {
        RequestKey { unique, offset, len: u64::from(opcode) << 48 | len & ((1 << 48) - 1) }
    }

    fn words(self) -> [u64; 3] {
        [self.unique, self.offset, self.len]
    }
}

impl Shm {
    /// Maps what [`create`] made, in this process or another one. Fails on another layout.
    pub fn map(fd: BorrowedFd) -> Result<Shm> {
        let words = SharedWords::map(fd, WORDS).ctx(Kind::Malloc, || "cannot map the shared memory of the device")?;
        let (magic, version) = (words[AT_MAGIC].load(Acquire), words[AT_VERSION].load(Relaxed));
        if (magic, version) != (MAGIC, VERSION) {
            bail!(
                Protocol,
                "the shared memory of the device has mark {magic:#x} and version {version}: {MAGIC:#x} and {VERSION} \
                 wanted; another version of the server made it, stop the device and start it again"
            );
        }
        Ok(Shm { words: Arc::new(words) })
    }

    /// A sync failed, or its outcome is not known: sticky.
    pub fn set_failed(&self) {
        self.words[AT_FAILED].store(1, Release);
    }

    pub fn failed(&self) -> bool {
        self.words[AT_FAILED].load(Acquire) != 0
    }

    /// This worker panicked and is about to abort.
    pub fn set_panicked(&self) {
        self.words[AT_PANICKED].store(1, Release);
    }

    /// Whether the worker that has exited panicked; forgets it.
    pub fn take_panicked(&self) -> bool {
        self.words[AT_PANICKED].swap(0, Acquire) != 0
    }

    /// Whether the worker that has exited was working on a request.
    pub fn is_request_marked(&self) -> bool {
        (0..MARKS).any(|thread| self.words[AT_MARKS + thread * MARK_WORDS].load(Acquire) != 0)
    }

    /// A worker serves the chain that the change `token` led to, from now on: there is no way back.
    pub fn set_switched(&self, token: u64) {
        self.words[AT_SWITCHED].store(token, Release);
    }

    /// The worker of the change `token` serves, and goes on without the supervisor that has started it: the worker that
    /// retired in favour of it is not needed any more.
    pub fn set_serving(&self, token: u64) {
        self.words[AT_SERVING].store(token, Release);
    }

    /// The last change whose worker serves.
    pub fn serving(&self) -> u64 {
        self.words[AT_SERVING].load(Acquire)
    }

    /// The last change of the chain after which a worker has served; 0: none.
    pub fn switched(&self) -> u64 {
        self.words[AT_SWITCHED].load(Acquire)
    }

    /// A worker reads requests after the change `token`, from now on: where the kernel cannot give them out again they
    /// are lost with it and its supervisor.
    pub fn set_reading(&self, token: u64) {
        self.words[AT_READING].store(token, Release);
    }

    /// The last change of the chain after which a worker has read requests; 0: none.
    pub fn reading(&self) -> u64 {
        self.words[AT_READING].load(Acquire)
    }

    /// The progress that is noted belongs to the background work `token` from now on: that of another is forgotten.
    pub fn begin_background(&self, token: u64) {
        if self.words[AT_BACKGROUND].load(Acquire) == token {
            return;
        }
        // Word 0 first: a worker that exits in between leaves another token, so that its successor clears all again.
        (0..PROGRESS_WORDS).for_each(|word| self.set_progress(word, 0));
        self.words[AT_BACKGROUND].store(token, Release);
    }

    /// The image is about to be closed: everything is flushed, and the in-use mark is taken away next.
    pub fn begin_close(&self) {
        self.words[AT_CLOSING].store(1, Release);
    }

    /// A worker has begun to close the image: where the image is not marked it has closed it.
    pub fn is_closing(&self) -> bool {
        self.words[AT_CLOSING].load(Acquire) != 0
    }

    /// The worker's main thread runs: called once a second.
    pub fn beat(&self) {
        let word = &self.words[AT_HEARTBEAT];
        word.store(word.load(Relaxed).wrapping_add(1), Release);
        self.words[AT_CLOCK].store(clock::wall_offset() as u64, Relaxed);
        self.note_alive();
    }

    /// The worker is about to change the images: their times are not much later than the last call of this.
    pub fn note_alive(&self) {
        self.words[AT_ALIVE].store(clock::wall(), Release);
    }

    /// When the worker has shown the last sign of life, in nanoseconds of the wall clock, and how far that clock was
    /// ahead of the one since boot.
    pub fn last_alive(&self) -> (u64, i64) {
        (self.words[AT_ALIVE].load(Acquire), self.words[AT_CLOCK].load(Relaxed) as i64)
    }

    /// When the top image was changed last, as the kernel notes it: the content of the image is not older.
    pub fn note_changed(&self, ctime: u64) {
        self.words[AT_SEEN].store(ctime, Release);
    }

    /// The last of these times, in nanoseconds; 0: none was noted.
    pub fn last_changed(&self) -> u64 {
        self.words[AT_SEEN].load(Acquire)
    }

    /// The table belongs to these files from now on. Where they are others than before, it is empty.
    pub fn set_origin(&self, origin: Origin) {
        let words = [origin.top.dev, origin.top.ino, origin.chain, origin.boot];
        for (i, v) in words.into_iter().enumerate() {
            self.words[AT_ORIGIN + i].store(v, Release);
        }
        self.note_changed(0);
        self.beat();
    }

    pub fn origin(&self) -> Origin {
        let [dev, ino, chain, boot] = [0, 1, 2, 3].map(|i| self.words[AT_ORIGIN + i].load(Acquire));
        Origin { top: FileId { dev, ino }, chain, boot }
    }

    /// A witness is about to be asked whether write-back has failed: which one, of `count`. The kernel tells each of them
    /// once, so that a worker that is killed before [`Shm::end_asking`] takes the report with it; its successor asks the
    /// next one. None: all of them may have been told, and the outcome is unknown.
    pub fn begin_asking(&self, count: usize) -> Option<usize> {
        let asked = self.words[AT_ASKED].load(Acquire) as usize;
        // A server of an earlier version had a single one.
        let next = if count == 1 { 0 } else { asked };
        self.words[AT_ASKED].store(asked.saturating_add(1).min(count) as u64, Release);
        Some(next).filter(|next| *next < count)
    }

    /// That witness was told of no error since all of them were opened, so that no report is lost.
    pub fn end_asking(&self) {
        self.words[AT_ASKED].store(0, Release);
    }

    /// A worker was killed while it asked a witness.
    pub fn is_asking(&self) -> bool {
        self.words[AT_ASKED].load(Acquire) != 0
    }

    /// The file system is about to be asked, which tells an error once, too. False: a worker was killed while it did that.
    pub fn begin_asking_file_system(&self) -> bool {
        self.words[AT_ASKED].swap(ASKED_FILE_SYSTEM, AcqRel) != ASKED_FILE_SYSTEM
    }

    /// For a new device that takes the changes over: what concerned the requests and workers of the former one is void.
    pub fn begin_device(&self) {
        let former = [AT_PANICKED, AT_NO_SPACE, AT_SWITCHED, AT_READING, AT_CLOSING, AT_SERVING];
        let counts = (AT_MARKS..AT_MARKS + MARKS * MARK_WORDS).chain(AT_POISON..AT_BACKGROUND);
        former.into_iter().chain(counts).for_each(|word| self.words[word].store(0, Release));
        self.set_file_limit(0);
        self.begin_background(0);
    }

    /// Sectors that the top's file may have; 0: no such limit.
    pub fn set_file_limit(&self, sectors: u64) {
        self.words[AT_FILE_LIMIT].store(sectors, Release);
    }

    /// Changes as long as a worker runs.
    pub fn heartbeat(&self) -> u64 {
        self.words[AT_HEARTBEAT].load(Acquire)
    }

    /// Publishes the engine's status.
    pub fn publish(&self, s: &Status) {
        let w = &self.words;
        w[AT_NO_SPACE].store(u64::from(s.no_space), Relaxed);
        if s.failed {
            self.set_failed();
        }
        let counters = [
            u64::from(s.alloc_end),
            u64::from(s.free),
            u64::from(s.dirty),
            u64::from(s.requests),
            s.reads,
            s.writes,
            s.zeroes,
            s.flushes,
            s.copied_up,
            s.allocated,
            s.background_seen,
            s.background_copied,
        ];
        for (i, v) in counters.into_iter().enumerate() {
            w[AT_COUNTERS + i].store(v, Relaxed);
        }
    }

    /// What was published last; about a second old.
    pub fn status(&self) -> Status {
        let c = |i: usize| self.words[AT_COUNTERS + i].load(Relaxed);
        Status {
            no_space: self.words[AT_NO_SPACE].load(Relaxed) != 0,
            failed: self.failed(),
            alloc_end: c(0) as u32,
            free: c(1) as u32,
            dirty: c(2) as u32,
            requests: c(3) as u32,
            reads: c(4),
            writes: c(5),
            zeroes: c(6),
            flushes: c(7),
            copied_up: c(8),
            allocated: c(9),
            background_seen: c(10),
            background_copied: c(11),
        }
    }

    /// The changes of the BAT in the table: (slot, cluster, place).
    pub fn carried(&self) -> Vec<(usize, u32, u32)> {
        (0..SLOTS)
            .map(|slot| (slot, self.load(slot)))
            .filter(|&(_, v)| v != Self::FREE)
            .map(|(slot, v)| (slot, (v >> 32) as u32, v as u32))
            .collect()
    }

    /// Thread `thread` works on this request from now on; `None`: on nothing in particular.
    pub fn mark(&self, thread: usize, key: Option<RequestKey>) {
        let at = AT_MARKS + thread % MARKS * MARK_WORDS;
        let w = &self.words[at..at + MARK_WORDS];
        match key {
            Some(key) => {
                for (w, v) in w[1..].iter().zip(key.words()) {
                    w.store(v, Relaxed);
                }
                w[0].store(1, Release);
            }
            None => w[0].store(0, Release),
        }
    }

    /// At a takeover, before the first request: counts a worker exit for each request that the former worker was
    /// working on. No other request is suspect.
    pub fn count_marked_requests(&self) {
        for thread in 0..MARKS {
            let at = AT_MARKS + thread * MARK_WORDS;
            let w = &self.words[at..at + MARK_WORDS];
            if w[0].swap(0, Acquire) != 0 {
                self.add_poison(RequestKey {
                    unique: w[1].load(Relaxed),
                    offset: w[2].load(Relaxed),
                    len: w[3].load(Relaxed),
                });
            }
        }
    }

    fn poison_entry(&self, key: RequestKey) -> Option<usize> {
        (0..POISON_ENTRIES).map(|i| AT_POISON + i * POISON_WORDS).find(|&at| {
            self.words[at].load(Relaxed) != 0
                && key.words().iter().zip(&self.words[at + 1..]).all(|(v, w)| w.load(Relaxed) == *v)
        })
    }

    fn add_poison(&self, key: RequestKey) {
        let at = self.poison_entry(key).unwrap_or_else(|| {
            // The entry with the fewest exits is replaced.
            let at = (0..POISON_ENTRIES)
                .map(|i| AT_POISON + i * POISON_WORDS)
                .min_by_key(|&at| self.words[at].load(Relaxed))
                .unwrap_or(AT_POISON);
            self.words[at].store(0, Release);
            for (w, v) in self.words[at + 1..].iter().zip(key.words()) {
                w.store(v, Relaxed);
            }
            at
        });
        let n = self.words[at].load(Relaxed);
        self.words[at].store(n + 1, Release);
    }

    /// Whether a request that came back has caused [`MAX_WORKER_EXITS`] worker exits and must be answered EIO.
    pub fn is_poisoned(&self, key: RequestKey) -> bool {
        self.poison_entry(key).is_some_and(|at| self.words[at].load(Relaxed) >= MAX_WORKER_EXITS)
    }

    /// The request is answered: its count is cleared.
    pub fn clear_poison(&self, key: RequestKey) {
        if let Some(at) = self.poison_entry(key) {
            self.words[at].store(0, Release);
        }
    }
}

impl Shared for Shm {
    fn slots(&self) -> usize {
        SLOTS
    }

    fn load(&self, slot: usize) -> u64 {
        self.words[AT_SLOTS + slot].load(Acquire)
    }

    fn store(&self, slot: usize, value: u64) {
        self.words[AT_SLOTS + slot].store(value, Release);
    }

    fn set_sync_state(&self, state: SyncState) {
        self.words[AT_SYNC].store(state as u64, Release);
        if state == SyncState::Failed {
            self.set_failed();
        }
    }

    fn progress(&self, word: usize) -> u64 {
        self.words[AT_PROGRESS + word % PROGRESS_WORDS].load(Acquire)
    }

    fn set_progress(&self, word: usize, value: u64) {
        self.words[AT_PROGRESS + word % PROGRESS_WORDS].store(value, Release);
    }

    fn file_limit(&self) -> u64 {
        self.words[AT_FILE_LIMIT].load(Acquire)
    }

    fn sync_state(&self) -> SyncState {
        match self.words[AT_SYNC].load(Acquire) {
            0 => SyncState::Idle,
            1 => SyncState::Running,
            _ => SyncState::Failed,
        }
    }
}

#[cfg(test)]
mod tests;

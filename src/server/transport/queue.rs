//! The queue of a device as the worker sees it: requests of the kernel in, replies out, whatever the transport.
//!
//! A transport implements [`RequestQueue`], and [`QueueReader`] for what an I/O thread keeps of it. What is stored for
//! a successor (session, heads of requests in the journal) has the same layout in every worker of a device.
#![forbid(unsafe_code)]

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::AtomicU64;

use crate::engine::api::Errno;
use crate::error::Result;
use crate::sys::arena::{Arena, Span};
use crate::sys::ring::Ring;

/// Bytes that are kept of a request's head: no transport has a longer one. Its first 8 bytes are never all zero.
pub const HEAD: usize = 80;

/// Completions with these tags belong to the thread's [`QueueReader`].
pub const TAGS: Range<u64> = 1 << 62..1 << 63;

/// What a request asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    Read {
        offset: u64,
        len: u32,
    },
    /// The data are in the buffer that the request was read into.
    Write {
        offset: u64,
        len: u32,
    },
    /// The range reads as zero from then on.
    Zero {
        offset: u64,
        len: u64,
    },
    Flush,
    /// The queue answers it by itself: see [`RequestQueue::answer_own`].
    Own,
    /// No reply may be sent.
    NoReply,
    /// Fails with this error.
    Unsupported(Errno),
}

/// A request of the kernel's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KernelRequest {
    /// Names the request in its reply.
    pub unique: u64,
    /// The transport's own number of the operation; below 2^16.
    pub code: u32,
    pub op: Op,
    /// The request has been given to an earlier worker, which did not answer it.
    pub resent: bool,
}

/// How a request is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reply {
    /// A read, with its data.
    Data(Span),
    /// A write of so many bytes.
    Written(u32),
    Done,
    Error(Errno),
}

/// Why there is no request to be read.
#[derive(Debug)]
pub enum ReadError {
    /// Nothing is there.
    Empty,
    /// The connection is over: the device has ended or was aborted.
    Over,
    /// The request was withdrawn, or a signal came: the next read may find one.
    Again,
    Failed(io::Error),
}

/// What sizes the worker's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Most data of one read or write.
    pub max_io: usize,
    /// Reads and writes that the block device keeps in flight.
    pub in_flight: usize,
}

/// Where a successor finds the requests that were read and not answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Recovery {
    /// The kernel gives them out again: [`RequestQueue::resend`].
    Kernel,
    /// Workers keep them in the request journal.
    Journal,
}

/// The size of a device as a worker's queue shows it: fixed for a worker; its successor may have another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    pub bytes: u64,
    /// The granularity of discards.
    pub block_bytes: u32,
}

/// A connection with the kernel for one device; no worker serves it yet.
#[derive(Debug)]
pub struct Connection<S> {
    /// Every process of the device holds a duplicate of it. If the kernel ends the connection with the last one, the
    /// transport says so; else [`BlockBinding::abort`](super::BlockBinding::abort) must end it.
    pub queue: OwnedFd,
    /// What a worker has to know of it.
    pub session: S,
    /// Names the connection for [`BlockBinding::abort`](super::BlockBinding::abort); 0: it has no number.
    pub number: u64,
}

impl<S> Connection<S> {
    pub(super) fn map<T>(self, of: impl FnOnce(S) -> T) -> Connection<T> {
        Connection { queue: self.queue, session: of(self.session), number: self.number }
    }
}

/// Requests in, replies out. One for all threads of a worker.
///
/// The order of the calls: `create` (supervisor); `open`, the readers armed (worker); `bind` of the block device
/// (helper); `hide` (supervisor). A successor: `quiesce` or a kill of the worker before, `open`, `resend`, first read.
pub trait RequestQueue: Sized {
    /// What was agreed on with the kernel once; each worker of the device gets it.
    type Session: Copy;
    type Reader: QueueReader<Self>;

    const LIMITS: Limits;

    /// Makes the connection for the device whose folder is `dir`, which shows `image`. `journal`: requests are to be kept in the journal
    /// even where the kernel could give them out again.
    fn create(dir: &Path, image: &str, journal: bool) -> Result<Connection<Self::Session>>;

    /// Removes from `dir` what [`create`](Self::create) made there for binding the block device: from here on the block
    /// device alone holds the connection, and no process finds it by a name.
    fn hide(dir: &Path) -> Result<()>;

    /// The same, called by the supervisor of a device that is given up while it is made; nothing waits, and errors are
    /// of no interest.
    fn discard(dir: &Path);

    /// The same, called by a process that cleans up after an exited server.
    fn clean(dir: &Path) -> Result<()>;

    fn recovery(session: &Self::Session) -> Recovery;

    fn open(queue: OwnedFd, session: Self::Session) -> Self;

    /// Reads a request: its head, and the data of a write into `data`, which has room for [`Limits::max_io`] bytes.
    /// Returns the length of the whole. Does not wait.
    fn read(&self, arena: &Arena, head: &mut [u8; HEAD], data: Span) -> std::result::Result<usize, ReadError>;

    /// The same with the head in words that a successor finds, which are [`HEAD`] bytes long.
    fn read_words(&self, arena: &Arena, head: &[AtomicU64], data: Span) -> std::result::Result<usize, ReadError>;

    /// Understands the request whose first bytes are `head` and which is `len` bytes long as a whole. `None`: not a
    /// whole request of the protocol; the kernel sends none such.
    fn parse(&self, head: &[u8; HEAD], len: usize) -> Option<KernelRequest>;

    /// The same for a head of the journal, which holds whole requests only.
    fn parse_kept(&self, head: &[u8; HEAD]) -> Option<KernelRequest>;

    /// What of `unique` stays the same when the kernel gives out the request again: part of the key by which requests
    /// that make workers exit are counted; 0 if nothing does.
    fn stable_id(&self, unique: u64) -> u64;

    /// Answers a request; any thread of the worker calls it, not only the one that read the request. The buffer is free
    /// afterwards. That no process waits for the answer any more is no error.
    fn reply(&self, arena: &Arena, unique: u64, reply: Reply) -> io::Result<()>;

    /// Answers an [`Op::Own`].
    fn answer_own(&self, request: &KernelRequest, geometry: &Geometry) -> io::Result<()>;

    /// Asks the kernel to give out again every request that was read and not answered. For [`Recovery::Kernel`], before
    /// the first read of a successor: requests read by itself would come back to it, too.
    fn resend(&self) -> io::Result<()>;
}

/// What an I/O thread keeps of a queue: how its ring learns of requests.
pub trait QueueReader<Q>: Default {
    /// A read has found nothing: has the ring complete as soon as there is a request, at once if one has come since.
    fn arm(&mut self, queue: &Q, ring: &mut Ring) -> io::Result<()>;

    /// A completion with one of [`TAGS`] has come. True: requests may be there.
    fn on_completion(&mut self, tag: u64) -> bool;

    /// No more requests are read by this thread. True: nothing is left in the ring that would take a request, or a
    /// wake-up for one, from the successor; else it has to be called again after the next completion.
    fn quiesce(&mut self, ring: &mut Ring) -> io::Result<bool>;
}

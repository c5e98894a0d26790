//! Requests kept where a successor finds them, for kernels that cannot give them out again.
//!
//! There is a journal with a slot for every request, and the buffers are shared memory, too; the supervisor holds both.
//! A
//! request is read straight into its slot and a buffer, how it ended is stored before it is answered. A successor
//! copies what it finds into a journal and buffers of its own, since reads of the former worker may land in the old
//! ones for a long time yet, and has the supervisor take these instead of the old ones. Only then, and before it reads
//! a request, it answers again what was done and executes what was not. So at any time there is one journal that holds
//! everything:
//!
//! | a worker exits | its slot | the successor |
//! |---|---|---|
//! | before a request was read | empty | does nothing; the kernel has it |
//! | until it was executed | filled | executes it, perhaps for the second time, before the first was answered |
//! | until it was answered | done | answers it |
//! | until the slot was cleared | done | answers it, and the kernel drops the answer |
//!
//! All of it is present and locked before the first read: a page fault while the kernel copies a request to a process
//! that is being killed would end the request with EIO.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::bail;
use crate::engine::api::Errno;
use crate::error::{IoContext, Kind, Result};
use crate::server::transport::{HEAD, KernelRequest, Op, Queue, ReadError};
use crate::sys::arena::{Arena, Span};
use crate::sys::shared_words::{self, SharedWords};

use super::memory::{BufId, Memory, REQUESTS};
use super::pool::Pool;

/// "ploopreq"
const MAGIC: u64 = u64::from_le_bytes(*b"ploopreq");
/// Of what is written here; where the buffers lie is told by [`Memory::shape`].
const VERSION: u64 = 1;

// Word numbers.
const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 1;
const AT_SHAPE: usize = 2;
const AT_ROWS: usize = 64;
const ROW: usize = 16;
const WORDS: usize = AT_ROWS + REQUESTS * ROW;

// In a row; the head of the request comes first. Its first word is 0 as long as there is no request.
const HEAD_WORDS: usize = HEAD / 8;
const AT_BUFFER: usize = 10;
const AT_RESULT: usize = 11;

/// In the result: the request was executed, with the errno beside it.
const DONE: u64 = 1 << 63;

/// The slots of this worker.
#[derive(Debug)]
pub struct RequestJournal {
    words: SharedWords,
    fd: OwnedFd,
    arena: Arc<Arena>,
}

/// A request in a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JournalEntry {
    pub id: u32,
    pub buf: BufId,
    head: [u8; HEAD],
    /// How it ended.
    pub done: Option<std::result::Result<(), Errno>>,
}

impl JournalEntry {
    /// From the words of a row.
    fn new(id: u32, word: impl Fn(usize) -> u64) -> Option<JournalEntry> {
        if word(0) == 0 {
            return None;
        }
        let mut head = [0; HEAD];
        for (i, bytes) in head.chunks_mut(8).enumerate() {
            bytes.copy_from_slice(&word(i).to_ne_bytes());
        }
        let result = word(AT_RESULT);
        let done = match (result & DONE != 0, (result & !DONE) as Errno) {
            (false, _) => None,
            (true, 0) => Some(Ok(())),
            (true, errno) => Some(Err(errno)),
        };
        Some(JournalEntry { id, buf: BufId::from_raw(word(AT_BUFFER) as u16), head, done })
    }

    /// The kernel gives out whole requests only.
    pub fn request(&self, queue: &Queue) -> Option<KernelRequest> {
        queue.parse_kept(&self.head)
    }
}

impl RequestJournal {
    /// Makes an empty one for these buffers, which are shared.
    pub fn create(memory: &Memory) -> io::Result<RequestJournal> {
        let fd = shared_words::create(c"ploop-requests", WORDS)?;
        let journal = RequestJournal { words: SharedWords::map(fd.as_fd(), WORDS)?, fd, arena: memory.arena.clone() };
        // Every page is there by these stores.
        for word in journal.words.iter() {
            word.store(0, Relaxed);
        }
        for (at, v) in memory.shape().into_iter().enumerate() {
            journal.words[AT_SHAPE + at].store(v, Relaxed);
        }
        journal.words[AT_VERSION].store(VERSION, Relaxed);
        journal.words[AT_MAGIC].store(MAGIC, Release);
        Ok(journal)
    }

    /// What a successor needs: the journal and the data.
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        [Some(self.fd.as_fd()), self.arena.file()].into_iter().flatten().collect()
    }

    fn row(&self, id: u32) -> &[AtomicU64] {
        &self.words[AT_ROWS + id as usize * ROW..][..ROW]
    }

    /// Reads a request into slot `id` and the buffer `big`, which is `span`; a copy of its head into `head`.
    pub fn read(
        &self,
        queue: &Queue,
        id: u32,
        big: BufId,
        span: Span,
        head: &mut [u8; HEAD],
    ) -> std::result::Result<usize, ReadError> {
        let row = self.row(id);
        row[0].store(0, Relaxed);
        // Not before: what was in the slot was done.
        row[AT_RESULT].store(0, Release);
        row[AT_BUFFER].store(u64::from(big.raw()), Release);
        let read = queue.read_words(&self.arena, &row[..HEAD_WORDS], span);
        match read {
            Ok(_) => {
                for (bytes, word) in head.chunks_mut(8).zip(row) {
                    bytes.copy_from_slice(&word.load(Relaxed).to_ne_bytes());
                }
            }
            Err(_) => row[0].store(0, Release),
        }
        read
    }

    /// The data have been copied to this buffer; the one before is free from here on.
    pub fn moved(&self, id: u32, buf: BufId) {
        self.row(id)[AT_BUFFER].store(u64::from(buf.raw()), Release);
    }

    /// The request was executed and is to be answered.
    pub fn done(&self, id: u32, result: std::result::Result<(), Errno>) {
        self.row(id)[AT_RESULT].store(DONE | result.err().map_or(0, |e| e as u64), Release);
    }

    /// The request was answered.
    pub fn clear(&self, id: u32) {
        self.row(id)[0].store(0, Release);
    }

    pub fn is_empty(&self) -> bool {
        (0..REQUESTS as u32).all(|id| self.row(id)[0].load(Acquire) == 0)
    }

    /// The requests that it holds.
    pub fn filled(&self) -> Vec<JournalEntry> {
        (0..REQUESTS as u32).filter_map(|id| JournalEntry::new(id, |i| self.row(id)[i].load(Acquire))).collect()
    }

    fn put(&self, filled: &JournalEntry) {
        let row = self.row(filled.id);
        for (word, bytes) in row.iter().zip(filled.head.chunks(8)).skip(1) {
            word.store(word_of(bytes), Relaxed);
        }
        self.moved(filled.id, filled.buf);
        match filled.done {
            Some(result) => self.done(filled.id, result),
            None => row[AT_RESULT].store(0, Release),
        }
        row[0].store(word_of(&filled.head[..8]), Release);
    }
}

fn word_of(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_ne_bytes)
}

/// The journal of a former worker. It is read and never changed: the next successor may need it once more.
pub struct PriorJournal {
    rows: Vec<JournalEntry>,
    data: File,
}

impl PriorJournal {
    /// Reads the journal of a former worker. Fails on another layout.
    pub fn open(fds: Vec<OwnedFd>, memory: &Memory) -> Result<PriorJournal> {
        let count = fds.len();
        let Ok([journal, data]) = <[OwnedFd; 2]>::try_from(fds) else {
            bail!(Protocol, "{count} descriptors came for the requests of the worker before: 2 wanted")
        };
        let (journal, data) = (File::from(journal), File::from(data));
        let mut bytes = Vec::new();
        let read = journal.metadata().and_then(|m| {
            bytes.resize(m.len() as usize, 0);
            journal.read_exact_at(&mut bytes, 0)
        });
        read.ctx(Kind::Malloc, || "cannot read the requests of the worker before")?;
        let words: Vec<u64> = bytes.chunks_exact(8).map(word_of).collect();
        let word = |at: usize| words.get(at).copied().unwrap_or(0);
        let (magic, version) = (word(AT_MAGIC), word(AT_VERSION));
        let shape = memory.shape();
        let same = (AT_SHAPE..).zip(shape).all(|(at, v)| word(at) == v);
        let long = data.metadata().ctx(Kind::Malloc, || "cannot look at the data of the worker before")?.len();
        let known = (magic, version, words.len()) == (MAGIC, VERSION, WORDS);
        let entry = |id: usize| JournalEntry::new(id as u32, |i| words[AT_ROWS + id * ROW + i]);
        let rows: Vec<_> = if known { (0..REQUESTS).filter_map(entry).collect() } else { Vec::new() };
        // Where there is no request it does not matter how the buffers were cut.
        let cut_alike = same && long == memory.arena.bytes() as u64;
        if !known || !cut_alike && !rows.is_empty() {
            bail!(
                Protocol,
                "the requests of the worker before have mark {magic:#x}, version {version}, {} words and {long} bytes of \
                 data: {MAGIC:#x}, {VERSION}, {WORDS} and {} wanted, cut alike; another version of the server inherited \
                 them, stop the device and start it again",
                words.len(),
                memory.arena.bytes()
            );
        }
        Ok(PriorJournal { rows, data })
    }

    /// Copies everything into the same slots and buffers of ours. The former worker's operations on files are over.
    pub fn copy(&self, journal: &RequestJournal, queue: &Queue, memory: &Memory, pool: &Pool) -> Result<()> {
        for row in &self.rows {
            let (buf, len) = match row.request(queue).map(|r| r.op) {
                // Not to be answered, or nothing that we understand.
                None | Some(Op::NoReply) => continue,
                Some(Op::Write { len, .. }) if row.done.is_none() => (row.buf, len as usize),
                Some(Op::Read { .. }) if row.done.is_none() => (row.buf, 0),
                Some(_) => (BufId::NONE, 0),
            };
            let taken = pool.take(memory, buf, row.id).ctx(Kind::Malloc, || "cannot get memory for requests")?;
            if !taken || len > memory.room(buf) {
                bail!(Protocol, "request {} of the worker before has no buffer: {row:?}", row.id);
            }
            if len > 0 {
                let data = memory.buffer(buf).part(0, len);
                self.fetch(memory, data).ctx(Kind::Malloc, || "cannot read the data of the worker before")?;
            }
            journal.put(&JournalEntry { buf, ..*row });
        }
        Ok(())
    }

    fn fetch(&self, memory: &Memory, mut data: Span) -> io::Result<()> {
        while data.len > 0 {
            match memory.arena.pread(self.data.as_fd(), data, data.at as u64) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => data = data.part(n, data.len - n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

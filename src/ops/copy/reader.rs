//! Reads a file ahead of what is sent of it, in a thread of its own. The sender asks for ranges and takes what was read, in
//! that order; the buffers are few, so that the thread is never far ahead.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::report;
use crate::sys::aligned::{ALIGN, AlignedBuf, read_full};
use crate::sys::{fiemap, memory};

/// Memory for what was read and not sent.
const AHEAD: usize = 16 << 20;
/// The same while file systems are frozen, if a quarter of the memory that is to be had is as much: what fits is sent after
/// the thaw.
const AHEAD_FROZEN: u64 = 512 << 20;
/// Between two looks for a request to cancel.
const LOOK: Duration = Duration::from_millis(100);

/// A range to be read.
struct Job {
    bytes: Range<u64>,
    /// Parts without space in the file are left out, in pieces of this many bytes; 0: all is read.
    skip: u64,
}

enum Found {
    Bytes(Piece),
    /// All of the oldest job.
    JobEnd,
    Failed(Error),
}

/// Bytes of the file, in `buf[..len]`.
pub(super) struct Piece {
    pub at: u64,
    pub buf: AlignedBuf,
    pub len: usize,
}

/// See the module.
pub(super) struct Reader {
    /// None: it ends.
    jobs: Option<Sender<Job>>,
    free: Option<Sender<AlignedBuf>>,
    found: Receiver<Found>,
    /// Taken from `found`, not yet by the sender.
    waiting: VecDeque<Piece>,
    piece: usize,
    pending: usize,
    buffers: usize,
    /// Of these, those that the thread has or can take.
    idle: usize,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    /// Of a file, in pieces of at most this many bytes, which the file's alignment divides.
    pub fn new(file: File, piece: usize) -> Result<Reader> {
        let (jobs, ordered) = channel::<Job>();
        let (free, emptied) = channel();
        let (tell, found) = channel();
        let work = move || {
            for job in ordered {
                let end = match read_job(&file, &job, piece, &emptied, &tell) {
                    Ok(true) => Found::JobEnd,
                    // The sender has gone.
                    Ok(false) => return,
                    Err(e) => Found::Failed(e),
                };
                if tell.send(end).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("copy-reader".into()).spawn(work);
        let thread = thread.ctx(Kind::Sys, || "cannot start a thread that reads the image")?;
        let mut reader = Reader {
            jobs: Some(jobs),
            free: Some(free),
            found,
            waiting: VecDeque::new(),
            piece,
            pending: 0,
            buffers: 0,
            idle: 0,
            thread: Some(thread),
        };
        reader.allow(AHEAD);
        Ok(reader)
    }

    /// Buffers of so many bytes together, at least two.
    fn allow(&mut self, bytes: usize) {
        while self.buffers < (bytes / self.piece).max(2) {
            self.give(AlignedBuf::new(self.piece));
            self.buffers += 1;
        }
    }

    fn give(&mut self, buf: AlignedBuf) {
        self.idle += 1;
        if let Some(free) = &self.free {
            // The thread has ended only after an error that it has told.
            let _ = free.send(buf);
        }
    }

    /// Asks for a range, with all holes if `skip` is 0; else without those parts, of `skip` bytes each, that have no space.
    pub fn ask(&mut self, bytes: Range<u64>, skip: u64) {
        if bytes.is_empty() {
            return;
        }
        if let Some(jobs) = &self.jobs
            && jobs.send(Job { bytes, skip }).is_ok()
        {
            self.pending += 1;
        }
    }

    /// Ranges that were asked for and are not read to their end.
    pub fn pending(&self) -> usize {
        self.pending
    }

    /// The next piece; none: all that was asked for has been read and taken.
    pub fn next(&mut self) -> Result<Option<Piece>> {
        if let Some(piece) = self.waiting.pop_front() {
            return Ok(Some(piece));
        }
        self.hear()
    }

    /// Waits until all is read that was asked for, as far as memory allows: the rest comes while the sender takes it.
    pub fn read_ahead(&mut self) -> Result<()> {
        let most = memory::available().map_or(AHEAD as u64, |bytes| AHEAD_FROZEN.min(bytes / 4));
        let most = self.buffers.max(most as usize / self.piece);
        while self.pending > 0 && self.waiting.len() + 1 < most {
            // Memory is taken as it is filled: zeroing all of it would take longer than the reading.
            if self.idle < 2 && self.buffers < most {
                self.give(AlignedBuf::new(self.piece));
                self.buffers += 1;
            }
            if let Some(piece) = self.hear()? {
                self.waiting.push_back(piece);
            }
        }
        Ok(())
    }

    fn hear(&mut self) -> Result<Option<Piece>> {
        while self.pending > 0 {
            let found = match self.found.try_recv() {
                Err(TryRecvError::Empty) => self.found.recv_timeout(LOOK),
                other => other.map_err(|_| RecvTimeoutError::Disconnected),
            };
            if report::cancel::requested() {
                bail!(Abort, "the copy was cancelled");
            }
            match found {
                Ok(Found::Bytes(piece)) => {
                    self.idle -= 1;
                    return Ok(Some(piece));
                }
                Ok(Found::JobEnd) => self.pending -= 1,
                Ok(Found::Failed(e)) => return Err(e),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!(Sys, "the thread that reads the image has ended"),
            }
        }
        Ok(None)
    }

    /// What was taken has been sent.
    pub fn sent(&mut self, piece: Piece) {
        self.give(piece.buf);
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.jobs = None;
        self.free = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// False: no more is wanted.
fn read_job(file: &File, job: &Job, piece: usize, free: &Receiver<AlignedBuf>, tell: &Sender<Found>) -> Result<bool> {
    let parts = match job.skip {
        0 => vec![job.bytes.clone()],
        unit => allocated(file, &job.bytes, unit).ctx(Kind::Read, || "cannot find out where the image has data")?,
    };
    for part in parts {
        let mut at = part.start;
        while at < part.end {
            let Ok(mut buf) = free.recv() else { return Ok(false) };
            // Up to the next multiple of the piece: each piece of the file is read as one.
            let whole = piece as u64 - at % piece as u64;
            let len = (part.end - at).min(whole) as usize;
            // Direct I/O takes no other lengths.
            let want = len.next_multiple_of(ALIGN).min(piece);
            let read =
                read_full(file, &mut buf[..want], at).ctx(Kind::Read, || format!("cannot read the image at {at}"))?;
            let read = read.min(len);
            if tell.send(Found::Bytes(Piece { at, buf, len: read })).is_err() {
                return Ok(false);
            }
            if read < len {
                // The end of the file.
                return Ok(true);
            }
            at += len as u64;
        }
    }
    Ok(true)
}

/// The parts of a range that have space in the file, written or not, widened to multiples of `unit`; all where the file
/// system does not tell.
fn allocated(file: &File, bytes: &Range<u64>, unit: u64) -> io::Result<Vec<Range<u64>>> {
    let mut parts: Vec<Range<u64>> = Vec::new();
    let found = fiemap::each_extent(file, bytes.start, bytes.end, &mut |extent| {
        let start = (extent.start - extent.start % unit).max(bytes.start);
        let end = extent.end().div_ceil(unit).saturating_mul(unit).min(bytes.end);
        match parts.last_mut().filter(|last| last.end >= start) {
            Some(last) => last.end = last.end.max(end),
            None if start < end => parts.push(start..end),
            None => {}
        }
        Ok(())
    });
    match found {
        Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(vec![bytes.clone()]),
        Err(e) => Err(e),
        Ok(()) => Ok(parts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn all(reader: &mut Reader) -> Vec<(u64, Vec<u8>)> {
        let mut got = Vec::new();
        while let Some(piece) = reader.next().unwrap() {
            got.push((piece.at, piece.buf[..piece.len].to_vec()));
            reader.sent(piece);
        }
        got
    }

    #[test]
    fn ranges_come_in_their_order_and_in_pieces() {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i / 7) as u8).collect();
        file.write_all_at(&bytes, 0).unwrap();
        let mut reader = Reader::new(file, 8192).unwrap();
        reader.ask(4096..20_000, 0);
        reader.ask(0..0, 0);
        reader.ask(90_000..200_000, 0);
        assert_eq!(reader.pending(), 2);
        reader.read_ahead().unwrap();
        let got = all(&mut reader);
        let starts: Vec<u64> = got.iter().map(|(at, _)| *at).collect();
        assert_eq!(starts, [4096, 8192, 16384, 90_000, 90_112, 98_304]);
        for (at, piece) in got {
            assert_eq!(piece, bytes[at as usize..at as usize + piece.len()], "{at}");
        }
        // More than there are buffers for.
        reader.ask(0..100_000, 0);
        assert_eq!(all(&mut reader).iter().map(|(_, p)| p.len()).sum::<usize>(), 100_000);
    }

    #[test]
    fn parts_without_space_are_left_out_and_others_are_whole() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let file = File::create_new(dir.path().join("f")).unwrap();
        file.write_all_at(&[1; 4096], (1 << 20) + 4096).unwrap();
        file.write_all_at(&[2; 4096], 5 << 20).unwrap();
        file.set_len(8 << 20).unwrap();
        file.sync_all().unwrap();
        if fiemap::each_extent(&file, 0, 1, &mut |_| Ok(())).is_err() {
            return;
        }
        let unit = 64 << 10;
        let parts = allocated(&file, &(0..8 << 20), unit).unwrap();
        assert_eq!(parts, [1 << 20..(1 << 20) + unit, 5 << 20..(5 << 20) + unit]);
        let cut = allocated(&file, &(0..(1 << 20) + 8192), unit).unwrap();
        assert_eq!((cut.len(), &cut[0]), (1, &(1 << 20..(1 << 20) + 8192)));
    }

    #[test]
    fn an_end_before_all_is_taken_ends_the_thread() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        let mut reader = Reader::new(file, 4096).unwrap();
        reader.ask(0..64 << 20, 0);
        assert_eq!(reader.next().unwrap().unwrap().len, 4096);
        drop(reader);
    }
}

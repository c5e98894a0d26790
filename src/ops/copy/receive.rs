//! The receiving end of a copy.
//!
//! The image grows under a name of its own, `FILE.receiving`, and gets its name when all of it is durable: what has the name is
//! whole. A receiver that was killed leaves the former, which the next one removes.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::PollFlags;
use nix::sys::stat::{SFlag, fstat};

use super::wire::{self, Packet};
use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::report;
use crate::sys::cache;
use crate::sys::file_id::FileId;
use crate::sys::file_lock;
use crate::sys::folder::Place;
use crate::sys::{stdio, store, wait};

/// Of the file while it is received.
pub(super) const SUFFIX: &str = ".receiving";
/// The file is as unreadable to others as the image that it is a copy of may be.
const MODE: u32 = 0o600;
/// Received data are handed to the disk in pieces of this size, so that a sync has little left to do.
pub(super) const WRITE_BACK: u64 = 64 << 20;

/// A request to cancel is looked for so often.
const LOOK: Duration = Duration::from_millis(100);

/// What came.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Received {
    /// Bytes of data, those that came several times counted as often.
    pub bytes: u64,
    /// Commands to sync.
    pub syncs: u64,
}

/// [`receive`] with descriptors that the caller named by their numbers, as programs and the C library do. Messages would
/// disturb answers on standard output or standard error: they are left out from then on.
pub fn receive_by_number(file: &Path, input: RawFd, feedback: Option<RawFd>) -> Result<Received> {
    let taken = |number: RawFd| {
        stdio::duplicate(number).ctx(Kind::Param, || format!("descriptor {number} cannot be used for the copy"))
    };
    let (input, answers) = (taken(input)?, feedback.map(taken).transpose()?);
    match feedback {
        Some(1) => report::set_verbose_level(report::NO_STDOUT),
        Some(2) => report::silence(),
        _ => {}
    }
    receive(file, input.as_fd(), answers.as_ref().map(|fd| fd.as_fd()))
}

/// Receives the copy that comes from `input`, a pipe or socket, as the new file `file`. Commands to sync are answered on
/// `feedback`, a pipe or socket, too. Errors: `Param` (no pipe or socket), `Creat` (`file` exists), `Read` (the stream ends too
/// early), `Protocol`, `Write`; the file is removed then.
pub fn receive(file: &Path, input: BorrowedFd, feedback: Option<BorrowedFd>) -> Result<Received> {
    let operation = report::cancel::begin();
    for (fd, what) in [(Some(input), "the copy comes from"), (feedback, "answers go to")] {
        if let Some(fd) = fd
            && !is_channel(fd)
        {
            bail!(Param, "the descriptor that {what} is no pipe and no socket");
        }
    }
    let mut image = NewImage::named(file)?;
    let received = image.fill(input, feedback)?;
    image.publish()?;
    operation.end(true);
    Ok(received)
}

pub(super) fn is_channel(fd: BorrowedFd) -> bool {
    let channel =
        |mode: u32| [SFlag::S_IFIFO, SFlag::S_IFSOCK].iter().any(|kind| mode & SFlag::S_IFMT.bits() == kind.bits());
    fstat(fd).is_ok_and(|stat| channel(stat.st_mode))
}

/// An image that is being copied; removed unless it is published.
pub(super) struct NewImage {
    place: Place,
    /// Where it is until then.
    unfinished: Place,
    file: File,
    published: bool,
    /// Written since the disk was given work.
    unwritten: u64,
}

impl NewImage {
    /// For the new file `file`; it exists: `Creat`.
    pub fn named(file: &Path) -> Result<NewImage> {
        let place = Place::named(file).ctx(Kind::Creat, || format!("cannot make {}", file.display()))?;
        if place.id().ctx(Kind::Creat, || format!("cannot look at {}", place.display()))?.is_some() {
            bail!(Creat, "{} exists; remove it, or copy into another file", place.display());
        }
        NewImage::make(place)
    }

    fn make(place: Place) -> Result<NewImage> {
        let unfinished = place.suffixed(SUFFIX);
        for _ in 0..2 {
            match store::create_new(&unfinished, MODE) {
                Ok(file) => {
                    // Held as long as it is received: a file without the lock is what a killed receiver has left.
                    let locked = file_lock::exclusive(&file, false);
                    // Between the two steps another receiver may have taken it for that, and removed it.
                    if locked.is_ok() && unfinished.id().ok().flatten() == FileId::of(&file).ok() {
                        return Ok(NewImage { place, unfinished, file, published: false, unwritten: 0 });
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => remove_left(&unfinished)?,
                Err(e) => return Err(Error::with(Kind::Creat, format!("cannot make {}", unfinished.display()), e)),
            }
        }
        bail!(Creat, "{} is made by another receiver", unfinished.display())
    }

    fn fill(&mut self, input: BorrowedFd, feedback: Option<BorrowedFd>) -> Result<Received> {
        let mut received = Received::default();
        let mut payload = Vec::new();
        loop {
            let mut head = [0; wire::HEAD];
            read_all(input, &mut head, received)?;
            match wire::parse(&head)? {
                Packet::End => return Ok(received),
                Packet::Sync => {
                    read_all(input, &mut [0; wire::SYNC as usize], received)?;
                    self.sync_and_answer(feedback)?;
                    received.syncs += 1;
                }
                Packet::Data { offset, len } => {
                    payload.resize(len as usize, 0);
                    read_all(input, &mut payload, received)?;
                    self.write(&payload, offset)?;
                    received.bytes += u64::from(len);
                }
            }
        }
    }

    pub fn write(&mut self, data: &[u8], offset: u64) -> Result<()> {
        store::write_all(&self.file, data, offset)
            .ctx(Kind::Write, || format!("cannot write {} at {offset}", self.unfinished.display()))?;
        self.unwritten += data.len() as u64;
        if self.unwritten >= WRITE_BACK {
            // Only a hint; the syncs tell how it went. Length 0: to the end.
            cache::start_writeback(&self.file, 0, 0);
            self.unwritten = 0;
        }
        Ok(())
    }

    fn sync_and_answer(&mut self, feedback: Option<BorrowedFd>) -> Result<()> {
        let synced = self.sync();
        let answer = if synced.is_ok() { wire::SUCCESS } else { wire::FAILURE };
        let told = feedback.map_or(Ok(()), |fd| write_all(fd, answer));
        synced?;
        told.ctx(Kind::Write, || "cannot answer the sender's command to sync")
    }

    pub fn sync(&self) -> Result<()> {
        store::sync_data(&self.file).ctx(Kind::Write, || format!("cannot sync {}", self.unfinished.display()))
    }

    /// It is whole: makes it durable, then gives it its name.
    pub fn publish(&mut self) -> Result<()> {
        self.sync()?;
        match store::rename_new(&self.unfinished, &self.place) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                bail!(Creat, "{} was made meanwhile; nothing was changed", self.place.display())
            }
            other => other.ctx(Kind::Rename, || format!("cannot give {} its name", self.place.display()))?,
        }
        self.published = true;
        store::sync_dir(&self.place.folder)
            .ctx(Kind::Write, || format!("cannot sync the folder of {}", self.place.display()))
    }
}

impl Drop for NewImage {
    fn drop(&mut self) {
        if !self.published
            && let Ok(id) = FileId::of(&self.file)
        {
            let _ = store::unlink_file(&self.unfinished, id);
        }
    }
}

/// Removes what a killed receiver has left; one that runs keeps its lock, and its file.
fn remove_left(unfinished: &Place) -> Result<()> {
    let shown = || unfinished.display();
    let left = unfinished.open(OFlag::O_RDONLY | OFlag::O_NONBLOCK);
    let left = File::from(left.ctx(Kind::Creat, || format!("cannot open {}, which is in the way", shown()))?);
    if !left.metadata().is_ok_and(|m| m.is_file()) {
        bail!(Creat, "{} is in the way; remove it", shown());
    }
    if file_lock::exclusive(&left, false).is_err() {
        bail!(Creat, "another process receives {} just now", shown());
    }
    let id = FileId::of(&left).ctx(Kind::Creat, || format!("cannot look at {}", shown()))?;
    store::unlink_file(unfinished, id).ctx(Kind::Creat, || format!("cannot remove {}, an earlier try's", shown()))
}

/// Fills `buf` from the stream.
pub(super) fn read_all(input: BorrowedFd, mut buf: &mut [u8], received: Received) -> Result<()> {
    while !buf.is_empty() {
        if report::cancel::requested() {
            bail!(Sys, "the copy was cancelled after {} bytes", received.bytes);
        }
        match nix::unistd::read(input, buf) {
            Ok(0) => {
                bail!(
                    Read,
                    "the copy stream ended after {} bytes of data, before its end was announced",
                    received.bytes
                )
            }
            Ok(n) => buf = &mut buf[n..],
            Err(nix::errno::Errno::EINTR) => {}
            // The caller's descriptor does not wait.
            Err(nix::errno::Errno::EAGAIN) => wait::wait(input, PollFlags::POLLIN, Instant::now() + LOOK).map(drop)?,
            Err(e) => return Err(Error::with(Kind::Read, "cannot read the copy stream", e)),
        }
    }
    Ok(())
}

fn write_all(fd: BorrowedFd, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        match nix::unistd::write(fd, data) {
            Ok(n) => data = &data[n..],
            Err(nix::errno::Errno::EINTR) => {}
            Err(nix::errno::Errno::EAGAIN) => {
                wait::wait(fd, PollFlags::POLLOUT, Instant::now() + LOOK).map_err(io::Error::other)?;
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

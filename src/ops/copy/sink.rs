//! Where a copy goes: a pipe or socket with a receiver at its other end, a new file, or an open one.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;

use super::output::Output;
use super::receive::{NewImage, is_channel};
use super::wire::{self, Packet};
use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::report;
use crate::sys::{store, wait};

/// Limit for a receiver's sync.
const ANSWER_LIMIT: Duration = Duration::from_secs(600);
/// What a receiver that does not answer gets for its sync.
const SYNC_TIME: Duration = Duration::from_secs(5);
/// Between two looks for a signal.
const LOOK: Duration = Duration::from_millis(200);

/// See the module.
pub struct Sink(To);

enum To {
    Receiver {
        stream: OwnedFd,
        answers: Option<OwnedFd>,
    },
    New(NewImage),
    /// `empty`: it was when the copy began.
    Open {
        file: File,
        empty: bool,
    },
}

impl Sink {
    /// A pipe or socket, with another one for answers or none, or a file. `Param`: anything else.
    pub fn of(output: OwnedFd, answers: Option<OwnedFd>) -> Result<Sink> {
        if let Some(fd) = &answers
            && !is_channel(fd.as_fd())
        {
            bail!(Param, "the descriptor that answers come from is no pipe and no socket");
        }
        if is_channel(output.as_fd()) {
            return Ok(Sink(To::Receiver { stream: output, answers }));
        }
        let file = File::from(output);
        match file.metadata().ok().filter(|m| m.is_file()) {
            Some(meta) => Ok(Sink(To::Open { file, empty: meta.len() == 0 })),
            None => bail!(Param, "the descriptor that the copy goes to is no pipe, no socket and no file"),
        }
    }

    /// A new file; it exists: `Creat`.
    pub fn new_file(file: &Path) -> Result<Sink> {
        Ok(Sink(To::New(NewImage::named(file)?)))
    }
}

impl Output for Sink {
    fn holes(&self) -> Option<u64> {
        match &self.0 {
            To::Open { empty: false, .. } => None,
            _ => Some(1),
        }
    }

    /// Not four bytes: that is the length of a command.
    fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        match &mut self.0 {
            To::Receiver { stream, .. } => {
                let head = wire::head(Packet::Data { offset, len: data.len() as u32 });
                send(stream.as_fd(), &head)?;
                send(stream.as_fd(), data)
            }
            To::New(image) => image.write(data, offset),
            To::Open { file, .. } => store::write_all(file, data, offset).ctx(Kind::Write, || "cannot write the copy"),
        }
    }

    /// `payload` has no meaning; old receivers write it to the begin of the file.
    fn sync(&mut self, payload: &[u8; wire::SYNC as usize]) -> Result<()> {
        match &mut self.0 {
            To::Receiver { stream, answers } => {
                send(stream.as_fd(), &wire::head(Packet::Sync))?;
                send(stream.as_fd(), payload)?;
                match answers {
                    Some(answers) => heard(answers.as_fd()),
                    None => pause(SYNC_TIME),
                }
            }
            To::New(image) => image.sync(),
            To::Open { file, .. } => store::sync_data(file).ctx(Kind::Write, || "cannot sync the copy"),
        }
    }

    fn end(&mut self) -> Result<()> {
        match &mut self.0 {
            To::Receiver { stream, .. } => send(stream.as_fd(), &wire::head(Packet::End)),
            To::New(image) => image.publish(),
            To::Open { file, .. } => store::sync_all(file).ctx(Kind::Write, || "cannot sync the copy"),
        }
    }
}

pub(super) fn send(stream: BorrowedFd, data: &[u8]) -> Result<()> {
    let mut left = data;
    while !left.is_empty() {
        match nix::unistd::write(stream, left) {
            Ok(n) => left = &left[n..],
            Err(Errno::EINTR) => cancelled()?,
            // The caller's descriptor does not wait.
            Err(Errno::EAGAIN) => {
                cancelled()?;
                wait::wait(stream, PollFlags::POLLOUT, Instant::now() + LOOK)?;
            }
            Err(e) => return Err(Error::with(Kind::Write, "cannot send the copy; has the receiver ended?", e)),
        }
    }
    Ok(())
}

fn cancelled() -> Result<()> {
    if report::cancel::requested() {
        bail!(Abort, "the copy was cancelled");
    }
    Ok(())
}

fn pause(time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        cancelled()?;
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// The receiver's answer to a command to sync.
fn heard(answers: BorrowedFd) -> Result<()> {
    let end = Instant::now() + ANSWER_LIMIT;
    let (mut answer, mut have) = ([0; wire::SUCCESS.len()], 0);
    while have < answer.len() {
        cancelled()?;
        let now = Instant::now();
        if now >= end {
            bail!(Protocol, "the receiver has not answered the command to sync for {} s", ANSWER_LIMIT.as_secs());
        }
        if !wait::wait(answers, PollFlags::POLLIN, end.min(now + LOOK))? {
            continue;
        }
        match nix::unistd::read(answers, &mut answer[have..]) {
            Ok(0) => bail!(Protocol, "the receiver has ended without an answer to the command to sync"),
            Ok(n) => have += n,
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(e) => return Err(Error::with(Kind::Protocol, "cannot read the receiver's answer", e)),
        }
    }
    match &answer {
        wire::SUCCESS => Ok(()),
        wire::FAILURE => bail!(Fsync, "the receiver cannot sync what it got"),
        _ => bail!(Protocol, "the receiver answered {:?} to the command to sync", String::from_utf8_lossy(&answer)),
    }
}

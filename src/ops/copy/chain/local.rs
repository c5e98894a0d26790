//! A disk with its snapshots, copied on this machine: both ends in one process.
#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::kept::Kept;
use super::receive::{list_kept, receive};
use super::send::{cause, send};
use crate::error::{Error, IoContext, Kind, Result};
use crate::ops::copy::send::{Sent, Stop};

/// Copies the disk into the new folder `dir`; what an interrupted try has left is used.
pub fn copy_here(descriptor: &Path, dir: &Path, stop: Option<&OsStr>) -> Result<Sent> {
    let mut list = Vec::new();
    list_kept(dir, &mut list)?;
    let kept = Kept::read(&list[..])?;
    drop(list);
    let (ours, theirs) = UnixStream::pair().ctx(Kind::Sys, || "cannot make a socket pair")?;
    std::thread::scope(|scope| {
        let receiver = scope.spawn(move || receive(dir, theirs.as_fd()));
        let stop = Stop { command: stop, copied: [false; 2] };
        // The socket is closed when it has returned.
        let sent = send(descriptor, ours.into(), false, kept, stop);
        let received =
            receiver.join().unwrap_or_else(|_| Err(Error::new(Kind::Sys, "the receiving thread has failed")));
        match (sent, received) {
            (Ok(sent), received) => received.map(|_| sent),
            (Err(e), received) => Err(cause(e, received.err())),
        }
    })
}

//! Holding file systems frozen, in a process of its own: the owner holds the other end of a socket, and its end
//! is the end of the freeze.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::server::frame;
use crate::server::jobs::{Go, JobEvent};
use crate::sys::{freeze, host, process_hardening};

/// No freeze lasts longer, whatever its owner does.
const LEASE: Duration = Duration::from_secs(60);
/// How long the end of another freeze is waited for, and between two tries.
const MOMENT: Duration = Duration::from_secs(3);
const TRY: Duration = Duration::from_millis(5);

/// Freezes the file systems that the files lie on, sends the owner `Frozen`, thaws when the owner sends `Go`, exits, or
/// at the end of the lease, and sends the owner `Done`. `fds`: the owner's socket, then the files.
pub fn hold(fds: Vec<OwnedFd>) -> Result<JobEvent> {
    run(fds, false)
}

/// Like [`hold`], but writes back first what is in memory, and waits for `Go`: then there is little left to be written
/// while they are frozen.
pub fn hold_later(fds: Vec<OwnedFd>) -> Result<JobEvent> {
    run(fds, true)
}

fn run(fds: Vec<OwnedFd>, later: bool) -> Result<JobEvent> {
    let mut fds = fds.into_iter();
    let Some(owner) = fds.next() else { bail!(Protocol, "the socket of the owner of the freeze was not sent") };
    // A signal that ends the owner must not end the process that thaws.
    let _ = process_hardening::ignore_signals();
    let _ = process_hardening::exempt_from_oom_killer();
    let files: Vec<File> = fds.map(File::from).collect();
    if later {
        sync_all(&files)?;
        if frame::recv_within::<Go>(&owner, LEASE)?.is_none() {
            // The owner has exited, or needs no freeze.
            return Ok(JobEvent::Done);
        }
    }
    let mut frozen = Vec::new();
    let event = match freeze_all(&files, &mut frozen) {
        Ok(()) => wait(&owner),
        Err(e) => Err(e),
    };
    let thawed = thaw_all(&frozen);
    let event = match event.and(thawed) {
        Ok(()) => JobEvent::Done,
        Err(e) => JobEvent::Error { code: e.code(), message: e.to_string() },
    };
    // What the owner does next may be an unmount: nothing of the file systems stays open here.
    drop(frozen);
    drop(files);
    // Perhaps there is no owner any more.
    let _ = frame::send(&owner, &event, &[]);
    Ok(JobEvent::Done)
}

/// What is written back before a freeze need not be while the file system's users wait.
fn sync_all(files: &[File]) -> Result<()> {
    files.iter().try_for_each(|file| {
        freeze::sync_file_system(file).ctx(Kind::Fsync, || "cannot sync the file system of the device")
    })
}

/// A file system that is frozen.
struct Frozen<'a> {
    file: &'a File,
    /// By another process, for longer than one waits for it: then that process thaws it.
    by_another: bool,
}

fn freeze_all<'a>(files: &'a [File], frozen: &mut Vec<Frozen<'a>>) -> Result<()> {
    sync_all(files)?;
    for file in files {
        match freeze_or_wait(file) {
            Ok(()) => frozen.push(Frozen { file, by_another: false }),
            Err(e) => match e.raw_os_error() {
                Some(libc::EBUSY) => frozen.push(Frozen { file, by_another: true }),
                Some(libc::EOPNOTSUPP | libc::ENOTTY) => {
                    freeze::sync_file_system(file).ctx(Kind::Fsync, || "cannot sync the file system of the device")?;
                }
                _ => return Err(Error::with(Kind::DevIoc, "cannot freeze the file system of the device", e)),
            },
        }
    }
    Ok(())
}

/// The helper of a balloon freezes for moments: its thaw must not end this freeze.
fn freeze_or_wait(file: &File) -> io::Result<()> {
    let end = host::now() + MOMENT;
    loop {
        match freeze::freeze(file) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && host::now() < end => host::sleep(TRY),
            other => return other,
        }
    }
}

fn wait(owner: &OwnedFd) -> Result<()> {
    frame::send(owner, &JobEvent::Frozen, &[])?;
    match frame::recv_within::<Go>(owner, LEASE) {
        Err(e) if e.errno() == Some(libc::ETIMEDOUT) => {
            bail!(DevIoc, "the file system was frozen for {} s, the longest that is allowed: thawed", LEASE.as_secs())
        }
        _ => Ok(()),
    }
}

/// Thaws what this process has frozen. An error: one of them was not frozen until now.
fn thaw_all(frozen: &[Frozen]) -> Result<()> {
    let ended = |Frozen { file, by_another }: &Frozen| {
        let thawed_early = match by_another {
            false => match freeze::thaw(file) {
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => true,
                other => {
                    other.ctx(Kind::DevIoc, || "cannot thaw the file system of the device")?;
                    false
                }
            },
            // It can be frozen only if it is not frozen any more.
            true => freeze::freeze(file).is_ok_and(|()| freeze::thaw(file).is_ok()),
        };
        if thawed_early {
            bail!(DevIoc, "another process thawed the file system of the device before its time")
        }
        Ok(())
    };
    // All are thawed, whatever one says.
    frozen.iter().map(ended).fold(Ok(()), Result::and)
}

/// For an owner whose freezing process has exited.
pub fn thaw_directly(files: &[File]) -> Result<()> {
    thaw_all(&files.iter().map(|file| Frozen { file, by_another: false }).collect::<Vec<_>>())
}

/// Sends the message that begins a freeze that was prepared, or ends one.
pub fn go(owner: BorrowedFd) -> Result<()> {
    frame::send(owner, &Go, &[])
}

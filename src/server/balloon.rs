//! Discards what a balloon file lies on, in a process of its own, while the file system is frozen.
//!
//! Root inside can delete the file at any time, and other files get its blocks. So a block is discarded only between a
//! freeze and a thaw by the same process, and only if the file has it then, unwritten: a frozen file system gives no
//! block to another file, and writes nothing to the device. [`partition::discard`] returns when the device has done the
//! discard, so that none is under way when the file system is thawed. The process does not depend on its initiator: one
//! that is killed closes the socket, and the process ends after the thaw.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::balloon_piece::Piece;
use crate::server::frame;
use crate::server::jobs::JobEvent;
use crate::server::transport::{Binding, Transport};
use crate::sys::reopen::{Access, reopen};
use crate::sys::{fiemap, freeze, host, partition, process_hardening};

/// An initiator that sends nothing for so long is gone.
const SILENCE: Duration = Duration::from_secs(600);
/// How long a file system that another process has frozen is waited for, and between two tries.
const FROZEN: Duration = Duration::from_secs(20);
const TRY: Duration = Duration::from_millis(20);

/// The answer to a piece.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PieceDone {
    /// The helper is there, and takes pieces.
    Ready,
    /// So many bytes of the disk were discarded.
    Discarded(u64),
    Error {
        code: i32,
        message: String,
    },
}

/// Serves the initiator, whose socket is the first of `fds`, until it closes it.
pub fn serve(binding: &Binding, fds: Vec<OwnedFd>) -> Result<JobEvent> {
    let Some(owner) = fds.into_iter().next() else { bail!(Protocol, "the socket of the initiator was not sent") };
    // A signal that ends the initiator must not end the process that thaws.
    let _ = process_hardening::ignore_signals();
    let _ = process_hardening::exempt_from_oom_killer();
    let answer = |done: &PieceDone| frame::send(&owner, done, &[]);
    let failed = |e: &Error| PieceDone::Error { code: e.code(), message: e.to_string() };
    let disk = match open(binding) {
        Ok(disk) => disk,
        Err(e) => {
            answer(&failed(&e))?;
            return Ok(JobEvent::Done);
        }
    };
    answer(&PieceDone::Ready)?;
    let mut balloon: Option<File> = None;
    while let Some((piece, fds)) = frame::recv_within::<Piece>(&owner, SILENCE)? {
        if let Some(fd) = fds.into_iter().next() {
            balloon = Some(File::from(fd));
        }
        let Some(file) = &balloon else { bail!(Protocol, "the balloon file was not sent") };
        answer(&match discard_frozen(&disk, file, &piece) {
            Ok(bytes) => PieceDone::Discarded(bytes),
            Err(e) => failed(&e),
        })?;
    }
    // The initiator waits for the end of its socket: after it nothing of the file system is open here.
    drop(balloon);
    Ok(JobEvent::Done)
}

fn open(binding: &Binding) -> Result<File> {
    let shown = || format!("cannot open {}", binding.backing);
    let looked = Transport::of(&binding.backing).binding().open(binding, 0).ctx(Kind::Open, shown)?;
    Ok(reopen(looked, Access { write: true, direct: false }).ctx(Kind::Open, shown)?.0)
}

/// Freezes, discards, thaws.
fn discard_frozen(disk: &File, balloon: &File, piece: &Piece) -> Result<u64> {
    // What is written back before need not be while the users of the file system wait.
    freeze::sync_file_system(balloon).ctx(Kind::Fsync, || "cannot sync the file system of the balloon")?;
    let end = host::now() + FROZEN;
    loop {
        match freeze::freeze(balloon) {
            Ok(()) => break,
            // Another process holds it frozen, and may thaw it at any time.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && host::now() < end => host::sleep(TRY),
            Err(e) => return Err(Error::with(Kind::DevIoc, "cannot freeze the file system of the balloon", e)),
        }
    }
    let discarded = discard_owned(disk, balloon, piece);
    let thawed = freeze::thaw(balloon);
    let discarded = discarded?;
    thawed.ctx(Kind::DevIoc, || "cannot thaw the file system of the balloon")?;
    Ok(discarded)
}

fn discard_owned(disk: &File, balloon: &File, piece: &Piece) -> Result<u64> {
    let owned = unwritten(balloon, piece).ctx(Kind::DevIoc, || "cannot map the blocks of the balloon")?;
    let mut done = 0;
    for (start, length) in common(&owned, &piece.ranges, piece.cluster) {
        partition::discard(disk.as_fd(), start, length)
            .ctx(Kind::DevIoc, || format!("cannot discard {length} bytes at {start} of the disk"))?;
        done += length;
    }
    Ok(done)
}

/// Where the unwritten extents of a part of the file lie on the disk: start and end in bytes, ascending, neighbours put
/// together. The part may begin or end within an extent, which counts as a whole then.
fn unwritten(balloon: &File, piece: &Piece) -> io::Result<Vec<(u64, u64)>> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    fiemap::each_placed(balloon, piece.start, piece.end, &mut |placed| {
        if let (true, Some(at)) = (placed.extent.unwritten, placed.at) {
            let start = at.saturating_add(piece.partition);
            found.push((start, start.saturating_add(placed.extent.len)));
        }
        Ok(())
    })?;
    found.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::with_capacity(found.len());
    for (start, end) in found {
        match joined.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => joined.push((start, end)),
        }
    }
    Ok(joined)
}

/// The whole clusters that lie both in `owned` (start, end; ascending) and in `ranges` (start, length).
fn common(owned: &[(u64, u64)], ranges: &[(u64, u64)], cluster: u64) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    for &(start, length) in ranges {
        let end = start.saturating_add(length);
        let first = owned.partition_point(|o| o.1 <= start);
        for &(from, to) in owned.iter().skip(first).take_while(|o| o.0 < end) {
            let Some(low) = from.max(start).checked_next_multiple_of(cluster.max(1)) else { continue };
            let high = to.min(end) / cluster.max(1) * cluster.max(1);
            if low < high {
                found.push((low, high - low));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_clusters_that_the_file_has_are_discarded() {
        let owned = [(5, 45), (50, 60), (65, 100)];
        let all = [(0, 1000)];
        assert_eq!(common(&owned, &all, 10), [(10, 30), (50, 10), (70, 30)]);
        assert_eq!(common(&owned, &[(20, 10), (50, 30)], 10), [(20, 10), (50, 10), (70, 10)]);
        assert_eq!(common(&owned, &[(0, 10), (100, 50)], 10), []);
        assert_eq!(common(&[], &all, 10), []);
        assert_eq!(common(&[(1, 9)], &all, 10), []);
        assert_eq!(common(&[(0, u64::MAX)], &[(u64::MAX - 3, 10)], 10), []);
    }
}

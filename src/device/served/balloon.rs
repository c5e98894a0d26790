//! Sets the maintenance state, and talks to the helper process that discards what a balloon file lies on.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use crate::bail;
use crate::device::driver::BalloonDiscard;
use crate::device::model::Device;
use crate::device::served::freeze::end_helper;
use crate::device::served::{clean, record};
use crate::device::state::State;
use crate::error::Result;
use crate::format::balloon_piece::Piece;
use crate::format::maintenance::Maintenance;
use crate::server::balloon::PieceDone;
use crate::server::helper::remote_error;
use crate::server::maintenance::MaintenanceChange;
use crate::server::proto::Command;
use crate::server::{control, frame, runtime};
use crate::sys::freeze;

/// Limit for the start of the helper.
const START: Duration = Duration::from_secs(30);
/// Limit for a piece: the file system writes back what it has in memory, and its device may wait for space.
const PIECE: Duration = Duration::from_secs(24 * 60 * 60);

/// See [`Driver::set_maintenance`](crate::device::driver::Driver::set_maintenance).
pub(super) fn set_maintenance(device: &Device, from: &[Maintenance], to: Maintenance) -> Result<()> {
    if device.state == State::Dead {
        bail!(Device, "{} has lost its server, and its maintenance state with it", device.node().display());
    }
    let command = Command::Maintenance(MaintenanceChange::new(from, to));
    refuse_unsupported(device, &command)?;
    clean::tell(device.name(), &command)
}

/// An older server does not know the commands of this file.
fn refuse_unsupported(device: &Device, command: &Command) -> Result<()> {
    match record(device).refuse(command) {
        Some(e) => Err(e.context(format_args!("ploop reload {} gives it a newer server", device.node().display()))),
        None => Ok(()),
    }
}

/// A connection to the helper. When this process exits, the helper finishes its piece, thaws and exits.
pub(super) struct Discarder {
    helper: OwnedFd,
    name: String,
    balloon: File,
    /// The helper has the file.
    sent: bool,
}

impl Discarder {
    pub fn new(device: &Device, balloon: File) -> Result<Discarder> {
        let command = Command::DiscardBalloon;
        refuse_unsupported(device, &command)?;
        let (helper, theirs) = frame::pair()?;
        let dir = runtime::device_dir(device.name());
        control::ask_with(&dir, &command, &[theirs.as_fd()], START)?.0.into_result()?;
        drop(theirs);
        let discarder = Discarder { helper, name: device.name().to_owned(), balloon, sent: false };
        match discarder.hear(START)? {
            PieceDone::Ready => Ok(discarder),
            other => bail!(Protocol, "the helper process of {} sent {other:?} first", discarder.name),
        }
    }

    fn hear(&self, limit: Duration) -> Result<PieceDone> {
        match frame::recv_within::<PieceDone>(&self.helper, limit)? {
            Some((PieceDone::Error { code, message }, _)) => Err(remote_error(code, message)),
            Some((done, _)) => Ok(done),
            None => {
                // Killed: what it may have frozen is thawed by this process.
                let _ = freeze::thaw(&self.balloon);
                bail!(Sys, "the helper process that gives back the balloon of {} exited", self.name)
            }
        }
    }
}

impl Drop for Discarder {
    fn drop(&mut self) {
        end_helper(&self.helper);
    }
}

impl BalloonDiscard for Discarder {
    fn discard(&mut self, piece: &Piece) -> Result<u64> {
        // Sent past the supervisor, which must hold no file of its own device's file system.
        let file = [self.balloon.as_fd()];
        let fds: &[_] = if self.sent { &[] } else { &file };
        frame::send(&self.helper, piece, fds)?;
        self.sent = true;
        match self.hear(PIECE)? {
            PieceDone::Discarded(bytes) => Ok(bytes),
            other => bail!(Protocol, "the helper process of {} sent {other:?}", self.name),
        }
    }
}

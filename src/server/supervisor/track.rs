//! Tracking what is written to the top, for a client that copies it. The worker tracks; the supervisor has each next worker
//! go on, and ends it when the client closes its connection. Meanwhile the chain stays as it is, and no cluster of the top
//! is moved.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::error::{Error, Kind};
use crate::server::proto::{Answer, ToWorker};
use crate::server::supervisor::Supervisor;
use crate::server::supervisor::chain_state::ChangeRequest;
use crate::server::supervisor::merge::not_merged;
use crate::server::track::{TakeWritten, TrackOrder, TrackReport};
use crate::server::{control, frame};
use crate::sys::host;

/// The client that copies the top.
pub struct Tracking {
    client: OwnedFd,
    /// What the worker has not answered; its successor gets it anew.
    unanswered: Option<TrackOrder>,
}

impl Tracking {
    pub fn connection(&self) -> BorrowedFd<'_> {
        self.client.as_fd()
    }
}

impl Supervisor {
    /// A client wants to copy the top. No change of the chain is under way.
    pub(super) fn begin_tracking(&mut self, client: Option<OwnedFd>) {
        let Some(client) = client else { return };
        let name = &self.record.name;
        let work = match () {
            () if self.tracking.is_some() => "its top is being copied already",
            () if self.chain.merge().is_some() => "levels of it are being merged",
            () if self.giving_back.is_some() => "its top is being compacted",
            () => "",
        };
        if !work.is_empty() {
            let e = Error::new(Kind::Busy, format!("{name}: {work}; wait for the end of that"));
            return control::answer(&client, &control::refusal(&e));
        }
        let order = TrackOrder::Begin { takeover: false };
        self.tracking = Some(Tracking { client, unanswered: Some(order) });
        self.slot.send(&ToWorker::Track(order));
    }

    /// The client asks what was written, or has gone.
    pub(super) fn on_tracker(&mut self) {
        let Some(tracking) = &mut self.tracking else { return };
        match frame::recv_within::<TakeWritten>(&tracking.client, Duration::ZERO) {
            Ok(Some((take, _))) if tracking.unanswered.is_none() => {
                let order = TrackOrder::Take(take);
                tracking.unanswered = Some(order);
                self.slot.send(&ToWorker::Track(order));
            }
            Err(e) if e.errno() == Some(libc::ETIMEDOUT) => {}
            _ => {
                self.tracking = None;
                self.slot.send(&ToWorker::Track(TrackOrder::End));
            }
        }
    }

    /// A worker serves that has not tracked what the workers before it have written.
    pub(super) fn repeat_tracking(&self) {
        let Some(tracking) = &self.tracking else { return };
        self.slot.send(&ToWorker::Track(TrackOrder::Begin { takeover: true }));
        if let Some(order @ TrackOrder::Take(_)) = tracking.unanswered {
            self.slot.send(&ToWorker::Track(order));
        }
    }

    pub(super) fn on_tracked(&mut self, report: TrackReport) {
        let Some(tracking) = &mut self.tracking else { return };
        let begins = matches!(tracking.unanswered, Some(TrackOrder::Begin { .. }));
        let failed = report.error.is_some();
        // The worker of a takeover has begun: that answers no question of the client.
        if tracking.unanswered.is_some() && begins == report.begun || failed {
            tracking.unanswered = None;
            control::answer(&tracking.client, &Answer::Tracked(report));
        }
        if failed {
            self.tracking = None;
        }
    }

    /// No worker can serve the device.
    pub(super) fn refuse_tracking(&mut self, answer: &Answer) {
        if let Some(tracking) = self.tracking.take() {
            control::answer(&tracking.client, answer);
        }
    }

    /// What keeps clusters of the top in their places.
    pub(super) fn copied(&self) -> Option<Error> {
        let tracking = self.tracking.as_ref()?;
        let by = host::peer(&tracking.client)
            .ok()
            .filter(|pid| *pid > 0)
            .map_or(String::new(), |pid| format!(" by process {pid}"));
        let text =
            format!("{}: its top is being copied{by} (ploop copy -s); wait for its end, or end it", self.record.name);
        Some(Error::new(Kind::Busy, text))
    }

    /// The answer to a client whose change has to wait for the end of a copy.
    pub(super) fn refuse_while_copied(&self, request: &ChangeRequest) -> Option<Answer> {
        let e = self.copied()?;
        match request {
            ChangeRequest::MergeTop(..) | ChangeRequest::MergeFrozen(..) => Some(not_merged(&e, true)),
            ChangeRequest::Switch(..) | ChangeRequest::Grow(..) | ChangeRequest::Reload { .. } => {
                Some(control::refusal(&e))
            }
            ChangeRequest::Track | ChangeRequest::MergeComplete | ChangeRequest::EndMerge(_) => None,
        }
    }
}

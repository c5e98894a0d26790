//! Merging frozen levels of the running chain into the lowest of them, by a process of its own.
//!
//! The worker goes on reading the sources, never what is written, and lets go of its lock on the target meanwhile. The
//! end is a change of the chain like any other. If the supervisor exits, so does the process at its next message, and
//! the client retries; if no client does, the lock is taken back after a while and the next merge finishes it.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::socket::{Shutdown, shutdown};

use crate::bail;
use crate::error::{Error, Kind, Result};
use crate::server::control;
use crate::server::helper::{Helper, Job, JobEvent, remote_error};
use crate::server::merge_job::MergeJob;
use crate::server::proto::{Answer, MergeOrder, ToWorker};
use crate::server::supervisor::{Supervisor, log};

/// A process that merges and is killed is replaced so often.
const TRIES: usize = 3;
/// Time for a client to retry after the supervisor exited in a merge.
const RECLAIM: Duration = Duration::from_secs(20);
/// A worker's answer about its locks.
const RELEASE: Duration = Duration::from_secs(60);
/// A merge that is to end does so at its next safe point.
const SAFE_POINT: Duration = Duration::from_secs(30);

/// Where a merge of frozen levels stands.
#[derive(Debug, Default)]
pub struct FrozenMerge {
    /// Bytes of all; none: there is none.
    pub progress: Option<(u64, u64)>,
    /// A client has cancelled it.
    pub cancel: bool,
    /// When the lock of a merge that no client has requested from this supervisor is taken back.
    reclaim_at: Option<Instant>,
}

/// Why a merge did not happen.
struct NotMerged {
    error: Error,
    untouched: bool,
}

impl From<Error> for NotMerged {
    fn from(error: Error) -> NotMerged {
        NotMerged { error, untouched: true }
    }
}

impl Supervisor {
    /// Merges and answers the client.
    pub(super) fn merge_frozen(&mut self, order: &MergeOrder, fds: Vec<OwnedFd>, client: Option<OwnedFd>) {
        self.frozen_merge = FrozenMerge::default();
        let result = match order.switch.token != 0 && order.switch.token == self.start.token {
            // A client that got no answer retries.
            true => Ok(None),
            false => {
                self.frozen_merge.progress = Some((0, 0));
                let result = self.try_merge(order, fds);
                self.frozen_merge.progress = None;
                result
            }
        };
        let answers = match result {
            Ok(warning) => vec![Answer::Switched { warning }, Answer::Done],
            Err(NotMerged { error, untouched }) => {
                vec![Answer::NotMerged { code: error.code(), message: error.to_string(), untouched }]
            }
        };
        for answer in answers {
            client.iter().for_each(|c| control::answer(c, &answer));
        }
    }

    /// Fails if the merge is to end before its time.
    fn check_wanted(&self) -> Result<()> {
        self.check_alive()?;
        if self.frozen_merge.cancel {
            bail!(Abort, "the merge of {} was cancelled", self.record.name);
        }
        if !self.stopping.is_empty() || self.lost {
            bail!(Abort, "the merge was ended, since {} is being detached", self.record.name);
        }
        Ok(())
    }

    fn check_order(&self, order: &MergeOrder, fds: &[OwnedFd]) -> Result<()> {
        let levels = self.start.attach.levels.len();
        let frozen = if self.start.attach.read_only { levels } else { levels - 1 };
        if order.low >= order.high || order.high >= frozen {
            bail!(Param, "levels {} to {} are to be merged, there are {frozen} frozen ones", order.low, order.high);
        }
        if self.start.merge.is_some() {
            bail!(Busy, "{}: its top is being merged; wait for the end of that, or cancel it", self.record.name);
        }
        // What cannot be changed in the end is not begun.
        self.plan(&order.switch, fds, None).map(drop)
    }

    fn try_merge(&mut self, order: &MergeOrder, fds: Vec<OwnedFd>) -> Result<Option<String>, NotMerged> {
        self.wait_while(|s| s.start.finish.is_some(), None)?;
        self.check_order(order, &fds)?;
        let copied = self.release_level(Some(order.low)).map_err(NotMerged::from).and_then(|()| self.copy_down(order));
        let result = copied.and_then(|()| {
            self.try_change(&order.switch, fds, None).map_err(|error| NotMerged { error, untouched: false })
        });
        if result.is_err() {
            self.take_back();
        }
        result
    }

    fn take_back(&mut self) {
        if self.start.released_level.is_some()
            && let Err(e) = self.release_level(None)
        {
            log(&self.record.name, &e.to_string());
        }
    }

    fn release_level(&mut self, level: Option<usize>) -> Result<()> {
        self.start.released_level = level;
        self.wait_while(|s| s.worker.as_ref().is_none_or(|w| w.ready.is_none()), None)?;
        let Some(worker) = &mut self.worker else { return Ok(()) };
        let id = worker.id;
        worker.released = None;
        self.send_to_worker(&ToWorker::ReleaseLevel(level));
        // Another worker knows it from its start.
        let waits = |s: &Supervisor| s.worker.as_ref().is_some_and(|w| w.id == id && w.released.is_none());
        self.wait_while(waits, Some(Instant::now() + RELEASE))?;
        match self.worker.as_ref().and_then(|w| w.released.clone()).flatten() {
            None => Ok(()),
            Some((code, message)) => Err(remote_error(code, message)),
        }
    }

    /// Has the levels copied.
    fn copy_down(&mut self, order: &MergeOrder) -> Result<(), NotMerged> {
        let mut touched = false;
        let mut exits = 0;
        loop {
            let helper = self.start_merger(order)?;
            match self.follow_merger(&helper) {
                Ok(JobEvent::Done) => {
                    self.release_helper(helper, false);
                    return Ok(());
                }
                Ok(JobEvent::NotMerged { code, message, untouched }) => {
                    self.release_helper(helper, false);
                    return Err(NotMerged { error: remote_error(code, message), untouched: untouched && !touched });
                }
                // The helper exited.
                Ok(_) => {
                    self.release_helper(helper, true);
                    touched = true;
                    exits += 1;
                    if exits >= TRIES {
                        let error =
                            Error::new(Kind::Sys, format!("the helper process of the merge exited {TRIES} times"));
                        return Err(NotMerged { error, untouched: false });
                    }
                }
                Err(error) => return Err(NotMerged { error, untouched: self.end_merger(helper) && !touched }),
            }
        }
    }

    fn start_merger(&self, order: &MergeOrder) -> Result<Helper> {
        let Some(fds) = &self.fds else { bail!(Device, "{} is given up", self.record.name) };
        let levels = self.start.attach.levels[..=order.high].to_vec();
        let sent: Vec<_> = fds.levels[..=order.high].iter().map(AsFd::as_fd).collect();
        Helper::start_with(&fds.program(), &Job::Merge(MergeJob { levels, low: order.low }), &sent)
    }

    /// The helper's last event; an error: the merge is not wanted any more.
    fn follow_merger(&mut self, helper: &Helper) -> Result<JobEvent> {
        loop {
            self.check_wanted()?;
            match self.helper_event(helper, Instant::now() + Duration::from_millis(500)) {
                Some(JobEvent::Progress { done, total }) => self.frozen_merge.progress = Some((done, total)),
                Some(event) => return Ok(event),
                None => {}
            }
        }
    }

    /// Ends it at the next safe point; whether the target is untouched.
    fn end_merger(&mut self, mut helper: Helper) -> bool {
        // The helper notices when it sends its next event.
        let _ = shutdown(helper.sock.as_raw_fd(), Shutdown::Read);
        let end = Instant::now() + SAFE_POINT;
        while Instant::now() < end && matches!(helper.child.try_wait(), Ok(None)) && self.aborting.is_empty() {
            self.poll_once(Instant::now() + Duration::from_millis(20), None);
        }
        self.release_helper(helper, true);
        false
    }

    /// A new supervisor finds a merge that no client requests any more: its lock is taken back, so that other programs
    /// can use the image.
    pub(super) fn reclaim_released_level(&mut self) {
        if self.start.released_level.is_none() {
            self.frozen_merge.reclaim_at = None;
            return;
        }
        let now = Instant::now();
        if *self.frozen_merge.reclaim_at.get_or_insert(now + RECLAIM) <= now {
            self.frozen_merge.reclaim_at = None;
            log(&self.record.name, "a merge was interrupted; the next one finishes it");
            self.take_back();
        }
    }
}

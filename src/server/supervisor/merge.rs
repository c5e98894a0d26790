//! Merging levels of a running device: its top into the level below it, or frozen levels into the lowest of them.
//!
//! 1. The worker is replaced by one that opens the lowest level for writing, marks it in use and merges
//!    (`engine::background`): the chain stays what it was, and the successor of a worker that exits goes on merging.
//! 2. When it reports that the target has everything, durably, the chain is changed to the one without the other levels
//!    ([`chain_switch`](super::chain_switch)): the retiring worker makes durable in the target what came last.
//!
//! What is to follow travels in [`WorkerStart::merge`](crate::server::proto::WorkerStart), so that it survives a supervisor,
//! and the client need not wait.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::server::control;
use crate::server::proto::{Answer, ChainSwitch, SwitchLevel};
use crate::server::supervisor::chain_plan::MergeTransition;
use crate::server::supervisor::chain_switch::{ChangeRequest, PendingChange};
use crate::server::supervisor::{Supervisor, log};
use crate::sys::host;

/// Between attempts to end a merge.
const LATER: Duration = Duration::from_secs(5);

impl Supervisor {
    /// A client wants levels merged; `range`: target and highest level, none: the top into the level below it.
    pub(super) fn begin_merge(
        &mut self,
        switch: ChainSwitch,
        range: Option<(usize, usize)>,
        fds: Vec<OwnedFd>,
        client: Option<OwnedFd>,
    ) {
        let token = self.start.merge.as_ref().map(|m| m.token);
        if token == Some(switch.token) && switch.token != 0 {
            // A client that got no answer retries.
            self.merging.extend(client);
            return;
        }
        if switch.token != 0 && switch.token == self.start.token {
            let switched = Answer::Switched { warning: None };
            client.iter().for_each(|c| control::answer(c, &switched));
            client.iter().for_each(|c| control::answer(c, &Answer::Done));
            return;
        }
        match self.try_begin(switch, range, fds) {
            Ok(()) => self.merging.extend(client),
            // No worker has served it.
            Err(e) => client.iter().for_each(|c| control::answer(c, &not_merged(&e, true))),
        }
    }

    fn try_begin(&mut self, switch: ChainSwitch, range: Option<(usize, usize)>, fds: Vec<OwnedFd>) -> Result<()> {
        self.wait_while(|s| s.start.finish.is_some(), None)?;
        let name = &self.record.name;
        if self.start.merge.is_some() {
            bail!(Busy, "{name}: levels of it are being merged already; wait for the end of that, or cancel it");
        }
        let levels = self.start.attach.levels.len();
        let read_only = self.start.attach.read_only;
        let (low, high) = match range {
            Some((low, high)) => {
                let frozen = if read_only { levels } else { levels.saturating_sub(1) };
                if low >= high || high >= frozen {
                    bail!(Param, "{name}: levels {low} to {high} are to be merged, there are {frozen} frozen ones");
                }
                (low, high)
            }
            None if levels < 2 || read_only => {
                bail!(Param, "{name}: its chain of {levels} images has no top that can be merged")
            }
            None => (levels - 2, levels - 1),
        };
        // The target keeps its place, the levels above it up to `high` go.
        let kept: Vec<Option<usize>> = (0..=low).chain(high + 1..levels).map(Some).collect();
        if switch.levels.iter().map(|l| l.from).ne(kept) {
            bail!(
                Param,
                "{name}: the chain to follow is not that of {levels} images without levels {} to {high}",
                low + 1
            );
        }
        // What will follow is checked before anything is written.
        self.plan(&switch, &fds, None)?;
        let begin = self.same_levels(switch.token ^ 2);
        self.merge_transition = Some(MergeTransition::Begin { then: switch, fds, range });
        let result = self.try_change(&begin, Vec::new(), None);
        self.merge_transition = None;
        result?;
        // It may have been quick.
        self.on_merge_outcome();
        Ok(())
    }

    /// The chain that is there, as a change.
    pub(super) fn same_levels(&self, token: u64) -> ChainSwitch {
        let attach = &self.start.attach;
        let levels = attach.levels.iter().zip(&attach.ids).enumerate();
        let levels = levels.map(|(i, (name, id))| SwitchLevel { name: name.clone(), id: *id, from: Some(i) }).collect();
        ChainSwitch { levels, expected: attach.ids.clone(), commit: None, token, ask: false, linger: 0 }
    }

    /// The worker reports the outcome of its merge.
    pub(super) fn on_merge_outcome(&mut self) {
        let told = self.worker.as_ref().and_then(|w| w.merged.clone());
        let (Some(_), Some(told), false) = (&self.start.merge, told, self.ending) else { return };
        let request = match told {
            None => ChangeRequest::MergeComplete,
            Some(error) => ChangeRequest::EndMerge(error.into()),
        };
        self.changes.push_back(PendingChange { request, fds: Vec::new(), client: None });
    }

    /// The target has everything: the chain without the merged levels follows.
    pub(super) fn finish_merge(&mut self) {
        // Another worker may have started the merge anew meanwhile.
        let complete = self.worker.as_ref().is_some_and(|w| w.merged == Some(None));
        let Some(switch) = self.start.merge.clone().filter(|_| complete) else { return };
        let fds = self.fds.iter().flat_map(|f| &f.merge).map(OwnedFd::try_clone).collect::<std::io::Result<Vec<_>>>();
        let result =
            fds.ctx(Kind::Sys, || "cannot duplicate a descriptor").and_then(|fds| self.try_change(&switch, fds, None));
        match result {
            Ok(warning) => {
                for client in self.merging.drain(..) {
                    control::answer(&client, &Answer::Switched { warning: warning.clone() });
                    control::answer(&client, &Answer::Done);
                }
            }
            // The worker exited, and its successor merges.
            Err(e) if e.kind() == Kind::Abort && self.failed.is_none() && self.aborting.is_empty() => {}
            Err(e) => self.end_merge(e),
        }
    }

    /// The merge is given up: the chain stays, the target is a lower delta like any other.
    pub(super) fn end_merge(&mut self, why: Error) {
        if self.start.merge.is_some() && self.failed.is_none() && self.aborting.is_empty() {
            let token = self.start.merge.as_ref().map_or(1, |m| m.token ^ 4);
            let same = self.same_levels(token);
            self.merge_transition = Some(MergeTransition::End);
            let result = self.try_change(&same, Vec::new(), None);
            self.merge_transition = None;
            if let Err(e) = result {
                // Writes that wait for space, for one. The lock on the disk is held until then.
                log(&self.record.name, &format!("a merge that has ended still has its image open, later again: {e}"));
                self.end_merge_due = Some(host::now() + LATER);
            }
        }
        log(&self.record.name, &format!("its levels are not merged: {why}"));
        self.refuse_merging(&why);
    }

    /// Answers the clients that wait for a merge which has ended before its time.
    pub(super) fn refuse_merging(&mut self, why: &Error) {
        self.merging.drain(..).for_each(|c| control::answer(&c, &not_merged(why, false)));
    }

    /// A merge that could not be ended is ended now, perhaps.
    pub(super) fn retry_end_merge(&mut self) {
        if self.end_merge_due.take_if(|at| *at <= host::now()).is_some() && self.start.merge.is_some() {
            let why = Error::new(Kind::Abort, "it had ended before its time");
            self.changes.push_back(PendingChange {
                request: ChangeRequest::EndMerge(why),
                fds: Vec::new(),
                client: None,
            });
        }
    }

    pub(super) fn cancel_merge(&mut self, client: OwnedFd) {
        if self.start.merge.is_some() {
            let why = Error::new(Kind::Abort, format!("the merge of {} was cancelled", self.record.name));
            self.changes.push_back(PendingChange {
                request: ChangeRequest::EndMerge(why),
                fds: Vec::new(),
                client: Some(client),
            });
        } else {
            control::answer(&client, &Answer::Done);
        }
    }
}

fn not_merged(why: &Error, untouched: bool) -> Answer {
    Answer::NotMerged { code: why.code(), message: why.to_string(), untouched }
}

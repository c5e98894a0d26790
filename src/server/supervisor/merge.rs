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

use crate::bail;
use crate::error::{Error, Kind, Result};
use crate::server::control;
use crate::server::descriptors::SwitchFds;
use crate::server::proto::{Answer, ChainSwitch};
use crate::server::roles::duplicate_commit;
use crate::server::supervisor::chain_plan::MergeTransition;
use crate::server::supervisor::chain_state::ChangeRequest;
use crate::server::supervisor::clients::Awaited;
use crate::server::supervisor::{Supervisor, log};

impl Supervisor {
    /// A client wants levels merged; `range`: target and highest level, none: the top into the level below it.
    pub(super) fn begin_merge(
        &mut self,
        switch: ChainSwitch,
        range: Option<(usize, usize)>,
        fds: SwitchFds,
        client: Option<OwnedFd>,
    ) {
        let under_way = self.chain.merge().map(|m| m.token);
        if under_way == Some(switch.token) && switch.token != 0 {
            // A client that got no answer retries.
            self.clients.wait(Awaited::Merge, client);
            return;
        }
        if self.chain.is_made(&switch) {
            for answer in [Answer::Switched { warning: None }, Answer::Done] {
                client.iter().for_each(|c| control::answer(c, &answer));
            }
            return;
        }
        match self.try_begin(switch, range, fds) {
            Ok(()) => self.clients.wait(Awaited::Merge, client),
            // No worker has served it.
            Err(e) => client.iter().for_each(|c| control::answer(c, &not_merged(&e, true))),
        }
    }

    fn try_begin(&mut self, switch: ChainSwitch, range: Option<(usize, usize)>, fds: SwitchFds) -> Result<()> {
        self.wait_while(|s| s.chain.is_finishing(), None)?;
        let name = &self.record.name;
        if self.chain.merge().is_some() {
            bail!(Busy, "{name}: levels of it are being merged already; wait for the end of that, or cancel it");
        }
        let levels = self.chain.attach().levels.len();
        let read_only = self.chain.attach().read_only;
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
        let begin = self.chain.same_levels(switch.token ^ 2);
        self.chain.set_transition(Some(MergeTransition::Begin { then: switch, commit: fds.commit, range }));
        let result = self.try_change(&begin, SwitchFds::default(), None);
        self.chain.set_transition(None);
        result?;
        // It may have been quick.
        self.on_merge_outcome();
        Ok(())
    }

    /// The worker reports the outcome of its merge.
    pub(super) fn on_merge_outcome(&mut self) {
        let outcome = self.slot.worker().and_then(|w| w.merged.clone());
        let (Some(_), Some(outcome), false) = (self.chain.merge(), outcome, self.slot.is_ending()) else { return };
        let request = match outcome {
            None => ChangeRequest::MergeComplete,
            Some(error) => ChangeRequest::EndMerge(error.into()),
        };
        self.chain.request(request, None);
    }

    /// The target has everything: the chain without the merged levels follows.
    pub(super) fn finish_merge(&mut self) {
        // Another worker may have started the merge anew meanwhile.
        let complete = self.slot.worker().is_some_and(|w| w.merged == Some(None));
        let Some(switch) = self.chain.merge().cloned().filter(|_| complete) else { return };
        let commit = duplicate_commit(self.fds.as_ref().and_then(|f| f.merge.as_ref()));
        let fds = commit.map(|commit| SwitchFds { new: Vec::new(), commit });
        match fds.and_then(|fds| self.try_change(&switch, fds, None)) {
            Ok(warning) => self.clients.answer_with(Awaited::Merge, &[Answer::Switched { warning }, Answer::Done]),
            // The worker exited, and its successor merges.
            Err(e) if e.kind() == Kind::Abort && self.failed.is_none() && !self.is_aborted() => {}
            Err(e) => self.end_merge(e),
        }
    }

    /// The merge is given up: the chain stays, the target is a lower delta like any other.
    pub(super) fn end_merge(&mut self, why: Error) {
        let under_way = self.chain.merge().map(|m| m.token);
        if let (Some(token), None, false) = (under_way, &self.failed, self.is_aborted()) {
            let same = self.chain.same_levels(token ^ 4);
            self.chain.set_transition(Some(MergeTransition::End));
            let result = self.try_change(&same, SwitchFds::default(), None);
            self.chain.set_transition(None);
            if let Err(e) = result {
                // Writes that wait for space, for one. The lock on the disk is held until then.
                log(&self.record.name, &format!("a merge that has ended still has its image open, later again: {e}"));
                self.chain.end_merge_later();
            }
        }
        log(&self.record.name, &format!("its levels are not merged: {why}"));
        self.refuse_merging(&why);
    }

    /// Answers the clients that wait for a merge which has ended before its time.
    pub(super) fn refuse_merging(&mut self, why: &Error) {
        self.clients.answer(Awaited::Merge, &not_merged(why, false));
    }

    pub(super) fn cancel_merge(&mut self, client: OwnedFd) {
        if self.chain.merge().is_none() {
            return control::answer(&client, &Answer::Done);
        }
        let why = Error::new(Kind::Abort, format!("the merge of {} was cancelled", self.record.name));
        self.chain.request(ChangeRequest::EndMerge(why), Some(client));
    }
}

pub(super) fn not_merged(why: &Error, untouched: bool) -> Answer {
    Answer::NotMerged { code: why.code(), message: why.to_string(), untouched }
}

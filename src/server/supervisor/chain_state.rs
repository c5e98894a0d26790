//! The chain that a supervisor's device serves, and the changes of it that clients have asked for.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};
use crate::server::descriptors::{Descriptors, SwitchFds};
use crate::server::proto::{AttachRequest, ChainSwitch, MergeOrder, SwitchLevel, WorkerStart};
use crate::server::supervisor::chain_plan::{MergeTransition, Plan, Planner};
use crate::server::transport::Transport;
use crate::sys::host;

/// Between attempts to end a merge.
const LATER: Duration = Duration::from_secs(5);

/// What a client asks for.
#[derive(Debug)]
pub enum ChangeRequest {
    Switch(ChainSwitch, SwitchFds),
    /// A larger top, then the block device's size.
    Grow(ChainSwitch, SwitchFds),
    /// Another program for worker and supervisor; a number for the attempt.
    Reload {
        token: u64,
        program: OwnedFd,
    },
    /// The top merged into the level below it, then this chain.
    MergeTop(ChainSwitch, SwitchFds),
    /// Frozen levels merged into the lowest of them, then the chain without the others.
    MergeFrozen(MergeOrder, SwitchFds),
    /// A client copies the top: no change any more until it has ended.
    Track,
    /// The worker has merged it.
    MergeComplete,
    /// A merge has ended before its time, or is to.
    EndMerge(Error),
}

/// A requested change of the chain.
#[derive(Debug)]
pub struct PendingChange {
    pub request: ChangeRequest,
    pub client: Option<OwnedFd>,
}

/// See the module.
pub struct ChainState {
    /// What the next worker gets.
    start: WorkerStart,
    pending: VecDeque<PendingChange>,
    /// What the change under way does to a merge.
    transition: Option<MergeTransition>,
    end_merge_due: Option<Instant>,
    /// The client that gets `Prepared` when requests are about to be held.
    initiator: Option<OwnedFd>,
}

impl ChainState {
    pub fn new(start: WorkerStart) -> ChainState {
        ChainState { start, pending: VecDeque::new(), transition: None, end_merge_due: None, initiator: None }
    }

    pub fn start(&self) -> &WorkerStart {
        &self.start
    }

    pub fn attach(&self) -> &AttachRequest {
        &self.start.attach
    }

    pub fn transport(&self) -> Transport {
        self.start.session.transport()
    }

    /// For a worker that takes over from another one, or for the first one.
    pub fn set_takeover(&mut self, takeover: bool) {
        self.start.takeover = takeover;
    }

    /// The first worker takes over what a killed device has left; later ones succeed that worker.
    pub fn set_adopts(&mut self, adopts: bool) {
        self.start.adopts = adopts;
    }

    /// The chain that `start` describes is served from here on.
    pub fn install(&mut self, start: WorkerStart) {
        self.start = WorkerStart { succeed: None, ..start };
    }

    /// The former top is being completed.
    pub fn is_finishing(&self) -> bool {
        self.start.finish.is_some()
    }

    pub fn set_finished(&mut self) {
        self.start.finish = None;
    }

    /// The change that has led to this chain is this one.
    pub fn is_made(&self, switch: &ChainSwitch) -> bool {
        switch.token != 0 && switch.token == self.start.token
    }

    /// The change that follows the merge under way.
    pub fn merge(&self) -> Option<&ChainSwitch> {
        self.start.merge.as_ref()
    }

    /// The chain that is there, as a change.
    pub fn same_levels(&self, token: u64) -> ChainSwitch {
        let attach = &self.start.attach;
        let levels = attach.levels.iter().zip(&attach.ids).enumerate();
        let levels = levels.map(|(i, (name, id))| SwitchLevel { name: name.clone(), id: *id, from: Some(i) }).collect();
        ChainSwitch { levels, expected: attach.ids.clone(), token, ..ChainSwitch::default() }
    }

    /// Checks a change against the running chain.
    pub fn plan(
        &self,
        fds: &Descriptors,
        switch: &ChainSwitch,
        sent: &SwitchFds,
        program: Option<OwnedFd>,
    ) -> Result<Plan> {
        Planner { start: &self.start, fds, transition: self.transition.as_ref() }.plan(switch, sent, program)
    }

    pub fn set_transition(&mut self, transition: Option<MergeTransition>) {
        self.transition = transition;
    }

    pub fn request(&mut self, request: ChangeRequest, client: Option<OwnedFd>) {
        self.pending.push_back(PendingChange { request, client });
    }

    pub fn next(&mut self) -> Option<PendingChange> {
        self.pending.pop_front()
    }

    pub fn set_initiator(&mut self, initiator: Option<OwnedFd>) {
        self.initiator = initiator;
    }

    pub fn take_initiator(&mut self) -> Option<OwnedFd> {
        self.initiator.take()
    }

    /// Ending the merge has failed and is tried again later.
    pub fn end_merge_later(&mut self) {
        self.end_merge_due = Some(host::now() + LATER);
    }

    /// A merge that could not be ended is ended now, perhaps.
    pub fn retry_end_merge(&mut self) {
        if self.end_merge_due.take_if(|at| *at <= host::now()).is_some() && self.start.merge.is_some() {
            let why = Error::new(Kind::Abort, "it had ended before its time");
            self.request(ChangeRequest::EndMerge(why), None);
        }
    }
}

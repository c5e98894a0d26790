//! The running device changes its chain, or its program: one worker retires, another one takes over.
//!
//! The order, and what follows when a process exits at each step:
//! 1. The old worker reads no more requests, answers those it has, flushes, lets go of the images. The top stays marked
//!    in use. Requests wait in the kernel meanwhile. If it exits, the chain is as it was.
//! 2. The new worker locks and marks the new top, makes the change permanent (the descriptor is renamed), notes it in
//!    the shared memory, serves. Until that note it exits with its supervisor. If it exits, the descriptor on disk
//!    tells whether the next one goes on or the old chain comes back.
//! 3. The old worker is killed. Until then it can start another supervisor: it does if it gets the lock on the new top,
//!    which a running successor holds, and unless requests are kept in the journal and were read by a successor that
//!    has exited.
//! 4. The new worker completes and unmarks the former top while it serves.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::bail;
use crate::error::{Error, Kind, Result};
use crate::server::descriptors::SwitchFds;
use crate::server::jobs::Go;
use crate::server::proto::{Answer, ChainSwitch, FromWorker, ToWorker};
use crate::server::remote_error::RemoteError;
use crate::server::supervisor::chain_plan::{Plan, is_committed};
use crate::server::supervisor::chain_state::{ChangeRequest, PendingChange};
use crate::server::supervisor::clients::Awaited;
use crate::server::supervisor::{Supervisor, log};
use crate::server::worker_process::{Worker, WorkerExit};
use crate::server::{control, frame, runtime};
use crate::sys::host;

/// A worker that does not retire in this time is killed, and the chain stays. Longer than what it gives itself.
const RETIRE: Duration = Duration::from_secs(60);
/// Freezing a file system.
const INITIATOR: Duration = Duration::from_secs(600);
/// A worker getting its memory.
const PREPARE: Duration = Duration::from_secs(5);
/// A worker opening the new chain.
const OPEN: Duration = Duration::from_secs(300);
/// A worker that was killed is replaced so often before a change is given up.
const TRIES: usize = 3;

/// How the new worker began.
enum HandoverOutcome {
    Serving(Option<String>),
    /// The new worker exited or refused after the commit; the change cannot be undone.
    Committed,
    /// The new worker exited or refused, and nothing has changed.
    Unchanged(Error, ExitReason),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ExitReason {
    Killed,
    Refused,
}

impl Supervisor {
    pub(super) fn can_change(&self) -> bool {
        self.record.state == "running" && self.failed.is_none()
    }

    /// Makes a change and answers the client.
    pub(super) fn change(&mut self, change: PendingChange) {
        let PendingChange { request, client } = change;
        let answer = |answer: &Answer| client.iter().for_each(|c| control::answer(c, answer));
        if let Some(refusal) = self.refuse_while_copied(&request) {
            return answer(&refusal);
        }
        match request {
            ChangeRequest::Track => self.begin_tracking(client),
            ChangeRequest::Switch(switch, fds) => self.switch(switch, fds, client),
            ChangeRequest::Grow(switch, fds) => self.grow(&switch, fds, client),
            ChangeRequest::MergeTop(switch, fds) => self.begin_merge(switch, None, fds, client),
            ChangeRequest::MergeFrozen(order, fds) => {
                self.begin_merge(order.switch, Some((order.low, order.high)), fds, client);
            }
            ChangeRequest::MergeComplete => self.finish_merge(),
            ChangeRequest::EndMerge(why) => {
                self.end_merge(why);
                answer(&Answer::Done);
            }
            ChangeRequest::Reload { token, program } => {
                let changed = self.check_program(&program).and_then(|()| {
                    let same = self.chain.same_levels(token);
                    self.try_change(&same, SwitchFds::default(), Some(program))
                });
                match changed {
                    Ok(_) => self.replace_program(client),
                    Err(e) => answer(&control::refusal(&e)),
                }
            }
        }
    }

    fn switch(&mut self, switch: ChainSwitch, fds: SwitchFds, client: Option<OwnedFd>) {
        let made = match self.chain.is_made(&switch) && !host::breach("a change is made twice") {
            // A client that got no answer retries.
            true => Ok(None),
            false => {
                let initiator = client.as_ref().filter(|_| switch.ask).and_then(|c| c.try_clone().ok());
                self.chain.set_initiator(initiator);
                let result = self.change_chain(&switch, fds, None);
                self.chain.set_initiator(None);
                result
            }
        };
        match (client, made) {
            (None, _) => {}
            (Some(client), Err(e)) => control::answer(&client, &control::refusal(&e)),
            (Some(client), Ok(warning)) => {
                control::answer(&client, &Answer::Switched { warning });
                match self.chain.is_finishing() {
                    true => self.clients.wait(Awaited::FormerTop, [client]),
                    false => control::answer(&client, &Answer::Done),
                }
            }
        }
        // After the answer: file systems may be frozen until then.
        self.end_retired();
    }

    /// The former top is complete, or not.
    pub(super) fn on_former_top_finished(&mut self, error: Option<RemoteError>) {
        self.chain.set_finished();
        let answer = match error {
            None => Answer::Done,
            Some(error) => {
                log(&self.record.name, &format!("the former top stays marked in use: {error}"));
                error.into()
            }
        };
        self.clients.answer(Awaited::FormerTop, &answer);
    }

    /// Checks a change against the running chain.
    pub(super) fn plan(&self, switch: &ChainSwitch, fds: &SwitchFds, program: Option<OwnedFd>) -> Result<Plan> {
        match &self.fds {
            Some(own) => self.chain.plan(own, switch, fds, program),
            None => bail!(Device, "{} is given up", self.record.name),
        }
    }

    /// After an error the device serves the chain it had, unless it has failed. A warning is passed on.
    pub(super) fn try_change(
        &mut self,
        switch: &ChainSwitch,
        fds: SwitchFds,
        program: Option<OwnedFd>,
    ) -> Result<Option<String>> {
        let result = self.change_chain(switch, fds, program);
        self.end_retired();
        result
    }

    /// The same, but the worker that has retired stays until [`end_retired`](Self::end_retired).
    fn change_chain(
        &mut self,
        switch: &ChainSwitch,
        fds: SwitchFds,
        program: Option<OwnedFd>,
    ) -> Result<Option<String>> {
        // Of two former tops one would be forgotten.
        self.wait_while(|s| s.chain.is_finishing(), None)?;
        let status = self.shm.as_ref().map(|s| s.status()).unwrap_or_default();
        if status.failed {
            bail!(Fsync, "{}: a sync of its image has failed; save what is on it and unmount it", self.record.name);
        }
        if status.no_space {
            bail!(
                Write,
                "{}: writes wait for space on the file system of its image; make room first",
                self.record.name
            );
        }
        let plan = self.plan(switch, &fds, program)?;
        self.prepare_worker(&plan);
        let result = self.await_initiator().and_then(|()| self.replace_worker(switch, &fds, plan));
        if let Some(mut unused) = self.slot.take_standby() {
            end_retired_worker(&mut unused);
        }
        result
    }

    /// Starts the worker of the new chain as far as it can come by itself: requests wait only for the rest. Without it
    /// the change takes longer.
    fn prepare_worker(&mut self, plan: &Plan) {
        let mut start = plan.start.clone();
        if let Some(succeed) = &mut start.succeed {
            succeed.wait = true;
        }
        let Ok(mut worker) = Worker::start(&plan.fds, &start, &[]) else { return };
        let end = host::now() + PREPARE;
        while !worker.prepared && host::now() < end && self.check_alive().is_ok() {
            let Some(sock) = &worker.sock else { break };
            if self.poll_once(end, Some(sock.as_fd()))
                && let Some(FromWorker::Prepared) = worker.receive()
            {
                worker.prepared = true;
            }
        }
        match worker.prepared {
            true => self.slot.set_standby(worker),
            false => end_retired_worker(&mut worker),
        }
    }

    /// Waits until the client wants requests to be held, if the change says so.
    fn await_initiator(&mut self) -> Result<()> {
        let Some(initiator) = self.chain.take_initiator() else { return Ok(()) };
        control::answer(&initiator, &Answer::Prepared);
        let end = host::now() + INITIATOR;
        while host::now() < end {
            self.check_alive()?;
            if self.poll_once(end, Some(initiator.as_fd())) {
                return match frame::recv_within::<Go>(&initiator, Duration::ZERO) {
                    Ok(Some(_)) => Ok(()),
                    _ => bail!(Abort, "{}: the client of the change has gone", self.record.name),
                };
            }
        }
        bail!(Abort, "{}: the client of the change did not send Go in time", self.record.name)
    }

    fn replace_worker(&mut self, switch: &ChainSwitch, fds: &SwitchFds, plan: Plan) -> Result<Option<String>> {
        for _ in 0..TRIES {
            self.wait_while(|s| !s.slot.is_ready(), None)?;
            self.slot.set_changing(true);
            match self.retire_worker(switch, fds) {
                Ok(Some(resting)) => return self.install(switch, plan, resting),
                // The worker exited; nothing of the change is left.
                Ok(None) => self.restore_chain(),
                Err(e) => {
                    self.restore_chain();
                    return Err(e);
                }
            }
        }
        bail!(
            Device,
            "{}: its worker exited {TRIES} times in a change of the chain; nothing was changed",
            self.record.name
        )
    }

    /// Turns the loop while `busy`, at most until `end`.
    pub(super) fn wait_while(&mut self, busy: impl Fn(&Supervisor) -> bool, end: Option<Instant>) -> Result<()> {
        while busy(self) {
            self.check_alive()?;
            let now = host::now();
            if end.is_some_and(|end| end <= now) {
                bail!(Device, "{}: its worker does not answer", self.record.name);
            }
            self.poll_once(now + Duration::from_secs(1), None);
        }
        Ok(())
    }

    pub(super) fn check_alive(&self) -> Result<()> {
        match &self.failed {
            Some(why) => bail!(Device, "{}: {why}", self.record.name),
            None if self.is_aborted() => bail!(Abort, "{} was given up", self.record.name),
            None => Ok(()),
        }
    }

    /// The retired worker; none: it exited.
    fn retire_worker(&mut self, switch: &ChainSwitch, fds: &SwitchFds) -> Result<Option<Worker>> {
        let out = fds.outgoing();
        let retire = ToWorker::Retire(ChainSwitch { roles: out.roles, ..switch.clone() });
        if let Some(worker) = self.slot.worker_mut() {
            worker.retired = None;
            if worker.send(&retire, &out.fds).is_err() {
                worker.kill();
            }
        }
        let answered = |s: &Supervisor| s.slot.worker().is_none_or(|w| w.exited || w.retired.is_some());
        self.wait_while(|s| !answered(s), Some(host::now() + RETIRE))?;
        match self.slot.take() {
            Some(worker) if !worker.exited => match worker.retired.clone().flatten() {
                None => {
                    self.slot.clear_journal();
                    Ok(Some(worker))
                }
                Some(error) => {
                    self.slot.put(worker);
                    Err(error.into())
                }
            },
            _ => Ok(None),
        }
    }

    /// Another worker for the chain as it was.
    fn restore_chain(&mut self) {
        self.kill_worker();
        self.slot.set_changing(false);
        if !self.is_aborted() && self.failed.is_none() {
            self.start_worker(true);
        }
    }

    /// Kills the worker, if there is one, and waits for its end.
    fn kill_worker(&mut self) {
        self.slot.set_changing(true);
        while self.slot.worker().is_some_and(|w| !w.exited) && !self.is_aborted() {
            self.slot.kill();
            self.poll_once(host::now() + Duration::from_millis(100), None);
        }
        // When the device is given up its worker is wanted there.
        if self.slot.worker().is_some_and(|w| w.exited) {
            self.slot.take();
        }
    }

    /// Starts the worker of the new chain. After an error the old one is served again, unless the change is committed.
    fn install(&mut self, switch: &ChainSwitch, plan: Plan, mut resting: Worker) -> Result<Option<String>> {
        let mut tries = 0;
        let result = loop {
            let begun = match self.start_successor(switch, &plan) {
                Err(e) if self.check_alive().is_err() => break Err(e),
                // Too slow. What it has done by its end counts.
                Err(e) => {
                    self.kill_worker();
                    match self.is_switched(switch) || is_committed(&plan) {
                        true => HandoverOutcome::Committed,
                        false => break Err(e),
                    }
                }
                Ok(outcome) => outcome,
            };
            match begun {
                HandoverOutcome::Serving(warning) => break Ok(warning),
                HandoverOutcome::Committed => {
                    self.kill_worker();
                    if self.is_switched(switch) {
                        self.apply_plan(plan);
                        self.start_worker(true);
                        end_retired_worker(&mut resting);
                        return Ok(None);
                    }
                    // Committed, not served: the same again, as for a device that cannot be served.
                    match self.slot.next_start(WorkerExit::default()) {
                        Some(at) => {
                            let _ = self.wait_while(|_| host::now() < at, None);
                        }
                        None => {
                            self.apply_plan(plan);
                            self.fail("no worker can serve the new chain".into());
                            end_retired_worker(&mut resting);
                            bail!(Device, "{}: no worker can serve the new chain", self.record.name);
                        }
                    }
                }
                HandoverOutcome::Unchanged(e, died) => {
                    self.kill_worker();
                    tries += 1;
                    if died == ExitReason::Refused || tries >= TRIES {
                        break Err(e);
                    }
                }
            }
        };
        match &result {
            Ok(_) => {
                self.apply_plan(plan);
                self.slot.set_retired(resting);
            }
            Err(_) => {
                self.restore_chain();
                end_retired_worker(&mut resting);
            }
        }
        result
    }

    fn end_retired(&mut self) {
        if let Some(mut retired) = self.slot.take_retired() {
            end_retired_worker(&mut retired);
        }
    }

    fn start_successor(&mut self, switch: &ChainSwitch, plan: &Plan) -> Result<HandoverOutcome> {
        if self.is_switched(switch) {
            return Ok(HandoverOutcome::Committed);
        }
        self.check_alive()?;
        let prepared = self.slot.take_standby().and_then(|mut worker| match worker.send(&ToWorker::Go, &[]) {
            Ok(()) => Some(worker),
            Err(_) => {
                end_retired_worker(&mut worker);
                None
            }
        });
        let worker = match prepared.map_or_else(|| Worker::start(&plan.fds, &plan.start, &[]), Ok) {
            Ok(worker) => worker,
            Err(e) if is_committed(plan) => {
                log(&self.record.name, &e.to_string());
                return Ok(HandoverOutcome::Committed);
            }
            Err(e) => return Ok(HandoverOutcome::Unchanged(e, ExitReason::Killed)),
        };
        self.slot.put(worker);
        let over =
            |s: &Supervisor| s.slot.worker().is_none_or(|w| w.exited || w.refused.is_some() || w.ready.is_some());
        self.wait_while(|s| !over(s), Some(host::now() + OPEN))?;
        let Some(worker) = self.slot.worker() else { bail!(Device, "{}: its worker is gone", self.record.name) };
        if worker.ready.is_some() && !worker.exited {
            return Ok(HandoverOutcome::Serving(worker.switched.clone().flatten()));
        }
        let refused = worker.refused.clone();
        if self.is_switched(switch) || is_committed(plan) {
            if let Some(error) = refused {
                log(&self.record.name, &error.message);
            }
            return Ok(HandoverOutcome::Committed);
        }
        Ok(match refused {
            Some(error) => HandoverOutcome::Unchanged(error.into(), ExitReason::Refused),
            None => HandoverOutcome::Unchanged(
                Error::new(Kind::Device, "the worker of the new chain exited"),
                ExitReason::Killed,
            ),
        })
    }

    /// A worker has begun to serve the new chain.
    fn is_switched(&self, switch: &ChainSwitch) -> bool {
        let noted = self.shm.as_ref().is_some_and(|s| s.switched() == switch.token);
        noted || self.slot.worker().is_some_and(|w| w.switched.is_some())
    }

    /// The new chain is the chain from here on.
    fn apply_plan(&mut self, plan: Plan) {
        let Plan { start, mut fds } = plan;
        self.record.levels = start.attach.levels.clone();
        self.record.ids = start.attach.ids.clone();
        self.chain.install(start);
        if let Some(worker) = self.slot.worker() {
            self.record.worker = worker.id;
            // The message may have come before this point.
            if worker.finished.is_some() {
                self.chain.set_finished();
            }
        }
        // The locks on the disk that they hold fall when the record tells the new chain, not before.
        let _former = (fds.commit.take(), self.fds.replace(fds));
        self.slot.set_changing(false);
        if !host::breach("the record keeps the old chain") {
            self.save();
        }
    }

    /// For a supervisor that a retired worker has started: the change goes on where the old one left it.
    pub(super) fn resume_change(&mut self, switch: ChainSwitch, fds: SwitchFds) {
        let Some(mut resting) = self.slot.take() else { return };
        self.slot.set_changing(true);
        let result = match self.plan(&switch, &fds, None) {
            Ok(plan) => {
                let result = self.install(&switch, plan, resting).map(drop);
                self.end_retired();
                result
            }
            Err(e) => {
                self.restore_chain();
                end_retired_worker(&mut resting);
                Err(e)
            }
        };
        if let Err(e) = result {
            log(&self.record.name, &format!("a change of its chain was not made: {e}"));
        }
    }
}

/// Ends the retired worker, which is not needed any more and holds no image.
fn end_retired_worker(resting: &mut Worker) {
    resting.kill();
    // A worker that this supervisor did not start is reaped by its own parent.
    let end = host::now() + Duration::from_secs(5);
    while runtime::alive(resting.id) && host::now() < end {
        host::sleep(Duration::from_millis(1));
    }
    if !runtime::alive(resting.id) {
        resting.reap();
    }
}

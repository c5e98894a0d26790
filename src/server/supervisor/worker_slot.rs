//! The place of the worker that serves: one process at a time, and when the next one is started.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::server::descriptors::Descriptors;
use crate::server::proto::{ProcessId, ToWorker, WorkerStart};
use crate::server::shm::Shm;
use crate::server::worker_process::{RestartPolicy, Worker, WorkerExit};
use crate::sys::host;

/// Which code handles the worker's exit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum ExitHandler {
    /// The event loop: it starts a successor.
    #[default]
    Loop,
    /// The change of the chain that is under way.
    Change,
    /// None: the device ends, and no worker follows. Final.
    End,
}

/// What an exit means.
pub enum Exit {
    /// No successor is started here: the worker has closed the image, never served, or other code handles its exit.
    Expected,
    /// A successor is started when it is time. `killed`: a signal from outside ended the worker, it did not fail by itself.
    Restart { killed: bool },
    /// No successor could serve either: why.
    Final(String),
}

/// What a supervisor has seen of its worker's heartbeat.
#[derive(Default)]
struct Pulse {
    worker: i32,
    heartbeat: u64,
    /// So many looks of the supervisor's, one in [`LOOK`], have found no change. Not a time: where the whole host stood
    /// still, supervisor and worker did.
    same: u32,
}

impl Pulse {
    fn look(&mut self, worker: Option<i32>, heartbeat: u64) -> bool {
        match worker {
            None => *self = Pulse::default(),
            Some(worker) if (self.worker, self.heartbeat) == (worker, heartbeat) => self.same += 1,
            Some(worker) => *self = Pulse { worker, heartbeat, same: 0 },
        }
        self.same == REPLACED
    }

    fn stalled(&self) -> Option<Duration> {
        (self.same >= STALLED).then(|| LOOK * self.same)
    }
}

/// Between two looks at the heartbeat, which changes once a second.
pub const LOOK: Duration = Duration::from_secs(2);
/// After so many looks without a change the worker counts as stalled.
const STALLED: u32 = 4;
/// After so many it is killed: its successor serves on. Nothing is lost by that.
const REPLACED: u32 = 30;

/// See the module.
#[derive(Default)]
pub struct WorkerSlot {
    worker: Option<Worker>,
    /// The worker of the new chain, prepared while the old one serves.
    standby: Option<Worker>,
    /// The worker that has retired in favour of the one that serves, until it is killed.
    retired: Option<Worker>,
    /// Where the last worker that served keeps its requests; empty: it has answered all, or the kernel keeps them.
    journal: Vec<OwnedFd>,
    restarts: RestartPolicy,
    /// When to start the next worker.
    due: Option<Instant>,
    pulse: Pulse,
    exits: ExitHandler,
}

impl WorkerSlot {
    /// For a device that a worker serves already. `journal`: that worker's; empty only if it has retired or the kernel
    /// keeps requests.
    pub fn adopt(&mut self, worker: Worker, journal: Vec<OwnedFd>) {
        self.worker = Some(worker);
        self.journal = journal;
    }

    pub fn worker(&self) -> Option<&Worker> {
        self.worker.as_ref()
    }

    pub fn worker_mut(&mut self) -> Option<&mut Worker> {
        self.worker.as_mut()
    }

    pub fn take(&mut self) -> Option<Worker> {
        self.worker.take()
    }

    pub fn put(&mut self, worker: Worker) {
        self.worker = Some(worker);
    }

    pub fn set_standby(&mut self, worker: Worker) {
        self.standby = Some(worker);
    }

    pub fn set_retired(&mut self, worker: Worker) {
        self.retired = Some(worker);
    }

    pub fn take_retired(&mut self) -> Option<Worker> {
        self.retired.take()
    }

    pub fn take_standby(&mut self) -> Option<Worker> {
        self.standby.take()
    }

    /// The journal that a successor needs.
    pub fn journal(&self) -> &[OwnedFd] {
        &self.journal
    }

    /// The worker has announced its own journal.
    pub fn take_journal(&mut self) {
        if let Some(worker) = &mut self.worker {
            self.journal = std::mem::take(&mut worker.journal);
        }
    }

    /// The worker has answered all of its requests.
    pub fn clear_journal(&mut self) {
        self.journal.clear();
    }

    /// Where its exit shows.
    pub fn exit_fd(&self) -> Option<BorrowedFd<'_>> {
        self.worker.as_ref().filter(|w| !w.exited).map(|w| w.pidfd.as_fd())
    }

    /// Where its messages come.
    pub fn message_fd(&self) -> Option<BorrowedFd<'_>> {
        self.worker.as_ref()?.sock.as_ref().map(AsFd::as_fd)
    }

    pub fn is_ready(&self) -> bool {
        self.worker.as_ref().is_some_and(|w| w.ready.is_some())
    }

    /// Starts a worker with what the last one left.
    pub fn start(&mut self, fds: &Descriptors, start: &WorkerStart) -> Result<ProcessId> {
        let worker = Worker::start(fds, start, &self.journal)?;
        let id = worker.id;
        self.worker = Some(worker);
        Ok(id)
    }

    /// Schedules a start after one that failed; the error again: there were too many.
    pub fn start_failed(&mut self, error: Error) -> Result<(), Error> {
        match self.next_start(WorkerExit::default()) {
            Some(at) => {
                self.due = Some(at);
                Ok(())
            }
            None => Err(error),
        }
    }

    /// See [`RestartPolicy::next_start`].
    pub fn next_start(&mut self, exit: WorkerExit) -> Option<Instant> {
        self.restarts.next_start(host::now(), exit)
    }

    /// When the next worker is to be started, if one is.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// It is time for the next worker.
    pub fn take_due(&mut self) -> bool {
        self.due.take_if(|at| *at <= host::now()).is_some()
    }

    /// A look at the heartbeat, one in [`LOOK`]. True: the worker stands still for so long that it is to be replaced.
    pub fn look(&mut self, heartbeat: u64) -> bool {
        let worker = self.worker.as_ref().filter(|w| w.ready.is_some() && !w.exited);
        self.pulse.look(worker.map(|w| w.id.pid), heartbeat)
    }

    /// For how long the worker has shown no sign of running, if it is stalled.
    pub fn stalled(&self) -> Option<Duration> {
        self.pulse.stalled()
    }

    /// Forgets failed starts.
    pub fn forgive(&mut self) {
        self.restarts = RestartPolicy::default();
    }

    /// Sends without descriptors; the successor of a worker that exits gets the message too.
    pub fn send(&self, message: &ToWorker) {
        self.send_with(message, &[]);
    }

    pub fn send_with(&self, message: &ToWorker, fds: &[BorrowedFd]) {
        if let Some(worker) = &self.worker
            && worker.ready.is_some()
            && worker.send(message, fds).is_err()
        {
            // It does not read any more.
            worker.kill();
        }
    }

    /// Kills the worker; its exit is noticed by the loop.
    pub fn kill(&self) {
        if let Some(worker) = &self.worker {
            worker.kill();
        }
    }

    /// No worker follows this one.
    pub fn expect_end(&mut self) {
        self.exits = ExitHandler::End;
    }

    pub fn is_ending(&self) -> bool {
        self.exits == ExitHandler::End
    }

    /// A change of the chain handles exits of the worker, or no longer.
    pub fn set_changing(&mut self, changing: bool) {
        if !self.is_ending() {
            self.exits = if changing { ExitHandler::Change } else { ExitHandler::Loop };
        }
    }

    /// The worker's process has exited. `starting`: the device does not exist yet. `shm`: what it has left.
    pub fn on_exit(&mut self, starting: bool, shm: Option<&Shm>) -> Exit {
        let Some(worker) = &mut self.worker else { return Exit::Expected };
        let killed = worker.reap();
        worker.exited = true;
        if self.exits != ExitHandler::Loop || worker.closed.is_some() {
            return Exit::Expected;
        }
        let (ready, refused) = (worker.ready.is_some(), worker.refused.clone());
        let panicked = shm.is_some_and(Shm::take_panicked);
        let why = match refused {
            Some(e) => e.message,
            None if panicked => "it panicked; its message is in the log of the device".into(),
            None => "it exited".into(),
        };
        if starting && !ready {
            self.expect_end();
            return Exit::Expected;
        }
        let served = worker.serving_since.map(host::since);
        self.worker = None;
        match self.next_start(WorkerExit { served, killed, named: shm.is_some_and(Shm::is_request_marked) }) {
            Some(at) => {
                self.due = Some(at);
                Exit::Restart { killed }
            }
            None => Exit::Final(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_stands_still_is_seen_and_replaced_once() {
        let mut pulse = Pulse::default();
        let looks: Vec<bool> = (0..40).map(|_| pulse.look(Some(7), 3)).collect();
        assert_eq!(looks.iter().filter(|l| **l).count(), 1);
        assert!(looks[REPLACED as usize] && pulse.stalled() >= Some(LOOK * REPLACED));
        // It runs, another one serves, or none does.
        for (worker, heartbeat) in [(Some(7), 4), (Some(8), 4), (None, 4)] {
            assert!((0..STALLED).all(|_| !pulse.look(Some(7), 3)));
            pulse.look(worker, heartbeat);
            assert_eq!(pulse.stalled(), None, "{worker:?}");
        }
    }
}

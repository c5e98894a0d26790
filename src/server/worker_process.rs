//! The worker as its supervisor sees it: start, messages, exit.
#![forbid(unsafe_code)]

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::error::{IoContext, Kind, Result};
use crate::server::descriptors::Descriptors;
use crate::server::greeting::{self, Incoming};
use crate::server::kernel_log::log;
use crate::server::proto::{FromWorker, ProcessId, ToWorker, WorkerReady, WorkerStart, own_greeting};
use crate::server::remote_error::RemoteError;
use crate::server::roles::Role;
use crate::server::{frame, runtime};
use crate::sys::host::{self, Process};

/// Most different texts that are logged about messages of one worker.
const UNKNOWN_MAX: usize = 16;

/// One worker process.
pub struct Worker {
    pub id: ProcessId,
    pub pidfd: OwnedFd,
    /// None once the other end is closed.
    pub sock: Option<OwnedFd>,
    process: Option<Process>,
    /// It has been reaped.
    pub exited: bool,
    pub ready: Option<WorkerReady>,
    /// When it began to serve, as this supervisor has seen it.
    pub serving_since: Option<Instant>,
    /// Why it could not open the chain.
    pub refused: Option<RemoteError>,
    /// It has closed the image: how that went.
    pub closed: Option<Option<RemoteError>>,
    /// Its request journal, until the supervisor takes it.
    pub journal: Vec<OwnedFd>,
    /// What was logged about messages that were not understood.
    unknown: BTreeSet<String>,
    /// The worker waits for `Go`.
    pub prepared: bool,
    /// It serves nothing any more and has let go of the images, or why it has not.
    pub retired: Option<Option<RemoteError>>,
    /// It has made the change of the chain that it was started for; a warning.
    pub switched: Option<Option<String>>,
    /// The former top is complete, or why not.
    pub finished: Option<Option<RemoteError>>,
    /// The merge has come to its end, or to an error.
    pub merged: Option<Option<RemoteError>>,
}

impl Worker {
    /// Starts one, as the successor of the one that left `journal`. Nothing is waited for.
    pub fn start(fds: &Descriptors, start: &WorkerStart, journal: &[OwnedFd]) -> Result<Worker> {
        let (ours, theirs) = frame::pair()?;
        let process = host::start(&fds.program(), "worker", theirs).ctx(Kind::Sys, || "cannot start a worker")?;
        let pid = process.id();
        let pidfd = host::watch(pid).ctx(Kind::Sys, || "cannot watch a worker (Linux 5.3 or later is needed)")?;
        let id = runtime::process(pid).unwrap_or(ProcessId { pid, start_time: 0 });
        let worker = Worker::new(id, pidfd, ours, Some(process));
        let mut out = fds.outgoing();
        out.add(Role::Journal, journal);
        let start = WorkerStart { roles: out.roles, greeting: own_greeting(), ..start.clone() };
        worker.send(&ToWorker::Start(start), &out.fds)?;
        Ok(worker)
    }

    /// Takes over the running worker that has started this supervisor.
    pub fn attach_running(pid: i32, sock: OwnedFd) -> Result<Worker> {
        let gone = || std::io::Error::from_raw_os_error(libc::ESRCH);
        let pidfd = host::watch(pid).ctx(Kind::Sys, || format!("cannot watch the worker, process {pid}"))?;
        let id = runtime::process(pid)
            .ok_or_else(gone)
            .ctx(Kind::Sys, || format!("the worker, process {pid}, has exited"))?;
        Ok(Worker::new(id, pidfd, sock, None))
    }

    /// The same for a worker that this process has started by an earlier program.
    pub fn attach_child(id: ProcessId, sock: OwnedFd) -> Result<Worker> {
        let pidfd = host::watch(id.pid).ctx(Kind::Sys, || format!("cannot watch the worker, process {}", id.pid))?;
        Ok(Worker::new(id, pidfd, sock, Some(Process::of_child(id.pid))))
    }

    fn new(id: ProcessId, pidfd: OwnedFd, sock: OwnedFd, process: Option<Process>) -> Worker {
        Worker {
            id,
            pidfd,
            sock: Some(sock),
            process,
            exited: false,
            ready: None,
            serving_since: None,
            refused: None,
            closed: None,
            journal: Vec::new(),
            unknown: BTreeSet::new(),
            prepared: false,
            retired: None,
            switched: None,
            finished: None,
            merged: None,
        }
    }

    /// Sends a message; a worker that has exited is no error here.
    pub fn send(&self, message: &ToWorker, fds: &[BorrowedFd]) -> Result<()> {
        match &self.sock {
            Some(sock) => frame::send(sock, message, fds),
            None => Ok(()),
        }
    }

    /// Takes one message, if there is one. What a worker of a later version sends and this build does not understand is
    /// logged and left out: such a worker serves all the same. The end of the connection is remembered.
    pub fn receive(&mut self) -> Option<FromWorker> {
        loop {
            let sock = self.sock.as_ref()?;
            match frame::receive_within::<FromWorker>(sock, Duration::ZERO) {
                Ok(Some((Incoming::Known(FromWorker::Journal), fds))) => {
                    self.journal = fds;
                    return Some(FromWorker::Journal);
                }
                Ok(Some((Incoming::Known(FromWorker::Unsupported { what, version }), _))) => {
                    if let Some(outcome) = self.unsupported(&what, version) {
                        return Some(outcome);
                    }
                }
                Ok(Some((Incoming::Known(message), _))) => return Some(message),
                Ok(Some((Incoming::Unknown(unknown), _))) => {
                    self.log_once(format!("its message {:?} is not understood and left out", unknown.name));
                }
                Err(e) if e.errno() == Some(libc::ETIMEDOUT) => return None,
                // No JSON: nothing that follows can be trusted. The process is watched by its pidfd.
                Ok(None) | Err(_) => {
                    self.sock = None;
                    return None;
                }
            }
        }
    }

    /// The worker does not know a message: what waits for its answer gets an error that names it.
    fn unsupported(&mut self, what: &str, version: u32) -> Option<FromWorker> {
        let error = greeting::unsupported(what, "the worker", version);
        self.log_once(error.to_string());
        let error = Some(RemoteError::from(error));
        match what {
            "Flush" => Some(FromWorker::Flushed { error }),
            "Retire" => Some(FromWorker::Retired { error }),
            "Close" => Some(FromWorker::Closed { error }),
            _ => None,
        }
    }

    fn log_once(&mut self, text: String) {
        if self.unknown.len() < UNKNOWN_MAX && !self.unknown.contains(&text) {
            log(&format!("worker {}", self.id.pid), &text);
            self.unknown.insert(text);
        }
    }

    pub fn kill(&self) {
        host::kill(self.pidfd.as_fd(), self.id.pid);
    }

    /// Reaps a worker that has exited. True: a signal from outside killed it, it did not fail by itself.
    pub fn reap(&mut self) -> bool {
        let Some(process) = &mut self.process else { return true };
        process.wait().map_or(true, |exit| exit.killed)
    }
}

/// How a worker ended.
#[derive(Clone, Copy, Debug, Default)]
pub struct WorkerExit {
    /// How long it has served; none: it never did.
    pub served: Option<Duration>,
    /// A signal from outside killed it.
    pub killed: bool,
    /// It was working on a request: after several such exits that request fails, and the next worker goes on.
    pub named: bool,
}

/// Decides from worker exits when the next worker starts.
#[derive(Default)]
pub struct RestartPolicy {
    failed: VecDeque<Instant>,
    /// Starts without success in a row.
    quick: u32,
    /// Exits soon after the start in a row.
    short: u32,
}

/// So many failures of a worker's own within [`WINDOW`] are enough.
const FAILURES: usize = 5;
const WINDOW: Duration = Duration::from_secs(10);
/// A worker that has served so long has not failed at its start.
const STABLE: Duration = Duration::from_secs(10);
/// So many exits of workers that have served less are followed by a start at once, later ones by pauses.
const AT_ONCE: u32 = 3;
/// The longest pause after a worker that was killed from outside, so often as it may be.
const AFTER_KILL: Duration = Duration::from_millis(200);

impl RestartPolicy {
    /// A worker has exited. Returns when to start the next one; `None`: never.
    pub fn next_start(&mut self, now: Instant, exit: WorkerExit) -> Option<Instant> {
        let pause = match exit.served {
            Some(served) if served >= STABLE => {
                *self = RestartPolicy::default();
                return Some(now);
            }
            Some(_) => {
                self.quick = 0;
                self.short = (self.short + 1).min(AT_ONCE + 6);
                let pause = Duration::from_millis(25 << self.short.saturating_sub(AT_ONCE));
                match self.short <= AT_ONCE {
                    true => Duration::ZERO,
                    false if exit.killed => pause.min(AFTER_KILL),
                    false => pause,
                }
            }
            None => {
                self.quick = (self.quick + 1).min(6);
                Duration::from_millis(25 << self.quick)
            }
        };
        if !exit.killed && !exit.named {
            self.failed.push_back(now);
        }
        while self.failed.front().is_some_and(|t| now.duration_since(*t) > WINDOW) {
            self.failed.pop_front();
        }
        // All five fit into the window, with their pauses.
        if self.failed.len() >= FAILURES { None } else { Some(now + pause) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEVER_READY: WorkerExit = WorkerExit { served: None, killed: false, named: false };

    fn served(ms: u64) -> WorkerExit {
        WorkerExit { served: Some(Duration::from_millis(ms)), ..NEVER_READY }
    }

    #[test]
    fn five_failed_starts_are_enough() {
        let start = Instant::now();
        let mut restarts = RestartPolicy::default();
        assert_eq!(restarts.next_start(start, served(60_000)), Some(start));
        let mut now = start;
        for _ in 0..4 {
            now = restarts.next_start(now, NEVER_READY).unwrap();
        }
        assert!(now - start < Duration::from_secs(3));
        assert_eq!(restarts.next_start(now, NEVER_READY), None);
        // Spread over a longer time they are not, and kills never are.
        let mut restarts = RestartPolicy::default();
        let mut now = start;
        for _ in 0..20 {
            now = restarts.next_start(now, NEVER_READY).unwrap() + Duration::from_secs(3);
        }
        for _ in 0..20 {
            now = restarts.next_start(now, WorkerExit { killed: true, ..NEVER_READY }).unwrap();
        }
    }

    #[test]
    fn workers_that_exit_soon_after_their_start_are_not_started_for_ever() {
        let start = Instant::now();
        let mut restarts = RestartPolicy::default();
        let mut now = start;
        for i in 0..4 {
            let next = restarts.next_start(now, served(20)).unwrap();
            assert_eq!(next > now, i >= 3, "exit {i}");
            now = next + Duration::from_millis(20);
        }
        assert_eq!(restarts.next_start(now, served(20)), None);
        // A request that causes the exits fails by itself; the pauses stay.
        let mut restarts = RestartPolicy::default();
        let mut now = start;
        for _ in 0..50 {
            now = restarts.next_start(now, WorkerExit { named: true, ..served(20) }).unwrap();
        }
        assert!(now - start > Duration::from_secs(50), "{:?}", now - start);
        // Kills from outside never end the device, and are followed by a worker soon.
        let mut restarts = RestartPolicy::default();
        for _ in 0..100 {
            let next = restarts.next_start(start, WorkerExit { killed: true, ..served(100) }).unwrap();
            assert!(next - start <= AFTER_KILL);
        }
        // One that has served for long is replaced at once.
        assert_eq!(restarts.next_start(start, served(10_000)), Some(start));
        assert_eq!(restarts.next_start(start, served(20)), Some(start));
    }

    #[test]
    fn messages_of_a_later_worker_do_not_end_the_connection() {
        let (ours, theirs) = frame::pair().unwrap();
        let mut worker = Worker::attach_running(std::process::id() as i32, ours).unwrap();
        for _ in 0..3 {
            frame::send(&theirs, &"Later", &[]).unwrap();
            frame::send(&theirs, &serde_json::json!({"Flushed": {"error": {"other": 1}}}), &[]).unwrap();
        }
        frame::send(&theirs, &FromWorker::Prepared, &[]).unwrap();
        assert!(matches!(worker.receive(), Some(FromWorker::Prepared)));
        assert_eq!(worker.unknown.len(), 2, "each is logged once");
        // What waits for an answer gets an error that names the message.
        frame::send(&theirs, &FromWorker::Unsupported { what: "Grow".into(), version: 7 }, &[]).unwrap();
        frame::send(&theirs, &FromWorker::Unsupported { what: "Retire".into(), version: 7 }, &[]).unwrap();
        match worker.receive() {
            Some(FromWorker::Retired { error: Some(e) }) => {
                assert!(e.code == Kind::Param.code() && e.message.contains("Retire: the worker has version 7"), "{e}");
            }
            other => panic!("{other:?}"),
        }
        for i in 0..100 {
            frame::send(&theirs, &format!("Later{i}"), &[]).unwrap();
            assert!(worker.receive().is_none() && worker.sock.is_some());
        }
        assert_eq!(worker.unknown.len(), UNKNOWN_MAX);
        crate::sys::scm::send(theirs.as_fd(), b"{not json", &[], 0).unwrap();
        assert!(worker.receive().is_none() && worker.sock.is_none());
    }
}

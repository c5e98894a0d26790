//! The supervisor: holds what a device needs to exist (the queue's connection, the shared memory, the images' identities)
//! and keeps one worker serving it. One thread, one poll loop, nothing that can wait for the device itself.
//!
//! Longer work ([`attach`], [`detach`]) runs as straight code that keeps turning the loop
//! with [`Supervisor::poll_once`], so that a worker's exit is noticed and clients are answered at any time.
#![forbid(unsafe_code)]

pub mod attach;
mod chain_plan;
mod chain_switch;
mod commands;
mod detach;
mod merge;
mod partition_nodes;
pub mod resume;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::error::{IoContext, Kind, Result};
use crate::server::control::{self, Client, ClientEvent};
use crate::server::helper::Helper;
use crate::server::jobs::{Job, JobEvent};
use crate::server::kernel_log::log;
use crate::server::nodes::Nodes;
use crate::server::proto::{Answer, DeviceRecord, FromWorker, ToWorker, WorkerStart, own_greeting};
use crate::server::remote_error::RemoteError;
use crate::server::shm::Shm;
use crate::server::supervisor::chain_plan::MergeTransition;
use crate::server::supervisor::chain_switch::PendingChange;
use crate::server::transport::Binding;
use crate::server::worker_process::{Descriptors, RestartPolicy, Worker};
use crate::server::{frame, runtime, uevents};
use crate::sys::host;

/// Longest sleep.
const TICK: Duration = Duration::from_secs(2);
/// Partitions are looked at so often where the kernel's announcements do not arrive.
const BLIND_TICK: Duration = Duration::from_millis(500);
/// After the last change of a partition table, until the supervisor reads it: the program that changes it may inform
/// the kernel itself.
const TABLE_PAUSE: Duration = Duration::from_millis(300);
/// A scan that does not end.
const SCAN: Duration = Duration::from_secs(30);

/// What one poll of the loop waits for.
enum Source {
    Extra,
    Messages,
    WorkerExit,
    Listener,
    Signals,
    Events,
    Client(usize),
    Scan,
}

/// See the module.
pub struct Supervisor {
    dir: PathBuf,
    record: DeviceRecord,
    start: WorkerStart,
    /// None once the device was given up: closing the last descriptor ends the connection.
    fds: Option<Descriptors>,
    worker: Option<Worker>,
    /// Where the last worker that served keeps its requests; empty: it has answered all, or the kernel keeps them.
    slots: Vec<OwnedFd>,
    restarts: RestartPolicy,
    /// When to start the next worker.
    restart: Option<Instant>,
    /// No worker can serve the device: why.
    failed: Option<String>,
    /// The worker's exit is expected: it has closed the image, or the device is given up.
    ending: bool,
    listener: UnixListener,
    clients: Vec<Client>,
    /// Clients that wait for the end of the device.
    stopping: Vec<OwnedFd>,
    aborting: Vec<OwnedFd>,
    /// Changes of the chain that were asked for.
    changes: VecDeque<PendingChange>,
    /// A change is under way: the change handles a worker's exit.
    changing: bool,
    /// The client that gets `Prepared` when requests are about to be held.
    initiator: Option<OwnedFd>,
    /// The worker of the new chain, while the old one retires.
    waiting: Option<Worker>,
    /// Clients that wait until the former top is finished.
    finishing: Vec<OwnedFd>,
    /// Clients that wait for the end of a merge.
    merging: Vec<OwnedFd>,
    merge_transition: Option<MergeTransition>,
    end_merge_due: Option<Instant>,
    /// Clients that wait for a flush.
    flushing: Vec<OwnedFd>,
    /// The signal handler's share of [`flushing`](Self::flushing).
    flush_sent: bool,
    nodes: Nodes,
    events: Option<OwnedFd>,
    signals: Option<SignalFd>,
    /// When to look for partitions in the table.
    table_due: Option<Instant>,
    scan: Option<(Helper, Instant)>,
    had_partitions: bool,
    shm: Option<Shm>,
    /// Another process has detached the block device.
    lost: bool,
    released_helpers: Vec<Helper>,
    last_log: String,
}

impl Supervisor {
    /// For a device in folder `dir`; starts nothing.
    fn new(dir: PathBuf, record: DeviceRecord, start: WorkerStart, fds: Descriptors) -> Result<Supervisor> {
        let listener = fds.listener.try_clone().ctx(Kind::Sys, || "cannot duplicate the control socket")?;
        fcntl(&listener, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .ctx(Kind::Sys, || "cannot prepare the control socket")?;
        let mut asked = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            asked.add(signal);
        }
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = match host::is_simulated() {
            true => None,
            false => asked.thread_block().and_then(|()| SignalFd::with_flags(&asked, flags)).ok(),
        };
        let nodes = Nodes::new(&runtime::dev_dir(), &record.name);
        let shm = Shm::map(fds.shm.as_fd()).ok();
        // The record may be the one of an older supervisor.
        let record = DeviceRecord { greeting: own_greeting(), ..record };
        Ok(Supervisor {
            dir,
            record,
            start,
            fds: Some(fds),
            worker: None,
            slots: Vec::new(),
            restarts: RestartPolicy::default(),
            restart: None,
            failed: None,
            ending: false,
            listener: UnixListener::from(listener),
            clients: Vec::new(),
            stopping: Vec::new(),
            aborting: Vec::new(),
            changes: VecDeque::new(),
            changing: false,
            initiator: None,
            waiting: None,
            finishing: Vec::new(),
            merging: Vec::new(),
            merge_transition: None,
            end_merge_due: None,
            flushing: Vec::new(),
            flush_sent: false,
            nodes,
            events: uevents::open(),
            signals,
            table_due: None,
            scan: None,
            had_partitions: false,
            shm,
            lost: false,
            released_helpers: Vec::new(),
            last_log: String::new(),
        })
    }

    /// Serves until the device has ended.
    fn run(mut self) {
        loop {
            self.poll_once(host::now() + TICK, None);
            if !self.aborting.is_empty() {
                return self.abort();
            }
            if let Some(change) = self.changes.pop_front() {
                self.change(change);
                continue;
            }
            if self.failed.is_none() && (!self.stopping.is_empty() || self.lost) && self.stop() {
                return;
            }
        }
    }

    /// One turn of the loop, until something happened or `until`. True: `extra` can be read.
    fn poll_once(&mut self, until: Instant, extra: Option<BorrowedFd>) -> bool {
        let now = host::now();
        let table = self.table_due.filter(|_| self.scan.is_none() && self.record.state == "running");
        let tick = if self.events.is_some() { TICK } else { BLIND_TICK };
        let until = [Some(until), Some(now + tick), self.restart, table].into_iter().flatten().min();
        let (mut sources, mut polls) = (Vec::with_capacity(8), Vec::with_capacity(8));
        let mut watch = |source, fd| {
            sources.push(source);
            polls.push(PollFd::new(fd, PollFlags::POLLIN));
        };
        if let Some(fd) = extra {
            watch(Source::Extra, fd);
        }
        if let Some(worker) = &self.worker {
            if !worker.exited {
                watch(Source::WorkerExit, worker.pidfd.as_fd());
            }
            if let Some(sock) = &worker.sock {
                watch(Source::Messages, sock.as_fd());
            }
        }
        if self.clients.len() < control::MAX_CLIENTS {
            watch(Source::Listener, self.listener.as_fd());
        }
        for (i, client) in self.clients.iter().enumerate() {
            watch(Source::Client(i), client.sock.as_fd());
        }
        if let Some(events) = &self.events {
            watch(Source::Events, events.as_fd());
        }
        if let Some(signals) = &self.signals {
            watch(Source::Signals, signals.as_fd());
        }
        if let Some((scan, _)) = &self.scan {
            watch(Source::Scan, scan.sock.as_fd());
        }
        let wait = until.unwrap_or(now).saturating_duration_since(now) + Duration::from_micros(999);
        // An error (EINTR, no memory) is a turn in which nothing happened.
        let happened =
            host::poll(&mut polls, PollTimeout::try_from(wait).unwrap_or(PollTimeout::ZERO)).unwrap_or(0) > 0;
        let ready: Vec<Source> = sources
            .into_iter()
            .zip(&polls)
            .filter(|(_, p)| happened && p.revents().is_some_and(|r| !r.is_empty()))
            .map(|(source, _)| source)
            .collect();
        drop(polls);
        let mut extra_ready = false;
        let mut readable = Vec::new();
        for source in &ready {
            match source {
                Source::Extra => extra_ready = true,
                Source::Messages => self.on_worker_message(),
                Source::Client(i) => readable.push(*i),
                Source::Events => self.on_uevents(),
                Source::Signals => self.on_signals(),
                Source::Scan => self.end_scan(),
                Source::WorkerExit | Source::Listener => {}
            }
        }
        // Last, because the indices of the other clients change by it.
        self.on_clients(&readable);
        if ready.iter().any(|s| matches!(s, Source::WorkerExit)) {
            // The worker's last messages first.
            self.on_worker_message();
            self.on_worker_exit();
        }
        if ready.iter().any(|s| matches!(s, Source::Listener))
            && let Some(client) = Client::accept(&self.listener)
        {
            self.clients.push(client);
        }
        self.tick();
        extra_ready
    }

    fn tick(&mut self) {
        let now = host::now();
        if self.restart.is_some_and(|at| at <= now) {
            self.restart = None;
            self.start_worker(true);
        }
        self.clients.retain(|c| !c.silent_too_long());
        self.released_helpers.retain_mut(|h| h.process.runs());
        if self.record.state == "running" {
            self.retry_end_merge();
            self.follow();
            if self.table_due.is_some_and(|at| at <= now) && self.scan.is_none() {
                self.table_due = None;
                self.scan = self.helper(&Job::Scan { binding: self.binding() }).ok().map(|h| (h, now + SCAN));
            }
        }
        if self.scan.as_ref().is_some_and(|(_, end)| *end <= now) {
            self.end_scan();
        }
    }

    fn log_once(&mut self, text: &str) {
        // The same error comes back with every tick.
        if self.last_log != text {
            log(&self.record.name, text);
            self.last_log = text.into();
        }
    }

    /// The disk behind the device.
    fn binding(&self) -> Binding {
        let r = &self.record;
        Binding { backing: r.backing.clone(), rdev: r.rdev, diskseq: r.diskseq }
    }

    /// Starts a helper process.
    fn helper(&self, job: &Job) -> Result<Helper> {
        match &self.fds {
            Some(fds) => Helper::start(&fds.program(), job),
            None => Helper::start("/proc/self/exe".as_ref(), job),
        }
    }

    /// The next event of a helper, while the loop runs; `None`: none came before `end`, or the device is being aborted.
    fn helper_event(&mut self, helper: &Helper, end: Instant) -> Option<JobEvent> {
        loop {
            let ready = self.poll_once(end, Some(helper.sock.as_fd()));
            if ready {
                return Some(match frame::recv_within::<JobEvent>(&helper.sock, Duration::ZERO) {
                    Ok(Some((event, _))) => event,
                    _ => JobEvent::Error {
                        code: Kind::Sys.code(),
                        message: "a helper process of ploop-server exited without an answer".into(),
                    },
                });
            }
            if host::now() >= end || !self.aborting.is_empty() {
                return None;
            }
        }
    }

    /// Forgets a helper; one that sleeps in the kernel is reaped when it wakes up.
    fn release_helper(&mut self, mut helper: Helper, kill: bool) {
        if kill {
            helper.process.kill();
        }
        self.released_helpers.push(helper);
    }

    fn on_signals(&mut self) {
        if let Some(signals) = &self.signals {
            while let Ok(Some(_)) = signals.read_signal() {}
        }
        // The device stays: only its users and the host's shutdown decide when it ends.
        self.flush();
    }

    fn flush(&mut self) {
        self.flush_sent = true;
        self.send_to_worker(&ToWorker::Flush);
    }

    /// Sends without descriptors; the successor of a worker that exits gets the message too.
    fn send_to_worker(&mut self, message: &ToWorker) {
        if let Some(worker) = &self.worker
            && worker.ready.is_some()
            && worker.send(message, &[]).is_err()
        {
            // It does not read any more.
            worker.kill();
        }
    }

    fn on_worker_message(&mut self) {
        while let Some(worker) = &mut self.worker {
            let Some(message) = worker.receive() else { return };
            match message {
                FromWorker::Ready(ready) => {
                    self.record.size_sectors = ready.device_bytes / crate::units::SECTOR;
                    self.record.cluster_sectors = ready.cluster_sectors;
                    self.record.fmt_version = ready.fmt_version;
                    worker.ready = Some(ready);
                    if self.flush_sent {
                        self.flush();
                    }
                }
                FromWorker::Slots => self.slots = std::mem::take(&mut worker.slots),
                FromWorker::Failed { code, message } => worker.refused = Some(RemoteError { code, message }),
                FromWorker::Closed { error } => worker.closed = Some(error),
                FromWorker::Merged { error } => {
                    worker.merged = Some(error);
                    self.on_merge_outcome();
                }
                FromWorker::Prepared => worker.prepared = true,
                // `Worker::receive` has handled it.
                FromWorker::Unsupported { .. } => {}
                FromWorker::Retired { error } => worker.retired = Some(error),
                FromWorker::Switched { warning } => worker.switched = Some(warning),
                FromWorker::Finished { error } => {
                    worker.finished = Some(error.clone());
                    self.on_former_top_finished(error);
                }
                FromWorker::Flushed { error } => {
                    self.flush_sent = false;
                    let reply = error.map_or(Answer::Done, Answer::from);
                    self.flushing.drain(..).for_each(|c| control::answer(&c, &reply));
                }
            }
        }
    }

    /// The worker has exited: starts another one, unless the exit was expected.
    fn on_worker_exit(&mut self) {
        let Some(worker) = &mut self.worker else { return };
        let killed = worker.reap();
        worker.exited = true;
        if self.ending || self.changing || worker.closed.is_some() {
            return;
        }
        let (ready, refused) = (worker.ready.is_some(), worker.refused.clone());
        // Before the device exists no successor is needed; the attach that waits for the first worker sees the exit.
        if self.record.state == "starting" && !ready {
            self.ending = true;
            return;
        }
        self.worker = None;
        let why = refused.map_or_else(|| "it exited".into(), |e| e.message);
        match self.restarts.next_start(host::now(), ready, killed) {
            Some(at) => self.restart = Some(at),
            None => self.fail(format!("no worker can serve it: {why}")),
        }
    }

    fn fail(&mut self, why: String) {
        log(
            &self.record.name,
            &format!("{why}; its I/O waits until ploop reload finds it right again, or umount --abort gives it up"),
        );
        self.failed = Some(why.clone());
        self.record.state = "failed".into();
        self.save();
        let reply = Answer::Error { code: Kind::Device.code(), message: why };
        let waiting = self.flushing.drain(..).chain(self.finishing.drain(..)).chain(self.merging.drain(..));
        waiting.for_each(|c| control::answer(&c, &reply));
    }

    /// Starts a worker; a failure counts as a failed start.
    fn start_worker(&mut self, takeover: bool) {
        let Some(fds) = &self.fds else { return };
        self.start.takeover = takeover;
        match Worker::start(fds, &self.start, &self.slots) {
            Ok(worker) => {
                self.record.worker = worker.id;
                self.worker = Some(worker);
                self.save();
            }
            Err(e) => match self.restarts.next_start(host::now(), false, false) {
                Some(at) => self.restart = Some(at),
                None => self.fail(e.to_string()),
            },
        }
    }

    /// Writes the record. After a failure only `ploop list` shows old data.
    fn save(&mut self) {
        if self.dir.as_os_str().is_empty() {
            return;
        }
        if let Err(e) = runtime::write_record(&self.dir, &self.record) {
            log(&self.record.name, &e.to_string());
        }
    }

    fn on_clients(&mut self, readable: &[usize]) {
        for i in readable.iter().rev() {
            match self.clients[*i].receive() {
                ClientEvent::Nothing => {}
                ClientEvent::Closed => drop(self.clients.swap_remove(*i)),
                ClientEvent::Command(command, fds) => {
                    let client = self.clients.swap_remove(*i).sock;
                    self.handle_command(command, fds, client);
                }
            }
        }
    }
}

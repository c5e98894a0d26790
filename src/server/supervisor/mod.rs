//! The supervisor: holds what a device needs to exist (the queue's connection, the shared memory, the images' identities)
//! and keeps one worker serving it. One thread, one poll loop, nothing that can wait for the device itself.
//!
//! Longer work ([`attach`], [`detach`]) runs as straight code that keeps turning the loop
//! with [`Supervisor::poll_once`], so that a worker's exit is noticed and clients are answered at any time.
#![forbid(unsafe_code)]

pub mod attach;
mod chain_plan;
mod chain_state;
mod chain_switch;
mod clients;
mod commands;
mod detach;
mod give_back;
mod grow;
mod last_mount;
mod maintenance;
mod merge;
mod names;
mod registration;
pub mod resume;
mod track;
mod worker_slot;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::error::{Kind, Result};
use crate::server::descriptors::Descriptors;
use crate::server::helper::Helper;
use crate::server::jobs::{Job, JobEvent};
use crate::server::kernel_log::log;
use crate::server::nodes::Nodes;
use crate::server::proto::{Answer, DeviceRecord, FromWorker, ToWorker, WorkerStart, own_greeting};
use crate::server::remote_error::RemoteError;
use crate::server::shm::Shm;
use crate::server::supervisor::chain_state::ChainState;
use crate::server::supervisor::clients::{Awaited, Clients};
use crate::server::supervisor::give_back::GivingBack;
use crate::server::supervisor::last_mount::LastMount;
use crate::server::supervisor::names::{Followed, Names};
use crate::server::supervisor::track::Tracking;
use crate::server::supervisor::worker_slot::{Exit, WorkerSlot};
use crate::server::transport::Binding;
use crate::server::{frame, runtime, stopped};
use crate::sys::host;

/// Longest sleep.
const TICK: Duration = Duration::from_secs(2);

/// What one poll of the loop waits for.
enum Source {
    Extra,
    Messages,
    WorkerExit,
    Listener,
    Signals,
    Events,
    Client(usize),
    Tracker,
    Scan,
}

/// See the module.
pub struct Supervisor {
    dir: PathBuf,
    record: DeviceRecord,
    /// None once the device was given up: closing the last descriptor ends the connection.
    fds: Option<Descriptors>,
    shm: Option<Shm>,
    slot: WorkerSlot,
    chain: ChainState,
    names: Names,
    clients: Clients,
    signals: Option<SignalFd>,
    /// When to look at the worker's heartbeat.
    look_due: Instant,
    /// A flush that the worker has not answered; its successor gets it anew.
    flush_sent: bool,
    /// Space that no worker has given back yet.
    giving_back: Option<GivingBack>,
    /// The client that copies the top.
    tracking: Option<Tracking>,
    /// No worker can serve the device: why.
    failed: Option<String>,
    /// Another process has detached the block device.
    lost: bool,
    last_mount: LastMount,
    /// The last mount has gone, and the device ends with it.
    unmounted: bool,
    /// They are reaped when they exit.
    released_helpers: Vec<Helper>,
    last_log: String,
}

impl Supervisor {
    /// For a device in folder `dir`; starts nothing.
    fn new(dir: PathBuf, record: DeviceRecord, start: WorkerStart, fds: Descriptors) -> Result<Supervisor> {
        let clients = Clients::new(&fds.listener)?;
        let mut asked = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            asked.add(signal);
        }
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = match host::is_simulated() {
            true => None,
            false => asked.thread_block().and_then(|()| SignalFd::with_flags(&asked, flags)).ok(),
        };
        let names = Names::new(Nodes::new(&runtime::dev_dir(), &record.name));
        let shm = Shm::map(fds.shm.as_fd()).ok();
        // The record may be the one of an older supervisor.
        let record = DeviceRecord { greeting: own_greeting(), ..record };
        let last_mount = LastMount::new(start.attach.until_unmounted);
        Ok(Supervisor {
            dir,
            record,
            fds: Some(fds),
            shm,
            slot: WorkerSlot::default(),
            chain: ChainState::new(start),
            names,
            clients,
            signals,
            look_due: host::now(),
            flush_sent: false,
            giving_back: None,
            tracking: None,
            failed: None,
            lost: false,
            last_mount,
            unmounted: false,
            released_helpers: Vec::new(),
            last_log: String::new(),
        })
    }

    /// Serves until the device has ended.
    fn run(mut self) {
        host::show_device(&self.record.name);
        if !self.dir.as_os_str().is_empty() && self.record.state == "running" {
            // A device that runs is not stopped any more.
            let _ = stopped::forget(&self.record.name);
        }
        loop {
            self.poll_once(host::now() + TICK, None);
            if self.is_aborted() {
                return self.abort();
            }
            if let Some(change) = self.chain.next() {
                self.change(change);
                continue;
            }
            let wanted = self.clients.is_awaited(Awaited::Stop) || self.lost || self.unmounted;
            if self.failed.is_none() && wanted && self.stop() {
                return;
            }
            if std::mem::take(&mut self.unmounted) {
                self.last_mount.busy();
            }
        }
    }

    /// A client wants the device given up.
    fn is_aborted(&self) -> bool {
        self.clients.is_awaited(Awaited::Abort)
    }

    /// One turn of the loop, until something happened or `until`. True: `extra` can be read.
    fn poll_once(&mut self, until: Instant, extra: Option<BorrowedFd>) -> bool {
        let now = host::now();
        let table = self.names.table_due().filter(|_| self.record.state == "running");
        let look = if self.record.state == "running" { self.names.look_due() } else { now + TICK };
        let until = [Some(until), Some(look), self.slot.due(), table].into_iter().flatten().min();
        let (mut sources, mut polls) = (Vec::with_capacity(8), Vec::with_capacity(8));
        let mut watch = |source, fd: Option<_>| {
            if let Some(fd) = fd {
                sources.push(source);
                polls.push(PollFd::new(fd, PollFlags::POLLIN));
            }
        };
        watch(Source::Extra, extra);
        watch(Source::WorkerExit, self.slot.exit_fd());
        watch(Source::Messages, self.slot.message_fd());
        watch(Source::Listener, self.clients.listener());
        for (i, client) in self.clients.connections().enumerate() {
            watch(Source::Client(i), Some(client));
        }
        watch(Source::Tracker, self.tracking.as_ref().map(Tracking::connection));
        watch(Source::Events, self.names.events());
        watch(Source::Signals, self.signals.as_ref().map(AsFd::as_fd));
        watch(Source::Scan, self.names.scan());
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
                Source::Events => self.names.on_events(&self.record.backing),
                Source::Signals => self.on_signals(),
                Source::Scan => self.end_scan(),
                Source::Tracker => self.on_tracker(),
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
        if ready.iter().any(|s| matches!(s, Source::Listener)) {
            self.clients.accept();
        }
        self.tick();
        extra_ready
    }

    fn tick(&mut self) {
        if self.slot.take_due() {
            self.start_worker(true);
        }
        self.clients.expire();
        self.released_helpers.retain_mut(|h| h.process.runs());
        if self.record.state == "running" {
            self.chain.retry_end_merge();
            if self.names.take_look_due() {
                self.follow();
                self.stay_registered();
            }
            self.watch_worker();
            self.unmounted |= self.last_mount.has_gone(&self.binding());
            if self.names.take_table_due() {
                let scan = self.helper(&Job::Scan { binding: self.binding() }).ok();
                self.names.set_scan(scan);
            }
        }
        if let Some(late) = self.names.take_late_scan() {
            self.release_helper(late, true);
        }
    }

    /// Notices a worker that stands still, and replaces it after a minute. One that sleeps in the kernel ends when it
    /// wakes up.
    fn watch_worker(&mut self) {
        let now = host::now();
        if now < self.look_due {
            return;
        }
        self.look_due = now + worker_slot::LOOK;
        let Some(shm) = &self.shm else { return };
        let stalled = self.slot.stalled().is_some();
        let replaced = self.slot.look(shm.heartbeat());
        if !stalled && self.slot.stalled().is_some() {
            log(&self.record.name, "its worker stands still (stopped, or it waits in the kernel): I/O waits");
        }
        if replaced {
            log(&self.record.name, "its worker has stood still for a minute: it is killed, and another one takes over");
            self.slot.kill();
        }
    }

    /// Keeps the names as the kernel's partitions are, and notices the end of the block device.
    fn follow(&mut self) {
        match self.names.follow(&self.record) {
            Ok(Followed::Present) => {}
            Ok(Followed::Lost) => self.lost = true,
            Err(e) => self.log_once(&e.to_string()),
        }
    }

    /// Asks for a look into the partition table now, and waits for it a little.
    fn scan_now(&mut self, limit: Duration) {
        let Ok(helper) = self.helper(&Job::Scan { binding: self.binding() }) else { return };
        let done = self.helper_event(&helper, host::now() + limit).is_some();
        self.release_helper(helper, !done);
        self.follow();
    }

    fn end_scan(&mut self) {
        if let Some(scan) = self.names.take_scan() {
            self.release_helper(scan, true);
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
            if host::now() >= end || self.is_aborted() {
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
        self.slot.send(&ToWorker::Flush);
    }

    fn on_worker_message(&mut self) {
        while let Some(worker) = self.slot.worker_mut() {
            let Some(message) = worker.receive() else { return };
            match message {
                FromWorker::Ready(ready) => {
                    self.record.size_sectors = ready.device_bytes / crate::units::SECTOR;
                    self.record.cluster_sectors = ready.cluster_sectors;
                    self.record.fmt_version = ready.fmt_version;
                    worker.ready = Some(ready);
                    worker.serving_since = Some(host::now());
                    if self.flush_sent {
                        self.flush();
                    }
                    self.repeat_give_back();
                    self.repeat_tracking();
                }
                FromWorker::Journal => self.slot.take_journal(),
                FromWorker::Failed { code, message } => worker.refused = Some(RemoteError { code, message }),
                FromWorker::Closed { error } => worker.closed = Some(error),
                FromWorker::Merged { error } => {
                    worker.merged = Some(error);
                    self.on_merge_outcome();
                }
                FromWorker::GaveBack { token, outcome } => self.on_gave_back(token, outcome),
                FromWorker::Tracked(report) => self.on_tracked(report),
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
                    self.clients.answer(Awaited::Flush, &reply);
                }
            }
        }
    }

    /// The worker has exited: starts another one, unless the exit was expected.
    fn on_worker_exit(&mut self) {
        // Before the device exists no successor is needed; the attach that waits for the first worker sees the exit.
        match self.slot.on_exit(self.record.state == "starting", self.shm.as_ref()) {
            Exit::Expected | Exit::Restart { killed: true } => {}
            Exit::Restart { killed: false } => self.on_failed_worker(),
            Exit::Final(why) => self.fail(format!("no worker can serve it: {why}")),
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
        self.answer_give_back(&reply);
        self.refuse_tracking(&reply);
        for awaited in [Awaited::Flush, Awaited::FormerTop, Awaited::Merge] {
            self.clients.answer(awaited, &reply);
        }
    }

    /// Starts a worker; a failure counts as a failed start.
    fn start_worker(&mut self, takeover: bool) {
        let Some(fds) = &self.fds else { return };
        self.chain.set_takeover(takeover);
        match self.slot.start(fds, self.chain.start()) {
            Ok(worker) => {
                self.record.worker = worker;
                self.save();
            }
            Err(e) => {
                if let Err(e) = self.slot.start_failed(e) {
                    self.fail(e.to_string());
                }
            }
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
            if let Some(asked) = self.clients.receive(*i) {
                self.handle_command(asked);
            }
        }
    }
}

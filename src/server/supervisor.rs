//! The supervisor: holds what keeps a device alive (the FUSE connection, the shared memory, the images' identities) and
//! sees to it that somebody serves it. One thread, one poll loop, nothing that can wait for the device itself.
//!
//! Longer work ([`birth`](super::birth), [`end`](super::end)) runs as straight code that keeps turning the loop with
//! [`Supervisor::turn`], so that a worker's death is noticed and clients are answered at any time.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::error::{IoContext, Kind, Result};
use crate::server::control::{self, Client, Heard};
use crate::server::helper::{Helper, Job, JobEvent};
use crate::server::loopdev::Binding;
use crate::server::merge::MergeStep;
use crate::server::merge_levels::LevelsMerge;
use crate::server::nodes::Nodes;
use crate::server::proto::{Answer, DeviceRecord, FromWorker, ToWorker, WorkerStart};
use crate::server::shm::Shm;
use crate::server::swap::Change;
use crate::server::workers::{Deaths, Descriptors, Worker};
use crate::server::{frame, partitions, runtime, uevents};

/// Longest sleep.
const TICK: Duration = Duration::from_secs(2);
/// Partitions are looked at so often where the kernel's announcements do not arrive.
const BLIND_TICK: Duration = Duration::from_millis(500);
/// After the last change of a partition table, until it is read by us: whoever changes it may be telling the kernel.
const TABLE_PAUSE: Duration = Duration::from_millis(300);
/// A scan that does not end.
const SCAN: Duration = Duration::from_secs(30);

/// Who is being waited for in a turn of the loop.
enum Source {
    Extra,
    Messages,
    Death,
    Listener,
    Signals,
    Events,
    Client(usize),
    Scan,
}

/// See the module.
pub struct Supervisor {
    pub(super) dir: PathBuf,
    pub(super) record: DeviceRecord,
    pub(super) start: WorkerStart,
    /// None once the device was given up: closing the last descriptor ends the connection.
    pub(super) fds: Option<Descriptors>,
    pub(super) worker: Option<Worker>,
    /// Where the last worker that served keeps its requests; empty: it has answered all, or the kernel keeps them.
    pub(super) slots: Vec<OwnedFd>,
    pub(super) deaths: Deaths,
    /// When to start the next worker.
    restart: Option<Instant>,
    /// No worker can serve the device: why.
    pub(super) failed: Option<String>,
    /// A worker's end is expected: it has closed the image, or the device is given up.
    pub(super) ending: bool,
    listener: UnixListener,
    clients: Vec<Client>,
    /// Clients that wait for the end of the device.
    pub(super) stopping: Vec<OwnedFd>,
    pub(super) aborting: Vec<OwnedFd>,
    /// Changes of the chain that were asked for.
    pub(super) changes: VecDeque<Change>,
    /// A change is under way: a worker's death is for it to deal with.
    pub(super) changing: bool,
    /// Who wants to be told when requests are about to be held.
    pub(super) asker: Option<OwnedFd>,
    /// The worker of the new chain, while the old one retires.
    pub(super) waiting: Option<Worker>,
    /// Clients that wait until the former top is finished.
    pub(super) finishing: Vec<OwnedFd>,
    /// The merge of frozen levels that is under way.
    pub(super) levels_merge: LevelsMerge,
    /// Clients that wait for the end of a merge.
    pub(super) merging: Vec<OwnedFd>,
    pub(super) merge_step: Option<MergeStep>,
    pub(super) unmerge_due: Option<Instant>,
    /// Clients that wait for a flush.
    pub(super) flushing: Vec<OwnedFd>,
    /// The signal handler's share of [`flushing`](Self::flushing).
    pub(super) flush_sent: bool,
    pub(super) nodes: Nodes,
    events: Option<OwnedFd>,
    signals: Option<SignalFd>,
    /// When to look for partitions in the table.
    table_due: Option<Instant>,
    scan: Option<(Helper, Instant)>,
    had_partitions: bool,
    pub(super) shm: Option<Shm>,
    /// The block device went away without us.
    pub(super) lost: bool,
    pub(super) retired: Vec<Helper>,
    last_log: String,
}

impl Supervisor {
    /// For a device in folder `dir`; starts nothing.
    pub(super) fn new(dir: PathBuf, record: DeviceRecord, start: WorkerStart, fds: Descriptors) -> Result<Supervisor> {
        let listener = fds.listener.try_clone().ctx(Kind::Sys, || "cannot duplicate the control socket")?;
        fcntl(&listener, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .ctx(Kind::Sys, || "cannot prepare the control socket")?;
        let mut asked = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            asked.add(signal);
        }
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = asked.thread_block().and_then(|()| SignalFd::with_flags(&asked, flags)).ok();
        let nodes = Nodes::new(&runtime::dev_dir(), &record.name);
        let shm = Shm::map(fds.shm.as_fd()).ok();
        Ok(Supervisor {
            dir,
            record,
            start,
            fds: Some(fds),
            worker: None,
            slots: Vec::new(),
            deaths: Deaths::default(),
            restart: None,
            failed: None,
            ending: false,
            listener: UnixListener::from(listener),
            clients: Vec::new(),
            stopping: Vec::new(),
            aborting: Vec::new(),
            changes: VecDeque::new(),
            changing: false,
            asker: None,
            waiting: None,
            finishing: Vec::new(),
            levels_merge: LevelsMerge::default(),
            merging: Vec::new(),
            merge_step: None,
            unmerge_due: None,
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
            retired: Vec::new(),
            last_log: String::new(),
        })
    }

    /// Serves until the device has ended.
    pub(super) fn run(mut self) {
        loop {
            self.turn(Instant::now() + TICK, None);
            if !self.aborting.is_empty() {
                return self.abort();
            }
            if let Some(change) = self.changes.pop_front() {
                if self.change(change) {
                    return;
                }
                continue;
            }
            if self.failed.is_none() && self.stopping.is_empty() {
                self.look_after_orphan();
            }
            if self.failed.is_none() && (!self.stopping.is_empty() || self.lost) && self.stop() {
                return;
            }
        }
    }

    /// One turn of the loop, until something happened or `until`. True: `extra` can be read.
    pub(super) fn turn(&mut self, until: Instant, extra: Option<BorrowedFd>) -> bool {
        let now = Instant::now();
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
            if !worker.dead {
                watch(Source::Death, worker.pidfd.as_fd());
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
        let happened = poll(&mut polls, PollTimeout::try_from(wait).unwrap_or(PollTimeout::ZERO)).unwrap_or(0) > 0;
        let ready: Vec<Source> = sources
            .into_iter()
            .zip(&polls)
            .filter(|(_, p)| happened && p.revents().is_some_and(|r| !r.is_empty()))
            .map(|(source, _)| source)
            .collect();
        drop(polls);
        let mut extra_ready = false;
        let mut spoken = Vec::new();
        for source in &ready {
            match source {
                Source::Extra => extra_ready = true,
                Source::Messages => self.hear_worker(),
                Source::Client(i) => spoken.push(*i),
                Source::Events => self.hear_events(),
                Source::Signals => self.hear_signals(),
                Source::Scan => self.end_scan(),
                Source::Death | Source::Listener => {}
            }
        }
        // Last, because the indices of the others change by it.
        self.hear_clients(&spoken);
        if ready.iter().any(|s| matches!(s, Source::Death)) {
            // Its last words first.
            self.hear_worker();
            self.bury();
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
        let now = Instant::now();
        if self.restart.is_some_and(|at| at <= now) {
            self.restart = None;
            self.start_worker(true);
        }
        self.clients.retain(|c| !c.silent_too_long());
        self.retired.retain_mut(|h| matches!(h.child.try_wait(), Ok(None)));
        if self.record.state == "running" {
            self.unmerge_again();
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

    /// Keeps the nodes as the kernel's partitions are, and notices the end of the block device.
    fn follow(&mut self) {
        if !runtime::backing_is_ours(&self.record) {
            // Somebody detached it. Its names must not outlive it: the next user of the number gets another's disk.
            self.nodes.clear();
            self.lost = true;
            return;
        }
        let known = partitions::known(&self.record.backing);
        if known.is_empty() && self.had_partitions {
            self.table_due.get_or_insert(Instant::now() + TABLE_PAUSE);
        }
        self.had_partitions = !known.is_empty();
        if let Err(e) = self.nodes.update(self.record.rdev, &known) {
            self.log_once(&e.to_string());
        }
    }

    fn log_once(&mut self, text: &str) {
        // The same trouble comes back with every tick.
        if self.last_log != text {
            log(&self.record.name, text);
            self.last_log = text.into();
        }
    }

    /// The disk behind the device.
    pub(super) fn binding(&self) -> Binding {
        let r = &self.record;
        Binding { backing: r.backing.clone(), rdev: r.rdev, diskseq: r.diskseq }
    }

    /// Starts a helper process.
    pub(super) fn helper(&self, job: &Job) -> Result<Helper> {
        match &self.fds {
            Some(fds) => Helper::start(&fds.program(), job),
            None => Helper::start("/proc/self/exe".as_ref(), job),
        }
    }

    /// The next word of a helper, while the loop turns; `None`: not before `end`, or the device is being given up.
    pub(super) fn helper_event(&mut self, helper: &Helper, end: Instant) -> Option<JobEvent> {
        loop {
            let ready = self.turn(end, Some(helper.sock.as_fd()));
            if ready {
                return Some(match frame::recv_within::<JobEvent>(&helper.sock, Duration::ZERO) {
                    Ok(Some((event, _))) => event,
                    _ => JobEvent::Error {
                        code: Kind::Sys.code(),
                        message: "a helper process of ploop-server died".into(),
                    },
                });
            }
            if Instant::now() >= end || !self.aborting.is_empty() {
                return None;
            }
        }
    }

    /// Forgets a helper; one that sleeps in the kernel is reaped when it wakes up.
    pub(super) fn retire(&mut self, mut helper: Helper, kill: bool) {
        if kill {
            let _ = helper.child.kill();
        }
        self.retired.push(helper);
    }

    /// Asks for a look into the partition table now, and waits for it a little.
    pub(super) fn scan_now(&mut self, limit: Duration) {
        let Ok(helper) = self.helper(&Job::Scan { binding: self.binding() }) else { return };
        let done = self.helper_event(&helper, Instant::now() + limit).is_some();
        self.retire(helper, !done);
        self.follow();
    }

    fn end_scan(&mut self) {
        if let Some((helper, _)) = self.scan.take() {
            self.retire(helper, true);
        }
    }

    fn hear_events(&mut self) {
        let Some(events) = &self.events else { return };
        let news = uevents::drain(events, &self.record.backing);
        // A table without partitions in the kernel: perhaps there is one that it cannot read.
        if news.changed && partitions::known(&self.record.backing).is_empty() {
            self.table_due = Some(Instant::now() + TABLE_PAUSE);
        }
    }

    fn hear_signals(&mut self) {
        if let Some(signals) = &self.signals {
            while let Ok(Some(_)) = signals.read_signal() {}
        }
        // The device stays: only its users and the host's shutdown decide when it ends.
        self.flush();
    }

    pub(super) fn flush(&mut self) {
        self.flush_sent = true;
        self.tell_worker(&ToWorker::Flush);
    }

    /// Sends without descriptors; a dying worker's successor is told again.
    pub(super) fn tell_worker(&mut self, message: &ToWorker) {
        if let Some(worker) = &self.worker
            && worker.ready.is_some()
            && worker.send(message, &[]).is_err()
        {
            // It does not read any more.
            worker.kill();
        }
    }

    fn hear_worker(&mut self) {
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
                FromWorker::Failed { code, message } => worker.refused = Some((code, message)),
                FromWorker::Closed { error } => worker.closed = Some(error),
                FromWorker::Yielded { error } => worker.yielded = Some(error),
                FromWorker::Merged { error } => {
                    worker.merged = Some(error);
                    self.merge_told();
                }
                FromWorker::Prepared => worker.prepared = true,
                FromWorker::Retired { error } => worker.retired = Some(error),
                FromWorker::Switched { warning } => worker.switched = Some(warning),
                FromWorker::Finished { error } => {
                    worker.finished = Some(error.clone());
                    self.finished(error);
                }
                FromWorker::Flushed { error } => {
                    self.flush_sent = false;
                    let reply = match error {
                        None => Answer::Done,
                        Some((code, message)) => Answer::Error { code, message },
                    };
                    self.flushing.drain(..).for_each(|c| control::answer(&c, &reply));
                }
            }
        }
    }

    /// The worker is dead: another one, unless that is how it should be.
    fn bury(&mut self) {
        let Some(worker) = &mut self.worker else { return };
        let killed = worker.reap();
        worker.dead = true;
        if self.ending || self.changing || worker.closed.is_some() {
            return;
        }
        let (ready, refused) = (worker.ready.is_some(), worker.refused.clone());
        // Before the device exists nobody needs a successor; the one who waits for the first worker sees the end.
        if self.record.state == "starting" && !ready {
            self.ending = true;
            return;
        }
        self.worker = None;
        let why = refused.map_or_else(|| "it died".into(), |(_, message)| message);
        match self.deaths.add(Instant::now(), ready, killed) {
            Some(at) => self.restart = Some(at),
            None => self.fail(format!("no worker can serve it: {why}")),
        }
    }

    pub(super) fn fail(&mut self, why: String) {
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

    /// Starts a worker; a failure counts as its death.
    pub(super) fn start_worker(&mut self, takeover: bool) {
        let Some(fds) = &self.fds else { return };
        self.start.takeover = takeover;
        match Worker::start(fds, &self.start, &self.slots) {
            Ok(worker) => {
                self.record.worker = worker.id;
                self.worker = Some(worker);
                self.save();
            }
            Err(e) => match self.deaths.add(Instant::now(), false, false) {
                Some(at) => self.restart = Some(at),
                None => self.fail(e.to_string()),
            },
        }
    }

    /// Writes the record. A failure costs only what others can learn of us.
    pub(super) fn save(&mut self) {
        if self.dir.as_os_str().is_empty() {
            return;
        }
        if let Err(e) = runtime::write_record(&self.dir, &self.record) {
            log(&self.record.name, &e.to_string());
        }
    }

    fn hear_clients(&mut self, spoken: &[usize]) {
        for i in spoken.iter().rev() {
            match self.clients[*i].hear() {
                Heard::Nothing => {}
                Heard::Over => drop(self.clients.swap_remove(*i)),
                Heard::Command(command, fds) => {
                    let client = self.clients.swap_remove(*i).sock;
                    self.obey(command, fds, client);
                }
            }
        }
    }
}

/// One line for the host's administrator, into the kernel's log: no file of ours could be on a device of ours.
pub(super) fn log(name: &str, text: &str) {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let kmsg = std::fs::File::options().write(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg");
    if let Ok(mut kmsg) = kmsg {
        let line: String = format!("ploop-server: {name}: {text}\n").chars().take(900).collect();
        let _ = kmsg.write_all(line.as_bytes());
    }
}

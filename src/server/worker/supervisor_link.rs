//! The main thread: handles the supervisor's messages, feeds the engine its ticks, replaces a supervisor that exited.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};

use crate::bail;
use crate::engine::api::{Errno, Request, RequestKind, Status, TrackControl};
use crate::error::{Error, IoContext, Kind, Result};
use crate::server::descriptors::SwitchFds;
use crate::server::greeting::{self, Incoming};
use crate::server::proto::{ChainSwitch, FromWorker, ProcessId, ToWorker};
use crate::server::remote_error::RemoteError;
use crate::server::{frame, runtime};
use crate::sys::host;

use super::core::{Core, MAIN_THREAD, Notice, OWN_FLUSH, Pending, THREADS};
use super::give_back::{Giving, tell};
use super::init::Inherited;
use super::queue::Inbox;
use super::request_journal::RequestJournal;
use super::supervisor_restart::{SEND_LIMIT, has_successor, start_supervisor, try_top_lock};
use super::{linger, locked, track};

const TICK: Duration = Duration::from_secs(1);
/// Ticks without a request after which the device gives the buffers back that it got under load.
const IDLE_TICKS: u32 = 30;
/// Longest wait for a supervisor that does not take what it must have.
const JOURNAL_LIMIT: Duration = Duration::from_secs(60);
/// Pauses between attempts to start a supervisor: doubled from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// A supervisor that ran so long resets the pause.
const STABLE_AFTER: Duration = Duration::from_secs(10);
/// A retiring worker answers what it has read within this, else it is killed and the chain stays.
const DRAIN: Duration = Duration::from_secs(30);
/// Looks at a draining engine.
const DRAIN_TICK: Duration = Duration::from_millis(1);
/// Looks at the lock of the successor.
const TOP_LOCK_PAUSE: Duration = Duration::from_millis(50);

/// Why serving ended.
#[derive(Debug)]
pub enum End {
    /// The engine has closed.
    Closed(Result<(), Errno>),
    /// The engine has closed in favour of a worker with another chain, whose descriptors these are; or it could not.
    Retired(Box<ChainSwitch>, SwitchFds, Result<()>),
}

/// A retirement under way.
#[derive(Debug)]
struct Retiring {
    switch: ChainSwitch,
    fds: SwitchFds,
    /// I/O threads that read no more requests.
    quiet: usize,
    /// The engine has got its `Close`.
    closing: bool,
    end: Instant,
}

/// The supervisor that the device's record names.
fn recorded_supervisor(device: &str) -> ProcessId {
    let record = runtime::read_record(&runtime::device_dir(device)).ok().flatten();
    record.map(|r| r.supervisor).unwrap_or_default()
}

/// The connection to the supervisor, whichever process that is.
#[derive(Debug)]
pub struct SupervisorLink {
    /// None: the supervisor exited, and a new one is to be started.
    socket: Option<OwnedFd>,
    since: Instant,
    pause: Duration,
    next_try: Instant,
    flushing: bool,
    flush_again: bool,
    retiring: Option<Retiring>,
    /// Who asked for it.
    retired_by: ProcessId,
    /// What became of the merge: an error, or none.
    merge_result: Option<Option<RemoteError>>,
    giving: Giving,
}

impl SupervisorLink {
    /// Takes the first message. `None`: the supervisor went away before.
    pub fn start(socket: OwnedFd) -> Result<Option<(SupervisorLink, Inherited)>> {
        frame::prepare(&socket);
        let Some((first, fds)) = frame::recv::<ToWorker>(&socket)? else { return Ok(None) };
        let ToWorker::Start(start) = first else {
            bail!(Protocol, "the supervisor began with {first:?}: Start wanted");
        };
        let inherited = Inherited::new(start, fds)?;
        let now = host::now();
        let link = SupervisorLink {
            socket: Some(socket),
            since: now,
            pause: FIRST_PAUSE,
            next_try: now,
            flushing: false,
            flush_again: false,
            retiring: None,
            retired_by: ProcessId::default(),
            merge_result: None,
            giving: Giving::default(),
        };
        Ok(Some((link, inherited)))
    }

    /// Sends the supervisor a message.
    pub fn send(&self, message: &FromWorker) -> Result<()> {
        match &self.socket {
            Some(socket) => frame::send_within(socket, message, &[], SEND_LIMIT),
            None => bail!(Protocol, "the supervisor has exited"),
        }
    }

    /// Gives the supervisor the slots that requests are read into from now on. Without it a successor would not find
    /// them; if there is no supervisor any more, the next one gets them from this worker.
    pub fn send_journal(&self, journal: &RequestJournal) -> Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        match frame::send_within(socket, &FromWorker::Journal, &journal.fds(), JOURNAL_LIMIT) {
            Err(e) if !self.is_closed() => Err(e),
            _ => Ok(()),
        }
    }

    /// The supervisor has closed the connection.
    pub fn is_closed(&self) -> bool {
        let Some(socket) = &self.socket else { return true };
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
        let _ = host::poll(&mut fds, PollTimeout::ZERO);
        fds[0].revents().is_some_and(|r| r.contains(PollFlags::POLLHUP))
    }

    /// Waits for `Go`; false: the supervisor gave the change up, or exited.
    pub fn await_go(&self) -> bool {
        let Some(socket) = &self.socket else { return false };
        matches!(frame::recv::<ToWorker>(socket), Ok(Some((ToWorker::Go, _))))
    }

    /// Waits until the former top is finished, and reports it.
    pub fn await_finisher(&self, core: &Core, inherited: &Inherited) {
        if inherited.start.finish.is_none() {
            return;
        }
        while locked(&core.finished).is_none() {
            host::sleep(Duration::from_millis(5));
        }
        self.finished(core);
    }

    /// Closes a device that was never used, for a supervisor that is gone.
    pub fn close_unused(&mut self, core: &Core, inherited: &Inherited) -> Result<(), Errno> {
        self.socket = None;
        core.closing.store(true, Ordering::Release);
        core.submit_event(MAIN_THREAD, Pending::Close);
        match self.serve(core, inherited) {
            End::Closed(result) => result,
            // Without a supervisor no process requests it.
            End::Retired(..) => Err(libc::EIO),
        }
    }

    /// Serves until the engine has closed.
    pub fn serve(&mut self, core: &Core, inherited: &Inherited) -> End {
        let mut notices = Vec::new();
        self.giving.set_own(inherited.start.attach.auto_compact);
        let mut tick = host::now() + TICK;
        let (mut full, mut idle) = (false, 0_u32);
        loop {
            let draining = self.retiring.as_ref().is_some_and(|r| r.quiet == THREADS && !r.closing);
            self.wait(core, if draining { tick.min(host::now() + DRAIN_TICK) } else { tick });
            let now = host::now();
            if now >= tick {
                tick = now + TICK;
                core.shm.beat();
                core.note_changed();
                // The tick has all that waits for space tried once more: just then nothing waits.
                let waits = core.status().no_space;
                core.submit_event(MAIN_THREAD, Pending::Tick);
                let status = core.status();
                let status = Status { no_space: waits || status.no_space, ..status };
                core.shm.publish(&status);
                if std::mem::replace(&mut full, status.no_space) != full {
                    core.log.space(&core.top().name, full);
                }
                idle = if core.active.swap(false, Ordering::Relaxed) { 0 } else { idle + 1 };
                self.giving.tick(core, &status, idle);
                if idle == IDLE_TICKS && core.pool.keep_none() {
                    core.inboxes.iter().for_each(Inbox::ring);
                }
                if !status.no_space {
                    core.pool.shrink(&core.memory);
                } else if core.starving.load(Ordering::Acquire) {
                    // All buffers belong to writes that wait for space: time to make more.
                    core.inboxes[0].ring();
                }
            }
            core.notices.take(&mut notices);
            for notice in notices.drain(..) {
                match notice {
                    Notice::Flushed(result) => self.flushed(core, result),
                    Notice::Merged(result) => self.merged(core, result),
                    Notice::GaveBack(result) => tell(&self.socket, self.giving.done(core, result)),
                    Notice::Tracked(begun, result) => tell(&self.socket, track::report(core, begun, result)),
                    Notice::Finished => self.finished(core),
                    Notice::Quiet => {
                        if let Some(retiring) = &mut self.retiring {
                            retiring.quiet += 1;
                        }
                    }
                    Notice::Closed(result) => {
                        core.shm.publish(&core.status());
                        return match self.retiring.take() {
                            None => End::Closed(result),
                            Some(r) => {
                                let name = core.top().name.display();
                                let io = std::io::Error::from_raw_os_error;
                                let result = result.map_err(io).ctx(Kind::Fsync, || format!("cannot flush {name}"));
                                End::Retired(Box::new(r.switch), r.fds, result)
                            }
                        };
                    }
                }
            }
            if let Some(end) = self.drain(core) {
                return end;
            }
            self.on_message(core, inherited);
        }
    }

    /// Closes the engine as soon as all requests are answered and no BAT page waits for space.
    fn drain(&mut self, core: &Core) -> Option<End> {
        let retiring = self.retiring.as_mut().filter(|r| r.quiet == THREADS && !r.closing)?;
        // An answer may still be under way when the engine has forgotten the request.
        let status = core.status();
        if status.requests == 0 && !status.no_space && !self.flushing && core.all_answered() {
            linger::pause(retiring.switch.linger);
            retiring.closing = true;
            core.submit_event(MAIN_THREAD, Pending::Close);
            return None;
        }
        if host::now() < retiring.end {
            return None;
        }
        let late = format!(
            "requests to {} are still under way after {} s; is there space on its file system?",
            core.top().name.display(),
            DRAIN.as_secs()
        );
        let r = self.retiring.take()?;
        Some(End::Retired(Box::new(r.switch), r.fds, Err(Error::new(Kind::Sys, late))))
    }

    fn retire(&mut self, core: &Core, inherited: &Inherited, switch: ChainSwitch, fds: SwitchFds) {
        // The record names the supervisor that has just sent `Retire`.
        self.retired_by = recorded_supervisor(&inherited.start.device_name);
        if self.retiring.is_some() || core.closing.load(Ordering::Acquire) {
            core.log.line("the supervisor sent Retire to a worker that ends already".into());
            return;
        }
        self.retiring = Some(Retiring { switch, fds, quiet: 0, closing: false, end: host::now() + DRAIN });
        core.retiring.store(true, Ordering::Release);
        core.inboxes.iter().for_each(|i| i.ring());
    }

    fn finished(&self, core: &Core) {
        if let Some(error) = locked(&core.finished).clone() {
            // If no supervisor receives it: a new supervisor learns that nothing is left to be finished.
            let _ = self.send(&FromWorker::Finished { error });
        }
    }

    /// Waits, serving nothing, to be killed. If the supervisor exits first, one of the workers must start another one:
    /// the
    /// successor, once it has the lock on the top of its chain, else this one.
    pub fn await_kill(&mut self, core: &Core, inherited: &Inherited, retired: Option<(&ChainSwitch, &SwitchFds)>) -> ! {
        loop {
            if let Some(socket) = &self.socket {
                match frame::receive::<ToWorker>(socket) {
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => self.socket = None,
                }
                continue;
            }
            let lock = match retired {
                Some((switch, fds)) => {
                    let lock = try_top_lock(inherited, switch, fds);
                    // The device may even have been detached since, and its image mounted by another one.
                    if core.shm.serving() == switch.token {
                        host::exit(0);
                    }
                    // With the lock in hand, too: the successor may have retired itself meanwhile, in favour of a
                    // third.
                    if has_successor(&inherited.start.device_name, self.retired_by) {
                        host::exit(0);
                    }
                    match lock {
                        Ok(Some(lock)) => Some(lock),
                        Ok(None) => {
                            host::sleep(TOP_LOCK_PAUSE);
                            continue;
                        }
                        Err(e) => {
                            core.log.line(format!("the lock of the successor: {e}"));
                            None
                        }
                    }
                }
                None => None,
            };
            // The successor has read requests, which were lost with it and with the supervisor that had its journal. If
            // the device went on, their callers would wait for ever: with this worker it ends, and all I/O on it fails.
            // Where the kernel can give out requests again, and where no successor has read any, nothing is lost.
            if retired.is_some_and(|(switch, _)| core.journal.is_some() && core.shm.reading() == switch.token) {
                core.log.line("the supervisor and the worker of the new chain have exited: the device ends".into());
                host::exit(1);
            }
            match start_supervisor(core, inherited, retired) {
                // It starts a worker for the chain that is on disk.
                Ok(_) if retired.is_none() => host::exit(1),
                Ok(socket) => self.socket = Some(socket),
                Err(e) => {
                    core.log.line(format!("cannot start a new supervisor: {e}"));
                    drop(lock);
                    host::sleep(self.pause);
                    self.pause = (self.pause * 2).min(LAST_PAUSE);
                }
            }
        }
    }

    fn wait(&self, core: &Core, tick: Instant) {
        let mut end = tick;
        let mut fds = vec![PollFd::new(core.notices.as_fd(), PollFlags::POLLIN)];
        match &self.socket {
            Some(socket) => fds.push(PollFd::new(socket.as_fd(), PollFlags::POLLIN)),
            None if self.retiring.is_none() => end = end.min(self.next_try),
            None => {}
        }
        let left = end.saturating_duration_since(host::now()) + Duration::from_micros(999);
        // An interrupted wait is only a short one.
        let _ = host::poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
    }

    fn on_message(&mut self, core: &Core, inherited: &Inherited) {
        let closing = core.closing.load(Ordering::Acquire);
        let Some(socket) = &self.socket else {
            // A retiring worker checks first whether there is a successor.
            if !closing && self.retiring.is_none() && host::now() >= self.next_try {
                self.restart_supervisor(core, inherited);
            }
            return;
        };
        let received = frame::receive_within::<ToWorker>(socket, Duration::ZERO);
        let received = match received {
            Ok(Some((Incoming::Unknown(unknown), _))) => return self.unsupported(core, inherited, &unknown.name),
            Ok(Some((Incoming::Known(message), fds))) => Ok(Some((message, fds))),
            Ok(None) => Ok(None),
            Err(e) => Err(e),
        };
        match received {
            Ok(Some((ToWorker::Close, _))) => {
                if !core.closing.swap(true, Ordering::AcqRel) {
                    // The device is being stopped: a flush that finds no space fails.
                    core.submit_event(MAIN_THREAD, Pending::HoldForSpace(false));
                    core.submit_event(MAIN_THREAD, Pending::Close);
                }
            }
            // A retiring worker flushes everything; the successor gets the flush anew.
            Ok(Some((ToWorker::Flush, _))) if self.retiring.is_some() => {}
            Ok(Some((ToWorker::Flush, _))) => self.flush(core),
            Ok(Some((ToWorker::Retire(switch), fds))) => match SwitchFds::received(&switch, fds) {
                Ok(fds) => self.retire(core, inherited, switch, fds),
                Err(e) => {
                    let _ = self.send(&FromWorker::Retired { error: Some(RemoteError::from(&e)) });
                }
            },
            Ok(Some((ToWorker::HoldForSpace(hold), _))) => core.submit_event(MAIN_THREAD, Pending::HoldForSpace(hold)),
            Ok(Some((ToWorker::GiveBack(order), _))) => tell(&self.socket, self.giving.begin(core, order)),
            Ok(Some((ToWorker::CancelGiveBack, _))) => self.giving.cancel(core),
            Ok(Some((ToWorker::Track(order), _))) => track::take(core, &mut self.giving, order),
            Ok(Some((ToWorker::Go, _))) => {}
            Ok(Some((ToWorker::Start(_), _))) => core.log.line("the supervisor sent Start twice".into()),
            Ok(None) => {
                core.log.line("the supervisor has ended".into());
                core.submit_event(MAIN_THREAD, Pending::Track(TrackControl::End));
                if host::since(self.since) >= STABLE_AFTER {
                    self.pause = FIRST_PAUSE;
                    self.next_try = host::now();
                } else {
                    self.next_try = host::now() + self.pause;
                    self.pause = (self.pause * 2).min(LAST_PAUSE);
                }
                self.socket = None;
            }
            Err(e) if e.errno() == Some(libc::ETIMEDOUT) => {}
            Err(e) => core.log.line(format!("a message of the supervisor: {e}")),
        }
    }

    /// Answers a message that this build does not know. A supervisor of the first version would not understand that.
    fn unsupported(&self, core: &Core, inherited: &Inherited, what: &str) {
        core.log.line(format!("the supervisor's message {what:?} is not understood"));
        if inherited.start.greeting.version > 1 {
            let _ = self.send(&FromWorker::Unsupported { what: what.into(), version: greeting::VERSION });
        }
    }

    fn flush(&mut self, core: &Core) {
        if self.flushing {
            // What was asked for during a flush needs another one.
            self.flush_again = true;
            return;
        }
        if !core.writable {
            let _ = self.send(&FromWorker::Flushed { error: None });
            return;
        }
        self.flushing = true;
        core.submit_event(
            MAIN_THREAD,
            Pending::Request(Request { id: OWN_FLUSH, kind: RequestKind::Flush, offset: 0, len: 0 }),
        );
    }

    fn flushed(&mut self, core: &Core, result: Result<(), Errno>) {
        self.flushing = false;
        let error = result.err().map(|e| {
            let text = std::io::Error::from_raw_os_error(e);
            RemoteError {
                code: Kind::Fsync.code(),
                message: format!("cannot flush {}: {text}", core.top().name.display()),
            }
        });
        let _ = self.send(&FromWorker::Flushed { error });
        if std::mem::take(&mut self.flush_again) {
            self.flush(core);
        }
    }

    fn merged(&mut self, core: &Core, result: Result<(), Errno>) {
        if result == Err(libc::ECANCELED) {
            // The code that closes the engine handles it.
            return;
        }
        let error = result.err().map(|e| {
            let text = std::io::Error::from_raw_os_error(e);
            RemoteError {
                code: Kind::Write.code(),
                message: format!("cannot merge {}: {text}", core.top().name.display()),
            }
        });
        self.merge_result = Some(error);
        self.report_merge(core);
    }

    /// The merge cannot go on.
    pub fn report_merge_failure(&mut self, core: &Core, why: &Error) {
        self.merge_result = Some(Some(RemoteError::from(why)));
        self.report_merge(core);
    }

    fn report_merge(&self, core: &Core) {
        let Some(error) = &self.merge_result else { return };
        if let Some(error) = error {
            core.log.line(error.message.clone());
        }
        let _ = self.send(&FromWorker::Merged { error: error.clone() });
    }

    /// Starts a supervisor and gives it everything that the last one had.
    fn restart_supervisor(&mut self, core: &Core, inherited: &Inherited) {
        if host::breach("no supervisor is started") {
            return;
        }
        self.since = host::now();
        match start_supervisor(core, inherited, None) {
            Ok(socket) => {
                self.socket = Some(socket);
                if !host::breach("the outcome of a merge is reported once") {
                    // The last supervisor may have exited before it acted on it.
                    self.report_merge(core);
                }
            }
            Err(e) => {
                core.log.line(format!("cannot start a new supervisor: {e}"));
                self.next_try = host::now() + self.pause;
                self.pause = (self.pause * 2).min(LAST_PAUSE);
            }
        }
    }
}

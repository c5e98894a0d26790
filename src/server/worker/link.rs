//! The main thread: takes the supervisor's orders, tells the engine the time, replaces a supervisor that died.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::bail;
use crate::engine::api::{Errno, Request, RequestKind};
use crate::error::{IoContext, Kind, Result};
use crate::server::frame;
use crate::server::proto::{FromWorker, ToWorker, WorkerStart};

use super::core::{Core, MAIN_THREAD, Notice, OWN_FLUSH, Pending};
use super::setup::Kept;

const TICK: Duration = Duration::from_secs(1);
/// Longest wait for a supervisor that does not take what we say.
const SAY_LIMIT: Duration = Duration::from_secs(5);
/// Pauses between attempts to start a supervisor: doubled from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// A supervisor that lived so long was a good one.
const GOOD_LIFE: Duration = Duration::from_secs(10);

/// The connection to the supervisor, whichever process that is.
#[derive(Debug)]
pub struct Link {
    /// None: it died, and a new one is to be started.
    socket: Option<OwnedFd>,
    since: Instant,
    pause: Duration,
    next_try: Instant,
    flushing: bool,
    flush_again: bool,
}

impl Link {
    /// Takes the first message. `None`: the supervisor went away before.
    pub fn start(socket: OwnedFd) -> Result<Option<(Link, Kept)>> {
        frame::prepare(&socket);
        let Some((first, fds)) = frame::recv::<ToWorker>(&socket)? else { return Ok(None) };
        let ToWorker::Start(start) = first else {
            bail!(Protocol, "the supervisor began with {first:?}: Start wanted");
        };
        let kept = Kept::new(start, fds)?;
        let now = Instant::now();
        let link = Link {
            socket: Some(socket),
            since: now,
            pause: FIRST_PAUSE,
            next_try: now,
            flushing: false,
            flush_again: false,
        };
        Ok(Some((link, kept)))
    }

    /// Tells the supervisor something.
    pub fn say(&self, message: &FromWorker) -> Result<()> {
        match &self.socket {
            Some(socket) => frame::send_within(socket, message, &[], SAY_LIMIT),
            None => bail!(Protocol, "the supervisor has died"),
        }
    }

    /// Closes a device that nobody has used, for a supervisor that is gone.
    pub fn close_unused(&mut self, core: &Core, kept: &Kept) -> Result<(), Errno> {
        self.socket = None;
        core.closing.store(true, Ordering::Release);
        core.tell(MAIN_THREAD, Pending::Close);
        self.serve(core, kept)
    }

    /// Serves until the engine has closed; returns how that ended.
    pub fn serve(&mut self, core: &Core, kept: &Kept) -> Result<(), Errno> {
        let mut notices = Vec::new();
        let mut tick = Instant::now() + TICK;
        loop {
            self.wait(core, tick);
            let now = Instant::now();
            if now >= tick {
                tick = now + TICK;
                core.tell(MAIN_THREAD, Pending::Tick);
                let status = core.status();
                core.shm.publish(&status);
                if !status.no_space {
                    core.common.shrink(&core.memory);
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
                    Notice::Closed(result) => {
                        core.shm.publish(&core.status());
                        return result;
                    }
                }
            }
            self.listen(core, kept);
        }
    }

    fn wait(&self, core: &Core, tick: Instant) {
        let mut end = tick;
        let mut fds = vec![PollFd::new(core.notices.as_fd(), PollFlags::POLLIN)];
        match &self.socket {
            Some(socket) => fds.push(PollFd::new(socket.as_fd(), PollFlags::POLLIN)),
            None => end = end.min(self.next_try),
        }
        let left = end.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
        // An interrupted wait is only a short one.
        let _ = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
    }

    fn listen(&mut self, core: &Core, kept: &Kept) {
        let closing = core.closing.load(Ordering::Acquire);
        let Some(socket) = &self.socket else {
            if !closing && Instant::now() >= self.next_try {
                self.adopt(core, kept);
            }
            return;
        };
        match frame::recv_within::<ToWorker>(socket, Duration::ZERO) {
            Ok(Some((ToWorker::Close, _))) => {
                if !core.closing.swap(true, Ordering::AcqRel) {
                    core.tell(MAIN_THREAD, Pending::Close);
                }
            }
            Ok(Some((ToWorker::Flush, _))) => self.flush(core),
            Ok(Some((ToWorker::HoldForSpace(hold), _))) => core.tell(MAIN_THREAD, Pending::HoldForSpace(hold)),
            Ok(Some((ToWorker::Start(_), _))) => core.log.say("the supervisor sent Start twice".into()),
            Ok(None) => {
                core.log.say("the supervisor has ended".into());
                if self.since.elapsed() >= GOOD_LIFE {
                    self.pause = FIRST_PAUSE;
                    self.next_try = Instant::now();
                } else {
                    self.next_try = Instant::now() + self.pause;
                    self.pause = (self.pause * 2).min(LAST_PAUSE);
                }
                self.socket = None;
            }
            Err(e) if e.errno() == Some(libc::ETIMEDOUT) => {}
            Err(e) => core.log.say(format!("a message of the supervisor: {e}")),
        }
    }

    fn flush(&mut self, core: &Core) {
        if self.flushing {
            // What was asked for during a flush needs another one.
            self.flush_again = true;
            return;
        }
        if !core.writable {
            let _ = self.say(&FromWorker::Flushed { error: None });
            return;
        }
        self.flushing = true;
        core.tell(
            MAIN_THREAD,
            Pending::Request(Request { id: OWN_FLUSH, kind: RequestKind::Flush, offset: 0, len: 0 }),
        );
    }

    fn flushed(&mut self, core: &Core, result: Result<(), Errno>) {
        self.flushing = false;
        let error = result.err().map(|e| {
            let text = std::io::Error::from_raw_os_error(e);
            (Kind::Fsync.code(), format!("cannot flush {}: {text}", core.top().name.display()))
        });
        let _ = self.say(&FromWorker::Flushed { error });
        if std::mem::take(&mut self.flush_again) {
            self.flush(core);
        }
    }

    fn merged(&mut self, core: &Core, result: Result<(), Errno>) {
        let error = result.err().map(|e| {
            let text = std::io::Error::from_raw_os_error(e);
            (Kind::Write.code(), format!("cannot merge {}: {text}", core.top().name.display()))
        });
        let _ = self.say(&FromWorker::Merged { error });
    }

    /// Starts a supervisor and gives it everything that the last one had.
    fn adopt(&mut self, core: &Core, kept: &Kept) {
        self.since = Instant::now();
        match start_supervisor(kept) {
            Ok(socket) => self.socket = Some(socket),
            Err(e) => {
                core.log.say(format!("cannot start a new supervisor: {e}"));
                self.next_try = Instant::now() + self.pause;
                self.pause = (self.pause * 2).min(LAST_PAUSE);
            }
        }
    }
}

/// The starter ends as soon as the supervisor runs, so that this is no child of ours that somebody has to wait for.
fn start_supervisor(kept: &Kept) -> Result<OwnedFd> {
    let (mine, theirs) = frame::pair()?;
    let binary = kept.binary().as_raw_fd();
    Command::new(format!("/proc/self/fd/{binary}"))
        .arg0("ploop-server")
        .arg("adopt")
        .env_clear()
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .ctx(Kind::Sys, || "cannot start the server's program")?;
    let start = WorkerStart { takeover: true, ..kept.start.clone() };
    frame::send_within(&mine, &ToWorker::Start(start), &kept.fds(), SAY_LIMIT)?;
    Ok(mine)
}

//! How a supervisor is replaced: by one that a worker starts after its exit, or by another program in the same process.
//! Either way the new one gets the worker, the chain with what is under way, the worker's journal and a waiting client.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::server::descriptors::{Descriptors, Received};
use crate::server::exclusion;
use crate::server::kernel_log::log;
use crate::server::nodes::Nodes;
use crate::server::proto::{Answer, DeviceRecord, ProcessId, ToWorker, WorkerStart};
use crate::server::roles::{ByRole, Role};
use crate::server::supervisor::Supervisor;
use crate::server::worker_process::Worker;
use crate::server::{control, daemon, frame, runtime};
use crate::sys::{host, process};

/// The first message must come at once.
const GREETING: Duration = Duration::from_secs(30);

/// What a supervisor leaves to the program that replaces its own; with it the descriptors of `start`, whose roles have
/// the worker's socket and perhaps a client's besides.
#[derive(Debug, Serialize, Deserialize)]
struct Handover {
    worker: ProcessId,
    start: WorkerStart,
}

/// Mode `adopted`: a worker that lost its supervisor has started this one.
pub fn adopt() -> i32 {
    let Ok(sock) = host::take_standard(0) else { return 1 };
    let Ok(Some((ToWorker::Start(start), fds))) = frame::recv_within::<ToWorker>(&sock, GREETING) else { return 1 };
    match adopt_from(sock, start, fds) {
        Ok(()) => 0,
        Err(_) => 1,
    }
}

fn adopt_from(sock: OwnedFd, start: WorkerStart, fds: Vec<OwnedFd>) -> Result<()> {
    daemon::detach_from_caller()?;
    let pid = host::peer(&sock).ctx(Kind::Sys, || "cannot see which process the worker is")?;
    let received = Descriptors::received(&start, fds)?;
    take_over(Worker::attach_running(pid, sock)?, start, received, None)
}

/// Mode `resumed`: the supervisor of a running device has replaced its program by this one.
pub fn resume() -> i32 {
    let Ok(sock) = host::take_standard(0) else { return 1 };
    let Ok(Some((handover, fds))) = frame::recv_within::<Handover>(&sock, GREETING) else { return 1 };
    let _ = process::set_io_flusher();
    match resume_from(handover, fds) {
        Ok(()) => 0,
        Err(_) => 1,
    }
}

fn resume_from(handover: Handover, fds: Vec<OwnedFd>) -> Result<()> {
    let Handover { worker, start } = handover;
    let mut by = ByRole::new(&start.roles, fds)?;
    let (sock, client) = (by.one(Role::Worker)?, by.optional(Role::Client)?);
    let received = Descriptors::from_roles(&start, by)?;
    take_over(Worker::attach_child(worker, sock)?, start, received, client)
}

/// Serves a device as the supervisor of a worker that runs.
fn take_over(worker: Worker, mut start: WorkerStart, received: Received, client: Option<OwnedFd>) -> Result<()> {
    daemon::lock_memory();
    let Received { mut fds, journal, retired: sent } = received;
    // Those of an earlier version's supervisor carry no locks; the next worker takes them.
    fds.levels = exclusion::open_missing(fds.levels, !start.attach.read_only);
    let journal = if host::breach("the journal is lost with the supervisor") { Vec::new() } else { journal };
    let retired = start.retired.take();
    // The worker has done that.
    start.adopts = false;
    let me = runtime::process(host::pid()).unwrap_or_default();
    let name = start.device_name.clone();
    runtime::check_name(&name)?;
    let dir = runtime::device_dir(&name);
    // The name may be another device's by now.
    let ours = |r: &DeviceRecord| r.token.is_empty() || start.attach.token.is_empty() || r.token == start.attach.token;
    let found = runtime::read_record(&dir).ok().flatten();
    let found = found.filter(|r| r.name == name && runtime::is_this_boot(&r.boot) && ours(r));
    // Without a record the device goes on, but cannot be found any more.
    let (dir, record) = match found {
        Some(record) => (dir, record),
        None => (PathBuf::new(), DeviceRecord { name: name.clone(), state: "lost".into(), ..Default::default() }),
    };
    if retired.is_some() && dir.as_os_str().is_empty() {
        bail!(Device, "{name} is gone: no change of its chain goes on");
    }
    let mut supervisor = Supervisor::new(dir, record, start, fds)?;
    supervisor.names.adopt(Nodes::existing(&runtime::dev_dir(), &name));
    supervisor.record.supervisor = me;
    supervisor.record.worker = worker.id;
    // The old supervisor may have exited before it wrote them into the record.
    supervisor.record.levels = supervisor.chain.attach().levels.clone();
    supervisor.record.ids = supervisor.chain.attach().ids.clone();
    supervisor.slot.adopt(worker, journal);
    supervisor.assume_ready();
    if let Some(switch) = retired {
        // Another worker that is about to start a supervisor reads the record first.
        supervisor.save();
        supervisor.resume_change(switch, sent);
    }
    let run = |supervisor: Supervisor| {
        // Recorded by now: the client finds the device served by this program.
        client.iter().for_each(|c| control::answer(c, &Answer::Done));
        supervisor.run();
    };
    match supervisor.record.state.as_str() {
        // The supervisor exited while attaching: the caller got an error.
        "starting" => supervisor.undo(),
        "stopped" => {
            supervisor.lost = true;
            supervisor.save();
            run(supervisor);
        }
        _ => {
            supervisor.save();
            run(supervisor);
        }
    }
    Ok(())
}

impl Supervisor {
    /// Replaces the program of this process by the one that serves now, which goes on where this one is. There is no
    /// moment without a supervisor. Returns only if the program cannot be started: then this one goes on.
    pub(super) fn replace_program(&mut self, client: Option<OwnedFd>) {
        if host::breach("a reload ends the supervisor") {
            client.iter().for_each(|c| control::answer(c, &Answer::Done));
            host::exit(0);
        }
        let error = match self.hand_over(client.as_ref()) {
            Ok(never) => match never {},
            Err(e) => e,
        };
        log(&self.record.name, &format!("its supervisor stays of the old version: {error}"));
        client.iter().for_each(|c| control::answer(c, &Answer::Done));
    }

    fn hand_over(&mut self, client: Option<&OwnedFd>) -> Result<std::convert::Infallible> {
        // The next program does not know these children: those that have exited are reaped now.
        self.released_helpers.retain_mut(|h| h.process.runs());
        let (Some(fds), Some(worker)) = (&self.fds, self.slot.worker()) else { bail!(Device, "it has no worker") };
        let Some(worker_sock) = &worker.sock else { bail!(Device, "its worker exits") };
        let (mine, theirs) = frame::pair()?;
        let mut out = fds.outgoing();
        out.add(Role::Journal, self.slot.journal()).add(Role::Worker, [worker_sock]).add(Role::Client, client);
        let start = WorkerStart { roles: out.roles, ..self.chain.start().clone() };
        frame::send(&mine, &Handover { worker: worker.id, start }, &out.fds)?;
        let program = fds.program();
        Err(host::exec(&program, "resumed", theirs)).ctx(Kind::Sys, || "cannot start the new program")
    }
}

//! How a supervisor is replaced: by one that a worker starts after its exit, or by another program in the same process.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::server::kernel_log::log;
use crate::server::nodes::Nodes;
use crate::server::proto::{Answer, DeviceRecord, ProcessId, ToWorker, WorkerStart};
use crate::server::supervisor::Supervisor;
use crate::server::worker_process::{Descriptors, Worker};
use crate::server::{control, daemon, frame, runtime};
use crate::sys::{host, process};

/// The first message must come at once.
const GREETING: Duration = Duration::from_secs(30);

/// What a supervisor leaves to the program that replaces its own, with the worker's socket, the client's if there is
/// one, and the descriptors of `start`.
#[derive(Debug, Serialize, Deserialize)]
struct Handover {
    worker: ProcessId,
    /// A client waits for the answer to its reload.
    client: bool,
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
    take_over(Worker::attach_running(pid, sock)?, start, fds, None)
}

/// Mode `resumed`: the supervisor of a running device has replaced its program by this one.
pub fn resume() -> i32 {
    let Ok(sock) = host::take_standard(0) else { return 1 };
    let Ok(Some((handover, mut fds))) = frame::recv_within::<Handover>(&sock, GREETING) else { return 1 };
    let first = 1 + usize::from(handover.client);
    if fds.len() < first {
        return 1;
    }
    let rest = fds.split_off(first);
    let client = fds.split_off(1).pop();
    let Some(worker_sock) = fds.pop() else { return 1 };
    let _ = process::set_io_flusher();
    let Ok(worker) = Worker::attach_child(handover.worker, worker_sock) else { return 1 };
    match take_over(worker, handover.start, rest, client) {
        Ok(()) => 0,
        Err(_) => 1,
    }
}

/// Serves a device as the supervisor of a worker that runs. `fds`: as for a worker that is started.
fn take_over(worker: Worker, start: WorkerStart, fds: Vec<OwnedFd>, client: Option<OwnedFd>) -> Result<()> {
    daemon::lock_memory();
    let mut start = start;
    let levels = start.attach.levels.len();
    let mut fds = fds;
    let slots = fds.split_off(fds.len().saturating_sub(start.slot_fds));
    let Some(mut fds) = Descriptors::from_all(fds, levels, start.merge_fds) else {
        bail!(Protocol, "too few descriptors came from the worker")
    };
    let retired = start.retired.take().map(|switch| (switch, std::mem::take(&mut fds.extra)));
    let me = runtime::process(host::pid()).unwrap_or_default();
    let name = start.device_name.clone();
    runtime::check_name(&name)?;
    let dir = runtime::device_dir(&name);
    let found = runtime::read_record(&dir).ok().flatten().filter(|r| r.name == name && r.boot == runtime::boot_id());
    // Without a record the device goes on, but cannot be found any more.
    let (dir, record) = match found {
        Some(record) => (dir, record),
        None => (PathBuf::new(), DeviceRecord { name: name.clone(), state: "lost".into(), ..Default::default() }),
    };
    if retired.is_some() && dir.as_os_str().is_empty() {
        bail!(Device, "{name} is gone: no change of its chain goes on");
    }
    let mut supervisor = Supervisor::new(dir, record, start, fds)?;
    supervisor.slots = slots;
    supervisor.nodes = Nodes::existing(&runtime::dev_dir(), &name);
    supervisor.record.supervisor = me;
    supervisor.record.worker = worker.id;
    // The old supervisor may have exited before it wrote them into the record.
    supervisor.record.levels = supervisor.start.attach.levels.clone();
    supervisor.record.ids = supervisor.start.attach.ids.clone();
    supervisor.worker = Some(worker);
    supervisor.assume_ready();
    if let Some((switch, fds)) = retired {
        // Another worker that is about to start a supervisor reads the record first.
        supervisor.save();
        supervisor.resume_change(switch, fds);
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
        let (Some(fds), Some(worker)) = (&self.fds, &self.worker) else { bail!(Device, "it has no worker") };
        let Some(worker_sock) = &worker.sock else { bail!(Device, "its worker exits") };
        let (mine, theirs) = frame::pair()?;
        let start = WorkerStart { slot_fds: self.slots.len(), merge_fds: fds.merge.len(), ..self.start.clone() };
        let handover = Handover { worker: worker.id, client: client.is_some(), start };
        let mut sent: Vec<BorrowedFd> = vec![worker_sock.as_fd()];
        sent.extend(client.map(AsFd::as_fd));
        sent.extend(fds.all());
        sent.extend(self.slots.iter().map(AsFd::as_fd));
        frame::send(&mine, &handover, &sent)?;
        let program = fds.program();
        Err(host::exec(&program, "resumed", theirs)).ctx(Kind::Sys, || "cannot start the new program")
    }
}

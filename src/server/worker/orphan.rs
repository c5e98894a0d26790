//! A worker without a supervisor: who starts another one, and how.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::server::proto::{ProcessId, Swap, ToWorker, WorkerStart};
use crate::server::{frame, runtime};
use crate::sys::calm;
use crate::sys::reopen::{Access, reopen};

use super::core::Core;
use super::link::SAY_LIMIT;
use super::locked;
use super::setup::Kept;
use super::slots::Table;

/// The lock that decides who starts a supervisor; none: the successor has it.
pub fn arbiter(kept: &Kept, swap: &Swap, fds: &[OwnedFd]) -> Result<Option<File>> {
    let Some(top) = swap.levels.last() else { bail!(Protocol, "a change to a chain without images") };
    let new = swap.levels.iter().filter(|l| l.from.is_none()).count();
    let fd = match top.from {
        Some(level) => kept.levels().get(level),
        None => new.checked_sub(1).and_then(|last| fds.get(last)),
    };
    let Some(fd) = fd else { bail!(Protocol, "the top of the new chain was not sent") };
    let (file, _) = reopen(fd, Access::default()).ctx(Kind::Open, || format!("{}", top.name.path.display()))?;
    match calm::flock_exclusive(&file, false) {
        Ok(()) => Ok(Some(file)),
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e).ctx(Kind::Lock, || format!("{}", top.name.path.display())),
    }
}

/// Another supervisor lives than the one that is gone, with another worker: it writes that down before it changes
/// anything.
pub fn succeeded(device: &str, gone: ProcessId) -> bool {
    let record = runtime::read_record(&runtime::device_dir(device)).ok().flatten();
    record.is_some_and(|r| {
        r.supervisor != gone && r.worker.pid != std::process::id() as i32 && runtime::alive(r.supervisor)
    })
}

/// Starts a supervisor and gives it everything that the last one had; `retired`: in favour of this change. The starter ends as soon as the supervisor runs, so that this is no child of ours that somebody has to wait for.
pub fn start_supervisor(core: &Core, kept: &Kept, retired: Option<(&Swap, &[OwnedFd])>) -> Result<OwnedFd> {
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
    // Who has retired has answered everything.
    let slots = core.table.iter().filter(|_| retired.is_none()).flat_map(Table::fds).collect::<Vec<_>>();
    let start = WorkerStart {
        takeover: true,
        succeed: None,
        retired: retired.map(|(swap, _)| swap.clone()),
        yielded: *locked(&core.yielded),
        finish: kept.start.finish.filter(|_| locked(&core.finished).is_none()),
        slot_fds: slots.len(),
        ..kept.start.clone()
    };
    let mut fds = kept.fds();
    fds.extend(retired.iter().flat_map(|(_, fds)| fds.iter().map(AsFd::as_fd)));
    fds.extend(kept.merge_fds());
    fds.extend(slots);
    frame::send_within(&mine, &ToWorker::Start(start), &fds, SAY_LIMIT)?;
    Ok(mine)
}

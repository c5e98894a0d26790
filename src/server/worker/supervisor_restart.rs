//! A worker without a supervisor: who starts another one, and how.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::server::descriptors::SwitchFds;
use crate::server::exclusion;
use crate::server::proto::{ChainSwitch, ProcessId, ToWorker, WorkerStart, own_greeting};
use crate::server::roles::Role;
use crate::server::{frame, runtime};
use crate::sys::file_lock;
use crate::sys::host;
use crate::sys::reopen::{Access, reopen};

use super::core::Core;
use super::init::Inherited;
use super::locked;
use super::request_journal::RequestJournal;

/// Longest wait for a supervisor that does not take a message.
pub const SEND_LIMIT: Duration = Duration::from_secs(5);

/// The lock that decides who starts a supervisor; none: the successor has it.
pub fn try_top_lock(inherited: &Inherited, switch: &ChainSwitch, fds: &SwitchFds) -> Result<Option<File>> {
    let Some(top) = switch.levels.last() else { bail!(Protocol, "a change to a chain without images") };
    let fd = match top.from {
        Some(level) => inherited.levels().get(level),
        None => fds.new.last(),
    };
    let Some(fd) = fd else { bail!(Protocol, "the top of the new chain was not sent") };
    // The successor has its locks as this worker had them.
    let shared = !inherited.start.attach.read_only
        && inherited.levels().last().is_some_and(exclusion::is_shared)
        && exclusion::would_be_shared(fd);
    let access = Access { write: shared, direct: false };
    let (file, _) = reopen(fd, access).ctx(Kind::Open, || format!("{}", top.name.path.display()))?;
    let taken = match shared {
        true => exclusion::take_barrier_now(&file),
        false => file_lock::exclusive(&file, false),
    };
    match taken {
        Ok(()) => Ok(Some(file)),
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e).ctx(Kind::Lock, || format!("{}", top.name.path.display())),
    }
}

/// Another supervisor than `gone` runs, with another worker: it writes the record before it changes
/// anything.
pub fn has_successor(device: &str, gone: ProcessId) -> bool {
    let record = runtime::read_record(&runtime::device_dir(device)).ok().flatten();
    record.is_some_and(|r| r.supervisor != gone && r.worker.pid != host::pid() && runtime::alive(r.supervisor))
}

/// Starts a supervisor and gives it everything that the last one had; `retired`: in favour of this change. The starter
/// ends as soon as the supervisor runs, so that the supervisor is no child of this worker and need not be reaped.
pub fn start_supervisor(
    core: &Core,
    inherited: &Inherited,
    retired: Option<(&ChainSwitch, &SwitchFds)>,
) -> Result<OwnedFd> {
    let (mine, theirs) = frame::pair()?;
    let started = host::start(&inherited.fds.program(), "adopt", theirs);
    let mut started = started.ctx(Kind::Sys, || "cannot start the server's program")?;
    // The starter ends as soon as the supervisor runs, so that the supervisor is no child of this worker.
    let _ = started.wait();
    // Who has retired has answered everything.
    let journal = core.journal.iter().filter(|_| retired.is_none()).flat_map(RequestJournal::fds);
    let mut out = inherited.fds.without_merge();
    if let Some((_, fds)) = retired {
        fds.add_to(&mut out);
    }
    out.add_merge(inherited.fds.merge.as_ref());
    for fd in journal {
        out.add_borrowed(Role::Journal, fd);
    }
    let start = WorkerStart {
        takeover: true,
        succeed: None,
        retired: retired.map(|(switch, _)| switch.clone()),
        finish: inherited.start.finish.filter(|_| locked(&core.finished).is_none()),
        roles: out.roles,
        greeting: own_greeting(),
        ..inherited.start.clone()
    };
    frame::send_within(&mine, &ToWorker::Start(start), &out.fds, SEND_LIMIT)?;
    Ok(mine)
}

//! Changing the chain that a running device serves, and the program that serves it.
#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use nix::poll::PollFlags;

use crate::bail;
use crate::device::model::Device;
use crate::device::served::{find, record};
use crate::device::spec::{CommitFile, NewLevel, SwitchSpec};
use crate::device::state::State;
use crate::error::{IoContext, Kind, Result};
use crate::report;
use crate::server::jobs::Go;
use crate::server::proto::{Answer, ChainSwitch, Command, CommitNames, LevelName, SwitchLevel};
use crate::server::roles::{Outgoing, Role};
use crate::server::{control, frame, runtime, spawn};
use crate::sys::file_id::FileId;
use crate::sys::host;
use crate::sys::wait::wait;

/// Limit for a change: it waits for the device's writes, completes a former top or copies disks. A supervisor that
/// exits closes the connection.
const CHANGE: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// Limit for a new supervisor: a worker without one starts one in less.
const SUPERVISOR: Duration = Duration::from_secs(15);

/// Pause between two calls of `waiting` while the answer has not come.
const LOOK: Duration = Duration::from_millis(200);

/// Version of the protocol from which on a supervisor replaces its program and stays.
const RESUMES: u32 = 2;

/// So many supervisors may be killed in one change.
const DEATHS: u32 = 20;

/// The message, and the descriptors that go with it.
pub(super) fn chain_switch<'a>(spec: &'a SwitchSpec, device: &Device) -> Result<(ChainSwitch, Vec<BorrowedFd<'a>>)> {
    let mut levels = Vec::with_capacity(spec.levels.len());
    let mut out = Outgoing::default();
    for level in &spec.levels {
        levels.push(match level {
            NewLevel::Kept(i) => retained(device, *i)?,
            NewLevel::File { path, raw, fd } => {
                let id = FileId::of(fd).ctx(Kind::Fstat, || format!("cannot look at {}", path.display()))?;
                out.add(Role::NewLevel, [fd]);
                let name = LevelName { path: path.clone(), raw: *raw };
                SwitchLevel { name, id, from: None }
            }
        });
    }
    if let Some(commit) = &spec.commit {
        add_commit(&mut out, commit);
    }
    let Outgoing { roles, fds } = out;
    let switch = ChainSwitch {
        levels,
        expected: device.ids(),
        commit: spec.commit.as_ref().map(commit_names),
        token: uuid::Uuid::new_v4().as_u64_pair().0 | 1,
        ask: false,
        grow: None,
        linger: spec.linger,
        roles,
    };
    Ok((switch, fds))
}

pub(super) fn add_commit<'a>(out: &mut Outgoing<'a>, commit: &'a CommitFile) {
    for (role, fd) in [Role::CommitFolder, Role::CommitFile, Role::DiskLock].into_iter().zip(commit.fds()) {
        out.add(role, [fd]);
    }
}

pub(super) fn commit_names(commit: &CommitFile) -> CommitNames {
    let (tmp, name) = commit.names();
    CommitNames { tmp: tmp.to_owned(), name: name.to_owned() }
}

/// Asks the supervisor to change the chain. `prepared` is called when only those steps are left for which requests
/// wait; its error ends the change before anything has changed.
pub(super) fn switch(
    device: &Device,
    spec: &SwitchSpec,
    prepared: Option<&mut dyn FnMut() -> Result<()>>,
    serving: &mut dyn FnMut(Option<&str>),
) -> Result<()> {
    let (mut switch, fds) = chain_switch(spec, device)?;
    switch.ask = prepared.is_some();
    let command = Command::Switch(switch);
    match prepared {
        Some(prepared) => ask(device.name(), &command, &fds, prepared, serving, &mut || {}).map(drop),
        None => ask(device.name(), &command, &fds, &mut || Ok(()), serving, &mut || {}).map(drop),
    }
}

/// A level that stays.
pub(super) fn retained(device: &Device, i: usize) -> Result<SwitchLevel> {
    let Some(image) = device.images.get(i) else {
        bail!(Param, "{} has no level {i}: its chain has {}", device.name, device.images.len());
    };
    let name = LevelName { path: image.path.clone(), raw: image.raw };
    Ok(SwitchLevel { name, id: image.id, from: Some(i) })
}

/// Replaces the processes that serve a device by those of the program that is installed now. I/O waits meanwhile. A
/// device that no worker could serve gets a new worker.
pub fn reload(name: &str) -> Result<()> {
    let name = runtime::name_of(name)?;
    let path = spawn::find_server()?;
    let program = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path);
    let program = program.ctx(Kind::Open, || format!("cannot open {}", path.display()))?;
    let found = find::by_name(&name)?;
    let failed = found.as_ref().is_some_and(|d| State::from_word(&record(d).state) == State::Failed);
    let before = found.map(|d| record(&d).clone());
    let command = Command::Reload { token: uuid::Uuid::new_v4().as_u64_pair().0 | 1 };
    ask(&name, &command, &[program.as_fd()], &mut || Ok(()), &mut |_| {}, &mut || {})?;
    if failed || before.as_ref().is_none_or(|r| r.greeting.version >= RESUMES) {
        // The supervisor stays, or has replaced its program before it answered.
        return Ok(());
    }
    let before = before.map(|r| r.supervisor);
    // The worker starts the new supervisor when the old one has exited.
    let end = host::now() + SUPERVISOR;
    loop {
        let now = find::by_name(&name)?.map(|d| record(&d).supervisor);
        if now != before && now.is_some_and(runtime::alive) {
            return Ok(());
        }
        if host::now() >= end {
            bail!(Device, "{name}: the new worker has not found a supervisor within {} s", SUPERVISOR.as_secs());
        }
        host::sleep(Duration::from_millis(10));
    }
}

/// Asks the supervisor for a change and returns its last answer. If the supervisor is killed meanwhile, the next one
/// gets the same request; the change is made only once. `waiting` is called each [`LOOK`] while the answer has not come.
pub(super) fn ask(
    name: &str,
    command: &Command,
    fds: &[BorrowedFd],
    prepared: &mut dyn FnMut() -> Result<()>,
    serving: &mut dyn FnMut(Option<&str>),
    waiting: &mut dyn FnMut(),
) -> Result<Answer> {
    let dir = runtime::device_dir(name);
    let mut end = host::now() + SUPERVISOR;
    let mut told = false;
    let mut deaths = 0;
    loop {
        let Some(device) = find::by_name(name)? else {
            bail!(DevNotMounted, "there is no device {name}");
        };
        if device.state == State::Dead {
            bail!(Device, "{name} has lost its server; unmount what is mounted from it and detach it");
        }
        if let Some(unsupported) = record(&device).refuse(command) {
            return Err(unsupported);
        }
        let asked = control::send_command(&dir, command, fds, SUPERVISOR);
        if asked.is_ok() {
            deaths += 1;
        }
        let connected = asked.is_ok();
        let answer = asked.and_then(|connection| {
            loop {
                let until = host::now() + CHANGE;
                while host::now() < until && !wait(connection.as_fd(), PollFlags::POLLIN, host::now() + LOOK)? {
                    waiting();
                }
                match control::next_answer(&connection, &dir, Duration::ZERO)? {
                    Answer::Switched { warning } => {
                        if !std::mem::replace(&mut told, true) {
                            serving(warning.as_deref());
                        }
                    }
                    Answer::Prepared => {
                        prepared()?;
                        if frame::send(&connection, &Go, &[]).is_err() {
                            return Err(control::ended(&dir));
                        }
                    }
                    answer => return Ok(answer),
                }
            }
        });
        if connected {
            end = host::now() + SUPERVISOR;
        }
        match answer {
            // This supervisor does not know what the one before it had begun.
            Ok(Answer::NotMerged { code, message, untouched }) => {
                return Ok(Answer::NotMerged { code, message, untouched: untouched && deaths < 2 });
            }
            Ok(answer) => return answer.into_result(),
            // The supervisor was killed, and the worker has not started the next one yet.
            Err(e) if e.kind() == Kind::Device && host::now() < end && deaths < DEATHS => {
                report::say(2, format_args!("{name}: {e}; asking the next supervisor"));
                host::sleep(Duration::from_millis(50));
            }
            Err(e) => return Err(e),
        }
    }
}

//! Changing the chain that a running device serves, and the program that serves it.
#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::bail;
use crate::device::{Device, State, find};
use crate::error::{IoContext, Kind, Result};
use crate::report;
use crate::server::helper::Go;
use crate::server::proto::{Answer, ChainSwitch, Command, CommitNames, DeviceRecord, LevelName, SwitchLevel};
use crate::server::{control, frame, runtime, spawn};
use crate::sys::file_id::FileId;

/// A change waits for what the device writes, completing a former top writes what was left out of it, and a merge copies
/// disks. A supervisor that dies closes the connection.
const CHANGE: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// A worker without a supervisor starts one in less.
const SUPERVISOR: Duration = Duration::from_secs(15);

/// So many supervisors may die in one change.
const DEATHS: u32 = 20;

/// A level of the chain that a device is to serve.
#[derive(Debug)]
pub enum NewLevel {
    /// A level of the running chain, by its number.
    Kept(usize),
    /// Another file: O_PATH.
    File { path: PathBuf, raw: bool, fd: OwnedFd },
}

/// What makes a change permanent: the new descriptor, written and synced, and the old one over which it is renamed.
#[derive(Debug)]
pub struct CommitFile {
    folder: OwnedFd,
    new: OwnedFd,
    names: CommitNames,
    lock: Option<OwnedFd>,
}

impl CommitFile {
    /// `new` lies in the folder of `descriptor`.
    pub fn open(new: &Path, descriptor: &Path) -> Result<CommitFile> {
        let (Some(folder), Some(tmp), Some(name)) = (descriptor.parent(), new.file_name(), descriptor.file_name())
        else {
            bail!(Param, "{} is no path of a descriptor", descriptor.display());
        };
        let open = |path: &Path, flags: i32| {
            let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH | flags).open(path);
            file.ctx(Kind::Open, || format!("cannot open {}", path.display())).map(OwnedFd::from)
        };
        Ok(CommitFile {
            folder: open(folder, libc::O_DIRECTORY)?,
            new: open(new, libc::O_NOFOLLOW)?,
            names: CommitNames { tmp: PathBuf::from(tmp), name: PathBuf::from(name) },
            lock: None,
        })
    }

    /// The lock on the disk, which the server keeps until the change is made or given up.
    pub fn under(self, lock: OwnedFd) -> CommitFile {
        CommitFile { lock: Some(lock), ..self }
    }

    pub(super) fn names(&self) -> CommitNames {
        self.names.clone()
    }

    /// In the order of the protocol.
    pub(super) fn fds(&self) -> impl Iterator<Item = &OwnedFd> {
        [&self.folder, &self.new].into_iter().chain(&self.lock)
    }

    /// The change has been made: the descriptor is the new file. An error: this cannot be told.
    pub fn is_committed(&self) -> Result<bool> {
        crate::server::worker::commit::is_committed(&self.names, &self.folder, &self.new)
    }
}

/// A chain for a running device.
#[derive(Debug)]
pub struct SwitchSpec {
    /// Base first.
    pub levels: Vec<NewLevel>,
    pub commit: Option<CommitFile>,
    /// Milliseconds by which each step is drawn out; 0 but in tests, which kill processes meanwhile. Without effect in
    /// a release build.
    pub linger: u64,
}

impl SwitchSpec {
    /// The message, and the descriptors that go with it.
    pub(super) fn chain_switch(&self, device: &Device) -> Result<(ChainSwitch, Vec<BorrowedFd<'_>>)> {
        let record = &device.record;
        let mut levels = Vec::with_capacity(self.levels.len());
        let mut fds: Vec<BorrowedFd> = Vec::new();
        for level in &self.levels {
            levels.push(match level {
                NewLevel::Kept(i) => retained(record, *i)?,
                NewLevel::File { path, raw, fd } => {
                    let id = FileId::of(fd).ctx(Kind::Fstat, || format!("cannot look at {}", path.display()))?;
                    fds.push(fd.as_fd());
                    let name = LevelName { path: path.clone(), raw: *raw };
                    SwitchLevel { name, id, from: None }
                }
            });
        }
        if let Some(commit) = &self.commit {
            fds.extend(commit.fds().map(AsFd::as_fd));
        }
        let switch = ChainSwitch {
            levels,
            expected: record.ids.clone(),
            commit: self.commit.as_ref().map(|c| c.names.clone()),
            token: uuid::Uuid::new_v4().as_u64_pair().0 | 1,
            ask: false,
            linger: self.linger,
        };
        Ok((switch, fds))
    }
}

/// Makes a running device serve another chain, whose content must be the same. Requests wait meanwhile; all that was
/// answered is durable in the old chain first. `serving` is called as soon as I/O goes on, with a warning if the change
/// may not survive a power cut; this returns when the former top, if it became a lower level, is complete and unmarked
/// and does not change any more.
///
/// `serving` not called: the device serves the chain it had, except after an error of kind [`Kind::Protocol`], after
/// which that cannot be told.
pub fn switch(device: &Device, spec: &SwitchSpec, serving: &mut dyn FnMut(Option<&str>)) -> Result<()> {
    let (switch, fds) = spec.chain_switch(device)?;
    ask(device.name(), &Command::Switch(switch), &fds, &mut || Ok(()), serving).map(drop)
}

/// The same, and `prepared` is called when nothing is left to be done but what requests have to wait for. Its error ends
/// the change before anything has changed.
pub fn switch_prepared(
    device: &Device,
    spec: &SwitchSpec,
    prepared: &mut dyn FnMut() -> Result<()>,
    serving: &mut dyn FnMut(Option<&str>),
) -> Result<()> {
    let (mut switch, fds) = spec.chain_switch(device)?;
    switch.ask = true;
    ask(device.name(), &Command::Switch(switch), &fds, prepared, serving).map(drop)
}

/// A level that stays.
pub(super) fn retained(record: &DeviceRecord, i: usize) -> Result<SwitchLevel> {
    match (record.levels.get(i), record.ids.get(i)) {
        (Some(name), Some(id)) => Ok(SwitchLevel { name: name.clone(), id: *id, from: Some(i) }),
        _ => bail!(Param, "{} has no level {i}: its chain has {}", record.name, record.levels.len()),
    }
}

/// Replaces the processes that serve a device by those of the program that is installed now. I/O waits meanwhile. A
/// device that no worker could serve is tried once more.
pub fn reload(name: &str) -> Result<()> {
    let name = runtime::name_of(name)?;
    let path = spawn::find_server()?;
    let program = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path);
    let program = program.ctx(Kind::Open, || format!("cannot open {}", path.display()))?;
    let found = find::by_name(&name)?;
    let failed = found.as_ref().is_some_and(|d| d.record.state == "failed");
    let before = found.map(|d| d.record.supervisor);
    let command = Command::Reload { token: uuid::Uuid::new_v4().as_u64_pair().0 | 1 };
    ask(&name, &command, &[program.as_fd()], &mut || Ok(()), &mut |_| {})?;
    if failed {
        // Its supervisor has not changed.
        return Ok(());
    }
    // The worker starts the new supervisor when the old one is gone.
    let end = Instant::now() + SUPERVISOR;
    loop {
        let now = find::by_name(&name)?.map(|d| d.record.supervisor);
        if now != before && now.is_some_and(runtime::alive) {
            return Ok(());
        }
        if Instant::now() >= end {
            bail!(Device, "{name}: the new worker has not found a supervisor within {} s", SUPERVISOR.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Asks for a change, and answers the last word. A supervisor that dies meanwhile is replaced: the next one is asked the
/// same, and makes the change only once.
pub(super) fn ask(
    name: &str,
    command: &Command,
    fds: &[BorrowedFd],
    prepared: &mut dyn FnMut() -> Result<()>,
    serving: &mut dyn FnMut(Option<&str>),
) -> Result<Answer> {
    let dir = runtime::device_dir(name);
    let mut end = Instant::now() + SUPERVISOR;
    let mut told = false;
    let mut deaths = 0;
    loop {
        let Some(device) = find::by_name(name)? else {
            bail!(DevNotMounted, "there is no device {name}");
        };
        if device.state == State::Dead {
            bail!(Device, "{name} has lost its server; unmount what is mounted from it and detach it");
        }
        if let Some(unsupported) = device.record.refuse(command) {
            return Err(unsupported);
        }
        let asked = control::send_command(&dir, command, fds, SUPERVISOR);
        if asked.is_ok() {
            deaths += 1;
        }
        let connected = asked.is_ok();
        let answer = asked.and_then(|connection| {
            loop {
                match control::next_answer(&connection, &dir, CHANGE)? {
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
            end = Instant::now() + SUPERVISOR;
        }
        match answer {
            // What the supervisor before had begun is not known to this one.
            Ok(Answer::NotMerged { code, message, untouched }) => {
                return Ok(Answer::NotMerged { code, message, untouched: untouched && deaths < 2 });
            }
            Ok(answer) => return answer.into_result(),
            // Between two supervisors.
            Err(e) if e.kind() == Kind::Device && Instant::now() < end && deaths < DEATHS => {
                report::say(2, format_args!("{name}: {e}; asking the next supervisor"));
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(e) => return Err(e),
        }
    }
}

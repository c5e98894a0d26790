//! How a device comes to be, and how a supervisor is replaced.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::server::descriptors::Descriptors;
use crate::server::exclusion;
use crate::server::helper::{Helper, remote_error};
use crate::server::jobs::{Go, Job, JobEvent};
use crate::server::proto::{AttachReply, AttachRequest, DeviceRecord, ToWorker, WorkerStart, own_greeting};
use crate::server::supervisor::Supervisor;
use crate::server::transport::{self, Connection, Recovery, Session, Transport, Wanted};
use crate::server::{control, daemon, frame, minors, runtime, shm, stopped, unflushed};
use crate::sys::file_id::FileId;
use crate::sys::host;

/// The first message must come at once.
const GREETING: Duration = Duration::from_secs(30);
/// Opening and checking a chain: hundreds of thousands of BAT pages on a slow disk.
const OPEN: Duration = Duration::from_secs(300);
/// Binding the block device: until a takeover is tried, and until the device is given up.
const BIND: Duration = Duration::from_secs(60);
const BIND_AGAIN: Duration = Duration::from_secs(30);
/// Undoing it.
const UNDO: Duration = Duration::from_secs(60);

/// Mode `supervise`: one device, asked for by the socket on standard input.
pub fn supervise() -> i32 {
    let Ok(sock) = host::take_standard(0) else { return 1 };
    let (request, levels) = match frame::recv_within::<AttachRequest>(&sock, GREETING) {
        Ok(Some(message)) => message,
        _ => return 1,
    };
    let reply = match attach(request, levels) {
        Ok(supervisor) => {
            host::show_device(&supervisor.record.name);
            let reply = AttachReply::Ready(supervisor.record.clone());
            if frame::send(&sock, &reply, &[]).is_ok() {
                drop(sock);
                supervisor.run();
            } else {
                // The caller has exited, so no process knows of this device.
                supervisor.undo();
            }
            return 0;
        }
        Err(e) => AttachReply::Error { code: e.code(), message: e.to_string() },
    };
    let _ = frame::send(&sock, &reply, &[]);
    1
}

fn attach(request: AttachRequest, levels: Vec<OwnedFd>) -> Result<Supervisor> {
    if levels.is_empty() || levels.len() != request.levels.len() || levels.len() != request.ids.len() {
        bail!(
            Protocol,
            "{} images, {} names and {} identities were sent",
            levels.len(),
            request.levels.len(),
            request.ids.len()
        );
    }
    for ((fd, name), id) in levels.iter().zip(&request.levels).zip(&request.ids) {
        let file = fd.try_clone().map(File::from).and_then(|f| f.metadata());
        let meta = file.ctx(Kind::Fstat, || format!("cannot look at {}", name.path.display()))?;
        if !meta.is_file() || FileId::from(&meta) != *id {
            bail!(Open, "{} is not the regular file that was asked for", name.path.display());
        }
    }
    daemon::detach_from_caller()?;
    let binary = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open("/proc/self/exe");
    let binary = binary.ctx(Kind::Sys, || "cannot open /proc/self/exe")?;
    let (dir, record, listener) = choose_name(&request)?;
    let cleanup = Cleanup { dir: Some(dir.clone()), transport: transport::probe() };
    let connection = cleanup.transport.create(&dir, &top_name(&record), request.slots)?;
    let mut supervisor = prepare(&dir, record, request, connection, binary, listener, levels)?;
    cleanup.keep();
    daemon::lock_memory();
    match supervisor.bring_up() {
        Ok(()) => Ok(supervisor),
        Err(e) => {
            supervisor.undo();
            Err(e)
        }
    }
}

fn prepare(
    dir: &Path,
    mut record: DeviceRecord,
    attach: AttachRequest,
    connection: Connection<Session>,
    binary: File,
    listener: OwnedFd,
    levels: Vec<OwnedFd>,
) -> Result<Supervisor> {
    let levels = exclusion::open_missing(levels, !attach.read_only);
    let witnesses = Descriptors::witnesses_of(levels.last().filter(|_| !attach.read_only))?;
    record.slots = connection.session.recovery() == Recovery::Journal;
    record.connection = connection.number;
    let shm = match levels.last() {
        Some(_) if attach.unflushed => unflushed::take(attach.ids.last().copied().unwrap_or_default(), dir)?,
        Some(top) if !attach.read_only => unflushed::create(dir, &record.name, top)?,
        _ => shm::create()?,
    };
    let start = WorkerStart::new(attach, connection.session, record.name.clone());
    let fds = Descriptors {
        queue: connection.queue,
        shm,
        witnesses,
        binary: binary.into(),
        listener,
        levels,
        commit: None,
        merge: None,
    };
    Supervisor::new(dir.into(), record, start, fds)
}

/// Reserves a name by making its folder, complete with record and control socket.
fn choose_name(request: &AttachRequest) -> Result<(PathBuf, DeviceRecord, OwnedFd)> {
    let new = runtime::new_dir()?;
    let cleanup = Cleanup { dir: Some(new.clone()), transport: Transport::default() };
    let listener = control::listen_at(&new, runtime::CONTROL)?;
    let me = runtime::process(host::pid());
    let mut record = DeviceRecord {
        version: runtime::RECORD_VERSION,
        supervisor: me.ok_or_else(|| Error::new(Kind::Sys, "cannot read /proc/self/stat; is /proc mounted?"))?,
        levels: request.levels.clone(),
        ids: request.ids.clone(),
        descriptor: request.descriptor.clone(),
        component: request.component.clone(),
        read_only: request.read_only,
        state: "starting".into(),
        boot: runtime::boot_id(),
        token: request.token.clone(),
        greeting: own_greeting(),
        ..Default::default()
    };
    let dev = runtime::dev_dir();
    let mut n = 0u32;
    loop {
        let name = request.device.clone().unwrap_or_else(|| format!("ploop{n}"));
        runtime::check_name(&name)?;
        record.node = dev.join(&name);
        record.name = name;
        let reserved = request.device.is_none() && minors::is_reserved(&record.name);
        let taken = reserved || minors::is_taken(&record.name);
        if !taken {
            runtime::write_record(&new, &record)?;
            if runtime::publish(&new, &record.name)? {
                break;
            }
        }
        if request.device.is_some() {
            bail!(Busy, "{} exists; remove it or choose another name", record.node.display());
        }
        n += 1;
    }
    cleanup.keep();
    Ok((runtime::device_dir(&record.name), record, listener))
}

/// By which the kernel's tools tell whose the block device is.
fn top_name(record: &DeviceRecord) -> String {
    record.levels.last().map(|l| l.path.display().to_string()).unwrap_or_default()
}

/// Removes a folder, and what the transport has made in it, unless all went well.
struct Cleanup {
    dir: Option<PathBuf>,
    transport: Transport,
}

impl Cleanup {
    fn keep(mut self) {
        self.dir = None;
    }
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        if let Some(dir) = &self.dir {
            // No block device is bound yet, and the connection is closed, so this does not wait.
            self.transport.discard(dir);
            let _ = unflushed::retire(dir);
        }
    }
}

impl Supervisor {
    /// From an empty folder to a running device.
    fn bring_up(&mut self) -> Result<()> {
        let adopts = self.chain.attach().unflushed;
        self.chain.set_adopts(adopts);
        self.start_worker(adopts);
        self.wait_ready(host::now() + OPEN)?;
        self.chain.set_adopts(false);
        self.bind()?;
        self.chain.transport().hide(&self.dir)?;
        self.names.create(self.record.rdev)?;
        self.record.state = "running".into();
        self.save();
        self.follow();
        Ok(())
    }

    fn wait_ready(&mut self, end: Instant) -> Result<()> {
        loop {
            match self.slot.worker() {
                Some(worker) if worker.ready.is_some() => return Ok(()),
                Some(worker) => {
                    if let Some(error) = &worker.refused {
                        return Err(error.clone().into());
                    }
                }
                None => bail!(Sys, "the server's worker cannot be started"),
            }
            if self.slot.is_ending() {
                bail!(Sys, "the server's worker exited while it opened the images");
            }
            if host::now() >= end {
                bail!(Sys, "the images could not be opened within {} s", OPEN.as_secs());
            }
            self.poll_once(end, None);
        }
    }

    fn bind(&mut self) -> Result<()> {
        let name = top_name(&self.record);
        let wanted = Wanted { number: runtime::number(&self.record.name), read_only: self.record.read_only, name };
        let job = Job::Attach { transport: self.chain.transport(), dir: self.dir.clone(), wanted };
        let helper = self.helper(&job)?;
        let mut end = host::now() + BIND;
        let mut again = true;
        let result = loop {
            match self.helper_event(&helper, end) {
                Some(JobEvent::Chosen(binding)) => {
                    // Recorded before it is bound: the process that cleans up after this supervisor needs it.
                    self.record.backing = binding.backing;
                    self.record.rdev = binding.rdev;
                    self.save();
                    if let Err(e) = frame::send(&helper.sock, &Go, &[]) {
                        break Err(e);
                    }
                }
                Some(JobEvent::Attached(binding)) => {
                    self.record.diskseq = binding.diskseq;
                    break Ok(());
                }
                Some(JobEvent::Error { code, message }) => break Err(remote_error(code, message)),
                Some(_) => {}
                // The kernel waits for an answer of the worker's, uninterruptibly: another worker may give it.
                None if again => {
                    again = false;
                    end = host::now() + BIND_AGAIN;
                    self.slot.kill();
                }
                None => break Err(Error::new(Kind::Loop, "the block device could not be bound in time")),
            }
        };
        if result.is_err() {
            let _ = self.helper_end(helper);
        } else {
            self.release_helper(helper, false);
        }
        result
    }

    /// Kills a helper that failed or hangs; true: it has ended.
    fn helper_end(&mut self, mut helper: Helper) -> bool {
        helper.process.kill();
        let end = host::now() + Duration::from_secs(2);
        while host::now() < end {
            if !helper.process.runs() {
                return true;
            }
            self.poll_once(host::now() + Duration::from_millis(20), None);
        }
        // It sleeps in the kernel. The device was never in use: the end of the connection wakes it up.
        self.give_up();
        let end = host::now() + Duration::from_secs(10);
        while host::now() < end && helper.process.runs() {
            self.poll_once(host::now() + Duration::from_millis(20), None);
        }
        self.release_helper(helper, true);
        false
    }

    /// Undoes the attach of a device that was never used.
    pub(super) fn undo(mut self) {
        self.names.clear();
        if !self.record.backing.is_empty() {
            let job = Job::UndoAttach { backing: self.record.backing.clone(), rdev: self.record.rdev };
            if let Ok(helper) = self.helper(&job) {
                let done = self.helper_event(&helper, host::now() + UNDO).is_some();
                self.release_helper(helper, !done);
            }
        }
        self.chain.transport().discard(&self.dir);
        // The mark goes if the worker got so far as to set it.
        let end = host::now() + UNDO;
        self.slot.send(&ToWorker::Close);
        while self.slot.worker().is_some_and(|w| w.ready.is_some() && w.closed.is_none())
            && !self.slot.is_ending()
            && host::now() < end
        {
            self.poll_once(end, None);
        }
        let closed = self.slot.worker().is_some_and(|w| w.closed == Some(None));
        let started = stopped::is_recorded(&self.record.name);
        let levels = if started { self.share_levels() } else { Vec::new() };
        self.give_up();
        if started && closed {
            stopped::renew(&self.record, &levels);
        }
        drop(levels);
        let _ = if closed { runtime::remove_dir(&self.dir) } else { unflushed::retire(&self.dir) };
    }
}

//! Short-lived processes that do what a device's server must not do itself: open, bind, scan and unbind its own device.
#![forbid(unsafe_code)]

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::server::greeting::Greeting;
use crate::server::jobs::{Go, Job, JobEvent};
use crate::server::proto::own_greeting;
use crate::server::remote_error::RemoteError;
use crate::server::transport::{self, Binding, BlockBinding, Patience, Transport};
use crate::server::{balloon, control, daemon, frame, freeze, mounts, nodes, partitions, runtime, unflushed};
use crate::sys::host::{self, Process};
use crate::sys::process;

/// Mount namespaces that are made for one action, that of an abort for one, hold copies of all mounts so long at most.
const MOMENT: Duration = Duration::from_secs(2);

/// Longest wait of a helper for its parent.
const PARENT: Duration = Duration::from_secs(30);

/// A running helper.
pub struct Helper {
    pub process: Process,
    pub sock: OwnedFd,
}

impl Helper {
    /// Starts `program` as a helper and gives it its job.
    pub fn start(program: &Path, job: &Job) -> Result<Helper> {
        Helper::start_with(program, job, &[])
    }

    /// The same with descriptors beside the job.
    pub fn start_with(program: &Path, job: &Job, fds: &[BorrowedFd]) -> Result<Helper> {
        let helper = Helper::spawn(program, "helper")?;
        frame::send(&helper.sock, job, fds)?;
        Ok(helper)
    }

    /// Starts `program` to learn its version; [`Helper::greeting`] takes the answer as soon as the socket can be read.
    pub fn ask_version(program: &Path) -> Result<Helper> {
        Helper::spawn(program, "version")
    }

    fn spawn(program: &Path, mode: &str) -> Result<Helper> {
        let (ours, theirs) = frame::pair()?;
        let process = host::start(program, mode, theirs);
        let process = process.ctx(Kind::Sys, || format!("cannot start {}", program.display()))?;
        Ok(Helper { process, sock: ours })
    }

    /// The greeting of the program. One that knows no mode `version` ends without an answer: it is of version 1.
    pub fn greeting(&self, limit: Duration) -> Result<Greeting> {
        match frame::recv_within::<Greeting>(&self.sock, limit) {
            Ok(Some((greeting, _))) => Ok(greeting),
            Ok(None) => Ok(Greeting::default()),
            Err(e) => Err(e.context("the program does not tell its version")),
        }
    }

    /// Waits for the last event; kills the helper at the end of `limit`.
    pub fn finish(mut self, limit: Duration) -> Result<()> {
        let end = host::now() + limit;
        let result = loop {
            let left = end.saturating_duration_since(host::now());
            match frame::recv_within::<JobEvent>(&self.sock, left) {
                Ok(Some((JobEvent::Done, _))) => break Ok(()),
                Ok(Some((JobEvent::Error { code, message }, _))) => break Err(remote_error(code, message)),
                Ok(Some(_)) => {}
                Ok(None) => {
                    break Err(Error::new(Kind::Sys, "a helper process of ploop-server exited without an answer"));
                }
                Err(e) => break Err(e),
            }
        };
        // Killed or not, one that sleeps in the kernel cannot be waited for.
        self.process.kill();
        let reaped = host::now() + Duration::from_secs(1);
        while self.process.runs() && host::now() < reaped {
            host::sleep(Duration::from_millis(2));
        }
        result
    }
}

/// An error that came over a socket.
pub fn remote_error(code: i32, message: String) -> Error {
    RemoteError { code, message }.into()
}

/// Mode `version`: the greeting of this program to the socket on standard input.
pub fn tell_version() -> i32 {
    let Ok(sock) = host::take_standard(0) else { return 1 };
    i32::from(frame::send(&sock, &own_greeting(), &[]).is_err())
}

/// Mode `helper`: one job from the socket on standard input.
pub fn main() -> i32 {
    let Ok(sock) = host::take_standard(0) else { return 1 };
    let Ok(Some((job, fds))) = frame::recv_within::<Job>(&sock, PARENT) else { return 1 };
    let rest = job.clone();
    let event = match run(job, fds, sock.as_fd()) {
        Ok(event) => event,
        Err(e) => JobEvent::Error { code: e.code(), message: e.to_string() },
    };
    let sent = frame::send(&sock, &event, &[]);
    drop(sock);
    finish_job(&rest, &event);
    i32::from(sent.is_err())
}

/// What no process waits for.
fn finish_job(job: &Job, event: &JobEvent) {
    match (job, event) {
        (Job::Attach { wanted, .. }, JobEvent::Attached(binding)) => block_device(binding).tune(binding, wanted),
        (Job::Detach { binding, .. }, JobEvent::Done) => block_device(binding).remove(&binding.backing, binding.rdev),
        _ => {}
    }
}

fn run(job: Job, fds: Vec<OwnedFd>, sock: BorrowedFd) -> Result<JobEvent> {
    // A reclaim of memory must not end in the device that this process is about to bind.
    let _ = process::set_io_flusher();
    match job {
        Job::Attach { transport, dir, wanted } => {
            let mut chosen = |binding: &Binding| {
                frame::send(sock, &JobEvent::Chosen(binding.clone()), &[])?;
                wait_for_go(sock)
            };
            let binding = transport.binding().bind(&dir, &wanted, &mut chosen)?;
            // The device works without; the supervisor looks again when the table changes.
            let _ = scan(&binding);
            Ok(JobEvent::Attached(binding))
        }
        Job::UndoAttach { backing, rdev } => {
            Transport::of(&backing).binding().undo(&backing, rdev).map(|()| JobEvent::Done)
        }
        Job::Detach { binding, patience } => {
            let mut opened = || {
                frame::send(sock, &JobEvent::Opened, &[])?;
                wait_for_go(sock)
            };
            block_device(&binding).unbind(&binding, patience, &mut opened).map(|()| JobEvent::Done)
        }
        Job::Scan { binding } => scan(&binding).map(|()| JobEvent::Done),
        Job::SetCapacity { binding } => block_device(&binding).set_capacity(&binding).map(|()| JobEvent::Done),
        Job::Clean { name, wait } => clean(&name, wait).map(|()| JobEvent::Done),
        Job::Abort { transport, connection } => transport.binding().abort(connection).map(|()| JobEvent::Done),
        Job::Freeze => freeze::hold(fds),
        Job::PrepareFreeze => freeze::hold_later(fds),
        Job::DiscardBalloon { binding } => balloon::serve(&binding, fds),
    }
}

fn scan(binding: &Binding) -> Result<()> {
    let disk = block_device(binding).open(binding, 0).ctx(Kind::Open, || format!("cannot open {}", binding.backing))?;
    partitions::scan(&binding.backing, &disk)
        .ctx(Kind::Device, || format!("cannot make the partitions of {} known", binding.backing))
}

fn block_device(binding: &Binding) -> &'static dyn BlockBinding {
    Transport::of(&binding.backing).binding()
}

fn wait_for_go(sock: BorrowedFd) -> Result<()> {
    match frame::recv_within::<Go>(sock, PARENT)? {
        Some(_) => Ok(()),
        None => bail!(Sys, "the supervisor exited"),
    }
}

/// Removes what an exited server or an earlier boot left of device `name`. Refuses whatever is not provably ours, in
/// use, or running.
fn clean(name: &str, wait: bool) -> Result<()> {
    daemon::enter_host()?;
    runtime::check_name(name)?;
    let dir = runtime::device_dir(name);
    if fs::symlink_metadata(&dir).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound) {
        return Ok(());
    }
    let Some(record) = runtime::read_record(&dir)? else {
        // A version that does not know the memory has removed all the rest.
        if unflushed::is_all_there_is(&dir) {
            return unflushed::retire(&dir).ctx(Kind::Unlink, || format!("cannot remove {}", dir.display()));
        }
        bail!(Device, "{} holds no record of a device; look at it and remove it", dir.display());
    };
    if record.name != name {
        bail!(Device, "the record in {} is of {:?}; look at it and remove it", dir.display(), record.name);
    }
    let this_boot = runtime::is_this_boot(&record.boot);
    for (who, id) in [("supervisor", record.supervisor), ("worker", record.worker)] {
        if this_boot && runtime::may_live(id) {
            bail!(Busy, "{name} is served: its {who} is process {}", id.pid);
        }
    }
    if this_boot && control::has_listener(&dir) {
        bail!(Busy, "{name} is served: a process listens in {}", dir.display());
    }
    if this_boot && !record.backing.is_empty() {
        let binding = Binding { backing: record.backing.clone(), rdev: record.rdev, diskseq: record.diskseq };
        if runtime::backing_is_ours(&record) {
            let numbers = mounts::numbers(&binding.backing, binding.rdev);
            let patience =
                Patience { busy: Duration::from_secs(5), mounted: if wait { MOMENT } else { Duration::ZERO } };
            let begin = host::now();
            while let Some(at) = mounts::mounted_anywhere(&numbers) {
                if at.elsewhere.is_none() || host::since(begin) >= patience.mounted {
                    bail!(DevIoc, "{name} has lost its server and is still mounted at {at}; unmount it first");
                }
                host::sleep(Duration::from_millis(20));
            }
            block_device(&binding)
                .unbind(&binding, patience, &mut || {
                    remove_nodes(name, record.rdev);
                    Ok(())
                })
                // The block device behind has no meaning to users.
                .map_err(|e| {
                    remote_error(e.code(), e.to_string().replace(&binding.backing, &format!("/dev/{name}")))
                })?;
            block_device(&binding).remove(&binding.backing, binding.rdev);
        } else if record.state == "starting" {
            Transport::of(&record.backing).binding().undo(&record.backing, record.rdev)?;
        }
    }
    remove_nodes(name, record.rdev);
    transport::clean(&dir)?;
    let removed = if this_boot { unflushed::retire(&dir) } else { runtime::remove_dir(&dir) };
    removed.ctx(Kind::Unlink, || format!("cannot remove {}", dir.display()))
}

/// The disk's node must have the recorded number; partitions' nodes of a name that was ours are ours.
fn remove_nodes(name: &str, rdev: u64) {
    let dev = runtime::dev_dir();
    for (path, number) in nodes::existing(&dev, name) {
        if path != dev.join(name) || number == rdev {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn programs_tell_their_version_or_are_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let program = |name: &str, lines: &str| {
            let path = dir.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{lines}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        let ask = |path: &Path, limit: u64| {
            let mut helper = Helper::ask_version(path).unwrap();
            let greeting = helper.greeting(Duration::from_millis(limit));
            helper.process.kill();
            let _ = helper.process.wait();
            greeting
        };
        assert_eq!(ask(&program("old", "exit 2"), 5000).unwrap(), Greeting::default());
        let silent = ask(&program("silent", "exec sleep 5"), 50).unwrap_err();
        assert!(silent.to_string().contains("does not tell its version"), "{silent}");
        assert!(Helper::ask_version(&dir.path().join("none")).is_err());
        // What the program sends.
        let (ours, theirs) = frame::pair().unwrap();
        frame::send(&theirs, &own_greeting(), &[]).unwrap();
        let (got, _) = frame::recv_within::<Greeting>(&ours, Duration::ZERO).unwrap().unwrap();
        assert_eq!(got, own_greeting());
    }
}

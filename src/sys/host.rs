//! What library and server ask the host for beside files and sockets: time, waiting, processes.
//!
//! All of it goes through these functions, so that the simulation of whole lives (`lives`) can put a host of its
//! own in the kernel's place: there, processes are threads that run one at a time, each wait is a point at which another
//! one goes on, and each of them can be killed at each of these points.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollTimeout};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use crate::sys::{pidfd, process};

#[cfg(test)]
pub mod simulated;

/// The simulated host of the calling thread, if it has one.
macro_rules! simulated {
    ($host:ident => $call:expr) => {
        #[cfg(test)]
        if let Some($host) = simulated::current() {
            return $call;
        }
    };
}

pub fn now() -> Instant {
    simulated!(host => host.now());
    Instant::now()
}

/// Time since `then`, which is of [`now`].
pub fn since(then: Instant) -> Duration {
    now().saturating_duration_since(then)
}

pub fn sleep(time: Duration) {
    simulated!(host => host.sleep(time));
    std::thread::sleep(time);
}

/// `poll(2)`.
pub fn poll(fds: &mut [PollFd], timeout: PollTimeout) -> nix::Result<i32> {
    simulated!(host => host.poll(fds, timeout));
    nix::poll::poll(fds, timeout)
}

/// The number of this process.
pub fn pid() -> i32 {
    simulated!(host => host.pid());
    std::process::id() as i32
}

/// Ends this process.
pub fn exit(code: i32) -> ! {
    #[cfg(test)]
    if let Some(host) = simulated::current() {
        host.exit(code);
    }
    std::process::exit(code)
}

/// A step that other processes can see comes next: the simulation can kill this process before it. An error: this
/// process has been killed, and what still runs of it must not act any more.
#[cfg(test)]
pub fn step(what: &'static str) -> io::Result<()> {
    simulated!(host => host.step(what));
    let _ = what;
    Ok(())
}

/// A step that other processes can see comes next; always `Ok` outside of the simulation.
#[cfg(not(test))]
#[inline(always)]
pub fn step(_: &'static str) -> io::Result<()> {
    Ok(())
}

/// The root of the simulated host's names.
#[cfg(test)]
pub fn root() -> Option<std::path::PathBuf> {
    simulated::current().map(|host| host.root())
}

/// Whether this process runs in the simulation.
#[inline(always)]
pub fn is_simulated() -> bool {
    #[cfg(test)]
    return simulated::current().is_some();
    #[cfg(not(test))]
    false
}

/// A defect that the simulation puts back, to see that it is found.
#[cfg(test)]
pub fn breach(name: &'static str) -> bool {
    simulated::current().is_some_and(|host| host.breach(name))
}

/// Never outside of the simulation.
#[cfg(not(test))]
#[inline(always)]
pub fn breach(_: &'static str) -> bool {
    false
}

/// Takes over a standard descriptor; see [`process::take_standard`].
pub fn take_standard(fd: i32) -> io::Result<OwnedFd> {
    simulated!(host => host.take_socket());
    process::take_standard(fd)
}

/// Whether this process is killed as soon as the one that started it has exited.
pub fn exit_with_parent(enable: bool) -> io::Result<()> {
    simulated!(host => host.exit_with_parent(enable));
    process::exit_with_parent(enable)
}

/// Lets ps, top and the kernel's messages show that this process serves the device of that name.
pub fn show_device(device: &str) {
    if is_simulated() {
        return;
    }
    let short = device.strip_prefix("ploop").unwrap_or(device);
    // A number that is cut off would name another device.
    let fitting = ["ploop-server:", "ploop-srv:", "ploop:"].map(|p| format!("{p}{short}"));
    let short = fitting.iter().find(|f| f.len() <= 15).unwrap_or(&fitting[1]);
    process::show_as(short, device);
}

/// How a process has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exit {
    /// Another process has killed it.
    pub killed: bool,
}

/// A process that this one has started.
#[derive(Debug)]
pub struct Process {
    inner: Inner,
}

#[derive(Debug)]
enum Inner {
    Child(Child),
    /// Started before this process replaced its program.
    Earlier(nix::unistd::Pid),
    #[cfg(test)]
    Simulated(i32),
}

/// Starts the server's program in one of its modes, with `socket` as standard input, a clean environment and no terminal.
pub fn start(program: &Path, mode: &str, socket: OwnedFd) -> io::Result<Process> {
    simulated!(host => host.start(mode, socket).map(|pid| Process { inner: Inner::Simulated(pid) }));
    command(program, mode, socket).spawn().map(|child| Process { inner: Inner::Child(child) })
}

fn command(program: &Path, mode: &str, socket: OwnedFd) -> Command {
    let mut command = Command::new(program);
    command
        .arg0("ploop-server")
        .args([mode, process::ROOM_FOR_NAME])
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(socket)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// Replaces the program of this process; `socket` becomes its standard input. Returns only if that fails.
pub fn exec(program: &Path, mode: &str, socket: OwnedFd) -> io::Error {
    #[cfg(test)]
    if let Some(host) = simulated::current() {
        host.exec(mode, socket);
    }
    command(program, mode, socket).exec()
}

impl Process {
    /// A child of this process that an earlier program of it has started.
    pub fn of_child(pid: i32) -> Process {
        #[cfg(test)]
        if is_simulated() {
            return Process { inner: Inner::Simulated(pid) };
        }
        Process { inner: Inner::Earlier(nix::unistd::Pid::from_raw(pid)) }
    }

    pub fn id(&self) -> i32 {
        match &self.inner {
            Inner::Child(child) => child.id() as i32,
            Inner::Earlier(pid) => pid.as_raw(),
            #[cfg(test)]
            Inner::Simulated(pid) => *pid,
        }
    }

    pub fn kill(&mut self) {
        match &mut self.inner {
            // It may have exited.
            Inner::Child(child) => drop(child.kill()),
            Inner::Earlier(pid) => drop(nix::sys::signal::kill(*pid, nix::sys::signal::SIGKILL)),
            #[cfg(test)]
            Inner::Simulated(pid) => simulated::with(|host| host.kill(*pid)),
        }
    }

    /// How it has ended; none: it runs. An error: this process has reaped it elsewhere.
    pub fn try_wait(&mut self) -> io::Result<Option<Exit>> {
        match &mut self.inner {
            Inner::Child(child) => Ok(child.try_wait()?.map(exit_of)),
            Inner::Earlier(pid) => Ok(exited(waitpid(*pid, Some(WaitPidFlag::WNOHANG))?)),
            #[cfg(test)]
            Inner::Simulated(pid) => Ok(simulated::with(|host| host.exit_of(*pid))),
        }
    }

    /// Whether it has not ended yet.
    pub fn runs(&mut self) -> bool {
        matches!(self.try_wait(), Ok(None))
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> io::Result<Exit> {
        match &mut self.inner {
            Inner::Child(child) => child.wait().map(exit_of),
            Inner::Earlier(pid) => Ok(exited(waitpid(*pid, None)?).unwrap_or(Exit { killed: true })),
            #[cfg(test)]
            Inner::Simulated(pid) => Ok(simulated::with(|host| host.wait_for(*pid))),
        }
    }
}

fn exit_of(status: std::process::ExitStatus) -> Exit {
    Exit { killed: matches!(status.signal(), Some(libc::SIGKILL | libc::SIGTERM)) }
}

fn exited(status: WaitStatus) -> Option<Exit> {
    match status {
        WaitStatus::Exited(..) => Some(Exit { killed: false }),
        WaitStatus::Signaled(_, signal, _) => {
            Some(Exit { killed: matches!(signal, Signal::SIGKILL | Signal::SIGTERM) })
        }
        _ => None,
    }
}

/// A descriptor that can be read once the process has exited; see [`pidfd::open`].
pub fn watch(pid: i32) -> io::Result<OwnedFd> {
    simulated!(host => host.watch(pid));
    pidfd::open(pid)
}

/// Kills the process behind a descriptor of [`watch`].
pub fn kill(watched: BorrowedFd, pid: i32) {
    simulated!(host => host.kill(pid));
    let _ = pid;
    pidfd::send_signal(std::os::fd::AsRawFd::as_raw_fd(&watched), libc::SIGKILL);
}

/// The number of the process at the other end of a socket that came with the start of this process.
pub fn peer(socket: impl AsFd) -> nix::Result<i32> {
    simulated!(host => Ok(host.parent()));
    nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::PeerCredentials).map(|peer| peer.pid())
}

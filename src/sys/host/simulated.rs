//! The seam for a simulated host: what a thread of a simulated process asks instead of the kernel.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollTimeout};

use super::Exit;

/// One simulated process's view of its host.
pub trait Host {
    fn now(&self) -> Instant;
    fn sleep(&self, time: Duration);
    fn poll(&self, fds: &mut [PollFd], timeout: PollTimeout) -> nix::Result<i32>;
    fn pid(&self) -> i32;
    fn parent(&self) -> i32;
    fn exit(&self, code: i32) -> !;
    fn exec(&self, mode: &str, socket: OwnedFd) -> !;
    fn step(&self, what: &'static str) -> io::Result<()>;
    fn root(&self) -> PathBuf;
    fn breach(&self, name: &'static str) -> bool;
    fn take_socket(&self) -> io::Result<OwnedFd>;
    fn exit_with_parent(&self, enable: bool) -> io::Result<()>;
    fn start(&self, mode: &str, socket: OwnedFd) -> io::Result<i32>;
    fn watch(&self, pid: i32) -> io::Result<OwnedFd>;
    fn kill(&self, pid: i32);
    /// None: it runs.
    fn exit_of(&self, pid: i32) -> Option<Exit>;
    fn wait_for(&self, pid: i32) -> Exit;
    /// When the process was started; none: it has exited.
    fn start_time(&self, pid: i32) -> Option<u64>;
    /// Names the boot of the host.
    fn boot(&self) -> String;
    /// A message for the host's administrator.
    fn log(&self, line: String);
    /// Starts a thread of this process.
    fn thread(&self, name: &str, run: Box<dyn FnOnce() + Send>);
    /// Waits until `ready`, which another process or thread brings about.
    fn block(&self, ready: Box<dyn FnMut() -> bool + Send>);
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<dyn Host>>> = const { RefCell::new(None) };
}

/// The host of the calling thread.
pub fn current() -> Option<Rc<dyn Host>> {
    CURRENT.with_borrow(Clone::clone)
}

/// Makes the calling thread one of a simulated process.
pub fn enter(host: Rc<dyn Host>) {
    CURRENT.with_borrow_mut(|current| *current = Some(host));
}

/// The calling thread belongs to no simulated process any more.
pub fn leave() {
    CURRENT.with_borrow_mut(|current| *current = None);
}

/// For what only simulated processes reach.
pub fn with<T>(call: impl FnOnce(Rc<dyn Host>) -> T) -> T {
    call(current().expect("this thread belongs to no simulated process"))
}

/// Which of these descriptors are ready now.
pub fn poll_now(fds: &mut [libc::pollfd]) {
    if !fds.is_empty() {
        // SAFETY: the array has the stated length; a descriptor that is closed by now is answered as such.
        unsafe {
            libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 0);
        }
    }
}

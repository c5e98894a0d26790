//! What a simulated process sees of its host.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::schedule::{WAITS, strike};
use super::world::{Blocked, Execs, MODES, NEVER, Ready, STEP, STEPS, Unwinds, World, main_of};
use crate::sys::host::Exit;
use crate::sys::host::simulated::Host;

/// A simulated process's view, for one of its threads.
pub struct View {
    pub world: Arc<World>,
    pub task: usize,
    pub pid: i32,
}

impl View {
    fn clock(&self) -> Duration {
        self.world.lock().clock
    }

    fn unwind(&self) -> ! {
        resume_unwind(Box::new(Unwinds))
    }
}

impl Host for View {
    fn now(&self) -> Instant {
        let dead = self.world.is_dead(self.pid);
        self.world.base + self.clock() + if dead { NEVER } else { Duration::ZERO }
    }

    fn sleep(&self, time: Duration) {
        if self.world.is_dead(self.pid) {
            return;
        }
        let until = Some(self.clock() + time);
        self.world.switch(self.task, Some(Blocked { until, ..Blocked::default() }));
    }

    fn poll(&self, fds: &mut [PollFd], timeout: PollTimeout) -> nix::Result<i32> {
        if self.step("poll").is_err() {
            return Ok(0);
        }
        let found = nix::poll::poll(fds, PollTimeout::ZERO)?;
        if found > 0 || timeout == PollTimeout::ZERO {
            return Ok(found);
        }
        use std::os::fd::AsFd;
        let raw = fds.iter().map(|p| libc::pollfd { fd: p.as_fd().as_raw_fd(), events: p.events().bits(), revents: 0 });
        let until = match timeout.is_none() {
            true => None,
            false => Some(self.clock() + Duration::from_millis(u64::from(timeout.as_millis().unwrap_or(0)))),
        };
        self.world.switch(self.task, Some(Blocked { fds: raw.collect(), until, ready: None }));
        nix::poll::poll(fds, PollTimeout::ZERO)
    }

    fn pid(&self) -> i32 {
        self.pid
    }

    fn parent(&self) -> i32 {
        self.world.lock().processes.get(&self.pid).map_or(0, |p| p.parent)
    }

    fn exit(&self, code: i32) -> ! {
        self.world.say(format!("exits with {code}"));
        {
            let mut state = self.world.lock();
            if let Some(process) = state.processes.get_mut(&self.pid).filter(|p| !p.dead) {
                process.dead = true;
                process.exits = true;
            }
        }
        self.unwind()
    }

    fn exec(&self, mode: &str, socket: OwnedFd) -> ! {
        let _ = self.step("replace the program");
        {
            let mut state = self.world.lock();
            if let Some(process) = state.processes.get_mut(&self.pid) {
                process.dead = true;
                process.socket = Some(socket);
                process.mode = mode.into();
            }
        }
        resume_unwind(Box::new(Execs))
    }

    fn step(&self, what: &'static str) -> io::Result<()> {
        if self.world.is_dead(self.pid) {
            if !std::thread::panicking() {
                self.unwind();
            }
            return Err(io::Error::other("the process was killed"));
        }
        if what != "poll" || self.world.shows_waits() {
            self.world.say(what.into());
        }
        {
            let mut state = self.world.lock();
            state.clock += STEP;
            state.steps += 1;
            if state.steps > STEPS {
                state.failure.get_or_insert(format!("no end after {STEPS} steps"));
            }
            if !WAITS.contains(&what) {
                strike(&mut state, self.pid);
            }
        }
        self.world.switch(self.task, None);
        Ok(())
    }

    fn root(&self) -> PathBuf {
        self.world.root.clone()
    }

    fn breach(&self, name: &'static str) -> bool {
        self.world.breach == Some(name)
    }

    fn take_socket(&self) -> io::Result<OwnedFd> {
        let taken = self.world.lock().processes.get_mut(&self.pid).and_then(|p| p.socket.take());
        taken.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn exit_with_parent(&self, enable: bool) -> io::Result<()> {
        self.step("exit with the parent, or not")?;
        let mut state = self.world.lock();
        if let Some(process) = state.processes.get_mut(&self.pid) {
            process.dies_with_parent = enable;
        }
        Ok(())
    }

    fn start(&self, mode: &str, socket: OwnedFd) -> io::Result<i32> {
        self.step("start a process")?;
        let world = self.world.clone();
        let parent = self.pid;
        let mode: &'static str = MODES.iter().find(|m| **m == mode).copied().unwrap_or("unknown");
        Ok(self.world.process(mode, parent, Some(socket), Box::new(move || main_of(&world, mode, parent))))
    }

    fn watch(&self, pid: i32) -> io::Result<OwnedFd> {
        use std::os::fd::AsFd;
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let ours = event.as_fd().try_clone_to_owned()?;
        let mut state = self.world.lock();
        match state.processes.get_mut(&pid) {
            Some(process) if process.exit.is_none() => process.watchers.push(event),
            Some(_) => drop(event.write(1)),
            None => return Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
        Ok(ours)
    }

    fn kill(&self, pid: i32) {
        if self.step("kill a process").is_ok() {
            self.world.kill(pid);
        }
    }

    fn exit_of(&self, pid: i32) -> Option<Exit> {
        let _ = self.step("look at a process");
        match self.world.lock().processes.get(&pid) {
            Some(process) => process.exit,
            None => Some(Exit { killed: true }),
        }
    }

    fn wait_for(&self, pid: i32) -> Exit {
        loop {
            if let Some(exit) = self.exit_of(pid) {
                return exit;
            }
            if self.world.is_dead(self.pid) {
                return Exit { killed: true };
            }
            self.sleep(Duration::from_micros(200));
        }
    }

    fn start_time(&self, pid: i32) -> Option<u64> {
        let state = self.world.lock();
        state.processes.get(&pid).filter(|p| p.exit.is_none()).map(|p| p.start_time)
    }

    fn boot(&self) -> String {
        format!("boot-{}", self.world.lock().boot)
    }

    fn log(&self, line: String) {
        self.world.say(format!("logs: {line}"));
    }

    fn thread(&self, name: &str, run: Box<dyn FnOnce() + Send>) {
        self.world.thread(self.pid, name, run);
    }

    fn block(&self, ready: Ready) {
        if self.step("wait").is_err() {
            return;
        }
        self.world.switch(self.task, Some(Blocked { ready: Some(ready), ..Blocked::default() }));
    }
}

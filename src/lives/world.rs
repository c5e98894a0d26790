//! The simulated host: processes that are threads of which one runs at a time, a clock, and kills.
//!
//! A thread runs until it waits or comes to a step that others can see. There the seed decides which one goes on, and
//! whether a process is killed. A killed process unwinds: its descriptors are closed, its locks fall, and nothing of it
//! acts any more ([`Host::step`] fails, sends and writes with it).

use std::any::Any;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::transport::Devices;
use crate::server::{attach, helper, resume, worker};
use crate::sys::host::simulated::{self, Host};
use crate::sys::host::{self, Exit};
use crate::testing::rng::Rng;

/// What a step costs on the clock.
const STEP: Duration = Duration::from_micros(20);
/// The clock of what has been killed and still unwinds: every wait of it is over.
const NEVER: Duration = Duration::from_secs(10 * 365 * 86_400);
/// Steps of a life after which something goes round in circles.
const STEPS: u64 = 400_000;
/// Lines of the trace that a failure shows.
const TRACE: usize = 4000;

/// The driver of the life: it is never killed.
pub const DRIVER: i32 = 1;

/// Why a thread of a simulated process unwinds.
struct Unwinds;

/// It replaces its program.
struct Execs;

type Ready = Box<dyn FnMut() -> bool + Send>;

#[derive(Default)]
struct Task {
    pid: i32,
    name: String,
    done: bool,
    blocked: Option<Blocked>,
    wake: Arc<Condvar>,
}

#[derive(Default)]
struct Blocked {
    fds: Vec<libc::pollfd>,
    ready: Option<Ready>,
    until: Option<Duration>,
}

struct Process {
    mode: String,
    parent: i32,
    start_time: u64,
    /// Threads that have not ended.
    threads: usize,
    /// Nothing of it may act any more.
    dead: bool,
    /// By its own will.
    exits: bool,
    exit: Option<Exit>,
    socket: Option<OwnedFd>,
    watchers: Vec<EventFd>,
    dies_with_parent: bool,
}

/// Which process is killed, and when.
#[derive(Clone, Debug)]
pub struct Kill {
    /// Steps until then, of those that change something and are made by a process of the modes.
    pub steps: u64,
    /// The modes of the process to be killed; empty: any.
    pub modes: Vec<&'static str>,
}

struct State {
    clock: Duration,
    rng: Rng,
    tasks: Vec<Task>,
    current: usize,
    processes: BTreeMap<i32, Process>,
    next_pid: i32,
    boot: u64,
    kills: Vec<Kill>,
    killed: Vec<String>,
    steps: u64,
    trace: Vec<String>,
    /// What went wrong in a simulated process.
    failure: Option<String>,
    /// The driver has been woken up for it.
    failed: bool,
}

pub struct World {
    state: Mutex<State>,
    base: Instant,
    root: PathBuf,
    pub devices: Devices,
    breach: Option<&'static str>,
    /// Requests are kept in the journal of workers: the kernel does not give them out again.
    pub journal: bool,
    traced: bool,
}

/// A simulated process's view, for one of its threads.
struct View {
    world: Arc<World>,
    task: usize,
    pid: i32,
}

thread_local! {
    static WORLD: RefCell<Option<Arc<World>>> = const { RefCell::new(None) };
}

/// The world of the calling thread.
pub fn world() -> Arc<World> {
    WORLD.with_borrow(Clone::clone).expect("this thread belongs to no simulated process")
}

impl World {
    /// A world in the folder `root`; the calling thread becomes its driver.
    pub fn begin(root: PathBuf, seed: u64, breach: Option<&'static str>) -> Arc<World> {
        let driver = Task { pid: DRIVER, name: "driver".into(), ..Task::default() };
        let state = State {
            clock: Duration::ZERO,
            rng: Rng::new(seed ^ 0x11fe),
            tasks: vec![driver],
            current: 0,
            processes: BTreeMap::new(),
            next_pid: 100,
            boot: 1,
            kills: Vec::new(),
            killed: Vec::new(),
            steps: 0,
            trace: Vec::new(),
            failure: None,
            failed: false,
        };
        let world = Arc::new(World {
            state: Mutex::new(state),
            base: Instant::now(),
            root,
            devices: Devices::default(),
            breach,
            journal: seed % 3 == 2,
            traced: std::env::var_os("PLOOP_TRACE").is_some(),
        });
        world.lock().processes.insert(DRIVER, Process::new("driver", 0, 0, None));
        WORLD.set(Some(world.clone()));
        simulated::enter(Rc::new(View { world: world.clone(), task: 0, pid: DRIVER }));
        world
    }

    /// The calling thread leaves the world again; all processes are dead by then.
    pub fn end() {
        WORLD.set(None);
        simulated::leave();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a process that runs `main`; its number.
    pub fn run(self: &Arc<World>, mode: &str, main: impl FnOnce() + Send + 'static) -> i32 {
        let parent = host::pid();
        self.process(mode, parent, None, Box::new(main))
    }

    fn process(
        self: &Arc<World>,
        mode: &str,
        parent: i32,
        socket: Option<OwnedFd>,
        main: Box<dyn FnOnce() + Send>,
    ) -> i32 {
        let pid = {
            let mut state = self.lock();
            state.next_pid += 1;
            let pid = state.next_pid;
            let start = state.steps + 1;
            state.processes.insert(pid, Process::new(mode, parent, start, socket));
            pid
        };
        self.thread(pid, "main", main);
        pid
    }

    fn thread(self: &Arc<World>, pid: i32, name: &str, main: Box<dyn FnOnce() + Send>) {
        let task = {
            let mut state = self.lock();
            let Some(process) = state.processes.get_mut(&pid) else { return };
            process.threads += 1;
            let name = format!("{} {pid} {name}", process.mode);
            state.tasks.push(Task { pid, name, ..Task::default() });
            state.tasks.len() - 1
        };
        let world = self.clone();
        std::thread::Builder::new()
            .stack_size(512 << 10)
            .spawn(move || {
                WORLD.set(Some(world.clone()));
                simulated::enter(Rc::new(View { world: world.clone(), task, pid }));
                let mut ended = catch_unwind(AssertUnwindSafe(|| {
                    world.wait_for_turn(task);
                    main();
                }));
                while ended.as_ref().is_err_and(|what| what.is::<Execs>()) {
                    let (mode, parent) = world.replaced(pid);
                    ended = catch_unwind(AssertUnwindSafe(|| main_of(&world, mode, parent)));
                }
                if let Err(what) = ended
                    && !what.is::<Unwinds>()
                {
                    world.fail(format!("process {pid} panicked: {}", text_of(&what)));
                }
                world.thread_ended(task, name_is_main(&world, task));
                WORLD.set(None);
                simulated::leave();
            })
            .expect("a thread");
    }

    /// The first failure of a simulated process, with the trace.
    pub fn fail(&self, why: String) {
        let mut state = self.lock();
        state.failure.get_or_insert(why);
    }

    pub fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    pub fn steps(&self) -> u64 {
        self.lock().steps
    }

    pub fn trace(&self) -> String {
        let state = self.lock();
        let from = state.trace.len().saturating_sub(TRACE);
        state.trace[from..].join("\n")
    }

    pub fn say(&self, line: String) {
        if self.traced {
            let mut state = self.lock();
            let clock = state.clock;
            let name = state.tasks[state.current].name.clone();
            state.trace.push(format!("{:>12.6} {name}: {line}", clock.as_secs_f64()));
        }
    }

    /// Plans kills from here on.
    pub fn plan(&self, kills: Vec<Kill>) {
        self.lock().kills = kills;
    }

    /// The modes of what was killed since the last call.
    pub fn take_killed(&self) -> Vec<String> {
        let mut state = self.lock();
        state.kills.clear();
        std::mem::take(&mut state.killed)
    }

    /// Kills whatever runs but the driver, and waits for its end: the host has lost its power.
    pub fn power_off(&self) {
        {
            let mut state = self.lock();
            state.kills.clear();
            let all: Vec<i32> = state.processes.keys().copied().filter(|pid| *pid != DRIVER).collect();
            for pid in all {
                kill(&mut state, pid);
            }
            state.boot += 1;
        }
        while self.lock().processes.iter().any(|(pid, p)| *pid != DRIVER && p.exit.is_none()) {
            host::sleep(Duration::from_millis(1));
        }
        self.lock().processes.retain(|pid, _| *pid == DRIVER);
    }

    /// Whatever runs, for messages.
    pub fn all_running(&self) -> Vec<String> {
        let state = self.lock();
        let runs = state.processes.iter().filter(|(_, p)| p.exit.is_none());
        runs.map(|(pid, p)| format!("{} {pid}", p.mode)).collect()
    }

    pub fn kill(&self, pid: i32) {
        kill(&mut self.lock(), pid);
    }

    /// The process begins anew with another program.
    fn replaced(&self, pid: i32) -> (&'static str, i32) {
        let mut state = self.lock();
        let process = state.processes.get_mut(&pid).expect("a process");
        process.dead = false;
        (MODES.iter().find(|m| **m == process.mode).copied().unwrap_or("unknown"), process.parent)
    }

    fn is_dead(&self, pid: i32) -> bool {
        self.lock().processes.get(&pid).is_none_or(|p| p.dead)
    }

    /// The calling thread waits until it is its turn.
    fn wait_for_turn(&self, task: usize) {
        let mut state = self.lock();
        let wake = state.tasks[task].wake.clone();
        while state.current != task {
            state = wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let pid = state.tasks[task].pid;
        let dead = state.processes.get(&pid).is_none_or(|p| p.dead);
        drop(state);
        if dead && !std::thread::panicking() {
            resume_unwind(Box::new(Unwinds));
        }
    }

    /// Another thread's turn, or this one's again.
    fn switch(&self, task: usize, blocked: Option<Blocked>) {
        {
            let mut state = self.lock();
            state.tasks[task].blocked = blocked;
            choose(&mut state);
        }
        self.wait_for_turn(task);
        self.lock().tasks[task].blocked = None;
    }

    fn thread_ended(&self, task: usize, main: bool) {
        // What it owned has been dropped. It may have ended without being the one whose turn it is only if it panicked
        // while it waited, which it cannot.
        let mut state = self.lock();
        state.tasks[task].done = true;
        state.tasks[task].blocked = None;
        let pid = state.tasks[task].pid;
        if main {
            kill_threads(&mut state, pid);
        }
        let process = state.processes.get_mut(&pid);
        if let Some(process) = process {
            process.threads -= 1;
            if process.threads == 0 {
                process.exit = Some(Exit { killed: !process.exits });
                process.socket = None;
                for watcher in process.watchers.drain(..) {
                    let _ = watcher.write(1);
                }
                let orphans: Vec<i32> = state
                    .processes
                    .iter()
                    .filter(|(_, p)| p.parent == pid && p.dies_with_parent && p.exit.is_none())
                    .map(|(child, _)| *child)
                    .collect();
                for child in orphans {
                    kill(&mut state, child);
                }
            }
        }
        choose(&mut state);
    }
}

impl Process {
    fn new(mode: &str, parent: i32, start_time: u64, socket: Option<OwnedFd>) -> Process {
        Process {
            mode: mode.into(),
            parent,
            start_time,
            threads: 0,
            dead: false,
            exits: false,
            exit: None,
            socket,
            watchers: Vec::new(),
            dies_with_parent: false,
        }
    }
}

fn name_is_main(world: &World, task: usize) -> bool {
    world.lock().tasks[task].name.ends_with(" main")
}

fn text_of(what: &Box<dyn Any + Send>) -> String {
    match (what.downcast_ref::<String>(), what.downcast_ref::<&str>()) {
        (Some(s), _) => s.clone(),
        (_, Some(s)) => (*s).to_string(),
        _ => "?".into(),
    }
}

fn kill(state: &mut State, pid: i32) {
    if let Some(process) = state.processes.get_mut(&pid).filter(|p| p.exit.is_none() && !p.dead) {
        process.dead = true;
        let mode = process.mode.clone();
        let clock = state.clock;
        state.trace.push(format!("{:>12.6} killed: {mode} {pid}", clock.as_secs_f64()));
    }
}

/// The main thread has ended: the others end with it, which is no kill.
fn kill_threads(state: &mut State, pid: i32) {
    if let Some(process) = state.processes.get_mut(&pid).filter(|p| !p.dead) {
        process.dead = true;
        process.exits = true;
    }
}

/// Chooses the thread whose turn it is.
fn choose(state: &mut State) {
    if state.failure.is_some() && !state.failed {
        // The driver decides what becomes of the rest.
        state.failed = true;
        state.current = 0;
        state.tasks[0].wake.notify_one();
        return;
    }
    loop {
        let able = able(state);
        if !able.is_empty() {
            let at = state.rng.index(able.len());
            state.current = able[at];
            state.tasks[able[at]].wake.notify_one();
            return;
        }
        let next = state.tasks.iter().filter(|t| !t.done).filter_map(|t| t.blocked.as_ref()?.until).min();
        match next {
            Some(at) => state.clock = state.clock.max(at),
            None => {
                // The driver finds out.
                let waiting: Vec<&str> = state.tasks.iter().filter(|t| !t.done).map(|t| t.name.as_str()).collect();
                let why = format!("nothing goes on: {} wait for each other", waiting.join(", "));
                state.failure.get_or_insert(why);
                state.failed = true;
                state.current = 0;
                state.tasks[0].wake.notify_one();
                return;
            }
        }
    }
}

/// Threads that can go on.
fn able(state: &mut State) -> Vec<usize> {
    let State { tasks, processes, clock, .. } = state;
    let mut fds: Vec<libc::pollfd> = Vec::new();
    for task in tasks.iter().filter(|t| !t.done) {
        fds.extend(task.blocked.iter().flat_map(|b| &b.fds));
    }
    simulated::poll_now(&mut fds);
    let mut able = Vec::new();
    let mut at = 0;
    for (i, task) in tasks.iter_mut().enumerate() {
        if task.done {
            continue;
        }
        let dead = processes.get(&task.pid).is_none_or(|p| p.dead);
        let can = match &mut task.blocked {
            None => true,
            Some(b) => {
                let polled = &fds[at..at + b.fds.len()];
                at += b.fds.len();
                polled.iter().any(|p| p.revents != 0)
                    || b.until.is_some_and(|u| u <= *clock)
                    || b.ready.as_mut().is_some_and(|ready| ready())
            }
        };
        if can || dead {
            able.push(i);
        }
    }
    able
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
        self.world.say(what.into());
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

const MODES: [&str; 8] = ["start", "adopt", "supervise", "adopted", "resumed", "helper", "worker", "version"];

/// What the program does in its modes, as `ploop-server` does it.
fn main_of(world: &Arc<World>, mode: &'static str, parent: i32) {
    let detached = |mode: &'static str| {
        let socket = simulated::with(|host| host.take_socket()).ok();
        let world_of = world.clone();
        world.process(mode, parent, socket, Box::new(move || main_of(&world_of, mode, parent)));
        0
    };
    let code = match mode {
        "start" => detached("supervise"),
        "adopt" => detached("adopted"),
        "supervise" => attach::supervise(),
        "adopted" => resume::adopt(),
        "resumed" => resume::resume(),
        "helper" => helper::main(),
        "worker" => worker::worker_main(),
        "version" => helper::tell_version(),
        _ => 2,
    };
    host::exit(code)
}

/// Steps that change nothing.
const WAITS: [&str; 4] = ["poll", "wait", "look at a process", "read a file"];

/// Kills what is to be killed at this step, which process `pid` is about to make.
fn strike(state: &mut State, pid: i32) {
    let Some(mode) = state.processes.get(&pid).map(|p| p.mode.clone()).filter(|mode| mode != "app") else { return };
    let mut due = Vec::new();
    for kill in state.kills.iter_mut().filter(|k| k.modes.is_empty() || k.modes.iter().any(|m| *m == mode)) {
        kill.steps = kill.steps.saturating_sub(1);
        if kill.steps == 0 {
            due.push(kill.modes.clone());
        }
    }
    state.kills.retain(|k| k.steps > 0);
    for modes in due {
        let victims: Vec<i32> = state
            .processes
            .iter()
            .filter(|(pid, p)| **pid != DRIVER && p.exit.is_none() && !p.dead && p.mode != "app")
            .filter(|(_, p)| modes.is_empty() || modes.iter().any(|m| p.mode == *m))
            .map(|(pid, _)| *pid)
            .collect();
        if !victims.is_empty() {
            // Mostly the one that is about to act.
            let at = match victims.iter().position(|v| *v == pid) {
                Some(own) if state.rng.below(4) > 0 => own,
                _ => state.rng.index(victims.len()),
            };
            let victim = victims[at];
            let mode = state.processes[&victim].mode.clone();
            kill(state, victim);
            state.killed.push(mode);
        }
    }
}

impl World {
    /// A number below `n`; 0 if that is 0.
    pub fn choose(&self, n: usize) -> usize {
        self.lock().rng.index(n)
    }
}

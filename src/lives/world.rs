//! The simulated host: processes that are threads of which one runs at a time, a clock, and kills.
//!
//! A thread runs until it waits or comes to a step that others can see. There the seed decides which one goes on, and
//! whether a process is killed. A killed process unwinds: its descriptors are closed, its locks fall, and nothing of it
//! acts any more ([`Host::step`] fails, sends and writes with it).

use std::any::Any;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;

use super::schedule::choose;
use super::transport::Devices;
use super::view::View;
use crate::server::supervisor::{attach, resume};
use crate::server::{helper, worker};
use crate::sys::host::simulated;
use crate::sys::host::{self, Exit};
use crate::testing::rng::Rng;

/// What a step costs on the clock.
pub(super) const STEP: Duration = Duration::from_micros(20);
/// The clock of what has been killed and still unwinds: every wait of it is over.
pub(super) const NEVER: Duration = Duration::from_secs(10 * 365 * 86_400);
/// Steps of a life after which something goes round in circles.
pub(super) const STEPS: u64 = 400_000;
/// Lines of the trace that a failure shows.
const TRACE: usize = 4000;

/// The driver of the life: it is never killed.
pub const DRIVER: i32 = 1;

/// Why a thread of a simulated process unwinds.
pub(super) struct Unwinds;

/// It replaces its program.
pub(super) struct Execs;

pub(super) type Ready = Box<dyn FnMut() -> bool + Send>;

#[derive(Default)]
pub(super) struct Task {
    pub pid: i32,
    pub name: String,
    pub done: bool,
    pub blocked: Option<Blocked>,
    pub wake: Arc<Condvar>,
}

#[derive(Default)]
pub(super) struct Blocked {
    pub fds: Vec<libc::pollfd>,
    pub ready: Option<Ready>,
    pub until: Option<Duration>,
}

pub(super) struct Process {
    pub mode: String,
    pub parent: i32,
    pub start_time: u64,
    /// Threads that have not ended.
    threads: usize,
    /// Nothing of it may act any more.
    pub dead: bool,
    /// By its own will.
    pub exits: bool,
    pub exit: Option<Exit>,
    pub socket: Option<OwnedFd>,
    pub watchers: Vec<EventFd>,
    pub dies_with_parent: bool,
}

/// Which process is killed, and when.
#[derive(Clone, Debug)]
pub struct Kill {
    /// Steps until then, of those that change something and are made by a process of the modes.
    pub steps: u64,
    /// The modes of the process to be killed; empty: any.
    pub modes: Vec<&'static str>,
}

pub(super) struct State {
    pub clock: Duration,
    pub rng: Rng,
    pub tasks: Vec<Task>,
    pub current: usize,
    pub processes: BTreeMap<i32, Process>,
    next_pid: i32,
    pub boot: u64,
    pub kills: Vec<Kill>,
    pub killed: Vec<String>,
    pub steps: u64,
    trace: Vec<String>,
    /// What went wrong in a simulated process.
    pub failure: Option<String>,
    /// The driver has been woken up for it.
    pub failed: bool,
}

pub struct World {
    state: Mutex<State>,
    pub(super) base: Instant,
    pub(super) root: PathBuf,
    pub devices: Devices,
    pub(super) breach: Option<&'static str>,
    /// Requests are kept in the journal of workers: the kernel does not give them out again.
    pub journal: bool,
    traced: bool,
    waits: bool,
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
            waits: std::env::var_os("PLOOP_TRACE").is_some_and(|v| v == "all"),
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

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a process that runs `main`; its number.
    pub fn run(self: &Arc<World>, mode: &str, main: impl FnOnce() + Send + 'static) -> i32 {
        let parent = host::pid();
        self.process(mode, parent, None, Box::new(main))
    }

    pub(super) fn process(
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

    pub(super) fn thread(self: &Arc<World>, pid: i32, name: &str, main: Box<dyn FnOnce() + Send>) {
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

    /// Waits are shown, too: tens of thousands where nothing happens for long.
    pub fn shows_waits(&self) -> bool {
        self.waits
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
        let (mode, name) = (process.mode.clone(), format!("{} {pid} main", process.mode));
        for task in state.tasks.iter_mut().filter(|t| t.pid == pid && !t.done) {
            task.name = name.clone();
        }
        let process = state.processes.get_mut(&pid).expect("a process");
        (MODES.iter().find(|m| **m == mode).copied().unwrap_or("unknown"), process.parent)
    }

    pub(super) fn is_dead(&self, pid: i32) -> bool {
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
    pub(super) fn switch(&self, task: usize, blocked: Option<Blocked>) {
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

pub(super) fn kill(state: &mut State, pid: i32) {
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

pub(super) const MODES: [&str; 8] =
    ["start", "adopt", "supervise", "adopted", "resumed", "helper", "worker", "version"];

/// What the program does in its modes, as `ploop-server` does it.
pub(super) fn main_of(world: &Arc<World>, mode: &'static str, parent: i32) {
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

impl World {
    /// A number below `n`; 0 if that is 0.
    pub fn choose(&self, n: usize) -> usize {
        self.lock().rng.index(n)
    }
}

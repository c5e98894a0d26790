//! Which thread of the simulated host goes on, and which process is killed.

use super::world::{DRIVER, State, kill};
use crate::sys::host::simulated;

/// Chooses the thread whose turn it is.
pub fn choose(state: &mut State) {
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

/// Steps that change nothing.
pub(super) const WAITS: [&str; 4] = ["poll", "wait", "look at a process", "read a file"];

/// Kills what is to be killed at this step, which process `pid` is about to make.
pub(super) fn strike(state: &mut State, pid: i32) {
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

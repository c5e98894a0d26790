//! The worker: serves one device, and can be killed at any time.
//!
//! It owns what can fail: the image files, the engine, the memory for I/O. The supervisor keeps what must not be lost.
//! Two threads do the I/O ([`io`]), one syncs, one allocates and zeroes ([`blocking`]), one writes the log; the main
//! thread talks to the supervisor ([`supervisor_link`]) and feeds the engine its ticks.
#![forbid(unsafe_code)]

mod blocking;
mod core;
mod dispatch;
mod files;
mod finish;
mod give_back;
mod grow;
mod init;
mod io;
mod linger;
mod log;
mod memory;
mod merge;
mod open_files;
mod pool;
mod queue;
mod replay;
mod request;
mod request_journal;
#[cfg(test)]
mod simulated;
mod supervisor_link;
mod supervisor_restart;
mod top_sync;
mod track;

use std::process::abort;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::Builder;

use crate::bail;
use crate::chain::{self, Chain};
use crate::engine::api::Errno;
use crate::error::{Error, IoContext, Kind, Result};
use crate::server::proto::{FromWorker, WorkerReady};
use crate::server::remote_error::RemoteError;
use crate::server::shm::Shm;
use crate::sys::host;
use crate::sys::{process, process_hardening};

use self::core::{Core, MAIN_THREAD, Pending, THREADS};
use init::Inherited;
use memory::Memory;
use supervisor_link::{End, SupervisorLink};

/// The supervisor's socket.
const SOCKET: i32 = 3;

/// The stack of a thread; all of it is locked in memory.
const STACK: usize = 256 << 10;

/// Room in the heap beyond what the start took.
const HEAP: usize = 2 << 20;

/// A lock that a panicking thread cannot have left: a panic ends the process.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// The whole worker; for a process of its own with a SEQPACKET socket to the supervisor as descriptor 3 and nothing
/// else open but the standard ones.
pub fn worker_main() -> ! {
    if !host::is_simulated() {
        harden();
    }
    let Ok(socket) = host::take_standard(SOCKET) else { host::exit(2) };
    let Ok(Some((link, inherited))) = SupervisorLink::start(socket) else { host::exit(2) };
    host::show_device(&inherited.start.device_name);
    let inherited = Arc::new(inherited);
    let mut link = link;
    let succeeds = inherited.start.succeed.is_some();
    if succeeds && (host::exit_with_parent(true).is_err() || link.is_closed()) {
        // The retired worker starts another supervisor.
        host::exit(0);
    }
    let memory = match inherited.start.succeed.as_ref().is_some_and(|s| s.wait) {
        false => None,
        true => {
            // Without it the reason is told when it is wanted.
            let memory = init::allocate_memory(&inherited).ok();
            if !host::is_simulated() {
                // No request waits yet: doing it again after the go takes no time then.
                process_hardening::reserve_heap(HEAP);
            }
            if link.send(&FromWorker::Prepared).is_err() || !link.await_go() {
                host::exit(0);
            }
            memory
        }
    };
    match init::was_closed(&inherited) {
        Ok(false) => {}
        Ok(true) => {
            let _ = link.send(&FromWorker::Closed { error: None });
            host::exit(0)
        }
        Err(e) => {
            let _ = link.send(&FromWorker::Failed { code: e.code(), message: e.to_string() });
            host::exit(1)
        }
    }
    match start(&link, &inherited, memory) {
        Ok((core, chain, ready, no_merge)) => {
            let heard = link.send(&FromWorker::Ready(ready));
            if let Some(e) = no_merge {
                link.report_merge_failure(&core, &e);
            }
            if heard.is_err() && !inherited.start.takeover && !succeeds {
                // The device was never used: the in-use mark is cleared.
                let closed = link.close_unused(&core, &inherited);
                host::exit(i32::from(finish(&core, &chain, closed).is_err()));
            }
            let unfinished = inherited.start.finish.filter(|_| !host::breach("the former top stays marked"));
            let finisher = unfinished.map(|level| {
                let (core, inherited, cluster) = (core.clone(), inherited.clone(), chain.cluster);
                thread("finish", move || finish::finish_thread(&core, &inherited, cluster, level))
            });
            if let Some(Err(e)) = finisher {
                *locked(&core.finished) = Some(Some(RemoteError::from(e)));
                core.notices.push(core::Notice::Finished);
            }
            match link.serve(&core, &inherited) {
                End::Closed(closed) => {
                    link.await_finisher(&core, &inherited);
                    // The top last: once it is not marked, all is closed.
                    let left =
                        if closed.is_ok() { merge::leave_target(&core, &inherited, chain.cluster) } else { Ok(()) };
                    let error = finish(&core, &chain, closed).and(left).err().map(RemoteError::from);
                    let code = i32::from(error.is_some());
                    let _ = link.send(&FromWorker::Closed { error });
                    host::exit(code)
                }
                End::Retired(switch, fds, result) => {
                    let result = result
                        .and_then(|()| merge::complete(&core, &inherited, &switch))
                        .and_then(|()| release_images(&core));
                    linger::pause(switch.linger);
                    let retired = result.is_ok().then_some((&*switch, &fds));
                    let error = result.as_ref().err().map(RemoteError::from);
                    // Without a supervisor the message is lost; the next supervisor gets the change by `WorkerStart`.
                    let _ = link.send(&FromWorker::Retired { error });
                    link.await_kill(&core, &inherited, retired)
                }
            }
        }
        Err(e) => {
            let _ = link.send(&FromWorker::Failed { code: e.code(), message: e.to_string() });
            host::exit(1)
        }
    }
}

/// What makes the process robust: for its first lines, while it has one thread.
fn harden() {
    process_hardening::use_one_heap();
    let _ = process_hardening::not_dumpable();
    let _ = process_hardening::ignore_signals();
    // Threads inherit it.
    let _ = process::set_io_flusher();
    let _ = process_hardening::exempt_from_oom_killer();
    abort_on_panic(None);
}

/// Opens everything and starts all threads.
fn start(
    link: &SupervisorLink,
    inherited: &Inherited,
    memory: Option<Memory>,
) -> Result<(Arc<Core>, Chain, WorkerReady, Option<Error>)> {
    let init::Worker { core, chain, ready, sink, warning, no_merge } = init::open_all(inherited, memory)?;
    let core = Arc::new(core);
    if !host::is_simulated() {
        abort_on_panic(Some(core.shm.clone()));
    }
    let succeed = inherited.start.succeed.as_ref();
    if let Some(succeed) = succeed {
        // From here on there is no way back, and no need for a supervisor.
        core.shm.set_switched(inherited.start.token);
        let _ = link.send(&FromWorker::Switched { warning });
        linger::pause(succeed.linger);
        host::exit_with_parent(false).ctx(Kind::Sys, || "cannot become independent of the supervisor")?;
        core.shm.set_serving(inherited.start.token);
    }
    // Requests that a worker before has read and not answered have to be sent again, or found in its slots.
    let resend = inherited.start.takeover || succeed.is_some();
    // In the simulation no thread writes the log.
    let logging = if host::is_simulated() { Ok(()) } else { thread("log", move || sink.run()) };
    match logging.and_then(|()| start_threads(link, &core, inherited.start.token, resend)) {
        Ok(()) => {
            if !host::is_simulated() {
                process_hardening::reserve_heap(HEAP);
            }
            if locked(&core.engine).background_state().is_some() {
                // The engine begins background work with the first event that it is given.
                core.submit_event(MAIN_THREAD, Pending::Tick);
            }
            linger::pause(succeed.map_or(0, |s| s.linger));
            Ok((core, chain, ready, no_merge))
        }
        Err(e) => {
            // The device was never used: the in-use mark is cleared.
            if core.writable && !resend {
                let _ = chain::close(core.top(), &chain, core.status().alloc_end);
            }
            Err(e)
        }
    }
}

/// The images are for another worker from here on: locks fall, nothing is written any more.
fn release_images(core: &Core) -> Result<()> {
    for level in &core.levels {
        process::replace_with_null(&level.file)
            .ctx(Kind::Sys, || format!("cannot let go of {}", level.name.display()))?;
    }
    Ok(())
}

/// A worker that panicked must not go on serving. The message goes to the standard error; the shared memory tells the
/// successor.
fn abort_on_panic(shm: Option<Shm>) {
    std::panic::set_hook(Box::new(move |info| {
        if let Some(shm) = &shm {
            shm.set_panicked();
        }
        eprintln!("ploop-server: worker {}: {info}", host::pid());
        abort();
    }));
}

fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> Result<()> {
    #[cfg(test)]
    if host::is_simulated() {
        host::simulated::with(|host| host.thread(name, Box::new(run)));
        return Ok(());
    }
    let spawned = Builder::new().name(name.into()).stack_size(STACK).spawn(run);
    spawned.map(drop).ctx(Kind::Sys, || format!("cannot start the thread {name}"))
}

/// Starts all threads. When this returns they serve.
fn start_threads(link: &SupervisorLink, core: &Arc<Core>, token: u64, resend: bool) -> Result<()> {
    #[cfg(test)]
    if host::is_simulated() {
        return simulated::start(link, core, token, resend);
    }
    for (name, run) in [
        ("sync", blocking::sync_thread as fn(&Core) -> !),
        ("aux", blocking::aux_thread),
        ("background", blocking::background_thread),
    ] {
        let core = core.clone();
        thread(name, move || run(&core))?;
    }
    if let Some(journal) = &core.journal {
        link.send_journal(journal)?;
        core.shm.set_reading(token);
        replay::replay(core, journal);
    } else if resend {
        // Before the first read: requests read by ourselves would come back to us, too.
        core.queue.resend().ctx(Kind::Device, || "the kernel refuses to give out unanswered requests again")?;
    }
    let (report, reports) = sync_channel(THREADS);
    for number in 0..THREADS {
        let (report, core) = (report.clone(), core.clone());
        thread(&format!("io{number}"), move || {
            let mut io = match io::IoThread::new(&core, number) {
                Ok(io) => {
                    let _ = report.send(Ok(()));
                    io
                }
                Err(e) => {
                    let _ = report.send(Err(e));
                    return;
                }
            };
            if let Err(e) = io.run() {
                panic!("the ring of thread {number} fails: {e}");
            }
        })?;
    }
    for _ in 0..THREADS {
        match reports.recv() {
            Ok(made) => {
                made.ctx(Kind::Sys, || "cannot make an io_uring (sysctl kernel.io_uring_disabled must be 0)")?
            }
            Err(_) => bail!(Sys, "an I/O thread ended before it began"),
        }
    }
    Ok(())
}

/// The engine has written everything; the image becomes a closed one.
fn finish(core: &Core, chain: &Chain, closed: Result<(), Errno>) -> Result<()> {
    if let Err(e) = closed {
        return Err(Error::with(
            Kind::Fsync,
            format!(
                "the last flush of {} failed; the image stays marked in use and must be checked (ploop check)",
                core.top().name.display()
            ),
            std::io::Error::from_raw_os_error(e),
        ));
    }
    if !core.writable {
        return Ok(());
    }
    if !host::breach("close is not noted") {
        // A successor of a worker that is killed behind the unmarking finds the image closed, and has to know why.
        core.shm.begin_close();
    }
    chain::close(core.top(), chain, core.status().alloc_end)
}

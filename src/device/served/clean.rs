//! Ending devices: detaching, and removing what a killed server left.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::poll::PollFlags;

use crate::bail;
use crate::device::served::{find, lock, record};
use crate::device::state::State;
use crate::error::{Error, Kind, Result};
use crate::report;
use crate::server::helper::Helper;
use crate::server::jobs::Job;
use crate::server::proto::{Answer, Command};
use crate::server::{control, frame, runtime, spawn, stopped};
use crate::sys::host;
use crate::sys::wait::wait;

/// Limit for detaching. The last flush of a large disk can be slow; the supervisor waits a minute of it for processes
/// that keep the device busy.
const STOP: Duration = Duration::from_secs(15 * 60);
/// Between two looks whether the caller is told to stop.
const LOOK: Duration = Duration::from_millis(100);
/// Limit for a new supervisor: a worker without one starts one in less.
const SUPERVISOR: Duration = Duration::from_secs(15);
/// Limit for unbinding a device whose server is gone.
const CLEAN: Duration = Duration::from_secs(60);
/// Limit for the exit of a supervisor that has answered.
const EXIT: Duration = Duration::from_secs(5);

/// Detaches the device and closes its image cleanly. Busy: error 3, nothing changed. An error of the last flush is
/// reported; the device is gone then, and the image stays marked in use.
pub fn detach(name: &str) -> Result<()> {
    let name = runtime::name_of(name)?;
    tell(&name, &Command::Stop)
}

/// Whether writes that find no space in the host's file system wait for it (the rule) or fail.
pub fn hold_for_space(name: &str, hold: bool) -> Result<()> {
    let name = runtime::name_of(name)?;
    tell(&name, &Command::HoldForSpace(hold))
}

/// Gives up a device that no worker can serve any more: its I/O fails from now on.
pub fn abort(name: &str) -> Result<()> {
    let name = runtime::name_of(name)?;
    tell(&name, &Command::Abort)
}

/// Gives a command that is answered once. If the supervisor is killed meanwhile, the next one gets it.
pub(super) fn tell(name: &str, command: &Command) -> Result<()> {
    let end = host::now() + SUPERVISOR;
    loop {
        let Some(device) = find::by_name(name)? else {
            bail!(DevNotMounted, "there is no device {name}");
        };
        if device.state == State::Dead {
            return clean(name);
        }
        if let Some(unsupported) = record(&device).refuse(command) {
            return Err(unsupported);
        }
        match ask(name, command) {
            Ok((answer, connection)) => {
                answer.into_result()?;
                // The supervisor's exit closes the connection. Until then a caller could still see the process.
                let _ = frame::recv_within::<Answer>(&connection, EXIT);
                return Ok(());
            }
            // The supervisor was killed, and the worker has not started the next one yet.
            Err(e) if e.kind() == Kind::Device && host::now() < end => {
                host::sleep(Duration::from_millis(50));
            }
            Err(e) => return Err(e),
        }
    }
}

/// Asks the supervisor. A caller that is told to stop waits no longer: by the end of its connection the supervisor learns
/// that no process waits for it any more.
fn ask(name: &str, command: &Command) -> Result<(Answer, OwnedFd)> {
    let dir = runtime::device_dir(name);
    let connection = control::send_command(&dir, command, &[], STOP)?;
    let end = host::now() + STOP;
    while host::now() < end && !wait(connection.as_fd(), PollFlags::POLLIN, host::now() + LOOK)? {
        if report::cancel::requested() {
            bail!(Abort, "waiting for {name} was ended by a signal; ploop list shows whether it is still there");
        }
    }
    control::next_answer(&connection, &dir, Duration::ZERO).map(|answer| (answer, connection))
}

/// Removes what a crashed host or a killed server left of a device. Refused unless the loop device provably belongs to
/// it, its processes have exited and no mount uses it.
pub fn clean(name: &str) -> Result<()> {
    let name = runtime::name_of(name)?;
    let _lock = lock::global()?;
    clean_locked(&name, true)
}

fn clean_locked(name: &str, wait: bool) -> Result<()> {
    let job = Job::Clean { name: name.into(), wait };
    Helper::start(&spawn::find_server()?, &job)?.finish(CLEAN).map_err(|e: Error| e.context(format!("cleaning {name}")))
}

/// Cleans all dead devices that can be cleaned. The other ones need the administrator.
pub(super) fn clean_dead() -> Result<()> {
    if !runtime::run_dir().exists() {
        return Ok(());
    }
    let _lock = lock::global()?;
    runtime::remove_unborn();
    runtime::remove_earlier_boots();
    stopped::forget_earlier_boots();
    for name in runtime::names()? {
        if find::is_dead(&name) {
            // Without waiting: there may be hundreds of dead devices that are mounted in containers.
            let _ = clean_locked(&name, false);
        }
    }
    Ok(())
}

//! Attaching: starts a server, which reports when the device exists.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};

use crate::bail;
use crate::device::model::Device;
use crate::device::served::model::device_of;
use crate::device::served::{clean, find, stopped, unflushed};
use crate::device::spec::AttachSpec;
use crate::device::state::State;
use crate::error::{IoContext, Kind, Result};
use crate::report;
use crate::server::proto::{AttachRequest, LevelName};
use crate::server::{runtime, spawn};
use crate::sys::file_id::FileId;
use crate::units::{ClusterSize, MAX_CHAIN};

/// Attempts to find a name that no other process takes at the same time.
const NAMES: usize = 8;

/// Starts a server for an image chain and waits for its device. Needs root.
pub fn attach(spec: AttachSpec) -> Result<Device> {
    let wanted = spec.device.as_deref().map(runtime::chosen_name).transpose()?;
    if let Some(stopped) = wanted.map(|name| stopped::find(&name)).transpose()?.flatten() {
        return Err(stopped::refusal(&stopped).as_kind(Kind::Busy));
    }
    attach_named(spec)
}

/// The same for a device that may have the name of one that is stopped.
pub(super) fn attach_named(spec: AttachSpec) -> Result<Device> {
    if spec.levels.is_empty() || spec.levels.len() > MAX_CHAIN {
        bail!(Param, "{} images given: 1 to {MAX_CHAIN} can be attached", spec.levels.len());
    }
    if !nix::unistd::geteuid().is_root() {
        bail!(Device, "a device can be made by root only (user id is {})", nix::unistd::geteuid());
    }
    let wanted = spec.device.as_deref().map(runtime::chosen_name).transpose()?;
    // What a crashed server left would keep names and images busy.
    clean::clean_dead()?;
    if let Some(name) = &wanted
        && let Some(other) = find::by_name(name)?
    {
        bail!(
            Busy,
            "{} is in use for {}; detach it or choose another name",
            other.node().display(),
            other.top().display()
        );
    }
    let mut ids = Vec::new();
    for level in &spec.levels {
        let id = FileId::of(&level.fd).ctx(Kind::Fstat, || format!("cannot look at {}", level.path.display()))?;
        ids.push(id);
    }
    let mut request = AttachRequest {
        levels: spec.levels.iter().map(|l| LevelName { path: l.path.clone(), raw: l.raw }).collect(),
        raw_cluster: spec.raw_cluster.map(ClusterSize::sectors),
        read_only: spec.read_only,
        marked: spec.marked,
        component: spec.component,
        descriptor: spec.descriptor,
        device: wanted,
        trace: spec.trace,
        until_unmounted: spec.until_unmounted,
        auto_compact: spec.auto_compact,
        no_space_timeout: no_space_timeout()?,
        slots: spec.slots,
        ids,
        token: uuid::Uuid::new_v4().to_string(),
        unflushed: false,
    };
    request.unflushed = unflushed::before_attach(&spec.levels, &request.ids, request.read_only)?;
    let fds: Vec<BorrowedFd> = spec.levels.iter().map(|l| l.fd.as_fd()).collect();
    for _ in 0..NAMES {
        match spawn::start(&request, &fds) {
            // A process with other records (another root folder over the same /dev) took the name meanwhile.
            Err(e) if e.kind() == Kind::Mknod && request.device.is_none() => {
                report::say(1, format_args!("{e}; trying another name"));
                request.token = uuid::Uuid::new_v4().to_string();
            }
            started => return Ok(device_of(started?, State::Running)),
        }
    }
    bail!(Mknod, "other processes took {NAMES} names for a device in /dev while it was being made; try again")
}

/// `$PLOOP_ENOSPC_TIMEOUT` in seconds; 0 or nothing: writes wait for ever.
fn no_space_timeout() -> Result<Option<u64>> {
    match std::env::var("PLOOP_ENOSPC_TIMEOUT") {
        Ok(text) if !text.is_empty() => match text.parse() {
            Ok(seconds) => Ok(Some(seconds).filter(|s| *s > 0)),
            Err(_) => bail!(Param, "$PLOOP_ENOSPC_TIMEOUT is {text:?}: a number of seconds wanted"),
        },
        _ => Ok(None),
    }
}

/// `$PLOOP_TAKEOVER`: true if the server keeps requests in slots. Not set: false, the kernel's version decides.
pub fn slots_wanted() -> Result<bool> {
    match std::env::var("PLOOP_TAKEOVER") {
        Ok(way) if way == "slots" => Ok(true),
        Ok(way) if !way.is_empty() => bail!(Param, "$PLOOP_TAKEOVER is {way:?}: \"slots\" or nothing wanted"),
        _ => Ok(false),
    }
}

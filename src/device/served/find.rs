//! Finding devices by name and node, and their states.
#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use crate::bail;
use crate::device::model::Device;
use crate::device::served::model::device_of;
use crate::device::served::stopped;
use crate::device::state::State;
use crate::error::{IoContext, Kind, Result};
use crate::server::proto::{Answer, Command, DeviceRecord};
use crate::server::{control, nodes, runtime};

/// Longest wait for the answer of a supervisor about its state.
const INFO: Duration = Duration::from_secs(2);

/// Those devices that `wanted` selects by their records, by number. Only the supervisors of these are asked.
pub(super) fn list_of(wanted: &dyn Fn(&Device) -> bool) -> Result<Vec<Device>> {
    let mut found = Vec::new();
    for name in runtime::names()? {
        let Some(record) = record(&name)? else { continue };
        let recorded = State::from_word(&record.state);
        if wanted(&device_of(record.clone(), recorded)) {
            found.push(with_state(record));
        }
    }
    Ok(found)
}

/// The device of this name; `None`: there is none.
pub(super) fn by_name(name: &str) -> Result<Option<Device>> {
    Ok(record(name)?.map(with_state))
}

/// Whether no process serves the device of this name any more.
pub(super) fn is_dead(name: &str) -> bool {
    matches!(record(name), Ok(Some(record)) if !lives(&record))
}

fn with_state(record: DeviceRecord) -> Device {
    let Doing { state, merging, maintenance } = doing(&record);
    let maintenance = maintenance.unwrap_or_else(|| record.maintenance.clone());
    Device { merging, ..device_of(DeviceRecord { maintenance, ..record }, state) }
}

/// The record of the device of this name; `None`: there is no such device. A folder without a sound record gives one that
/// names no process.
fn record(name: &str) -> Result<Option<DeviceRecord>> {
    let dir = runtime::device_dir(name);
    match fs::symlink_metadata(&dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.ctx(Kind::Open, || format!("cannot look at {}", dir.display()))?,
    };
    match runtime::read_record(&dir) {
        Ok(Some(record)) if record.name == name => Ok(Some(record)),
        // The device was detached meanwhile.
        _ if fs::symlink_metadata(&dir).is_err() => Ok(None),
        Ok(_) => Ok(Some(DeviceRecord { name: name.into(), node: Path::new("/dev").join(name), ..Default::default() })),
        Err(e) => Err(e),
    }
}

fn lives(record: &DeviceRecord) -> bool {
    runtime::is_this_boot(&record.boot)
        && (runtime::may_live(record.supervisor)
            || runtime::may_live(record.worker)
            || control::has_listener(&runtime::device_dir(&record.name)))
}

/// What a device is doing.
struct Doing {
    state: State,
    /// How far a merge of its levels is.
    merging: Option<(u64, u64)>,
    /// Its maintenance state, where the supervisor tells it.
    maintenance: Option<String>,
}

impl From<State> for Doing {
    fn from(state: State) -> Doing {
        Doing { state, merging: None, maintenance: None }
    }
}

fn doing(record: &DeviceRecord) -> Doing {
    if !lives(record) {
        return State::Dead.into();
    }
    match State::from_word(&record.state) {
        State::Running if !runtime::backing_is_ours(record) => State::Stopped.into(),
        State::Running => match control::ask(&runtime::device_dir(&record.name), &Command::Info, INFO) {
            Ok((Answer::Info { failed, stalled, no_space, merging, record, .. }, _)) => {
                let state = match (failed, stalled, no_space) {
                    (true, ..) => State::Failed,
                    (_, Some(_), _) => State::Stalled,
                    (_, _, true) => State::NoSpace,
                    _ => State::Running,
                };
                Doing { state, merging, maintenance: Some(record.maintenance) }
            }
            Err(e) if e.errno() == Some(libc::ETIMEDOUT) && runtime::stands_still(record.supervisor) => {
                State::Stalled.into()
            }
            // The supervisor may have been killed just now; the device works without one.
            _ => State::Running.into(),
        },
        other => other.into(),
    }
}

/// The device with this node or name. A node that exists must be of the very disk that the record names, else it is
/// refused: error 2.
pub(super) fn by_node(node: &str) -> Result<Option<Device>> {
    let name = runtime::name_of(node)?;
    let mut found = by_name(&name)?;
    if found.is_none()
        && let Some((disk, number)) = name.rsplit_once('p')
        && !number.is_empty()
        && number.bytes().all(|b| b.is_ascii_digit())
        && runtime::check_name(disk).is_ok()
    {
        found = by_name(disk)?;
    }
    match &found {
        Some(device) => verify_node(device)?,
        None => {
            if let Some(stopped) = stopped::find(&name)? {
                return Err(stopped::refusal(&stopped));
            }
            if let Some(rdev) = nodes::block_node(&Path::new("/dev").join(&name))
                && runtime::number(&name).is_some()
            {
                let (major, minor) = (nix::sys::stat::major(rdev), nix::sys::stat::minor(rdev));
                bail!(Device, "/dev/{name} ({major}:{minor}) is a stale node: no server serves it; remove it");
            }
        }
    }
    Ok(found)
}

/// A running device's node, if it exists, must be its own.
fn verify_node(device: &Device) -> Result<()> {
    let running = matches!(device.state, State::Running | State::NoSpace);
    if running && let Ok(meta) = fs::symlink_metadata(device.node()) {
        let own = meta.file_type().is_block_device() && meta.rdev() == device.rdev;
        if !own {
            bail!(Device, "{} is not the node of the device of that name; remove it", device.node().display());
        }
    }
    Ok(())
}

//! Counters of a device. Its worker only counts upwards; where a user has set a counter to is kept in the device's folder.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::bail;
use crate::device::model::Device;
use crate::device::served::lock;
use crate::error::{Error, IoContext, Kind, Result};
use crate::server::proto::{Answer, Command, ProcessId};
use crate::server::{control, runtime};

/// Longest wait for the answer of a supervisor.
const INFO: Duration = Duration::from_secs(5);

/// What a counter was set to, and what the worker had counted then.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Set {
    to: u64,
    at: u64,
    worker: ProcessId,
}

impl Set {
    /// What is shown when this worker has counted so much. Another worker has begun at 0.
    fn shown(self, worker: ProcessId, counted: u64) -> u64 {
        let since = if worker == self.worker { counted.saturating_sub(self.at) } else { counted };
        self.to.wrapping_add(since)
    }
}

type Sets = BTreeMap<String, Set>;

/// What a worker has counted.
fn counted(device: &Device) -> Result<(ProcessId, Vec<(String, u64)>)> {
    let (answer, _) = control::ask(&runtime::device_dir(&device.name), &Command::Info, INFO)?;
    match answer.into_result()? {
        Answer::Info { record, counters, .. } if !counters.is_empty() => Ok((record.worker, counters)),
        Answer::Info { .. } => bail!(
            Sysfs,
            "the server of {0} is of a version that tells no counters; ploop reload {0} has it served by the program that is installed",
            device.node.display()
        ),
        _ => bail!(Protocol, "the server of {} does not tell its state", device.node.display()),
    }
}

fn sets(device: &Device) -> Sets {
    let text = fs::read(runtime::device_dir(&device.name).join(runtime::COUNTERS)).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

/// See [`device::counters`](crate::device::counters).
pub fn read(device: &Device) -> Result<Vec<(String, u64)>> {
    let sets = sets(device);
    let (worker, counted) = counted(device)?;
    let shown = |(name, counted): (String, u64)| {
        let value = sets.get(&name).map_or(counted, |set| set.shown(worker, counted));
        (name, value)
    };
    Ok(counted.into_iter().map(shown).collect())
}

/// See [`device::set_counters`](crate::device::set_counters).
pub fn set(device: &Device, values: &[(String, u64)]) -> Result<()> {
    let (worker, counted) = counted(device)?;
    let counted: BTreeMap<String, u64> = counted.into_iter().collect();
    let _lock = lock::global()?;
    let dir = runtime::device_dir(&device.name);
    let mut sets = sets(device);
    for (name, value) in values {
        if let Some(at) = counted.get(name) {
            sets.insert(name.clone(), Set { to: *value, at: *at, worker });
        }
    }
    let text = serde_json::to_vec(&sets).map_err(|e| Error::with(Kind::Protocol, "cannot encode the counters", e))?;
    // Replaced by rename, so that a reader sees the old ones or the new ones.
    let (new, place) = (dir.join(runtime::NEW_COUNTERS), dir.join(runtime::COUNTERS));
    let write = || -> io::Result<()> {
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(&new)?;
        io::Write::write_all(&mut file, &text)?;
        fs::rename(&new, &place)
    };
    write().ctx(Kind::Write, || format!("cannot write {}", place.display()))
}

#[cfg(test)]
mod tests {
    use super::{ProcessId, Set};

    #[test]
    fn a_counter_goes_on_from_what_it_was_set_to_also_when_a_new_worker_counts() {
        let [first, second] = [1, 2].map(|pid| ProcessId { pid, start_time: 1 });
        let zero = Set { to: 0, at: 40, worker: first };
        assert_eq!([zero.shown(first, 40), zero.shown(first, 45), zero.shown(second, 41)], [0, 5, 41]);
        assert_eq!(Set { to: 100, ..zero }.shown(first, 41), 101);
        assert_eq!(Set { to: u64::MAX, ..zero }.shown(second, 2), 1);
    }
}

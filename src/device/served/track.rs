//! Tracking what is written to a running device's top.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use crate::bail;
use crate::device::driver::Tracker;
use crate::device::model::Device;
use crate::device::served::record;
use crate::error::Result;
use crate::server::proto::{Answer, Command};
use crate::server::track::{TakeWritten, TrackReport};
use crate::server::{control, frame, runtime};

/// Limit for an answer: a worker may be starting, or wait for the kernel.
const LIMIT: Duration = Duration::from_secs(120);

/// The connection to the supervisor, whose end is the end of the tracking.
#[derive(Debug)]
struct Connection {
    dir: PathBuf,
    socket: OwnedFd,
    /// Bytes.
    cluster: u64,
    end: u64,
}

/// See [`track`](crate::device::track).
pub fn track(device: &Device) -> Result<Box<dyn Tracker>> {
    let name = device.name();
    if let Some(unsupported) = record(device).refuse(&Command::Track) {
        return Err(unsupported.context(format!("run ploop reload {name} to have the installed program serve it")));
    }
    let dir = runtime::device_dir(name);
    let (answer, socket) = control::ask(&dir, &Command::Track, LIMIT)?;
    let report = reported(answer, name)?;
    let end = u64::from(report.clusters) * report.cluster;
    Ok(Box::new(Connection { dir, socket, cluster: report.cluster.max(1), end }))
}

fn reported(answer: Answer, name: &str) -> Result<TrackReport> {
    match answer.into_result()? {
        Answer::Tracked(TrackReport { error: Some(error), .. }) => Err(error.into()),
        Answer::Tracked(report) => Ok(report),
        other => bail!(Protocol, "{name}: the supervisor answered {other:?}, Tracked was expected"),
    }
}

impl Tracker for Connection {
    fn cluster(&self) -> u64 {
        self.cluster
    }

    fn end(&self) -> u64 {
        self.end
    }

    fn take(&mut self, bytes: Range<u64>) -> Result<Vec<Range<u64>>> {
        let number = |clusters: u64| u32::try_from(clusters).unwrap_or(u32::MAX);
        let (from, to) = (number(bytes.start / self.cluster), number(bytes.end.div_ceil(self.cluster)));
        frame::send_within(&self.socket, &TakeWritten { from, to }, &[], LIMIT).map_err(|e| {
            e.context(format!(
                "{}: its supervisor has ended, and what is written is not tracked: copy again",
                self.dir.display()
            ))
        })?;
        let answer = control::next_answer(&self.socket, &self.dir, LIMIT)?;
        let report = reported(answer, &self.dir.display().to_string())?;
        let bytes = |run: &Range<u32>| u64::from(run.start) * self.cluster..u64::from(run.end) * self.cluster;
        Ok(report.written.iter().map(bytes).collect())
    }
}

//! Reports on what was written to the top, for a client that copies it.
#![forbid(unsafe_code)]

use crate::engine::api::{Errno, Tracked};
use crate::error::Kind;
use crate::server::proto::FromWorker;
use crate::server::remote_error::RemoteError;
use crate::server::track::TrackReport;

use super::core::Core;

/// What the engine has answered, for the supervisor.
pub fn report(core: &Core, begun: bool, result: Result<Tracked, Errno>) -> Option<FromWorker> {
    let report = TrackReport { begun, cluster: core.cluster_bytes, ..TrackReport::default() };
    Some(FromWorker::Tracked(match result {
        Ok(tracked) => TrackReport { clusters: tracked.clusters, written: tracked.dirty, ..report },
        Err(errno) => TrackReport { error: Some(error(errno, core)), ..report },
    }))
}

fn error(errno: Errno, core: &Core) -> RemoteError {
    let name = core.top().name.display();
    let (kind, why) = match errno {
        libc::EBUSY => (Kind::Busy, "its clusters are being moved or merged; wait for the end of that".to_owned()),
        libc::EINVAL => (Kind::DevIoc, "the worker does not track them; copy it anew".to_owned()),
        errno => (Kind::DevIoc, std::io::Error::from_raw_os_error(errno).to_string()),
    };
    RemoteError { code: kind.code(), message: format!("writes to {name} are not tracked: {why}") }
}

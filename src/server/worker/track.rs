//! Reports on what was written to the top, for a client that copies it.
#![forbid(unsafe_code)]

use crate::engine::api::{Errno, Tracked};
use crate::error::Kind;
use crate::server::proto::FromWorker;
use crate::server::remote_error::RemoteError;
use crate::server::track::{TrackOrder, TrackReport};

use super::core::{Core, MAIN_THREAD, Pending};
use super::give_back::Giving;

/// What the engine has answered, for the supervisor.
/// Hands an order to the engine.
pub fn take(core: &Core, giving: &mut Giving, order: TrackOrder) {
    if matches!(order, TrackOrder::Begin { .. }) {
        giving.make_way(core);
    }
    core.submit_event(MAIN_THREAD, Pending::Track(order.control()));
}

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

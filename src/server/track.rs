//! Tracking of what is written to a device's top, as it travels between client, supervisor and worker.
//!
//! A client that copies the top's file sends `Track` and keeps the connection: on it go its [`TakeWritten`]s, one at a time,
//! each answered by one [`TrackReport`]. The tracking ends with the connection.
#![forbid(unsafe_code)]

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::engine::api::TrackControl;
use crate::server::remote_error::RemoteError;

/// Runs of clusters in one report: it has to fit into a frame.
pub const MOST_RUNS: u32 = 4096;

/// Client to supervisor: what was written of these clusters of the top's file? They count as unwritten from then on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakeWritten {
    pub from: u32,
    pub to: u32,
}

/// Supervisor to worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrackOrder {
    /// Answered by a report. `takeover`: a worker before has tracked; what it knew is lost, and all counts as written.
    Begin {
        takeover: bool,
    },
    /// Answered by a report.
    Take(TakeWritten),
    End,
}

impl TrackOrder {
    pub fn control(self) -> TrackControl {
        match self {
            TrackOrder::Begin { takeover } => TrackControl::Begin { all: takeover },
            TrackOrder::Take(TakeWritten { from, to }) => TrackControl::Take { from, to, most: MOST_RUNS },
            TrackOrder::End => TrackControl::End,
        }
    }
}

/// Worker to supervisor, and to the client.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrackReport {
    /// The answer to `Begin`.
    pub begun: bool,
    /// Bytes of a cluster.
    pub cluster: u64,
    /// Clusters of the file up to the last one in use.
    pub clusters: u32,
    /// Clusters that were written: ascending runs, at most [`MOST_RUNS`]. None: there are no more.
    pub written: Vec<Range<u32>>,
    pub error: Option<RemoteError>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::proto::{Answer, MAX_FRAME};

    #[test]
    fn the_longest_report_fits_into_a_frame() {
        let written = vec![u32::MAX - 1..u32::MAX; MOST_RUNS as usize];
        let report = TrackReport { clusters: u32::MAX, cluster: 64 << 20, written, ..TrackReport::default() };
        assert!(serde_json::to_vec(&Answer::Tracked(report)).unwrap().len() < MAX_FRAME);
    }
}

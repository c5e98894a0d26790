//! Giving space back, as it travels between client, supervisor and worker.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::engine::api::{GiveBackConfig, GivenBack};
use crate::error::Result;
use crate::server::remote_error::RemoteError;

/// An order to give space of the top's file back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GiveBackOrder {
    /// Made up by the client: an order that is given twice is carried out once.
    pub token: u64,
    /// Bytes moved in a second; 0: without limit.
    pub rate: u64,
    /// The same while requests come.
    pub busy_rate: u64,
}

impl GiveBackOrder {
    /// For clusters of so many bytes. At least one moves between two ticks of a second.
    pub fn config(&self, cluster: u64) -> GiveBackConfig {
        let clusters = |rate: u64| match rate {
            0 => 0,
            rate => u32::try_from((rate / cluster.max(1)).max(1)).unwrap_or(u32::MAX),
        };
        GiveBackConfig { per_tick: clusters(self.rate), per_busy_tick: clusters(self.busy_rate) }
    }
}

/// How it ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GaveBack {
    /// Clusters moved.
    pub moved: u64,
    /// Bytes of the top's file before and after.
    pub before: u64,
    pub after: u64,
    pub error: Option<RemoteError>,
}

impl GaveBack {
    pub fn failed(error: impl Into<RemoteError>) -> GaveBack {
        GaveBack { error: Some(error.into()), ..GaveBack::default() }
    }

    pub fn into_result(self) -> Result<GivenBack> {
        match self.error {
            Some(error) => Err(error.into()),
            None => Ok(GivenBack { moved: self.moved, before: self.before, after: self.after }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_become_clusters_between_two_ticks() {
        let of = |rate, busy_rate| GiveBackOrder { token: 1, rate, busy_rate }.config(1 << 20);
        assert_eq!(of(0, 1), GiveBackConfig { per_tick: 0, per_busy_tick: 1 });
        assert_eq!(of(10 << 20, u64::MAX), GiveBackConfig { per_tick: 10, per_busy_tick: u32::MAX });
    }
}

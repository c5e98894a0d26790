//! Which races and accidents the runs met: a simulation that never meets them proves nothing.

use std::collections::BTreeMap;

#[derive(Default, Clone)]
pub struct Cover(pub BTreeMap<&'static str, u64>);

impl Cover {
    pub fn hit(&mut self, what: &'static str) {
        *self.0.entry(what).or_default() += 1;
    }

    pub fn hit_if(&mut self, yes: bool, what: &'static str) {
        if yes {
            self.hit(what);
        }
    }

    pub fn add(&mut self, other: &Cover) {
        for (k, v) in &other.0 {
            *self.0.entry(k).or_default() += v;
        }
    }

    pub fn missing(&self, wanted: &[&'static str]) -> Vec<&'static str> {
        wanted.iter().copied().filter(|w| self.0.get(w).copied().unwrap_or(0) == 0).collect()
    }

    pub fn table(&self) -> String {
        self.0.iter().map(|(k, v)| format!("{v:>10}  {k}\n")).collect()
    }
}

/// What must have happened in any set of runs with the real engine.
pub const WANTED: &[&str] = &[
    "kill during flush",
    "kill with a sync in flight",
    "kill with a BAT write in flight",
    "kill inside a step",
    "kill during copy-up",
    "kill during close",
    "kill while waiting for space",
    "late write landed",
    "late write torn",
    "late write lost",
    "takeover with carried entries",
    "takeover with a carried free entry",
    "takeover interrupted by a kill",
    "takeover interrupted by a power cut",
    "takeover finds a failed sync",
    "takeover of a failed device",
    "flush refused after takeover",
    "crash during recovery",
    "power cut during copy-up",
    "power cut with a data sync in flight",
    "power cut between data sync and BAT write",
    "power cut between BAT write and its sync",
    "power cut on a failed device",
    "torn BAT page after a power cut",
    "request dropped by a power cut",
    "read of a cluster being copied up",
    "write to a cluster being copied up",
    "zero on a cluster being copied up",
    "write to a cluster being allocated",
    "zero while writes in flight on the cluster",
    "write while zero in flight on the cluster",
    "read while writes in flight on the sector",
    "two writes in flight on one sector",
    "flush arrives during a sync",
    "flush with changes after its data sync",
    "sync with a first write in flight",
    "changed page written without a flush",
    "freed cluster reused",
    "cluster freed",
    "page evicted and read again",
    "table full",
    "wait for space began",
    "no space by quota",
    "BAT write without space",
    "sync without space",
    "flush waits for space",
    "closed without space for the BAT",
    "wait for space ended",
    "flush answered while waiting for space",
    "read answered while waiting for space",
    "read error",
    "write error, torn",
    "BAT read error",
    "BAT write error",
    "sync error",
    "flush refused",
    "closed well",
    "closed with an error",
    "reopened after a clean close",
    "read-only",
    "raw base",
    "raw top",
    "version 1",
    "four levels or more",
    "smaller lower level",
    "partial last cluster",
    "bounce smaller than the cluster",
    "request over several clusters",
    "request over several pages",
    "tail cut at open",
    "second session in one run",
    "change refused: the file cannot grow",
    "nothing but writes waits for space",
    "all quiet",
    "write refused while being stopped",
];

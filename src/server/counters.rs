//! The counters of a device, by the classic driver's names where it has the same.
#![forbid(unsafe_code)]

use crate::engine::api::Status;

/// All of them, in the order in which they are shown. They begin anew with each worker.
pub fn of(s: &Status) -> Vec<(String, u64)> {
    let came = s.reads + s.writes + s.zeroes + s.flushes;
    let counters = [
        // Requests that came, and those that were answered.
        ("bio_in", came),
        ("bio_out", came.saturating_sub(u64::from(s.requests))),
        // Clusters that the top image got.
        ("bio_alloc", s.allocated),
        // Clusters of which a lower image's content was copied up.
        ("bio_cows", s.copied_up),
        ("bio_flush", s.flushes),
        ("reads", s.reads),
        ("writes", s.writes),
        ("zeroes", s.zeroes),
        // Clusters that merges, relocation and the like have looked at, and copied.
        ("background_seen", s.background_seen),
        ("background_copied", s.background_copied),
    ];
    counters.map(|(name, value)| (name.to_owned(), value)).to_vec()
}

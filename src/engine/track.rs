//! Tracking: which clusters of the top's file, header and BAT among them, were written since a copier has asked last.
//!
//! A bit is set when an operation on the top's file has ended, well or not, before anything follows from that, and when an
//! entry comes to name a cluster. Space that is allocated ahead is not copied. The copier
//! takes a bit, which clears it, and reads the cluster after that: what it read is right, or the bit is set again. So when
//! nothing is left to be taken, and nothing is in flight, the copy equals the file.
//!
//! Nothing else may replace the top or cut its file meanwhile: tracking and background work exclude each other.

use std::ops::Range;

use super::api::{Action, BAT_PAGE, Errno, Shared, TrackControl, Tracked};
use super::breach::{Breach, breaks};
use super::{BUSY, Engine, INVALID, Op};

/// Set bits, one for each cluster of the file.
#[derive(Default)]
pub(super) struct Tracking {
    words: Vec<u64>,
    set: u64,
}

impl Tracking {
    fn mark(&mut self, clusters: Range<u64>) {
        for cluster in clusters {
            let (word, bit) = ((cluster / 64) as usize, 1 << (cluster % 64));
            if word >= self.words.len() {
                self.words.resize(word + 1, 0);
            }
            self.set += u64::from(self.words[word] & bit == 0);
            self.words[word] |= bit;
        }
    }

    /// Clears the bits of these clusters; the runs of those that were set, ascending, at most `most` of them.
    fn take(&mut self, clusters: Range<u32>, most: usize) -> Vec<Range<u32>> {
        let mut runs: Vec<Range<u32>> = Vec::new();
        let mut cluster = clusters.start;
        while cluster < clusters.end && self.set > 0 {
            let Some(word) = self.words.get_mut((cluster / 64) as usize) else { break };
            let left = *word >> (cluster % 64);
            if left == 0 {
                cluster = (cluster | 63).saturating_add(1);
                continue;
            }
            cluster += left.trailing_zeros();
            if cluster >= clusters.end {
                break;
            }
            let begun = runs.len();
            match runs.last_mut().filter(|run| run.end == cluster) {
                Some(run) => run.end += 1,
                None if begun == most => break,
                None => runs.push(cluster..cluster + 1),
            }
            *word &= !(1 << (cluster % 64));
            self.set -= 1;
            cluster += 1;
        }
        runs
    }
}

impl<S: Shared> Engine<S> {
    pub(super) fn track(&mut self, control: TrackControl, out: &mut Vec<Action>) {
        let begun = matches!(control, TrackControl::Begin { .. });
        let result = match control {
            TrackControl::Begin { all } => self.begin_tracking(all),
            TrackControl::Take { from, to, most } => match &mut self.tracking {
                Some(tracking) => {
                    let dirty = tracking.take(from..to, most as usize);
                    Ok(Tracked { clusters: self.tracked_end(), dirty })
                }
                None => Err(INVALID),
            },
            TrackControl::End => {
                self.tracking = None;
                return;
            }
        };
        out.push(Action::Tracked { begun, result });
    }

    fn begin_tracking(&mut self, all: bool) -> Result<Tracked, Errno> {
        let works = self.background.as_ref().is_some_and(|b| b.is_running() || b.target.is_some() || b.copying > 0);
        if works || self.space.cutting {
            return Err(BUSY);
        }
        let clusters = self.tracked_end();
        let mut tracking = Tracking::default();
        if all && !breaks(Breach::TrackForgotten) {
            tracking.mark(0..u64::from(clusters));
        }
        self.tracking = Some(tracking);
        Ok(Tracked { clusters, dirty: Vec::new() })
    }

    /// Clusters of the file up to the last one in use; those behind it are space allocated ahead.
    fn tracked_end(&self) -> u32 {
        if self.raw_top {
            return self.config.device_bytes.div_ceil(1 << self.config.cluster_shift) as u32;
        }
        self.space.end()
    }

    pub(super) fn is_tracking(&self) -> bool {
        self.tracking.is_some()
    }

    /// An entry names a cluster of the file from now on, which a cluster operation has filled, or which reads as zero: there the
    /// copy may be shorter, or have bytes of a file that was longer once.
    pub(super) fn note_named(&mut self, host_cluster: u32) {
        if let Some(tracking) = self.tracking.as_mut().filter(|_| !breaks(Breach::TrackNotNamed)) {
            tracking.mark(host_cluster.into()..u64::from(host_cluster) + 1);
        }
    }

    /// An operation has ended: what it has changed, perhaps in part, is to be copied again.
    pub(super) fn note_written(&mut self, op: &Op) {
        if self.tracking.is_none() {
            return;
        }
        let shift = self.config.cluster_shift;
        let bytes = match op {
            Op::Io(io) => io.written(self.top),
            Op::BatWrite { .. } if breaks(Breach::TrackNoTable) => None,
            Op::BatWrite { page } => {
                let at = u64::from(*page) * BAT_PAGE as u64;
                Some(at..at + BAT_PAGE as u64)
            }
            // What a cluster operation fills is named when all of it has been written.
            Op::Cluster { .. } | Op::Grow | Op::Bat { .. } | Op::Cut { .. } | Op::Background(_) | Op::Sync => None,
        };
        if let (Some(bytes), Some(tracking)) = (bytes, &mut self.tracking) {
            tracking.mark(bytes.start >> shift..bytes.end.div_ceil(1 << shift));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_taken_once_in_order() {
        let one = |run: Range<u32>| Vec::from_iter(std::iter::once(run));
        let mut t = Tracking::default();
        assert!(t.take(0..u32::MAX, 9).is_empty());
        [3..5, 63..66, 200..201, 4..6].into_iter().for_each(|run| t.mark(run));
        assert_eq!(t.set, 7);
        assert_eq!(t.take(4..200, 1), one(4..6));
        assert_eq!(t.take(4..200, 9), one(63..66));
        assert_eq!(t.take(0..u32::MAX, 9), [3..4, 200..201]);
        assert!(t.set == 0 && t.take(0..u32::MAX, 9).is_empty());
        t.mark(0..1000);
        assert_eq!(t.take(10..64, 1), one(10..64));
        assert_eq!(t.take(0..u32::MAX, 1), one(0..10));
        assert_eq!(t.take(0..u32::MAX, 1), one(64..1000));
    }
}

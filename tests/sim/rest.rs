//! At rest: what is found after a power cut, and after a clean close.

use crate::engine::api::*;

use crate::recover::{Outage, changes};
use crate::world::World;

impl World {
    /// The stable content is what it may be, and from now on it is what it is.
    pub fn settle(&mut self, horizon: u64, what: &str, now: u64) {
        self.check_image(what);
        let mut clusters: Vec<u32> = (0..self.shape.clusters())
            .filter(|c| self.sectors_of(*c).any(|s| self.oracle.is_touched(s)))
            .chain(self.shape.hot.iter().copied())
            .collect();
        for _ in 0..4 {
            clusters.push(self.rng.below(u64::from(self.shape.clusters())) as u32);
        }
        clusters.sort_unstable();
        clusters.dedup();
        for c in clusters {
            for s in self.sectors_of(c) {
                let value = self.chain.read(&self.shape, s, true);
                self.must_admit(s, value, horizon, what);
                self.oracle.settle(s, value, now);
            }
        }
        self.touched.clear();
        self.now += 2;
    }

    /// Entries of the top are in range and unique.
    fn check_image(&mut self, what: &str) {
        if self.shape.raw_top() {
            return;
        }
        let top = self.shape.top();
        let first = self.shape.levels[top].first_data;
        let end = (self.chain.files[top].len() / self.shape.spc) as u32;
        let mut host_clusters = self.chain.host_clusters(&self.shape, top);
        if let Some((c, p)) = host_clusters.iter().find(|(_, p)| *p < first || *p >= end) {
            self.fail(format!(
                "{what}: cluster {c} is at host cluster {p} of a file with host clusters {first}..{end}"
            ));
        }
        host_clusters.sort_unstable_by_key(|(_, p)| *p);
        if let Some(w) = host_clusters.windows(2).find(|w| w[0].1 == w[1].1) {
            self.fail(format!("{what}: clusters {} and {} share host cluster {}", w[0].0, w[1].0, w[0].1));
        }
    }

    /// The engine said Closed.
    pub fn after_close(&mut self, result: Result<(), Errno>) {
        self.say(|_| format!("CLOSED {result:?}"));
        if let Some(f) = self.flights.iter().find(|f| changes(&f.act)) {
            self.fail(format!("Closed while {:?} is in flight", f.act));
        }
        if self.outstanding() > 0 {
            self.fail("Closed with requests not answered");
        }
        match result {
            Err(e) if !self.failed => self.fail(format!("Closed with error {e}, and no sync or BAT write had failed")),
            Ok(()) if self.failed => self.fail("Closed well after a failed sync or BAT write"),
            Err(_) => {
                self.cover.hit("closed with an error");
                if self.settings.writable && !self.shape.raw_top() && !self.chain.is_marked(self.shape.top()) {
                    self.fail("the in-use mark is gone");
                }
                // Nobody knows what the host's memory holds and what its disk: the next user comes after a restart.
                self.power_cut();
                return;
            }
            Ok(()) => self.cover.hit("closed well"),
        }
        let status = self.engine.take().map(|e| e.status()).unwrap_or_default();
        self.flights.clear();
        self.closing = false;
        self.want_close = false;
        self.closed = None;
        if status.dirty != 0 || !self.table.used().is_empty() || status.requests != 0 || status.no_space {
            self.fail(format!("closed, and yet {status:?}, slots {:?}", self.table.used()));
        }
        self.now += 1;
        let now = self.now;
        self.settle(now, "after a clean close", now);
        self.oracle.flushed = self.oracle.flushed.max(now);
        let check = !self.shape.raw_top() && self.settings.writable;
        if check {
            self.check_rest(&status);
        }
        if self.finish_background() || !check {
            return;
        }
        let top = self.shape.top();
        self.serial += 1;
        self.chain.files[top].truncate(u64::from(status.alloc_end) * self.shape.spc, self.serial);
        self.chain.files[top].finished(0..0, self.serial, self.now);
        let mut outage = Outage::Fresh;
        if !self.mark(false, &mut outage) {
            self.cover.hit("reopened after a clean close");
        }
    }

    /// At rest every host cluster of the file is used or free.
    fn check_rest(&mut self, status: &Status) {
        let top = self.shape.top();
        let first = self.shape.levels[top].first_data;
        let host_clusters = self.chain.host_clusters(&self.shape, top);
        let used = host_clusters.len() as u32;
        if used + status.free != status.alloc_end.saturating_sub(first) {
            self.fail(format!(
                "at rest {used} host clusters used + {} free, but {first}..{}",
                status.free, status.alloc_end
            ));
        }
        let end = host_clusters.iter().map(|(_, p)| p + 1).max().unwrap_or(first);
        if end != status.alloc_end {
            self.fail(format!(
                "at rest the last host cluster in use is before {end}, but the end is {}",
                status.alloc_end
            ));
        }
        if u64::from(status.alloc_end) * self.shape.spc > self.chain.files[top].len() {
            self.fail(format!("the end {} lies beyond the file", status.alloc_end));
        }
    }
}

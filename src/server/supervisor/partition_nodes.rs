//! The nodes of a device and of its partitions, which follow what the kernel shows.
#![forbid(unsafe_code)]

use std::time::Duration;

use crate::server::jobs::Job;
use crate::server::{partitions, runtime, uevents};
use crate::sys::host;

use super::{Supervisor, TABLE_PAUSE};

impl Supervisor {
    /// Keeps the nodes as the kernel's partitions are, and notices the end of the block device.
    pub(super) fn follow(&mut self) {
        if !runtime::backing_is_ours(&self.record) {
            // Another process detached it. Its nodes must go at once: the number's next owner is another disk.
            self.nodes.clear();
            self.lost = true;
            return;
        }
        let known = partitions::known(&self.record.backing);
        if known.is_empty() && self.had_partitions {
            self.table_due.get_or_insert(host::now() + TABLE_PAUSE);
        }
        self.had_partitions = !known.is_empty();
        if let Err(e) = self.nodes.update(self.record.rdev, &known) {
            self.log_once(&e.to_string());
        }
    }

    /// Asks for a look into the partition table now, and waits for it a little.
    pub(super) fn scan_now(&mut self, limit: Duration) {
        let Ok(helper) = self.helper(&Job::Scan { binding: self.binding() }) else { return };
        let done = self.helper_event(&helper, host::now() + limit).is_some();
        self.release_helper(helper, !done);
        self.follow();
    }

    pub(super) fn end_scan(&mut self) {
        if let Some((helper, _)) = self.scan.take() {
            self.release_helper(helper, true);
        }
    }

    pub(super) fn on_uevents(&mut self) {
        let Some(events) = &self.events else { return };
        let news = uevents::drain(events, &self.record.backing);
        // A table without partitions in the kernel: perhaps there is one that it cannot read.
        if news.changed && partitions::known(&self.record.backing).is_empty() {
            self.table_due = Some(host::now() + TABLE_PAUSE);
        }
    }
}

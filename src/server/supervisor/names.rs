//! The names of a device: its node and those of its partitions, which follow what the kernel shows.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::error::Result;
use crate::server::helper::Helper;
use crate::server::nodes::Nodes;
use crate::server::proto::DeviceRecord;
use crate::server::{partitions, runtime, uevents};
use crate::sys::host;

/// Longest sleep.
const TICK: Duration = Duration::from_secs(2);
/// Partitions are looked at so often where the kernel's announcements do not arrive.
const BLIND_TICK: Duration = Duration::from_millis(500);
/// After the last change of a partition table, until the supervisor reads it: the program that changes it may inform
/// the kernel itself.
const TABLE_PAUSE: Duration = Duration::from_millis(300);
/// A scan that does not end.
const SCAN: Duration = Duration::from_secs(30);

/// What became of the block device.
pub enum Followed {
    Present,
    /// Another process has detached it.
    Lost,
}

/// See the module.
pub struct Names {
    nodes: Nodes,
    events: Option<OwnedFd>,
    /// When to look at the block device and its partitions, as /sys shows them.
    look_due: Instant,
    /// When to look for partitions in the table.
    table_due: Option<Instant>,
    scan: Option<(Helper, Instant)>,
    had_partitions: bool,
}

impl Names {
    pub fn new(nodes: Nodes) -> Names {
        Names {
            nodes,
            events: uevents::open(),
            look_due: host::now(),
            table_due: None,
            scan: None,
            had_partitions: false,
        }
    }

    /// The nodes are there already.
    pub fn adopt(&mut self, nodes: Nodes) {
        self.nodes = nodes;
    }

    pub fn create(&mut self, rdev: u64) -> Result<()> {
        self.nodes.update(rdev, &[])
    }

    pub fn clear(&mut self) {
        self.nodes.clear();
    }

    /// Keeps the nodes as the kernel's partitions are, and notices the end of the block device.
    pub fn follow(&mut self, record: &DeviceRecord) -> Result<Followed> {
        if !runtime::backing_is_ours(record) {
            // Its nodes must go at once: the number's next owner is another disk.
            self.nodes.clear();
            return Ok(Followed::Lost);
        }
        let known = partitions::known(&record.backing);
        if known.is_empty() && self.had_partitions {
            self.table_due.get_or_insert(host::now() + TABLE_PAUSE);
        }
        self.had_partitions = !known.is_empty();
        self.nodes.update(record.rdev, &known)?;
        Ok(Followed::Present)
    }

    /// Where the kernel announces changes.
    pub fn events(&self) -> Option<BorrowedFd<'_>> {
        self.events.as_ref().map(AsFd::as_fd)
    }

    pub fn on_events(&mut self, backing: &str) {
        let Some(events) = &self.events else { return };
        let news = uevents::drain(events, backing);
        if news.any {
            self.look_due = host::now();
        }
        // A table without partitions in the kernel: perhaps there is one that it cannot read.
        if news.changed && partitions::known(backing).is_empty() {
            self.table_due = Some(host::now() + TABLE_PAUSE);
        }
    }

    /// When to [`follow`](Self::follow) again.
    pub fn look_due(&self) -> Instant {
        self.look_due
    }

    /// It is time to [`follow`](Self::follow): the kernel has announced a change of this disk, or some time has passed.
    pub fn take_look_due(&mut self) -> bool {
        let now = host::now();
        let due = self.look_due <= now;
        if due {
            self.look_due = now + if self.events.is_some() { TICK } else { BLIND_TICK };
        }
        due
    }

    /// When the partition table is to be read, if it is.
    pub fn table_due(&self) -> Option<Instant> {
        self.table_due.filter(|_| self.scan.is_none())
    }

    /// It is time to read the partition table.
    pub fn take_table_due(&mut self) -> bool {
        self.scan.is_none() && self.table_due.take_if(|at| *at <= host::now()).is_some()
    }

    pub fn set_scan(&mut self, helper: Option<Helper>) {
        self.scan = helper.map(|h| (h, host::now() + SCAN));
    }

    /// Where the end of a scan shows.
    pub fn scan(&self) -> Option<BorrowedFd<'_>> {
        self.scan.as_ref().map(|(helper, _)| helper.sock.as_fd())
    }

    pub fn take_scan(&mut self) -> Option<Helper> {
        self.scan.take().map(|(helper, _)| helper)
    }

    /// A scan that takes too long.
    pub fn take_late_scan(&mut self) -> Option<Helper> {
        self.scan.take_if(|(_, end)| *end <= host::now()).map(|(helper, _)| helper)
    }
}

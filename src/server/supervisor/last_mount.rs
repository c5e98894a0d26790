//! The end of a device that lives as long as it is mounted: one that mount(8) made through its helper. umount(8) asks the
//! helper to end it; where that did not happen (`umount -i`, a lazy unmount, a system call) the supervisor notices it.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use crate::server::mounts;
use crate::server::transport::Binding;
use crate::sys::host;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(2);
/// Longest time between two attempts to end a device that is in use without a mount.
const LONGEST: Duration = Duration::from_secs(30);

/// See the module.
pub struct LastMount {
    /// None: the device stays until it is told to end.
    due: Option<Instant>,
    seen: bool,
    attempts: u32,
}

impl LastMount {
    pub fn new(wanted: bool) -> LastMount {
        LastMount { due: wanted.then(host::now), seen: false, attempts: 0 }
    }

    /// It was mounted, and is so no more.
    pub fn has_gone(&mut self, binding: &Binding) -> bool {
        let now = host::now();
        if self.due.is_none_or(|due| now < due) {
            return false;
        }
        let at = mounts::mounted_anywhere(&mounts::numbers(&binding.backing, binding.rdev));
        self.due = Some(now + LOOK);
        match at {
            Some(_) => {
                self.seen = true;
                self.attempts = 0;
                false
            }
            None => self.seen,
        }
    }

    /// A process keeps the device busy: the next attempt comes later.
    pub fn busy(&mut self) {
        self.attempts += 1;
        let pause = LOOK.saturating_mul(1 << self.attempts.min(4)).min(LONGEST) / 2;
        self.due = self.due.map(|_| host::now() + pause);
    }
}

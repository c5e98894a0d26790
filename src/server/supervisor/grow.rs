//! A running device gets a larger disk. The worker is replaced by one that first makes the top image larger
//! ([`chain_switch`](super::chain_switch)); then a helper process gives the block device the new size.
//!
//! A long table needs clusters that have data, which are moved while requests wait. So a large step is made of several
//! changes, each of which moves little; the descriptor is stored with the last one. Whichever process is killed, the image is
//! whole, of the former size, the new one or one between them, and the same command finishes it.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::bail;
use crate::descriptor::commit_by_fd;
use crate::error::Result;
use crate::server::control;
use crate::server::descriptors::SwitchFds;
use crate::server::helper::remote_error;
use crate::server::jobs::{Job, JobEvent};
use crate::server::proto::{Answer, ChainSwitch};
use crate::server::roles::duplicate_commit;
use crate::server::supervisor::Supervisor;
use crate::sys::host;

/// The kernel asks the worker for the size of its file.
const CAPACITY: Duration = Duration::from_secs(60);
/// More steps than the largest disk needs.
const STEPS: u64 = 100_000;

impl Supervisor {
    /// Makes the disk larger and answers the client.
    pub(super) fn grow(&mut self, switch: &ChainSwitch, fds: SwitchFds, client: Option<OwnedFd>) {
        let answers = match self.try_grow(switch, fds) {
            Ok(warning) => vec![Answer::Switched { warning }, Answer::Done],
            Err(e) => vec![control::refusal(&e)],
        };
        for answer in &answers {
            client.iter().for_each(|c| control::answer(c, answer));
        }
    }

    fn try_grow(&mut self, switch: &ChainSwitch, fds: SwitchFds) -> Result<Option<String>> {
        let name = self.record.name.clone();
        let Some(sectors) = switch.grow else { bail!(Protocol, "{name}: it is to grow, to no size") };
        self.wait_while(|s| !s.slot.is_ready(), None)?;
        if sectors < self.record.size_sectors {
            bail!(Param, "{name} has {} sectors: it cannot be made smaller, {sectors}", self.record.size_sectors);
        }
        let mut warning = None;
        for step in 0..STEPS {
            let stored = match (&switch.commit, &fds.commit) {
                (Some(names), Some(fds)) => commit_by_fd::is_committed(names, fds)?,
                _ => true,
            };
            if stored && self.record.size_sectors >= sectors {
                self.take_over_size()?;
                return Ok(warning);
            }
            let next = ChainSwitch { token: self.unused_token(switch.token.wrapping_add(2 * step)), ..switch.clone() };
            let sent = SwitchFds { new: Vec::new(), commit: duplicate_commit(fds.commit.as_ref())? };
            warning = self.try_change(&next, sent, None)?.or(warning);
            self.wait_while(|s| !s.slot.is_ready(), None)?;
        }
        bail!(Device, "{name} has {} sectors after {STEPS} steps, {sectors} wanted", self.record.size_sectors)
    }

    /// Each step is a change of its own. A client that asks again brings the token that it brought before: a worker that has
    /// begun with it would take itself for its successor, and exit.
    fn unused_token(&self, wanted: u64) -> u64 {
        let shm = self.shm.as_ref();
        let used = |token: u64| {
            token == self.chain.start().token || shm.is_some_and(|s| token == s.serving() || token == s.switched())
        };
        // Tokens are odd; at most three are used.
        (0..4).map(|n| wanted.wrapping_add(n << 32)).find(|token| !used(*token)).unwrap_or(wanted)
    }

    /// The block device takes over the size that the worker serves. Its partitions stay.
    fn take_over_size(&mut self) -> Result<()> {
        if host::breach("the block device keeps its size") {
            return Ok(());
        }
        let helper = self.helper(&Job::SetCapacity { binding: self.binding() })?;
        let event = self.helper_event(&helper, host::now() + CAPACITY);
        self.release_helper(helper, event.is_none());
        let name = &self.record.name;
        match event {
            Some(JobEvent::Done) => {}
            Some(JobEvent::Error { code, message }) => {
                let e = remote_error(code, message);
                return Err(e.context(format_args!("the image of {name} has grown, its block device has not")));
            }
            _ => bail!(Device, "the image of {name} has grown; its block device has not taken that over in time"),
        }
        self.save();
        self.follow();
        Ok(())
    }
}

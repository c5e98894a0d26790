//! Giving space of the top's file back, as the supervisor orders it.
//!
//! The order is not taken over by a successor: the supervisor gives it to the next worker anew. A supervisor that was
//! killed is followed by one that does not know it; a client that waits gives it once more, with the same token.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use crate::engine::api::{BackgroundControl, Errno, GivenBack, Status};
use crate::error::Kind;
use crate::server::frame;
use crate::server::give_back::{GaveBack, GiveBackOrder};
use crate::server::proto::FromWorker;
use crate::server::remote_error::RemoteError;

use super::core::{Core, MAIN_THREAD, Pending};
use super::supervisor_restart::SEND_LIMIT;

/// Of what the worker begins by itself: bytes moved in a second, less while requests come.
const OWN_RATE: u64 = 64 << 20;
const OWN_BUSY_RATE: u64 = 4 << 20;
/// So much of the file has to be free for that: bytes, and a part of it.
const OWN_LEAST: u64 = 1 << 30;
const OWN_PART: u64 = 10;
/// Ticks without a request before, and between two attempts.
const OWN_IDLE: u32 = 10;
const OWN_PAUSE: u32 = 300;

/// The last order, and what the worker does by itself.
#[derive(Debug, Default)]
pub struct Giving {
    order: Option<GiveBackOrder>,
    outcome: Option<GaveBack>,
    running: bool,
    /// It is being ended; an order that came later is carried out after that.
    cancelled: bool,
    /// The worker begins by itself, too.
    own: bool,
    /// Ticks before it may do so again.
    pause: u32,
}

/// Whether a file of so many clusters up to the last one in use, some of them free, is worth it.
fn is_worth(end: u32, free: u32, cluster: u64) -> bool {
    let (file, free) = (u64::from(end) * cluster, u64::from(free) * cluster);
    free > OWN_LEAST && free > file / OWN_PART
}

impl Giving {
    /// Takes an order. What is returned is to be sent to the supervisor.
    pub fn begin(&mut self, core: &Core, order: GiveBackOrder) -> Option<FromWorker> {
        let same = self.order.is_some_and(|o| o.token == order.token);
        self.order = Some(order);
        if self.running {
            // The order is carried out when the engine has ended what was cancelled, see `done`. Or: the client of an order whose supervisor was killed may be gone: this one gets the outcome. What the worker
            // does by itself goes on at its rate.
            return None;
        }
        if same && self.outcome.is_some() {
            return self.report();
        }
        self.start(core, order);
        None
    }

    fn start(&mut self, core: &Core, order: GiveBackOrder) {
        (self.outcome, self.running, self.cancelled) = (None, true, false);
        core.submit_event(MAIN_THREAD, Pending::GiveBack(order.config(core.cluster_bytes)));
    }

    /// From here on the worker gives space back by itself.
    pub fn set_own(&mut self, own: bool) {
        self.own = own;
    }

    /// A second has passed; `idle`: so many without a request.
    pub fn tick(&mut self, core: &Core, status: &Status, idle: u32) {
        self.pause = self.pause.saturating_sub(1);
        let ending = core.closing.load(Ordering::Acquire) || core.retiring.load(Ordering::Acquire);
        let may = self.own && core.writable && !ending && !status.failed && !self.running && self.pause == 0;
        if may && idle >= OWN_IDLE && is_worth(status.alloc_end, status.free, core.cluster_bytes) {
            self.pause = OWN_PAUSE;
            self.order = None;
            self.start(core, GiveBackOrder { token: 0, rate: OWN_RATE, busy_rate: OWN_BUSY_RATE });
        }
    }

    pub fn cancel(&mut self, core: &Core) {
        if self.running {
            (self.order, self.cancelled) = (None, true);
            core.submit_event(MAIN_THREAD, Pending::Background(BackgroundControl::Cancel));
        }
    }

    /// A client copies the top: what the worker does by itself has to make way. The client asks again.
    pub fn make_way(&mut self, core: &Core) {
        self.pause = OWN_PAUSE;
        if self.order.is_none() {
            self.cancel(core);
        }
    }

    /// The engine has come to an end with it. What is returned is to be sent to the supervisor.
    pub fn done(&mut self, core: &Core, result: Result<GivenBack, Errno>) -> Option<FromWorker> {
        let ending = core.closing.load(Ordering::Acquire) || core.retiring.load(Ordering::Acquire);
        if result.is_err() && ending {
            // The next worker of the device gets the order anew.
            return None;
        }
        self.running = false;
        if let (true, Some(order), Err(libc::ECANCELED)) = (self.cancelled, self.order, &result) {
            self.start(core, order);
            return None;
        }
        if self.order.is_none() {
            core.log.line(format!("space of {} was given back: {result:?}", core.top().name.display()));
        }
        self.outcome = Some(match result {
            Ok(GivenBack { moved, before, after }) => GaveBack { moved, before, after, error: None },
            Err(errno) => GaveBack::failed(error(errno, core)),
        });
        self.report()
    }

    fn report(&self) -> Option<FromWorker> {
        let (order, outcome) = (self.order?, self.outcome.as_ref()?);
        Some(FromWorker::GaveBack { token: order.token, outcome: outcome.clone() })
    }
}

/// Sends what there is to be sent; a supervisor that was killed is followed by one that asks.
pub fn tell(supervisor: &Option<OwnedFd>, message: Option<FromWorker>) {
    if let (Some(socket), Some(message)) = (supervisor, message) {
        let _ = frame::send_within(socket, &message, &[], SEND_LIMIT);
    }
}

fn error(errno: Errno, core: &Core) -> RemoteError {
    let name = core.top().name.display();
    let (kind, why) = match errno {
        libc::ECANCELED => (Kind::Abort, "it was cancelled".to_owned()),
        libc::EBUSY => (Kind::Busy, "levels of the chain are being merged; wait for the end of that".to_owned()),
        libc::EINVAL => (Kind::Param, "only a ploop image that the device writes to has space to give back".to_owned()),
        errno => (Kind::Write, std::io::Error::from_raw_os_error(errno).to_string()),
    };
    RemoteError { code: kind.code(), message: format!("space of {name} is not given back: {why}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_and_a_gibibyte_are_worth_it() {
        const CLUSTER: u64 = 1 << 20;
        assert!(is_worth(10_000, 1025, CLUSTER));
        assert!(!is_worth(10_000, 1000, CLUSTER), "no GiB");
        assert!(!is_worth(20_000, 1500, CLUSTER), "no tenth");
        assert!(is_worth(u32::MAX, u32::MAX, 64 << 20));
    }
}

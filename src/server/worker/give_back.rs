//! Giving space of the top's file back, as the supervisor orders it.
//!
//! The order is not taken over by a successor: the supervisor gives it to the next worker anew. A supervisor that was
//! killed is followed by one that does not know it; a client that waits gives it once more, with the same token.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use crate::engine::api::{BackgroundControl, Errno, GivenBack};
use crate::error::Kind;
use crate::server::frame;
use crate::server::give_back::{GaveBack, GiveBackOrder};
use crate::server::proto::FromWorker;
use crate::server::remote_error::RemoteError;

use super::core::{Core, MAIN_THREAD, Pending};
use super::supervisor_restart::SEND_LIMIT;

/// The last order.
#[derive(Debug, Default)]
pub struct Giving {
    order: Option<GiveBackOrder>,
    /// None: it is being carried out.
    outcome: Option<GaveBack>,
}

impl Giving {
    /// Takes an order. What is returned is to be sent to the supervisor.
    pub fn begin(&mut self, core: &Core, order: GiveBackOrder) -> Option<FromWorker> {
        let same = self.order.is_some_and(|o| o.token == order.token);
        let running = self.order.is_some() && self.outcome.is_none();
        self.order = Some(order);
        if running {
            // The client of an order whose supervisor was killed may be gone: this one gets the outcome.
            return None;
        }
        if same {
            return self.report();
        }
        self.outcome = None;
        core.submit_event(MAIN_THREAD, Pending::GiveBack(order.config(core.cluster_bytes)));
        None
    }

    pub fn cancel(&self, core: &Core) {
        if self.order.is_some() && self.outcome.is_none() {
            core.submit_event(MAIN_THREAD, Pending::Background(BackgroundControl::Cancel));
        }
    }

    /// The engine has come to an end with it. What is returned is to be sent to the supervisor.
    pub fn done(&mut self, core: &Core, result: Result<GivenBack, Errno>) -> Option<FromWorker> {
        let ending = core.closing.load(Ordering::Acquire) || core.retiring.load(Ordering::Acquire);
        if result == Err(libc::ECANCELED) && ending {
            // The next worker of the device gets the order anew.
            return None;
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

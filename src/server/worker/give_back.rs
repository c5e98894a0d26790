//! Giving space of the top's file back, as the supervisor orders it.
//!
//! The order is not taken over by a successor: the supervisor gives it to the next worker anew. A supervisor that was
//! killed is followed by one that does not know it; a client that waits gives it once more, with the same token.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use crate::engine::api::{BackgroundControl, Errno, GivenBack};
use crate::error::Kind;
use crate::server::give_back::{GaveBack, GiveBackOrder};
use crate::server::proto::FromWorker;
use crate::server::remote_error::RemoteError;

use super::core::{Core, MAIN_THREAD, Pending};
use super::supervisor_link::SupervisorLink;

/// The last order.
#[derive(Debug, Default)]
pub struct Giving {
    order: Option<GiveBackOrder>,
    /// None: it is being carried out.
    outcome: Option<GaveBack>,
}

impl Giving {
    pub fn cancel(&self, core: &Core) {
        if self.order.is_some() && self.outcome.is_none() {
            core.submit_event(MAIN_THREAD, Pending::Background(BackgroundControl::Cancel));
        }
    }
}

impl SupervisorLink {
    pub(super) fn begin_give_back(&mut self, core: &Core, order: GiveBackOrder) {
        let same = self.giving.order.is_some_and(|o| o.token == order.token);
        let running = self.giving.order.is_some() && self.giving.outcome.is_none();
        self.giving.order = Some(order);
        if running {
            // The client of an order whose supervisor was killed may be gone: this one gets the outcome.
            return;
        }
        if same {
            return self.report_gave_back();
        }
        self.giving.outcome = None;
        core.submit_event(MAIN_THREAD, Pending::GiveBack(order.config(core.cluster_bytes)));
    }

    pub(super) fn gave_back(&mut self, core: &Core, result: Result<GivenBack, Errno>) {
        let ending = core.closing.load(Ordering::Acquire) || core.retiring.load(Ordering::Acquire);
        if result == Err(libc::ECANCELED) && ending {
            // The next worker of the device gets the order anew.
            return;
        }
        self.giving.outcome = Some(match result {
            Ok(GivenBack { moved, before, after }) => GaveBack { moved, before, after, error: None },
            Err(errno) => GaveBack::failed(error(errno, core)),
        });
        self.report_gave_back();
    }

    fn report_gave_back(&self) {
        if let (Some(order), Some(outcome)) = (self.giving.order, &self.giving.outcome) {
            let _ = self.send(&FromWorker::GaveBack { token: order.token, outcome: outcome.clone() });
        }
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

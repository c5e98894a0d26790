//! Giving space of a running device's top back. The worker does it; the supervisor gives the order to each next worker
//! until one has carried it out, and answers the clients that wait.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use crate::error::{Error, Kind};
use crate::server::control;
use crate::server::give_back::{GaveBack, GiveBackOrder};
use crate::server::proto::{Answer, ToWorker};
use crate::server::supervisor::Supervisor;
use crate::server::supervisor::clients::Awaited;
use crate::sys::host;

impl Supervisor {
    pub(super) fn begin_give_back(&mut self, order: GiveBackOrder, client: OwnedFd) {
        let name = &self.record.name;
        let refused = if self.chain.attach().read_only {
            Some(Error::new(Kind::Param, format!("{name} is read-only: it has no space to give back")))
        } else if self.chain.merge().is_some() {
            let text = format!("{name}: levels of it are being merged; wait for the end of that, or cancel it");
            Some(Error::new(Kind::Busy, text))
        } else {
            self.copied()
        };
        if let Some(e) = refused {
            return control::answer(&client, &control::refusal(&e));
        }
        if self.giving_back.is_none() {
            self.giving_back = Some(order);
            self.slot.send(&ToWorker::GiveBack(order));
        }
        self.clients.wait(Awaited::GiveBack, [client]);
    }

    /// A worker serves that does not know of the order.
    pub(super) fn repeat_give_back(&self) {
        if let Some(order) = self.giving_back.filter(|_| !host::breach("space is given back by one worker alone")) {
            self.slot.send(&ToWorker::GiveBack(order));
        }
    }

    pub(super) fn on_gave_back(&mut self, token: u64, outcome: GaveBack) {
        if self.giving_back.take_if(|order| order.token == token).is_some() {
            self.end_relocation();
            self.clients.answer(Awaited::GiveBack, &Answer::GaveBack(outcome));
        }
    }

    pub(super) fn cancel_give_back(&mut self, client: OwnedFd) {
        // Also what the worker has begun by itself.
        self.slot.send(&ToWorker::CancelGiveBack);
        if self.giving_back.take().is_some() {
            let why = Error::new(Kind::Abort, format!("giving space of {} back was cancelled", self.record.name));
            self.clients.answer(Awaited::GiveBack, &Answer::GaveBack(GaveBack::failed(why)));
        }
        control::answer(&client, &Answer::Done);
    }
}

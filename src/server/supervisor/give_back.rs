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

/// Workers that fail by themselves while they give space back, before it is given up: fewer than end the device.
const FAILED_WORKERS: u32 = 3;

/// What the worker does for one or more clients.
pub(super) struct GivingBack {
    order: GiveBackOrder,
    /// Of the clients that wait for its end. They need not be there any more.
    tokens: Vec<u64>,
    failed_workers: u32,
}

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
        match &mut self.giving_back {
            Some(giving) if giving.tokens.contains(&order.token) => {}
            Some(giving) => giving.tokens.push(order.token),
            None => {
                self.giving_back = Some(GivingBack { order, tokens: vec![order.token], failed_workers: 0 });
                self.slot.send(&ToWorker::GiveBack(order));
            }
        }
        self.clients.wait(Awaited::GiveBack(order.token), [client]);
    }

    /// A worker serves that does not know of the order.
    pub(super) fn repeat_give_back(&self) {
        if let Some(giving) = &self.giving_back
            && !host::breach("space is given back by one worker alone")
        {
            self.slot.send(&ToWorker::GiveBack(giving.order));
        }
    }

    pub(super) fn on_gave_back(&mut self, token: u64, outcome: GaveBack) {
        if self.giving_back.as_ref().is_some_and(|giving| giving.order.token == token) {
            self.end_relocation();
            self.answer_give_back(&Answer::GaveBack(outcome));
        }
    }

    /// A worker failed by itself. That must not go on until the device has failed.
    pub(super) fn on_failed_worker(&mut self) {
        let Some(giving) = &mut self.giving_back else { return };
        giving.failed_workers += 1;
        if giving.failed_workers >= FAILED_WORKERS {
            let why = format!(
                "{}: {} workers exited by themselves while space was given back, so it is given up; the log of the \
                 device says why they did",
                self.record.name, giving.failed_workers
            );
            self.end_relocation();
            self.answer_give_back(&Answer::GaveBack(GaveBack::failed(Error::new(Kind::Sys, why))));
        }
    }

    /// It has ended, or the device has failed.
    pub(super) fn answer_give_back(&mut self, answer: &Answer) {
        for token in self.giving_back.take().map_or(vec![], |giving| giving.tokens) {
            self.clients.answer(Awaited::GiveBack(token), answer);
        }
    }

    /// One client waits no longer. The work ends unless others do.
    pub(super) fn cancel_give_back(&mut self, token: u64, client: OwnedFd) {
        let why = Error::new(Kind::Abort, format!("giving space of {} back was cancelled", self.record.name));
        self.clients.answer(Awaited::GiveBack(token), &Answer::GaveBack(GaveBack::failed(why)));
        if let Some(giving) = &mut self.giving_back {
            giving.tokens.retain(|t| self.clients.is_awaited_by_client(Awaited::GiveBack(*t)));
        }
        // Without an order: what the worker has begun by itself.
        if self.giving_back.as_ref().is_none_or(|giving| giving.tokens.is_empty()) {
            if self.giving_back.take().is_some() {
                self.end_relocation();
            }
            self.slot.send(&ToWorker::CancelGiveBack);
        }
        control::answer(&client, &Answer::Done);
    }
}

//! The maintenance state, and the helper that gives back what a balloon lies on.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use crate::error::{Error, Kind};
use crate::format::maintenance::Maintenance;
use crate::server::control;
use crate::server::jobs::Job;
use crate::server::maintenance::MaintenanceChange;
use crate::server::proto::Answer;
use crate::server::supervisor::Supervisor;

impl Supervisor {
    /// What the device is in now. A merge is known from the chain, a copy from its client.
    pub(super) fn maintenance(&self) -> Maintenance {
        match Maintenance::from_word(&self.record.maintenance) {
            Maintenance::Off if self.chain.merge().is_some() => Maintenance::Merge,
            Maintenance::Off if self.tracking.is_some() => Maintenance::Track,
            state => state,
        }
    }

    /// Sets the state if the present one may be left; it is recorded before the client is answered.
    pub(super) fn set_maintenance(&mut self, change: &MaintenanceChange, client: &OwnedFd) {
        let now = self.maintenance();
        if !change.may_leave(now) {
            let e = Error::new(
                Kind::Busy,
                format!(
                    "{}: its maintenance state is {now}, wanted {}; ploop balloon complete and clear lead out of it",
                    self.record.name,
                    change.from.join(" or ")
                ),
            );
            return control::answer(client, &control::refusal(&e));
        }
        self.record.maintenance = Maintenance::from_word(&change.to).word().to_owned();
        self.save();
        control::answer(client, &Answer::Done);
    }

    /// The worker has given space back, or could not: RELOC ends, also if the client is gone.
    pub(super) fn end_relocation(&mut self) {
        if self.record.maintenance == Maintenance::Relocation.word() {
            self.record.maintenance = Maintenance::Off.word().to_owned();
            self.save();
        }
    }

    pub(super) fn discard_balloon(&mut self, fds: &[OwnedFd], client: &OwnedFd) {
        let binding = self.binding();
        self.start_released(&Job::DiscardBalloon { binding }, fds, client);
    }
}

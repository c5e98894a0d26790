//! What clients ask of a supervisor.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::server::control;
use crate::server::counters;
use crate::server::descriptors::{Descriptors, SwitchFds};
use crate::server::greeting::Greeting;
use crate::server::helper::Helper;
use crate::server::jobs::Job;
use crate::server::proto::{Answer, Command, DeviceRecord, ToWorker, own_greeting};
use crate::server::shm::Shm;
use crate::server::supervisor::Supervisor;
use crate::server::supervisor::chain_state::ChangeRequest;
use crate::server::supervisor::clients::{Asked, Awaited};
use crate::sys::host;

/// A program that does not tell its version in this time is not started as a server.
const VERSION_LIMIT: Duration = Duration::from_secs(5);

impl Supervisor {
    /// Does what a client asks for; an answer may come later.
    pub(super) fn handle_command(&mut self, asked: Asked) {
        let Asked { command, fds, client } = asked;
        match command {
            Command::Info => {
                let status = self.shm.as_ref().map(Shm::status).unwrap_or_default();
                let failed = status.failed || self.failed.is_some();
                let total = self.record.size_sectors.div_ceil(u64::from(self.record.cluster_sectors.max(1)));
                let progress = (status.background_seen.min(total), total);
                let merging = self.chain.merge().map(|_| progress);
                let giving_back = self.giving_back.as_ref().map(|_| progress);
                // With what the device is in now, which the stored record does not tell of merges and copies.
                let record = DeviceRecord { maintenance: self.maintenance().word().to_owned(), ..self.record.clone() };
                let stalled = self.slot.stalled().map(|time| time.as_secs());
                let (no_space, counters) = (status.no_space, counters::of(&status));
                let answer = Answer::Info { record, no_space, failed, merging, giving_back, stalled, counters };
                control::answer(&client, &answer);
            }
            Command::Abort if self.record.state != "starting" => self.clients.wait(Awaited::Abort, [client]),
            Command::Stop | Command::StopAndKeep if self.record.state != "starting" && self.failed.is_none() => {
                // Of several clients the last one decides.
                self.record.keep = matches!(command, Command::StopAndKeep);
                self.clients.wait(Awaited::Stop, [client]);
            }
            Command::HoldForSpace(hold) if self.failed.is_none() => {
                self.slot.send(&ToWorker::HoldForSpace(hold));
                control::answer(&client, &Answer::Done);
            }
            Command::LimitTop { sectors } if self.failed.is_none() && self.shm.is_some() => {
                if let Some(shm) = &self.shm {
                    shm.set_file_limit(sectors);
                }
                control::answer(&client, &Answer::Done);
            }
            Command::Switch(switch) if self.can_change() => {
                let sent = SwitchFds::received(&switch, fds);
                self.request(sent.map(|fds| ChangeRequest::Switch(switch, fds)), client);
            }
            Command::Freeze | Command::PrepareFreeze if self.can_change() => {
                let job = if matches!(command, Command::Freeze) { Job::Freeze } else { Job::PrepareFreeze };
                self.start_released(&job, &fds, &client);
            }
            Command::Maintenance(change) if self.can_change() => self.set_maintenance(&change, &client),
            Command::DiscardBalloon if self.can_change() => self.discard_balloon(&fds, &client),
            Command::Merge(switch) if self.can_change() => {
                let sent = SwitchFds::received(&switch, fds);
                self.request(sent.map(|fds| ChangeRequest::MergeTop(switch, fds)), client);
            }
            Command::MergeLevels(order) if self.can_change() => {
                let sent = SwitchFds::received(&order.switch, fds);
                self.request(sent.map(|fds| ChangeRequest::MergeFrozen(order, fds)), client);
            }
            Command::Grow(switch) if self.can_change() => {
                let sent = SwitchFds::received(&switch, fds);
                self.request(sent.map(|fds| ChangeRequest::Grow(switch, fds)), client);
            }
            Command::CancelMerge => self.cancel_merge(client),
            Command::GiveBack(order) if self.can_change() => self.begin_give_back(order, client),
            Command::Track if self.can_change() => self.chain.request(ChangeRequest::Track, Some(client)),
            Command::CancelGiveBack(token) => self.cancel_give_back(token, client),
            Command::Reload { token } if self.can_change() => {
                let program = fds.into_iter().next();
                let program = program.ok_or_else(|| Error::new(Kind::Protocol, "no program was sent"));
                self.request(program.map(|program| ChangeRequest::Reload { token, program }), client);
            }
            Command::Reload { .. } if self.failed.is_some() && self.slot.worker().is_none() => {
                self.retry_failed_device(fds, client)
            }
            Command::Flush if self.failed.is_none() => {
                self.clients.wait(Awaited::Flush, [client]);
                self.flush();
            }
            _ => {
                let starting = self.record.state == "starting";
                let now = if starting { "it is being started" } else { "it is being unmounted" };
                let why = self.failed.clone().unwrap_or(now.into());
                let e = Error::new(Kind::Device, format!("{}: {why}", self.record.name));
                control::answer(&client, &control::refusal(&e));
            }
        }
    }

    /// Starts a helper that talks to the initiator from here on, on the socket that is the first descriptor.
    pub(super) fn start_released(&mut self, job: &Job, fds: &[OwnedFd], client: &OwnedFd) {
        let fds: Vec<BorrowedFd> = fds.iter().map(AsFd::as_fd).collect();
        let program = self.fds.as_ref().map_or("/proc/self/exe".into(), Descriptors::program);
        match Helper::start_with(&program, job, &fds) {
            Ok(helper) => {
                self.released_helpers.push(helper);
                control::answer(client, &Answer::Done);
            }
            Err(e) => control::answer(client, &control::refusal(&e)),
        }
    }

    /// Queues a change; one that cannot be understood is refused.
    fn request(&mut self, request: Result<ChangeRequest>, client: OwnedFd) {
        match request {
            Ok(request) => self.chain.request(request, Some(client)),
            Err(e) => control::answer(&client, &control::refusal(&e)),
        }
    }

    /// No worker could serve; perhaps one can by now. The client is answered when one has flushed, or when none can
    /// again.
    fn retry_failed_device(&mut self, program: Vec<OwnedFd>, client: OwnedFd) {
        if let Some(program) = program.into_iter().next() {
            // No worker serves, so that this supervisor may wait for the program's answer.
            let checked = Helper::ask_version(&path_of(&program)).and_then(|asked| {
                let greeting = asked.greeting(VERSION_LIMIT);
                self.release_helper(asked, true);
                self.judge_program(greeting)
            });
            if let Err(e) = checked {
                return control::answer(&client, &control::refusal(&e));
            }
            if let Some(fds) = &mut self.fds {
                fds.binary = program;
            }
        }
        self.failed = None;
        self.slot.forgive();
        self.record.state = "running".into();
        self.save();
        self.clients.wait(Awaited::Flush, [client]);
        self.flush_sent = true;
        self.start_worker(true);
    }

    /// Asks a program that is to serve the device for its version, while the loop runs. An error: it is older than this
    /// one, or does not answer.
    pub(super) fn check_program(&mut self, program: &OwnedFd) -> Result<()> {
        let asked = Helper::ask_version(&path_of(program))?;
        let end = host::now() + VERSION_LIMIT;
        while !self.poll_once(end, Some(asked.sock.as_fd())) && host::now() < end && !self.is_aborted() {}
        let greeting = asked.greeting(Duration::ZERO);
        self.release_helper(asked, true);
        self.judge_program(greeting)
    }

    fn judge_program(&self, greeting: Result<Greeting>) -> Result<()> {
        let judged = greeting.and_then(|g| g.replaces(&own_greeting()));
        judged.map_err(|e| e.context(format!("{} is not reloaded", self.record.name)))
    }
}

fn path_of(program: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", program.as_raw_fd()).into()
}

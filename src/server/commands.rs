//! What clients ask of a supervisor.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::error::{Error, Kind};
use crate::server::chain_switch::{ChangeRequest, PendingChange};
use crate::server::control;
use crate::server::helper::{Helper, Job};
use crate::server::proto::{Answer, Command, ToWorker};
use crate::server::shm::Shm;
use crate::server::supervisor::Supervisor;
use crate::server::worker_process::{Descriptors, RestartPolicy};

impl Supervisor {
    /// Does what a client asks for; an answer may come later.
    pub(super) fn handle_command(&mut self, command: Command, fds: Vec<OwnedFd>, client: OwnedFd) {
        match command {
            Command::Info => {
                let status = self.shm.as_ref().map(Shm::status).unwrap_or_default();
                let failed = status.failed || self.failed.is_some();
                let total = self.record.size_sectors.div_ceil(u64::from(self.record.cluster_sectors.max(1)));
                let merging = self.start.merge.as_ref().map(|_| (status.background_seen.min(total), total));
                let record = self.record.clone();
                let answer = Answer::Info { record, no_space: status.no_space, failed, merging };
                control::answer(&client, &answer);
            }
            Command::Abort if self.record.state != "starting" => self.aborting.push(client),
            Command::Stop if self.record.state != "starting" && self.failed.is_none() => self.stopping.push(client),
            Command::HoldForSpace(hold) if self.failed.is_none() => {
                self.send_to_worker(&ToWorker::HoldForSpace(hold));
                control::answer(&client, &Answer::Done);
            }
            Command::Switch(switch) if self.can_change() => {
                self.changes.push_back(PendingChange {
                    request: ChangeRequest::Switch(switch),
                    fds,
                    client: Some(client),
                });
            }
            Command::Freeze if self.can_change() => {
                let fds: Vec<BorrowedFd> = fds.iter().map(AsFd::as_fd).collect();
                let program = self.fds.as_ref().map_or("/proc/self/exe".into(), Descriptors::program);
                // It talks to the initiator from here on.
                match Helper::start_with(&program, &Job::Freeze, &fds) {
                    Ok(helper) => {
                        self.released_helpers.push(helper);
                        control::answer(&client, &Answer::Done);
                    }
                    Err(e) => control::answer(&client, &control::refusal(&e)),
                }
            }
            Command::Merge(switch) if self.can_change() => {
                self.changes.push_back(PendingChange {
                    request: ChangeRequest::MergeTop(switch),
                    fds,
                    client: Some(client),
                });
            }
            Command::MergeLevels(order) if self.can_change() => {
                self.changes.push_back(PendingChange {
                    request: ChangeRequest::MergeFrozen(order),
                    fds,
                    client: Some(client),
                });
            }
            Command::CancelMerge => self.cancel_merge(client),
            Command::Reload { token } if self.can_change() => {
                self.changes.push_back(PendingChange {
                    request: ChangeRequest::Reload(token),
                    fds,
                    client: Some(client),
                });
            }
            Command::Reload { .. } if self.failed.is_some() && self.worker.is_none() => {
                self.retry_failed_device(fds, client)
            }
            Command::Flush if self.failed.is_none() => {
                self.flushing.push(client);
                self.flush();
            }
            _ => {
                let why = self.failed.clone().unwrap_or("it is being started".into());
                let e = Error::new(Kind::Device, format!("{}: {why}", self.record.name));
                control::answer(&client, &control::refusal(&e));
            }
        }
    }

    /// No worker could serve; perhaps one can by now. The client is answered when one has flushed, or when none can
    /// again.
    fn retry_failed_device(&mut self, program: Vec<OwnedFd>, client: OwnedFd) {
        if let (Some(fds), Some(program)) = (&mut self.fds, program.into_iter().next()) {
            fds.binary = program;
        }
        self.failed = None;
        self.restarts = RestartPolicy::default();
        self.record.state = "running".into();
        self.save();
        self.flushing.push(client);
        self.flush_sent = true;
        self.start_worker(true);
    }
}

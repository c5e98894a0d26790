//! How a device ends: cleanly, or given up.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::server::control::refusal;
use crate::server::helper::remote_error;
use crate::server::jobs::{Go, Job, JobEvent};
use crate::server::proto::{Answer, ToWorker, WorkerReady};
use crate::server::shm::Shm;
use crate::server::supervisor::clients::Awaited;
use crate::server::supervisor::{Supervisor, log};
use crate::server::transport::Patience;
use crate::server::{frame, runtime, stopped, unflushed};
use crate::sys::host;

/// How long other processes may keep the device busy.
const BUSY: Duration = Duration::from_secs(60);
/// The same where no client has asked: the supervisor tries again later.
const UNASKED: Duration = Duration::from_millis(500);
/// A mount does not go by waiting, except one that is being unmounted right now.
const MOUNTED: Duration = Duration::from_secs(2);
/// Detaching flushes the device's page cache; if nothing comes of it, another worker may do better.
const DETACH: Duration = Duration::from_secs(180);
/// Between two looks whether a process still waits for the end of a busy device.
const LOOK: Duration = Duration::from_millis(200);
/// The end of a process that has nothing left to do.
const EXIT: Duration = Duration::from_secs(10);

impl Supervisor {
    /// The clean end. True: the device is gone (the image's own error, if any, was reported); false: it stays as it
    /// was.
    pub(super) fn stop(&mut self) -> bool {
        let asked = self.clients.is_awaited(Awaited::Stop);
        let mut result = match self.unbind(if asked { BUSY } else { UNASKED }) {
            Ok(()) => self.close(),
            Err(e) => Err(e),
        };
        // Aborted meanwhile: the abort ends the device.
        if self.is_aborted() {
            let e = Error::new(Kind::Abort, format!("{} was given up by another process", self.record.name));
            self.clients.answer(Awaited::Stop, &refusal(&e));
            return false;
        }
        let gone = self.record.state == "stopped" && self.failed.is_none();
        if !asked && !gone && self.failed.is_none() {
            // Clients that asked meanwhile are ready to wait longer.
            return false;
        }
        if gone {
            let why = Error::new(Kind::Abort, format!("the merge was ended, since {} was detached", self.record.name));
            self.refuse_merging(&why);
            let levels = if self.record.keep { self.share_levels() } else { Vec::new() };
            self.give_up();
            if self.record.keep && result.is_ok() {
                let kept = stopped::keep(&self.dir, &self.record, self.chain.attach(), &levels);
                result = kept.map_err(|e| e.context("its images are closed, but it cannot be started again"));
            }
            drop(levels);
            // What the image lacks the next device can take over, unless a sync has failed.
            let _ = match &result {
                Err(_) if !self.shm.as_ref().is_some_and(Shm::failed) => unflushed::retire(&self.dir),
                _ => runtime::remove_dir(&self.dir),
            };
        } else if std::mem::take(&mut self.record.keep) {
            // A supervisor that takes over later must not keep what is ended then.
            self.save();
        }
        let answer = match &result {
            Ok(()) => Answer::Done,
            Err(e) => refusal(e),
        };
        if let (Err(e), false) = (&result, self.clients.is_awaited(Awaited::Stop)) {
            log(&self.record.name, &format!("closing the image: {e}"));
        }
        self.clients.answer(Awaited::Stop, &answer);
        gone
    }

    /// The images, in descriptors that stay when the device's own are closed.
    pub(super) fn share_levels(&self) -> Vec<OwnedFd> {
        let levels = self.fds.iter().flat_map(|fds| &fds.levels);
        levels.filter_map(|fd| fd.try_clone().ok()).collect()
    }

    /// Takes the block device away from under its name. Busy: error 3, nothing changed.
    fn unbind(&mut self, busy: Duration) -> Result<()> {
        if self.record.state == "stopped" {
            return Ok(());
        }
        if !self.record.backing.is_empty() {
            let patience = Patience { busy, mounted: MOUNTED.min(busy) };
            let helper = self.helper(&Job::Detach { binding: self.binding(), patience })?;
            let mut opened = false;
            let mut again = true;
            let begun = host::now();
            let result = loop {
                match self.helper_event(&helper, host::now() + if opened { DETACH } else { LOOK }) {
                    Some(JobEvent::Opened) => {
                        opened = true;
                        self.record.state = "stopping".into();
                        self.names.clear();
                        if let Err(e) = frame::send(&helper.sock, &Go, &[]) {
                            break Err(e);
                        }
                    }
                    Some(JobEvent::Done) => break Ok(()),
                    // The block device behind has no meaning to users.
                    Some(JobEvent::Error { code, message }) => {
                        let node = self.record.node.display().to_string();
                        break Err(remote_error(code, message.replace(&self.record.backing, &node)));
                    }
                    Some(_) => {}
                    None if self.is_aborted() || self.failed.is_some() => {
                        let why = self.failed.clone().unwrap_or("it was given up".into());
                        break Err(Error::new(Kind::Device, format!("{}: {why}", self.record.name)));
                    }
                    // The device is busy, and nothing has changed.
                    None if !opened && self.clients.is_abandoned(Awaited::Stop) => {
                        break Err(Error::new(Kind::Abort, "no process waits for its end any more"));
                    }
                    None if !opened && host::since(begun) < DETACH => {}
                    None if again => {
                        again = false;
                        self.slot.kill();
                    }
                    // The kernel is still writing. No limit turns that into an error.
                    None => {}
                }
            };
            self.release_helper(helper, result.is_err());
            if let Err(e) = result {
                if self.failed.is_none() && opened {
                    self.record.state = "running".into();
                    self.save();
                    self.scan_now(Duration::from_secs(5));
                }
                return Err(e);
            }
        }
        self.names.clear();
        self.record.state = "stopped".into();
        self.save();
        Ok(())
    }

    /// The image: complete, flushed, unmarked.
    fn close(&mut self) -> Result<()> {
        let mut told = None;
        loop {
            let worker = self.slot.worker();
            if let Some(error) = worker.and_then(|w| w.closed.clone()) {
                return match error {
                    None => Ok(()),
                    Some(error) => Err(error.into()),
                };
            }
            if let Some(why) = &self.failed {
                return Err(Error::new(Kind::Device, format!("{}: {why}", self.record.name)));
            }
            if self.is_aborted() {
                return Err(Error::new(Kind::Abort, format!("{} was given up", self.record.name)));
            }
            // Once to each worker that is ready for it.
            if let Some(id) = worker.filter(|w| w.ready.is_some()).map(|w| w.id)
                && told != Some(id)
            {
                told = Some(id);
                self.slot.send(&ToWorker::Close);
            }
            self.poll_once(host::now() + Duration::from_secs(1), None);
        }
    }

    /// The worker ends, and with the last descriptor the connection: what was not answered fails.
    pub(super) fn give_up(&mut self) {
        self.slot.expect_end();
        self.fds = None;
        let Some(worker) = self.slot.worker() else { return };
        let closed = worker.closed.is_some();
        let start = host::now();
        // One that has closed the image ends by itself.
        while host::since(start) < EXIT && self.slot.worker().is_some_and(|w| runtime::alive(w.id)) {
            if let Some(worker) = self.slot.worker().filter(|_| !closed || host::since(start) > EXIT / 2) {
                worker.kill();
            }
            host::sleep(Duration::from_millis(2));
        }
        if let Some(worker) = self.slot.worker_mut().filter(|w| !runtime::alive(w.id)) {
            worker.reap();
        }
    }

    /// `umount --abort`: all I/O fails from now on. A device that is still mounted keeps its record; it is cleaned when
    /// it is not any more.
    pub(super) fn abort(mut self) {
        log(&self.record.name, "given up: its I/O fails from now on");
        let (binding, connection) = (self.binding(), self.record.connection);
        let detach = Job::Detach { binding, patience: Patience { busy: MOUNTED, mounted: Duration::ZERO } };
        self.slot.expect_end();
        self.slot.kill();
        // By the kernel's own switch too: a worker that sleeps in the kernel keeps the connection open.
        if connection != 0
            && let Ok(helper) = self.helper(&Job::Abort { transport: self.chain.transport(), connection })
        {
            let _ = helper.finish(Duration::from_secs(5));
        }
        self.give_up();
        self.record.state = "failed".into();
        self.save();
        if self.shm.as_ref().is_some_and(Shm::failed) {
            // A failed sync counts as long as the device is used.
            let _ = runtime::remove_files(&self.dir, &[runtime::MEMORY]);
        }
        let aborting = self.clients.take(Awaited::Abort);
        if !self.record.backing.is_empty() && self.detach_failed(&detach) {
            let _ = unflushed::retire(&self.dir);
        }
        let stopped = Error::new(Kind::Abort, format!("{} was given up", self.record.name));
        self.clients.answer(Awaited::Stop, &refusal(&stopped));
        self.clients.wait(Awaited::Abort, aborting);
        self.clients.answer(Awaited::Abort, &Answer::Done);
    }

    fn detach_failed(&mut self, job: &Job) -> bool {
        let Ok(helper) = self.helper(job) else { return false };
        let end = host::now() + Duration::from_secs(20);
        let gone = loop {
            match self.helper_event(&helper, end) {
                Some(JobEvent::Opened) => {
                    self.names.clear();
                    if frame::send(&helper.sock, &Go, &[]).is_err() {
                        break false;
                    }
                }
                Some(JobEvent::Done) => break true,
                Some(JobEvent::Error { .. }) | None => break false,
                Some(_) => {}
            }
        };
        self.release_helper(helper, true);
        gone
    }

    /// A worker that runs already does not send `Ready` again.
    pub(super) fn assume_ready(&mut self) {
        let r = &self.record;
        let ready = WorkerReady {
            device_bytes: r.size_sectors * crate::units::SECTOR,
            cluster_sectors: r.cluster_sectors,
            fmt_version: r.fmt_version,
            was_marked: false,
            direct: true,
            greeting: self.chain.start().greeting.clone(),
        };
        if let Some(worker) = self.slot.worker_mut() {
            worker.ready = Some(ready);
            worker.serving_since = Some(host::now());
        }
    }
}

//! A device is stopped and started again.

use std::time::Duration;

use super::life::Life;
use crate::device::{self, State};
use crate::error::Kind;
use crate::ops::stopped;

/// How long a supervisor goes on with what a killed caller has begun.
const GOES_ON: Duration = Duration::from_secs(100);

impl Life<'_> {
    pub(super) fn stop_and_start(&mut self) {
        let running = self.device().filter(|d| d.state == State::Running);
        let Some(name) = running.map(|d| d.name().to_owned()) else { return self.pause() };
        self.stop_app();
        let asked = name.clone();
        let (result, killed) = self.operate("stop and start: stop".into(), false, move || stopped::stop(&asked));
        match result {
            Some(Ok(())) => {
                if let Some(d) = self.device() {
                    self.fail(format!("stopped, and the device is {:?}", d.state));
                }
                if !self.is_stopped(&name) {
                    self.fail("stopped, and there is no record of the device".into());
                }
                // The record is made when the images are closed, whichever process was killed before.
                self.closed(true);
            }
            Some(Err(e)) if killed.is_empty() => self.fail(format!("stop failed: {e}")),
            _ => {
                if !self.power_due {
                    self.rest(GOES_ON);
                }
                self.settle_unmounted(&killed);
            }
        }
        if self.device().is_some() {
            return self.start_app();
        }
        if self.is_stopped(&name) {
            self.start_again(&name);
        }
    }

    fn start_again(&mut self, name: &str) {
        let asked = name.to_owned();
        let (result, killed) = self.operate("stop and start: start".into(), false, move || stopped::start(&asked));
        self.model.lock().expect("a lock").marked = true;
        match result {
            Some(Ok(())) => {}
            Some(Err(e)) if killed.is_empty() => self.fail(format!("start failed: {e}")),
            _ if self.power_due => {}
            // The supervisor takes a device back whose caller was killed.
            _ => self.rest(GOES_ON),
        }
        self.settle(&killed);
        if self.device().is_none() && self.is_stopped(name) {
            // The start was undone, and another one succeeds; or its processes were killed when they had touched an image.
            let asked = name.to_owned();
            let (result, _) = self.operate("start again".into(), true, move || stopped::start(&asked));
            match result {
                Some(Ok(())) => self.settle(&[]),
                Some(Err(e)) if e.kind() == Kind::InUse && !killed.is_empty() => {
                    let asked = name.to_owned();
                    let (result, _) = self.operate("clear".into(), true, move || stopped::clear(&asked));
                    if !matches!(result, Some(Ok(()))) {
                        self.fail(format!("clear: {result:?}"));
                    }
                }
                other => self.fail(format!("the second start: {other:?}; killed in the first: {killed:?}")),
            }
        }
        if self.device().is_some() {
            self.start_app();
        }
    }

    fn is_stopped(&self, name: &str) -> bool {
        device::find_stopped(name).is_ok_and(|found| found.is_some())
    }
}

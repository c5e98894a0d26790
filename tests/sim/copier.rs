//! A copier of the top's file: it copies all of it, then what is written meanwhile, until nothing is left.

use std::collections::VecDeque;

use crate::disk::Stamp;
use crate::engine::api::*;
use crate::world::World;

const BUSY: Errno = 16;

/// What has been copied, and what is to be.
pub struct Copier {
    copy: Vec<Stamp>,
    /// Clusters of the file, taken and not read.
    queue: VecDeque<u32>,
    /// The last answer to a take.
    answer: Option<Tracked>,
    /// It went on under another worker.
    pub took_over: bool,
    /// The order that is being given is to be refused.
    refused: bool,
}

impl World {
    /// The copier begins, or goes on for a while.
    pub fn copy_some(&mut self) {
        if self.copier.is_none() {
            return self.begin_copy();
        }
        let reads = self.rng.below(6);
        for _ in 0..reads {
            if !self.copy_next() {
                // Ends within the table, too.
                let to = self.rng.pick(&[1, 3, 40, u32::MAX, u32::MAX]);
                let most = self.rng.pick(&[1, 2, 100]);
                self.order(TrackControl::Take { from: 0, to, most });
                return;
            }
        }
    }

    fn begin_copy(&mut self) {
        if !self.engine.as_ref().is_some_and(|e| e.works_in_background()) || self.closing || self.failed {
            return;
        }
        let refused = self.background.is_some();
        self.copier =
            Some(Copier { copy: Vec::new(), queue: VecDeque::new(), answer: None, took_over: false, refused });
        self.order(TrackControl::Begin { all: false });
        let Some(copier) = &mut self.copier else { return };
        match copier.answer.take() {
            Some(answer) => {
                copier.queue = (0..answer.clusters).collect();
                self.cover.hit("a copy begun");
            }
            None => {
                self.copier = None;
            }
        }
    }

    fn order(&mut self, control: TrackControl) {
        self.say(|_| format!("Track {control:?}"));
        self.feed(Event::Track(control));
        let Some(copier) = &mut self.copier else { return };
        if let Some(answer) = &mut copier.answer {
            copier.queue.extend(std::mem::take(&mut answer.dirty).into_iter().flatten());
        }
    }

    /// The engine said Tracked.
    pub fn tracked(&mut self, result: Result<Tracked, Errno>) {
        let Some(copier) = &mut self.copier else { self.fail("Tracked, and nothing is copied") };
        match result {
            Ok(answer) => copier.answer = Some(answer),
            Err(BUSY) if copier.refused => self.cover.hit("a copy refused"),
            Err(e) => self.fail(format!("Tracked: {e}")),
        }
    }

    /// Another worker serves the file that is copied, if there is a copy that goes on: all counts as written.
    pub fn resume_copy(&mut self, goes_on: bool) -> bool {
        self.copier.take_if(|_| !goes_on);
        let Some(copier) = &mut self.copier else { return false };
        copier.took_over = true;
        copier.answer = None;
        copier.refused = false;
        self.cover.hit("a copy goes on under another worker");
        true
    }

    fn copy_next(&mut self) -> bool {
        let (top, spc) = (self.shape.top(), self.shape.spc);
        let Some(copier) = &mut self.copier else { return false };
        let Some(cluster) = copier.queue.pop_front() else { return false };
        let file = &self.chain.files[top];
        for s in (u64::from(cluster) * spc..(u64::from(cluster) + 1) * spc).filter(|s| *s < file.len()) {
            if copier.copy.len() as u64 <= s {
                copier.copy.resize(s as usize + 1, 0);
            }
            copier.copy[s as usize] = file.read(s);
        }
        true
    }

    /// Nothing is in flight, all entries are durable: the copier comes to its end, and has what the file has.
    pub fn finish_copy(&mut self) {
        if self.copier.is_none() || self.failed {
            return;
        }
        loop {
            while self.copy_next() {}
            self.order(TrackControl::Take { from: 0, to: u32::MAX, most: 7 });
            match &self.copier {
                _ if self.engine.is_none() => return,
                Some(copier) if copier.queue.is_empty() => break,
                Some(_) => {}
                None => return,
            }
        }
        self.check_copy();
        let took_over = self.copier.as_ref().is_some_and(|c| c.took_over);
        self.cover.hit(if took_over { "a copy equals the file after a kill" } else { "a copy equals the file" });
        if self.rng.coin() {
            self.say(|_| "Track End".into());
            self.feed(Event::Track(TrackControl::End));
            self.copier = None;
        }
    }

    fn check_copy(&self) {
        let (top, spc) = (self.shape.top(), self.shape.spc);
        let Some(copier) = &self.copier else { return };
        let file = &self.chain.files[top];
        let mut wanted: Vec<u64> = match self.shape.raw_top() {
            true => (0..file.len().div_ceil(spc)).collect(),
            false => self.chain.host_clusters(&self.shape, top).iter().map(|(_, at)| u64::from(*at)).collect(),
        };
        if !self.shape.raw_top() {
            wanted.extend(0..u64::from(self.shape.levels[top].first_data));
        }
        for cluster in wanted {
            for s in (cluster * spc..(cluster + 1) * spc).filter(|s| *s < file.len()) {
                let (copied, there) = (copier.copy.get(s as usize).copied(), file.read(s));
                if copied != Some(there) {
                    let copied = copied.map_or("nothing".into(), |v| self.name(v));
                    self.fail(format!(
                        "sector {s} of the file, in its cluster {cluster}, is {}; copied: {copied}",
                        self.name(there)
                    ));
                }
            }
        }
    }
}

/// What must have happened to copies in a set of runs.
pub const WANTED: &[&str] = &[
    "a copy begun",
    "a copy refused",
    "a copy goes on under another worker",
    "a copy equals the file",
    "a copy equals the file after a kill",
];

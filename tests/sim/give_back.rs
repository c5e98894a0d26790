//! Space of the top that is given back while the device runs: when it begins, what a cut may take, how it ends.

use crate::background::{Kind, Session, level_of};
use crate::engine::api::*;
use crate::world::{Flight, World};

const BUSY: Errno = 16;

impl World {
    /// Space is to be given back from now on, if nothing else is done in the background.
    pub fn begin_give_back(&mut self) {
        let works = self.engine.as_ref().is_some_and(|e| e.works_in_background());
        let allowed = self.settings.writable && !self.shape.raw_top() && !self.closing && !self.failed;
        if !works || !allowed {
            return;
        }
        let free = self.copier.is_none()
            && self.background.as_ref().is_none_or(|s| s.kind == Kind::GiveBack && s.told.is_some());
        let config =
            GiveBackConfig { per_tick: self.rng.pick(&[0, 0, 1, 3]), per_busy_tick: self.rng.pick(&[0, 0, 2]) };
        self.say(|_| format!("{config:?}"));
        if free {
            self.cover.hit("space is to be given back");
            let (kind, level, faults) = (Kind::GiveBack, self.shape.top(), self.faults);
            self.background =
                Some(Session { kind, level, told: None, faults, cancelled: false, paused: false, shares: false });
        } else {
            self.refused_next = true;
        }
        self.feed(Event::GiveBack(config));
        self.refused_next = false;
    }

    /// The engine said GaveBack.
    pub fn gave_back(&mut self, result: Result<GivenBack, Errno>) {
        if std::mem::take(&mut self.refused_next) {
            self.fail_unless(result == Err(BUSY), || format!("work is under way, and giving back: {result:?}"));
            self.cover.hit("giving space back refused");
            return;
        }
        self.fail_unless(self.background.as_ref().is_some_and(|s| s.kind == Kind::GiveBack), || {
            "GaveBack, and nothing was to be given back".into()
        });
        if let Ok(given) = result {
            let file = self.chain.files[self.shape.top()].len() * 512;
            self.cover.hit_if(given.moved > 0, "clusters moved to give space back");
            self.fail_unless(given.after == file, || format!("{given:?}, the file has {file} bytes"));
        }
        self.background_done(result.map(drop));
    }

    /// The file is being cut to so many sectors: what neither memory nor a power cut, now or later, can name, and what
    /// nothing is in flight on.
    pub fn check_cut(&mut self, level: usize, len: u64) {
        if level != self.shape.top() || self.shape.raw_top() || !self.settings.writable {
            self.fail(format!("level {level} is cut"));
        }
        let first = (len / self.shape.spc) as u32;
        if !len.is_multiple_of(self.shape.spc) || first < self.shape.levels[level].first_data {
            self.fail(format!("the file is cut to {len} sectors"));
        }
        if let Some((host_cluster, clusters)) = self.owners().iter().filter(|(p, _)| **p >= first).min() {
            let text = format!("cut to {first} host clusters: clusters {clusters:?} may be at {host_cluster}");
            self.fail(text);
        }
        if let Some(slot) = self.table.used().iter().find(|(_, _, p)| *p >= first) {
            self.fail(format!("cut to {first} host clusters: entry {slot:?} is in the shared table"));
        }
        let beyond = |f: &&Flight| level_of(&f.act, level) == level && f.first + f.landed.len() as u64 > len;
        let data = |f: &&Flight| !matches!(f.act, Action::ReadBat { .. } | Action::Sync { .. });
        if let Some(f) = self.flights.iter().filter(data).find(beyond) {
            self.fail(format!("cut to {len} sectors while {:?} is in flight", f.act));
        }
    }

    /// The file of the top grows by these sectors: those of them that it has, after a cut or a growing that failed, are zero.
    pub fn check_growth(&self, first: u64, count: u64) {
        let file = &self.chain.files[self.shape.top()];
        if let Some(sector) = (first..file.len().min(first + count)).find(|s| file.read(*s) != 0) {
            self.fail(format!("the file grows over its sector {sector}, which is not zero"));
        }
    }

    /// No cluster of the top moves while a read of it is in flight: what it leaves is free soon.
    pub fn check_reads_in_flight(&self) {
        let (top, spc) = (self.shape.top(), self.shape.spc);
        let used = self.table.used();
        for f in &self.flights {
            let Action::Read { level, to: Buf::Request { req, off }, .. } = f.act else { continue };
            let Some(Some(r)) = self.reqs.get(req.0 as usize) else { continue };
            if usize::from(level) != top || self.shape.raw_top() {
                continue;
            }
            let (host, virt) = (f.first / spc, (r.what.offset + off) / 512 / spc);
            let clusters = (f.first + f.landed.len() as u64).div_ceil(spc) - host;
            for i in 0..clusters {
                let (cluster, at) = ((virt + i) as u32, (host + i) as u32);
                if let Some((_, _, now)) = used.iter().find(|(_, c, p)| *c == cluster && *p != at) {
                    self.fail(format!("cluster {cluster} goes from {at} to {now} while it is read"));
                }
            }
        }
    }
}

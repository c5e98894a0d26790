//! Death and what follows: kills, power cuts, takeovers and openings that may be interrupted themselves, clean closes.

use crate::engine::api::*;

use crate::background::level_of;
use crate::broken::Break;
use crate::disk::Stamp;
use crate::table::Table;
use crate::world::World;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outage {
    /// The worker died: a successor takes over.
    Kill,
    /// The host died.
    Power,
    /// The image was closed, or is new.
    Fresh,
}

pub fn changes(act: &Action) -> bool {
    use Action::{Clone, Fallocate, Truncate, Write, WriteBat, ZeroRange};
    matches!(act, Write { .. } | Clone { .. } | WriteBat { .. } | ZeroRange { .. } | Fallocate { .. } | Truncate { .. })
}

pub const ENOSPC: Errno = 28;
pub const EDQUOT: Errno = 122;

pub fn lacks_space(e: Errno) -> bool {
    e == ENOSPC || e == EDQUOT
}

impl World {
    fn cover_kill(&mut self) {
        let flush = self.reqs.iter().flatten().any(|r| r.sent && r.what.kind == RequestKind::Flush);
        let has = |w: &World, f: fn(&Action) -> bool| w.flights.iter().any(|x| f(&x.act));
        let sync = has(self, |a| matches!(a, Action::Sync { .. }));
        let bat = has(self, |a| matches!(a, Action::WriteBat { .. }));
        let copying = self.flights.iter().any(|f| self.copied_cluster(f).is_some());
        let waiting = self.no_space && self.engine.as_ref().is_some_and(|e| e.status().no_space);
        self.cover.hit("kill");
        self.cover_background_kill();
        self.cover.hit_if(flush, "kill during flush");
        self.cover.hit_if(sync, "kill with a sync in flight");
        self.cover.hit_if(bat, "kill with a BAT write in flight");
        self.cover.hit_if(copying, "kill during copy-up");
        self.cover.hit_if(self.closing, "kill during close");
        self.cover.hit_if(waiting, "kill while waiting for space");
    }

    /// The worker dies. What it had in flight lands before its successor starts, wholly, in part or not at all.
    pub fn kill(&mut self) {
        self.say(|_| "KILL".into());
        self.cover_kill();
        self.engine = None;
        self.closed = None;
        if self.closing {
            self.closing = false;
            self.want_close = true;
        }
        self.pages_read.clear();
        let top = self.shape.top();
        while !self.flights.is_empty() {
            let at = self.rng.index(self.flights.len());
            if self.broken == Break::NoBarrier && changes(&self.flights[at].act) {
                self.leave_ghosts(at);
                self.flights.swap_remove(at);
                continue;
            }
            let fate = self.rng.below(3);
            if changes(&self.flights[at].act) {
                match fate {
                    0 => {}
                    1 => self.land_some(at),
                    _ => (0..self.flights[at].landed.len()).for_each(|i| self.land(at, i)),
                }
            }
            let f = self.flights.swap_remove(at);
            let level = level_of(&f.act, top);
            self.say(|_| format!("late: op {} {:?}", f.op.0, f.landed.iter().filter(|l| **l).count()));
            match &f.act {
                Action::Fallocate { file_off, len, .. } if fate == 2 => {
                    self.chain.files[level].extend((file_off + len) / 512, f.serial);
                }
                Action::Truncate { len, .. } => {
                    self.cover.hit("kill with a cut in flight");
                    if fate == 2 {
                        self.chain.files[level].truncate(len / 512, f.serial);
                    }
                }
                Action::Sync { .. } => self.late_sync(level, f.issued),
                act if changes(act) => {
                    let n = f.landed.iter().filter(|l| **l).count();
                    let all = f.landed.len();
                    self.cover.hit(if n == all {
                        "late write landed"
                    } else if n > 0 {
                        "late write torn"
                    } else {
                        "late write lost"
                    });
                }
                _ => {}
            }
            self.now += 1;
            let file = &mut self.chain.files[level];
            if changes(&f.act) {
                let all = match f.act {
                    Action::Fallocate { .. } => 0..file.len(),
                    _ => f.first..f.first + f.landed.len() as u64,
                };
                file.finished(all, f.serial, self.now);
            }
        }
        for r in self.reqs.iter_mut().flatten() {
            r.sent = false;
            if r.what.kind == RequestKind::Read {
                r.buf.fill(crate::disk::POISON | 0xb0f);
            }
        }
        self.owners = None;
    }

    /// A sync that the dead worker had issued: nobody was told how it ended.
    fn late_sync(&mut self, level: usize, issued: u64) {
        match self.rng.below(3) {
            0 => {}
            1 if level != self.shape.top() || self.settings.sync_error > 0 && self.rng.below(3) == 0 => {
                self.say(|_| "the sync in flight fails".into());
                self.chain.files[level].sync_failed(issued, &mut self.rng);
                self.faults += 1;
                if level == self.shape.top() {
                    self.write_back_errors += 1;
                }
            }
            _ => self.chain.files[level].synced(issued),
        }
    }

    fn leave_ghosts(&mut self, at: usize) {
        if level_of(&self.flights[at].act, self.shape.top()) != self.shape.top() {
            return;
        }
        for i in 0..self.flights[at].landed.len() {
            if !self.flights[at].landed[i] {
                let value: Stamp = self.source(&self.flights[at].act, i);
                self.ghosts.push((self.flights[at].first + i as u64, value));
            }
        }
    }

    /// With a broken barrier, writes of dead workers land now.
    pub fn haunt(&mut self) {
        if self.ghosts.is_empty() || self.rng.below(30) != 0 {
            return;
        }
        let top = self.shape.top();
        for (sector, value) in std::mem::take(&mut self.ghosts) {
            if sector < self.chain.files[top].len() {
                self.serial += 1;
                self.chain.files[top].land(sector, value, self.serial);
                self.chain.files[top].finished(sector..sector + 1, self.serial, self.now);
            }
        }
        self.owners = None;
    }

    fn cover_power_cut(&mut self) {
        let has = |w: &World, f: fn(&Action) -> bool| w.flights.iter().any(|x| f(&x.act));
        let sync = has(self, |a| matches!(a, Action::Sync { .. }));
        let bat = has(self, |a| matches!(a, Action::WriteBat { .. }));
        let copying = self.flights.iter().any(|f| self.copied_cluster(f).is_some());
        let bat_moved = !self.shape.raw_top() && {
            let clusters = self.shape.levels[self.shape.top()].clusters;
            let mut stamps = Vec::new();
            (0..=crate::image::bat_sector(clusters - 1)).any(|s| {
                stamps.clear();
                self.chain.files[self.shape.top()].possible(s, &mut stamps);
                stamps.len() > 1
            })
        };
        self.cover.hit("power cut");
        self.cover.hit_if(copying, "power cut during copy-up");
        self.cover.hit_if(sync && !bat_moved, "power cut with a data sync in flight");
        self.cover.hit_if(bat, "power cut between data sync and BAT write");
        self.cover.hit_if(sync && bat_moved, "power cut between BAT write and its sync");
        self.cover.hit_if(self.failed, "power cut on a failed device");
        self.cover.hit_if(self.outstanding() > 0, "request dropped by a power cut");
    }

    /// The host dies: requests, memory and all that is not stable are gone.
    pub fn power_cut(&mut self) {
        self.say(|_| "POWER CUT".into());
        self.cover_power_cut();
        let clusters: Vec<u32> = self.touched.iter().chain(&self.shape.hot).copied().collect();
        for c in &clusters {
            self.check_power(*c, "power cut now");
        }
        let mut torn = false;
        while let Some(at) = self.flights.len().checked_sub(1) {
            if changes(&self.flights[at].act) && self.rng.coin() {
                self.land_some(at);
            }
            let f = self.flights.remove(at);
            let landed = f.landed.iter().filter(|l| **l).count();
            torn |= matches!(f.act, Action::WriteBat { .. }) && landed > 0 && landed < f.landed.len();
            match &f.act {
                Action::Fallocate { file_off, len, level, .. } if self.rng.coin() => {
                    self.chain.files[usize::from(*level)].extend((file_off + len) / 512, f.serial);
                }
                Action::Truncate { len, level, .. } => {
                    self.cover.hit("power cut with a cut in flight");
                    if self.rng.coin() {
                        self.chain.files[usize::from(*level)].truncate(len / 512, f.serial);
                    }
                }
                _ => {}
            }
        }
        self.cover.hit_if(torn, "torn BAT page after a power cut");
        self.chain.files.iter_mut().for_each(|f| f.power_cut(&mut self.rng));
        let working = self.background.take().is_some();
        self.cover.hit_if(working, "power cut during background work");
        self.engine = None;
        self.closed = None;
        self.closing = false;
        self.want_close = false;
        self.failed = false;
        self.write_back_errors = 0;
        self.witness_saw = 0;
        self.ghosts.clear();
        self.owners = None;
        self.pages_read.clear();
        self.now += 1;
        for r in self.reqs.iter_mut().filter_map(Option::take) {
            if r.what.kind == RequestKind::Write || r.what.kind == RequestKind::Zero {
                for s in r.what.offset / 512..(r.what.offset + r.what.len) / 512 {
                    self.oracle.write_ends(s, r.serial, self.now, false);
                }
            }
        }
        self.now += 1;
        let horizon = self.oracle.flushed;
        self.settle(horizon, "after the power cut", self.now);
    }

    /// The recovery itself may be interrupted. True: begin again.
    pub fn interrupted(&mut self, outage: &mut Outage) -> bool {
        if self.settings.kill > 0 && self.rng.below(16) == 0 {
            self.cover.hit_if(*outage == Outage::Kill, "takeover interrupted by a kill");
            return true;
        }
        if self.settings.power > 0 && self.rng.below(24) == 0 {
            self.cover.hit_if(*outage == Outage::Kill, "takeover interrupted by a power cut");
            self.cover.hit_if(*outage == Outage::Power, "crash during recovery");
            self.power_cut();
            *outage = Outage::Power;
            return true;
        }
        false
    }

    /// Opens the chain by the documented rules and starts an engine on it.
    pub fn recover(&mut self, outage: Outage) {
        let mut outage = outage;
        while !self.try_open(&mut outage) {
            self.now += 1;
        }
    }

    fn try_open(&mut self, outage: &mut Outage) -> bool {
        self.say(|_| format!("open: {outage:?}"));
        let top = self.shape.top();
        let takeover = *outage == Outage::Kill;
        let writable = self.settings.writable;
        let image = !self.shape.raw_top();
        if !takeover {
            let forget = if self.broken == Break::ForgetStore { 5 } else { 0 };
            self.table = Table::new(self.settings.slots, forget);
            self.failed = false;
            self.bat_read_error = false;
        }
        if self.interrupted(outage) {
            return false;
        }
        // Sync first, through the witness, which reports each failure of write-back that it has not reported yet.
        self.now += 1;
        if writable && takeover && self.settings.sync_error > 0 && self.rng.below(12) == 0 {
            self.chain.files[top].sync_failed(self.now, &mut self.rng);
            self.write_back_errors += 1;
            self.faults += 1;
        } else if writable {
            self.chain.files[top].synced(self.now);
        }
        self.owners = None;
        let witness = self.write_back_errors > self.witness_saw;
        self.witness_saw = self.write_back_errors;
        let known = self.table.sync_state() == SyncState::Failed;
        if takeover && (witness || known) {
            self.cover.hit_if(!known, "takeover finds a failed sync");
            self.cover.hit_if(known, "takeover of a failed device");
            self.failed = true;
            // The answer of the witness is recorded before anything else can kill this worker.
            self.table.force_state(SyncState::Failed);
        }
        let mut failed = self.failed;
        if self.broken == Break::ForgetFailure && takeover {
            failed = false;
            self.table.force_state(SyncState::Idle);
        }
        if self.interrupted(outage) {
            return false;
        }
        let (carried, alloc) = if image { self.scan(takeover) } else { (Vec::new(), AllocConfig::default()) };
        if image && writable && (!failed || self.broken == Break::TrustBatAfterFailure) {
            let end = u64::from(alloc.end) * self.shape.spc;
            self.cover.hit_if(self.chain.files[top].len() > end, "tail cut at open");
            self.serial += 1;
            self.chain.files[top].truncate(end, self.serial);
            self.now += 1;
            self.chain.files[top].finished(0..0, self.serial, self.now);
            if self.interrupted(outage) {
                return false;
            }
        }
        if image && writable && !takeover && self.mark(true, outage) {
            return false;
        }
        self.start_engine(carried, alloc, failed, takeover);
        self.took_over = takeover;
        self.was_waiting = false;
        true
    }

    /// Sets or clears the in-use mark, durably. True: interrupted.
    pub fn mark(&mut self, in_use: bool, outage: &mut Outage) -> bool {
        let top = self.shape.top();
        let value = self.chain.marked(top, in_use);
        self.now += 1;
        self.chain.files[top].synced(self.now);
        self.serial += 1;
        self.chain.files[top].land(0, value, self.serial);
        self.owners = None;
        self.now += 1;
        self.chain.files[top].finished(0..1, self.serial, self.now);
        if self.interrupted(outage) {
            return true;
        }
        self.now += 1;
        if self.broken != Break::UnsyncedMark {
            self.chain.files[top].synced(self.now);
        }
        self.owners = None;
        false
    }

    /// BAT on disk, overlaid with the shared table; both values count as used.
    fn scan(&mut self, takeover: bool) -> (Vec<Carried>, AllocConfig) {
        let top = self.shape.top();
        let disk = self.chain.host_clusters(&self.shape, top);
        let mut used: Vec<u32> = disk.iter().map(|(_, p)| *p).collect();
        let mut carried = Vec::new();
        if takeover && self.broken != Break::LoseCarried {
            for (slot, cluster, host_cluster) in self.table.used() {
                let durable = disk.iter().find(|(c, _)| *c == cluster).map_or(0, |(_, p)| *p);
                if self.broken == Break::ReuseTooEarly && host_cluster != durable {
                    used.retain(|p| *p != durable);
                }
                if host_cluster != 0 {
                    used.push(host_cluster);
                }
                carried.push(Carried { slot, cluster, host_cluster, durable });
                self.cover.hit_if(host_cluster == 0, "takeover with a carried free entry");
            }
            self.cover.hit_if(!carried.is_empty(), "takeover with carried entries");
        }
        used.sort_unstable();
        used.dedup();
        if self.broken == Break::UsedAsFree && used.len() > 3 {
            used.remove(1);
        }
        let first = self.shape.levels[top].first_data;
        let end = used.last().map_or(first, |p| p + 1);
        let mut free: Vec<std::ops::Range<u32>> = Vec::new();
        let mut next = first;
        for p in used {
            if p > next {
                free.push(next..p);
            }
            next = p + 1;
        }
        // After a failed sync the BAT that is read is not known to be the durable one: what it does not name may be
        // named by that one.
        let doubt = self.failed && self.broken != Break::TrustBatAfterFailure;
        let end = if doubt { end.max(self.chain.files[top].len().div_ceil(self.shape.spc) as u32) } else { end };
        let free = if doubt { Vec::new() } else { free };
        let limit = if self.shape.v1 { ((1u64 << 32) / self.shape.spc) as u32 } else { u32::MAX };
        let limit = self.settings.growth.map_or(limit, |n| limit.min(end + n));
        (carried, AllocConfig { end, free, ahead: self.settings.ahead, limit })
    }

    fn start_engine(&mut self, carried: Vec<Carried>, alloc: AllocConfig, failed: bool, takeover: bool) {
        let top = self.shape.top();
        let s = &self.settings;
        self.header = if self.shape.raw_top() { [0; 64] } else { self.chain.header(top) };
        self.bounces = vec![vec![crate::disk::POISON | 0xb00; s.bounce_bytes as usize / 512]; usize::from(s.bounces)];
        let background = if failed { None } else { self.begin_background(takeover) };
        if background.is_none() {
            self.background = None;
        }
        let paused = self.background.as_ref().is_some_and(|s| s.paused);
        let s = &self.settings;
        let config = Config {
            cluster_shift: self.shape.shift,
            device_bytes: self.shape.sectors * 512,
            levels: self.shape.level_configs(&self.chain.files),
            writable: s.writable,
            header: self.header,
            alloc,
            bounces: s.bounces,
            bounce_bytes: s.bounce_bytes,
            map_pages: s.map_pages,
            bat_age: s.bat_age,
            failed,
            background,
        };
        self.limit = config.alloc.limit;
        self.say(|_| format!("engine starts: {:?}, carried {carried:?}, failed {failed}", config.alloc));
        self.table.begin_step();
        self.idle_ticks = 0;
        self.wait_for_space = true;
        self.ages.clear();
        self.unwritten.clear();
        self.unwritten_at_sync.clear();
        let mut engine = (self.maker)(config, carried, self.table.clone());
        self.background.take_if(|_| !engine.works_in_background());
        let mut actions = Vec::new();
        if paused {
            engine.step(Event::Background(BackgroundControl::Pause), &mut actions);
        }
        if self.resume_copy(takeover && !failed) {
            engine.step(Event::Track(TrackControl::Begin { all: true }), &mut actions);
        }
        self.engine = Some(engine);
        for action in actions {
            self.now += 1;
            self.act(action);
        }
    }
}

//! Requests: made, sent, answered; and the scheduler that decides what happens next.

use crate::engine::api::*;

use crate::disk::{POISON, SECTOR};
use crate::image::stamp;
use crate::recover::Outage;
use crate::world::{Req, World};

impl World {
    fn random_range(&mut self, kind: RequestKind) -> (u64, u64) {
        let spc = self.shape.spc;
        let hot = self.shape.hot.clone();
        let few = &hot[..hot.len().min(4)];
        let cluster = u64::from(if self.rng.coin() { self.rng.pick(few) } else { self.rng.pick(&hot) });
        let start = cluster * spc;
        let hot_spot = self.rng.pick(&[0, 1, 7, 8, spc / 2, spc - 1]);
        let (at, len) = match self.rng.below(10) {
            0..=2 => (start + hot_spot, 1),
            3 => (start + self.rng.below(spc), self.rng.between(1, 16)),
            4 => (start + hot_spot, self.rng.between(1, spc)),
            5 | 6 => (start, spc),
            7 => (start, spc * self.rng.between(1, 3)),
            8 => (start + self.rng.below(spc), self.rng.between(1, 3 * spc)),
            _ if kind == RequestKind::Zero && self.rng.below(16) == 0 => (start, 100 * spc),
            _ => (start + self.rng.below(8), 8),
        };
        let at = at.min(self.shape.sectors - 1);
        (at, len.min(self.shape.sectors - at))
    }

    /// A new request arrives (it is sent to the engine later, or at once).
    pub fn arrive(&mut self) {
        let Some(id) = self.reqs.iter().position(Option::is_none) else { return };
        use RequestKind::{Flush, Read, Write, Zero};
        let kind = [Read, Write, Zero, Flush][self.rng.weighted(&self.settings.kinds)];
        let (at, count) = if kind == Flush { (0, 0) } else { self.random_range(kind) };
        self.now += 1;
        self.serial += 1;
        self.issued += 1;
        let what = Request { id: ReqId(id as u32), kind, offset: at * SECTOR, len: count * SECTOR };
        let (serial, start, writable) = (self.serial, self.now, self.settings.writable);
        let buf = (at..at + count).map(|s| if kind == Write { stamp(serial, s) } else { POISON | 0xb0f }).collect();
        self.say(|_| format!("arrives as write {serial}: {what:?} (sectors {at}+{count})"));
        self.cover_arrival(&what, at, count);
        if matches!(kind, Write | Zero) && writable {
            let oldest = self.reqs.iter().flatten().map(|r| r.start).min().unwrap_or(start);
            for s in at..at + count {
                let value = if kind == Write { stamp(serial, s) } else { 0 };
                self.touch(s);
                self.oracle.write_begins(s, value, serial, start, oldest);
            }
        }
        // It may come to wait for a page whose reading has failed in part already.
        let reading =
            |p: &u32| self.flights.iter().any(|f| matches!(f.act, Action::ReadBat { page, .. } if page == *p));
        self.bad_pages.retain(reading);
        let faults = if self.bad_pages.is_empty() { self.faults } else { self.faults - 1 };
        self.reqs[id] = Some(Req {
            what,
            buf,
            start,
            serial,
            faults,
            sent: false,
            refusable: !self.wait_for_space,
            starved: self.no_space || self.was_waiting,
        });
    }

    fn touch(&mut self, sector: u64) {
        if !self.oracle.is_touched(sector) {
            let value = self.origin.1.read(&self.origin.0, sector, false);
            self.oracle.begin_with(sector, value);
        }
        self.touched.insert((sector / self.shape.spc) as u32);
    }

    fn cover_arrival(&mut self, what: &Request, at: u64, count: u64) {
        use RequestKind::{Flush, Read, Write, Zero};
        let syncing = self.flights.iter().any(|f| matches!(f.act, Action::Sync { .. }));
        if what.kind == Flush {
            self.cover.hit_if(syncing, "flush arrives during a sync");
            self.flushes_since_bat += 1;
            return;
        }
        let spc = self.shape.spc;
        let (first, last) = ((at / spc) as u32, ((at + count - 1) / spc) as u32);
        self.cover.hit_if(last > first, "request over several clusters");
        self.cover.hit_if((last + 16) / 1024 > (first + 16) / 1024, "request over several pages");
        let copied = self.flights.iter().any(|f| self.copied_cluster(f).is_some_and(|c| (first..=last).contains(&c)));
        self.cover.hit_if(copied && what.kind == Read, "read of a cluster being copied up");
        self.cover.hit_if(copied && what.kind == Write, "write to a cluster being copied up");
        self.cover.hit_if(copied && what.kind == Zero, "zero on a cluster being copied up");
        let mut hits = Vec::new();
        for r in self.reqs.iter().flatten().filter(|r| r.sent && r.what.len > 0) {
            let (a, b) = (r.what.offset / SECTOR, (r.what.offset + r.what.len) / SECTOR);
            let same_cluster = a / spc <= u64::from(last) && (b - 1) / spc >= u64::from(first);
            let same_sector = a < at + count && at < b;
            match (r.what.kind, what.kind) {
                (Write, Zero) if same_cluster => hits.push("zero while writes in flight on the cluster"),
                (Zero, Write) if same_cluster => hits.push("write while zero in flight on the cluster"),
                (Write, Read) if same_sector => hits.push("read while writes in flight on the sector"),
                (Write, Write) if same_sector => hits.push("two writes in flight on one sector"),
                _ => {}
            }
        }
        for h in hits {
            self.cover.hit(h);
        }
        if what.kind == Write && self.settings.writable && !self.shape.raw_top() {
            let owned = self.owners().values().any(|l| l.contains(&first));
            let slot = self.table.used().iter().any(|(_, c, _)| *c == first);
            let busy = self
                .reqs
                .iter()
                .flatten()
                .any(|r| r.what.kind == Write && r.what.offset / SECTOR / spc == u64::from(first));
            self.cover.hit_if(!owned && !slot && busy, "write to a cluster being allocated");
        }
    }

    /// A request that the running engine does not know yet is sent to it.
    fn send(&mut self) {
        let waiting: Vec<usize> =
            (0..self.reqs.len()).filter(|i| self.reqs[*i].as_ref().is_some_and(|r| !r.sent)).collect();
        let id = waiting[self.rng.index(waiting.len())];
        let Some(r) = self.reqs[id].as_mut() else { return };
        r.sent = true;
        let what = r.what;
        self.say(|_| format!("sent {what:?}"));
        self.feed(Event::Request(what));
    }

    /// The engine answers.
    pub fn reply(&mut self, id: ReqId, result: Result<(), Errno>) {
        let Some(r) = self.reqs.get_mut(id.0 as usize).and_then(Option::take) else {
            self.fail(format!("{id:?} is answered twice"));
        };
        if !r.sent {
            self.fail(format!("{id:?} is answered before it was asked"));
        }
        for f in &self.flights {
            let (Action::Read { to: buf, .. } | Action::Write { from: buf, .. }) = f.act else { continue };
            if matches!(buf, Buf::Request { req, .. } if req == id) {
                self.fail(format!("{:?} is answered while {:?} is in flight", r.what, f.act));
            }
        }
        if let Err(e) = result {
            self.check_error(&r, e);
        } else if r.what.kind != RequestKind::Read && !self.settings.writable && r.what.kind != RequestKind::Flush {
            self.fail(format!("{:?} answered well by a read-only device", r.what));
        }
        let sectors = r.what.offset / SECTOR..(r.what.offset + r.what.len) / SECTOR;
        match r.what.kind {
            RequestKind::Read => {
                self.cover.hit_if(self.no_space_wait(), "read answered while waiting for space");
                if result.is_ok() {
                    for (s, v) in sectors.zip(&r.buf) {
                        self.must_admit(s, *v, r.start, "read");
                        self.oracle.read_saw(s, *v, r.start, self.now);
                    }
                }
            }
            RequestKind::Write | RequestKind::Zero if self.settings.writable => {
                for s in sectors.clone() {
                    self.oracle.write_ends(s, r.serial, self.now, result.is_ok());
                }
                self.now += 1;
                if result.is_ok() {
                    self.check_range_takeover(sectors);
                }
            }
            RequestKind::Flush if result.is_ok() => {
                self.cover.hit_if(self.no_space_wait(), "flush answered while waiting for space");
                if self.failed {
                    self.fail("a flush is answered well after a sync or BAT write has failed");
                }
                self.oracle.flushed = self.oracle.flushed.max(r.start);
                self.check_after_flush();
            }
            _ => {}
        }
    }

    fn no_space_wait(&self) -> bool {
        self.no_space && self.engine.as_ref().is_some_and(|e| e.status().no_space)
    }

    fn check_error(&mut self, r: &Req, e: Errno) {
        let changes = matches!(r.what.kind, RequestKind::Write | RequestKind::Zero);
        if changes && !self.settings.writable {
            return;
        }
        if r.what.kind == RequestKind::Flush && self.failed {
            self.cover.hit("flush refused");
            self.cover.hit_if(self.took_over, "flush refused after takeover");
            return;
        }
        if changes && e == 27 && self.settings.growth.is_some() {
            self.cover.hit("change refused: the file cannot grow");
            return;
        }
        let clusters = |r: &Req| (r.what.len >> self.shape.shift) as usize + 2;
        let wanted = self.reqs.iter().flatten().map(clusters).sum::<usize>() + clusters(r);
        if changes && self.failed && self.table.used().len() + wanted >= self.settings.slots {
            // Slots are never freed again; those still free may be reserved for changes under way.
            self.cover.hit("change refused: table full on a failed device");
            return;
        }
        let behind = r.what.kind == RequestKind::Zero && r.starved;
        if e == 28 && behind {
            self.cover.hit("zero refused for want of space");
            return;
        }
        if e == 122 {
            self.fail(format!("{:?} is answered with EDQUOT", r.what));
        }
        if r.faults == self.faults {
            self.fail(format!("{:?} is answered with error {e}, and nothing had failed", r.what));
        }
        // A stop ends the wait for space.
        self.cover.hit_if(e == 28 && r.refusable, "write refused while being stopped");
        if e == 28 && r.what.kind != RequestKind::Zero && !self.closing && !r.refusable {
            self.fail(format!("{:?} is answered with ENOSPC instead of waiting", r.what));
        }
    }

    /// A change was answered: killed now, the worker must not have lost it.
    fn check_range_takeover(&mut self, sectors: std::ops::Range<u64>) {
        let spc = self.shape.spc;
        let (first, last) = (sectors.start / spc, (sectors.end - 1) / spc);
        for c in (first..=last).take(8) {
            let part = (c * spc).max(sectors.start)..((c + 1) * spc).min(sectors.end);
            self.check_takeover(c as u32, part, "answered, then killed");
        }
    }

    fn check_after_flush(&mut self) {
        let touched: Vec<u32> = self.touched.iter().copied().collect();
        let many = touched.len() > 100;
        for c in touched {
            if !many || self.rng.below(8) == 0 {
                self.check_power(c, "flushed, then a power cut");
            }
        }
        // Those that requests in flight may still change stay of interest.
        let mut still = std::mem::take(&mut self.touched);
        let ranges: Vec<(u64, u64)> = (self.reqs.iter().flatten())
            .filter(|r| matches!(r.what.kind, RequestKind::Write | RequestKind::Zero))
            .map(|r| {
                (r.what.offset / SECTOR / self.shape.spc, (r.what.offset + r.what.len - 1) / SECTOR / self.shape.spc)
            })
            .collect();
        still.retain(|c| {
            let c = u64::from(*c);
            ranges.iter().any(|(a, b)| (*a..=*b).contains(&c))
        });
        self.touched = still;
    }

    /// Runs to the end: at least the agreed number of requests, then a clean close and a look at what is left.
    pub fn run(&mut self) {
        self.recover(Outage::Fresh);
        let mut pace = [60, 20, 25];
        let mut steps = 0u64;
        loop {
            steps += 1;
            if steps > 400_000 {
                self.fail("the run does not come to an end");
            }
            if steps.is_multiple_of(100) {
                pace = self.rng.pick(&[[60, 20, 25], [20, 10, 80], [90, 5, 5], [10, 40, 50]]);
            }
            if self.engine.is_none() {
                self.recover(Outage::Kill);
            }
            if let Some(result) = self.closed {
                self.after_close(result);
                if self.issued >= self.settings.operations {
                    return;
                }
                self.cover.hit("second session in one run");
                self.recover(Outage::Fresh);
                continue;
            }
            if self.accident() {
                continue;
            }
            self.one_event(pace);
        }
    }

    fn accident(&mut self) -> bool {
        let s = &self.settings;
        let control = if self.background.as_ref().is_some_and(|b| b.told.is_none()) { s.control } else { 0 };
        let give = if s.background > 0 { s.give_back } else { 0 };
        // Merges exclude copies, and would seldom be seen where one copy follows the other.
        let copy = match (&self.copier, s.background > 0) {
            (Some(_), _) => 4000,
            (None, true) => s.copy / 8,
            (None, false) => s.copy,
        };
        let rates = [s.kill, s.power, s.close, s.no_space, 30, s.no_space / 2, control, give, copy];
        let mut at = self.rng.below(100_000);
        for (i, rate) in rates.iter().enumerate() {
            if at < u64::from(*rate) {
                match i {
                    0 => self.kill(),
                    1 => {
                        self.power_cut();
                        self.recover(Outage::Power);
                    }
                    2 => self.want_close = true,
                    3 => {
                        self.no_space = !self.no_space;
                        self.idle_ticks = 0;
                        self.reqs.iter_mut().flatten().for_each(|r| r.starved |= self.no_space);
                        self.say(|w| format!("no space: {}", w.no_space));
                        self.quiet |= self.no_space && self.rng.coin();
                        self.cover.hit(if self.no_space { "period without space" } else { "space came back" });
                    }
                    4 => self.quiet = true,
                    6 if self.engine.is_some() => self.control_background(),
                    7 if self.engine.is_some() => self.begin_give_back(),
                    8 if self.engine.is_some() => self.copy_some(),
                    5 if self.engine.is_some() => {
                        self.wait_for_space = !self.wait_for_space;
                        self.say(|w| format!("WaitForSpace({})", w.wait_for_space));
                        self.reqs.iter_mut().flatten().for_each(|r| r.refusable |= !self.wait_for_space);
                        self.feed(Event::WaitForSpace(self.wait_for_space));
                    }
                    _ => return false,
                }
                return true;
            }
            at -= u64::from(*rate);
        }
        false
    }

    pub fn close(&mut self) {
        self.closing = true;
        self.say(|_| "Close".into());
        self.feed(Event::Close);
    }

    fn one_event(&mut self, pace: [u32; 3]) {
        self.haunt();
        let unsent = self.reqs.iter().flatten().any(|r| !r.sent);
        if self.want_close && !unsent && !self.closing {
            self.close();
            return;
        }
        let more = !self.want_close
            && !self.closing
            && self.issued < self.settings.operations
            && self.reqs.iter().any(Option::is_none);
        let busy = !self.flights.is_empty();
        let weights = [
            if busy { pace[0] } else { 0 },
            if busy { pace[1] } else { 0 },
            if more || unsent { pace[2] } else { 0 },
            1,
        ];
        match self.rng.weighted(&weights) {
            0 => {
                let at =
                    if self.rng.below(4) == 0 { self.flights.len() - 1 } else { self.rng.index(self.flights.len()) };
                // Attempts to get space are no progress.
                if !self.no_space {
                    self.idle_ticks = 0;
                }
                self.complete(at);
            }
            1 => {
                let at = self.rng.index(self.flights.len());
                self.land_some(at);
            }
            2 => {
                self.idle_ticks = 0;
                if !unsent || (more && self.rng.below(4) == 0) {
                    self.arrive();
                } else {
                    self.send();
                }
            }
            _ => self.tick(busy, more || unsent),
        }
    }

    fn tick(&mut self, busy: bool, more: bool) {
        let waited = self.no_space_wait();
        self.cover.hit_if(waited, "wait for space began");
        self.say(|_| "Tick".into());
        self.feed(Event::Tick);
        self.check_age();
        if busy || more || self.engine.is_none() {
            return;
        }
        self.idle_ticks += 1;
        let most = self.settings.bat_age + 6;
        if self.idle_ticks < most {
            return;
        }
        self.quiet = false;
        if self.no_space {
            self.check_held();
            self.cover.hit("nothing but writes waits for space");
            self.no_space = self.issued < self.settings.operations && self.rng.coin();
            self.say(|w| format!("still no space: {}", w.no_space));
            self.idle_ticks = 0;
        } else if self.outstanding() > 0 || (self.closing && self.closed.is_none()) {
            let left: Vec<String> = self.reqs.iter().flatten().map(|r| format!("{:?}", r.what)).collect();
            self.fail(format!(
                "nothing happens any more; not answered: [{}], closing: {}",
                left.join(", "),
                self.closing
            ));
        } else if !self.closing {
            self.check_idle();
            self.finish_copy();
            if self.engine.is_none() {
                return;
            }
            if self.check_background_ends() {
                self.idle_ticks = 0;
                return;
            }
            self.cover.hit("all quiet");
            self.want_close = self.issued >= self.settings.operations;
            self.idle_ticks = 0;
        }
    }

    /// No change stays in memory for long, flushes or not.
    fn check_age(&mut self) {
        if self.no_space || self.failed || self.engine.is_none() {
            self.ages.clear();
            return;
        }
        let used = self.table.used();
        self.ages.retain(|slot, _| used.contains(slot));
        for slot in used {
            let age = self.ages.entry(slot).or_insert(0);
            *age += 1;
            if *age > self.settings.bat_age + 30 {
                let age = *age;
                self.fail(format!(
                    "entry (slot, cluster, host cluster) {slot:?} has not become durable for {age} ticks"
                ));
            }
        }
    }

    /// Without space only writes may wait, and flushes where the BAT or a sync needs space.
    fn check_held(&mut self) {
        if !self.engine.as_ref().is_some_and(|e| e.holds_only_writes()) {
            return;
        }
        let flush_may = self.flush_starved;
        self.cover.hit_if(flush_may, "flush waits for space");
        let may = |kind| kind == RequestKind::Write || kind == RequestKind::Flush && flush_may;
        if let Some(r) = self.reqs.iter().flatten().find(|r| !may(r.what.kind)) {
            self.fail(format!("{:?} waits for space", r.what));
        }
    }

    /// Nothing is in flight and the changes are old: they have been written.
    fn check_idle(&mut self) {
        let Some(engine) = &self.engine else { return };
        let status = engine.status();
        if !self.failed && (status.dirty != 0 || !self.table.used().is_empty()) {
            self.fail(format!(
                "{} changed entries, {} slots in use after {} idle ticks",
                status.dirty,
                self.table.used().len(),
                self.idle_ticks
            ));
        }
    }
}

//! What the engine asks for: checked, started, carried out piece by piece, ended well or badly.

use crate::engine::api::*;

use crate::background::level_of;
use crate::broken::Break;
use crate::disk::{POISON, SECTOR, Stamp};
use crate::image::PAGE_SECTORS;
use crate::recover::{EDQUOT, ENOSPC, changes, lacks_space};
use crate::world::{Flight, World};

const EIO: Errno = 5;
const EOPNOTSUPP: Errno = 95;

impl World {
    pub fn act(&mut self, act: Action) {
        self.say(|_| match &act {
            Action::WriteBat { op, level, page, .. } => {
                format!("  WriteBat {{ op: {}, level: {level}, page: {page} }}", op.0)
            }
            other => format!("  {other:?}"),
        });
        match act {
            Action::Reply { req, result } => {
                self.failed |= self.bat_read_error && self.engine.as_ref().is_some_and(|e| e.status().failed);
                self.reply(req, result);
            }
            Action::ZeroFill { req, off, len } => {
                let range = self.in_buffer(req, off, len, RequestKind::Read);
                self.not_in_flight(Buf::Request { req, off }, len);
                if let Some(r) = self.reqs[req.0 as usize].as_mut() {
                    r.buf[range].fill(0);
                }
            }
            Action::Overlay { bounce, at, from, len } => self.overlay(bounce, at, from, len),
            Action::BackgroundDone { result } => self.background_done(result),
            Action::GaveBack { result } => self.gave_back(result),
            Action::Tracked { result, .. } => self.tracked(result),
            Action::Closed { result } => {
                if !self.closing || self.closed.is_some() {
                    self.fail("Closed without a Close, or twice");
                }
                self.closed = Some(result);
            }
            other => self.start(other),
        }
    }

    fn in_buffer(&self, req: ReqId, off: u64, len: u64, kind: RequestKind) -> std::ops::Range<usize> {
        let Some(Some(r)) = self.reqs.get(req.0 as usize) else {
            self.fail(format!("{req:?} is used after its Reply"))
        };
        if !r.sent || r.what.kind != kind {
            self.fail(format!("buffer of {:?} used for the wrong direction or by a stranger", r.what));
        }
        if off + len > r.what.len || len == 0 || !off.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
            self.fail(format!("range {off}+{len} of the buffer of {:?}", r.what));
        }
        (off / SECTOR) as usize..((off + len) / SECTOR) as usize
    }

    fn in_bounce(&self, id: BounceId, off: u32, len: u64) -> std::ops::Range<usize> {
        let end = u64::from(off) + len;
        let legal = len > 0 && u64::from(off) % SECTOR == 0 && len.is_multiple_of(SECTOR);
        if id.0 >= self.settings.bounces || end > u64::from(self.settings.bounce_bytes) || !legal {
            self.fail(format!("range {off}+{len} of {id:?}"));
        }
        (u64::from(off) / SECTOR) as usize..(end / SECTOR) as usize
    }

    /// Memory that an operation in flight reads or fills must not be touched by another.
    fn not_in_flight(&self, buf: Buf, len: u64) {
        for f in &self.flights {
            let (theirs, their_len, _) = match f.act {
                Action::Read { to, len, .. } => (to, len, true),
                Action::Write { from, len, .. } => (from, len, false),
                _ => continue,
            };
            if overlap(buf, len, theirs, their_len) {
                self.fail(format!("{buf:?}+{len} is changed while {:?} is in flight on it", f.act));
            }
        }
    }

    fn overlay(&mut self, bounce: BounceId, at: u32, from: Option<(ReqId, u64)>, len: u32) {
        let to = self.in_bounce(bounce, at, u64::from(len));
        self.not_in_flight(Buf::Bounce { id: bounce, off: at }, u64::from(len));
        let values: Vec<Stamp> = match from {
            None => vec![0; to.len()],
            Some((req, off)) => {
                let range = self.in_buffer(req, off, u64::from(len), RequestKind::Write);
                self.reqs[req.0 as usize].as_ref().map(|r| r.buf[range].to_vec()).unwrap_or_default()
            }
        };
        self.bounces[bounce.0 as usize][to].copy_from_slice(&values);
    }

    /// The range of the file (sectors) that an operation transfers to or from.
    fn extent(act: &Action) -> (u64, u64) {
        match act {
            Action::Read { file_off, len, .. }
            | Action::Write { file_off, len, .. }
            | Action::Fallocate { file_off, len, .. }
            | Action::Clone { file_off, len, .. }
            | Action::ZeroRange { file_off, len, .. } => (*file_off / SECTOR, *len / SECTOR),
            Action::ReadBat { page, len, .. } => (u64::from(*page) * PAGE_SECTORS, u64::from(*len) / SECTOR),
            Action::WriteBat { page, .. } => (u64::from(*page) * PAGE_SECTORS, PAGE_SECTORS),
            _ => (0, 0),
        }
    }

    fn start(&mut self, act: Action) {
        let op = match &act {
            Action::Read { op, .. }
            | Action::Write { op, .. }
            | Action::ReadBat { op, .. }
            | Action::WriteBat { op, .. }
            | Action::Fallocate { op, .. }
            | Action::Truncate { op, .. }
            | Action::ZeroRange { op, .. }
            | Action::Clone { op, .. }
            | Action::Sync { op, .. } => *op,
            other => self.fail(format!("{other:?} is no operation")),
        };
        if self.flights.iter().any(|f| f.op == op) {
            self.fail(format!("{op:?} is used for two operations at once"));
        }
        self.check_start(&act);
        let (first, count) = Self::extent(&act);
        self.serial += 1;
        let changes_bat = matches!(act, Action::WriteBat { .. });
        let flight =
            Flight { op, act, serial: self.serial, issued: self.now, first, landed: vec![false; count as usize] };
        self.flights.push(flight);
        if changes_bat {
            self.owners = None;
        }
    }

    fn check_start(&mut self, act: &Action) {
        let top = self.shape.top();
        let changes = !matches!(act, Action::Read { .. } | Action::ReadBat { .. });
        let background = level_of(act, top) != top || self.background.as_ref().is_some_and(|s| s.level == top);
        if changes && !self.settings.writable && !background {
            self.fail(format!("{act:?} on a read-only device"));
        }
        if let Action::Read { file_off, len, .. }
        | Action::Write { file_off, len, .. }
        | Action::Fallocate { file_off, len, .. }
        | Action::ZeroRange { file_off, len, .. } = act
            && (file_off % SECTOR != 0 || len % SECTOR != 0 || *len == 0)
        {
            self.fail(format!("{act:?} is not a range of sectors"));
        }
        if changes && level_of(act, top) == top && !self.shape.raw_top() && !self.is_surely_marked() {
            self.fail(format!("{act:?} on an image that is not durably marked in use"));
        }
        let (first, count) = Self::extent(act);
        let target = level_of(act, top);
        let first_data = u64::from(self.shape.levels[target].first_data) * self.shape.spc;
        match act {
            Action::Read { level, to, len, .. } => {
                let level = *level as usize;
                let begin = u64::from(self.shape.levels[level].first_data) * self.shape.spc;
                if first < begin || first + count > self.chain.files[level].len() {
                    self.fail(format!("{act:?} outside the data of its file"));
                }
                match *to {
                    Buf::Request { req, off } => drop(self.in_buffer(req, off, *len, RequestKind::Read)),
                    Buf::Bounce { id, off } => drop(self.in_bounce(id, off, *len)),
                }
                self.not_in_flight(*to, *len);
            }
            Action::Write { from, len, .. } => {
                if first < first_data || first + count > self.chain.files[target].len() {
                    self.fail(format!("{act:?} outside the data of its file"));
                }
                match *from {
                    Buf::Request { req, off } => drop(self.in_buffer(req, off, *len, RequestKind::Write)),
                    Buf::Bounce { id, off } => {
                        self.in_bounce(id, off, *len);
                        let filled = |f: &Flight| matches!(f.act, Action::Read { to, len: n, .. } if overlap(*from, *len, to, n));
                        if let Some(f) = self.flights.iter().find(|f| filled(f)) {
                            self.fail(format!("{act:?} while {:?} still fills its buffer", f.act));
                        }
                    }
                }
                let values: Vec<Stamp> = (0..count).map(|i| self.source(act, i as usize)).collect();
                self.check_write(target, first, &values);
            }
            Action::ZeroRange { .. } => {
                if first < first_data || first + count > self.chain.files[target].len() {
                    self.fail(format!("{act:?} outside the data of its file"));
                }
                self.check_write(target, first, &vec![0; count as usize]);
            }
            Action::Fallocate { .. } if (first < first_data || self.shape.levels[target].raw.is_some()) => {
                self.fail(format!("{act:?} is not for new clusters of an image"));
            }
            Action::Fallocate { .. } if target == top => self.check_growth(first, count),
            Action::Truncate { level, len, .. } => self.check_cut(usize::from(*level), len / SECTOR),
            Action::ReadBat { level, page, len, .. } => {
                if *level as usize > top || *len as usize > BAT_PAGE || *len == 0 || *len % 512 != 0 {
                    self.fail(format!("{act:?}"));
                }
                let level = *level as usize;
                if self.shape.levels[level].raw.is_some() || *page >= self.shape.bat_pages(level) {
                    self.fail(format!("{act:?} beyond the BAT"));
                }
                if level == top {
                    let again = !self.pages_read.insert(*page);
                    self.cover.hit_if(again, "page evicted and read again");
                }
            }
            Action::Clone { from, from_off, len, .. } => {
                let source = from_off / SECTOR;
                let files = &self.chain.files;
                let inside = source + count <= files[*from as usize].len() && first + count <= files[target].len();
                if from_off % SECTOR != 0 || len % SECTOR != 0 || *len == 0 || first < first_data || !inside {
                    self.fail(format!("{act:?} outside the data of its files"));
                }
                let values: Vec<Stamp> = (0..count).map(|i| self.source(act, i as usize)).collect();
                self.check_write(target, first, &values);
            }
            Action::WriteBat { level, page, data, .. } if usize::from(*level) != top => {
                if self.shape.levels[target].raw.is_some() || *page >= self.shape.bat_pages(target) {
                    self.fail(format!("WriteBat of page {page}, beyond the BAT of level {level}"));
                }
                self.check_target_publish(target, *page, data);
            }
            Action::Sync { level, .. } if usize::from(*level) != top => {
                let written = self.background.as_ref().is_some_and(|s| s.level == target);
                self.fail_unless(written, || format!("a sync of level {level}, which nothing is written to"));
            }
            Action::WriteBat { page, data, .. } => {
                if self.shape.raw_top() || *page >= self.shape.bat_pages(top) {
                    self.fail(format!("WriteBat of page {page}, beyond the BAT"));
                }
                if self.table.sync_state() == SyncState::Idle {
                    self.fail("WriteBat without a record in the shared table beforehand");
                }
                self.check_publish(*page, data);
                self.cover.hit_if(self.flushes_since_bat == 0, "changed page written without a flush");
                self.flushes_since_bat =
                    self.reqs.iter().flatten().filter(|r| r.what.kind == RequestKind::Flush).count() as u64;
            }
            Action::Sync { .. } if self.table.sync_state() == SyncState::Idle => {
                self.fail("Sync without a record in the shared table beforehand");
            }
            Action::Sync { .. } => {
                self.unwritten_at_sync.clone_from(&self.unwritten);
                self.cover.hit_if(!self.unwritten.is_empty(), "sync with a first write in flight");
            }
            _ => {}
        }
    }

    fn check_write(&mut self, level: usize, first: u64, values: &[Stamp]) {
        match level == self.shape.top() {
            true => self.check_data_write(first, values),
            false => self.check_target_write(level, first, values),
        }
    }

    /// What an operation writes to its sector `i`.
    pub fn source(&self, act: &Action, i: usize) -> Stamp {
        match act {
            Action::Write { from: Buf::Request { req, off }, .. } => match &self.reqs[req.0 as usize] {
                Some(r) => r.buf[(*off / SECTOR) as usize + i],
                None => POISON | 0xdead,
            },
            Action::Write { from: Buf::Bounce { id, off }, .. } => {
                self.bounces[id.0 as usize][(u64::from(*off) / SECTOR) as usize + i]
            }
            Action::Clone { from, from_off, .. } => self.chain.files[*from as usize].read(from_off / SECTOR + i as u64),
            Action::WriteBat { data, .. } => self.chain.arena.borrow_mut().intern(&data[i * 512..(i + 1) * 512]),
            _ => 0,
        }
    }

    /// One sector of an operation is transferred.
    pub fn land(&mut self, at: usize, i: usize) {
        if std::mem::replace(&mut self.flights[at].landed[i], true) {
            return;
        }
        let f = &self.flights[at];
        let (sector, serial) = (f.first + i as u64, f.serial);
        let level = level_of(&f.act, self.shape.top());
        match &f.act {
            Action::Read { level, to, .. } => {
                let value = self.chain.files[*level as usize].read(sector);
                match *to {
                    Buf::Request { req, off } => {
                        if let Some(r) = self.reqs[req.0 as usize].as_mut() {
                            r.buf[(off / SECTOR) as usize + i] = value;
                        }
                    }
                    Buf::Bounce { id, off } => {
                        self.bounces[id.0 as usize][(u64::from(off) / SECTOR) as usize + i] = value;
                    }
                }
            }
            act
            @ (Action::Write { .. } | Action::Clone { .. } | Action::WriteBat { .. } | Action::ZeroRange { .. }) => {
                let value = self.source(act, i);
                if value & POISON != 0 {
                    self.fail(format!("{act:?} writes rubbish at its sector {i}: {value:#x}"));
                }
                if matches!(act, Action::WriteBat { .. }) {
                    self.owners = None;
                }
                self.chain.files[level].land(sector, value, serial);
            }
            _ => {}
        }
    }

    /// Some sectors of an operation in flight are transferred before the others.
    pub fn land_some(&mut self, at: usize) {
        if matches!(self.flights[at].act, Action::Fallocate { .. } | Action::Sync { .. }) {
            return;
        }
        let share = self.rng.pick(&[100, 500, 900]);
        for i in 0..self.flights[at].landed.len() {
            if self.rng.permille(share) {
                self.land(at, i);
            }
        }
    }

    fn verdict(&mut self, at: usize) -> Result<(), Errno> {
        if matches!(self.flights[at].act, Action::Clone { .. }) && !self.shares() {
            return Err(EOPNOTSUPP);
        }
        let s = &self.settings;
        let (eio, no_space) = match &self.flights[at].act {
            Action::Read { .. } | Action::ReadBat { .. } => (s.read_error, 0),
            Action::Write { .. } | Action::ZeroRange { .. } => (s.write_error, if s.cow { 300 } else { 0 }),
            Action::WriteBat { level, .. } if usize::from(*level) != self.shape.top() => (s.bat_error, 0),
            Action::Sync { level, .. } if usize::from(*level) != self.shape.top() => (s.sync_error, 0),
            Action::WriteBat { .. } => (s.bat_error, if s.cow { s.metadata_full } else { 0 }),
            Action::Fallocate { .. } => (s.write_error / 4, 1000),
            Action::Truncate { .. } => (if s.cow { 200 } else { s.write_error }, 0),
            Action::Sync { .. } => (s.sync_error, if s.cow { s.metadata_full / 2 } else { 0 }),
            _ => (0, 0),
        };
        if self.no_space && self.rng.permille(no_space) {
            return Err(if s.quota { EDQUOT } else { ENOSPC });
        }
        if self.rng.permille(eio) { Err(EIO) } else { Ok(()) }
    }

    /// An operation in flight ends and the engine is told.
    pub fn complete(&mut self, at: usize) {
        let result = self.verdict(at);
        let top = self.shape.top();
        let level = level_of(&self.flights[at].act, top);
        let torn = self.broken == Break::TornWrite
            && matches!(self.flights[at].act, Action::Write { .. })
            && self.rng.permille(50);
        match (result, torn) {
            (Ok(()), false) => (0..self.flights[at].landed.len()).for_each(|i| self.land(at, i)),
            (Err(EOPNOTSUPP), _) => self.cover.hit("clusters copied, since they could not be shared"),
            (Err(_), false) if self.rng.coin() => {}
            _ => self.land_some(at),
        }
        let f = self.flights.swap_remove(at);
        self.say(|_| format!("{:?} of op {} (issued {})", result, f.op.0, f.issued));
        let torn = f.landed.iter().any(|l| *l) && f.landed.iter().any(|l| !*l);
        self.cover.hit_if(matches!(f.act, Action::Clone { .. }) && result.is_ok(), "clusters shared");
        if let Err(e) = result
            && e != EOPNOTSUPP
        {
            self.faults += 1;
            if let Action::ReadBat { page, .. } = f.act {
                self.bad_pages.push(page);
                self.bat_read_error = true;
            }
            let what = match &f.act {
                Action::WriteBat { .. } if lacks_space(e) => "BAT write without space",
                Action::Sync { .. } if lacks_space(e) => "sync without space",
                _ if e == EDQUOT => "no space by quota",
                _ if e == ENOSPC => "no space",
                Action::Read { .. } => "read error",
                Action::ReadBat { .. } => "BAT read error",
                Action::WriteBat { .. } => "BAT write error",
                Action::Sync { .. } => "sync error",
                Action::Write { .. } if torn => "write error, torn",
                _ => "write error",
            };
            self.cover.hit(what);
        }
        match &f.act {
            Action::Fallocate { file_off, len, .. } => {
                let end = (file_off + len) / SECTOR;
                let file = &mut self.chain.files[level];
                match result {
                    Ok(()) => file.extend(end, f.serial),
                    // As much as there was room for.
                    Err(_) if file.len() < end && self.rng.below(3) == 0 => {
                        let reached = file.len() + self.rng.below(end - file.len());
                        file.extend(reached, f.serial);
                    }
                    Err(_) => {}
                }
            }
            Action::Truncate { len, .. } if result.is_ok() => {
                self.check_cut(level, len / SECTOR);
                self.cover.hit("file cut while the device runs");
                self.chain.files[level].truncate(len / SECTOR, f.serial);
            }
            Action::Sync { .. } => {
                match result {
                    Ok(()) if self.broken == Break::LazySync => {}
                    Ok(()) => self.chain.files[level].synced(f.issued),
                    // Nothing is lost: a later sync covers it.
                    Err(e) if lacks_space(e) => {}
                    Err(_) if level != top => self.chain.files[level].sync_failed(f.issued, &mut self.rng),
                    Err(_) => {
                        self.chain.files[top].sync_failed(f.issued, &mut self.rng);
                        self.write_back_errors += 1;
                    }
                }
                self.owners = None;
            }
            _ => {}
        }
        if matches!(
            f.act,
            Action::Write { .. }
                | Action::Clone { .. }
                | Action::WriteBat { .. }
                | Action::ZeroRange { .. }
                | Action::Fallocate { .. }
                | Action::Truncate { .. }
        ) {
            let end = self.chain.files[level].len().max(f.first + f.landed.len() as u64);
            let all = if matches!(f.act, Action::Fallocate { .. }) {
                0..end
            } else {
                f.first..f.first + f.landed.len() as u64
            };
            self.now += 1;
            self.chain.files[level].finished(all, f.serial, self.now);
        }
        self.tell(&f, result);
    }

    fn tell(&mut self, f: &Flight, result: Result<(), Errno>) {
        if changes(&f.act) && level_of(&f.act, self.shape.top()) == self.shape.top() {
            self.ended = f.first..f.first + f.landed.len() as u64;
            let (ended, spc) = (self.ended.clone(), self.shape.spc);
            self.unwritten.retain(|p| u64::from(*p + 1) * spc <= ended.start || ended.end <= u64::from(*p) * spc);
        }
        let top = level_of(&f.act, self.shape.top()) == self.shape.top();
        let mut sticky = result.is_err() && top && matches!(f.act, Action::Sync { .. } | Action::WriteBat { .. });
        if top && matches!(f.act, Action::Sync { .. } | Action::WriteBat { .. }) {
            self.flush_starved = result.is_err_and(lacks_space);
        }
        // Want of space is final only when the device is being stopped.
        if sticky && result.is_err_and(lacks_space) {
            let waits_for_ever = !self.engine.as_ref().is_some_and(|e| e.holds_only_writes());
            sticky = self.closing && !self.wait_for_space && !waits_for_ever;
            self.cover.hit_if(sticky, "closed without space for the BAT");
        }
        if sticky {
            self.failed = true;
        }
        match &f.act {
            Action::ReadBat { level, len, .. } => {
                let file = &self.chain.files[*level as usize];
                let arena = self.chain.arena.borrow();
                let bytes: Vec<u8> =
                    (f.first..f.first + u64::from(*len) / SECTOR).flat_map(|s| arena.bytes(file.read(s))).collect();
                drop(arena);
                self.feed(Event::BatRead { op: f.op, result: result.map(|()| &bytes[..]) });
            }
            _ => self.feed(Event::Done { op: f.op, result }),
        }
        self.ended = 0..0;
        if sticky && self.engine.is_some() && self.table.sync_state() != SyncState::Failed {
            let what = if matches!(f.act, Action::Sync { .. }) { "sync" } else { "BAT write" };
            self.fail(format!("a {what} failed and the shared table does not say so"));
        }
    }
}

fn overlap(a: Buf, a_len: u64, b: Buf, b_len: u64) -> bool {
    let (a_off, b_off) = match (a, b) {
        (Buf::Request { req: r, off: x }, Buf::Request { req: s, off: y }) if r == s => (x, y),
        (Buf::Bounce { id: r, off: x }, Buf::Bounce { id: s, off: y }) if r == s => (u64::from(x), u64::from(y)),
        _ => return false,
    };
    a_off < b_off + b_len && b_off < a_off + a_len
}

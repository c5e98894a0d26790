//! The rules, checked directly: not only what a crash did leave, but all that one could leave at this moment.

use std::collections::HashMap;
use std::ops::Range;

use crate::engine::api::*;

use crate::background::level_of;
use crate::disk::{POISON, Stamp};
use crate::image::{HEADER_WORDS, IN_USE, bat_sector};
use crate::world::World;

impl World {
    /// Sectors of the device in a cluster.
    pub fn sectors_of(&self, cluster: u32) -> Range<u64> {
        let start = u64::from(cluster) * self.shape.spc;
        start..(start + self.shape.spc).min(self.shape.sectors)
    }

    /// Contents of a file sector of the top that operations in flight may still bring.
    fn in_flight(&self, sector: u64, out: &mut Vec<Stamp>) {
        self.in_flight_in(self.shape.top(), sector, out);
    }

    fn in_flight_in(&self, level: usize, sector: u64, out: &mut Vec<Stamp>) {
        for f in self.flights.iter().filter(|f| level_of(&f.act, self.shape.top()) == level) {
            let inside = sector >= f.first && sector < f.first + f.landed.len() as u64;
            if inside && crate::recover::changes(&f.act) && !matches!(f.act, Action::Fallocate { .. }) {
                let i = (sector - f.first) as usize;
                if !f.landed[i] {
                    out.push(self.source(&f.act, i));
                }
            }
        }
    }

    /// Contents of a file sector of the top that a power cut may leave.
    fn possible(&self, sector: u64, out: &mut Vec<Stamp>) {
        self.possible_in(self.shape.top(), sector, out);
    }

    /// The same for any level.
    pub fn possible_in(&self, level: usize, sector: u64, out: &mut Vec<Stamp>) {
        self.chain.files[level].possible(sector, out);
        self.in_flight_in(level, sector, out);
    }

    /// Entries of a cluster that a power cut may leave.
    pub fn power_entries(&self, cluster: u32) -> Vec<u32> {
        let mut stamps = Vec::new();
        self.possible(bat_sector(cluster), &mut stamps);
        let mut entries: Vec<u32> = stamps.iter().map(|s| self.chain.entry_in(*s, cluster)).collect();
        entries.sort_unstable();
        entries.dedup();
        entries
    }

    /// Which clusters the BAT may name each host cluster for, after a power cut.
    pub fn owners(&mut self) -> &HashMap<u32, Vec<u32>> {
        if self.owners.is_none() {
            let mut owners: HashMap<u32, Vec<u32>> = HashMap::new();
            let clusters = self.shape.levels[self.shape.top()].clusters;
            let mut stamps = Vec::new();
            for sector in 0..=bat_sector(clusters - 1) {
                stamps.clear();
                self.possible(sector, &mut stamps);
                stamps.sort_unstable();
                stamps.dedup();
                let first = (sector * 128) as u32;
                for cluster in first.max(HEADER_WORDS) - HEADER_WORDS..(first + 128 - HEADER_WORDS).min(clusters) {
                    for s in &stamps {
                        let entry = if *s == 0 { 0 } else { self.chain.entry_in(*s, cluster) };
                        if entry != 0
                            && let Some(host_cluster) = self.shape.host_cluster(entry)
                        {
                            let list = owners.entry(host_cluster).or_default();
                            if !list.contains(&cluster) {
                                list.push(cluster);
                            }
                        }
                    }
                }
            }
            self.owners = Some(owners);
        }
        self.owners.get_or_insert_default()
    }

    fn initial(&mut self, sector: u64) {
        if !self.oracle.is_touched(sector) {
            let value = self.origin.1.read(&self.origin.0, sector, false);
            self.oracle.begin_with(sector, value);
        }
    }

    /// May the sector be found with this value after a power cut now?
    fn admits_power(&mut self, sector: u64, value: Stamp) -> bool {
        self.initial(sector);
        self.oracle.admits(sector, value, self.oracle.flushed)
    }

    pub fn must_admit(&mut self, sector: u64, value: Stamp, horizon: u64, what: impl std::fmt::Display) {
        self.initial(sector);
        if !self.oracle.admits(sector, value, horizon) {
            self.fail(format!(
                "{what}: sector {sector} (cluster {}) holds {} ({value:#x}); its history: {}",
                sector / self.shape.spc,
                self.name(value),
                self.oracle.history(sector)
            ));
        }
    }

    /// Every content that a power cut may leave in these clusters is one that it may leave.
    pub fn check_power(&mut self, cluster: u32, what: &str) {
        let sectors = self.sectors_of(cluster);
        let horizon = self.oracle.flushed;
        let mut values = Vec::new();
        if self.shape.raw_top() {
            for s in sectors {
                values.clear();
                self.possible(s, &mut values);
                for v in &values {
                    self.must_admit(s, *v, horizon, what);
                }
            }
            return;
        }
        for entry in self.power_entries(cluster) {
            self.check_entry(cluster, entry, what);
        }
    }

    /// A cluster whose entry may be found on disk has the right content.
    fn check_entry(&mut self, cluster: u32, entry: u32, what: &str) {
        let (top, spc, horizon) = (self.shape.top(), self.shape.spc, self.oracle.flushed);
        if entry == 0 {
            let mut values = Vec::new();
            for s in self.sectors_of(cluster) {
                values.clear();
                self.possible_below(s, &mut values);
                for v in &values {
                    self.must_admit(s, *v, horizon, format_args!("{what}, entry 0"));
                }
            }
            return;
        }
        let Some(host_cluster) = self.shape.host_cluster(entry) else {
            self.fail(format!("{what}: entry {entry} of cluster {cluster} lies within a cluster"));
        };
        let begin = u64::from(host_cluster) * spc;
        if begin < self.first_data_sector() || begin + spc > self.chain.files[top].least_len() {
            self.fail(format!(
                "{what}: entry {entry} of cluster {cluster} names a host cluster outside the (stable) file"
            ));
        }
        let mut values = Vec::new();
        let device = self.sectors_of(cluster);
        for i in 0..spc {
            values.clear();
            self.possible(begin + i, &mut values);
            let sector = u64::from(cluster) * spc + i;
            for v in &values {
                if sector < device.end {
                    self.must_admit(sector, *v, horizon, format_args!("{what}, host cluster {host_cluster}"));
                } else if v & POISON != 0 {
                    self.fail(format!(
                        "{what}: rubbish beyond the device's end in host cluster {host_cluster}: {v:#x}"
                    ));
                }
            }
        }
    }

    /// After a power cut now the image would be found marked in use.
    pub fn is_surely_marked(&self) -> bool {
        let mut stamps = Vec::new();
        self.possible(0, &mut stamps);
        stamps.iter().all(|s| self.chain.arena.borrow().bytes(*s)[44..48] == IN_USE.to_le_bytes())
    }

    /// Sectors of the device that zeroings under way cover.
    pub fn zeroings(&self) -> Vec<Range<u64>> {
        let zeroings = self.reqs.iter().flatten().filter(|r| r.sent && r.what.kind == RequestKind::Zero);
        zeroings.map(|r| r.what.offset / 512..(r.what.offset + r.what.len) / 512).collect()
    }

    /// A host cluster that the step since `begun` gave to a cluster, and which is being written for the first time: no BAT
    /// page may hold its entry unless that write ends before the page's data sync begins. (Host clusters published by a
    /// cluster operation that just ended, or by a zeroing, hold what they should already.)
    pub fn note_first_writes(&mut self, begun: u64, zeroed: &[Range<u64>]) {
        let (spc, used) = (self.shape.spc, self.table.used());
        for slot in self.table.changed_slots() {
            let Some((_, cluster, host_cluster)) = used.iter().copied().find(|(s, ..)| *s == slot) else { continue };
            let (at, device) = (u64::from(host_cluster) * spc, self.sectors_of(cluster));
            let overlaps = |r: &Range<u64>| r.start < at + spc && at < r.end;
            if host_cluster == 0
                || overlaps(&self.ended)
                || zeroed.iter().any(|z| z.start <= device.start && device.end <= z.end)
            {
                continue;
            }
            let first = self.flights.iter().any(|f| {
                let range = f.first..f.first + f.landed.len() as u64;
                let top = level_of(&f.act, self.shape.top()) == self.shape.top();
                matches!(f.act, Action::Write { .. }) && top && f.issued >= begun && overlaps(&range)
            });
            if first {
                self.unwritten.insert(host_cluster);
            }
        }
    }

    /// A BAT page is about to be written: whatever it newly says must be true and stable already.
    pub fn check_publish(&mut self, page: u32, data: &[u8; BAT_PAGE]) {
        let clusters = self.shape.levels[self.shape.top()].clusters;
        if page == 0 && data[..64] != self.header {
            self.fail("WriteBat of page 0 with another header");
        }
        let skip = if page == 0 { HEADER_WORDS } else { 0 };
        let sector_now = |w: &World, c: u32| w.chain.files[w.shape.top()].read(bat_sector(c));
        self.owners();
        let mut seen: HashMap<u32, u32> = HashMap::new();
        let view: HashMap<u32, u32> = self.table.used().into_iter().map(|(_, c, e)| (c, e)).collect();
        for word in skip..1024 {
            let at = word as usize * 4;
            let entry = u32::from_le_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]]);
            let cluster = page * 1024 + word - HEADER_WORDS;
            if cluster >= clusters {
                if entry != 0 {
                    self.fail(format!("WriteBat of page {page}: entry {entry} beyond the image's {clusters} clusters"));
                }
                continue;
            }
            let before = self.chain.entry_in(sector_now(self, cluster), cluster);
            if entry == 0 && before == 0 {
                continue;
            }
            if let Some(host_cluster) = view.get(&cluster) {
                let later = self.shape.entry(*host_cluster) != entry;
                self.cover.hit_if(later, "flush with changes after its data sync");
            }
            if entry != before {
                if entry != 0 && self.shape.host_cluster(entry).is_some_and(|p| self.unwritten_at_sync.contains(&p)) {
                    self.fail(format!(
                        "data before entry: cluster {cluster}'s first write was in flight when the data sync began"
                    ));
                }
                self.check_entry(cluster, entry, "data before entry (WriteBat)");
                self.cover.hit_if(entry == 0, "cluster freed");
                let host_cluster = self.shape.host_cluster(entry).unwrap_or(0);
                if entry != 0 && self.last_owner.insert(host_cluster, cluster).is_some_and(|old| old != cluster) {
                    self.cover.hit("freed cluster reused");
                }
            }
            if entry == 0 {
                continue;
            }
            let host_cluster = self.shape.host_cluster(entry).unwrap_or(u32::MAX);
            let twice = seen.insert(host_cluster, cluster);
            let other =
                self.owners.as_ref().and_then(|o| o.get(&host_cluster)).and_then(|l| l.iter().find(|c| **c != cluster));
            if let Some(other) = twice.as_ref().or(other) {
                self.fail(format!(
                    "WriteBat gives host cluster {host_cluster} to cluster {cluster}, cluster {other} may have it on disk"
                ));
            }
        }
    }

    /// Data goes to these sectors of the top: what a durable (or perhaps durable) entry names must stay right.
    pub fn check_data_write(&mut self, first: u64, values: &[Stamp]) {
        if let Some(i) = values.iter().position(|v| v & POISON != 0) {
            self.fail(format!("rubbish is written at sector {} of the file: {:#x}", first + i as u64, values[i]));
        }
        let spc = self.shape.spc;
        if self.shape.raw_top() {
            for (i, v) in values.iter().enumerate() {
                self.must_admit(first + i as u64, *v, self.oracle.flushed, "write to the raw top");
            }
            return;
        }
        for (i, v) in values.iter().enumerate() {
            let sector = first + i as u64;
            let host_cluster = (sector / spc) as u32;
            let Some(clusters) = self.owners().get(&host_cluster).cloned() else { continue };
            for cluster in clusters {
                let at = u64::from(cluster) * spc + sector % spc;
                if at < self.shape.sectors && !self.admits_power(at, *v) {
                    self.must_admit(
                        at,
                        *v,
                        self.oracle.flushed,
                        format_args!("write to host cluster {host_cluster}, which may be durable"),
                    );
                }
            }
        }
    }

    /// Entries of a cluster that a successor of the worker may find now.
    fn takeover_entries(&self, cluster: u32) -> Vec<u32> {
        let carried: Vec<u32> =
            self.table.used().iter().filter(|(_, c, _)| *c == cluster).map(|(_, _, p)| self.shape.entry(*p)).collect();
        if !carried.is_empty() {
            return carried;
        }
        let sector = bat_sector(cluster);
        let mut stamps = vec![self.chain.files[self.shape.top()].read(sector)];
        self.in_flight(sector, &mut stamps);
        stamps.iter().map(|s| self.chain.entry_in(*s, cluster)).collect()
    }

    /// Were the worker killed now: its successor would find one of the values of a read that begins now.
    pub fn check_takeover(&mut self, cluster: u32, sectors: Range<u64>, what: &str) {
        let (top, spc, now) = (self.shape.top(), self.shape.spc, self.now);
        let mut values = Vec::new();
        if self.shape.raw_top() {
            for s in sectors {
                values.clear();
                values.push(self.chain.files[top].read(s));
                self.in_flight(s, &mut values);
                for v in &values {
                    self.must_admit(s, *v, now, what);
                }
            }
            return;
        }
        for entry in self.takeover_entries(cluster) {
            let host_cluster = self.shape.host_cluster(entry).unwrap_or(u32::MAX);
            let begin = u64::from(host_cluster) * spc;
            if entry != 0 && begin + spc > self.chain.files[top].len() {
                self.fail(format!(
                    "{what}: a takeover would find host cluster {host_cluster} for cluster {cluster}, beyond the file"
                ));
            }
            for s in sectors.clone() {
                values.clear();
                if entry == 0 {
                    values.push(self.chain.read_below(&self.shape, top, s));
                } else {
                    let at = begin + s % spc;
                    values.push(self.chain.files[top].read(at));
                    self.in_flight(at, &mut values);
                }
                for v in &values {
                    self.must_admit(s, *v, now, format_args!("{what}, host cluster {host_cluster}"));
                }
            }
        }
    }

    /// A slot of the shared table was stored to.
    pub fn check_slot(&mut self, slot: usize) {
        let used = self.table.used();
        let Some((_, cluster, host_cluster)) = used.iter().copied().find(|(s, ..)| *s == slot) else { return };
        if used.iter().filter(|(_, c, _)| *c == cluster).count() > 1 {
            self.fail(format!("two slots of the shared table speak of cluster {cluster}"));
        }
        if host_cluster != 0 && used.iter().any(|(_, c, p)| *p == host_cluster && *c != cluster) {
            self.fail(format!("two slots of the shared table name host cluster {host_cluster}"));
        }
        let sectors = self.sectors_of(cluster);
        self.check_takeover(cluster, sectors, "entry in the shared table");
    }
}

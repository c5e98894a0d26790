//! Background work of a session: begun with it or taken over from a killed worker, and what its end leads to.

use crate::disk::{POISON, Stamp};
use crate::engine::api::*;
use crate::image::{HEADER_WORDS, bat_sector};
use crate::world::World;

const NO_SPACE: Errno = 28;
const CANCELED: Errno = 125;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// The top into the level below it.
    Top,
    /// Levels up to this one into the target.
    Frozen { high: usize },
    /// Space of the top.
    GiveBack,
}

/// What the world knows of the background work of a session.
#[derive(Clone, Debug)]
pub struct Session {
    pub kind: Kind,
    /// The target of a merge; else the top.
    pub level: usize,
    /// What the engine said last.
    pub told: Option<Result<(), Errno>>,
    /// Errors injected before.
    pub faults: u64,
    pub cancelled: bool,
    pub paused: bool,
    /// Its files can share data.
    pub shares: bool,
}

pub fn level_of(act: &Action, top: usize) -> usize {
    match act {
        Action::Write { level, .. }
        | Action::ZeroRange { level, .. }
        | Action::Fallocate { level, .. }
        | Action::Truncate { level, .. }
        | Action::Clone { level, .. }
        | Action::WriteBat { level, .. }
        | Action::Sync { level, .. }
        | Action::Read { level, .. }
        | Action::ReadBat { level, .. } => usize::from(*level),
        _ => top,
    }
}

impl World {
    /// The work of this session, its target made ready as the worker does it; `None`: there is none.
    pub fn begin_background(&mut self, takeover: bool) -> Option<BackgroundConfig> {
        if takeover && self.copier.is_some() {
            self.background = None;
            return None;
        }
        // A successor does not know of space being given back.
        let before = self.background.take().filter(|s| takeover && s.kind != Kind::GiveBack);
        if let Some(session) = before {
            // The supervisor may not have read what became of it: then the successor is given the same work again.
            if matches!(session.told, Some(Err(_))) && (session.cancelled || self.rng.coin()) {
                return None;
            }
            self.cover.hit_if(matches!(session.told, Some(Err(_))), "a merge that has failed is begun anew");
            let doubt = self.table.progress(SYNC_WORD) != 0;
            self.cover.hit_if(doubt, "a merge begins anew after a sync of unknown outcome");
            self.cover.hit("background work taken over");
            let resumed = self.table.progress(0) > 0 && !doubt;
            self.cover.hit_if(resumed, "a merge goes on where it was");
            return self.make_ready(session.kind, session.level, session.paused);
        }
        (0..PROGRESS_WORDS).for_each(|word| self.table.set_progress(word, 0));
        let top = self.shape.top();
        if !self.rng.permille(self.settings.background) {
            return None;
        }
        let frozen = if self.settings.writable { top } else { top + 1 };
        let (kind, level) = match self.rng.below(4) {
            // There may be space to be given back.
            0 if self.settings.writable && !self.shape.raw_top() => return None,
            1 | 2 if frozen >= 2 => {
                let low = self.rng.index(frozen - 1);
                (Kind::Frozen { high: low + 1 + self.rng.index(frozen - 1 - low) }, low)
            }
            _ if self.settings.writable => (Kind::Top, top.checked_sub(1)?),
            _ => return None,
        };
        self.make_ready(kind, level, false)
    }

    fn make_ready(&mut self, kind: Kind, level: usize, paused: bool) -> Option<BackgroundConfig> {
        let shares = self.settings.shares;
        let session = Session { kind, level, told: None, faults: self.faults, cancelled: false, paused, shares };
        let top = self.shape.top();
        let work = match kind {
            Kind::GiveBack => return None,
            Kind::Top | Kind::Frozen { .. } => {
                let high = if let Kind::Frozen { high } = kind { high } else { top };
                let target = TargetConfig { level: level as u8, alloc: self.prepare_target(level, high)? };
                let mut pages = PageSet::new();
                for source in level + 1..=high {
                    for (cluster, _) in self.chain.host_clusters(&self.shape, source) {
                        pages.insert(ploop::format::bat::page_of(cluster));
                    }
                }
                self.table.used().iter().for_each(|(_, c, _)| pages.insert(ploop::format::bat::page_of(*c)));
                match kind {
                    Kind::Top => {
                        self.cover.hit("merge of the top begun");
                        BackgroundWork::MergeTop { target, pages }
                    }
                    _ => {
                        self.cover.hit("merge of frozen levels begun");
                        self.cover.hit_if(!self.settings.writable, "frozen levels of a read-only device merged");
                        BackgroundWork::MergeFrozen { high: high as u8, target, pages }
                    }
                }
            }
        };
        self.background = Some(session);
        Some(BackgroundConfig { work })
    }

    fn prepare_target(&mut self, level: usize, high: usize) -> Option<AllocConfig> {
        let (spc, ahead) = (self.shape.spc, self.settings.ahead);
        let sectors = if high == self.shape.top() {
            self.shape.sectors
        } else {
            u64::from(self.shape.levels[high].clusters) * spc
        };
        if let Some(bytes) = self.shape.levels[level].raw {
            let sectors = sectors.max(bytes / 512);
            self.serial += 1;
            self.chain.files[level].extend(sectors, self.serial);
            self.settle_target(level);
            self.shape.levels[level].raw = Some(sectors * 512);
            return Some(AllocConfig { end: 0, free: vec![], ahead, limit: u32::MAX });
        }
        if self.shape.levels[level].first_data != self.shape.levels[high].first_data {
            return None;
        }
        // An image that a merge given up has made larger stays so: entries behind the size would come back later.
        let clusters = self.shape.levels[high].clusters.max(self.shape.levels[level].clusters);
        self.shape.levels[level].clusters = clusters;
        let first = self.shape.levels[level].first_data;
        let mut used: Vec<u32> = self.chain.host_clusters(&self.shape, level).into_iter().map(|(_, p)| p).collect();
        used.sort_unstable();
        let end = used.last().map_or(first, |p| p + 1);
        self.serial += 1;
        self.chain.files[level].truncate(u64::from(end) * spc, self.serial);
        self.settle_target(level);
        let free = (first..end).filter(|p| used.binary_search(p).is_err()).map(|p| p..p + 1).collect();
        Some(AllocConfig { end, free, ahead, limit: u32::MAX })
    }

    fn settle_target(&mut self, level: usize) {
        self.now += 1;
        let end = self.chain.files[level].len();
        self.chain.files[level].finished(0..end, self.serial, self.now);
        self.now += 1;
        self.chain.files[level].synced(self.now);
    }

    /// The engine said BackgroundDone.
    pub fn background_done(&mut self, result: Result<(), Errno>) {
        let no_space = self.no_space || self.settings.no_space > 0;
        let Some(s) = &mut self.background else { self.fail("BackgroundDone, and there is no work") };
        let before = s.told.replace(result);
        let (faults, kind, cancelled) = (s.faults, s.kind, s.cancelled);
        match (before, result) {
            (Some(Err(_)), _) | (Some(Ok(())), Ok(())) => {
                self.fail(format!("BackgroundDone twice: {before:?}, {result:?}"))
            }
            (_, Ok(())) => {
                let load = self.outstanding() > 0;
                let what = match kind {
                    Kind::Top => {
                        ["merge of the top came to agreement", "merge of the top came to agreement under load"]
                    }
                    Kind::Frozen { .. } => ["merge of frozen levels done", "merge of frozen levels done under load"],
                    Kind::GiveBack => ["space given back", "space given back under load"],
                };
                self.cover.hit(what[0]);
                self.cover.hit_if(load, what[1]);
                self.want_close |= self.rng.below(4) == 0;
            }
            (_, Err(CANCELED)) if self.closing => self.cover.hit("background work ended by closing"),
            (_, Err(CANCELED)) if cancelled => self.cover.hit("background work cancelled"),
            (_, Err(NO_SPACE)) if no_space => self.cover.hit("background work ended by want of space"),
            (_, Err(e)) if self.faults == faults => {
                self.fail(format!("BackgroundDone with error {e}, and nothing had failed"))
            }
            (_, Err(_)) => self.cover.hit("background work ended by an error"),
        }
    }

    /// Pause, resume or cancel, at any time.
    pub fn control_background(&mut self) {
        let pause = self.rng.below(3);
        let Some(s) = &mut self.background else { return };
        let control = match pause {
            0 => BackgroundControl::Pause,
            1 => BackgroundControl::Resume,
            _ => BackgroundControl::Cancel,
        };
        s.paused = control == BackgroundControl::Pause || s.paused && control != BackgroundControl::Resume;
        s.cancelled |= control == BackgroundControl::Cancel;
        self.say(|_| format!("{control:?}"));
        self.cover.hit_if(control == BackgroundControl::Pause, "background work paused");
        self.feed(Event::Background(control));
    }

    /// All is quiet: background work has come to an end by itself. True: it goes on, since it was paused.
    pub fn check_background_ends(&mut self) -> bool {
        let Some(s) = self.background.as_mut().filter(|s| s.told.is_none()) else { return false };
        if !std::mem::take(&mut s.paused) {
            self.fail("all is quiet, and the background work has not ended");
        }
        self.feed(Event::Background(BackgroundControl::Resume));
        true
    }

    /// Content of a sector as the sources of a merge of frozen levels have it.
    fn in_sources(&self, low: usize, high: usize, sector: u64) -> Option<Stamp> {
        (low + 1..=high).rev().find_map(|l| self.chain.read_level(&self.shape, l, sector, false))
    }

    /// Data goes to these sectors of a merge's target: what a power cut may show again must stay right.
    pub fn check_target_write(&mut self, level: usize, first: u64, values: &[Stamp]) {
        let Some(s) = self.background.as_ref().filter(|s| s.level == level) else {
            self.fail(format!("a write to level {level}, which is neither the top nor the target of a merge"));
        };
        let kind = s.kind;
        if let Some(i) = values.iter().position(|v| v & POISON != 0) {
            self.fail(format!("rubbish for the target at its sector {}: {:#x}", first + i as u64, values[i]));
        }
        let spc = self.shape.spc;
        let owner = |w: &World, host_cluster: u32| match w.shape.levels[level].raw {
            Some(_) => Some(host_cluster),
            None => {
                w.chain.host_clusters(&w.shape, level).into_iter().find(|(_, p)| *p == host_cluster).map(|(c, _)| c)
            }
        };
        let mut known = None;
        for (i, v) in values.iter().enumerate() {
            let sector = first + i as u64;
            let host_cluster = (sector / spc) as u32;
            if known.is_none_or(|(p, _)| p != host_cluster) {
                known = Some((host_cluster, owner(self, host_cluster)));
            }
            let Some((_, Some(cluster))) = known else { continue };
            let at = u64::from(cluster) * spc + sector % spc;
            match kind {
                Kind::Frozen { high } if self.in_sources(level, high, at) != Some(*v) => self.fail(format!(
                    "sector {at} of the target: {} is written, its sources have {:?}",
                    self.name(*v),
                    self.in_sources(level, high, at)
                )),
                Kind::Frozen { .. } => {}
                _ if at < self.shape.sectors => {
                    let horizon = self.oracle.flushed;
                    self.must_admit(
                        at,
                        *v,
                        horizon,
                        format_args!("write to host cluster {host_cluster} of the target"),
                    );
                }
                _ => {}
            }
        }
    }

    /// A BAT page of the target is about to be written: what it newly names must be stable already.
    pub fn check_target_publish(&mut self, level: usize, page: u32, data: &[u8; BAT_PAGE]) {
        let Some(s) = self.background.as_ref().filter(|s| s.level == level) else {
            self.fail(format!("WriteBat to level {level}, which is neither the top nor the target of a merge"));
        };
        let (kind, spc) = (s.kind, self.shape.spc);
        if page == 0 && data[..64] != self.chain.header(level) {
            self.fail("WriteBat of the target's page 0 with another header");
        }
        let skip = if page == 0 { HEADER_WORDS } else { 0 };
        let owned: Vec<(u32, u32)> = self.chain.host_clusters(&self.shape, level);
        for word in skip..1024 {
            let at = word as usize * 4;
            let entry = u32::from_le_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]]);
            let cluster = page * 1024 + word - HEADER_WORDS;
            if cluster >= self.shape.levels[level].clusters {
                if entry != 0 {
                    self.fail(format!("WriteBat of the target's page {page}: entry {entry} beyond its clusters"));
                }
                continue;
            }
            let before = self.chain.entry_in(self.chain.files[level].read(bat_sector(cluster)), cluster);
            if entry == before {
                continue;
            }
            let Some(host_cluster) = self.shape.host_cluster(entry).filter(|_| entry != 0) else {
                self.fail(format!("WriteBat of the target drops or spoils the entry of cluster {cluster}: {entry}"));
            };
            if before != 0 || owned.iter().any(|(c, p)| *p == host_cluster && *c != cluster) {
                self.fail(format!(
                    "WriteBat of the target gives host cluster {host_cluster} to cluster {cluster}, which had {before}"
                ));
            }
            let begin = u64::from(host_cluster) * spc;
            if begin + spc > self.chain.files[level].least_len() {
                self.fail(format!(
                    "WriteBat of the target names host cluster {host_cluster} outside the (stable) file"
                ));
            }
            let mut values = Vec::new();
            for i in 0..spc {
                values.clear();
                self.possible_in(level, begin + i, &mut values);
                let sector = u64::from(cluster) * spc + i;
                if let Some(v) = values.iter().find(|v| **v & POISON != 0) {
                    self.fail(format!(
                        "data before entry (target): cluster {cluster}, rubbish {v:#x} may be in host cluster {host_cluster}"
                    ));
                }
                if let Kind::Frozen { high } = kind {
                    let right = self.in_sources(level, high, sector);
                    if let Some(v) = values.iter().find(|v| Some(**v) != right) {
                        self.fail(format!(
                            "data before entry (target): sector {sector} may be {} in host cluster {host_cluster}, its sources have {right:?}",
                            self.name(*v)
                        ));
                    }
                } else if sector < self.shape.sectors && self.oracle.is_touched(sector) {
                    // It is hidden by the top, and need not be what was flushed last; but it was never anything else.
                    if let Some(v) = values.iter().find(|v| !self.oracle.ever_held(sector, **v)) {
                        self.fail(format!("data before entry (target): sector {sector} may be {}", self.name(*v)));
                    }
                }
            }
        }
        self.cover.hit("BAT page of a target written");
    }

    /// Contents that a power cut may leave in a sector of the device below the top.
    pub fn possible_below(&self, sector: u64, out: &mut Vec<Stamp>) {
        let top = self.shape.top();
        let Some(s) = self.background.as_ref().filter(|s| s.kind == Kind::Top) else {
            out.push(self.chain.read_below(&self.shape, top, sector));
            return;
        };
        let (spc, level) = (self.shape.spc, s.level);
        if self.shape.levels[level].raw.is_some() {
            self.possible_in(level, sector, out);
            return;
        }
        let cluster = (sector / spc) as u32;
        let mut stamps = Vec::new();
        self.possible_in(level, bat_sector(cluster), &mut stamps);
        let mut entries: Vec<u32> = stamps.iter().map(|s| self.chain.entry_in(*s, cluster)).collect();
        entries.sort_unstable();
        entries.dedup();
        for entry in entries {
            match self.shape.host_cluster(entry).filter(|_| entry != 0) {
                Some(host_cluster) => self.possible_in(level, u64::from(host_cluster) * spc + sector % spc, out),
                None => out.push(self.chain.read_below(&self.shape, level, sector)),
            }
        }
    }

    /// The engine has closed well; if the merge was done the chain goes on without the merged levels. False: the top has to
    /// be closed.
    pub fn finish_background(&mut self) -> bool {
        let Some(s) = self.background.take() else { return false };
        let done = s.told == Some(Ok(()));
        let high = match s.kind {
            Kind::GiveBack => return false,
            Kind::Top => self.shape.top(),
            Kind::Frozen { high } => high,
        };
        if !done {
            return false;
        }
        let mut merged = self.shape.clone();
        let mut chain = self.chain.clone();
        merged.levels.drain(s.level + 1..=high);
        chain.files.drain(s.level + 1..=high);
        // The levels that go are gone: what a power cut leaves of the target is all that there is.
        for sector in 0..self.shape.sectors {
            let before = self.chain.read(&self.shape, sector, true);
            let after = (0..merged.levels.len())
                .rev()
                .find_map(|l| chain.read_level(&merged, l, sector, l >= s.level))
                .unwrap_or(0);
            if before != after {
                self.fail(format!(
                    "merged: sector {sector} (cluster {}) was {} and is {}",
                    sector / self.shape.spc,
                    self.name(before),
                    self.name(after)
                ));
            }
        }
        self.shape = merged;
        self.chain = chain;
        self.lower_owner = self.owners_below();
        self.owners = None;
        self.last_owner.clear();
        let top = s.kind == Kind::Top;
        self.cover.hit(if top { "merge of the top finished" } else { "merge of frozen levels finished" });
        if top {
            self.settle(self.now, "after a merge", self.now);
        }
        top
    }

    pub fn cover_background_kill(&mut self) {
        let Some(s) = &self.background else { return };
        let (kind, told) = (s.kind, s.told);
        match (kind, told) {
            (Kind::Top, None) => self.cover.hit("kill during a merge of the top"),
            (Kind::Top, Some(Ok(()))) => self.cover.hit("kill of a merge that had come to agreement"),
            (Kind::Frozen { .. }, None) => self.cover.hit("kill during a merge of frozen levels"),
            (Kind::GiveBack, None) => self.cover.hit("kill while space is given back"),
            _ => {}
        }
    }

    /// Whether a clone of these files works.
    pub fn shares(&self) -> bool {
        self.background.as_ref().is_some_and(|s| s.shares)
    }
}

/// What must have happened to background work in a set of runs.
pub const WANTED: &[&str] = &[
    "merge of the top begun",
    "merge of the top came to agreement",
    "merge of the top came to agreement under load",
    "merge of the top finished",
    "merge of frozen levels begun",
    "merge of frozen levels done",
    "merge of frozen levels done under load",
    "merge of frozen levels finished",
    "frozen levels of a read-only device merged",
    "space is to be given back",
    "space given back",
    "space given back under load",
    "clusters moved to give space back",
    "giving space back refused",
    "file cut while the device runs",
    "kill with a cut in flight",
    "power cut with a cut in flight",
    "background work ended by closing",
    "background work ended by want of space",
    "background work ended by an error",
    "background work cancelled",
    "background work paused",
    "background work taken over",
    "a merge goes on where it was",
    "a merge that has failed is begun anew",
    "a merge begins anew after a sync of unknown outcome",
    "BAT page of a target written",
    "kill during a merge of the top",
    "kill of a merge that had come to agreement",
    "kill during a merge of frozen levels",
    "kill while space is given back",
    "power cut during background work",
    "clusters shared",
    "clusters copied, since they could not be shared",
];

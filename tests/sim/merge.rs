//! Merging the top into the level below while requests come: begun with a session, finished at its end if the two agree.

use crate::disk::{POISON, Stamp};
use crate::engine::api::*;
use crate::image::bat_sector;
use crate::recover::Outage;
use crate::world::World;

const NO_SPACE: Errno = 28;
const CANCELED: Errno = 125;

/// What the world knows of the merge of a session.
#[derive(Clone, Debug)]
pub struct Merging {
    pub level: usize,
    /// What the engine said last.
    pub told: Option<Result<(), Errno>>,
    /// Errors injected before.
    faults: u64,
}

pub fn level_of(act: &Action, top: usize) -> usize {
    match act {
        Action::Write { level, .. }
        | Action::ZeroRange { level, .. }
        | Action::Fallocate { level, .. }
        | Action::Read { level, .. }
        | Action::ReadBat { level, .. } => usize::from(*level),
        _ => top,
    }
}

impl World {
    /// The target is made ready as the worker does it. `None`: this session merges nothing.
    pub fn begin_merge(&mut self) -> Option<MergeConfig> {
        self.merging = None;
        let level = self.shape.top().checked_sub(1)?;
        if !self.settings.writable || !self.rng.permille(self.settings.merge) {
            return None;
        }
        let spc = self.shape.spc;
        let ahead = self.settings.ahead;
        let alloc = match self.shape.levels[level].raw {
            Some(bytes) => {
                self.serial += 1;
                self.chain.files[level].extend(self.shape.sectors.max(bytes / 512), self.serial);
                self.settle_target(level);
                self.shape.levels[level].raw = Some(self.shape.sectors * 512);
                AllocConfig { end: 0, free: vec![], ahead, limit: u32::MAX }
            }
            None => {
                if self.shape.levels[level].first_data != self.shape.levels[level + 1].first_data {
                    return None;
                }
                self.shape.levels[level].clusters = self.shape.levels[level + 1].clusters;
                let first = self.shape.levels[level].first_data;
                let mut used: Vec<u32> = self.chain.places(&self.shape, level).into_iter().map(|(_, p)| p).collect();
                used.sort_unstable();
                let end = used.last().map_or(first, |p| p + 1);
                self.serial += 1;
                self.chain.files[level].truncate(u64::from(end) * spc, self.serial);
                self.settle_target(level);
                let free = (first..end).filter(|p| used.binary_search(p).is_err()).map(|p| p..p + 1).collect();
                AllocConfig { end, free, ahead, limit: u32::MAX }
            }
        };
        self.merging = Some(Merging { level, told: None, faults: self.faults });
        self.cover.hit("merge begun");
        Some(MergeConfig { level: level as u8, alloc })
    }

    fn settle_target(&mut self, level: usize) {
        self.now += 1;
        let end = self.chain.files[level].len();
        self.chain.files[level].finished(0..end, self.serial, self.now);
        self.now += 1;
        self.chain.files[level].synced(self.now);
    }

    /// The engine said Merged.
    pub fn merged(&mut self, result: Result<(), Errno>) {
        let no_space = self.no_space || self.settings.no_space > 0;
        let Some(m) = &mut self.merging else { self.fail("Merged, and there is no merge") };
        let before = m.told.replace(result);
        let faults = m.faults;
        match (before, result) {
            (Some(Err(_)), _) | (Some(Ok(())), Ok(())) => self.fail(format!("Merged twice: {before:?}, {result:?}")),
            (_, Ok(())) => {
                self.cover.hit("merge came to agreement");
                self.cover.hit_if(self.outstanding() > 0, "merge came to agreement under load");
            }
            (_, Err(CANCELED)) if self.closing => self.cover.hit("merge ended by closing"),
            (_, Err(NO_SPACE)) if no_space => self.cover.hit("merge ended by want of space"),
            (_, Err(e)) if self.faults == faults => self.fail(format!("Merged with error {e}, and nothing had failed")),
            (_, Err(_)) => self.cover.hit("merge ended by an error"),
        }
    }

    /// All is quiet: a merge has come to an end by itself.
    pub fn check_merge_ends(&self) {
        if self.merging.as_ref().is_some_and(|m| m.told.is_none()) {
            self.fail("all is quiet, and the merge has not ended");
        }
    }

    /// Data goes to these sectors of a merge's target: what a power cut may show again must stay right.
    pub fn check_target_write(&mut self, level: usize, first: u64, values: &[Stamp]) {
        if self.merging.as_ref().is_none_or(|m| m.level != level) {
            self.fail(format!("a write to level {level}, which is neither the top nor the target of a merge"));
        }
        if let Some(i) = values.iter().position(|v| v & POISON != 0) {
            self.fail(format!("rubbish for the target at its sector {}: {:#x}", first + i as u64, values[i]));
        }
        let spc = self.shape.spc;
        let owner = |w: &World, place: u32| match w.shape.levels[level].raw {
            Some(_) => Some(place),
            None => w.chain.places(&w.shape, level).into_iter().find(|(_, p)| *p == place).map(|(c, _)| c),
        };
        let mut known = None;
        for (i, v) in values.iter().enumerate() {
            let sector = first + i as u64;
            let place = (sector / spc) as u32;
            if known.is_none_or(|(p, _)| p != place) {
                known = Some((place, owner(self, place)));
            }
            let Some((_, Some(cluster))) = known else { continue };
            let at = u64::from(cluster) * spc + sector % spc;
            if at < self.shape.sectors {
                let horizon = self.oracle.flushed;
                self.must_admit(at, *v, horizon, format_args!("write to place {place} of the target"));
            }
        }
    }

    /// Contents that a power cut may leave in a sector of the device below the top.
    pub fn possible_below(&self, sector: u64, out: &mut Vec<Stamp>) {
        let top = self.shape.top();
        let file_sector = self.merging.as_ref().and_then(|m| {
            let (spc, level) = (self.shape.spc, m.level);
            if self.shape.levels[level].raw.is_some() {
                return Some(sector);
            }
            let cluster = (sector / spc) as u32;
            let entry = self.chain.entry_in(self.chain.files[level].read(bat_sector(cluster)), cluster);
            let place = self.shape.place(entry).filter(|_| entry != 0)?;
            Some(u64::from(place) * spc + sector % spc)
        });
        match (file_sector, &self.merging) {
            (Some(at), Some(m)) => self.possible_in(m.level, at, out),
            _ => out.push(self.chain.read_below(&self.shape, top, sector)),
        }
    }

    /// The engine has closed well; if top and target agree the target becomes the top. False: the top has to be closed.
    pub fn finish_merge(&mut self, pages: Vec<(u32, Box<[u8; BAT_PAGE]>)>) -> bool {
        let Some(level) = self.merging.as_ref().filter(|m| m.told == Some(Ok(()))).map(|m| m.level) else {
            self.merging = None;
            return false;
        };
        self.now += 1;
        if self.settings.sync_error > 0 && self.rng.below(4) == 0 {
            self.chain.files[level].sync_failed(self.now, &mut self.rng);
            self.cover.hit("target could not be synced");
            self.merging = None;
            return false;
        }
        self.chain.files[level].synced(self.now);
        let mut outage = Outage::Fresh;
        for (page, data) in pages {
            for i in 0..8u64 {
                let sector = u64::from(page) * 8 + i;
                if sector >= u64::from(self.shape.levels[level].first_data) * self.shape.spc {
                    break;
                }
                let mut bytes = self.chain.arena.borrow().bytes(self.chain.files[level].read(sector));
                let skip = if sector == 0 { 64 } else { 0 };
                bytes[skip..].copy_from_slice(&data[i as usize * 512 + skip..(i as usize + 1) * 512]);
                let value = self.chain.arena.borrow_mut().intern(&bytes);
                self.serial += 1;
                self.chain.files[level].land(sector, value, self.serial);
                self.now += 1;
                self.chain.files[level].finished(sector..sector + 1, self.serial, self.now);
            }
            if self.interrupted(&mut outage) {
                self.cover.hit("merge interrupted while it was being finished");
                return true;
            }
        }
        self.now += 1;
        self.chain.files[level].synced(self.now);
        if self.interrupted(&mut outage) {
            self.cover.hit("merge interrupted before its commit");
            return true;
        }
        self.compare_with_merged();
        self.shape.levels.pop();
        self.chain.files.pop();
        self.lower_owner.pop();
        self.owners = None;
        self.last_owner.clear();
        self.merging = None;
        self.cover.hit("merge finished");
        self.settle(self.now, "after a merge", self.now);
        true
    }

    fn compare_with_merged(&mut self) {
        let mut merged = self.shape.clone();
        merged.levels.pop();
        for sector in 0..self.shape.sectors {
            let before = self.chain.read(&self.shape, sector, true);
            let after = self.chain.read(&merged, sector, true);
            if before != after {
                self.fail(format!(
                    "merged: sector {sector} (cluster {}) was {} and is {}",
                    sector / self.shape.spc,
                    self.name(before),
                    self.name(after)
                ));
            }
        }
    }

    pub fn cover_merge_kill(&mut self) {
        let running = self.merging.as_ref().is_some_and(|m| m.told.is_none());
        let agreed = self.merging.as_ref().is_some_and(|m| m.told == Some(Ok(())));
        self.cover.hit_if(running, "kill during a merge");
        self.cover.hit_if(agreed, "kill of a merge that had come to agreement");
    }
}

/// What must have happened to merges in a set of runs.
pub const WANTED: &[&str] = &[
    "merge begun",
    "merge came to agreement",
    "merge came to agreement under load",
    "merge ended by closing",
    "merge ended by want of space",
    "merge ended by an error",
    "merge interrupted while it was being finished",
    "merge interrupted before its commit",
    "merge finished",
    "kill during a merge",
    "kill of a merge that had come to agreement",
    "power cut during a merge",
    "target could not be synced",
];

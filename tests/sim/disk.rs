//! A simulated file: what a reader sees now, and what could be found after a power cut.
//!
//! A sector's content is one number, its stamp: 0 is all zeroes, stamps with [`META`] name real bytes kept in an
//! [`Arena`] (header and BAT), stamps with [`POISON`] are rubbish that nobody may ever see.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use crate::testing::rng::Rng;

pub type Stamp = u64;
pub const META: Stamp = 1 << 63;
pub const POISON: Stamp = 1 << 62;
pub const SECTOR: u64 = 512;
const NEVER: u64 = u64::MAX;

/// The real bytes of the sectors whose bytes matter; equal contents have equal stamps.
#[derive(Default)]
pub struct Arena {
    blocks: Vec<[u8; 512]>,
    known: HashMap<[u8; 512], Stamp>,
}

impl Arena {
    pub fn intern(&mut self, bytes: &[u8]) -> Stamp {
        let mut block = [0; 512];
        block.copy_from_slice(bytes);
        if block == [0; 512] {
            return 0;
        }
        if let Some(stamp) = self.known.get(&block) {
            return *stamp;
        }
        let stamp = META | self.blocks.len() as u64;
        self.blocks.push(block);
        self.known.insert(block, stamp);
        stamp
    }

    /// The bytes of a sector; rubbish for a sector that never held bytes.
    pub fn bytes(&self, stamp: Stamp) -> [u8; 512] {
        match stamp {
            0 => [0; 512],
            s if s & META != 0 => self.blocks[(s & !META) as usize],
            _ => [0xdb; 512],
        }
    }
}

/// A change of one sector (or of the length) that no sync covers yet.
#[derive(Clone, Copy)]
struct Change {
    value: u64,
    op: u64,
    /// When its operation ended; `NEVER` while in flight.
    done: u64,
}

#[derive(Clone, Default)]
pub struct SimFile {
    /// Sectors.
    len: u64,
    now: Vec<Stamp>,
    durable: Vec<Stamp>,
    durable_len: u64,
    changes: Vec<Vec<Change>>,
    changed: BTreeSet<u64>,
    lens: Vec<Change>,
}

impl SimFile {
    /// A file of so many sectors, full of rubbish.
    pub fn new(len: u64) -> SimFile {
        let mut f = SimFile { len, durable_len: len, ..SimFile::default() };
        f.reach(len);
        f
    }

    fn reach(&mut self, len: u64) {
        if (self.now.len() as u64) < len {
            // What lies beyond the end of a file is rubbish until the file is extended over it.
            self.now.resize(len as usize, POISON | 0xe0f);
            self.durable.resize(len as usize, POISON | 0xe0f);
            self.changes.resize(len as usize, Vec::new());
        }
    }

    /// Length in sectors.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The shortest length that a power cut could leave.
    pub fn least_len(&self) -> u64 {
        self.lens.iter().map(|c| c.value).chain([self.durable_len]).min().unwrap_or(0)
    }

    /// Sets a sector while an image is being built.
    pub fn preset(&mut self, sector: u64, value: Stamp) {
        self.now[sector as usize] = value;
        self.durable[sector as usize] = value;
    }

    pub fn read(&self, sector: u64) -> Stamp {
        assert!(sector < self.len, "read beyond the end, which the caller has to check");
        self.now[sector as usize]
    }

    /// The stable content; rubbish beyond the stable length.
    pub fn read_durable(&self, sector: u64) -> Stamp {
        if sector < self.durable_len { self.durable[sector as usize] } else { POISON | 0xdead }
    }

    /// A write of one sector lands.
    pub fn land(&mut self, sector: u64, value: Stamp, op: u64) {
        self.now[sector as usize] = value;
        self.changes[sector as usize].push(Change { value, op, done: NEVER });
        self.changed.insert(sector);
    }

    /// The file grows to `len`; what comes in reads as zero.
    pub fn extend(&mut self, len: u64, op: u64) {
        if len <= self.len {
            return;
        }
        self.reach(len);
        for s in self.len..len {
            self.land(s, 0, op);
        }
        self.len = len;
        self.lens.push(Change { value: len, op, done: NEVER });
    }

    pub fn truncate(&mut self, len: u64, op: u64) {
        if len < self.len {
            self.len = len;
            self.lens.push(Change { value: len, op, done: NEVER });
        }
    }

    /// The operation that changed these sectors has ended.
    pub fn finished(&mut self, sectors: Range<u64>, op: u64, time: u64) {
        for s in sectors.start..sectors.end.min(self.changes.len() as u64) {
            for c in self.changes[s as usize].iter_mut().filter(|c| c.op == op) {
                c.done = time;
            }
        }
        for c in self.lens.iter_mut().filter(|c| c.op == op) {
            c.done = time;
        }
    }

    /// A sync issued at `issued` ends well.
    pub fn synced(&mut self, issued: u64) {
        self.end_sync(issued, |_| true);
    }

    /// A sync issued at `issued` fails: what it covered is on disk or lost, and no later sync will care.
    pub fn sync_failed(&mut self, issued: u64, rng: &mut Rng) {
        let permille = rng.pick(&[0, 0, 500, 900]);
        self.end_sync(issued, |_| rng.permille(permille));
    }

    fn end_sync(&mut self, issued: u64, mut keep: impl FnMut(u64) -> bool) {
        let sectors: Vec<u64> = self.changed.iter().copied().collect();
        for s in sectors {
            let list = &mut self.changes[s as usize];
            if let Some(last) = list.iter().rposition(|c| c.done < issued) {
                if keep(s) {
                    self.durable[s as usize] = list[last].value;
                }
                list.drain(..=last);
            }
            if list.is_empty() {
                self.changed.remove(&s);
            }
        }
        if let Some(last) = self.lens.iter().rposition(|c| c.done < issued) {
            if keep(u64::MAX) {
                self.durable_len = self.lens[last].value;
            }
            self.lens.drain(..=last);
        }
    }

    /// Every content that a power cut could leave in this sector (operations in flight not counted).
    pub fn possible(&self, sector: u64, out: &mut Vec<Stamp>) {
        if sector as usize >= self.durable.len() {
            out.push(POISON | 0xdead);
            return;
        }
        out.push(self.durable[sector as usize]);
        out.extend(self.changes[sector as usize].iter().map(|c| c.value));
    }

    /// The power fails: any subset of what is not stable persists.
    pub fn power_cut(&mut self, rng: &mut Rng) {
        let mode = rng.below(6);
        let salt = rng.next();
        let share = rng.pick(&[100u64, 500, 900]);
        let op_lives = |op: u64| Rng::new(op ^ salt).below(1000) < share;
        let sectors: Vec<u64> = self.changed.iter().copied().collect();
        for s in sectors {
            let list = std::mem::take(&mut self.changes[s as usize]);
            let survivor = match mode {
                0 => None,
                1 => list.last().copied(),
                2 | 3 => list.iter().rev().find(|c| op_lives(c.op)).copied(),
                _ => {
                    let i = rng.index(list.len() + 1);
                    (i > 0).then(|| list[i - 1])
                }
            };
            if let Some(c) = survivor {
                self.durable[s as usize] = c.value;
            }
        }
        self.changed.clear();
        let lens = std::mem::take(&mut self.lens);
        let survivor = match mode {
            0 => None,
            1 => lens.last().copied(),
            _ => lens.get(rng.index(lens.len() + 1)).copied(),
        };
        if let Some(c) = survivor {
            self.durable_len = c.value;
        }
        self.len = self.durable_len;
        self.now.clone_from(&self.durable);
    }
}

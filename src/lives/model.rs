//! What a disk must hold: for each block the values that it may have, now, after a crash, and in each snapshot.

use std::collections::{BTreeMap, BTreeSet};

use crate::format::guid::Guid;

/// Bytes of a block: each one has one value throughout.
pub const BLOCK: usize = 4096;

/// The values that a block may have.
type Values = BTreeSet<u8>;

/// What a snapshot may hold.
#[derive(Clone, Debug)]
pub struct Content {
    blocks: Vec<Values>,
    /// The operation that made it has succeeded.
    certain: bool,
}

impl Content {
    /// The first block that holds something else.
    pub fn differs(&self, blocks: &[Vec<u8>]) -> Option<String> {
        blocks.iter().zip(&self.blocks).enumerate().find_map(|(i, (bytes, allowed))| differs(i, bytes, allowed))
    }
}

fn differs(block: usize, bytes: &[u8], allowed: &Values) -> Option<String> {
    match bytes.iter().all(|b| *b == bytes[0]) && allowed.contains(&bytes[0]) {
        true => None,
        false => {
            let mut found: Vec<u8> = bytes.to_vec();
            found.dedup();
            Some(format!("block {block} holds {:?}, {allowed:?} wanted", &found[..found.len().min(4)]))
        }
    }
}

#[derive(Debug)]
pub struct Model {
    /// Values that a read may return.
    now: Vec<Values>,
    /// Values that may be found after a crash.
    durable: Vec<Values>,
    /// Writes that were answered since each flush began, by block.
    written: Vec<(usize, u8)>,
    next: u8,
    snapshots: BTreeMap<String, (Guid, Content)>,
    beginning: Option<(Guid, Content)>,
    /// What the program that uses the device has seen.
    pub error: Option<String>,
    /// The image may be marked in use.
    pub marked: bool,
}

impl Model {
    pub fn new(blocks: usize) -> Model {
        let zero = Values::from([0]);
        Model {
            now: vec![zero.clone(); blocks],
            durable: vec![zero; blocks],
            written: Vec::new(),
            next: 0,
            snapshots: BTreeMap::new(),
            beginning: None,
            error: None,
            marked: false,
        }
    }

    pub fn blocks(&self) -> usize {
        self.now.len()
    }

    /// The value of a new write, which may land from now on.
    pub fn begin_write(&mut self, block: usize) -> u8 {
        self.next = self.next % 250 + 1;
        let value = self.next;
        self.now[block].insert(value);
        self.durable[block].insert(value);
        if let Some((_, content)) = &mut self.beginning {
            content.blocks[block].insert(value);
        }
        value
    }

    pub fn end_write(&mut self, block: usize, value: u8, done: bool) {
        if done {
            self.now[block] = Values::from([value]);
            self.written.push((block, value));
        }
    }

    /// What the flush must make durable.
    pub fn begin_flush(&self) -> usize {
        self.written.len()
    }

    pub fn end_flush(&mut self, mark: usize, done: bool) {
        if !done {
            return;
        }
        let mark = mark.min(self.written.len());
        let covered: Vec<(usize, u8)> = self.written.drain(..mark).collect();
        let last: BTreeMap<usize, u8> = covered.into_iter().collect();
        for (block, value) in last {
            // What was written later may be there, too.
            let mut values = Values::from([value]);
            values.extend(self.written.iter().filter(|(b, _)| *b == block).map(|(_, v)| *v));
            values.extend(self.now[block].iter().copied());
            self.durable[block] = values;
        }
    }

    pub fn check_block(&self, block: usize, bytes: &[u8]) -> Option<String> {
        differs(block, bytes, &self.now[block])
    }

    /// All blocks; what may have several values has the one found from now on.
    pub fn check_now(&mut self, blocks: &[Vec<u8>]) -> Option<String> {
        for (i, bytes) in blocks.iter().enumerate() {
            if let Some(wrong) = differs(i, bytes, &self.now[i]) {
                return Some(wrong);
            }
            self.now[i] = Values::from([bytes[0]]);
            self.durable[i] = Values::from([bytes[0]]);
        }
        self.written.clear();
        None
    }

    /// What was not flushed may be lost.
    pub fn crash(&mut self) {
        if let Some((_, content)) = &mut self.beginning {
            // It may be made of what was left.
            content.blocks.iter_mut().zip(&self.durable).for_each(|(b, d)| b.extend(d));
        }
        self.now = self.durable.clone();
        self.written.clear();
    }

    pub fn begin_snapshot(&mut self, guid: Guid) {
        self.beginning = Some((guid, Content { blocks: self.now.clone(), certain: false }));
    }

    /// `there`: it was made, by the end of the operation; `certain`: that has succeeded.
    pub fn end_snapshot(&mut self, guid: &Guid, there: bool, certain: bool) {
        if let Some((guid, mut content)) = self.beginning.take().filter(|(g, _)| g == guid)
            && there
        {
            content.certain = certain;
            self.snapshots.insert(guid.to_string(), (guid, content));
        }
    }

    /// A merge of these has begun: they may go.
    pub fn begin_merge(&mut self, guids: &[Guid]) {
        for guid in guids {
            if let Some((_, content)) = self.snapshots.get_mut(&guid.to_string()) {
                content.certain = false;
            }
        }
    }

    /// A merge has removed it, or will.
    pub fn spoil(&mut self, guid: &Guid) {
        self.snapshots.remove(&guid.to_string());
    }

    /// Levels were merged that snapshots are made of.
    pub fn relevel(&mut self) {
        self.snapshots.clear();
    }

    /// After a power cut. Returns one that had to survive it.
    pub fn keep_snapshots(&mut self, there: &[Guid]) -> Option<Guid> {
        let lost = self.snapshots.values().find(|(guid, content)| content.certain && !there.contains(guid));
        let lost = lost.map(|(guid, _)| *guid);
        self.snapshots.retain(|_, (guid, _)| there.contains(guid));
        lost
    }

    pub fn snapshots(&self) -> Vec<(Guid, Content)> {
        self.snapshots.values().cloned().collect()
    }
}

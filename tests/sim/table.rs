//! The memory that survives a worker: the engine's shared table, with a log so that a kill can come between two stores.

use std::sync::{Arc, Mutex};

use crate::engine::api::{PROGRESS_WORDS, Shared, SyncState};

enum Undo {
    Slot(usize, u64),
    Progress(usize, u64),
    State(SyncState),
}

struct Inner {
    slots: Vec<u64>,
    progress: Vec<u64>,
    state: SyncState,
    undo: Vec<Undo>,
    /// One store in so many is forgotten (a broken table); 0: none.
    forget_one_in: u64,
    stores: u64,
}

#[derive(Clone)]
pub struct Table(Arc<Mutex<Inner>>);

impl Table {
    pub fn new(slots: usize, forget_one_in: u64) -> Table {
        Table(Arc::new(Mutex::new(Inner {
            slots: vec![Self::FREE; slots],
            progress: vec![0; PROGRESS_WORDS],
            state: SyncState::Idle,
            undo: Vec::new(),
            forget_one_in,
            stores: 0,
        })))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn begin_step(&self) {
        self.lock().undo.clear();
    }

    /// Stores since `begin_step`.
    pub fn stores_in_step(&self) -> usize {
        self.lock().undo.len()
    }

    /// Slots stored to since `begin_step`.
    pub fn changed_slots(&self) -> Vec<usize> {
        self.lock().undo.iter().filter_map(|u| if let Undo::Slot(s, _) = u { Some(*s) } else { None }).collect()
    }

    /// The table as it was after the first `keep` stores of this step.
    pub fn rewind(&self, keep: usize) {
        let mut t = self.lock();
        while t.undo.len() > keep {
            match t.undo.pop() {
                Some(Undo::Slot(s, old)) => t.slots[s] = old,
                Some(Undo::Progress(w, old)) => t.progress[w] = old,
                Some(Undo::State(old)) => t.state = old,
                None => {}
            }
        }
    }

    /// `(slot, cluster, entry)` of the slots in use.
    pub fn used(&self) -> Vec<(usize, u32, u32)> {
        let t = self.lock();
        let used = t.slots.iter().enumerate().filter(|(_, v)| **v != Self::FREE);
        used.map(|(i, v)| (i, (*v >> 32) as u32, *v as u32)).collect()
    }

    pub fn is_full(&self) -> bool {
        self.lock().slots.iter().all(|s| *s != Self::FREE)
    }

    pub fn force_state(&self, state: SyncState) {
        self.lock().state = state;
    }
}

impl Shared for Table {
    fn slots(&self) -> usize {
        self.lock().slots.len()
    }

    fn load(&self, slot: usize) -> u64 {
        self.lock().slots[slot]
    }

    fn store(&self, slot: usize, value: u64) {
        let mut t = self.lock();
        t.stores += 1;
        if t.forget_one_in != 0 && t.stores.is_multiple_of(t.forget_one_in) && value != Self::FREE {
            return;
        }
        let old = std::mem::replace(&mut t.slots[slot], value);
        t.undo.push(Undo::Slot(slot, old));
    }

    fn set_sync_state(&self, state: SyncState) {
        let mut t = self.lock();
        let old = std::mem::replace(&mut t.state, state);
        t.undo.push(Undo::State(old));
    }

    fn progress(&self, word: usize) -> u64 {
        self.lock().progress[word]
    }

    fn set_progress(&self, word: usize, value: u64) {
        let mut t = self.lock();
        let old = std::mem::replace(&mut t.progress[word], value);
        t.undo.push(Undo::Progress(word, old));
    }

    fn sync_state(&self) -> SyncState {
        self.lock().state
    }
}

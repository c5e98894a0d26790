//! Requests not answered yet, and slabs of what is in flight.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::api::{Errno, ReqId, RequestKind};

/// Hash for small integer keys that this program chooses, so that no user can make them collide.
#[derive(Default)]
pub struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.write_u32(u32::from(*b));
        }
    }

    fn write_u32(&mut self, n: u32) {
        let mixed = (self.0 ^ u64::from(n)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

/// A map with small integer keys.
pub type IntMap<K, V> = HashMap<K, V, BuildHasherDefault<Mix>>;

/// A part of a request that is to be worked on: device offset and length. Each counts in the request's `pending`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fragment {
    pub req: ReqId,
    pub off: u64,
    pub len: u64,
}

/// A request and what is left of it.
pub struct Req {
    pub kind: RequestKind,
    pub offset: u64,
    /// Fragments waiting and operations in flight.
    pub pending: u32,
    pub error: Option<Errno>,
}

/// Items in flight, with small numbers as keys.
pub struct Slab<T> {
    items: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub fn new() -> Self {
        Slab { items: Vec::new(), free: Vec::new() }
    }

    pub fn insert(&mut self, item: T) -> u32 {
        match self.free.pop() {
            Some(i) => {
                self.items[i as usize] = Some(item);
                i
            }
            None => {
                self.items.push(Some(item));
                (self.items.len() - 1) as u32
            }
        }
    }

    pub fn get(&self, id: u32) -> Option<&T> {
        self.items.get(id as usize)?.as_ref()
    }

    pub fn get_mut(&mut self, id: u32) -> Option<&mut T> {
        self.items.get_mut(id as usize)?.as_mut()
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.items.iter().flatten()
    }

    pub fn remove(&mut self, id: u32) -> Option<T> {
        let item = self.items.get_mut(id as usize)?.take()?;
        self.free.push(id);
        Some(item)
    }

    pub fn is_empty(&self) -> bool {
        self.free.len() == self.items.len()
    }
}

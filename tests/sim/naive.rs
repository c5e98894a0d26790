//! A model of the engine, one operation at a time: slow, simple, meant to be right. It shows that the simulation can be
//! passed, before and beside the real engine.

use std::collections::{HashMap, VecDeque};

use crate::engine::api::*;

use crate::table::Table;
use crate::world::Machine;

const EIO: Errno = 5;
const ENOSPC: Errno = 28;
const EDQUOT: Errno = 122;

#[derive(Clone, Debug)]
enum Todo {
    LoadPage {
        level: usize,
        page: u32,
    },
    /// Part of a request within a cluster: `at` and `len` in the cluster, `off` in the request.
    Part {
        cluster: u32,
        at: u64,
        len: u64,
        off: u64,
    },
    /// Content of the levels below, into a new host cluster.
    CopyUp {
        cluster: u32,
        host_cluster: u32,
        at: u64,
    },
    Op(Action),
    Publish {
        cluster: u32,
        host_cluster: u32,
    },
    Cycle,
    WritePage(u32),
    CycleDone,
    Answer,
    Closed,
}

pub struct Naive {
    c: Config,
    table: Table,
    /// Host clusters by level and cluster.
    maps: Vec<Vec<u32>>,
    slots: HashMap<u32, usize>,
    free: Vec<u32>,
    /// Host clusters that the entry on disk may still name.
    limbo: Vec<u32>,
    end: u32,
    queue: VecDeque<Request>,
    current: Option<Request>,
    todo: VecDeque<Todo>,
    waiting: Option<(OpId, Todo)>,
    /// The host cluster that the current write gets, until its entry is published.
    new_host_cluster: Option<u32>,
    blocked: bool,
    failed: bool,
    closing: bool,
    age: u32,
    next_op: u32,
    carried: Vec<Carried>,
    loaded: bool,
}

pub fn make(config: Config, carried: Vec<Carried>, table: Table) -> Box<dyn Machine> {
    let count = |l: &LevelConfig| match l {
        LevelConfig::Raw { .. } => 0,
        LevelConfig::Ploop { clusters, .. } => *clusters as usize,
    };
    Box::new(Naive {
        maps: config.levels.iter().map(|l| vec![0; count(l)]).collect(),
        table,
        slots: HashMap::new(),
        free: config.alloc.free.iter().cloned().flatten().collect(),
        limbo: Vec::new(),
        end: config.alloc.end,
        queue: VecDeque::new(),
        current: None,
        todo: VecDeque::new(),
        waiting: None,
        new_host_cluster: None,
        blocked: false,
        failed: config.failed,
        closing: false,
        age: 0,
        next_op: 0,
        carried,
        loaded: false,
        c: config,
    })
}

impl Naive {
    fn cluster(&self) -> u64 {
        1 << self.c.cluster_shift
    }

    fn top(&self) -> usize {
        self.c.levels.len() - 1
    }

    fn pages(&self, level: usize) -> u32 {
        match self.c.levels[level] {
            LevelConfig::Raw { .. } => 0,
            LevelConfig::Ploop { clusters, .. } => (clusters + 16).div_ceil(1024),
        }
    }

    fn load(&mut self) {
        self.loaded = true;
        for level in 0..self.c.levels.len() {
            for page in 0..self.pages(level) {
                self.todo.push_back(Todo::LoadPage { level, page });
            }
        }
    }

    fn scale(&self) -> u32 {
        let v1 = matches!(self.c.levels[self.top()], LevelConfig::Ploop { v1: true, .. });
        if v1 { 1 << (self.c.cluster_shift - 9) } else { 1 }
    }

    fn loaded_page(&mut self, level: usize, page: u32, bytes: &[u8]) {
        let scale = self.scale();
        for (i, e) in bytes.chunks(4).enumerate() {
            let word = page * 1024 + i as u32;
            let cluster = word.wrapping_sub(16) as usize;
            if word >= 16 && cluster < self.maps[level].len() {
                self.maps[level][cluster] = u32::from_le_bytes([e[0], e[1], e[2], e[3]]) / scale;
            }
        }
        if level == self.top() && page + 1 == self.pages(level) {
            for c in std::mem::take(&mut self.carried) {
                self.maps[level][c.cluster as usize] = c.host_cluster;
                self.slots.insert(c.cluster, c.slot);
                if c.durable != 0 && c.durable != c.host_cluster {
                    self.limbo.push(c.durable);
                }
            }
        }
    }

    /// Where content below `level` comes from: the level and the offset in its file.
    fn source(&self, below: usize, cluster: u32, at: u64) -> Option<(usize, u64)> {
        for l in (0..below).rev() {
            match self.c.levels[l] {
                LevelConfig::Raw { bytes } => {
                    let off = u64::from(cluster) * self.cluster() + at;
                    return (off < bytes).then_some((l, off));
                }
                LevelConfig::Ploop { .. } => {
                    if let Some(p) = self.maps[l].get(cluster as usize).filter(|p| **p != 0) {
                        return Some((l, u64::from(*p) * self.cluster() + at));
                    }
                }
            }
        }
        None
    }

    /// Bytes of content from `at` on that the same level holds (a raw base may end within a cluster).
    fn run(&self, level: usize, off: u64, len: u64) -> u64 {
        match self.c.levels[level] {
            LevelConfig::Raw { bytes } => len.min(bytes - off),
            LevelConfig::Ploop { .. } => len,
        }
    }

    fn part(&mut self, r: Request, cluster: u32, at: u64, len: u64, off: u64, out: &mut Vec<Action>) {
        let (size, top, op) = (self.cluster(), self.top(), OpId(0));
        let raw = matches!(self.c.levels[top], LevelConfig::Raw { .. });
        let host_cluster = if raw { cluster } else { self.maps[top][cluster as usize] };
        let mapped = (raw || host_cluster != 0).then_some(u64::from(host_cluster) * size);
        let file_off = mapped.unwrap_or(0) + at;
        match (r.kind, mapped) {
            (RequestKind::Read, _) => {
                let from = if mapped.is_some() { Some((top, file_off)) } else { self.source(top, cluster, at) };
                let n = from.map_or(0, |(l, o)| self.run(l, o, len));
                if n < len {
                    out.push(Action::ZeroFill { req: r.id, off: off + n, len: len - n });
                }
                if let Some((level, file_off)) = from {
                    let to = Buf::Request { req: r.id, off };
                    self.todo.push_front(Todo::Op(Action::Read { op, level: level as u8, file_off, len: n, to }));
                }
            }
            (RequestKind::Write, Some(_)) => {
                let from = Buf::Request { req: r.id, off };
                self.todo.push_front(Todo::Op(Action::Write { op, level: self.top() as u8, file_off, len, from }));
            }
            (RequestKind::Zero, Some(_)) if !raw && len == size && self.source(top, cluster, 0).is_none() => {
                self.todo.push_front(Todo::Publish { cluster, host_cluster: 0 });
            }
            (RequestKind::Zero, Some(_)) => {
                self.todo.push_front(Todo::Op(Action::ZeroRange { op, level: self.top() as u8, file_off, len }));
            }
            (RequestKind::Zero, None) if self.source(top, cluster, 0).is_none() => {}
            _ => self.allocate(r, cluster, at, len, off),
        }
    }

    fn allocate(&mut self, r: Request, cluster: u32, at: u64, len: u64, off: u64) {
        let (size, op) = (self.cluster(), OpId(0));
        let mut plan = Vec::new();
        let host_cluster = self.free.pop().unwrap_or(self.end);
        let base = u64::from(host_cluster) * size;
        if host_cluster == self.end {
            plan.push(Todo::Op(Action::Fallocate { op, level: self.top() as u8, file_off: base, len: size }));
        } else {
            plan.push(Todo::Op(Action::ZeroRange { op, level: self.top() as u8, file_off: base, len: size }));
        }
        self.new_host_cluster = Some(host_cluster);
        if len < size && self.source(self.top(), cluster, 0).is_some() {
            plan.push(Todo::CopyUp { cluster, host_cluster, at: 0 });
        }
        plan.push(Todo::Op(match r.kind {
            RequestKind::Zero => Action::ZeroRange { op, level: self.top() as u8, file_off: base + at, len },
            _ => Action::Write {
                op,
                level: self.top() as u8,
                file_off: base + at,
                len,
                from: Buf::Request { req: r.id, off },
            },
        }));
        plan.push(Todo::Publish { cluster, host_cluster });
        for t in plan.into_iter().rev() {
            self.todo.push_front(t);
        }
    }

    fn copy_up(&mut self, cluster: u32, host_cluster: u32, at: u64, out: &mut Vec<Action>) {
        let (op, size) = (OpId(0), self.cluster());
        let Some((level, file_off)) = self.source(self.top(), cluster, at).filter(|_| at < size) else { return };
        let len = u64::from(self.c.bounce_bytes).min(size - at);
        let n = self.run(level, file_off, len);
        let bounce = Buf::Bounce { id: BounceId(0), off: 0 };
        if n < len {
            out.push(Action::Overlay { bounce: BounceId(0), at: n as u32, from: None, len: (len - n) as u32 });
        }
        self.todo.push_front(Todo::CopyUp { cluster, host_cluster, at: at + len });
        let to = u64::from(host_cluster) * size + at;
        self.todo.push_front(Todo::Op(Action::Write { op, level: self.top() as u8, file_off: to, len, from: bounce }));
        self.todo.push_front(Todo::Op(Action::Read { op, level: level as u8, file_off, len: n, to: bounce }));
    }

    /// False: no slot, and a cycle has to come first.
    fn publish(&mut self, cluster: u32, host_cluster: u32) -> bool {
        let slot = self.slots.get(&cluster).copied();
        let slot = slot.or_else(|| (0..self.table.slots()).find(|s| self.table.load(*s) == Table::FREE));
        let Some(slot) = slot else { return false };
        self.table.store(slot, u64::from(cluster) << 32 | u64::from(host_cluster));
        self.slots.insert(cluster, slot);
        let top = self.top();
        let old = std::mem::replace(&mut self.maps[top][cluster as usize], host_cluster);
        if old != 0 {
            self.limbo.push(old);
        }
        self.new_host_cluster = None;
        true
    }

    fn page(&self, page: u32) -> Box<[u8; BAT_PAGE]> {
        let mut data = Box::new([0; BAT_PAGE]);
        for i in 0..1024 {
            let cluster = (page * 1024 + i as u32).wrapping_sub(16) as usize;
            let host_cluster = self.maps[self.top()].get(cluster).copied().unwrap_or(0);
            data[i * 4..i * 4 + 4].copy_from_slice(&(host_cluster * self.scale()).to_le_bytes());
        }
        if page == 0 {
            data[..64].copy_from_slice(&self.c.header);
        }
        data
    }

    fn plan(&mut self, r: Request) {
        match r.kind {
            RequestKind::Flush => self.todo.push_back(Todo::Cycle),
            _ => {
                let mut off = 0;
                while off < r.len {
                    let pos = r.offset + off;
                    let (cluster, at) = ((pos / self.cluster()) as u32, pos % self.cluster());
                    let len = (self.cluster() - at).min(r.len - off);
                    self.todo.push_back(Todo::Part { cluster, at, len, off });
                    off += len;
                }
            }
        }
        self.todo.push_back(Todo::Answer);
    }

    fn fail(&mut self, e: Errno, out: &mut Vec<Action>) {
        if let Some(p) = self.new_host_cluster.take().filter(|p| *p != self.end) {
            self.free.push(p);
        }
        let closing = self.todo.iter().any(|t| matches!(t, Todo::Closed));
        self.todo.clear();
        if let Some(r) = self.current.take() {
            out.push(Action::Reply { req: r.id, result: Err(e) });
        } else if closing {
            out.push(Action::Closed { result: Err(e) });
        }
    }

    fn pump(&mut self, out: &mut Vec<Action>) {
        if !self.loaded {
            self.load();
        }
        while self.waiting.is_none() && !self.blocked {
            let Some(t) = self.todo.pop_front() else {
                let Some(r) = self.queue.pop_front() else { break };
                let refused = !self.c.writable && matches!(r.kind, RequestKind::Write | RequestKind::Zero);
                self.current = Some(r);
                if refused {
                    self.fail(30, out);
                } else {
                    self.plan(r);
                }
                continue;
            };
            self.perform(t, out);
        }
        let idle = self.waiting.is_none() && self.todo.is_empty() && self.queue.is_empty();
        if idle && (self.closing || self.age > self.c.bat_age) {
            self.age = 0;
            self.todo.push_back(Todo::Cycle);
            if self.closing {
                self.closing = false;
                self.todo.push_back(Todo::Closed);
            }
            self.pump(out);
        }
    }

    fn perform(&mut self, t: Todo, out: &mut Vec<Action>) {
        self.next_op += 1;
        let id = OpId(self.next_op);
        let current = self.current;
        match t.clone() {
            Todo::LoadPage { level, page } => {
                self.waiting = Some((id, t));
                out.push(Action::ReadBat { op: id, level: level as u8, page, len: BAT_PAGE as u32 });
            }
            Todo::Part { cluster, at, len, off } => {
                if let Some(r) = current {
                    self.part(r, cluster, at, len, off, out);
                }
            }
            Todo::CopyUp { cluster, host_cluster, at } => self.copy_up(cluster, host_cluster, at, out),
            Todo::Op(mut action) => {
                match &mut action {
                    Action::Read { op, .. } | Action::Write { op, .. } | Action::Fallocate { op, .. } => *op = id,
                    Action::ZeroRange { op, .. } | Action::Sync { op, .. } => *op = id,
                    _ => {}
                }
                self.waiting = Some((id, t));
                out.push(action);
            }
            Todo::Publish { cluster, host_cluster } => {
                if !self.publish(cluster, host_cluster) {
                    self.todo.push_front(t);
                    self.todo.push_front(Todo::Cycle);
                }
            }
            Todo::Cycle if !self.c.writable => {}
            Todo::Cycle if self.failed => self.fail(EIO, out),
            Todo::Cycle => {
                self.table.set_sync_state(SyncState::Running);
                let mut pages: Vec<u32> = self.slots.keys().map(|c| (c + 16) / 1024).collect();
                pages.sort_unstable();
                pages.dedup();
                self.todo.push_front(Todo::CycleDone);
                if !pages.is_empty() {
                    self.todo.push_front(Todo::Op(Action::Sync { op: id, level: (self.c.levels.len() - 1) as u8 }));
                }
                for p in pages {
                    self.todo.push_front(Todo::WritePage(p));
                }
                self.todo.push_front(Todo::Op(Action::Sync { op: id, level: (self.c.levels.len() - 1) as u8 }));
            }
            Todo::WritePage(page) => {
                self.waiting = Some((id, t));
                out.push(Action::WriteBat {
                    op: id,
                    level: (self.c.levels.len() - 1) as u8,
                    page,
                    data: self.page(page),
                });
            }
            Todo::CycleDone => {
                self.table.set_sync_state(SyncState::Idle);
                let mut slots: Vec<usize> = self.slots.drain().map(|(_, slot)| slot).collect();
                slots.sort_unstable();
                slots.iter().for_each(|s| self.table.store(*s, Table::FREE));
                self.free.append(&mut self.limbo);
                self.age = 0;
            }
            Todo::Answer => {
                if let Some(r) = self.current.take() {
                    out.push(Action::Reply { req: r.id, result: Ok(()) });
                }
            }
            Todo::Closed => out.push(Action::Closed { result: Ok(()) }),
        }
    }

    fn ended(&mut self, op: OpId, result: Result<(), Errno>, out: &mut Vec<Action>) {
        let Some((_, t)) = self.waiting.take_if(|w| w.0 == op) else { panic!("{op:?} is unknown") };
        match (result, &t) {
            (Ok(()), Todo::Op(Action::Fallocate { .. })) => self.end += 1,
            (Ok(()), _) => {}
            (Err(ENOSPC | EDQUOT), _) => {
                self.todo.push_front(t);
                self.blocked = true;
            }
            (Err(_), Todo::LoadPage { .. }) => self.todo.push_front(t),
            (Err(e), Todo::WritePage(_) | Todo::Op(Action::Sync { .. })) => {
                self.failed = true;
                self.table.set_sync_state(SyncState::Failed);
                self.fail(e, out);
            }
            (Err(e), _) => self.fail(e, out),
        }
    }
}

impl Machine for Naive {
    fn step(&mut self, event: Event<'_>, out: &mut Vec<Action>) {
        match event {
            Event::Request(r) => self.queue.push_back(r),
            Event::Done { op, result } => self.ended(op, result, out),
            Event::BatRead { op, result } => {
                if let (Ok(bytes), Some((_, Todo::LoadPage { level, page }))) = (result, self.waiting.clone()) {
                    self.loaded_page(level, page, bytes);
                }
                self.ended(op, result.map(|_| ()), out);
            }
            Event::Tick => {
                self.blocked = false;
                self.age += u32::from(!self.slots.is_empty() && !self.failed);
            }
            // Never sent to this one: it holds writes for ever, and does no background work.
            Event::WaitForSpace(_) | Event::Background(_) | Event::GiveBack(_) | Event::Track(_) => {}
            Event::Close => self.closing = true,
        }
        self.pump(out);
    }

    fn holds_only_writes(&self) -> bool {
        false
    }

    fn status(&self) -> Status {
        let mut free = self.free.clone();
        let mut end = self.end;
        while let Some(i) = free.iter().position(|p| p + 1 == end) {
            free.swap_remove(i);
            end -= 1;
        }
        Status {
            no_space: self.blocked,
            failed: self.failed,
            alloc_end: end,
            free: free.len() as u32,
            dirty: self.slots.len() as u32,
            requests: self.queue.len() as u32 + u32::from(self.current.is_some()),
            ..Status::default()
        }
    }
}

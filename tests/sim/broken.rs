//! Ways to break the rules from outside: a simulation that does not find each of them proves nothing.

use std::collections::HashMap;

use crate::engine::api::*;

use crate::table::Table;
use crate::world::{Machine, Maker};

#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Break {
    None,
    /// A store to the shared table is lost now and then.
    ForgetStore,
    /// A write of which only some sectors arrived is reported as whole.
    TornWrite,
    /// Syncs do nothing.
    LazySync,
    /// Writes of a dead worker land while its successor runs.
    NoBarrier,
    /// The successor does not look at the shared table.
    LoseCarried,
    /// The successor takes a host cluster for free that the entry on disk still names.
    ReuseTooEarly,
    /// A host cluster in use is handed out as free.
    UsedAsFree,
    /// The successor does not hear of a failed sync.
    ForgetFailure,
    /// A flush is answered when it arrives.
    EarlyFlush,
    /// A zero request is answered when it arrives.
    EarlyZero,
    /// A zero request is taken for a discard and does nothing.
    NoZero,
    /// The first sync of a cycle is left out.
    NoDataSync,
    /// BAT pages hold changes younger than the data sync.
    EntryBeforeData,
    /// A failed sync is reported as done.
    SwallowSyncError,
    /// A failed BAT write is reported as done.
    SwallowBatError,
    /// BAT writes do nothing.
    NoBatWrite,
    /// A free host cluster is not zeroed.
    NoZeroRange,
    /// An answer is lost.
    LoseReply,
    /// A request is answered twice.
    TwoReplies,
    /// The header is written without the in-use mark.
    LoseInUse,
    /// Reads see the levels below, not the top, now and then.
    ReadBelow,
    /// The second sync of a cycle is left out.
    NoBatSync,
    /// A flush is answered when the cycle ends that ran when it arrived.
    JoinRunningCycle,
    /// A range is zeroed but for its last sector.
    ShortZero,
    /// Zeroes come up instead of what a lower level has.
    ForgetCopyUp,
    /// A failed read is reported as done.
    SwallowReadError,
    /// Flushes wait for space.
    HoldFlush,
    /// Time stands still.
    NoTick,
    /// After a failed sync a successor takes the BAT that it reads for the durable one.
    TrustBatAfterFailure,
    /// The in-use mark is not synced before the first write.
    UnsyncedMark,
}

pub const ALL: &[Break] = &[
    Break::ForgetStore,
    Break::TornWrite,
    Break::LazySync,
    Break::NoBarrier,
    Break::LoseCarried,
    Break::ReuseTooEarly,
    Break::UsedAsFree,
    Break::ForgetFailure,
    Break::EarlyFlush,
    Break::EarlyZero,
    Break::NoZero,
    Break::NoDataSync,
    Break::EntryBeforeData,
    Break::SwallowSyncError,
    Break::SwallowBatError,
    Break::NoBatWrite,
    Break::NoZeroRange,
    Break::LoseReply,
    Break::TwoReplies,
    Break::LoseInUse,
    Break::ReadBelow,
    Break::NoBatSync,
    Break::JoinRunningCycle,
    Break::ShortZero,
    Break::ForgetCopyUp,
    Break::SwallowReadError,
    Break::HoldFlush,
    Break::NoTick,
    Break::TrustBatAfterFailure,
    Break::UnsyncedMark,
];

/// First of the ids under which the engine knows requests that have been answered too early.
const EARLY: u32 = 1 << 10;

pub struct Broken {
    inner: Box<dyn Machine>,
    how: Break,
    table: Table,
    v1_scale: u32,
    early: HashMap<u32, ()>,
    next_early: u32,
    count: u64,
    /// Operations whose end is made up.
    made_up: Vec<OpId>,
    bat_since_sync: bool,
    syncs: HashMap<OpId, ()>,
    bats: HashMap<OpId, ()>,
    reads: HashMap<OpId, ()>,
    /// Flushes that the engine knows under another id, answered when a sync ends.
    joined: Vec<ReqId>,
    /// Flushes that the engine does not know yet.
    kept_back: Vec<Request>,
}

impl Broken {
    pub fn wrap(make: Maker, how: Break, config: Config, carried: Vec<Carried>, table: Table) -> Box<dyn Machine> {
        let v1 = matches!(config.levels.last(), Some(LevelConfig::Ploop { v1: true, .. }));
        let v1_scale = if v1 { 1 << (config.cluster_shift - 9) } else { 1 };
        Box::new(Broken {
            inner: make(config, carried, table.clone()),
            how,
            table,
            v1_scale,
            early: HashMap::new(),
            next_early: EARLY,
            count: 0,
            made_up: Vec::new(),
            bat_since_sync: false,
            syncs: HashMap::new(),
            bats: HashMap::new(),
            reads: HashMap::new(),
            joined: Vec::new(),
            kept_back: Vec::new(),
        })
    }

    /// The engine learns of a request that the user has been told is done.
    fn answer_early(&mut self, r: Request, out: &mut Vec<Action>) {
        out.push(Action::Reply { req: r.id, result: Ok(()) });
        self.under_other_id(r, out);
    }

    fn under_other_id(&mut self, mut r: Request, out: &mut Vec<Action>) {
        while self.early.contains_key(&self.next_early) {
            self.next_early += 1;
        }
        r.id = ReqId(self.next_early);
        self.next_early = if self.next_early > EARLY + 400 { EARLY } else { self.next_early + 1 };
        self.early.insert(r.id.0, ());
        self.inner(Event::Request(r), out);
    }

    fn inner(&mut self, event: Event<'_>, out: &mut Vec<Action>) {
        let mut actions = Vec::new();
        self.inner.step(event, &mut actions);
        for a in actions {
            self.filter(a, out);
        }
        while let Some(op) = self.made_up.pop() {
            self.inner(Event::Done { op, result: Ok(()) }, out);
        }
    }

    fn filter(&mut self, a: Action, out: &mut Vec<Action>) {
        self.count += 1;
        match a {
            Action::Reply { req, .. } if req.0 >= EARLY => drop(self.early.remove(&req.0)),
            Action::Reply { .. } if self.how == Break::LoseReply && self.count.is_multiple_of(400) => {}
            Action::Reply { .. } if self.how == Break::TwoReplies && self.count.is_multiple_of(400) => {
                out.extend([a.clone(), a])
            }
            Action::Sync { op, .. } if self.how == Break::NoDataSync && !self.bat_since_sync => {
                self.bat_since_sync = true;
                self.made_up.push(op);
            }
            Action::Sync { op, .. } if self.how == Break::NoBatSync && self.bat_since_sync => {
                self.bat_since_sync = false;
                self.made_up.push(op);
            }
            Action::Sync { op, .. } => {
                self.bat_since_sync = false;
                self.syncs.insert(op, ());
                out.push(a);
            }
            Action::WriteBat { op, .. } if self.how == Break::NoBatWrite => self.made_up.push(op),
            Action::WriteBat { op, level, page, mut data } => {
                self.bat_since_sync = self.how != Break::NoDataSync;
                self.bats.insert(op, ());
                if self.how == Break::LoseInUse && page == 0 {
                    data[44..48].fill(0);
                }
                if self.how == Break::EntryBeforeData {
                    for (_, cluster, host_cluster) in self.table.used() {
                        let word = cluster + 16;
                        if word / 1024 == page {
                            let at = (word % 1024 * 4) as usize;
                            data[at..at + 4].copy_from_slice(&(host_cluster * self.v1_scale).to_le_bytes());
                        }
                    }
                }
                out.push(Action::WriteBat { op, level, page, data });
            }
            Action::ZeroRange { op, .. } if self.how == Break::NoZeroRange => self.made_up.push(op),
            Action::Read { op, len, to: Buf::Request { req, off }, .. }
                if self.how == Break::ReadBelow && self.count.is_multiple_of(200) =>
            {
                out.push(Action::ZeroFill { req, off, len });
                self.made_up.push(op);
            }
            Action::ZeroRange { op, level, file_off, len } if self.how == Break::ShortZero && len > 512 => {
                out.push(Action::ZeroRange { op, level, file_off, len: len - 512 });
            }
            Action::Read { op, len, to: Buf::Bounce { id, off }, .. } if self.how == Break::ForgetCopyUp => {
                out.push(Action::Overlay { bounce: id, at: off, from: None, len: len as u32 });
                self.made_up.push(op);
            }
            Action::Read { op, .. } => {
                self.reads.insert(op, ());
                out.push(a);
            }
            other => out.push(other),
        }
    }
}

impl Machine for Broken {
    fn step(&mut self, event: Event<'_>, out: &mut Vec<Action>) {
        match event {
            Event::Request(r) if self.how == Break::EarlyFlush && r.kind == RequestKind::Flush => {
                self.answer_early(r, out)
            }
            Event::Request(r) if self.how == Break::EarlyZero && r.kind == RequestKind::Zero => {
                self.answer_early(r, out)
            }
            Event::Request(r) if self.how == Break::NoZero && r.kind == RequestKind::Zero => {
                out.push(Action::Reply { req: r.id, result: Ok(()) });
            }
            Event::Request(r)
                if self.how == Break::JoinRunningCycle && r.kind == RequestKind::Flush && !self.syncs.is_empty() =>
            {
                self.joined.push(r.id);
                self.under_other_id(r, out);
            }
            Event::Request(r)
                if self.how == Break::HoldFlush && r.kind == RequestKind::Flush && self.inner.status().no_space =>
            {
                self.kept_back.push(r);
            }
            Event::Tick if self.how == Break::NoTick => {}
            Event::Done { op, result } => {
                let synced = self.syncs.remove(&op).is_some();
                if synced && result.is_ok() {
                    out.extend(self.joined.drain(..).map(|req| Action::Reply { req, result: Ok(()) }));
                }
                let read = self.reads.remove(&op).is_some() && self.how == Break::SwallowReadError;
                let sync = synced && self.how == Break::SwallowSyncError;
                let bat = self.bats.remove(&op).is_some() && self.how == Break::SwallowBatError;
                let result = if sync || bat || read { Ok(()) } else { result };
                self.inner(Event::Done { op, result }, out);
            }
            other => self.inner(other, out),
        }
        if !self.inner.status().no_space {
            for r in std::mem::take(&mut self.kept_back) {
                self.inner(Event::Request(r), out);
            }
        }
    }

    fn status(&self) -> Status {
        let mut s = self.inner.status();
        s.requests = s.requests.saturating_sub(self.early.len() as u32);
        s.requests += (self.joined.len() + self.kept_back.len()) as u32;
        s
    }
}

//! The world around one engine: files, memory that survives, requests, operations in flight, time.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::ops::Range;

use crate::engine::api::*;

use crate::background::Session;
use crate::broken::Break;
use crate::copier::Copier;
use crate::cover::Cover;
use crate::disk::{POISON, SECTOR, Stamp};
use crate::image::{Chain, Shape};
use crate::oracle::Oracle;
use crate::table::Table;
use crate::testing::rng::Rng;

/// An engine, a model of one, or one that an adapter breaks.
pub trait Machine {
    fn step(&mut self, event: Event<'_>, actions: &mut Vec<Action>);
    fn status(&self) -> Status;
    /// One that works on one request at a time cannot keep the rule that only writes wait for space.
    fn holds_only_writes(&self) -> bool {
        true
    }
    /// It does background work.
    fn works_in_background(&self) -> bool {
        false
    }
}

pub type Maker = fn(Config, Vec<Carried>, Table) -> Box<dyn Machine>;

/// A rule was found violated.
pub struct Violation(pub String);

/// What a run is made of; all of it follows from the seed.
#[derive(Clone, Debug)]
pub struct Settings {
    pub writable: bool,
    pub bounces: u16,
    pub bounce_bytes: u32,
    pub map_pages: usize,
    pub bat_age: u32,
    pub ahead: u32,
    pub slots: usize,
    /// The file cannot grow by more than so many host clusters (as version 1 at 2^32 sectors).
    pub growth: Option<u32>,
    pub operations: u64,
    pub max_in_flight: usize,
    /// Weights of read, write, zero, flush.
    pub kinds: [u32; 4],
    /// In permille of the operations that end.
    pub read_error: u32,
    pub write_error: u32,
    pub bat_error: u32,
    pub sync_error: u32,
    /// Per 100,000 events.
    pub kill: u32,
    pub power: u32,
    pub close: u32,
    pub no_space: u32,
    /// Per 100,000 events: a copy begins.
    pub copy: u32,
    /// Per 100,000 events, where there is background work: space is given back.
    pub give_back: u32,
    /// In permille of the sessions.
    pub background: u32,
    /// Per 100,000 events.
    pub control: u32,
    /// Files share data.
    pub shares: bool,
    /// Without space overwrites fail too, as on a copy-on-write file system.
    pub cow: bool,
    /// The same of BAT writes, in permille, and of half as many syncs.
    pub metadata_full: u32,
    /// What is used up is a quota: EDQUOT instead of ENOSPC.
    pub quota: bool,
}

impl Settings {
    pub fn random(rng: &mut Rng, shape: &Shape, seed: u64) -> Settings {
        let cluster = 1u32 << shape.shift;
        let mut apart = Rng::new(seed ^ 0xf0_11);
        let errors = rng.below(5) == 0;
        let rate = |rng: &mut Rng, on: bool, rates: &[u32]| if on { rng.pick(rates) } else { 0 };
        Settings {
            writable: rng.below(16) != 0,
            bounces: rng.pick(&[1, 2, 2, 4]),
            bounce_bytes: rng.pick(&[4096, 8192, cluster / 2, cluster, cluster]),
            map_pages: rng.pick(&[1, 2, 2, 3, 16]),
            bat_age: rng.between(1, 5) as u32,
            ahead: rng.between(1, 4) as u32,
            slots: rng.pick(&[4, 5, 6, 8, 8, 64]),
            growth: (rng.below(20) == 0).then(|| rng.below(8) as u32),
            operations: 1000 + rng.below(200),
            max_in_flight: rng.pick(&[2, 8, 16, 16]),
            kinds: rng.pick(&[[40, 40, 10, 4], [20, 60, 10, 2], [30, 20, 40, 4], [30, 40, 5, 20], [30, 50, 20, 0]]),
            read_error: rate(rng, errors, &[0, 5, 20]),
            write_error: rate(rng, errors, &[0, 5, 20]),
            bat_error: rate(rng, errors, &[0, 0, 20]),
            sync_error: if rng.below(6) == 0 { rng.pick(&[10, 50]) } else { 0 },
            kill: rng.pick(&[0, 50, 200, 600]),
            power: rng.pick(&[0, 30, 100, 300]),
            close: rng.pick(&[0, 30, 100]),
            no_space: rng.pick(&[0, 0, 100, 300]),
            cow: rng.coin(),
            background: rng.pick(&[0, 0, 500, 900]),
            control: rng.pick(&[0, 0, 30, 200]),
            shares: rng.coin(),
            metadata_full: apart.pick(&[0, 400, 1000]),
            quota: apart.below(3) == 0,
            copy: apart.pick(&[0, 0, 200, 600]),
            give_back: apart.pick(&[0, 0, 300]),
        }
    }
}

/// A request not answered.
pub struct Req {
    pub what: Request,
    pub buf: Vec<Stamp>,
    /// When it arrived.
    pub start: u64,
    /// Names the request for good, unlike its id.
    pub serial: u64,
    /// Faults injected before it arrived: without a new one it must not fail.
    pub faults: u64,
    /// Writes did not wait for space at some time of its life.
    pub refusable: bool,
    /// There was no space at some time of its life.
    pub starved: bool,
    /// The engine now running has been told of it.
    pub sent: bool,
}

/// A file operation not ended.
pub struct Flight {
    pub op: OpId,
    pub act: Action,
    pub serial: u64,
    pub issued: u64,
    /// First sector in the file.
    pub first: u64,
    /// Which of its sectors have been transferred.
    pub landed: Vec<bool>,
}

pub struct World {
    pub rng: Rng,
    pub seed: u64,
    /// Moves at every event and action.
    pub now: u64,
    pub shape: Shape,
    pub settings: Settings,
    pub chain: Chain,
    /// The chain as it was made.
    pub origin: (Shape, Chain),
    /// The background work of this session.
    pub background: Option<Session>,
    /// A copy of the top's file that is being made.
    pub copier: Option<Copier>,
    /// Giving space back is to be refused.
    pub refused_next: bool,
    /// Of each lower level: which cluster lives at a host cluster.
    pub lower_owner: Vec<HashMap<u32, u32>>,
    pub oracle: Oracle,
    pub table: Table,
    pub maker: Maker,
    pub broken: Break,
    pub cover: Cover,

    pub engine: Option<Box<dyn Machine>>,
    pub flights: Vec<Flight>,
    pub bounces: Vec<Vec<Stamp>>,
    /// No host cluster at or beyond this.
    pub limit: u32,
    /// The header that the engine was given.
    pub header: [u8; 64],
    pub pages_read: HashSet<u32>,
    /// A clean close is due as soon as every request has been sent.
    pub want_close: bool,
    pub closing: bool,
    pub closed: Option<Result<(), Errno>>,
    /// A sync or BAT write failed and the engine was told, or was started so.
    pub failed: bool,
    /// Flush requests seen since the last BAT write (to see pages written by age).
    pub flushes_since_bat: u64,

    pub reqs: Vec<Option<Req>>,
    pub serial: u64,
    pub issued: u64,
    /// Errors injected so far.
    pub faults: u64,
    /// Pages of the BAT of which a read has failed, while others are under way.
    pub bad_pages: Vec<u32>,
    /// A read of the BAT has failed in this session.
    pub bat_read_error: bool,
    pub no_space: bool,
    /// The last BAT write or sync found no space.
    pub flush_starved: bool,
    /// Writes wait for space (the device is not being stopped).
    pub wait_for_space: bool,
    /// No new requests until everything has come to rest.
    pub quiet: bool,
    /// The engine was waiting for space after its last step.
    pub was_waiting: bool,
    /// The engine is the successor of a dead worker.
    pub took_over: bool,
    /// Write-back failures so far, and how many of them the witness has reported.
    pub write_back_errors: u64,
    pub witness_saw: u64,
    /// Clusters that requests changed since the last check of all that a power cut may leave.
    pub touched: BTreeSet<u32>,
    /// Cluster that an entry gave each host cluster to, last.
    pub last_owner: HashMap<u32, u32>,
    /// Operations of dead workers that a broken barrier lets through.
    pub ghosts: Vec<(u64, Stamp)>,
    /// Who may be named by the BAT after a power cut; rebuilt when the BAT moved.
    pub owners: Option<HashMap<u32, Vec<u32>>>,
    pub idle_ticks: u32,
    /// Host clusters no data write to which has ended yet, though one is in flight; and those that were so when the last sync
    /// began.
    pub unwritten: HashSet<u32>,
    pub unwritten_at_sync: HashSet<u32>,
    /// Sectors of the file that the operation changed whose end the engine is being told.
    pub ended: Range<u64>,
    /// Ticks for which a slot of the shared table has held the same.
    pub ages: HashMap<(usize, u32, u32), u32>,
    trace: Option<VecDeque<String>>,
}

impl World {
    pub fn new(seed: u64, maker: Maker, broken: Break, traced: bool) -> World {
        let mut rng = Rng::new(seed);
        let shape = Shape::random(&mut rng);
        let settings = Settings::random(&mut rng, &shape, seed);
        let chain = Chain::build(&shape, &mut rng);
        let lower_owner = owners_below(&shape, &chain);
        let oracle = Oracle::new(shape.sectors);
        let forget = if broken == Break::ForgetStore { 5 } else { 0 };
        let table = Table::new(settings.slots, forget);
        let mut w = World {
            rng,
            seed,
            now: 1,
            origin: (shape.clone(), chain.clone()),
            background: None,
            copier: None,
            refused_next: false,
            chain,
            lower_owner,
            oracle,
            table,
            maker,
            broken,
            cover: Cover::default(),
            engine: None,
            flights: Vec::new(),
            bounces: Vec::new(),
            limit: 0,
            header: [0; 64],
            pages_read: HashSet::new(),
            want_close: false,
            closing: false,
            closed: None,
            failed: false,
            flushes_since_bat: 0,
            reqs: (0..settings.max_in_flight).map(|_| None).collect(),
            serial: 16,
            issued: 0,
            faults: 0,
            bad_pages: Vec::new(),
            bat_read_error: false,
            no_space: false,
            flush_starved: false,
            wait_for_space: true,
            quiet: false,
            was_waiting: false,
            took_over: false,
            write_back_errors: 0,
            witness_saw: 0,
            touched: BTreeSet::new(),
            last_owner: HashMap::new(),
            ghosts: Vec::new(),
            owners: None,
            idle_ticks: 0,
            unwritten: HashSet::new(),
            unwritten_at_sync: HashSet::new(),
            ended: 0..0,
            ages: HashMap::new(),
            trace: traced.then(VecDeque::new),
            shape,
            settings,
        };
        w.cover_shape();
        w.say(|w| format!("{:?}\n{:?}", w.shape, w.settings));
        w
    }

    /// Of each lower level: which cluster lives at a host cluster.
    pub fn owners_below(&self) -> Vec<HashMap<u32, u32>> {
        owners_below(&self.shape, &self.chain)
    }

    fn cover_shape(&mut self) {
        let (shape, settings, cover) = (&self.shape, &self.settings, &mut self.cover);
        let top = shape.top();
        cover.hit_if(!settings.writable, "read-only");
        cover.hit_if(shape.levels[0].raw.is_some() && top > 0, "raw base");
        cover.hit_if(shape.raw_top(), "raw top");
        cover.hit_if(shape.v1 && !shape.raw_top(), "version 1");
        cover.hit_if(top >= 3, "four levels or more");
        cover.hit_if(shape.levels[0].clusters < shape.levels[top].clusters, "smaller lower level");
        cover.hit_if(shape.sectors % shape.spc != 0, "partial last cluster");
        cover.hit_if(settings.bounce_bytes < 1 << shape.shift, "bounce smaller than the cluster");
    }

    pub fn say(&mut self, text: impl FnOnce(&World) -> String) {
        if self.trace.is_some() {
            let line = format!("{:>6} {}", self.now, text(self));
            if std::env::var_os("SIM_LIVE").is_some() {
                eprintln!("{line}");
            }
            if let Some(t) = &mut self.trace {
                if t.len() >= 4000 {
                    t.pop_front();
                }
                t.push_back(line);
            }
        }
    }

    /// Ends the run: a rule is violated. No panic hook is called, the message is for the caller.
    pub fn fail(&self, what: impl Into<String>) -> ! {
        let mut text = format!("seed {}, time {}: {}", self.seed, self.now, what.into());
        if let Some(t) = &self.trace {
            let lines: Vec<&str> = t.iter().map(String::as_str).collect();
            text = format!("{}\n{text}", lines.join("\n"));
        }
        std::panic::resume_unwind(Box::new(Violation(text)))
    }

    pub fn fail_unless(&self, right: bool, what: impl FnOnce() -> String) {
        if !right {
            self.fail(what());
        }
    }

    /// Names what a stamp is, for messages.
    pub fn name(&self, v: Stamp) -> String {
        match v {
            0 => "zero".into(),
            v if v & POISON != 0 => format!("rubbish {v:#x}"),
            v => format!("write {} of sector {}", v >> 24, v & 0xff_ffff),
        }
    }

    pub fn outstanding(&self) -> usize {
        self.reqs.iter().flatten().count()
    }

    /// One event for the engine, and all that it asks for.
    pub fn feed(&mut self, event: Event<'_>) {
        self.now += 1;
        self.table.begin_step();
        let (begun, zeroed) = (self.now, self.zeroings());
        let mut actions = Vec::new();
        let Some(engine) = self.engine.as_mut() else { return };
        engine.step(event, &mut actions);
        if self.settings.kill > 0 && self.rng.below(400_000) < u64::from(self.settings.kill) {
            self.kill_inside(actions);
            return;
        }
        for action in actions {
            self.now += 1;
            self.act(action);
        }
        if self.engine.is_some() {
            self.note_first_writes(begun, &zeroed);
        }
        self.after_step();
    }

    /// The worker dies before or while its last step is carried out.
    fn kill_inside(&mut self, actions: Vec<Action>) {
        let stores = self.table.stores_in_step();
        let keep = self.rng.index(stores + 1);
        self.table.rewind(keep);
        let carried_out = if keep == stores { self.rng.index(actions.len() + 1) } else { 0 };
        for action in actions.into_iter().take(carried_out) {
            self.now += 1;
            self.act(action);
        }
        self.cover.hit("kill inside a step");
        self.kill();
    }

    fn after_step(&mut self) {
        let changed = self.table.changed_slots();
        if !changed.is_empty() {
            self.say(|w| format!("  table (slot, cluster, host cluster): {:?}", w.table.used()));
        }
        if !changed.is_empty() {
            self.check_reads_in_flight();
        }
        for slot in changed {
            self.check_slot(slot);
        }
        self.cover.hit_if(self.table.is_full(), "table full");
        let Some(engine) = &self.engine else { return };
        let status = engine.status();
        self.cover.hit_if(self.was_waiting && !status.no_space, "wait for space ended");
        self.was_waiting = status.no_space;
        if status.failed && !self.failed {
            // A page with changes of a dead worker that cannot be read is as bad as one that cannot be written.
            if !self.bat_read_error {
                self.fail("the device has failed, and no sync or BAT page had");
            }
            self.failed = true;
            self.cover.hit("failed by a BAT read error");
        }
        let sent = self.reqs.iter().flatten().filter(|r| r.sent).count();
        if status.requests as usize != sent {
            self.fail(format!("status counts {} requests, {sent} are not answered", status.requests));
        }
    }

    /// Bytes of the file of the top that data may be in.
    pub fn first_data_sector(&self) -> u64 {
        u64::from(self.shape.levels[self.shape.top()].first_data) * self.shape.spc
    }

    /// The virtual cluster of an operation between the files and a bounce buffer, as far as it can be told.
    pub fn copied_cluster(&self, f: &Flight) -> Option<u32> {
        let Action::Read { level, file_off, to: Buf::Bounce { .. }, .. } = f.act else { return None };
        if level as usize == self.shape.top() {
            return None;
        }
        let cluster = (file_off / SECTOR / self.shape.spc) as u32;
        match self.shape.levels[level as usize].raw {
            Some(_) => Some(cluster),
            None => self.lower_owner[level as usize].get(&cluster).copied(),
        }
    }
}

fn owners_below(shape: &Shape, chain: &Chain) -> Vec<HashMap<u32, u32>> {
    (0..shape.top())
        .map(|l| match shape.levels[l].raw {
            Some(_) => HashMap::new(),
            None => chain.host_clusters(shape, l).into_iter().map(|(c, p)| (p, c)).collect(),
        })
        .collect()
}

//! From the supervisor's first message to a core that can serve: files, locks, chain, engine, memory.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;

use nix::unistd::fdatasync;

use crate::bail;
use crate::chain::{self, Chain, LevelFile, Marked, OpenOptions};
use crate::descriptor::commit_by_fd::{self, CommitFds};
use crate::engine::Engine;
use crate::engine::api::{BackgroundConfig, BackgroundWork, Config, Shared, SyncState};
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::header::Version;
use crate::server::descriptors::{Descriptors, Received};
use crate::server::proto::{AttachRequest, WorkerReady, WorkerStart, own_greeting};
use crate::server::roles::duplicate;
use crate::server::runtime;
use crate::server::shm::Shm;
use crate::server::transport::{Geometry, Queue, Recovery};
use crate::server::unflushed;
use crate::sys::file_id::FileId;
use crate::sys::{host, process_hardening};
use crate::units::ClusterSize;

use super::core::{Core, CoreConfig, THREADS};
use super::memory::{BOUNCE, Memory, bounces};
use super::request_journal::{PriorJournal, RequestJournal};
use super::{grow, linger, locked, log, open_files, replay, top_sync};

/// Pages of the map kept in memory: 64 MiB at most, which map 8 million clusters.
const MAP_PAGES: usize = 8192;
/// Seconds after which a changed page of the BAT is written without a flush.
const BAT_AGE: u32 = 5;
/// The largest granularity of discards that the block device gets.
const MAX_BLOCK: u64 = 1 << 20;

/// What came with the first message, kept for a new supervisor.
#[derive(Debug)]
pub struct Inherited {
    pub start: WorkerStart,
    pub fds: Descriptors,
    /// Of the commit that this worker is to make.
    commit: Mutex<Option<CommitFds>>,
    /// The request journal of the worker before, if it left one.
    journal: Mutex<Vec<OwnedFd>>,
}

impl Inherited {
    pub fn new(start: WorkerStart, fds: Vec<OwnedFd>) -> Result<Inherited> {
        let Received { mut fds, journal, .. } = Descriptors::received(&start, fds)?;
        let commit = Mutex::new(fds.commit.take());
        Ok(Inherited { start, fds, commit, journal: Mutex::new(journal) })
    }

    /// Base first.
    pub fn levels(&self) -> &[OwnedFd] {
        &self.fds.levels
    }
}

/// A worker that is ready to start its threads.
pub struct Worker {
    pub core: Core,
    pub chain: Chain,
    pub ready: WorkerReady,
    pub sink: log::Sink,
    /// A change of the chain was made, but may not survive a power cut: why.
    pub warning: Option<String>,
    /// The merge that was to go on cannot: why.
    pub no_merge: Option<Error>,
}

/// Gets the memory for I/O, which takes longer than all the rest.
pub fn allocate_memory(inherited: &Inherited) -> Result<Memory> {
    let session = &inherited.start.session;
    let memory = Memory::new(
        THREADS,
        session.recovery() == Recovery::Journal,
        session.limits(),
        inherited.start.attach.levels.len(),
    )
    .ctx(Kind::Malloc, || "cannot get memory for I/O")?;
    if !host::is_simulated() {
        // The error is logged where there is a log.
        let _ = process_hardening::lock_memory();
    }
    Ok(memory)
}

/// Whether the worker before has closed the image already, and was killed before it could report that. Waits until the
/// last operation of that worker is over.
pub fn was_closed(inherited: &Inherited) -> Result<bool> {
    let start = &inherited.start;
    let (Some(fd), Some(name)) = (inherited.levels().last(), start.attach.levels.last()) else { return Ok(false) };
    if !start.takeover || start.adopts || start.succeed.is_some() || start.attach.read_only || name.raw {
        return Ok(false);
    }
    if !Shm::map(inherited.fds.shm.as_fd())?.is_closing() {
        return Ok(false);
    }
    let top = open_files::open(std::slice::from_ref(fd), std::slice::from_ref(name), true)?;
    open_files::lock(&top, std::slice::from_ref(fd), true, true, None, None)?;
    chain::is_closed(&top[0])
}

/// Opens everything. A successor waits here until the last operation of the former worker is over. `memory`: of
/// [`allocate_memory`], if it was called before.
pub fn open_all(inherited: &Inherited, memory: Option<Memory>) -> Result<Worker> {
    let attach = &inherited.start.attach;
    let succeed = inherited.start.succeed.as_ref();
    let new_top = succeed.is_some_and(|s| s.new_top);
    let writable = !attach.read_only;
    let shm = Shm::map(inherited.fds.shm.as_fd())?;
    // A retiring worker leaves the table empty: what is there comes from a successor that has served the new top.
    let takeover = inherited.start.takeover && (!new_top || !shm.carried().is_empty());
    let (log, sink) = log::new(&runtime::device_dir(&inherited.start.device_name).join(runtime::LOG), attach.trace);

    let mut files = open_files::open(inherited.levels(), &attach.levels, writable)?;
    let (target, mut no_merge) = open_merge_target(inherited, &mut files)?;
    if writable || attach.marked != Marked::Ignore {
        let finish = inherited.start.finish;
        let waits = takeover && !inherited.start.adopts;
        open_files::lock(&files, inherited.levels(), writable, waits, target, finish)
            .map_err(|e| better_reason(e, &files, attach))?;
    }
    adopt(inherited, &files, &shm, &log)?;
    if takeover {
        inspect_left(inherited, &shm, &log);
    }
    let failed = shm.failed() || shm.sync_state() == SyncState::Failed;
    let options = options(inherited, &shm, (takeover, target.is_some(), failed))?;
    // Before the chain is opened: that marks the image.
    let memory = memory.map_or_else(|| allocate_memory(inherited), Ok)?;
    let journal = own_journal(inherited, &memory)?;
    let left = prior_journal(inherited, &memory, &log)?;
    let queue = duplicate(&inherited.fds.queue)?;
    let linger = succeed.map_or(0, |s| s.linger);
    linger::pause(linger);
    // Opening may change the file's times: what cannot be taken over now can be later.
    let keep = |_: &Error| {
        if inherited.start.adopts {
            shm.beat()
        }
    };
    let grown = grow::grow_top(succeed.and_then(|s| s.grow), &files, inherited.levels(), &shm)?;
    let mut chain = chain::open(&files, &options).inspect_err(keep)?;
    let refused = (failed || chain.sync_failed)
        .then(|| Error::new(Kind::Fsync, "a sync of the top has failed: nothing is merged"));
    let background =
        begin_merge(inherited, &files, &mut chain, (target, options.ahead), refused, (&shm, &mut no_merge))?;
    linger::pause(linger);
    let warning = if grown { make_commit(inherited, &files, &chain, new_top && !takeover)? } else { None };
    if writable {
        shm.set_origin(unflushed::origin_of(&ids_of(&files)?));
    }
    let config = config_of(&chain, writable, failed, background);
    let ready = ready_of(&chain, &files);
    let mut engine = Engine::new(config, chain.carried.clone(), shm.clone());
    // The engine gets a tick once a second.
    engine.set_enospc_limit(attach.no_space_timeout.map(|s| s.min(u64::from(u32::MAX)) as u32));
    let core = Core::new(CoreConfig {
        queue: Queue::open(queue, inherited.start.session),
        memory,
        journal,
        engine,
        levels: files,
        witnesses: inherited.fds.witnesses.iter().map(duplicate).collect::<Result<_>>()?,
        geometry: Geometry { bytes: chain.device_bytes, block_bytes: chain.cluster.bytes().min(MAX_BLOCK) as u32 },
        cluster_bytes: chain.cluster.bytes(),
        writable,
        shm,
        log,
    })
    .ctx(Kind::Sys, || "cannot make an eventfd")?;
    if let Some(left) = left {
        replay::import(&core, &left)?;
    }
    // Not permitted: the device works, but not under memory pressure that it causes itself.
    if !host::is_simulated()
        && let Err(e) = process_hardening::lock_memory()
    {
        core.log.line(format!("memory is not locked: {e}"));
    }
    Ok(Worker { core, chain, ready, sink, warning, no_merge })
}

/// Makes the change permanent, if it has a descriptor. Returns a warning if that may not survive a power cut. `fresh`: no
/// process has written to the top yet.
fn make_commit(inherited: &Inherited, files: &[LevelFile], chain: &Chain, fresh: bool) -> Result<Option<String>> {
    let succeed = inherited.start.succeed.as_ref();
    let Some((succeed, names)) = succeed.and_then(|s| Some((s, s.commit.as_ref()?))) else { return Ok(None) };
    let Some(fds) = locked(&inherited.commit).take() else { bail!(Protocol, "the commit is made once") };
    let warning = commit_by_fd::commit(names, &fds).inspect_err(|_| {
        if let (true, Some(top)) = (fresh, files.last()) {
            // It stays what it was: an empty image outside of every chain.
            let _ = chain::close(top, chain, chain.alloc.end);
        }
    })?;
    // The lock on the disk is the supervisor's from here on.
    drop(fds);
    linger::pause(succeed.linger);
    Ok(warning)
}

/// The requests that the worker before has left.
fn prior_journal(inherited: &Inherited, memory: &Memory, log: &log::Log) -> Result<Option<PriorJournal>> {
    let left = std::mem::take(&mut *locked(&inherited.journal));
    if left.is_empty() {
        return Ok(None);
    }
    let prior = PriorJournal::open(left, memory)?;
    log.line("takes over the request journal of the worker before".into());
    Ok(Some(prior))
}

/// Where a successor finds this worker's requests, if the kernel does not send them again.
fn own_journal(inherited: &Inherited, memory: &Memory) -> Result<Option<RequestJournal>> {
    match inherited.start.session.recovery() {
        Recovery::Journal => {
            RequestJournal::create(memory).map(Some).ctx(Kind::Malloc, || "cannot get memory for requests")
        }
        Recovery::Kernel => Ok(None),
    }
}

/// How the chain is opened; `merges`: into a target that is marked, too.
fn options(inherited: &Inherited, shm: &Shm, (takeover, merges, failed): (bool, bool, bool)) -> Result<OpenOptions> {
    let attach = &inherited.start.attach;
    let own_mark = merges && attach.marked == Marked::Refuse && !host::breach("a merge's own mark is refused");
    let options = OpenOptions {
        writable: !attach.read_only,
        raw_cluster: attach.raw_cluster.map(|s| ClusterSize::from_sectors(u64::from(s))).transpose()?,
        marked: if own_mark { Marked::Recover } else { attach.marked },
        carried: takeover.then(|| shm.carried()),
        adopts: inherited.start.adopts,
        failed,
        known_below: inherited.start.succeed.is_some(),
        ..OpenOptions::default()
    };
    // The simulation's disks are small.
    Ok(if host::is_simulated() { OpenOptions { ahead: 64 << 10, ..options } } else { options })
}

/// Looks at what the worker before has left: requests that it may have exited of, and whether what it wrote is durable.
fn inspect_left(inherited: &Inherited, shm: &Shm, log: &log::Log) {
    // Always checked: write-back can fail without a sync by this worker, and the first process to see the error may exit
    // of it, after which only the witness still knows.
    let asked =
        inherited.start.attach.read_only || top_sync::ask(shm, &inherited.fds.witnesses, |w| fdatasync(w)).is_ok();
    if !asked {
        log.line("what the last worker wrote has not reached the disk: a sync or write-back has failed".into());
        shm.set_sync_state(SyncState::Failed);
    }
    shm.count_marked_requests();
}

/// Whether the changes that a killed device has left still belong to these files, now that they are locked; and what is
/// known of its last sync.
fn adopt(inherited: &Inherited, files: &[LevelFile], shm: &Shm, log: &log::Log) -> Result<()> {
    let Some(top) = files.last().filter(|_| inherited.start.adopts) else { return Ok(()) };
    if let Some(why) = unflushed::why_stale(shm, &top.file, top.raw)? {
        bail!(Busy, "image {} changed while it was being opened: {why}; try again", top.name.display());
    }
    // What is done to the image from here on is this worker's.
    shm.beat();
    log.line(format!("takes over {} changes of a device that was killed", shm.carried().len()));
    if shm.sync_state() == SyncState::Running || shm.is_asking() {
        if shm.begin_asking_file_system() && unflushed::file_system_is_sound(&top.file) {
            shm.end_asking();
        } else {
            log.line(
                "a sync was under way, and the file system has failed to write something: it counts as failed".into(),
            );
            shm.set_sync_state(SyncState::Failed);
        }
    }
    Ok(())
}

fn ids_of(files: &[LevelFile]) -> Result<Vec<FileId>> {
    files
        .iter()
        .map(|f| FileId::of(&f.file))
        .collect::<std::io::Result<_>>()
        .ctx(Kind::Fstat, || "cannot look at the images")
}

/// Opens the target of the merge under way, in its place among `files`; and why it cannot go on.
fn open_merge_target(inherited: &Inherited, files: &mut [LevelFile]) -> Result<(Option<usize>, Option<Error>)> {
    let Some((low, _)) = inherited.start.merged_levels() else { return Ok((None, None)) };
    let succeeds = inherited.start.succeed.is_some();
    match merge_target(inherited, low, !succeeds) {
        Ok((level, file)) => {
            files[level] = file;
            Ok((Some(level), None))
        }
        Err(e) if succeeds => Err(e),
        // The device matters more.
        Err(e) => Ok((None, Some(e))),
    }
}

/// The background work of the engine, if there is a merge that can go on; else `no_merge` says why, if there is one.
fn begin_merge(
    inherited: &Inherited,
    files: &[LevelFile],
    chain: &mut Chain,
    (target, ahead): (Option<usize>, u64),
    refused: Option<Error>,
    (shm, no_merge): (&Shm, &mut Option<Error>),
) -> Result<Option<BackgroundConfig>> {
    let begun = match (target, refused) {
        (None, _) => None,
        (Some(_), Some(why)) => Some(Err(why)),
        (Some(_), None) => match background(inherited, files, chain, ahead) {
            Err(e) if inherited.start.succeed.is_some() => return Err(e),
            other => Some(other),
        },
    };
    match begun {
        Some(Ok(work)) => {
            shm.begin_background(inherited.start.merge.as_ref().map_or(0, |m| m.token));
            Ok(Some(BackgroundConfig { work }))
        }
        other => {
            // This worker keeps no target equal: the progress of an earlier merge is void, even if a successor merges
            // again.
            shm.begin_background(0);
            if let Some(Err(e)) = other {
                *no_merge = Some(e);
            }
            Ok(None)
        }
    }
}

fn config_of(chain: &Chain, writable: bool, failed: bool, background: Option<BackgroundConfig>) -> Config {
    Config {
        cluster_shift: chain.cluster.shift(),
        device_bytes: chain.device_bytes,
        levels: chain.levels.clone(),
        writable,
        header: chain.header,
        alloc: chain.alloc.clone(),
        bounces: bounces(chain.levels.len()) as u16,
        bounce_bytes: BOUNCE as u32,
        map_pages: MAP_PAGES,
        bat_age: BAT_AGE,
        failed: failed || chain.sync_failed,
        background,
    }
}

fn ready_of(chain: &Chain, files: &[LevelFile]) -> WorkerReady {
    WorkerReady {
        device_bytes: chain.device_bytes,
        cluster_sectors: chain.cluster.sectors(),
        fmt_version: match chain.version {
            None => 0,
            Some(Version::V1) => 1,
            Some(Version::V2) => 2,
        },
        was_marked: chain.was_marked,
        direct: files.iter().all(|f| f.direct),
        greeting: own_greeting(),
    }
}

/// The target of the merge, opened for that. `wait` for the last operation of a dead worker.
fn merge_target(inherited: &Inherited, level: usize, wait: bool) -> Result<(usize, LevelFile)> {
    let names = &inherited.start.attach.levels;
    let (Some(fd), Some(name)) = (inherited.levels().get(level), names.get(level)) else {
        bail!(Param, "there is no level {level} in a chain of {} images", names.len());
    };
    Ok((level, open_files::open_target(fd, name, wait)?))
}

/// The merge that is under way, its target made ready.
fn background(inherited: &Inherited, files: &[LevelFile], chain: &mut Chain, ahead: u64) -> Result<BackgroundWork> {
    let Some((low, high)) = inherited.start.merged_levels() else { bail!(Protocol, "there is no merge") };
    let target = chain::open_target(files, chain, (low, high), ahead)?;
    let pages = chain::used_pages(files, chain, low + 1..=high)?;
    let top = high + 1 == files.len() && !inherited.start.attach.read_only;
    Ok(match top {
        true if low + 1 != high => {
            bail!(Param, "the running top is merged into the level below it, not into level {low}")
        }
        true => BackgroundWork::MergeTop { target, pages },
        false => BackgroundWork::MergeFrozen { high: high as u8, target, pages },
    })
}

/// Where a mark in use is refused, that error is more useful: the process that has the image locked has marked it.
fn better_reason(locked: Error, files: &[LevelFile], attach: &AttachRequest) -> Error {
    if attach.marked != Marked::Refuse {
        return locked;
    }
    let raw_cluster = attach.raw_cluster.and_then(|s| ClusterSize::from_sectors(u64::from(s)).ok());
    match chain::open(files, &OpenOptions { raw_cluster, ..OpenOptions::default() }) {
        Err(e) if e.kind() == Kind::InUse => e,
        _ => locked,
    }
}

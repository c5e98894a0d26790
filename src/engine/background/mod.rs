//! Background work: long work on the clusters of the chain while requests are served.
//!
//! This module has what all kinds of work share: the choice of the next cluster, copying or sharing it, publishing what
//! was done, pausing, cancelling, giving way to requests, and going on after the worker was killed. The kinds of work
//! ([`BackgroundWork`](super::api::BackgroundWork)):
//!
//! - [`merge_top`]: the writable top into the level below it. A copied cluster is kept equal in both files from then on.
//! - [`merge_frozen`]: frozen levels into the lowest of them.
//! - [`give_back`]: clusters of the top from the end of its file to free ones before it; then the file is cut. It begins
//!   by an event at any time, and is not taken over: a cut file and moved clusters are as good as any.
//!
//! It keeps these rules, beside those of the engine:
//!
//! - At every instant the chain as it was reads right: what is written into the target of a merge is hidden by the level
//!   that it came from, until the caller drops that level.
//! - Data before entry: a BAT page of the target has only entries whose copies had ended before the target's sync began
//!   ([`target`]).
//! - Progress is recorded in the shared table only when all below it is durable in the target, so that the next worker
//!   begins there and misses nothing.
//! - Memory is bounded whatever the size of the disk: BAT pages are read when the work reaches them and dropped after.

pub(super) mod give_back;
pub(super) mod merge_frozen;
pub(super) mod merge_top;
pub mod pages;
pub(super) mod target;

use super::api::{Action, BackgroundConfig, BackgroundControl, BackgroundWork, Errno, LevelConfig, SYNC_WORD, Shared};
use super::breach::{Breach, breaks};
use super::{CANCELED, Engine, Op};
use give_back::GiveBack;
use merge_frozen::MergeFrozen;
use merge_top::MergeTop;
use target::Target;

/// Ticks after the last request for which the device counts as busy.
const BUSY_TICKS: u8 = 2;
/// Copies in flight while requests come. With 4 a random writer kept a third of its rate, with 1 more than half.
const AT_ONCE_BUSY: usize = 1;

/// State of the work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackgroundState {
    Running,
    /// All is done and durable. A merged top is kept equal to its target until the engine is closed.
    Done,
    Failed(Errno),
}

/// A file operation of background work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum BackgroundOp {
    /// A BAT page of a source of a merge of frozen levels.
    SourcePage { level: u8, page: u32 },
    /// A BAT page of the target.
    TargetPage { page: u32 },
    /// The target's file grows.
    Grow,
    /// Step of a copy of a merge of frozen levels.
    Copy { copy: u32 },
    /// A sync of the target.
    Sync,
    /// A BAT page of the target is written.
    WritePage { page: u32 },
}

pub(super) enum Work {
    MergeTop(MergeTop),
    MergeFrozen(MergeFrozen),
    GiveBack(GiveBack),
}

/// Background work and how far it is.
pub struct Background {
    state: BackgroundState,
    paused: bool,
    /// Ticks for which the device still counts as busy.
    busy: u8,
    /// Requests that had come at the last tick.
    requests_seen: u64,
    /// Clusters copied or shared.
    copied: u64,
    /// Copies in flight.
    pub(super) copying: usize,
    pub(super) work: Work,
    /// Of a merge.
    pub(super) target: Option<Target>,
}

impl Background {
    pub fn new<S: Shared>(
        config: &BackgroundConfig,
        levels: &[LevelConfig],
        clusters: u64,
        shift: u32,
        shared: &S,
    ) -> Background {
        let (work, target) = match &config.work {
            BackgroundWork::MergeTop { target, pages } => {
                forget_doubtful_progress(shared);
                let work = Work::MergeTop(MergeTop::new(pages.clone(), shared));
                (work, Target::new(target, levels, clusters, shift, is_doubtful(shared)))
            }
            BackgroundWork::MergeFrozen { high, target, pages } => {
                let end = match levels.get(usize::from(*high)) {
                    Some(LevelConfig::Ploop { clusters: n, .. }) => u64::from(*n).min(clusters),
                    _ => 0,
                };
                forget_doubtful_progress(shared);
                let work = Work::MergeFrozen(MergeFrozen::new(*high, pages.clone(), end, shared));
                (work, Target::new(target, levels, end, shift, is_doubtful(shared)))
            }
        };
        Background {
            state: BackgroundState::Running,
            paused: false,
            busy: 0,
            requests_seen: 0,
            copied: 0,
            copying: 0,
            work,
            target,
        }
    }

    pub(super) fn is_running(&self) -> bool {
        self.state == BackgroundState::Running
    }

    pub(super) fn has_failed(&self) -> bool {
        matches!(self.state, BackgroundState::Failed(_))
    }

    /// Whether more copies may begin now: several at once on an idle device, one while requests come.
    pub(super) fn may_copy(&self, idle_limit: usize) -> bool {
        !self.paused && self.copying < if self.busy > 0 { AT_ONCE_BUSY } else { idle_limit.max(1) }
    }
}

/// The kernel may have reported a failed sync of the target to the killed worker only. So the next worker writes all
/// data once more, the BAT pages too. [`SYNC_WORD`] stays until a sync has covered that.
fn forget_doubtful_progress<S: Shared>(shared: &S) {
    if is_doubtful(shared) {
        (0..SYNC_WORD).for_each(|word| shared.set_progress(word, 0));
    }
}

/// The outcome of a sync of the target is unknown.
fn is_doubtful<S: Shared>(shared: &S) -> bool {
    shared.progress(SYNC_WORD) != 0 && !breaks(Breach::TrustTargetAfterKill)
}

impl<S: Shared> Engine<S> {
    /// State of the background work; `None`: there is none.
    pub fn background_state(&self) -> Option<BackgroundState> {
        self.background.as_ref().map(|b| b.state)
    }

    /// Clusters looked at and clusters copied so far.
    pub(super) fn background_progress(&self) -> (u64, u64) {
        let clusters = self.config.device_bytes.div_ceil(1 << self.config.cluster_shift);
        self.background.as_ref().map_or((0, 0), |b| {
            let seen = match &b.work {
                Work::MergeTop(m) => m.cursor(),
                Work::MergeFrozen(m) => m.cursor(),
                Work::GiveBack(g) => g.seen(b.copied, clusters),
            };
            (seen, b.copied)
        })
    }

    pub(super) fn control_background(&mut self, control: BackgroundControl, out: &mut Vec<Action>) {
        match control {
            BackgroundControl::Cancel => self.abort_background(CANCELED, out),
            BackgroundControl::Pause => self.background.iter_mut().for_each(|b| b.paused = true),
            BackgroundControl::Resume => self.background.iter_mut().for_each(|b| b.paused = false),
        }
    }

    /// Gives the work up. The device goes on: the chain is as it was.
    pub(super) fn abort_background(&mut self, errno: Errno, out: &mut Vec<Action>) {
        let Some(b) = &mut self.background else { return };
        if b.has_failed() || matches!(b.work, Work::GiveBack(_)) && !b.is_running() {
            return;
        }
        b.state = BackgroundState::Failed(errno);
        if b.target.is_some() && !breaks(Breach::KeepProgressOfFailed) {
            // From here on the target is not kept equal, and the outcome of a sync of it may be unknown: the next
            // worker that gets the same work begins anew. The cursor is cleared first.
            (0..SYNC_WORD).for_each(|word| self.pending.shared.set_progress(word, 0));
            self.pending.shared.set_progress(SYNC_WORD, 1);
        }
        match &mut b.work {
            Work::MergeTop(merge) => self.ready.extend(merge.release()),
            // Copies that wait for a buffer are dropped.
            Work::MergeFrozen(merge) => b.copying -= merge.release(),
            Work::GiveBack(_) => {}
        }
        if let Some(target) = &mut b.target {
            self.ready.extend(target.release());
        }
        out.push(match &b.work {
            Work::GiveBack(_) => Action::GaveBack { result: Err(errno) },
            _ => Action::BackgroundDone { result: Err(errno) },
        });
    }

    /// The engine is being closed: work that is not done is given up.
    pub(super) fn close_background(&mut self, out: &mut Vec<Action>) {
        if self.background_state() == Some(BackgroundState::Running) {
            self.abort_background(CANCELED, out);
        }
    }

    /// Once a second: notes whether requests have come, and publishes what was copied, so that after a kill the next
    /// worker goes on from there.
    pub(super) fn tick_background(&mut self) {
        let requests = self.requests_that_came();
        let Some(b) = &mut self.background else { return };
        let came = std::mem::replace(&mut b.requests_seen, requests) != requests;
        b.busy = if came { BUSY_TICKS } else { b.busy.saturating_sub(1) };
        if let Work::GiveBack(work) = &mut b.work {
            work.refill(b.busy > 0);
        }
        if let Some(target) = &mut b.target {
            target.publish_soon();
        }
    }

    /// Requests since the engine began.
    fn requests_that_came(&self) -> u64 {
        self.stats.reads + self.stats.writes + self.stats.zeroes + self.stats.flushes
    }

    /// A request has arrived: the device counts as busy for some ticks, in which fewer copies run at once.
    pub(super) fn background_gives_way(&mut self) {
        if let Some(b) = &mut self.background {
            b.busy = BUSY_TICKS;
        }
    }

    /// Starts what can be started.
    pub(super) fn advance_background(&mut self, out: &mut Vec<Action>) {
        match self.background.as_ref().map(|b| (b.state, &b.work)) {
            None | Some((BackgroundState::Failed(_), _)) => return,
            Some((_, Work::MergeTop(_))) => self.advance_merge_top(out),
            Some((BackgroundState::Running, Work::MergeFrozen(_))) => self.advance_merge_frozen(out),
            Some((BackgroundState::Running, Work::GiveBack(_))) => self.advance_give_back(out),
            Some((BackgroundState::Done, _)) => return,
        }
        self.advance_publish(out);
    }

    /// Everything is copied and durable.
    pub(super) fn background_done(&mut self, out: &mut Vec<Action>) {
        if let Some(b) = self.background.as_mut().filter(|b| b.is_running()) {
            b.state = BackgroundState::Done;
            out.push(Action::BackgroundDone { result: Ok(()) });
        }
    }

    /// A cluster has been copied or shared.
    pub(super) fn count_copied(&mut self, clusters: u64) {
        if let Some(b) = &mut self.background {
            b.copied += clusters;
        }
    }

    /// Nothing is left that has to be done before closing.
    pub(super) fn background_is_settled(&self) -> bool {
        let Some(b) = &self.background else { return true };
        match (&b.work, b.state) {
            (Work::MergeTop(merge), BackgroundState::Done) => {
                let published = b.target.as_ref().is_none_or(Target::is_final) || breaks(Breach::UnpublishedEnd);
                b.copying == 0 && merge.has_settled() && published
            }
            _ => b.copying == 0 && b.target.as_ref().is_none_or(Target::is_quiet),
        }
    }

    /// A file operation of background work has ended.
    pub(super) fn background_op_done(&mut self, op: BackgroundOp, result: Result<(), Errno>, out: &mut Vec<Action>) {
        match op {
            BackgroundOp::SourcePage { level, page } => {
                self.source_page_read(level, page, Err(result.err().unwrap_or(super::IO)), out)
            }
            BackgroundOp::TargetPage { page } => {
                self.target_page_read(page, Err(result.err().unwrap_or(super::IO)), out)
            }
            BackgroundOp::Grow => self.target_grown(result, out),
            BackgroundOp::Copy { copy } => self.frozen_copy_step(copy, result, out),
            BackgroundOp::Sync => self.target_synced(result, out),
            BackgroundOp::WritePage { page } => self.target_page_written(page, result, out),
        }
    }

    pub(super) fn start_background_op(&mut self, op: BackgroundOp) -> super::api::OpId {
        self.start(Op::Background(op))
    }

    /// The level that a merge writes to, and the end of its file: entries up to there are sound.
    pub(super) fn target_end(&self, level: u8) -> Option<u32> {
        let target = self.background.as_ref()?.target.as_ref()?;
        (target.level == level).then(|| target.file_end())
    }
}

//! What a change of the chain needs, checked against the chain that is running.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::OwnedFd;

use crate::bail;
use crate::descriptor::commit_by_fd::{self, CommitFds};
use crate::error::{IoContext, Kind, Result};
use crate::server::descriptors::{Descriptors, SwitchFds};
use crate::server::exclusion;
use crate::server::proto::{ChainSwitch, Marked, Succession, WorkerStart};
use crate::server::roles::{duplicate, duplicate_commit};
use crate::sys::file_id::FileId;
use crate::sys::host;
use crate::units::MAX_CHAIN;

/// What the worker that takes over gets.
pub struct Plan {
    pub start: WorkerStart,
    pub fds: Descriptors,
}

/// What the next change of the chain does to the merge.
#[derive(Debug)]
pub enum MergeTransition {
    /// `range`: target and highest level; none: the top into the level below it.
    Begin {
        then: ChainSwitch,
        commit: Option<CommitFds>,
        range: Option<(usize, usize)>,
    },
    End,
}

/// The chain that is running.
pub struct Planner<'a> {
    pub start: &'a WorkerStart,
    pub fds: &'a Descriptors,
    pub transition: Option<&'a MergeTransition>,
}

impl Planner<'_> {
    /// Checks a change against the running chain.
    pub fn plan(&self, switch: &ChainSwitch, sent: &SwitchFds, program: Option<OwnedFd>) -> Result<Plan> {
        let (fds, attach, name) = (self.fds, &self.start.attach, &self.start.device_name);
        if switch.expected != attach.ids {
            bail!(Param, "{name} serves another chain than the one to be changed; look at it with ploop list -a");
        }
        if switch.levels.is_empty() || switch.levels.len() > MAX_CHAIN || switch.token == 0 {
            bail!(Protocol, "a chain of {} images, change {:#x}", switch.levels.len(), switch.token);
        }
        let levels = self.planned_levels(switch, &sent.new)?;
        let commit = duplicate_commit(sent.commit.as_ref())?;
        let old_top = attach.levels.len() - 1;
        let top = switch.levels.len() - 1;
        let new_top = switch.levels[top].from != Some(old_top);
        if new_top && attach.read_only {
            bail!(Param, "{name} is read-only: it gets no new top");
        }
        let witnesses = match new_top {
            true => Descriptors::witnesses_of(Some(&levels[top]))
                .map_err(|e| e.context(switch.levels[top].name.path.display()))?,
            false => fds.witnesses.iter().map(duplicate).collect::<Result<_>>()?,
        };
        let mut start = self.start.clone();
        let (merge, ended) = self.planned_merge(switch, &mut start)?;
        let merge = duplicate_commit(merge)?;
        start.attach.levels = switch.levels.iter().map(|l| l.name.clone()).collect();
        start.attach.ids = switch.levels.iter().map(|l| l.id).collect();
        if start.attach.marked == Marked::Refuse && !host::breach("a merge's own mark is refused") {
            // The former top is marked until it is finished.
            start.attach.marked = Marked::Recover;
        }
        start.takeover = true;
        self.check_grow(switch, new_top)?;
        let (names, grow, linger) = (switch.commit.clone(), switch.grow, switch.linger);
        start.succeed = Some(Succession { wait: false, new_top, commit: names, grow, linger });
        // What was the top, or a merge's target, is a frozen level now, unless it is the new top.
        let (opened, frozen) = match self.start.merged_levels().filter(|_| ended) {
            // Of a read-only device the highest level is as frozen as the others.
            Some((target, _)) if attach.read_only => (target, top + 1),
            Some((target, _)) => (target, top),
            None => (old_top, top),
        };
        start.finish = switch.levels[..frozen].iter().position(|l| l.from == Some(opened));
        start.token = switch.token;
        let fds = Descriptors {
            queue: duplicate(&fds.queue)?,
            shm: duplicate(&fds.shm)?,
            witnesses,
            binary: program.map_or_else(|| duplicate(&fds.binary), Ok)?,
            listener: duplicate(&fds.listener)?,
            levels,
            commit,
            merge,
        };
        Ok(Plan { start, fds })
    }

    /// Descriptors of the new chain's levels: of the running chain, or the next ones of the `new` ones.
    fn planned_levels(&self, switch: &ChainSwitch, new: &[OwnedFd]) -> Result<Vec<OwnedFd>> {
        let mut new = new.iter();
        let mut levels = Vec::with_capacity(switch.levels.len());
        let writable = !self.start.attach.read_only;
        for (at, level) in switch.levels.iter().enumerate() {
            let shown = level.name.path.display();
            match level.from {
                Some(i) => match (self.fds.levels.get(i), self.start.attach.ids.get(i)) {
                    (Some(fd), Some(id)) if *id == level.id => levels.push(duplicate(fd)?),
                    _ => bail!(Param, "{shown} is not level {i} of {}", self.start.device_name),
                },
                None => {
                    let Some(fd) = new.next() else { bail!(Protocol, "{shown} was not sent") };
                    let meta = fd.try_clone().map(File::from).and_then(|f| f.metadata());
                    let meta = meta.ctx(Kind::Fstat, || format!("cannot look at {shown}"))?;
                    if !meta.is_file() || FileId::from(&meta) != level.id {
                        bail!(Open, "{shown} is not the regular file that was asked for");
                    }
                    levels.push(exclusion::open(duplicate(fd)?, writable && at + 1 == switch.levels.len()));
                }
            }
        }
        Ok(levels)
    }

    /// Only the top of the running chain grows, and only while no merge reads it.
    fn check_grow(&self, switch: &ChainSwitch, new_top: bool) -> Result<()> {
        let (name, attach) = (&self.start.device_name, &self.start.attach);
        if switch.grow.is_none() {
            return Ok(());
        }
        if attach.read_only {
            bail!(Param, "{name} is read-only: its image is not made larger");
        }
        if new_top || switch.levels.len() != attach.levels.len() {
            bail!(Protocol, "{name}: its chain is to change and to grow at once");
        }
        if self.start.merge.is_some() || self.transition.is_some() {
            bail!(Busy, "{name}: levels of it are being merged; wait for the end of that, or cancel it");
        }
        Ok(())
    }

    /// What becomes of a merge: the descriptors of the change that follows it, and whether it ends with this change.
    fn planned_merge(&self, switch: &ChainSwitch, start: &mut WorkerStart) -> Result<(Option<&CommitFds>, bool)> {
        let kept = switch.levels.iter().enumerate().all(|(i, l)| l.from == Some(i));
        let same = kept && switch.levels.len() == self.start.attach.levels.len();
        let ended = match (self.transition, &self.start.merge) {
            (Some(MergeTransition::Begin { then, commit, range }), _) => {
                start.merge = Some(then.clone());
                start.merge_range = *range;
                return Ok((commit.as_ref(), false));
            }
            (Some(MergeTransition::End), _) => true,
            (None, Some(m)) if m.token == switch.token => true,
            (None, Some(_)) if !same => {
                bail!(
                    Busy,
                    "{}: levels of it are being merged; wait for the end of that, or cancel it",
                    self.start.device_name
                )
            }
            _ => false,
        };
        if ended {
            start.merge = None;
            start.merge_range = None;
            return Ok((None, true));
        }
        Ok((self.fds.merge.as_ref(), false))
    }
}

/// The descriptor on disk is the new one.
pub fn is_committed(plan: &Plan) -> bool {
    let names = plan.start.succeed.as_ref().and_then(|s| s.commit.as_ref());
    match (names, &plan.fds.commit) {
        (Some(names), Some(fds)) => commit_by_fd::is_committed(names, fds).unwrap_or(true),
        _ => false,
    }
}

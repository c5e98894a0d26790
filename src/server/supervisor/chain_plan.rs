//! What a change of the chain needs, checked against the chain that is running.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::bail;
use crate::descriptor::commit_by_fd;
use crate::error::{IoContext, Kind, Result};
use crate::server::proto::{ChainSwitch, Marked, Succession, WorkerStart};
use crate::server::supervisor::Supervisor;
use crate::server::worker_process::Descriptors;
use crate::sys::file_id::FileId;
use crate::sys::host;
use crate::units::MAX_CHAIN;

/// What the worker that takes over gets.
pub(super) struct Plan {
    pub start: WorkerStart,
    pub fds: Descriptors,
}

/// What the next change of the chain does to the merge.
#[derive(Debug)]
pub enum MergeTransition {
    /// `range`: target and highest level; none: the top into the level below it.
    Begin {
        then: ChainSwitch,
        fds: Vec<OwnedFd>,
        range: Option<(usize, usize)>,
    },
    End,
}

impl Supervisor {
    /// Checks a change against the running chain.
    pub(super) fn plan(&self, switch: &ChainSwitch, sent: &[OwnedFd], program: Option<OwnedFd>) -> Result<Plan> {
        let Some(fds) = &self.fds else { bail!(Device, "{} is given up", self.record.name) };
        let attach = &self.start.attach;
        let name = &self.record.name;
        if switch.expected != attach.ids {
            bail!(Param, "{name} serves another chain than the one to be changed; look at it with ploop list -a");
        }
        let new = switch.levels.iter().filter(|l| l.from.is_none()).count();
        let commit = if switch.commit.is_some() { 2..=3 } else { 0..=0 };
        let fits = sent.len().checked_sub(new).is_some_and(|rest| commit.contains(&rest));
        if switch.levels.is_empty() || switch.levels.len() > MAX_CHAIN || !fits || switch.token == 0 {
            bail!(
                Protocol,
                "a chain of {} images, {new} of them new, with {} descriptors, change {:#x}",
                switch.levels.len(),
                sent.len(),
                switch.token
            );
        }
        let mut rest = sent.iter();
        let levels = self.planned_levels(switch, fds, &mut rest)?;
        let extra = rest.map(clone).collect::<Result<Vec<_>>>()?;
        let old_top = attach.levels.len() - 1;
        let top = switch.levels.len() - 1;
        let new_top = switch.levels[top].from != Some(old_top);
        if new_top && attach.read_only {
            bail!(Param, "{name} is read-only: it gets no new top");
        }
        let witness = match new_top {
            true => {
                let path = format!("/proc/self/fd/{}", levels[top].as_raw_fd());
                let shown = switch.levels[top].name.path.display();
                File::open(path).ctx(Kind::Open, || format!("cannot open {shown}"))?.into()
            }
            false => clone(&fds.witness)?,
        };
        let mut start = self.start.clone();
        let (merge, ended) = self.planned_merge(switch, fds, &mut start)?;
        let merge = merge.iter().map(clone).collect::<Result<Vec<_>>>()?;
        start.merge_fds = merge.len();
        start.attach.levels = switch.levels.iter().map(|l| l.name.clone()).collect();
        start.attach.ids = switch.levels.iter().map(|l| l.id).collect();
        if start.attach.marked == Marked::Refuse && !host::breach("a merge's own mark is refused") {
            // The former top is marked until it is finished.
            start.attach.marked = Marked::Recover;
        }
        start.takeover = true;
        start.succeed = Some(Succession { wait: false, new_top, commit: switch.commit.clone(), linger: switch.linger });
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
            queue: clone(&fds.queue)?,
            shm: clone(&fds.shm)?,
            witness,
            binary: program.map_or_else(|| clone(&fds.binary), Ok)?,
            listener: clone(&fds.listener)?,
            levels,
            extra,
            merge,
        };
        Ok(Plan { start, fds })
    }

    /// Descriptors of the new chain's levels: of the running chain, or the next ones of those that were `sent`.
    fn planned_levels<'a>(
        &self,
        switch: &ChainSwitch,
        fds: &Descriptors,
        sent: &mut impl Iterator<Item = &'a OwnedFd>,
    ) -> Result<Vec<OwnedFd>> {
        let mut levels = Vec::with_capacity(switch.levels.len());
        for level in &switch.levels {
            let shown = level.name.path.display();
            match level.from {
                Some(i) => match (fds.levels.get(i), self.start.attach.ids.get(i)) {
                    (Some(fd), Some(id)) if *id == level.id => levels.push(clone(fd)?),
                    _ => bail!(Param, "{shown} is not level {i} of {}", self.record.name),
                },
                None => {
                    let Some(fd) = sent.next() else { bail!(Protocol, "{shown} was not sent") };
                    let meta = fd.try_clone().map(File::from).and_then(|f| f.metadata());
                    let meta = meta.ctx(Kind::Fstat, || format!("cannot look at {shown}"))?;
                    if !meta.is_file() || FileId::from(&meta) != level.id {
                        bail!(Open, "{shown} is not the regular file that was asked for");
                    }
                    levels.push(clone(fd)?);
                }
            }
        }
        Ok(levels)
    }

    /// What becomes of a merge: the descriptors of the change that follows it, and whether it ends with this change.
    fn planned_merge<'a>(
        &'a self,
        switch: &ChainSwitch,
        fds: &'a Descriptors,
        start: &mut WorkerStart,
    ) -> Result<(&'a [OwnedFd], bool)> {
        let kept = switch.levels.iter().enumerate().all(|(i, l)| l.from == Some(i));
        let same = kept && switch.levels.len() == self.start.attach.levels.len();
        let ended = match (&self.merge_transition, &self.start.merge) {
            (Some(MergeTransition::Begin { then, fds, range }), _) => {
                start.merge = Some(then.clone());
                start.merge_range = *range;
                return Ok((fds, false));
            }
            (Some(MergeTransition::End), _) => true,
            (None, Some(m)) if m.token == switch.token => true,
            (None, Some(_)) if !same => {
                bail!(
                    Busy,
                    "{}: levels of it are being merged; wait for the end of that, or cancel it",
                    self.record.name
                )
            }
            _ => false,
        };
        if ended {
            start.merge = None;
            start.merge_range = None;
            return Ok((&[], true));
        }
        Ok((&fds.merge, false))
    }
}

fn clone(fd: &OwnedFd) -> Result<OwnedFd> {
    fd.try_clone().ctx(Kind::Sys, || "cannot duplicate a descriptor")
}

/// The descriptor on disk is the new one.
pub(super) fn is_committed(plan: &Plan) -> bool {
    let names = plan.start.succeed.as_ref().and_then(|s| s.commit.as_ref());
    match (names, &plan.fds.extra[..]) {
        (Some(names), [folder, new, ..]) => commit_by_fd::is_committed(names, folder, new).unwrap_or(true),
        _ => false,
    }
}

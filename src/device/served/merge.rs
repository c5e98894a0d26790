//! Merging the writable top of a running device into the level below it.
#![forbid(unsafe_code)]

use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::device::driver::{Unmerged, Watch};
use crate::device::model::Device;
use crate::device::served::switch::{add_commit, ask, chain_switch, commit_names, retained};
use crate::device::spec::{CommitFile, SwitchSpec};
use crate::error::{Error, Kind, Result};
use crate::server::helper::remote_error;
use crate::server::proto::{Answer, ChainSwitch, Command, MergeOrder};
use crate::server::roles::Outgoing;
use crate::server::{control, runtime};

/// Limit for the supervisor's answer to a question.
const SHORT: Duration = Duration::from_secs(10);

/// Merges the top of a running device into the level below it; then the device serves the chain without the top, and
/// `commit` is made. I/O goes on. The merge goes on also if the calling process exits; until its end the chain reads as
/// before. Returns a warning if the change may not survive a power cut.
///
/// After an error the device serves the chain it had.
pub fn merge_top(
    device: &Device,
    commit: Option<&CommitFile>,
    watch: &mut dyn Watch,
) -> Result<Option<String>, Unmerged> {
    let Some(rest) = device.images.len().checked_sub(1).filter(|n| *n > 0) else {
        let one = format!("{} has a chain of one image: nothing to merge", device.name());
        return Err(Unmerged::before(Error::new(Kind::Param, one)));
    };
    let mut out = Outgoing::default();
    if let Some(commit) = commit {
        add_commit(&mut out, commit);
    }
    let switch = ChainSwitch {
        levels: (0..rest).map(|i| retained(device, i)).collect::<Result<_>>().map_err(Unmerged::before)?,
        expected: device.ids(),
        commit: commit.map(commit_names),
        token: uuid::Uuid::new_v4().as_u64_pair().0 | 1,
        roles: out.roles,
        ..ChainSwitch::default()
    };
    watched(device, &Command::Merge(switch), &out.fds, watch)
}

/// Merges levels `low` to `high` of a running device, none of which is a writable top, into the lowest of them; then the
/// device serves the chain `then`. I/O goes on. Returns a warning as [`merge_top`] does. An interrupted merge leaves
/// the chain as it was; the same call finishes it.
pub fn merge_levels(
    device: &Device,
    (low, high): (usize, usize),
    then: &SwitchSpec,
    watch: &mut dyn Watch,
) -> Result<Option<String>, Unmerged> {
    let (switch, fds) = chain_switch(then, device).map_err(Unmerged::before)?;
    watched(device, &Command::MergeLevels(MergeOrder { low, high, switch }), &fds, watch)
}

/// Asks the supervisor for a merge. Meanwhile reports its progress to `watch` and cancels the merge if `watch` says so.
/// Returns a warning if the change may not survive a power cut.
fn watched(
    device: &Device,
    command: &Command,
    fds: &[BorrowedFd],
    watch: &mut dyn Watch,
) -> Result<Option<String>, Unmerged> {
    let name = device.name();
    let dir = runtime::device_dir(name);
    let (mut cancelled, mut warning) = (false, None);
    let mut waiting = || {
        if let Ok((Answer::Info { merging: Some((seen, all)), .. }, _)) = control::ask(&dir, &Command::Info, SHORT) {
            watch.progress(seen, all);
        }
        if watch.cancelled() && !cancelled {
            cancelled = control::ask(&dir, &Command::CancelMerge, SHORT).is_ok();
        }
    };
    let mut serving = |text: Option<&str>| warning = text.map(str::to_owned);
    match ask(name, command, fds, &mut || Ok(()), &mut serving, &mut waiting) {
        Ok(Answer::NotMerged { code, message, untouched }) => {
            Err(Unmerged { error: remote_error(code, message), untouched })
        }
        Ok(_) => Ok(warning),
        Err(error) => Err(Unmerged { error, untouched: false }),
    }
}

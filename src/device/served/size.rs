//! Making a running device larger.
#![forbid(unsafe_code)]

use std::time::Duration;

use crate::bail;
use crate::device::model::Device;
use crate::device::served::record;
use crate::device::served::switch::{add_commit, ask, commit_names, retained};
use crate::device::spec::CommitFile;
use crate::error::Result;
use crate::report::progress;
use crate::server::proto::{Answer, ChainSwitch, Command};
use crate::server::roles::Outgoing;
use crate::server::{control, runtime};

/// Limit for the supervisor's answer to a question.
const INFO: Duration = Duration::from_secs(2);

/// See [`set_size`](crate::device::set_size).
pub(super) fn set_size(
    device: &Device,
    sectors: u64,
    commit: Option<&CommitFile>,
    grown: &mut dyn FnMut(u64),
) -> Result<Option<String>> {
    let mut out = Outgoing::default();
    if let Some(commit) = commit {
        add_commit(&mut out, commit);
    }
    let command = Command::Grow(ChainSwitch {
        levels: (0..device.images.len()).map(|i| retained(device, i)).collect::<Result<_>>()?,
        expected: device.ids(),
        commit: commit.map(commit_names),
        token: uuid::Uuid::new_v4().as_u64_pair().0 | 1,
        grow: Some(sectors),
        roles: out.roles,
        ..ChainSwitch::default()
    });
    if let Some(unsupported) = record(device).refuse(&command) {
        bail!(
            Param,
            "{unsupported}; `ploop reload {}` has it served by the program that is installed now",
            device.name()
        );
    }
    let mut warning = None;
    let dir = runtime::device_dir(device.name());
    let mut waiting = || {
        // The disk grows in steps, after each of which its record has another size.
        if progress::is_shown()
            && let Ok((Answer::Info { record, .. }, _)) = control::ask(&dir, &Command::Info, INFO)
        {
            grown(record.size_sectors);
        }
    };
    let mut serving = |text: Option<&str>| warning = text.map(str::to_owned);
    ask(device.name(), &command, &out.fds, &mut || Ok(()), &mut serving, &mut waiting)?;
    Ok(warning)
}

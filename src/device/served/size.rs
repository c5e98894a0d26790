//! Making a running device larger.
#![forbid(unsafe_code)]

use crate::bail;
use crate::device::model::Device;
use crate::device::served::record;
use crate::device::served::switch::{add_commit, ask, commit_names, retained};
use crate::device::spec::CommitFile;
use crate::error::Result;
use crate::server::proto::{ChainSwitch, Command};
use crate::server::roles::Outgoing;

/// See [`set_size`](crate::device::set_size).
pub(super) fn set_size(device: &Device, sectors: u64, commit: Option<&CommitFile>) -> Result<Option<String>> {
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
    ask(device.name(), &command, &out.fds, &mut || Ok(()), &mut |text| warning = text.map(str::to_owned), &mut || {})?;
    Ok(warning)
}

//! Merging deltas that stand on each other into the lowest of them.

use std::path::{Path, PathBuf};

use super::recover;
use crate::bail;
use crate::descriptor::LockedDescriptor;
use crate::error::Result;
use crate::format::guid::Guid;
use crate::report;

/// What to merge. Nothing given: the top into its parent.
#[derive(Clone, Debug, Default)]
pub struct MergeParams {
    /// This snapshot into its parent, or down to `guid2`.
    pub guid: Option<Guid>,
    /// An ancestor of `guid`.
    pub guid2: Option<Guid>,
    /// Everything from the top to the base.
    pub all: bool,
    /// A new file for the result instead of the lowest delta's; it must not exist.
    pub new_delta: Option<PathBuf>,
}

/// Merges snapshots of a disk.
pub fn merge_snapshot(descriptor: &Path, component: &str, params: &MergeParams) -> Result<()> {
    let _ = component;
    let _operation = report::cancel::begin();
    let mut disk = LockedDescriptor::open(descriptor)?;
    recover::before_change(&mut disk)?;
    let top = disk.top;
    let (descendant, ancestor) = match (params.guid, params.guid2, params.all) {
        (None, Some(_), _) => bail!(Param, "a merge down to a snapshot needs the snapshot where it starts, too"),
        (Some(guid), Some(guid2), _) => (guid, guid2),
        (Some(guid), None, _) => (guid, parent(&disk, &guid)?),
        (None, None, true) => match disk.chain(&top)?.first() {
            Some(base) => (top, base.guid),
            None => bail!(DiskDescr, "descriptor: the top has no chain"),
        },
        (None, None, false) => (top, parent(&disk, &top)?),
    };
    range(&mut disk, &descendant, &ancestor, params.new_delta.as_deref())
}

fn parent(disk: &LockedDescriptor, guid: &Guid) -> Result<Guid> {
    match disk.parent(guid)? {
        Some(parent) => Ok(parent),
        None => bail!(Param, "snapshot {guid} is the base: there is nothing below to merge it into"),
    }
}

/// Merges `descendant` and all between into `ancestor`.
pub(super) fn range(
    disk: &mut LockedDescriptor,
    descendant: &Guid,
    ancestor: &Guid,
    _new_delta: Option<&Path>,
) -> Result<()> {
    disk.swallowed(descendant, ancestor)?;
    bail!(Param, "this version cannot merge yet")
}

/// Merges image files, the topmost first, into the last one (raw if `raw`), or into a new file. The sources stay.
pub fn merge_files(_images: &[PathBuf], _raw: bool, _new_delta: Option<&Path>) -> Result<()> {
    bail!(Param, "this version cannot merge yet")
}

//! The snapshots of a disk, for users and scripts.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::descriptor::{Descriptor, Image};
use crate::error::Result;
use crate::format::guid::{self, Guid};
use crate::report;

/// One snapshot, or the top.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub guid: Guid,
    /// The null GUID for the base.
    pub parent: Guid,
    /// What the disk stands on now: the top or, when snapshots alone are asked for, its parent.
    pub current: bool,
    /// An interrupted merge has changed its content.
    pub half_merged: bool,
    /// Absolute.
    pub file: PathBuf,
    pub temporary: bool,
    /// Of the image file; none if it cannot be looked at.
    pub space: Option<Space>,
}

/// What the file of a snapshot takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Length in bytes.
    pub size: u64,
    /// Bytes that the host's file system has allocated.
    pub used: u64,
    /// Last change, in seconds since 1970: of a snapshot, when the next one was taken on it.
    pub date: i64,
}

fn space(image: &Image) -> Option<Space> {
    let m = std::fs::symlink_metadata(&image.file).ok().filter(|m| m.is_file())?;
    Some(Space { size: m.len(), used: m.blocks() * 512, date: m.mtime() })
}

/// Which snapshots are wanted.
#[derive(Clone, Debug, Default)]
pub struct ListParams {
    /// This one and those below it, down to the base; none: all.
    pub guid: Option<Guid>,
    /// Leave the top out.
    pub snapshots_only: bool,
}

/// Snapshots in the descriptor's order; of one chain the upper first. Takes no lock: what is being changed meanwhile is
/// seen as it was or as it will be. A tree that is not sound is shown all the same, with a warning. `NoSnap` for a GUID
/// that the disk does not have.
pub fn snapshots(descriptor: &Path, params: &ListParams) -> Result<Vec<Row>> {
    let disk = Descriptor::read(descriptor)?;
    if let Err(e) = disk.check_tree() {
        // The user who repairs a descriptor by hand needs to see what is in it.
        report::warn(e.context(descriptor.display()));
    }
    for why in disk.snapshots.iter().filter_map(|s| disk.half_merged(&s.guid)) {
        report::warn(why);
    }
    let images: Vec<&Image> = match &params.guid {
        Some(guid) => disk.chain(guid).map_err(|e| e.context(descriptor.display()))?.into_iter().rev().collect(),
        None => disk.images.iter().collect(),
    };
    let parent = |guid: &Guid| disk.snapshot(guid).map_or(guid::NONE, |s| s.parent);
    let current = if params.snapshots_only { parent(&disk.top) } else { disk.top };
    let rows = images.into_iter().filter(|i| !params.snapshots_only || i.guid != disk.top).map(|image| Row {
        guid: image.guid,
        parent: parent(&image.guid),
        current: image.guid == current,
        half_merged: disk.snapshot(&image.guid).is_some_and(|s| s.spoiled),
        file: image.file.clone(),
        temporary: disk.snapshot(&image.guid).is_some_and(|s| s.temporary),
        space: space(image),
    });
    Ok(rows.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_branch_is_listed_from_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("DiskDescriptor.xml");
        std::fs::write(&path, include_str!("../descriptor/testdata/branched.xml")).unwrap();
        let disk = Descriptor::read(&path).unwrap();
        let all = snapshots(&path, &ListParams::default()).unwrap();
        assert_eq!(all.len(), disk.images.len());
        assert_eq!(all.iter().filter(|r| r.current).map(|r| r.guid).collect::<Vec<_>>(), [disk.top]);

        let only = snapshots(&path, &ListParams { guid: None, snapshots_only: true }).unwrap();
        assert_eq!(only.len(), all.len() - 1);
        let parent = disk.snapshot(&disk.top).unwrap().parent;
        assert_eq!(only.iter().filter(|r| r.current).map(|r| r.guid).collect::<Vec<_>>(), [parent]);

        let chain = snapshots(&path, &ListParams { guid: Some(disk.top), snapshots_only: false }).unwrap();
        assert_eq!(chain.first().unwrap().guid, disk.top);
        assert!(chain.last().unwrap().parent.is_none());
        let unknown = ListParams { guid: Some(Guid::generate()), snapshots_only: false };
        assert_eq!(snapshots(&path, &unknown).unwrap_err().code(), 43);
    }
}

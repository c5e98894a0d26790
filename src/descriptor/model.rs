//! The descriptor as data, with lookups and checks.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::bail;
use crate::error::{Error, Kind, Result};
use crate::format::geometry;
use crate::format::guid::{self, Guid};
use crate::sys::folder::Folder;
use crate::units::{ClusterSize, MAX_CHAIN};

/// What kind of image the base is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ImageMode {
    /// Clusters are allocated when written.
    Expanded,
    /// All clusters of the base were allocated when it was made.
    Preallocated,
    /// The base is the disk, byte for byte.
    Raw,
}

/// The root element of the file, which depends on the program line. Both are read; a store keeps the one that was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// `Parallels_disk_image`.
    Parallels,
    /// `Virtuozzo_disk_image`.
    Virtuozzo,
}

/// A delta.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Image {
    pub guid: Guid,
    /// Absolute.
    pub file: PathBuf,
}

/// Stages of the newer line's merge upwards. Such a delta is half merged: this program neither mounts nor stores it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReverseMerge {
    /// `TemporaryZero`.
    Zeroing,
    /// `TemporaryZeroSwap`.
    Swapped,
}

/// A snapshot: a node of the tree, with the image of the same GUID.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Snapshot {
    pub guid: Guid,
    pub parent: Guid,
    /// To be removed once no process uses it.
    pub temporary: bool,
    /// A merge that removes this snapshot has begun to change its content; until that merge is finished only the deltas
    /// above show what they should. Set with `temporary`.
    pub spoiled: bool,
    /// Set with `temporary`.
    pub reverse_merge: Option<ReverseMerge>,
}

/// A disk's descriptor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Descriptor {
    /// Folder of the file, resolved: images in it are stored by their names, and are looked up from it.
    pub dir: Folder,
    pub layout: Layout,
    /// A copy: the header of the top decides. 0 if the file has no valid size.
    pub size_sectors: u64,
    /// Geometry at creation; never updated.
    pub cylinders: u32,
    pub heads: u32,
    pub blocksize: ClusterSize,
    pub mode: ImageMode,
    /// Sectors; 0: no limit.
    pub max_delta_size: u64,
    /// In the file's order; the first one counts as the base.
    pub images: Vec<Image>,
    pub snapshots: Vec<Snapshot>,
    /// The writable top; in old files not the constant [`guid::TOP`].
    pub top: Guid,
}

impl Descriptor {
    /// A disk of one image.
    pub fn new_base(image: &Path, size_sectors: u64, blocksize: ClusterSize, mode: ImageMode) -> Result<Descriptor> {
        let Some(dir) = image.parent().filter(|_| image.is_absolute()) else {
            bail!(Param, "image path {}: must be absolute", image.display());
        };
        let g = geometry::chs(size_sectors);
        Ok(Descriptor {
            dir: Folder::new(dir),
            layout: Layout::Parallels,
            size_sectors,
            cylinders: g.cylinders,
            heads: g.heads,
            blocksize,
            mode,
            max_delta_size: 0,
            images: vec![Image { guid: guid::TOP, file: image.to_owned() }],
            snapshots: vec![Snapshot {
                guid: guid::TOP,
                parent: guid::NONE,
                temporary: false,
                spoiled: false,
                reverse_merge: None,
            }],
            top: guid::TOP,
        })
    }

    /// The first image of the file: new deltas are named after it, and it identifies the device.
    pub fn first_image(&self) -> Result<&Image> {
        self.images.first().ok_or_else(|| Error::new(Kind::DiskDescr, "a descriptor without images"))
    }

    pub fn image(&self, guid: &Guid) -> Option<&Image> {
        self.images.iter().find(|i| i.guid == *guid)
    }

    pub fn snapshot(&self, guid: &Guid) -> Option<&Snapshot> {
        self.snapshots.iter().find(|s| s.guid == *guid)
    }

    /// Whether another delta stands on this one.
    pub fn has_children(&self, guid: &Guid) -> bool {
        self.snapshots.iter().any(|s| s.parent == *guid)
    }

    /// Whether an image is raw in this disk: only the base can be, whatever `Type` the other images have.
    pub fn is_raw(&self, image: &Image) -> bool {
        self.mode == ImageMode::Raw && self.snapshot(&image.guid).is_some_and(|s| s.parent.is_none())
    }

    /// The images from the base to `guid`.
    pub fn chain(&self, guid: &Guid) -> Result<Vec<&Image>> {
        if self.snapshot(guid).is_none() {
            bail!(NoSnap, "no snapshot {guid} in the descriptor in {}", self.dir.display());
        }
        let mut chain = Vec::new();
        let mut at = *guid;
        loop {
            let mut snapshots = self.snapshots.iter().filter(|s| s.guid == at);
            let Some(snapshot) = snapshots.next() else {
                bail!(
                    DiskDescr,
                    "descriptor in {}: snapshot {at}, a parent in the chain of {guid}, is missing",
                    self.dir.display()
                );
            };
            let mut images = self.images.iter().filter(|i| i.guid == at);
            let Some(image) = images.next() else {
                bail!(DiskDescr, "descriptor in {}: snapshot {at} has no image", self.dir.display());
            };
            if snapshots.next().is_some() || images.next().is_some() {
                bail!(DiskDescr, "descriptor in {}: snapshot {at} is there twice", self.dir.display());
            }
            if snapshot.reverse_merge.is_some() {
                bail!(
                    DiskDescr,
                    "descriptor in {}: snapshot {at} is marked TemporaryZero, half merged by another program: that program \
                     must finish it",
                    self.dir.display()
                );
            }
            chain.push(image);
            if chain.len() > self.snapshots.len() {
                bail!(DiskDescr, "descriptor in {}: the chain of {guid} runs in a circle", self.dir.display());
            }
            if snapshot.parent.is_none() {
                break;
            }
            at = snapshot.parent;
        }
        if chain.len() > MAX_CHAIN {
            bail!(
                DiskDescr,
                "descriptor in {}: the chain of {guid} has {} images: at most {MAX_CHAIN}",
                self.dir.display(),
                chain.len()
            );
        }
        chain.reverse();
        Ok(chain)
    }

    /// The whole tree: every snapshot has one image and a way to the base, no file is named twice.
    pub fn check_tree(&self) -> Result<()> {
        let mut guids = HashSet::new();
        for snapshot in &self.snapshots {
            if !guids.insert(snapshot.guid) {
                bail!(DiskDescr, "descriptor in {}: snapshot {} is there twice", self.dir.display(), snapshot.guid);
            }
        }
        let mut files = HashSet::new();
        let mut images = HashSet::new();
        for image in &self.images {
            if !guids.contains(&image.guid) {
                bail!(
                    DiskDescr,
                    "descriptor in {}: image {} ({}) has no snapshot",
                    self.dir.display(),
                    image.guid,
                    image.file.display()
                );
            }
            if !images.insert(image.guid) {
                bail!(DiskDescr, "descriptor in {}: image {} is there twice", self.dir.display(), image.guid);
            }
            if !files.insert(&image.file) {
                bail!(DiskDescr, "descriptor in {}: file {} is named twice", self.dir.display(), image.file.display());
            }
        }
        let bases = self.snapshots.iter().filter(|s| s.parent.is_none()).count();
        if bases != 1 {
            bail!(
                DiskDescr,
                "descriptor in {}: {bases} snapshots have no parent: must be exactly one",
                self.dir.display()
            );
        }
        for snapshot in &self.snapshots {
            self.chain(&snapshot.guid)?;
        }
        Ok(())
    }

    /// Gives the top the constant GUID, as every program that stores a descriptor does.
    pub fn normalise_top(&mut self) -> Result<()> {
        let old = self.top;
        if old == guid::TOP {
            return Ok(());
        }
        if self.snapshot(&guid::TOP).is_some() || self.image(&guid::TOP).is_some() {
            bail!(
                DiskDescr,
                "descriptor in {}: TopGUID is {old}, and {} is another snapshot's",
                self.dir.display(),
                guid::TOP
            );
        }
        for image in self.images.iter_mut().filter(|i| i.guid == old) {
            image.guid = guid::TOP;
        }
        for snapshot in &mut self.snapshots {
            if snapshot.guid == old {
                snapshot.guid = guid::TOP;
            }
            if snapshot.parent == old {
                snapshot.parent = guid::TOP;
            }
        }
        self.top = guid::TOP;
        Ok(())
    }
}

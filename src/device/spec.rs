//! What to attach, and what a running device is to serve next.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use crate::bail;
use crate::chain::Marked;
use crate::error::{IoContext, Kind, Result};
use crate::sys::file_id::FileId;
use crate::sys::folder::Named;
use crate::units::ClusterSize;

/// One image of a chain.
#[derive(Debug)]
pub struct Level {
    /// As the user or the descriptor names it, absolute; for lists and messages only.
    pub path: PathBuf,
    pub raw: bool,
    /// The image itself, O_PATH: the worker opens the file that was checked, also if it is renamed meanwhile.
    pub fd: OwnedFd,
}

/// What to attach, and how.
#[derive(Debug)]
pub struct AttachSpec {
    /// Base first.
    pub levels: Vec<Level>,
    /// Cluster size of a raw base.
    pub raw_cluster: Option<ClusterSize>,
    pub read_only: bool,
    pub marked: Marked,
    /// Empty for the main use of an image.
    pub component: String,
    /// The DiskDescriptor.xml that the chain comes from.
    pub descriptor: Option<PathBuf>,
    /// `/dev/NAME` if the user asks for one; else the smallest free `/dev/ploopN`.
    pub device: Option<String>,
    pub trace: bool,
    /// The device ends with its last mount, as soon as there was one.
    pub until_unmounted: bool,
    /// Space that becomes free in the top is given back by itself while the device is idle.
    pub auto_compact: bool,
    /// Takeover by slots, as on kernels before 6.9, whatever this kernel is; see `$PLOOP_TAKEOVER`.
    pub slots: bool,
}

/// A level of the chain that a device is to serve.
#[derive(Debug)]
pub enum NewLevel {
    /// A level of the running chain, by its number.
    Kept(usize),
    /// Another file: O_PATH.
    File { path: PathBuf, raw: bool, fd: OwnedFd },
}

/// A chain for a running device.
#[derive(Debug)]
pub struct SwitchSpec {
    /// Base first.
    pub levels: Vec<NewLevel>,
    pub commit: Option<CommitFile>,
    /// Milliseconds that the server waits at each step; 0 except in tests, which kill processes meanwhile.
    pub linger: u64,
}

/// What makes a change permanent: the new descriptor, written and synced, and the old one over which it is renamed.
#[derive(Debug)]
pub struct CommitFile {
    folder: OwnedFd,
    new: OwnedFd,
    /// Name of the new file in the folder.
    tmp: PathBuf,
    /// Name that it gets.
    name: PathBuf,
    lock: Option<OwnedFd>,
}

impl CommitFile {
    /// `new` lies in the folder of `descriptor`.
    pub fn open(new: &(impl Named + ?Sized), descriptor: &(impl Named + ?Sized)) -> Result<CommitFile> {
        let name = descriptor.place().ctx(Kind::Open, || "cannot open the folder of a descriptor")?;
        let tmp = new.place().ctx(Kind::Open, || "cannot open the folder of a new descriptor")?.name;
        let shown = || format!("cannot open {} in {}", tmp.display(), name.folder.display());
        Ok(CommitFile {
            folder: name.folder.duplicate().ctx(Kind::Open, shown)?,
            new: name.folder.entry(&tmp).open(OFlag::O_PATH).ctx(Kind::Open, shown)?,
            tmp: PathBuf::from(&tmp),
            name: PathBuf::from(&name.name),
            lock: None,
        })
    }

    /// Makes sure that the new file is this one.
    pub fn of(self, file: FileId) -> Result<CommitFile> {
        let tmp = self.tmp.display();
        if FileId::of(&self.new).ctx(Kind::Fstat, || format!("cannot look at {tmp}"))? != file {
            bail!(Rename, "{tmp} is not the file that was prepared; has another process changed it?");
        }
        Ok(self)
    }

    /// Adds the lock on the disk, which the driver holds until the change is made or given up.
    pub fn under(self, lock: OwnedFd) -> CommitFile {
        CommitFile { lock: Some(lock), ..self }
    }

    /// The name in the folder that the new file has, and the one that it gets.
    pub fn names(&self) -> (&Path, &Path) {
        (&self.tmp, &self.name)
    }

    /// The folder, the new file and the lock, if there is one.
    pub fn fds(&self) -> impl Iterator<Item = &OwnedFd> {
        [&self.folder, &self.new].into_iter().chain(&self.lock)
    }

    /// Whether the change was made: the descriptor is the new file. An error: that is not known.
    pub fn is_committed(&self) -> Result<bool> {
        let new = FileId::of(&self.new).ctx(Kind::Fstat, || "cannot look at the new descriptor")?;
        let there = FileId::in_folder(&self.folder, &self.name)
            .ctx(Kind::Fstat, || format!("cannot look at {}", self.name.display()))?;
        Ok(there == Some(new))
    }
}

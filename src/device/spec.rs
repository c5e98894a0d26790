//! What to attach, and what a running device is to serve next.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::bail;
use crate::chain::Marked;
use crate::error::{IoContext, Kind, Result};
use crate::sys::file_id::FileId;
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
    pub fn open(new: &Path, descriptor: &Path) -> Result<CommitFile> {
        let (Some(folder), Some(tmp), Some(name)) = (descriptor.parent(), new.file_name(), descriptor.file_name())
        else {
            bail!(Param, "{} is no path of a descriptor", descriptor.display());
        };
        let open = |path: &Path, flags: i32| {
            let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH | flags).open(path);
            file.ctx(Kind::Open, || format!("cannot open {}", path.display())).map(OwnedFd::from)
        };
        Ok(CommitFile {
            folder: open(folder, libc::O_DIRECTORY)?,
            new: open(new, libc::O_NOFOLLOW)?,
            tmp: PathBuf::from(tmp),
            name: PathBuf::from(name),
            lock: None,
        })
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

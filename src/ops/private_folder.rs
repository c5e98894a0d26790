//! A folder in which a command mounts a disk's file system for itself.

use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::mkdtemp;

use crate::error::{IoContext, Kind, Result};

/// An empty folder that only root can change. A file system that could not be unmounted keeps it when it is dropped.
pub struct PrivateFolder(PathBuf);

impl PrivateFolder {
    pub fn make() -> Result<PrivateFolder> {
        let name = Path::new("/run/ploop-private.XXXXXX");
        let folder = mkdtemp(name).ctx(Kind::Mkdir, || "no temporary folder can be made in /run")?;
        Ok(PrivateFolder(folder))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for PrivateFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

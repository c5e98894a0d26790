//! A folder in which a command mounts a disk's file system for itself.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::error::{IoContext, Kind, Result};

/// An empty folder that only root can change. A file system that could not be unmounted keeps it when it is dropped.
pub struct PrivateFolder(PathBuf);

impl PrivateFolder {
    pub fn make() -> Result<PrivateFolder> {
        let folder = PathBuf::from(format!("/run/.ploop-private-{}", std::process::id()));
        DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .ctx(Kind::Creat, || format!("cannot make folder {}", folder.display()))?;
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

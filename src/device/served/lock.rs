//! The lock of all processes that look for devices in order to change something.
#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::server::runtime;
use crate::sys::host;

const DIR: &str = "/var/lock/ploop";
const FILE: &str = "ploop.lck";
/// Longest wait for the lock. Processes that hold it have time limits themselves.
const LIMIT: Duration = Duration::from_secs(60);

/// Held until dropped.
pub struct GlobalLock {
    _file: Flock<File>,
}

pub(super) fn lock_dir() -> PathBuf {
    #[cfg(test)]
    if let Some(root) = host::root() {
        return root.join("lock");
    }
    DIR.into()
}

/// Makes the folder. /var/lock is a link to /run/lock, which is not there on each system: it is made, too.
pub(super) fn make(dir: &Path) -> io::Result<()> {
    let create = |dir: &Path| DirBuilder::new().mode(0o755).recursive(true).create(dir);
    if let Some(parent) = dir.parent()
        && let Ok(target) = fs::read_link(parent)
    {
        create(&parent.with_file_name("").join(target))?;
    }
    create(dir)
}

/// Takes the global lock; error 23 after 60 s.
pub fn global() -> Result<GlobalLock> {
    let dir = lock_dir();
    let dir = dir.as_path();
    make(dir).ctx(Kind::Lock, || format!("cannot make {}", dir.display()))?;
    runtime::verify_dir(dir)?;
    let path = dir.join(FILE);
    let flags = libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(flags)
        .open(&path)
        .ctx(Kind::Lock, || format!("cannot open {}", path.display()))?;
    let end = host::now() + LIMIT;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(GlobalLock { _file: lock }),
            Err((back, nix::Error::EWOULDBLOCK | nix::Error::EINTR)) if host::now() < end => file = back,
            Err((_, nix::Error::EWOULDBLOCK)) => {
                bail!(Lock, "{} is locked by another process for more than {} s", path.display(), LIMIT.as_secs())
            }
            Err((_, e)) => return Err(e).ctx(Kind::Lock, || format!("cannot lock {}", path.display())),
        }
        host::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_is_made_where_var_lock_is_a_link_to_nowhere() {
        let root = tempfile::tempdir().unwrap();
        for (name, target) in [("relative", "run/lock".into()), ("absolute", root.path().join("run2/lock"))] {
            let link = root.path().join(name);
            std::os::unix::fs::symlink(&target, &link).unwrap();
            make(&link.join("ploop")).unwrap();
            make(&link.join("ploop")).unwrap();
            assert!(root.path().join(target).join("ploop").is_dir());
        }
        make(&root.path().join("var/lock/ploop")).unwrap();
        assert!(root.path().join("var/lock/ploop").is_dir());
    }
}

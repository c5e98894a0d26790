//! The lock of all processes that look for devices in order to change something.
#![forbid(unsafe_code)]

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
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

fn lock_dir() -> PathBuf {
    #[cfg(test)]
    if let Some(root) = host::root() {
        return root.join("lock");
    }
    DIR.into()
}

/// Takes the global lock; error 23 after 60 s.
pub fn global() -> Result<GlobalLock> {
    let dir = lock_dir();
    let dir = dir.as_path();
    match DirBuilder::new().mode(0o755).recursive(true).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::with(Kind::Lock, format!("cannot make {DIR}"), e));
        }
        _ => {}
    }
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

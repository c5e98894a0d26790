//! Opening a file again through a descriptor of it.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

/// How a file is reopened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Access {
    pub write: bool,
    /// O_DIRECT, if the file system takes it.
    pub direct: bool,
}

/// Opens the file behind a descriptor anew: no name is looked up. Times are not touched where that is permitted. The
/// second value tells whether O_DIRECT is on.
pub fn reopen(fd: impl AsFd, access: Access) -> std::io::Result<(File, bool)> {
    let name = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    let mode = if access.write { OFlag::O_RDWR } else { OFlag::O_RDONLY };
    let mut extra = OFlag::O_NOATIME;
    if access.direct {
        extra |= OFlag::O_DIRECT;
    }
    loop {
        match open(name.as_str(), mode | OFlag::O_CLOEXEC | extra, Mode::empty()) {
            Ok(fd) => return Ok((File::from(fd), extra.contains(OFlag::O_DIRECT))),
            Err(Errno::EPERM) if extra.contains(OFlag::O_NOATIME) => extra.remove(OFlag::O_NOATIME),
            Err(Errno::EINVAL) if extra.contains(OFlag::O_DIRECT) => extra.remove(OFlag::O_DIRECT),
            Err(e) => return Err(e.into()),
        }
    }
}

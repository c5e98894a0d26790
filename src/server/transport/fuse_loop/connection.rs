//! The connection with the kernel's FUSE: mount of the one-file file system, handshake, requests given out again.
#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::poll::PollFlags;
use serde::{Deserialize, Serialize};

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::sys::wait::wait;

use super::protocol::{IN_HEADER, MAX_IO, Reply, opcode, u32_at, u64_at};

const FUSE_MAJOR: u32 = 7;
/// The newest minor version that we know.
const FUSE_MINOR: u32 = 45;
/// 5.4. The loop device asks for more than that: LOOP_CONFIGURE (5.8).
const FUSE_MINOR_LEAST: u32 = 31;

const ASYNC_READ: u64 = 1 << 0;
const BIG_WRITES: u64 = 1 << 5;
const ASYNC_DIO: u64 = 1 << 15;
const PARALLEL_DIROPS: u64 = 1 << 18;
const ABORT_ERROR: u64 = 1 << 21;
const MAX_PAGES: u64 = 1 << 22;
const INIT_EXT: u64 = 1 << 30;
const HAS_RESEND: u64 = 1 << 39;

/// The loop device keeps 128 requests in flight, and all of them count as background.
const MAX_BACKGROUND: u16 = 512;
const CONGESTION: u16 = 384;

const NOTIFY_RESEND: i32 = 7;

/// What the kernel and we agreed on in FUSE_INIT; a successor needs it, because INIT is not repeated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FuseSession {
    pub minor: u32,
    pub max_write: u32,
    pub flags: u64,
    /// Folders above the file. None: of a version that had none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub depth: u32,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

impl FuseSession {
    /// The kernel gives out requests again that an exited worker has read.
    pub fn resends(&self) -> bool {
        self.flags & HAS_RESEND != 0
    }
}

/// Asks the kernel to give out again every request that was read and not answered. To be written before the first read
/// of a successor.
pub fn resend(dev: BorrowedFd) -> io::Result<()> {
    let mut out = [0; 16];
    out[0..4].copy_from_slice(&16u32.to_le_bytes());
    out[4..8].copy_from_slice(&NOTIFY_RESEND.to_le_bytes());
    nix::unistd::write(dev, &out)?;
    Ok(())
}

/// Opens /dev/fuse and mounts the one-file file system at `point`, in the mount namespace of the caller: over a folder, or
/// over a regular file if its root is to be the file. `source` is what the mount table shows. The descriptor is
/// close-on-exec and does not block. The file can be used after [`handshake`] and when a worker answers.
pub fn open_and_mount(point: &Path, source: &Path) -> Result<OwnedFd> {
    let mode = if point.is_dir() { "40700" } else { "100600" };
    let dev = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/fuse")
        .ctx(Kind::Device, || "cannot open /dev/fuse; the kernel needs FUSE (modprobe fuse)")?;
    let options = format!(
        "fd={},rootmode={mode},user_id=0,group_id=0,allow_other,default_permissions,max_read={MAX_IO}",
        dev.as_raw_fd()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    mount(Some(source), point, Some("fuse"), flags, Some(options.as_str()))
        .ctx(Kind::Device, || format!("cannot mount a FUSE file at {}", point.display()))?;
    Ok(dev.into())
}

/// Agrees with the kernel on the protocol: answers FUSE_INIT, which the mount has queued. Fails if it does not come
/// within `limit`. `slots`: unanswered requests are to be kept by ourselves, even if the kernel could give them out
/// again (6.9 or later).
pub fn handshake(dev: BorrowedFd, limit: Duration, slots: bool) -> Result<FuseSession> {
    let mut buf = [0u8; 8192];
    let end = Instant::now() + limit;
    let len = loop {
        match nix::unistd::read(dev, &mut buf) {
            Ok(n) => break n,
            Err(nix::Error::EAGAIN) => {
                if !wait(dev, PollFlags::POLLIN, end)? {
                    bail!(Device, "the kernel's FUSE did not greet within {} s", limit.as_secs());
                }
            }
            Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e).ctx(Kind::Device, || "cannot read the greeting of the kernel's FUSE"),
        }
    };
    let code = u32_at(&buf, 4);
    if len < IN_HEADER + 16 || code != opcode::INIT {
        bail!(Device, "the kernel's FUSE began with request {code} of {len} bytes: INIT (26) wanted");
    }
    let unique = u64_at(&buf, 8);
    let body = &buf[IN_HEADER..len];
    let (major, minor) = (u32_at(body, 0), u32_at(body, 4));
    let mut offered = u64::from(u32_at(body, 12));
    if offered & INIT_EXT != 0 {
        offered |= u64::from(u32_at(body, 16)) << 32;
    }
    let needed = ASYNC_DIO | MAX_PAGES;
    if major != FUSE_MAJOR || minor < FUSE_MINOR_LEAST || offered & needed != needed {
        send(dev, Reply::status(unique, libc::EPROTO).bytes())?;
        bail!(
            Device,
            "the kernel's FUSE speaks {major}.{minor} with flags {offered:#x}: 7.{FUSE_MINOR_LEAST} or later with \
             {needed:#x} wanted (Linux 5.8)"
        );
    }
    let resend = if slots { 0 } else { HAS_RESEND };
    let flags = needed | offered & (ASYNC_READ | BIG_WRITES | PARALLEL_DIROPS | ABORT_ERROR | INIT_EXT | resend);
    let session = FuseSession { minor: minor.min(FUSE_MINOR), max_write: MAX_IO as u32, flags, depth: 0 };
    let reply = Reply::new(unique, 0, 64)
        .u32(0, FUSE_MAJOR)
        .u32(4, session.minor)
        .u32(8, 0)
        .u32(12, flags as u32)
        .u32(16, u32::from(CONGESTION) << 16 | u32::from(MAX_BACKGROUND))
        .u32(20, session.max_write)
        .u32(24, 1)
        .u32(28, MAX_IO as u32 / 4096)
        .u32(32, (flags >> 32) as u32);
    send(dev, reply.bytes())?;
    Ok(session)
}

fn send(dev: BorrowedFd, bytes: &[u8]) -> Result<()> {
    nix::unistd::write(dev, bytes).map(drop).ctx(Kind::Device, || "cannot answer the greeting of the kernel's FUSE")
}

/// Whether an error of reading /dev/fuse means that the connection is over: unmounted or aborted.
pub fn is_over(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ECONNABORTED | libc::ENOTCONN))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::server::frame;

    /// The kernel's part: what it offers, and what it is answered.
    fn greet(minor: u32, flags: u64, slots: bool) -> (Result<FuseSession>, Vec<u8>) {
        let (kernel, dev) = frame::pair().unwrap();
        let mut init = [0; 104];
        init[4..8].copy_from_slice(&opcode::INIT.to_le_bytes());
        init[8..16].copy_from_slice(&2u64.to_le_bytes());
        init[40..44].copy_from_slice(&FUSE_MAJOR.to_le_bytes());
        init[44..48].copy_from_slice(&minor.to_le_bytes());
        init[52..56].copy_from_slice(&(flags as u32).to_le_bytes());
        // Before 7.36 it is shorter.
        init[56..60].copy_from_slice(&((flags >> 32) as u32).to_le_bytes());
        let len = if minor < 36 { 56 } else { 104 };
        nix::unistd::write(&kernel, &init[..len]).unwrap();
        let session = handshake(dev.as_fd(), Duration::from_secs(1), slots);
        let mut reply = [0; 128];
        let n = nix::unistd::read(&kernel, &mut reply).unwrap();
        (session, reply[..n].to_vec())
    }

    #[test]
    fn kernels_of_several_ages_are_greeted() {
        const OLD: u64 = 0x03ff_fffb;
        // 6.18, 6.9, 6.8, 6.1, 5.14, 5.8.
        for (minor, flags, resends) in [
            (45, 0x7fd_73ff_fffb, true),
            (40, HAS_RESEND | INIT_EXT | OLD, true),
            (39, 0x1f_0000_0000 | INIT_EXT | OLD, false),
            (37, 0x3_0000_0000 | INIT_EXT | OLD, false),
            (34, 0x1fff_fffb, false),
            (31, OLD, false),
        ] {
            for slots in [false, true] {
                let (session, reply) = greet(minor, flags, slots);
                let session = session.unwrap();
                assert_eq!(session.resends(), resends && !slots, "7.{minor}");
                assert_eq!((session.minor, session.flags & !flags), (minor, 0));
                assert_eq!(reply.len(), 80);
                let told = u64::from(u32_at(&reply, 28)) | u64::from(u32_at(&reply, 48)) << 32;
                assert_eq!((u32_at(&reply, 4), u32_at(&reply, 20), told), (0, minor, session.flags));
                assert_eq!(told & INIT_EXT, flags & INIT_EXT);
            }
        }
        for (minor, flags) in [(30, OLD), (31, OLD & !MAX_PAGES), (45, 0x7fd_73ff_fffb & !ASYNC_DIO)] {
            let (session, reply) = greet(minor, flags, false);
            let e = session.unwrap_err();
            assert!(e.to_string().contains(&format!("speaks 7.{minor} with flags {flags:#x}")), "{e}");
            assert_eq!(u32_at(&reply, 4), (-libc::EPROTO) as u32);
        }
    }
}

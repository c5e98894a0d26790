//! The kernel's FUSE protocol, as far as a file system of one file needs it: mount, handshake, requests, replies.
//!
//! The root of the file system is the file itself, mounted over a regular file. It has one fixed node (1) and one
//! constant handle, so that a process that takes over needs to know nothing but the [`FuseSession`].
#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::poll::PollFlags;

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::server::frame;
use crate::server::proto::FuseSession;

/// Bytes before the data of a WRITE; every other request of interest is not longer than this.
pub const HEAD: usize = 80;
/// Most data in one READ or WRITE that we negotiate.
pub const MAX_IO: usize = 1 << 20;
/// Set in `unique` of a request that is given out again.
pub const RESENT: u64 = 1 << 63;

const IN_HEADER: usize = 40;
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

const FOPEN_DIRECT_IO: u32 = 1 << 0;
/// No FLUSH at close: a process that closes the file, in an exec for one, must not wait for the worker.
const FOPEN_NOFLUSH: u32 = 1 << 5;
const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

mod opcode {
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
}

/// What a request asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    Read {
        offset: u64,
        len: u32,
    },
    /// The data follow the head.
    Write {
        offset: u64,
        len: u32,
    },
    Fsync,
    Fallocate {
        offset: u64,
        len: u64,
        mode: u32,
    },
    GetAttr,
    Open,
    StatFs,
    /// FLUSH and RELEASE: nothing to do, success.
    Nothing,
    /// FORGET, INTERRUPT: no reply may be sent.
    NoReply,
    Unknown,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    /// Echoed in the reply as it is.
    pub unique: u64,
    pub opcode: u32,
    pub op: Op,
}

impl Head {
    /// The request has been given to an earlier worker, which did not answer it.
    pub fn resent(&self) -> bool {
        self.unique & RESENT != 0
    }
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    b.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// How long the request with this head says it is.
pub fn length(head: &[u8; HEAD]) -> usize {
    u32_at(head, 0) as usize
}

/// Understands the request whose first bytes are `head` and which is `len` bytes long as a whole. `None`: not a whole
/// request of the protocol; the kernel sends none such.
pub fn parse(head: &[u8; HEAD], len: usize) -> Option<Head> {
    if len < IN_HEADER || u32_at(head, 0) as usize != len {
        return None;
    }
    let code = u32_at(head, 4);
    let at_least = |n: usize| (len >= IN_HEADER + n).then_some(());
    let op = match code {
        opcode::READ => {
            at_least(40)?;
            Op::Read { offset: u64_at(head, 48), len: u32_at(head, 56) }
        }
        opcode::WRITE => {
            at_least(40)?;
            let size = u32_at(head, 56);
            if len - HEAD != size as usize {
                return None;
            }
            Op::Write { offset: u64_at(head, 48), len: size }
        }
        opcode::FALLOCATE => {
            at_least(32)?;
            Op::Fallocate { offset: u64_at(head, 48), len: u64_at(head, 56), mode: u32_at(head, 64) }
        }
        opcode::FSYNC => Op::Fsync,
        opcode::GETATTR => Op::GetAttr,
        opcode::OPEN => Op::Open,
        opcode::STATFS => Op::StatFs,
        opcode::FLUSH | opcode::RELEASE | opcode::DESTROY => Op::Nothing,
        opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => Op::NoReply,
        _ => Op::Unknown,
    };
    Some(Head { unique: u64_at(head, 8), opcode: code, op })
}

/// The 16 bytes that lead a reply with `data` bytes behind them; `error` is a positive errno or 0.
pub fn reply_head(unique: u64, error: i32, data: usize) -> [u8; 16] {
    let mut out = [0; 16];
    out[0..4].copy_from_slice(&(16 + data as u32).to_le_bytes());
    out[4..8].copy_from_slice(&(-error).to_le_bytes());
    out[8..16].copy_from_slice(&unique.to_le_bytes());
    out
}

/// A whole small reply, on the stack.
#[derive(Clone, Copy, Debug)]
pub struct Reply {
    bytes: [u8; 128],
    len: usize,
}

impl Reply {
    fn new(unique: u64, error: i32, data: usize) -> Reply {
        let mut bytes = [0; 128];
        bytes[..16].copy_from_slice(&reply_head(unique, error, data));
        Reply { bytes, len: 16 + data }
    }

    fn u32(mut self, at: usize, v: u32) -> Reply {
        self.bytes[16 + at..20 + at].copy_from_slice(&v.to_le_bytes());
        self
    }

    fn u64(mut self, at: usize, v: u64) -> Reply {
        self.bytes[16 + at..24 + at].copy_from_slice(&v.to_le_bytes());
        self
    }

    /// The request that is answered.
    pub fn unique(&self) -> u64 {
        u64_at(&self.bytes, 8)
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Success without data, or an error (a positive errno).
    pub fn status(unique: u64, error: i32) -> Reply {
        Reply::new(unique, error, 0)
    }

    /// Answer to a WRITE of which `len` bytes were written.
    pub fn written(unique: u64, len: u32) -> Reply {
        Reply::new(unique, 0, 8).u32(0, len)
    }

    /// Answer to OPEN: no page cache, writes in parallel, nothing at close, handle 0.
    pub fn open(unique: u64) -> Reply {
        Reply::new(unique, 0, 16).u32(8, FOPEN_DIRECT_IO | FOPEN_NOFLUSH | FOPEN_PARALLEL_DIRECT_WRITES)
    }

    /// Answer to GETATTR: a regular file of `size` bytes that root may read and write. Valid for no time, so that a new
    /// size is seen at once.
    pub fn attr(unique: u64, size: u64) -> Reply {
        // After validity (16 bytes): ino, size, blocks, three times, three parts of nanoseconds, mode, nlink, uid, gid,
        // rdev, blksize, flags.
        Reply::new(unique, 0, 104)
            .u64(16, 1)
            .u64(24, size)
            .u64(32, size.div_ceil(512))
            .u32(76, libc::S_IFREG | 0o600)
            .u32(80, 1)
            .u32(96, 4096)
    }

    /// Answer to STATFS. The loop device takes `bsize` as its discard granularity.
    pub fn statfs(unique: u64, size: u64, bsize: u32) -> Reply {
        Reply::new(unique, 0, 80)
            .u64(0, size.div_ceil(u64::from(bsize.max(1))))
            .u64(24, 1)
            .u32(40, bsize)
            .u32(44, 255)
            .u32(48, bsize)
    }
}

impl FuseSession {
    /// The kernel cannot give out requests again that an exited worker has read, or is not to: workers keep them in a
    /// journal.
    pub fn slots(&self) -> bool {
        self.flags & HAS_RESEND == 0
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

/// Opens /dev/fuse and mounts the one-file file system over the regular file `file`, in the mount namespace of the
/// caller. The descriptor is close-on-exec and does not block. The file can be used after [`handshake`] and when
/// a worker answers.
pub fn open_and_mount(file: &Path) -> Result<OwnedFd> {
    let dev = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/fuse")
        .ctx(Kind::Device, || "cannot open /dev/fuse; the kernel needs FUSE (modprobe fuse)")?;
    let options = format!(
        "fd={},rootmode=100600,user_id=0,group_id=0,allow_other,default_permissions,max_read={MAX_IO}",
        dev.as_raw_fd()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    mount(Some("ploop"), file, Some("fuse"), flags, Some(options.as_str()))
        .ctx(Kind::Device, || format!("cannot mount a FUSE file at {}", file.display()))?;
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
                if !frame::wait(dev, PollFlags::POLLIN, end)? {
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
    let session = FuseSession { minor: minor.min(FUSE_MINOR), max_write: MAX_IO as u32, flags };
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
    use super::*;
    use std::os::fd::AsFd;

    fn head(opcode: u32, len: usize, body: &[(usize, u64)]) -> [u8; HEAD] {
        let mut h = [0; HEAD];
        h[0..4].copy_from_slice(&(len as u32).to_le_bytes());
        h[4..8].copy_from_slice(&opcode.to_le_bytes());
        h[8..16].copy_from_slice(&(7 | RESENT).to_le_bytes());
        for &(at, v) in body {
            h[40 + at..48 + at].copy_from_slice(&v.to_le_bytes());
        }
        h
    }

    #[test]
    fn requests_are_understood() {
        let h = parse(&head(15, 80, &[(8, 4096), (16, 512)]), 80).unwrap();
        assert_eq!((h.unique, h.op), (7 | RESENT, Op::Read { offset: 4096, len: 512 }));
        assert!(h.resent());
        let h = parse(&head(16, 80 + 1024, &[(8, 512), (16, 1024)]), 80 + 1024).unwrap();
        assert_eq!(h.op, Op::Write { offset: 512, len: 1024 });
        let h = parse(&head(43, 72, &[(8, 512), (16, 1 << 32), (24, 0x11)]), 72).unwrap();
        assert_eq!(h.op, Op::Fallocate { offset: 512, len: 1 << 32, mode: 0x11 });
        assert_eq!(parse(&head(20, 56, &[]), 56).unwrap().op, Op::Fsync);
        assert_eq!(parse(&head(22, 56, &[]), 56).unwrap().op, Op::Unknown);
        assert_eq!(parse(&head(36, 48, &[]), 48).unwrap().op, Op::NoReply);
    }

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
                assert_eq!(session.slots(), slots || !resends, "7.{minor}");
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

    #[test]
    fn what_is_not_whole_is_refused() {
        assert!(parse(&head(15, 79, &[]), 79).is_none());
        assert!(parse(&head(15, 80, &[]), 81).is_none());
        assert!(parse(&head(16, 80 + 1024, &[(16, 1025)]), 80 + 1024).is_none());
        assert!(parse(&head(43, 60, &[]), 60).is_none());
        assert!(parse(&[0; HEAD], 0).is_none());
    }

    #[test]
    fn replies_have_the_kernels_layout() {
        let r = Reply::status(5, libc::EIO);
        assert_eq!(r.bytes(), [16, 0, 0, 0, 0xfb, 0xff, 0xff, 0xff, 5, 0, 0, 0, 0, 0, 0, 0]);
        let r = Reply::attr(1, 1 << 20);
        assert_eq!(r.bytes().len(), 16 + 104);
        assert_eq!(u64_at(r.bytes(), 16 + 24), 1 << 20);
        assert_eq!(u32_at(r.bytes(), 16 + 76), 0o100600);
        let r = Reply::statfs(1, 10 << 20, 1 << 20);
        assert_eq!((r.bytes().len(), u64_at(r.bytes(), 16), u32_at(r.bytes(), 16 + 40)), (96, 10, 1 << 20));
    }
}

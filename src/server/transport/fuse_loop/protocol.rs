//! The kernel's FUSE protocol, as far as a file system of one file needs it: requests and replies.
//!
//! The file lies in as many folders as its path has, one in the other, each with the only node of its depth: the kernel shows
//! that path as the loop device's file. Whatever name is looked up in a folder is the next folder or, in the last one, the
//! file. Node numbers and the constant handle follow from the depth, so that a process that takes over needs to know nothing
//! but what the handshake agreed on. File systems of older versions have no folder: their root (node 1) is the file.
#![forbid(unsafe_code)]

/// Bytes before the data of a WRITE; every other request of interest is not longer than this.
pub const HEAD: usize = 80;
/// Most data in one READ or WRITE that we negotiate.
pub const MAX_IO: usize = 1 << 20;
/// Set in `unique` of a request that is given out again.
pub const RESENT: u64 = 1 << 63;

pub const IN_HEADER: usize = 40;
const FOPEN_DIRECT_IO: u32 = 1 << 0;
/// No FLUSH at close: a process that closes the file, in an exec for one, must not wait for the worker.
const FOPEN_NOFLUSH: u32 = 1 << 5;
const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

pub mod opcode {
    pub const LOOKUP: u32 = 1;
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

/// Seconds; names and folders never change.
const FOR_EVER: u64 = 1 << 30;

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
    Lookup,
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
    /// What it is about: 1 is the root.
    pub node: u64,
    pub op: Op,
}

impl Head {
    /// The request has been given to an earlier worker, which did not answer it.
    pub fn resent(&self) -> bool {
        self.unique & RESENT != 0
    }
}

pub fn u32_at(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

pub fn u64_at(b: &[u8], at: usize) -> u64 {
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
        opcode::LOOKUP => Op::Lookup,
        opcode::GETATTR => Op::GetAttr,
        opcode::OPEN => Op::Open,
        opcode::STATFS => Op::StatFs,
        opcode::FLUSH | opcode::RELEASE | opcode::DESTROY => Op::Nothing,
        opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => Op::NoReply,
        _ => Op::Unknown,
    };
    Some(Head { unique: u64_at(head, 8), opcode: code, node: u64_at(head, 16), op })
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
    bytes: [u8; 160],
    len: usize,
}

impl Reply {
    pub fn new(unique: u64, error: i32, data: usize) -> Reply {
        let mut bytes = [0; 160];
        bytes[..16].copy_from_slice(&reply_head(unique, error, data));
        Reply { bytes, len: 16 + data }
    }

    pub fn u32(mut self, at: usize, v: u32) -> Reply {
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
        // After validity (16 bytes).
        Reply::new(unique, 0, 104).attributes(16, 1, size, libc::S_IFREG | 0o600)
    }

    /// Answer to GETATTR: a folder of this node that root may use.
    pub fn folder_attr(unique: u64, node: u64) -> Reply {
        Reply::new(unique, 0, 104).u64(0, FOR_EVER).attributes(16, node, 0, libc::S_IFDIR | 0o700)
    }

    /// Answer to LOOKUP: a folder of this node.
    pub fn folder(unique: u64, node: u64) -> Reply {
        Reply::entry(unique, node, FOR_EVER).attributes(40, node, 0, libc::S_IFDIR | 0o700)
    }

    /// Answer to LOOKUP: the file.
    pub fn file(unique: u64, node: u64, size: u64) -> Reply {
        Reply::entry(unique, node, 0).attributes(40, node, size, libc::S_IFREG | 0o600)
    }

    /// Node, generation, how long name and attributes are valid, attributes.
    fn entry(unique: u64, node: u64, attributes: u64) -> Reply {
        Reply::new(unique, 0, 128).u64(0, node).u64(16, FOR_EVER).u64(24, attributes)
    }

    /// Number, size, blocks, three times, three parts of nanoseconds, mode, nlink, uid, gid, rdev, blksize, flags.
    fn attributes(self, at: usize, node: u64, size: u64, mode: u32) -> Reply {
        self.u64(at, node)
            .u64(at + 8, size)
            .u64(at + 16, size.div_ceil(512))
            .u32(at + 60, mode)
            .u32(at + 64, 1)
            .u32(at + 80, 4096)
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

#[cfg(test)]
mod tests {
    use super::*;

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
        let r = Reply::file(1, 7, 1 << 20);
        assert_eq!((r.bytes().len(), u64_at(r.bytes(), 16), u64_at(r.bytes(), 16 + 24)), (16 + 128, 7, 0));
        assert_eq!((u64_at(r.bytes(), 16 + 48), u32_at(r.bytes(), 16 + 100)), (1 << 20, 0o100600));
        let r = Reply::folder(1, 7);
        assert_eq!((u64_at(r.bytes(), 16 + 16), u32_at(r.bytes(), 16 + 100)), (FOR_EVER, 0o40700));
        assert_eq!(u32_at(Reply::folder_attr(1, 7).bytes(), 16 + 76), 0o40700);
        let r = Reply::statfs(1, 10 << 20, 1 << 20);
        assert_eq!((r.bytes().len(), u64_at(r.bytes(), 16), u32_at(r.bytes(), 16 + 40)), (96, 10, 1 << 20));
    }
}

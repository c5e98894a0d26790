//! /dev/fuse as the worker's queue.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};

use crate::error::{IoContext, Kind, Result};
use crate::server::mounts;
use crate::server::transport::queue::{
    Connection, Geometry, HEAD, KernelRequest, Limits, Op, QueueReader, ReadError, Recovery, Reply, RequestQueue, TAGS,
};
use crate::sys::arena::{Arena, Span};
use crate::sys::ring::Ring;

use super::connection::{self, FuseSession};
use super::protocol::{self, opcode};
use super::{DISK, shown};

const HANDSHAKE: Duration = Duration::from_secs(30);

/// FALLOCATE modes that mean "reads as zero": punch a hole, zero the range; both keep the size.
const PUNCH: u32 = 0x03;
const ZERO: u32 = 0x11;

const TAG_READY: u64 = TAGS.start;
const TAG_CANCEL: u64 = TAGS.start + 1;

const _: () = assert!(protocol::HEAD == HEAD);

#[derive(Debug)]
pub struct FuseQueue {
    dev: OwnedFd,
    /// Folders above the file: nodes from 1 to this number.
    depth: u64,
}

impl AsFd for FuseQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dev.as_fd()
    }
}

impl FuseQueue {
    fn send(&self, reply: &protocol::Reply) -> io::Result<()> {
        sent(nix::unistd::write(&self.dev, reply.bytes()).map_err(io::Error::from))
    }
}

/// No request waits for the answer any more: the caller was killed, or the connection has ended.
fn sent(result: io::Result<usize>) -> io::Result<()> {
    match result {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) || connection::is_over(&e) => Ok(()),
        other => other.map(drop),
    }
}

fn read_error(e: io::Error) -> ReadError {
    match e.raw_os_error() {
        _ if e.kind() == io::ErrorKind::WouldBlock => ReadError::Empty,
        _ if connection::is_over(&e) => ReadError::Over,
        Some(libc::EINTR | libc::ENOENT) => ReadError::Again,
        _ => ReadError::Failed(e),
    }
}

impl RequestQueue for FuseQueue {
    type Session = FuseSession;
    type Reader = FuseReader;

    /// The kernel's loop device keeps 128 requests in flight.
    const LIMITS: Limits = Limits { max_io: protocol::MAX_IO, in_flight: 128 };

    fn create(dir: &Path, image: &str, journal: bool) -> Result<Connection<FuseSession>> {
        let disk = dir.join(DISK);
        std::fs::create_dir(&disk).ctx(Kind::Creat, || format!("cannot make {}", disk.display()))?;
        let path = shown(image);
        let queue = connection::open_and_mount(&disk, &path)?;
        let mut session = connection::handshake(queue.as_fd(), HANDSHAKE, journal)?;
        session.depth = path.components().count() as u32;
        let number = mounts::anonymous_number(&disk).unwrap_or(0);
        Ok(Connection { queue, session, number })
    }

    fn hide(dir: &Path) -> Result<()> {
        let disk = dir.join(DISK);
        umount2(&disk, MntFlags::MNT_DETACH).ctx(Kind::Umount, || format!("cannot detach {}", disk.display()))?;
        let _ = std::fs::remove_dir(disk);
        Ok(())
    }

    fn discard(dir: &Path) {
        let _ = umount2(&dir.join(DISK), MntFlags::MNT_DETACH);
    }

    fn clean(dir: &Path) -> Result<()> {
        let disk = dir.join(DISK);
        while mounts::anonymous_number(&disk).is_some() {
            umount2(&disk, MntFlags::MNT_DETACH).ctx(Kind::Umount, || format!("cannot unmount {}", disk.display()))?;
        }
        Ok(())
    }

    fn recovery(session: &FuseSession) -> Recovery {
        if session.resends() { Recovery::Kernel } else { Recovery::Journal }
    }

    fn open(queue: OwnedFd, session: FuseSession) -> FuseQueue {
        FuseQueue { dev: queue, depth: session.depth.into() }
    }

    fn read(&self, arena: &Arena, head: &mut [u8; HEAD], data: Span) -> std::result::Result<usize, ReadError> {
        arena.read_after(self.dev.as_fd(), head, data).map_err(read_error)
    }

    fn read_words(&self, arena: &Arena, head: &[AtomicU64], data: Span) -> std::result::Result<usize, ReadError> {
        arena.read_after_words(self.dev.as_fd(), head, data).map_err(read_error)
    }

    fn parse(&self, head: &[u8; HEAD], len: usize) -> Option<KernelRequest> {
        let request = protocol::parse(head, len)?;
        let folder = (1..=self.depth).contains(&request.node);
        let op = match request.op {
            protocol::Op::Lookup if folder => Op::Own,
            protocol::Op::Lookup => Op::Unsupported(libc::ENOTDIR),
            protocol::Op::GetAttr | protocol::Op::StatFs | protocol::Op::Nothing if folder => Op::Own,
            protocol::Op::NoReply => Op::NoReply,
            _ if folder => Op::Unsupported(libc::ENOSYS),
            protocol::Op::Read { offset, len } => Op::Read { offset, len },
            protocol::Op::Write { offset, len } => Op::Write { offset, len },
            protocol::Op::Fallocate { offset, len, mode: PUNCH | ZERO } => Op::Zero { offset, len },
            protocol::Op::Fallocate { .. } => Op::Unsupported(libc::EOPNOTSUPP),
            protocol::Op::Fsync => Op::Flush,
            protocol::Op::GetAttr | protocol::Op::Open | protocol::Op::StatFs | protocol::Op::Nothing => Op::Own,
            protocol::Op::Unknown => Op::Unsupported(libc::ENOSYS),
        };
        // The folder comes with the number of the operation: there are fewer of them than a byte can tell.
        let code = if folder { request.opcode | (request.node as u32) << 8 } else { request.opcode };
        Some(KernelRequest { unique: request.unique, code, op, resent: request.resent() })
    }

    fn parse_kept(&self, head: &[u8; HEAD]) -> Option<KernelRequest> {
        self.parse(head, protocol::length(head))
    }

    fn stable_id(&self, unique: u64) -> u64 {
        unique & !protocol::RESENT
    }

    fn reply(&self, arena: &Arena, unique: u64, reply: Reply) -> io::Result<()> {
        match reply {
            Reply::Data(data) => {
                let head = protocol::reply_head(unique, 0, data.len);
                sent(arena.write_after(self.dev.as_fd(), &head, data))
            }
            Reply::Written(len) => self.send(&protocol::Reply::written(unique, len)),
            Reply::Done => self.send(&protocol::Reply::status(unique, 0)),
            Reply::Error(errno) => self.send(&protocol::Reply::status(unique, errno)),
        }
    }

    fn answer_own(&self, request: &KernelRequest, geometry: &Geometry) -> io::Result<()> {
        let unique = request.unique;
        let folder = u64::from(request.code >> 8);
        self.send(&match request.code & 0xff {
            opcode::LOOKUP if folder == self.depth => protocol::Reply::file(unique, folder + 1, geometry.bytes),
            opcode::LOOKUP => protocol::Reply::folder(unique, folder + 1),
            opcode::GETATTR if folder != 0 => protocol::Reply::folder_attr(unique, folder),
            opcode::GETATTR => protocol::Reply::attr(unique, geometry.bytes),
            opcode::OPEN => protocol::Reply::open(unique),
            opcode::STATFS => protocol::Reply::statfs(unique, geometry.bytes, geometry.block_bytes),
            _ => protocol::Reply::status(unique, 0),
        })
    }

    fn resend(&self) -> io::Result<()> {
        connection::resend(self.dev.as_fd())
    }
}

/// The poll of /dev/fuse in an I/O thread's ring.
#[derive(Debug, Default)]
pub struct FuseReader {
    /// It is under way.
    armed: bool,
    /// Its end was asked for.
    cancelled: bool,
}

impl QueueReader<FuseQueue> for FuseReader {
    fn arm(&mut self, queue: &FuseQueue, ring: &mut Ring) -> io::Result<()> {
        if !self.armed {
            ring.poll_in(queue.as_fd(), true, TAG_READY)?;
            self.armed = true;
        }
        Ok(())
    }

    fn on_completion(&mut self, tag: u64) -> bool {
        let ready = tag == TAG_READY;
        self.armed &= !ready;
        ready
    }

    /// The kernel would wake up a poll that is left behind instead of the successor's.
    fn quiesce(&mut self, ring: &mut Ring) -> io::Result<bool> {
        if self.armed && !self.cancelled {
            ring.cancel_poll(TAG_READY, TAG_CANCEL)?;
            self.cancelled = true;
        }
        Ok(!self.armed)
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    const SESSION: FuseSession = FuseSession { minor: 45, max_write: 1 << 20, flags: 0, depth: 0 };

    fn queue() -> (OwnedFd, FuseQueue) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (kernel, dev) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        (kernel, FuseQueue::open(dev, SESSION))
    }

    fn head(opcode: u32, len: usize, mode: u32) -> [u8; HEAD] {
        let mut h = [0; HEAD];
        h[0..4].copy_from_slice(&(len as u32).to_le_bytes());
        h[4..8].copy_from_slice(&opcode.to_le_bytes());
        h[8..16].copy_from_slice(&(6 | protocol::RESENT).to_le_bytes());
        h[48..56].copy_from_slice(&4096u64.to_le_bytes());
        h[56..64].copy_from_slice(&512u64.to_le_bytes());
        h[64..68].copy_from_slice(&mode.to_le_bytes());
        h
    }

    #[test]
    fn requests_are_those_of_any_disk() {
        let (_kernel, queue) = queue();
        let op = |opcode, len, mode| queue.parse_kept(&head(opcode, len, mode)).unwrap().op;
        assert_eq!(op(opcode::READ, 80, 0), Op::Read { offset: 4096, len: 512 });
        assert_eq!(op(opcode::WRITE, 80 + 512, 0), Op::Write { offset: 4096, len: 512 });
        for mode in [PUNCH, ZERO] {
            assert_eq!(op(opcode::FALLOCATE, 72, mode), Op::Zero { offset: 4096, len: 512 });
        }
        assert_eq!(op(opcode::FALLOCATE, 72, 0), Op::Unsupported(libc::EOPNOTSUPP));
        assert_eq!(op(opcode::FSYNC, 56, 0), Op::Flush);
        for own in [opcode::GETATTR, opcode::OPEN, opcode::STATFS, opcode::FLUSH, opcode::RELEASE] {
            assert_eq!(op(own, 56, 0), Op::Own);
        }
        assert_eq!(op(opcode::INTERRUPT, 48, 0), Op::NoReply);
        assert_eq!(op(22, 56, 0), Op::Unsupported(libc::ENOSYS));
        assert!(queue.parse(&head(opcode::READ, 80, 0), 79).is_none());
        let request = queue.parse(&head(opcode::READ, 80, 0), 80).unwrap();
        assert!(request.resent);
        assert_eq!((request.unique, queue.stable_id(request.unique)), (6 | protocol::RESENT, 6));
    }

    #[test]
    fn own_answers() {
        let (kernel, queue) = queue();
        let geometry = Geometry { bytes: 10 << 20, block_bytes: 1 << 20 };
        let wanted = |reply: protocol::Reply| reply.bytes().to_vec();
        for (code, wanted) in [
            (opcode::GETATTR, wanted(protocol::Reply::attr(4, 10 << 20))),
            (opcode::OPEN, wanted(protocol::Reply::open(4))),
            (opcode::STATFS, wanted(protocol::Reply::statfs(4, 10 << 20, 1 << 20))),
            (opcode::RELEASE, wanted(protocol::Reply::status(4, 0))),
        ] {
            queue.answer_own(&KernelRequest { unique: 4, code, op: Op::Own, resent: false }, &geometry).unwrap();
            let mut got = [0; 256];
            let len = nix::unistd::read(&kernel, &mut got).unwrap();
            assert_eq!(got[..len], wanted);
        }
    }

    #[test]
    fn folders_lead_to_the_file() {
        let (kernel, dev) = queue();
        let queue = FuseQueue::open(dev.dev, FuseSession { depth: 2, ..SESSION });
        let ask = |opcode, node: u64| {
            let mut head = head(opcode, 56, 0);
            head[16..24].copy_from_slice(&node.to_le_bytes());
            let request = queue.parse_kept(&head).unwrap();
            if request.op != Op::Own {
                return (request.op, Vec::new());
            }
            queue.answer_own(&request, &Geometry { bytes: 10 << 20, block_bytes: 1 << 20 }).unwrap();
            let mut got = [0; 256];
            let len = nix::unistd::read(&kernel, &mut got).unwrap();
            (request.op, got[..len].to_vec())
        };
        let unique = 6 | protocol::RESENT;
        let own = |reply: protocol::Reply| (Op::Own, reply.bytes().to_vec());
        assert_eq!(ask(opcode::LOOKUP, 1), own(protocol::Reply::folder(unique, 2)));
        assert_eq!(ask(opcode::LOOKUP, 2), own(protocol::Reply::file(unique, 3, 10 << 20)));
        assert_eq!(ask(opcode::LOOKUP, 3).0, Op::Unsupported(libc::ENOTDIR));
        assert_eq!(ask(opcode::GETATTR, 2), own(protocol::Reply::folder_attr(unique, 2)));
        assert_eq!(ask(opcode::GETATTR, 3), own(protocol::Reply::attr(unique, 10 << 20)));
        assert_eq!(ask(opcode::OPEN, 3), own(protocol::Reply::open(unique)));
        assert_eq!(ask(opcode::FSYNC, 1).0, Op::Unsupported(libc::ENOSYS));
        assert_eq!(ask(opcode::FSYNC, 3).0, Op::Flush);
    }

    /// A successor gets every request that comes after the end of the reading.
    #[test]
    fn a_reader_that_is_quiet_has_no_poll_left() {
        let (kernel, queue) = queue();
        let arena = Arena::new(1 << 20, 0).unwrap();
        let (data, mut head) = (Span { at: 0, len: 4096 }, [0; HEAD]);
        assert!(matches!(queue.read(&arena, &mut head, data), Err(ReadError::Empty)));
        let mut ring = Ring::new(8, arena.clone()).unwrap();
        let mut reader = FuseReader::default();
        assert!(reader.quiesce(&mut ring).unwrap());

        let mut reader = FuseReader::default();
        reader.arm(&queue, &mut ring).unwrap();
        reader.arm(&queue, &mut ring).unwrap();
        assert!(!reader.quiesce(&mut ring).unwrap());
        let mut done = Vec::new();
        while done.len() < 2 {
            ring.submit(1).unwrap();
            ring.completions(&mut done);
        }
        assert!(done.iter().all(|c| TAGS.contains(&c.tag)));
        assert_eq!(done.iter().filter(|c| reader.on_completion(c.tag)).count(), 1);
        assert!(reader.quiesce(&mut ring).unwrap());
        nix::unistd::write(&kernel, &[1; 56]).unwrap();
        ring.submit(0).unwrap();
        done.clear();
        ring.completions(&mut done);
        assert!(done.is_empty(), "{done:?}");
    }
}

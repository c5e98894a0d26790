use super::super::core::{Core, DeferToIoThread};
use super::super::dispatch::{Verdict, dispatch};
use super::super::replay::{import, replay};
use super::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::chain;
use crate::engine::Engine;
use crate::engine::api::{Action, Config, ReqId};
use crate::format::header::Version;
use crate::image::create::create_delta;
use crate::server::proto::LevelName;
use crate::server::shm::{self, Shm};
use crate::server::transport::fuse_loop::connection::FuseSession;
use crate::server::transport::{Geometry, Session};
use crate::server::worker::memory::BIGS;
use crate::server::{frame, worker::core::CoreConfig};
use crate::units::ClusterSize;

use super::super::{log, open_files};

const READ: u32 = 15;
const WRITE: u32 = 16;
const FSYNC: u32 = 20;
const GETATTR: u32 = 3;
const INTERRUPT: u32 = 36;

fn request(opcode: u32, unique: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut r = vec![0; if opcode == FSYNC { 56 } else { HEAD }];
    r[4..8].copy_from_slice(&opcode.to_le_bytes());
    r[8..16].copy_from_slice(&unique.to_le_bytes());
    if r.len() == HEAD {
        r[48..56].copy_from_slice(&offset.to_le_bytes());
        r[56..60].copy_from_slice(&len.to_le_bytes());
    }
    if opcode == WRITE {
        r.extend((0..len).map(|i| ((u64::from(i) / 8) ^ unique) as u8));
    }
    let len = r.len() as u32;
    r[0..4].copy_from_slice(&len.to_le_bytes());
    r
}

fn data(unique: u64, len: u32) -> Vec<u8> {
    request(WRITE, unique, 0, len).split_off(HEAD)
}

/// The requests in these tests are those of a FUSE file, without resend by the kernel.
const SESSION: Session = Session::FuseLoop(FuseSession { minor: 45, max_write: 1 << 20, flags: 0, depth: 0 });

fn dev(queue: &Queue) -> BorrowedFd<'_> {
    let Queue::FuseLoop(queue) = queue else { panic!("another transport") };
    queue.as_fd()
}

/// A worker's memory, with a socket for /dev/fuse.
struct Desk {
    memory: Memory,
    pool: Pool,
    journal: RequestJournal,
    kernel: OwnedFd,
    queue: Queue,
}

impl Desk {
    fn new() -> Desk {
        let memory = Memory::new(2, true, SESSION.limits(), 1).unwrap();
        let journal = RequestJournal::create(&memory).unwrap();
        let (kernel, fuse) = frame::pair().unwrap();
        Desk { memory, pool: Pool::new(), journal, kernel, queue: Queue::open(fuse, SESSION) }
    }

    /// As the I/O threads do it.
    fn read(&self, id: u32, buf: BufId, r: &[u8]) -> KernelRequest {
        nix::unistd::write(&self.kernel, r).unwrap();
        let mut head = [0; HEAD];
        let len = self.journal.read(&self.queue, id, buf, self.memory.buffer(buf), &mut head).unwrap();
        self.queue.parse(&head, len).unwrap()
    }

    fn left(&self) -> PriorJournal {
        let fds = self.journal.fds().into_iter().map(|fd| fd.try_clone_to_owned().unwrap());
        PriorJournal::open(fds.collect(), &self.memory).unwrap()
    }

    /// What a successor makes of it, and its successor, and what both have.
    fn has_successor(&self) -> (Desk, BTreeMap<u32, JournalEntry>) {
        let (one, two) = (Desk::new(), Desk::new());
        self.left().copy(&one.journal, &one.queue, &one.memory, &one.pool).unwrap();
        one.left().copy(&two.journal, &two.queue, &two.memory, &two.pool).unwrap();
        assert_eq!(one.journal.filled(), two.journal.filled());
        let rows = two.journal.filled().into_iter().map(|f| (f.id, f)).collect();
        (two, rows)
    }

    fn bytes(&self, buf: BufId, len: u32) -> Vec<u8> {
        let mut got = vec![0; len as usize];
        self.memory.arena.get(self.memory.buffer(buf), &mut got);
        got
    }
}

fn small(n: u16) -> BufId {
    BufId::from_raw(BIGS as u16 + n)
}

#[test]
fn a_death_at_each_store() {
    let desk = Desk::new();
    let (id, big, small) = (7, BufId::from_raw(3), small(5));
    let head = request(WRITE, 42, 4096, 1024);
    let wanted = JournalEntry { id, buf: big, head: head[..HEAD].try_into().unwrap(), done: None };
    assert!(desk.journal.is_empty() && desk.has_successor().1.is_empty());
    // What was there before, answered or not understood, does not matter.
    desk.read(id, big, &request(GETATTR, 40, 0, 0));
    desk.journal.done(id, Err(libc::EIO));
    let mut empty = [0; HEAD];
    nix::fcntl::fcntl(dev(&desk.queue), nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
    let none = desk.journal.read(&desk.queue, id, big, desk.memory.buffer(big), &mut empty);
    // Nothing to be read, and the slot is free.
    assert!(matches!(none, Err(ReadError::Empty)), "{none:?}");
    assert!(desk.has_successor().1.is_empty());

    assert_eq!(desk.read(id, big, &head).unique, 42);
    let (successor, rows) = desk.has_successor();
    assert_eq!(rows.values().collect::<Vec<_>>(), [&wanted]);
    assert_eq!(successor.bytes(big, 1024), data(42, 1024));
    // Copied, but not yet told so.
    desk.memory.arena.copy(desk.memory.buffer(big).part(0, 1024), desk.memory.buffer(small));
    assert_eq!(desk.has_successor().1[&id], wanted);
    desk.journal.moved(id, small);
    desk.memory.arena.zero(desk.memory.buffer(big));
    let (successor, rows) = desk.has_successor();
    assert_eq!(rows[&id], JournalEntry { buf: small, ..wanted });
    assert_eq!(successor.bytes(small, 1024), data(42, 1024));
    for result in [Ok(()), Err(libc::ENOSPC)] {
        desk.journal.done(id, result);
        // No data are needed any more, and no buffer.
        assert_eq!(desk.has_successor().1[&id], JournalEntry { buf: BufId::NONE, done: Some(result), ..wanted });
    }
    desk.journal.clear(id);
    assert!(desk.journal.is_empty() && desk.has_successor().1.is_empty());
    // The next one in this slot is not done.
    desk.read(id, big, &request(READ, 44, 0, 4096));
    assert_eq!(desk.has_successor().1[&id].done, None);
}

#[test]
fn everything_is_found_and_belongs_to_nobody_else() {
    let desk = Desk::new();
    let extra = BufId::extra(20);
    while desk.pool.add_for_waiting(&desk.memory).unwrap() < 24 {}
    let longest = 1 << 20;
    // A socket takes no more than this at once.
    desk.read(1, BufId::from_raw(0), &request(WRITE, 2, 0, 128 << 10));
    desk.read(2, extra, &request(WRITE, 4, longest, 64 << 10));
    desk.read(3, BufId::from_raw(1), &request(READ, 6, 0, longest as u32));
    desk.read(4, small(9), &request(READ, 8, 512, 512));
    desk.read(5, BufId::from_raw(2), &request(FSYNC, 10, 0, 0));
    // Its buffer is another one's by now.
    desk.read(6, BufId::from_raw(2), &request(WRITE, 12, 0, 512));
    desk.read(511, BufId::from_raw(3), &request(INTERRUPT, 0, 0, 0));
    let (successor, rows) = desk.has_successor();
    assert_eq!(rows.keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
    assert_eq!(successor.bytes(BufId::from_raw(0), 128 << 10), data(2, 128 << 10));
    assert_eq!(successor.bytes(extra, 64 << 10), data(4, 64 << 10));
    assert_eq!(successor.bytes(BufId::from_raw(2), 512), data(12, 512));
    let taken = [BufId::from_raw(0), BufId::from_raw(1), BufId::from_raw(2), small(9), extra];
    assert_eq!(rows[&5].buf, BufId::NONE);
    let mut mine = successor.pool.share();
    let mut free = 0;
    loop {
        successor.pool.refill(&mut mine);
        let Some((buf, id)) = mine.next() else { break };
        mine.take_big();
        assert!(!taken.contains(&buf) && !rows.contains_key(&id), "{buf:?} {id}");
        free += 1;
    }
    // The big ones, and the extra ones that were made, but for the four.
    assert_eq!(free, BIGS + 21 - 4);
    while let Some(buf) = mine.take_small() {
        assert!(!taken.contains(&buf));
    }
    // Nobody writes to what was left.
    assert_eq!(desk.journal.filled().len(), 7);
    assert_eq!(desk.bytes(BufId::from_raw(2), 512), data(12, 512));
    // Two with one buffer: that cannot be, and nothing is guessed.
    desk.journal.moved(6, BufId::from_raw(1));
    let another = Desk::new();
    let e = desk.left().copy(&another.journal, &another.queue, &another.memory, &another.pool).unwrap_err();
    assert_eq!(e.kind(), Kind::Protocol, "{e}");
}

#[test]
fn other_layouts_are_left_alone() {
    let desk = Desk::new();
    desk.read(0, BufId::from_raw(0), &request(FSYNC, 10, 0, 0));
    let fds = |d: &Desk| d.journal.fds().into_iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect::<Vec<_>>();
    for at in [AT_MAGIC, AT_VERSION, AT_SHAPE, AT_SHAPE + 4, AT_SHAPE + 5] {
        let was = desk.journal.words[at].fetch_add(1, Relaxed);
        let e = PriorJournal::open(fds(&desk), &desk.memory).err().unwrap();
        assert_eq!(e.kind(), Kind::Protocol, "{e}");
        assert!(e.to_string().contains("another version of the server"), "{e}");
        desk.journal.words[at].store(was, Relaxed);
    }
    let short = shared_words::create(c"other", 8).unwrap();
    let e = PriorJournal::open(vec![short, fds(&desk).remove(1)], &desk.memory).err().unwrap();
    assert_eq!(e.kind(), Kind::Protocol, "{e}");
    let three = PriorJournal::open(fds(&desk).into_iter().take(1).collect(), &desk.memory).err().unwrap();
    assert_eq!(three.kind(), Kind::Protocol, "{three}");
    assert_eq!(desk.left().rows.len(), 1);
    // Where there is no request, nothing lies in the buffers.
    desk.journal.clear(0);
    desk.journal.words[AT_SHAPE + 1].fetch_add(1, Relaxed);
    assert!(desk.left().rows.is_empty());
}

/// A worker without threads, over an image of 64 MiB.
fn core(dir: &Path, shm: &Shm) -> (Core, OwnedFd) {
    let path = dir.join("image");
    if !path.exists() {
        create_delta(&path, Version::V2, ClusterSize::from_sectors(2048).unwrap(), 131_072).unwrap();
    }
    let fd = File::options().read(true).write(true).open(&path).unwrap();
    let names = [LevelName { path, raw: false }];
    let files = open_files::open(&[fd.into()], &names, true).unwrap();
    let options = chain::OpenOptions { writable: true, marked: chain::Marked::Recover, ..Default::default() };
    let chain = chain::open(&files, &options).unwrap();
    let config = Config {
        cluster_shift: chain.cluster.shift(),
        device_bytes: chain.device_bytes,
        levels: chain.levels.clone(),
        writable: true,
        header: chain.header,
        alloc: chain.alloc.clone(),
        bounces: 1,
        bounce_bytes: 1 << 20,
        map_pages: 64,
        bat_age: 5,
        failed: false,
        background: None,
    };
    let Desk { memory, journal, kernel, queue, .. } = Desk::new();
    let parts = CoreConfig {
        queue,
        memory,
        journal: Some(journal),
        engine: Engine::new(config, chain.carried.clone(), shm.clone()),
        levels: files,
        witnesses: Vec::new(),
        geometry: Geometry { bytes: chain.device_bytes, block_bytes: 1 << 20 },
        cluster_bytes: 1 << 20,
        writable: true,
        shm: shm.clone(),
        log: log::new(&dir.join("log"), false).0,
    };
    (Core::new(parts).unwrap(), kernel)
}

fn journal(core: &Core) -> &RequestJournal {
    core.journal.as_ref().unwrap()
}

fn left(core: &Core) -> PriorJournal {
    let fds = journal(core).fds().into_iter().map(|fd| fd.try_clone_to_owned().unwrap());
    PriorJournal::open(fds.collect(), &core.memory).unwrap()
}

/// The kernel hands a request to the worker, which puts it into slot `id`.
fn hand(core: &Core, kernel: &OwnedFd, id: u32, buf: BufId, r: &[u8]) -> (KernelRequest, Verdict) {
    nix::unistd::write(kernel, r).unwrap();
    let mut head = [0; HEAD];
    let len = journal(core).read(&core.queue, id, buf, core.memory.buffer(buf), &mut head).unwrap();
    let from = core.queue.parse(&head, len).unwrap();
    let verdict = dispatch(core, &from, false).unwrap();
    if let Verdict::Submit(request) = &verdict {
        core.register(id, &from, request, buf);
    }
    (from, verdict)
}

/// Answers that have come, by unique: the error, and how long they are.
fn answers(kernel: &OwnedFd) -> BTreeMap<u64, (i32, usize)> {
    let mut all = BTreeMap::new();
    let mut buf = vec![0; 1 << 17];
    while let Ok(len) = nix::sys::socket::recv(
        std::os::fd::AsRawFd::as_raw_fd(kernel),
        &mut buf,
        nix::sys::socket::MsgFlags::MSG_DONTWAIT,
    ) {
        let error = i32::from_le_bytes(buf[4..8].try_into().unwrap());
        all.insert(u64::from_le_bytes(buf[8..16].try_into().unwrap()), (error, len));
    }
    all
}

#[test]
fn what_is_done_is_answered_again_and_the_rest_executed() {
    let dir = tempfile::tempdir().unwrap();
    let memory = shm::create().unwrap();
    let shm = Shm::map(memory.as_fd()).unwrap();
    let (dead, kernel) = core(dir.path(), &shm);
    hand(&dead, &kernel, 0, BufId::from_raw(0), &request(WRITE, 2, 0, 4096));
    journal(&dead).done(0, Ok(()));
    hand(&dead, &kernel, 1, BufId::from_raw(1), &request(WRITE, 4, 4096, 512));
    hand(&dead, &kernel, 2, BufId::from_raw(2), &request(FSYNC, 6, 0, 0));
    journal(&dead).done(2, Err(libc::EIO));
    hand(&dead, &kernel, 3, BufId::from_raw(3), &request(READ, 8, 1 << 20, 512));
    hand(&dead, &kernel, 4, BufId::from_raw(4), &request(GETATTR, 10, 0, 0));

    let (next, kernel) = core(dir.path(), &shm);
    import(&next, &left(&dead)).unwrap();
    assert!(answers(&kernel).is_empty());
    replay(&next, journal(&next));
    let got = answers(&kernel);
    assert_eq!((got[&2], got[&6], got[&10]), ((0, 24), (-libc::EIO, 16), (0, 120)));
    assert_eq!(got.len(), 3);
    // The others are under way, and nothing else is in the table any more.
    let rows: Vec<_> = journal(&next).filled().iter().map(|f| (f.id, f.done)).collect();
    assert_eq!(rows, [(1, None), (3, None)]);
    assert_eq!(next.status().requests, 2);
    // The dead worker's slots are as they were.
    assert_eq!(left(&dead).rows.len(), 5);
}

#[test]
fn a_request_that_kills_fails_at_last() {
    let dir = tempfile::tempdir().unwrap();
    let memory = shm::create().unwrap();
    let shm = Shm::map(memory.as_fd()).unwrap();
    let (mut dead, kernel) = core(dir.path(), &shm);
    let (from, verdict) = hand(&dead, &kernel, 9, BufId::from_raw(0), &request(WRITE, 2, 0, 4096));
    let Verdict::Submit(request) = verdict else { panic!("{verdict:?}") };
    let key = crate::server::shm::RequestKey::new(from.unique, from.code, request.offset, request.len);
    for death in 1..=3 {
        shm.mark(0, Some(key));
        shm.count_marked_requests();
        let (next, kernel) = core(dir.path(), &shm);
        import(&next, &left(&dead)).unwrap();
        replay(&next, journal(&next));
        let out = death == 3;
        assert_eq!(answers(&kernel).get(&2), out.then_some(&(-libc::EIO, 16)));
        assert_eq!(journal(&next).is_empty(), out);
        dead = next;
    }
}

/// The sender of a request may write again as soon as it has the answer.
#[test]
fn done_comes_before_the_answer() {
    let dir = tempfile::tempdir().unwrap();
    let memory = shm::create().unwrap();
    let shm = Shm::map(memory.as_fd()).unwrap();
    let (core, kernel) = core(dir.path(), &shm);
    let core: &'static Core = Box::leak(Box::new(core));
    hand(core, &kernel, 5, BufId::from_raw(0), &request(WRITE, 2, 0, 512));
    // The kernel takes no answer.
    let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT;
    while nix::sys::socket::send(std::os::fd::AsRawFd::as_raw_fd(&dev(&core.queue)), &[0; 4096], flags).is_ok() {}
    std::thread::scope(|s| {
        let answering = s.spawn(|| {
            let mut actions = vec![Action::Reply { req: ReqId(5), result: Ok(()) }];
            core.execute(&mut actions, &mut DeferToIoThread);
        });
        let end = Instant::now() + Duration::from_secs(10);
        while journal(core).filled().iter().all(|f| f.done.is_none()) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        let rows = journal(core).filled();
        assert!(!answering.is_finished());
        assert_eq!(left(core).rows, rows);
        let seen = rows.iter().any(|f| f.done == Some(Ok(())));
        let got = answers(&kernel);
        let _ = answering.join();
        assert!(seen, "answered, but not done: {got:?}");
    });
    assert!(journal(core).is_empty());
}

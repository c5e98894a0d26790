//! The simulated kernel's block devices, and the transport by which workers serve them.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::world::world;
use crate::bail;
use crate::engine::api::Errno;
use crate::error::{Error, IoContext, Kind, Result};
use crate::server::transport::{
    Binding, BlockBinding, Connection, Geometry, HEAD, KernelRequest, Limits, Op, Patience, QueueReader, ReadError,
    Recovery, Reply, RequestQueue, Wanted,
};
use crate::sys::arena::{Arena, Span};
use crate::sys::host;
use crate::sys::ring::Ring;

/// How the names of the block devices begin.
pub const BLOCK_DEVICES: &str = "sim";

/// The file in a device's folder that names the connection until it is bound.
const DISK: &str = "disk";

/// A major number that no device of the real host has.
const MAJOR: u64 = 4000;

/// What a request asks for, as the simulated kernel has it.
#[derive(Clone, Debug)]
struct Asked {
    op: Op,
    data: Vec<u8>,
}

#[derive(Debug)]
struct Device {
    /// Becomes readable when no process holds the queue any more.
    alive: OwnedFd,
    next: u64,
    /// Not read yet.
    waiting: VecDeque<(u64, Asked, bool)>,
    /// Read and not answered.
    given: BTreeMap<u64, Asked>,
    answers: BTreeMap<u64, std::result::Result<Vec<u8>, Errno>>,
    bound: bool,
    /// Bytes of the disk, as the kernel learned it last; 0: it never asked.
    capacity: u64,
    /// Programs that have it open.
    openers: usize,
}

impl Device {
    /// The connection has ended.
    fn is_over(&self) -> bool {
        let mut fds = [PollFd::new(self.alive.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0)
    }
}

/// All block devices of a host.
#[derive(Clone, Debug, Default)]
pub struct Devices {
    all: Arc<Mutex<BTreeMap<u32, Device>>>,
}

impl Devices {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Device>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host was switched off.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn number(backing: &str) -> Option<u32> {
        backing.strip_prefix(BLOCK_DEVICES)?.parse().ok()
    }

    /// Requests without an answer: of which device, number, whether a worker has read it, and what it is.
    pub fn unanswered(&self) -> Vec<(u32, u64, bool, Op)> {
        let all = self.lock();
        let of = |(number, device): (&u32, &Device)| {
            let waiting = device.waiting.iter().map(|(unique, asked, _)| (*number, *unique, false, asked.op));
            let given = device.given.iter().map(|(unique, asked)| (*number, *unique, true, asked.op));
            waiting.chain(given).collect::<Vec<_>>()
        };
        all.iter().flat_map(of).collect()
    }

    /// A program opens the device, or closes it.
    pub fn open(&self, backing: &str, open: bool) -> bool {
        let mut all = self.lock();
        let device = Devices::number(backing).and_then(|n| all.get_mut(&n)).filter(|d| d.bound);
        match device {
            Some(device) => {
                device.openers = if open { device.openers + 1 } else { device.openers.saturating_sub(1) };
                true
            }
            None => false,
        }
    }

    /// Bytes of the disk as the kernel took them over last; 0: it did not.
    pub fn capacity(&self, backing: &str) -> u64 {
        Devices::number(backing).and_then(|n| Some(self.lock().get(&n)?.capacity)).unwrap_or(0)
    }

    pub fn is_bound(&self, backing: &str) -> bool {
        Devices::number(backing).is_some_and(|n| self.lock().get(&n).is_some_and(|d| d.bound))
    }

    /// Does a request of a program's, which waits for the answer.
    pub fn submit(&self, backing: &str, op: Op, data: Vec<u8>) -> std::result::Result<Vec<u8>, Errno> {
        let Some(number) = Devices::number(backing) else { return Err(libc::ENXIO) };
        self.submit_to(number, op, data)
    }

    fn submit_to(&self, number: u32, op: Op, data: Vec<u8>) -> std::result::Result<Vec<u8>, Errno> {
        let unique = {
            let mut all = self.lock();
            let Some(device) = all.get_mut(&number) else { return Err(libc::ENXIO) };
            device.next += 1;
            device.waiting.push_back((device.next, Asked { op, data }, false));
            device.next
        };
        world().say(format!("request {unique}: {op:?}"));
        let devices = self.clone();
        host::simulated::with(|host| {
            host.block(Box::new(move || {
                let all = devices.lock();
                all.get(&number).is_none_or(|d| d.answers.contains_key(&unique) || d.is_over())
            }));
        });
        let mut all = self.lock();
        let Some(device) = all.get_mut(&number) else { return Err(libc::ENXIO) };
        device.answers.remove(&unique).unwrap_or(Err(libc::EIO))
    }
}

/// What a worker has to know of its connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SimSession {
    simulated: u32,
    journal: bool,
}

/// The queue of a simulated device.
#[derive(Debug)]
pub struct SimQueue {
    number: u32,
    devices: Devices,
    _fd: OwnedFd,
}

impl SimQueue {
    /// A request can be read, or the connection is over.
    pub fn has_requests(&self) -> bool {
        self.devices.lock().get(&self.number).is_none_or(|d| !d.waiting.is_empty())
    }

    fn take(&self) -> std::result::Result<(u64, Asked, bool), ReadError> {
        let mut all = self.devices.lock();
        let Some(device) = all.get_mut(&self.number) else { return Err(ReadError::Over) };
        let Some((unique, asked, resent)) = device.waiting.pop_front() else { return Err(ReadError::Empty) };
        world().say(format!("reads request {unique}{}", if resent { ", sent again" } else { "" }));
        device.given.insert(unique, asked.clone());
        Ok((unique, asked, resent))
    }

    fn head(unique: u64, op: Op, resent: bool) -> [u64; 5] {
        let (code, offset, len) = match op {
            Op::Read { offset, len } => (1, offset, u64::from(len)),
            Op::Write { offset, len } => (2, offset, u64::from(len)),
            Op::Zero { offset, len } => (3, offset, len),
            Op::Own => (5, 0, 0),
            _ => (4, 0, 0),
        };
        [unique, code, offset, len, u64::from(resent)]
    }

    fn parse_words(words: [u64; 5]) -> Option<KernelRequest> {
        let [unique, code, offset, len, resent] = words;
        let op = match code {
            1 => Op::Read { offset, len: len as u32 },
            2 => Op::Write { offset, len: len as u32 },
            3 => Op::Zero { offset, len },
            4 => Op::Flush,
            5 => Op::Own,
            _ => return None,
        };
        Some(KernelRequest { unique, code: code as u32, op, resent: resent != 0 })
    }
}

impl RequestQueue for SimQueue {
    type Session = SimSession;
    type Reader = SimReader;

    const LIMITS: Limits = Limits { max_io: 64 << 10, in_flight: 16 };

    fn create(dir: &Path, _image: &str, journal: bool) -> Result<Connection<SimSession>> {
        host::step("create the connection").ctx(Kind::Device, || "killed")?;
        let journal = journal || world().journal;
        let (alive, queue) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).ctx(Kind::Sys, || "no pipe")?;
        let world = world();
        let number = {
            let mut all = world.devices.lock();
            let number = all.keys().last().map_or(1, |n| n + 1);
            let device = Device {
                alive,
                next: 0,
                waiting: VecDeque::new(),
                given: BTreeMap::new(),
                answers: BTreeMap::new(),
                bound: false,
                capacity: 0,
                openers: 0,
            };
            all.insert(number, device);
            number
        };
        fs::write(dir.join(DISK), number.to_string()).ctx(Kind::Open, || "cannot make the disk's file")?;
        Ok(Connection { queue, session: SimSession { simulated: number, journal }, number: u64::from(number) })
    }

    fn hide(dir: &Path) -> Result<()> {
        host::step("hide the connection").ctx(Kind::Device, || "killed")?;
        fs::remove_file(dir.join(DISK)).ctx(Kind::Unlink, || "cannot hide the connection")
    }

    fn discard(dir: &Path) {
        if host::step("discard the connection").is_ok() {
            let _ = fs::remove_file(dir.join(DISK));
        }
    }

    fn clean(dir: &Path) -> Result<()> {
        Self::discard(dir);
        Ok(())
    }

    fn recovery(session: &SimSession) -> Recovery {
        if session.journal { Recovery::Journal } else { Recovery::Kernel }
    }

    fn open(queue: OwnedFd, session: SimSession) -> SimQueue {
        SimQueue { number: session.simulated, devices: world().devices.clone(), _fd: queue }
    }

    fn read(&self, arena: &Arena, head: &mut [u8; HEAD], data: Span) -> std::result::Result<usize, ReadError> {
        let (unique, asked, resent) = self.take()?;
        for (bytes, word) in head.chunks_mut(8).zip(SimQueue::head(unique, asked.op, resent)) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        arena.put(data, &asked.data);
        Ok(HEAD + asked.data.len())
    }

    fn read_words(&self, arena: &Arena, head: &[AtomicU64], data: Span) -> std::result::Result<usize, ReadError> {
        let (unique, asked, resent) = self.take()?;
        arena.put(data, &asked.data);
        for (at, word) in head.iter().zip(SimQueue::head(unique, asked.op, resent)) {
            at.store(word, Relaxed);
        }
        Ok(HEAD + asked.data.len())
    }

    fn parse(&self, head: &[u8; HEAD], _len: usize) -> Option<KernelRequest> {
        self.parse_kept(head)
    }

    fn parse_kept(&self, head: &[u8; HEAD]) -> Option<KernelRequest> {
        let mut words = [0; 5];
        for (word, bytes) in words.iter_mut().zip(head.chunks(8)) {
            *word = u64::from_ne_bytes(bytes.try_into().ok()?);
        }
        SimQueue::parse_words(words)
    }

    fn stable_id(&self, unique: u64) -> u64 {
        unique
    }

    fn reply(&self, arena: &Arena, unique: u64, reply: Reply) -> io::Result<()> {
        world().say(format!("answers request {unique}"));
        host::step("answer a request")?;
        let mut all = self.devices.lock();
        let Some(device) = all.get_mut(&self.number) else { return Ok(()) };
        if device.given.remove(&unique).is_some() {
            let answer = match reply {
                Reply::Data(span) => {
                    let mut bytes = vec![0; span.len];
                    arena.get(span, &mut bytes);
                    Ok(bytes)
                }
                Reply::Written(_) | Reply::Done => Ok(Vec::new()),
                Reply::Error(errno) => Err(errno),
            };
            device.answers.insert(unique, answer);
        }
        Ok(())
    }

    /// The only one asks for the size.
    fn answer_own(&self, request: &KernelRequest, geometry: &Geometry) -> io::Result<()> {
        host::step("tell the size")?;
        let mut all = self.devices.lock();
        let Some(device) = all.get_mut(&self.number) else { return Ok(()) };
        if device.given.remove(&request.unique).is_some() {
            device.answers.insert(request.unique, Ok(geometry.bytes.to_ne_bytes().to_vec()));
        }
        Ok(())
    }

    fn resend(&self) -> io::Result<()> {
        host::step("have requests sent again")?;
        let mut all = self.devices.lock();
        let Some(device) = all.get_mut(&self.number) else { return Ok(()) };
        let again = std::mem::take(&mut device.given);
        device.waiting.extend(again.into_iter().map(|(unique, asked)| (unique, asked, true)));
        Ok(())
    }
}

/// Simulated workers read by themselves.
#[derive(Debug, Default)]
pub struct SimReader;

impl QueueReader<SimQueue> for SimReader {
    fn arm(&mut self, _queue: &SimQueue, _ring: &mut Ring) -> io::Result<()> {
        Ok(())
    }

    fn on_completion(&mut self, _tag: u64) -> bool {
        false
    }

    fn quiesce(&mut self, _ring: &mut Ring) -> io::Result<bool> {
        Ok(true)
    }
}

fn rdev(number: u32) -> u64 {
    nix::sys::stat::makedev(MAJOR, u64::from(number))
}

/// Number and sequence number of a simulated disk.
pub fn disk_identity(backing: &str) -> Option<(u64, u64)> {
    let number = Devices::number(backing)?;
    Some((rdev(number), u64::from(number)))
}

/// The simulated kernel's block devices as the server's helpers use them.
pub struct SimBinding;

impl BlockBinding for SimBinding {
    fn bind(&self, dir: &Path, _wanted: &Wanted, chosen: &mut dyn FnMut(&Binding) -> Result<()>) -> Result<Binding> {
        let text = fs::read_to_string(dir.join(DISK)).ctx(Kind::Open, || "no connection")?;
        let number: u32 = text.parse().map_err(|_| Error::new(Kind::Device, "no number"))?;
        let rdev = rdev(number);
        let mut binding = Binding { backing: format!("{BLOCK_DEVICES}{number}"), rdev, diskseq: 0 };
        chosen(&binding)?;
        host::step("bind the device").ctx(Kind::Loop, || "killed")?;
        let devices = world().devices.clone();
        match devices.lock().get_mut(&number) {
            Some(device) if !device.is_over() => device.bound = true,
            _ => bail!(Loop, "the connection is over"),
        }
        // The kernel looks for partitions: it waits for the worker.
        let _ = devices.submit_to(number, Op::Read { offset: 0, len: 4096 }, Vec::new());
        binding.diskseq = u64::from(number);
        Ok(binding)
    }

    fn is_bound(&self, backing: &str) -> bool {
        world().devices.is_bound(backing)
    }

    fn may_be_ours(&self, _backing: &str) -> bool {
        true
    }

    fn open(&self, _binding: &Binding, _flags: i32) -> io::Result<File> {
        host::step("open the device")?;
        Err(io::Error::from_raw_os_error(libc::ENXIO))
    }

    fn set_capacity(&self, binding: &Binding) -> Result<()> {
        host::step("ask for the size").ctx(Kind::DevIoc, || "killed")?;
        let Some(number) = Devices::number(&binding.backing) else { bail!(DevIoc, "no such device") };
        let devices = world().devices.clone();
        let told = devices.submit_to(number, Op::Own, Vec::new()).ok().and_then(|bytes| bytes.try_into().ok());
        let Some(told) = told else { bail!(DevIoc, "the size is not told") };
        host::step("take over the size").ctx(Kind::DevIoc, || "killed")?;
        if let Some(device) = devices.lock().get_mut(&number) {
            device.capacity = u64::from_ne_bytes(told);
        }
        Ok(())
    }

    fn unbind(&self, binding: &Binding, patience: Patience, opened: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let Some(number) = Devices::number(&binding.backing) else { bail!(DevIoc, "no such device") };
        let devices = world().devices.clone();
        let end = host::now() + patience.busy;
        while devices.lock().get(&number).is_some_and(|d| d.openers > 0) {
            if host::now() >= end {
                bail!(DevIoc, "{} is in use", binding.backing);
            }
            host::sleep(Duration::from_millis(100));
        }
        opened()?;
        host::step("unbind the device").ctx(Kind::DevIoc, || "killed")?;
        // The kernel flushes what it has.
        let over = devices.lock().get(&number).is_none_or(Device::is_over);
        if !over {
            let _ = devices.submit_to(number, Op::Flush, Vec::new());
        }
        host::step("remove the device").ctx(Kind::DevIoc, || "killed")?;
        if let Some(device) = devices.lock().get_mut(&number) {
            device.bound = false;
        }
        Ok(())
    }

    fn undo(&self, backing: &str, _rdev: u64) -> Result<()> {
        host::step("undo the binding").ctx(Kind::Loop, || "killed")?;
        let devices = world().devices.clone();
        let mut all = devices.lock();
        if let Some(device) = Devices::number(backing).and_then(|n| all.get_mut(&n)) {
            device.bound = false;
        }
        drop(all);
        Ok(())
    }

    fn abort(&self, connection: u64) -> Result<()> {
        host::step("abort the connection").ctx(Kind::Device, || "killed")?;
        let world = world();
        let mut all = world.devices.lock();
        if let Some(device) = all.get_mut(&(connection as u32)) {
            let unanswered: Vec<u64> = device.given.keys().copied().chain(device.waiting.iter().map(|w| w.0)).collect();
            device.given.clear();
            device.waiting.clear();
            for unique in unanswered {
                device.answers.insert(unique, Err(libc::EIO));
            }
        }
        Ok(())
    }
}

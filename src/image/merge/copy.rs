//! Moving the runs of a plan: shared if the file systems can, else copied by several threads, each with one large read
//! or write under way.

use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::image::open::{Access, reopen};
use crate::image::target::Target;
use crate::sys::aligned::{AlignedBuf, read_exact, write_all};
use crate::sys::{cache, store};
use crate::units::{ClusterSize, ImageCluster, VirtCluster};

use super::plan::{Destination, Extent, Plan};
use super::{MergeLevel, MergeOptions, Merged};

/// Bytes that a thread moves at once, or a cluster if that is more.
const CHUNK: u64 = 2 << 20;
const THREADS: usize = 4;
/// Bytes of the buffers of all threads, unless one cluster needs more.
const MEMORY: u64 = 64 << 20;
/// Bytes shared by one call.
const SHARE: u64 = 1 << 30;
/// How often progress is reported and a cancellation checked.
const TELL: Duration = Duration::from_millis(50);

/// Where the data goes.
pub struct Sink<'t, 'f> {
    /// None: raw.
    target: Option<&'t mut Target<'f>>,
    /// Host clusters not published yet.
    pending: Vec<(VirtCluster, ImageCluster)>,
    /// Bytes of a raw target.
    raw_bytes: u64,
    file: &'f File,
    name: PathBuf,
}

impl<'t, 'f> Sink<'t, 'f> {
    pub fn ploop(target: &'t mut Target<'f>) -> Sink<'t, 'f> {
        let (file, name) = (target.file, target.name.clone());
        Sink { target: Some(target), pending: Vec::new(), raw_bytes: 0, file, name }
    }

    pub fn raw(level: MergeLevel<'f>, bytes: u64) -> Sink<'t, 'f> {
        Sink { target: None, pending: Vec::new(), raw_bytes: bytes, file: level.file, name: level.name.to_owned() }
    }

    fn allocate(&mut self, wanted: u32) -> Result<Range<ImageCluster>> {
        match &mut self.target {
            Some(target) => target.allocate(wanted),
            None => bail!(Abort, "a raw image allocates no clusters"),
        }
    }

    /// Makes the data durable, then the entries that name it.
    fn publish(&mut self, touched: &AtomicBool) -> Result<()> {
        self.pending.sort_unstable();
        match &mut self.target {
            Some(target) => {
                if !self.pending.is_empty() {
                    target.sync()?;
                    touched.store(true, Ordering::Relaxed);
                }
                target.publish(&self.pending)?;
            }
            None => store::sync_data(self.file).ctx(Kind::Fsync, || format!("cannot sync {}", self.name.display()))?,
        }
        self.pending.clear();
        Ok(())
    }
}

/// An image, read and written through the page cache: its readahead and write-back are faster than direct I/O by the
/// same number of threads.
struct Io {
    file: File,
    name: PathBuf,
}

impl Io {
    fn open(level: &MergeLevel<'_>, write: bool) -> Result<Io> {
        let (file, _) = reopen(level.file, Access { write, direct: false })
            .ctx(Kind::Open, || format!("cannot open image {}", level.name.display()))?;
        Ok(Io { file, name: level.name.to_owned() })
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        read_exact(&self.file, buf, offset)
            .ctx(Kind::Read, || format!("cannot read image {} at offset {offset}", self.name.display()))?;
        // The data is not read a second time.
        cache::drop_clean(&self.file, offset, buf.len() as u64);
        Ok(())
    }

    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        write_all(&self.file, buf, offset)
            .ctx(Kind::Write, || format!("cannot write image {} at offset {offset}", self.name.display()))?;
        // So that the sync at the end finds little to do, and memory does not fill up.
        cache::start_writeback(&self.file, offset, buf.len() as u64);
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> Result<()> {
        let zeroed = match store::zero_range(&self.file, offset, len) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)) => {
                let zeroes = AlignedBuf::new(CHUNK.min(len) as usize);
                let mut done = 0;
                while done < len {
                    let n = (len - done).min(zeroes.len() as u64);
                    self.write(&zeroes[..n as usize], offset + done)?;
                    done += n;
                }
                Ok(())
            }
            other => other,
        };
        zeroed.ctx(Kind::Write, || format!("cannot zero image {} at offset {offset}", self.name.display()))
    }
}

pub struct Copier<'o, 'p> {
    sources: Vec<Io>,
    /// By source: data can be shared with the target.
    shares: Vec<bool>,
    target: Io,
    cluster: ClusterSize,
    options: &'o mut MergeOptions<'p>,
    total: u64,
    pub done: Merged,
}

impl<'o, 'p> Copier<'o, 'p> {
    pub fn new(
        sources: &[MergeLevel<'_>],
        target: MergeLevel<'_>,
        cluster: ClusterSize,
        options: &'o mut MergeOptions<'p>,
    ) -> Result<Copier<'o, 'p>> {
        Ok(Copier {
            sources: sources.iter().map(|l| Io::open(l, false)).collect::<Result<_>>()?,
            shares: vec![options.reflink; sources.len()],
            target: Io::open(&target, true)?,
            cluster,
            options,
            total: 0,
            done: Merged::default(),
        })
    }

    /// Finds out what can be shared, and reserves the space for the copies: a full file system is an error before
    /// anything changes.
    pub fn reserve(&mut self, plan: &Plan, sink: &mut Sink<'_, '_>) -> Result<()> {
        self.total = plan.bytes;
        let size = self.cluster.bytes();
        let Some(target) = &sink.target else { return Ok(()) };
        let (end, free) = (u64::from(target.table.end), &target.table.free);
        for (index, source) in self.sources.iter().enumerate() {
            let Some(extent) = plan.extents.iter().find(|e| e.source == index && !e.hole) else { continue };
            // Behind the end of the data: the first copy overwrites it, or it is cut at the end.
            let from = u64::from(extent.from) * size;
            let shares = &mut self.shares[index];
            *shares = *shares && store::clone_range(&source.file, from, &self.target.file, end * size, size).is_ok();
        }
        let copied = |e: &&Extent| e.needs_room() && (e.hole || !self.shares[e.source]);
        let new: u64 = plan.extents.iter().filter(copied).map(|e| u64::from(e.count)).sum();
        let inside: u64 = free.iter().map(|g| u64::from(g.end - g.start)).sum();
        let behind = new.saturating_sub(inside);
        target.check_room(plan.new.saturating_sub(inside))?;
        if behind == 0 {
            return Ok(());
        }
        let name = self.target.name.display();
        match store::fallocate(sink.file, end * size, behind * size) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => Ok(()),
            other => other.ctx(Kind::Fallocate, || {
                format!("cannot take {} bytes more for image {name}; nothing was merged", behind * size)
            }),
        }
    }

    /// Moves all runs, in batches each of which is made durable and published.
    pub fn all(&mut self, extents: &[Extent], sink: &mut Sink<'_, '_>, touched: &mut bool) -> Result<()> {
        let size = self.cluster.bytes();
        let spoiled = AtomicBool::new(*touched);
        let batch = (self.options.batch / size).max(1);
        let mut rest = extents.iter().copied().peekable();
        let mut held: Option<Extent> = None;
        let result = loop {
            let mut now = Vec::new();
            let mut room = batch;
            while room > 0 {
                let Some(extent) = held.take().or_else(|| rest.next()) else { break };
                let most = u64::from(extent.count).min(room) as u32;
                now.push(extent.part(0, most));
                room -= u64::from(most);
                if most < extent.count {
                    held = Some(extent.part(most, u32::MAX));
                }
            }
            if now.is_empty() {
                break Ok(());
            }
            let moved = self.batch(&now, sink, &spoiled).and_then(|()| sink.publish(&spoiled));
            if let Err(e) = moved {
                break Err(e);
            }
        };
        *touched |= spoiled.load(Ordering::Relaxed);
        result
    }

    fn batch(&mut self, extents: &[Extent], sink: &mut Sink<'_, '_>, touched: &AtomicBool) -> Result<()> {
        let mut copies = Vec::new();
        for extent in extents {
            if extent.hole || !self.shares[extent.source] {
                copies.push(*extent);
                continue;
            }
            let most = (SHARE / self.cluster.bytes()).max(1) as u32;
            let mut skip = 0;
            while skip < extent.count {
                let part = extent.part(skip, most);
                let shared = self.share(&part, sink, touched)?;
                if !shared {
                    self.shares[extent.source] = false;
                    copies.push(extent.part(skip, u32::MAX));
                    break;
                }
                skip += part.count;
                self.tell()?;
            }
        }
        self.copy(&copies, sink, touched)
    }

    fn tell(&mut self) -> Result<()> {
        let done = self.done.copied + self.done.shared + self.done.skipped;
        (self.options.progress)(done, self.total)
    }

    /// Shares a run. False: the file systems cannot do that.
    fn share(&mut self, extent: &Extent, sink: &mut Sink<'_, '_>, touched: &AtomicBool) -> Result<bool> {
        let size = self.cluster.bytes();
        let mut done = 0;
        while done < extent.count {
            let part = extent.part(done, u32::MAX);
            let (to, count) = match part.to {
                Destination::Own(host_cluster) => (u64::from(host_cluster) * size, part.count),
                Destination::Raw => (u64::from(part.cluster) * size, part.count),
                Destination::New => {
                    let got = sink.allocate(part.count)?;
                    let clusters = part.cluster..;
                    sink.pending.extend(clusters.zip(got.clone()));
                    (u64::from(got.start) * size, got.end - got.start)
                }
            };
            let mut len = u64::from(count) * size;
            if part.to == Destination::Raw {
                len = len.min(sink.raw_bytes.saturating_sub(to));
            }
            if part.to != Destination::New {
                touched.store(true, Ordering::Relaxed);
            }
            let from = u64::from(part.from) * size;
            match store::clone_range(&self.sources[part.source].file, from, &self.target.file, to, len) {
                // The clusters that were allocated for it stay unused; the copy allocates new ones.
                Err(e) if store::cannot_clone(&e) => {
                    sink.pending.retain(|(c, _)| !(part.cluster..part.cluster + count).contains(c));
                    return if done == 0 { Ok(false) } else { self.copy(&[part], sink, touched).map(|()| true) };
                }
                other => other.ctx(Kind::Write, || {
                    format!("cannot share data of {} with {}", self.sources[part.source].name.display(), {
                        self.target.name.display()
                    })
                })?,
            }
            self.done.shared += len;
            done += count;
        }
        Ok(true)
    }

    fn copy(&mut self, extents: &[Extent], sink: &mut Sink<'_, '_>, touched: &AtomicBool) -> Result<()> {
        if extents.is_empty() {
            return Ok(());
        }
        let pieces = (CHUNK / self.cluster.bytes()).max(1) as u32;
        let all: u32 = extents.iter().map(|e| e.count.div_ceil(pieces)).fold(0, u32::saturating_add);
        let raw_bytes = sink.raw_bytes;
        let shared = Shared {
            state: Mutex::new(State { extents, extent: 0, skip: 0, taken: 0, turn: 0, sink, failed: None, running: 0 }),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            moved: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            touched,
            sources: &self.sources,
            target: &self.target,
            size: self.cluster.bytes(),
            pieces,
            raw_bytes,
        };
        let before = self.done;
        let progress = &mut *self.options.progress;
        let total = self.total;
        let mut cancelled = None;
        thread::scope(|scope| {
            let memory = (MEMORY / (u64::from(pieces) * shared.size)).max(1) as usize;
            let threads = THREADS.min(all as usize).min(memory);
            shared.lock().running = threads;
            for _ in 0..threads {
                scope.spawn(|| shared.work());
            }
            let mut state = shared.lock();
            while state.running > 0 {
                state = shared.changed.wait_timeout(state, TELL).unwrap_or_else(PoisonError::into_inner).0;
                if cancelled.is_some() {
                    continue;
                }
                drop(state);
                let done = before.copied + before.shared + before.skipped;
                let now = shared.moved.load(Ordering::Relaxed) + shared.skipped.load(Ordering::Relaxed);
                if let Err(e) = progress(done + now, total) {
                    cancelled = Some(e);
                    shared.stop.store(true, Ordering::Relaxed);
                }
                state = shared.lock();
            }
        });
        self.done.copied += shared.moved.load(Ordering::Relaxed);
        self.done.skipped += shared.skipped.load(Ordering::Relaxed);
        let failed = shared.state.into_inner().unwrap_or_else(PoisonError::into_inner).failed;
        match failed.or(cancelled) {
            Some(e) => Err(e),
            None => Ok(()),
        }
    }
}

struct State<'s, 't, 'f> {
    extents: &'s [Extent],
    /// The next piece: the run, and how much of it was taken.
    extent: usize,
    skip: u32,
    /// Pieces taken, and the piece that gets host clusters next: in the order of the disk.
    taken: u64,
    turn: u64,
    sink: &'s mut Sink<'t, 'f>,
    failed: Option<Error>,
    running: usize,
}

struct Shared<'s, 't, 'f> {
    state: Mutex<State<'s, 't, 'f>>,
    changed: Condvar,
    stop: AtomicBool,
    moved: AtomicU64,
    skipped: AtomicU64,
    touched: &'s AtomicBool,
    sources: &'s [Io],
    target: &'s Io,
    size: u64,
    pieces: u32,
    raw_bytes: u64,
}

impl<'s, 't, 'f> Shared<'s, 't, 'f> {
    fn lock(&self) -> MutexGuard<'_, State<'s, 't, 'f>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<(u64, Extent)> {
        let mut state = self.lock();
        if state.failed.is_some() || self.stop.load(Ordering::Relaxed) {
            return None;
        }
        let extent = *state.extents.get(state.extent)?;
        let part = extent.part(state.skip, self.pieces);
        state.skip += part.count;
        if state.skip >= extent.count {
            state.extent += 1;
            state.skip = 0;
        }
        let turn = state.taken;
        state.taken += 1;
        Some((turn, part))
    }

    fn work(&self) {
        let mut buf = None;
        while let Some((turn, part)) = self.take() {
            let moved = self.piece(turn, &part, &mut buf);
            if let Err(e) = moved {
                let mut state = self.lock();
                state.failed.get_or_insert(e);
                self.changed.notify_all();
                break;
            }
        }
        self.lock().running -= 1;
        self.changed.notify_all();
    }

    fn piece(&self, turn: u64, part: &Extent, buf: &mut Option<AlignedBuf>) -> Result<()> {
        let size = self.size as usize;
        let len = part.count as usize * size;
        let mut bytes: &mut [u8] = &mut [];
        if !part.hole {
            bytes = &mut buf.get_or_insert_with(|| AlignedBuf::new(self.pieces as usize * size))[..len];
            self.sources[part.source].read(bytes, u64::from(part.from) * self.size)?;
        }
        // Clusters that need not be written.
        let skip: Vec<bool> = match (part.shadows, part.hole) {
            (true, _) => vec![false; part.count as usize],
            (false, true) => vec![true; part.count as usize],
            (false, false) => bytes.chunks(size).map(is_zero).collect(),
        };
        for (at, to, count) in self.destinations(turn, part, &skip)? {
            let mut len = u64::from(count) * self.size;
            if part.to == Destination::Raw {
                len = len.min(self.raw_bytes.saturating_sub(to));
            }
            if part.to != Destination::New {
                self.touched.store(true, Ordering::Relaxed);
            }
            if part.hole {
                self.target.zero(to, len)?;
            } else {
                let from = at as usize * size;
                self.target.write(&bytes[from..from + len as usize], to)?;
            }
        }
        let skipped = skip.iter().filter(|s| **s).count() as u64 * self.size;
        self.skipped.fetch_add(skipped, Ordering::Relaxed);
        self.moved.fetch_add(len as u64 - skipped, Ordering::Relaxed);
        Ok(())
    }

    /// Where the clusters of a piece go that are written: (index in the piece, offset in the target, count).
    fn destinations(&self, turn: u64, part: &Extent, skip: &[bool]) -> Result<Vec<(u32, u64, u32)>> {
        let mut state = self.lock();
        while state.turn != turn {
            if state.failed.is_some() {
                bail!(Abort, "stopped by an earlier error");
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let placed = match part.to {
            Destination::Own(host_cluster) => Ok(vec![(0, u64::from(host_cluster) * self.size, part.count)]),
            Destination::Raw => Ok(vec![(0, u64::from(part.cluster) * self.size, part.count)]),
            Destination::New => self.allocate(&mut state, part, skip),
        };
        state.turn += 1;
        drop(state);
        self.changed.notify_all();
        placed
    }

    fn allocate(&self, state: &mut State<'_, '_, '_>, part: &Extent, skip: &[bool]) -> Result<Vec<(u32, u64, u32)>> {
        let mut placed = Vec::new();
        let mut at = 0;
        while at < part.count {
            let wanted = skip.iter().skip(at as usize).take_while(|s| !**s).count() as u32;
            if wanted == 0 {
                at += 1;
                continue;
            }
            let got = state.sink.allocate(wanted)?;
            let count = got.end - got.start;
            state.sink.pending.extend((part.cluster + at..).zip(got.clone()));
            placed.push((at, u64::from(got.start) * self.size, count));
            at += count;
        }
        Ok(placed)
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    const ZEROES: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROES.len()).all(|c| c == &ZEROES[..c.len()])
}

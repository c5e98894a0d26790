//! Operations that wait in the kernel: syncs in one thread, allocation and zeroing in another.
//!
//! Syncs do not go by the ring, whose own threads are slower at it, and not in a thread that completes others: one slow
//! sync would hold up all reads.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{fdatasync, ftruncate};

use crate::chain::LevelFile;
use crate::sys::store;

use super::core::{AUX_THREAD, AuxJob, BACKGROUND_THREAD, Core, Pending, SYNC_THREAD};
use super::queue::Jobs;
use super::top_sync::TopSync;

/// File systems allocate and zero in blocks of at most so many bytes without touching their neighbours.
const BLOCK: u64 = 4096;

type Outcome = Result<(), Errno>;

/// The sync thread.
pub fn sync_thread(core: &Core) -> ! {
    let mut top = TopSync::new(&core.witnesses, &core.shm);
    loop {
        let op = core.syncs.pop();
        let result = top.sync(&core.top().file).map_err(|e| e as i32);
        core.submit_event(SYNC_THREAD, Pending::Done { op, result });
    }
}

/// The thread that allocates and zeroes for requests.
pub fn aux_thread(core: &Core) -> ! {
    run_jobs(core, AUX_THREAD, &core.aux)
}

/// The thread of background work.
pub fn background_thread(core: &Core) -> ! {
    run_jobs(core, BACKGROUND_THREAD, &core.background)
}

fn run_jobs(core: &Core, thread: usize, jobs: &Jobs<AuxJob>) -> ! {
    // The files of a chain can be on different file systems.
    let mut strategies: Vec<ZeroStrategy> = core.levels.iter().map(|_| ZeroStrategy::default()).collect();
    loop {
        let job = jobs.pop();
        core.shm.note_alive();
        let (op, result) = match job {
            AuxJob::Fallocate { op, level, file_off, len } => {
                (op, grow(&core.levels[usize::from(level)], file_off, len))
            }
            AuxJob::ZeroRange { op, level, file_off, len } => {
                let level = usize::from(level);
                (op, strategies[level].zero(core, &core.levels[level], file_off, len))
            }
            AuxJob::Truncate { op, level, len } => (op, cut(&core.levels[usize::from(level)], len)),
            AuxJob::AddBuffers => {
                core.add_buffers();
                continue;
            }
            AuxJob::Sync { op, level } => (op, retry_eintr(|| fdatasync(&core.levels[usize::from(level)].file))),
            AuxJob::Clone { op, from, from_off, level, file_off, len } => {
                let (from, to) = (&core.levels[usize::from(from)].file, &core.levels[usize::from(level)].file);
                let shared = store::clone_range(from, from_off, to, file_off, len);
                (op, shared.map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO))))
            }
        };
        core.submit_event(thread, Pending::Done { op, result: result.map_err(|e| e as i32) });
    }
}

fn retry_eintr(mut call: impl FnMut() -> nix::Result<()>) -> Outcome {
    loop {
        match call() {
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            other => return other,
        }
    }
}

fn unsupported(e: Errno) -> bool {
    matches!(e, Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL)
}

/// Makes the file at least `file_off + len` bytes long; what is new is allocated where the file system can do that.
fn grow(level: &LevelFile, file_off: u64, len: u64) -> Outcome {
    match retry_eintr(|| fallocate(&level.file, FallocateFlags::empty(), file_off as i64, len as i64)) {
        Err(e) if unsupported(e) => {}
        other => return other,
    }
    let end = file_off + len;
    let now = level.file.metadata().map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?.len();
    if now >= end { Ok(()) } else { retry_eintr(|| ftruncate(&level.file, end as i64)) }
}

/// Makes the file `len` bytes long. An error: it is as long as before.
fn cut(level: &LevelFile, len: u64) -> Outcome {
    match retry_eintr(|| ftruncate(&level.file, len as i64)) {
        Err(_) if level.file.metadata().is_ok_and(|now| now.len() == len) => Ok(()),
        other => other,
    }
}

/// What the file system has refused so far.
#[derive(Default)]
struct ZeroStrategy {
    no_zero_range: bool,
    no_punch: bool,
}

impl ZeroStrategy {
    fn zero(&mut self, core: &Core, level: &LevelFile, file_off: u64, len: u64) -> Outcome {
        let end = file_off + len;
        let (first, last) = (file_off.next_multiple_of(BLOCK), end - end % BLOCK);
        if first >= last {
            return write_zeroes(core, level, file_off, len);
        }
        // Within a block the file system would go through the page cache, past our direct I/O.
        write_zeroes(core, level, file_off, first - file_off)?;
        write_zeroes(core, level, last, end - last)?;
        self.zero_blocks(core, level, first, last - first)
    }

    fn zero_blocks(&mut self, core: &Core, level: &LevelFile, file_off: u64, len: u64) -> Outcome {
        let file = &level.file;
        let (at, n) = (file_off as i64, len as i64);
        if !self.no_zero_range {
            let mode = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            match retry_eintr(|| fallocate(file, mode, at, n)) {
                Err(e) if unsupported(e) => self.no_zero_range = true,
                other => return other,
            }
        }
        if !self.no_punch {
            let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            match retry_eintr(|| fallocate(file, mode, at, n)) {
                Err(e) if unsupported(e) => self.no_punch = true,
                // Space is only hoped for: a later write asks for it.
                other => return other,
            }
        }
        write_zeroes(core, level, file_off, len)
    }
}

fn write_zeroes(core: &Core, level: &LevelFile, mut file_off: u64, mut len: u64) -> Outcome {
    let zeroes = core.memory.zeroes();
    while len > 0 {
        let part = zeroes.part(0, len.min(zeroes.len as u64) as usize);
        match core.memory.arena.pwrite(level.file.as_fd(), part, file_off) {
            Ok(0) => return Err(Errno::EIO),
            Ok(n) => {
                file_off += n as u64;
                len -= n as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO))),
        }
    }
    Ok(())
}

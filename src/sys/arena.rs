//! The worker's I/O memory: one mapping, populated and locked, that lives as long as one of its owners.
//!
//! The kernel reads and writes it without the compiler's knowledge (rings, /dev/fuse), and several threads hand parts
//! of it to each other. So no reference to its bytes is ever made: it is copied into, copied from, and named by
//! offsets.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::sys::host;

/// Size of a transparent huge page on the machines we know; elsewhere only an alignment.
const HUGE: usize = 2 << 20;

/// A mapping of private memory, or of a file without a name that can outlive the process.
#[derive(Debug)]
pub struct Arena {
    base: NonNull<u8>,
    len: usize,
    file: Option<OwnedFd>,
}

// SAFETY: `base` points to a mapping that is unmapped only with the last owner of the arena, and every access goes by raw copies that make no
// reference; who may touch which part at what time is agreed among the threads and with the kernel outside of this
// type.
unsafe impl Send for Arena {}
// SAFETY: see above.
unsafe impl Sync for Arena {}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping is this arena's own, and with the last owner the last operation on it is over: who starts
        // one keeps an owner until it is completed.
        unsafe {
            libc::munmap(self.base.as_ptr().cast(), self.len);
        }
    }
}

/// A part of the arena: offset and length in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Span {
    pub at: usize,
    pub len: usize,
}

impl Span {
    /// `len` bytes from byte `off` of this part on; the whole must lie inside.
    pub fn part(self, off: usize, len: usize) -> Span {
        assert!(
            off <= self.len && len <= self.len - off,
            "bytes {off}+{len} of a buffer of {} are outside of it",
            self.len
        );
        Span { at: self.at + off, len }
    }
}

impl Arena {
    /// Maps `ready` bytes (rounded up to 2 MiB) on huge pages where they can be had, and touches all of them. They are
    /// locked where that is permitted, and never given back. After them comes address space for `reserve` bytes more,
    /// without memory; see [`open`](Self::open).
    pub fn new(ready: usize, reserve: usize) -> io::Result<Arc<Arena>> {
        Arena::make(ready, reserve, false)
    }

    /// Like [`new`](Self::new), in a memfd of the length of the arena, which can neither shrink nor grow: byte n of
    /// one is byte n of the other.
    pub fn new_shared(ready: usize, reserve: usize) -> io::Result<Arc<Arena>> {
        Arena::make(ready, reserve, true)
    }

    fn make(ready: usize, reserve: usize, shared: bool) -> io::Result<Arc<Arena>> {
        let ready = ready.next_multiple_of(HUGE);
        let len = ready + reserve.next_multiple_of(HUGE);
        // SAFETY: a fresh anonymous mapping, at a place that the kernel chooses, overlaps no other.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len + HUGE,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let skip = start.addr().next_multiple_of(HUGE) - start.addr();
        // SAFETY: `skip` is less than HUGE, and the mapping has HUGE bytes more than `len`; so `base .. base + len` and
        // the two rests lie inside the mapping made above, of which nothing is in use yet.
        let base = unsafe {
            let base = start.cast::<u8>().add(skip);
            if skip > 0 {
                libc::munmap(start, skip);
            }
            libc::munmap(base.add(len).cast(), HUGE - skip);
            libc::madvise(base.cast(), len, libc::MADV_DONTFORK);
            base
        };
        let Some(base) = NonNull::new(base) else {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        };
        let file = if shared { Some(put_file(base, len)?) } else { None };
        let arena = Arc::new(Arena { base, len, file });
        arena.open(Span { at: 0, len: ready })?;
        Ok(arena)
    }

    /// Puts locked memory behind a part of the reserve (whole pages). Until then every access to it is a fault.
    pub fn open(&self, span: Span) -> io::Result<()> {
        let at = self.ptr(span);
        // SAFETY: the part lies inside the mapping. Changing its protection from none to all affects no reference, the
        // advices do not change content, and the stores fall into memory that is not in use yet.
        unsafe {
            // First: where all memory is locked, the kernel fills a part as soon as it is accessible.
            if !host::is_simulated() {
                libc::madvise(at.cast(), span.len, libc::MADV_HUGEPAGE);
            }
            if libc::mprotect(at.cast(), span.len, libc::PROT_READ | libc::PROT_WRITE) != 0 {
                return Err(io::Error::last_os_error());
            }
            if host::is_simulated() {
                // Thousands of workers follow each other there, each of which uses little of it.
                return Ok(());
            }
            if self.file.is_some() {
                // Huge pages of shared memory are switched off nearly everywhere, but can be asked for (6.1 or later),
                // where there is one small page. That is also faster than many small ones.
                for page in (0..span.len).step_by(HUGE) {
                    at.add(page).write_volatile(0);
                }
                libc::madvise(at.cast(), span.len, libc::MADV_COLLAPSE);
            }
            if libc::madvise(at.cast(), span.len, libc::MADV_POPULATE_WRITE) != 0 {
                let e = io::Error::last_os_error();
                if e.raw_os_error() != Some(libc::EINVAL) {
                    return Err(e);
                }
                // Before 5.14: one store in every page does the same.
                for page in (0..span.len).step_by(4096) {
                    at.add(page).write_volatile(0);
                }
            }
            libc::mlock(at.cast(), span.len);
        }
        Ok(())
    }

    /// Gives back the memory of a part that [`open`](Self::open) made usable. Neither a thread nor the kernel may have
    /// any operation on it in flight; an access meets a fault.
    pub fn close(&self, span: Span) {
        let at = self.ptr(span);
        let give_back = if self.file.is_some() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        // SAFETY: the part lies inside the mapping and stays mapped, only without memory and access. A file has no
        // other user of this part than we are.
        unsafe {
            libc::munlock(at.cast(), span.len);
            libc::madvise(at.cast(), span.len, give_back);
            libc::mprotect(at.cast(), span.len, libc::PROT_NONE);
        }
    }

    /// The file, if the memory is shared.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(|f| f.as_fd())
    }

    /// Bytes of the arena, the reserve included.
    pub fn bytes(&self) -> usize {
        self.len
    }

    /// The address of a part, for the kernel. Panics if it is not inside: no offset comes from outside of the worker.
    pub(super) fn ptr(&self, span: Span) -> *mut u8 {
        assert!(
            span.at <= self.len && span.len <= self.len - span.at,
            "buffer {}+{} is outside of the arena of {} bytes",
            span.at,
            span.len,
            self.len
        );
        // SAFETY: just checked to be inside the mapping.
        unsafe { self.base.as_ptr().add(span.at) }
    }

    /// Copies `bytes` to the beginning of `to`.
    pub fn put(&self, to: Span, bytes: &[u8]) {
        let to = self.ptr(to.part(0, bytes.len()));
        // SAFETY: `to` has room for `bytes`, which is ordinary memory outside of the arena.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Fills `bytes` from the beginning of `from`.
    pub fn get(&self, from: Span, bytes: &mut [u8]) {
        let from = self.ptr(from.part(0, bytes.len()));
        // SAFETY: `from` holds as many bytes, and `bytes` is ordinary memory outside of the arena.
        unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Copies `from` to the beginning of `to`.
    pub fn copy(&self, from: Span, to: Span) {
        let to = self.ptr(to.part(0, from.len));
        // SAFETY: both lie inside the arena and are `from.len` bytes long; `copy` allows an overlap.
        unsafe { ptr::copy(self.ptr(from), to, from.len) }
    }

    /// Fills a part with zeroes.
    pub fn zero(&self, span: Span) {
        // SAFETY: the part lies inside the arena.
        unsafe { ptr::write_bytes(self.ptr(span), 0, span.len) }
    }

    /// Writes a part to `file` at `offset`; may write less.
    pub fn pwrite(&self, file: BorrowedFd, span: Span, offset: u64) -> io::Result<usize> {
        // SAFETY: the kernel only reads the part, which lies inside the arena.
        let n = unsafe { libc::pwrite(file.as_raw_fd(), self.ptr(span).cast(), span.len, offset as libc::off_t) };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
    }

    /// Reads from `file` at `offset` into a part; may read less.
    pub fn pread(&self, file: BorrowedFd, span: Span, offset: u64) -> io::Result<usize> {
        // SAFETY: the kernel writes at most the part, which lies inside the arena.
        let n = unsafe { libc::pread(file.as_raw_fd(), self.ptr(span).cast(), span.len, offset as libc::off_t) };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
    }

    /// One read from `fd` that fills `head` first, then the part.
    pub fn read_after(&self, fd: BorrowedFd, head: &mut [u8], span: Span) -> io::Result<usize> {
        let iov = [
            libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: head.len() },
            libc::iovec { iov_base: self.ptr(span).cast(), iov_len: span.len },
        ];
        // SAFETY: two buffers of the stated lengths: one exclusively borrowed, the other inside the arena.
        let n = unsafe { libc::readv(fd.as_raw_fd(), iov.as_ptr(), 2) };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
    }

    /// Like [`read_after`](Self::read_after), into words that other processes may read after this process has exited.
    pub fn read_after_words(&self, fd: BorrowedFd, head: &[AtomicU64], span: Span) -> io::Result<usize> {
        let iov = [
            libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: size_of_val(head) },
            libc::iovec { iov_base: self.ptr(span).cast(), iov_len: span.len },
        ];
        // SAFETY: two buffers of the stated lengths: atomics, which may change while they are shared and of which any
        // bytes are valid, and a part inside the arena.
        let n = unsafe { libc::readv(fd.as_raw_fd(), iov.as_ptr(), 2) };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
    }

    /// One write to `fd` of `head` followed by the part.
    pub fn write_after(&self, fd: BorrowedFd, head: &[u8], span: Span) -> io::Result<usize> {
        let iov = [
            libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() },
            libc::iovec { iov_base: self.ptr(span).cast(), iov_len: span.len },
        ];
        // SAFETY: the kernel only reads the two buffers, which have the stated lengths.
        let n = unsafe { libc::writev(fd.as_raw_fd(), iov.as_ptr(), if span.len == 0 { 1 } else { 2 }) };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
    }
}

/// Puts a new file of `len` bytes in the place of a mapping, without access.
fn put_file(base: NonNull<u8>, len: usize) -> io::Result<OwnedFd> {
    let file = memfd_create(c"ploop-buffers", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    nix::unistd::ftruncate(&file, len as i64)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    // SAFETY: `base .. base + len` is a mapping just made by the caller, of which nothing is in use yet; the file is as
    // long and sealed, so that no access can meet its end.
    let mapped = unsafe {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let mapped = libc::mmap(base.as_ptr().cast(), len, libc::PROT_NONE, flags, file.as_raw_fd(), 0);
        if mapped != libc::MAP_FAILED {
            libc::madvise(mapped, len, libc::MADV_DONTFORK);
        }
        mapped
    };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(file) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn parts_are_copied_and_cleared() {
        let a = Arena::new(1, 0).unwrap();
        assert_eq!(a.bytes(), HUGE);
        let one = Span { at: 4096, len: 16 };
        let two = Span { at: 8192, len: 16 };
        a.put(one, b"0123456789abcdef");
        a.copy(one.part(4, 8), two);
        a.zero(two.part(2, 2));
        let mut got = [0; 10];
        a.get(two, &mut got);
        assert_eq!(&got, b"45\0\089ab\0\0");
    }

    #[test]
    fn files_are_read_and_written_around_a_head() {
        let a = Arena::new(1, 0).unwrap();
        let (r, w) = nix::unistd::pipe().unwrap();
        let data = Span { at: 512, len: 6 };
        a.put(data, b"world!");
        assert_eq!(a.write_after(w.as_fd(), b"hello ", data).unwrap(), 12);
        let mut head = [0; 4];
        assert_eq!(a.read_after(r.as_fd(), &mut head, Span { at: 0, len: 100 }).unwrap(), 12);
        let mut rest = [0; 8];
        a.get(Span { at: 0, len: 8 }, &mut rest);
        assert_eq!((&head, &rest), (b"hell", b"o world!"));
    }

    #[test]
    fn a_reserve_comes_and_goes() {
        let a = Arena::new(1, 4 << 20).unwrap();
        assert_eq!(a.bytes(), HUGE + (4 << 20));
        let part = Span { at: HUGE + (1 << 20), len: 1 << 20 };
        a.open(part).unwrap();
        a.put(part, b"here");
        a.close(part);
        a.open(part).unwrap();
        let mut got = [1; 4];
        a.get(part, &mut got);
        assert_eq!(got, [0; 4]);
        a.close(part);
    }

    #[test]
    fn what_is_shared_is_found_in_the_file() {
        let a = Arena::new_shared(1, 4 << 20).unwrap();
        let file = File::from(a.file().unwrap().try_clone_to_owned().unwrap());
        assert_eq!(file.metadata().unwrap().len(), (HUGE + (4 << 20)) as u64);
        assert!(file.metadata().unwrap().blocks() * 512 <= HUGE as u64);
        let (r, w) = nix::unistd::pipe().unwrap();
        nix::unistd::write(&w, b"12345678head, then data").unwrap();
        let words = [const { AtomicU64::new(0) }; 1];
        assert_eq!(a.read_after_words(r.as_fd(), &words, Span { at: 4096, len: 100 }).unwrap(), 23);
        assert_eq!(words[0].load(std::sync::atomic::Ordering::Relaxed).to_ne_bytes(), *b"12345678");
        let mut got = [0; 15];
        file.read_exact_at(&mut got, 4096).unwrap();
        assert_eq!(&got, b"head, then data");
        // The reserve comes without content, and goes.
        let part = Span { at: HUGE + (2 << 20), len: 2 << 20 };
        for _ in 0..2 {
            a.open(part).unwrap();
            a.get(part, &mut got);
            assert_eq!(got, [0; 15]);
            a.put(part, b"here");
            a.close(part);
            assert!(file.metadata().unwrap().blocks() * 512 <= HUGE as u64);
        }
        assert!(file.set_len(1).is_err());
    }

    #[test]
    #[should_panic(expected = "outside of the arena")]
    fn nothing_outside_is_touched() {
        let a = Arena::new(1, 0).unwrap();
        a.zero(Span { at: HUGE - 8, len: 9 });
    }
}

//! The C library's output streams. A C program that prints with printf() and the library's own messages share one
//! buffer this way, so that their order survives a redirection to a file or a pipe.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

unsafe extern "C" {
    static stdout: *mut libc::FILE;
    static stderr: *mut libc::FILE;
}

/// Which stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stream {
    Out,
    Err,
}

/// A duplicate of the descriptor that the user of this program named by its number, closed on exec.
pub fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only; the result is a descriptor of its own that no other code knows.
    match unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: just made, owned by nothing else.
        new => Ok(unsafe { OwnedFd::from_raw_fd(new) }),
    }
}

/// Writes `text` to the stream and flushes it. A closed or full stream loses the text: messages have no one to complain
/// to.
pub fn print(stream: Stream, text: &str) {
    // SAFETY: `stdout` and `stderr` are initialised by the C library before any code of ours runs and stay valid for
    // the life of the process; fwrite() reads `text.len()` bytes of a live slice and locks the stream itself.
    unsafe {
        let file = match stream {
            Stream::Out => stdout,
            Stream::Err => stderr,
        };
        if !file.is_null() {
            libc::fwrite(text.as_ptr().cast(), 1, text.len(), file);
            libc::fflush(file);
        }
    }
}

/// Writes `bytes` past all buffers, for signal handlers: async-signal-safe, never blocks on a lock of this process.
pub fn raw_write(fd: RawFd, bytes: &[u8]) {
    // SAFETY: write() reads `bytes.len()` bytes of a live slice.
    unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
}

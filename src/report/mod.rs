//! Messages for users: levels, console, log file, the last error of a thread; and [`cancel`].
//!
//! Levels are the classic ones: -1 error or important warning, 0 normal progress, 1 detail, 3 debug. Console and log
//! file are both off until asked for, have a level each, and are global to the process. The last error belongs to the
//! thread, is kept whatever the levels are, and is never cleared.

#![forbid(unsafe_code)]

pub mod cancel;
pub mod progress;

use crate::error::Error;
use crate::sys::calendar::local_timestamp;
use crate::sys::console;
use crate::sys::stdio::Stream;
use nix::errno::Errno;
use std::cell::Cell;
use std::ffi::c_char;
use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, PoisonError};

pub use crate::sys::console::{NO_CONSOLE, NO_STDOUT, TIMESTAMPS};

/// Level of errors and important warnings.
pub const ERROR: i32 = -1;

/// Longest text kept as a thread's last error, in bytes.
pub const LAST_ERROR_MAX: usize = 8191;

static LOG_LEVEL: AtomicI32 = AtomicI32::new(3);
static LOG_FILE: Mutex<Option<File>> = Mutex::new(None);

thread_local! {
    /// NUL-terminated. Const-initialised and without a destructor: C callers keep its address, which is valid until the
    /// thread exits, and the library can be unloaded while a thread that used it runs.
    static LAST: Cell<[u8; LAST_ERROR_MAX + 1]> = const { Cell::new([0; LAST_ERROR_MAX + 1]) };
}

/// Progress and details: `level` 0 is normal progress, 1 a detail, 3 debug. Keeps `errno`.
pub fn say(level: i32, message: impl Display) {
    let console = console::wants(level);
    if console || LOG_LEVEL.load(Ordering::Relaxed) >= level {
        emit(level, &message.to_string());
    }
}

/// An error: console, log file, and the thread's last error. The system's text is part of the error's own text.
pub fn error(error: &Error) {
    warn(error);
}

/// An important message that does not fail the operation. Goes where errors go, the last error included.
pub fn warn(message: impl Display) {
    let text = message.to_string();
    keep(&text);
    emit(ERROR, &text);
}

/// Sets the console level.
pub fn set_verbose_level(level: i32) {
    console::set_level(level);
}

/// From here on standard output and standard error get nothing, progress included: another end reads a stream from one of them.
pub fn silence() {
    console::set_level(NO_CONSOLE);
    progress::show(progress::Wanted::Nothing, NO_CONSOLE);
}

/// The console level.
pub fn verbose_level() -> i32 {
    console::level()
}

/// Sets the log file's level.
pub fn set_log_level(level: i32) {
    console::start_clock();
    LOG_LEVEL.store(level, Ordering::Relaxed);
}

/// Opens `path` for appending (made with 0666 less the umask) and then closes the old log file; `None` only closes. The
/// old file stays in use when the new one cannot be opened.
pub fn set_log_file(path: Option<&Path>) -> io::Result<()> {
    console::start_clock();
    let new = match path {
        Some(path) => Some(OpenOptions::new().append(true).create(true).open(path)?),
        None => None,
    };
    *LOG_FILE.lock().unwrap_or_else(PoisonError::into_inner) = new;
    Ok(())
}

/// The last error of this thread, `""` before the first.
pub fn last_error() -> String {
    LAST.with(|last| {
        let bytes: Vec<u8> = cells(last).iter().map(Cell::get).take_while(|b| *b != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// The last error of this thread for C: NUL-terminated, valid until the thread exits, overwritten by its next error.
pub fn last_error_ptr() -> *const c_char {
    LAST.with(|last| last.as_ptr().cast_const().cast())
}

fn cells(last: &Cell<[u8; LAST_ERROR_MAX + 1]>) -> &[Cell<u8>] {
    let slice: &Cell<[u8]> = last;
    slice.as_slice_of_cells()
}

fn keep(text: &str) {
    // Cut between characters; a NUL would end the C string early.
    let mut end = text.len().min(LAST_ERROR_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    // Fails only while the thread exits, when no caller can read the text any more.
    let _ = LAST.try_with(|last| {
        let cells = cells(last);
        for (cell, byte) in cells.iter().zip(text.as_bytes()[..end].iter().chain([&0])) {
            cell.set(*byte);
        }
        for (cell, byte) in cells.iter().zip(&text.as_bytes()[..end]) {
            if *byte == 0 {
                cell.set(b'?');
            }
        }
    });
}

fn emit(level: i32, text: &str) {
    let errno = Errno::last();
    if console::wants(level) {
        progress::aside(|| console::print(if level < 0 { Stream::Err } else { Stream::Out }, text));
    }
    log(level, text);
    errno.set();
}

fn log(level: i32, text: &str) {
    if LOG_LEVEL.load(Ordering::Relaxed) >= level {
        let mut file = LOG_FILE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = file.as_mut() {
            // One write per line, so that lines of several processes do not mix. A full disk must not fail an operation.
            let _ = file.write_all(format!("{} : {text}\n", local_timestamp()).as_bytes());
        }
    }
}

/// Logs the cancellation when the operation ends: the signal handler must not take the lock of the log file. `done`: the
/// operation was complete before it could stop, which users must be told.
fn log_cancel(done: bool) {
    match done {
        true => warn("The request to stop came too late: what was asked for is done"),
        false => log(0, "Cancelled"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn last_error_is_per_thread_and_bounded() {
        std::thread::spawn(|| {
            assert_eq!(last_error(), "");
            error(&Error::new(Kind::Param, "first"));
            say(0, "progress does not replace it");
            assert_eq!(last_error(), "first");
            let ptr = last_error_ptr();
            warn("ä".repeat(5000));
            assert_eq!(last_error().len(), 8190, "cut between characters");
            assert_eq!(ptr, last_error_ptr(), "the address never changes");
            warn("short\0tail");
            assert_eq!(last_error(), "short?tail");
            std::thread::spawn(|| assert_eq!(last_error(), "")).join().expect("other thread");
        })
        .join()
        .expect("thread");
    }

    #[test]
    fn log_file_gets_lines_by_level_and_survives_a_bad_replacement() {
        let dir = tempfile::tempdir().expect("scratch folder");
        let path = dir.path().join("log");
        set_log_file(Some(&path)).expect("log file");
        say(3, "a debug line of this test");
        say(4, "a line above the level");
        assert!(set_log_file(Some(&dir.path().join("no/such/folder"))).is_err());
        Errno::ENOTTY.set();
        say(0, "still the same file");
        assert_eq!(Errno::last(), Errno::ENOTTY, "errno is kept");
        set_log_file(None).expect("close");
        let text = std::fs::read_to_string(&path).expect("read");
        let line = text.lines().find(|l| l.ends_with(" : a debug line of this test")).expect("line");
        assert_eq!(line.find(" : "), Some(24), "{line}");
        assert!(text.contains(" : still the same file\n"));
        assert!(!text.contains("above the level"));
    }
}

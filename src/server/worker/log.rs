//! The worker's log, written by a thread of its own: a thread that serves I/O must not wait for a log.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::SystemTime;

/// Lines that may wait to be written; further ones are counted and dropped.
const LINES: usize = 1024;
/// A log file of this size is begun anew: it lives in memory.
const FILE_LIMIT: u64 = 4 << 20;

/// Takes lines and never waits.
#[derive(Debug)]
pub struct Log {
    lines: SyncSender<String>,
    lost: AtomicU64,
    /// Every request is logged.
    pub trace: bool,
}

/// The other end, for the thread that writes.
#[derive(Debug)]
pub struct Sink {
    lines: Receiver<String>,
    path: PathBuf,
}

/// A log in the file `path`, which is made by the first line.
pub fn new(path: &Path, trace: bool) -> (Log, Sink) {
    let (sender, lines) = sync_channel(LINES);
    (Log { lines: sender, lost: AtomicU64::new(0), trace }, Sink { lines, path: path.into() })
}

impl Log {
    /// Writes to the top, `name`, wait for space, or do so no longer.
    pub fn space(&self, name: &Path, full: bool) {
        let name = name.display();
        self.line(match full {
            true => format!("writes wait for space: the file system of {name} is full, or a quota on it is used up"),
            false => format!("writes do not wait any more: there is space for {name}"),
        });
    }

    pub fn line(&self, line: String) {
        #[cfg(test)]
        if crate::sys::host::is_simulated() {
            return crate::sys::host::simulated::with(|host| host.log(line));
        }
        if self.lines.try_send(line).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 && self.lines.try_send(format!("{lost} lines were lost")).is_err() {
            self.lost.fetch_add(lost, Ordering::Relaxed);
        }
    }
}

impl Sink {
    /// Writes lines until all senders are gone.
    pub fn run(self) {
        let mut file = None;
        for line in &self.lines {
            if file.is_none() {
                file = self.open();
            }
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let pid = std::process::id();
            if let Some(f) = &mut file
                && writeln!(f, "{}.{:06} worker {pid}: {line}", now.as_secs(), now.subsec_micros()).is_ok()
                && f.metadata().is_ok_and(|m| m.len() > FILE_LIMIT)
            {
                let _ = f.set_len(0);
            }
        }
    }

    fn open(&self) -> Option<File> {
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(&self.path).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_written_and_losses_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let (log, sink) = new(&path, false);
        for i in 0..LINES + 5 {
            log.line(format!("line {i}"));
        }
        std::thread::scope(|s| {
            s.spawn(|| sink.run());
            while !std::fs::read_to_string(&path).unwrap_or_default().contains("lines were lost") {
                log.line("again".into());
            }
            drop(log);
        });
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("line 0\n") && text.contains("line 1023\n") && !text.contains("line 1024\n"));
    }
}

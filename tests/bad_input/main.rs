//! Input that strangers, accidents or other programs may have made: each row is a command, its exit code, and the words
//! that its message must hold (what it is about, the value seen, what is wanted or to be done). Nothing that was there
//! before may have changed by a byte, nothing may panic, no device may be left.
//!
//! `BAD_INPUT_SHOW=1` prints every message.

#[path = "../common/mod.rs"]
mod common;
mod disks;
mod images;
mod make;
mod sockets;
mod twice;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// A command on what `make` puts into an empty folder.
pub struct Row {
    pub name: &'static str,
    pub make: fn(&Path),
    /// `{}` stands for the folder.
    pub args: &'static [&'static str],
    pub code: i32,
    pub says: &'static [&'static str],
}

impl Row {
    /// Needs the rights, and the kernel, for devices.
    fn needs_root(&self) -> bool {
        self.args[0] == "mount"
    }
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

pub fn has_devices() -> bool {
    common::skip::no_devices().is_none()
}

/// Runs `ploop`, which must end in good time and not by a panic.
pub fn ploop(args: &[String]) -> Output {
    let mut command = Command::new("timeout");
    command.arg("120").arg(env!("CARGO_BIN_EXE_ploop")).args(args).stdin(Stdio::null());
    let out = command.env("PLOOP_SERVER", env!("CARGO_BIN_EXE_ploop-server")).output().expect("timeout runs");
    let text = text(&out);
    assert!(!text.contains("panicked"), "ploop {args:?} panics: {text}");
    assert_ne!(out.status.code(), Some(124), "ploop {args:?} does not end: {text}");
    out
}

pub fn text(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// A folder that is empty and goes with the value.
pub fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("bad-input-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("scratch folder")
}

/// Path, kind and SHA-256 of everything in a folder; the empty lock files that operations leave do not count.
pub fn contents(dir: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("folder").flatten() {
            let (path, kind) = (entry.path(), entry.file_type().expect("type"));
            if kind.is_dir() {
                folders.push(path.clone());
            } else if kind.is_file() && path.extension().is_none_or(|e| e != "lck") {
                files.push(path.clone());
            }
            if path.extension().is_none_or(|e| e != "lck") {
                all.insert(path, format!("{kind:?}"));
            }
        }
    }
    if !files.is_empty() {
        let out = Command::new("sha256sum").arg("-z").args(&files).output().expect("sha256sum runs");
        for line in String::from_utf8_lossy(&out.stdout).split('\0').filter(|l| !l.is_empty()) {
            let (sum, name) = line.split_once("  ").expect("sum and name");
            all.insert(name.into(), sum.into());
        }
    }
    all
}

/// What is wrong with a row, if anything.
fn judge(row: &Row) -> Result<(), String> {
    let dir = scratch();
    let folder = dir.path().canonicalize().expect("folder");
    (row.make)(&folder);
    let before = contents(&folder);
    let args: Vec<String> = row.args.iter().map(|a| a.replace("{}", &folder.to_string_lossy())).collect();
    let out = ploop(&args);
    let text = text(&out);
    if std::env::var_os("BAD_INPUT_SHOW").is_some() {
        println!("{:3} {}: {}", out.status.code().unwrap_or(-1), row.name, text.trim());
    }
    let mut wrong = Vec::new();
    if row.needs_root() && out.status.success() {
        // It must not stay whatever it is.
        let _ = ploop(&["umount".into(), args.last().cloned().unwrap_or_default()]);
    }
    if out.status.code() != Some(row.code) {
        wrong.push(format!("exit code {:?}, wanted {}", out.status.code(), row.code));
    }
    for word in row.says.iter().map(|s| s.replace("{}", &folder.to_string_lossy())) {
        if !text.contains(&word) {
            wrong.push(format!("does not say {word:?}"));
        }
    }
    if text.len() > 4000 + 4 * folder.as_os_str().len() {
        wrong.push(format!("{} bytes of message", text.len()));
        return Err(format!("{}: {}", row.name, wrong.join("; ")));
    }
    if contents(&folder) != before {
        wrong.push("files changed".into());
    }
    match wrong.is_empty() {
        true => Ok(()),
        false => Err(format!("{} ({}): {}\n  {}", row.name, args.join(" "), wrong.join("; "), text.trim())),
    }
}

/// Judges all rows of a table, on as many threads as there are processors.
fn judge_all(rows: &[Row]) {
    let skipped = rows.iter().filter(|r| r.needs_root() && !has_devices()).count();
    if skipped > 0 {
        common::skip::skip(&format!("{skipped} rows mount, which needs root, /dev/fuse and /dev/loop-control"));
    }
    let todo: Vec<&Row> = rows.iter().filter(|r| !r.needs_root() || has_devices()).collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let failures: Vec<String> = std::thread::scope(|s| {
        let work = || {
            let take = || todo.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
            std::iter::from_fn(take).filter_map(|row| judge(row).err()).collect::<Vec<_>>()
        };
        let threads = std::thread::available_parallelism().map_or(2, |n| n.get()).min(8);
        let threads: Vec<_> = (0..threads).map(|_| s.spawn(work)).collect();
        threads.into_iter().flat_map(|t| t.join().expect("no panic")).collect()
    });
    println!("{} rows", todo.len());
    assert!(failures.is_empty(), "{} of {} rows:\n{}", failures.len(), todo.len(), failures.join("\n"));
}

#[test]
fn images_are_refused_with_reasons() {
    judge_all(images::ROWS);
}

#[test]
fn descriptors_are_refused_with_reasons() {
    judge_all(disks::ROWS);
}

#[test]
fn there_are_rows_enough() {
    let rows = images::ROWS.len() + disks::ROWS.len() + twice::ROWS + sockets::ROWS;
    assert!(rows >= 60, "{rows} rows: at least 60 wanted");
    let mut names: Vec<&str> = images::ROWS.iter().chain(disks::ROWS).map(|r| r.name).collect();
    names.sort_unstable();
    let count = names.len();
    names.dedup();
    assert_eq!(names.len(), count, "two rows have one name");
}

/// Waits until something holds, for at most ten seconds.
pub fn soon(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..200 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{what} does not come true");
}

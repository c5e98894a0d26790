//! Helper programs (mkfs, tune2fs, fsck, ...): where they are found, how they are run, and which output is kept.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Error, Kind, Result};
use crate::report;

/// Folders of helper programs, searched in this order. The caller's PATH is ignored.
const FOLDERS: [&str; 5] = ["/sbin", "/bin", "/usr/sbin", "/usr/bin", "/usr/local/sbin"];

/// Exit status of a program that could not be started.
pub const NOT_STARTED: i32 = 127;

/// At most this much of a program's output is kept.
const KEEP: usize = 64 * 1024;

/// How a program ended.
#[derive(Debug)]
pub struct Outcome {
    /// Exit status; 127 not started, 128 + signal when killed.
    pub status: i32,
    pub out: String,
    pub err: String,
}

impl Outcome {
    /// What the program complained about, or its status: for the end of an error message.
    pub fn complaint(&self) -> String {
        let lines: Vec<&str> = self.err.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
        let tail = &lines[lines.len().saturating_sub(4)..];
        match tail.is_empty() {
            true => format!("status {}", self.status),
            false => format!("status {}: {}", self.status, tail.join("; ")),
        }
    }
}

/// Where a helper is: an absolute name as it is, the tools of ext file systems first where OpenVZ puts its own.
pub fn find(program: &str) -> Option<PathBuf> {
    if program.starts_with('/') {
        return executable(Path::new(program)).then(|| program.into());
    }
    let own: Vec<PathBuf> = match program.strip_suffix("2fs") {
        Some(stem @ ("tune" | "resize" | "dumpe")) => {
            vec![format!("/usr/libexec/{stem}2fs").into(), format!("/sbin/{stem}4fs").into()]
        }
        _ => Vec::new(),
    };
    own.into_iter().chain(FOLDERS.iter().map(|f| Path::new(f).join(program))).find(|p| executable(p))
}

fn executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Runs a program to its end with an empty standard input. Its output goes to the log (level 1). A program that is not
/// there gives status 127, as in a shell. An error is returned only if the run was cancelled or the exit status could
/// not be collected.
pub fn run(program: &str, args: &[&OsStr]) -> Result<Outcome> {
    let shown = show(program, args);
    report::say(1, format_args!("Running: {shown}"));
    if report::cancel::requested() {
        return Err(Error::new(Kind::Sys, format!("{shown}: not run, the operation was cancelled")));
    }
    let Some(path) = find(program) else {
        let err = format!("{program} not found in {}", FOLDERS.join(", "));
        return Ok(Outcome { status: NOT_STARTED, out: String::new(), err });
    };
    let outcome = match spawn(&path, args) {
        Ok(child) => collect(child)
            .map_err(|e| Error::with(Kind::Sys, format!("{shown}: its exit status could not be collected"), e))?,
        Err(e) => return Ok(Outcome { status: NOT_STARTED, out: String::new(), err: e.to_string() }),
    };
    for line in outcome.out.lines().chain(outcome.err.lines()).filter(|l| !l.trim().is_empty()) {
        report::say(1, line);
    }
    match report::cancel::requested() {
        true => Err(Error::new(Kind::Sys, format!("{shown}: stopped, the operation was cancelled"))),
        false => Ok(outcome),
    }
}

/// Runs a program to its end without messages.
pub fn outcome(program: &Path, args: &[&OsStr]) -> io::Result<Outcome> {
    collect(spawn(program, args)?)
}

/// Shell script that runs a program and prints its exit status behind its output. SIGTERM to the shell ends the
/// program.
const TELL: &str = r#""$@" & p=$!; trap 'kill $p' TERM; wait $p; s=$?; wait $p; printf '\000%d' $s"#;

/// False if the calling process ignores or handles SIGCHLD: then it can collect the exit status of this library's
/// children.
fn status_is_safe() -> bool {
    const SIGCHLD: u32 = libc::SIGCHLD as u32 - 1;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let masks = status.lines().filter_map(|l| l.strip_prefix("SigIgn:").or(l.strip_prefix("SigCgt:")));
    let masks: Vec<u64> = masks.filter_map(|m| u64::from_str_radix(m.trim(), 16).ok()).collect();
    masks.len() == 2 && masks.iter().all(|m| m >> SIGCHLD & 1 == 0)
}

fn spawn(path: &Path, args: &[&OsStr]) -> io::Result<Running> {
    let told = !status_is_safe();
    let mut command = match told {
        false => Command::new(path),
        true => {
            let mut shell = Command::new("/bin/sh");
            shell.args(["-c", TELL, "sh"]).arg(path);
            shell
        }
    };
    let child = command
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    Ok(Running { child, told })
}

struct Running {
    child: Child,
    /// The status comes at the end of the output.
    told: bool,
}

/// Drains both pipes in this thread, so that a signal that asks for cancellation interrupts this thread.
fn collect(Running { mut child, told }: Running) -> io::Result<Outcome> {
    let _guard = i32::try_from(child.id()).ok().and_then(report::cancel::register_child);
    let mut pipes = [
        (child.stdout.take().map(|p| File::from(OwnedFd::from(p))), Vec::new()),
        (child.stderr.take().map(|p| File::from(OwnedFd::from(p))), Vec::new()),
    ];
    while pipes.iter().any(|(pipe, _)| pipe.is_some()) {
        let open: Vec<usize> = (0..pipes.len()).filter(|i| pipes[*i].0.is_some()).collect();
        let mut fds: Vec<PollFd<'_>> =
            pipes.iter().filter_map(|(p, _)| p.as_ref()).map(|p| PollFd::new(p.as_fd(), PollFlags::POLLIN)).collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        let ready: Vec<bool> = fds.iter().map(|f| f.any().unwrap_or(true)).collect();
        for (i, _) in open.into_iter().zip(ready).filter(|(_, ready)| *ready) {
            let (pipe, kept) = &mut pipes[i];
            if !pipe.as_mut().is_some_and(|p| more(p, kept)) {
                *pipe = None;
            }
        }
    }
    let waited = child.wait();
    let status = match told {
        false => {
            let status = waited?;
            status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
        }
        true => {
            let out = &mut pipes[0].1;
            let at =
                out.iter().rposition(|b| *b == 0).ok_or_else(|| io::Error::other("the shell printed no status"))?;
            let number = out.split_off(at);
            let number = String::from_utf8_lossy(&number[1..]).into_owned();
            number.parse().map_err(|_| io::Error::other(format!("the shell printed status {number:?}")))?
        }
    };
    let [out, err] = pipes.map(|(_, kept)| String::from_utf8_lossy(&kept).into_owned());
    Ok(Outcome { status, out, err })
}

/// Reads once; false at the end.
fn more(pipe: &mut File, kept: &mut Vec<u8>) -> bool {
    let mut buf = [0; 4096];
    match pipe.read(&mut buf) {
        Ok(0) => false,
        Ok(n) => {
            kept.extend_from_slice(&buf[..n]);
            if kept.len() > 2 * KEEP {
                kept.drain(..kept.len() - KEEP);
            }
            true
        }
        Err(e) => e.kind() == io::ErrorKind::Interrupted,
    }
}

fn show(program: &str, args: &[&OsStr]) -> String {
    let mut shown = OsString::from(program);
    for a in args {
        shown.push(" ");
        shown.push(a);
    }
    shown.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::gpt::Gpt;
    use crate::units::{ClusterSize, SECTOR};
    use std::ffi::OsStr;
    use std::fs;
    use std::os::unix::fs::FileExt;

    #[test]
    fn parted_finds_no_fault_in_a_table_of_ours() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let file = fs::File::create(&path).unwrap();
        file.set_len(65536 * SECTOR).unwrap();
        for piece in Gpt::single(65536, ClusterSize::DEFAULT).unwrap().encode().unwrap() {
            file.write_all_at(&piece.bytes, piece.offset).unwrap();
        }
        let args = ["-s", "-m"].map(OsStr::new);
        let args = [&args[..], &[path.as_os_str(), "unit".as_ref(), "s".as_ref(), "print".as_ref()]].concat();
        let seen = run("parted", &args).unwrap();
        if seen.status == NOT_STARTED {
            crate::testing::skip::skip("parted is not installed");
            return;
        }
        assert_eq!((seen.status, seen.err.as_str()), (0, ""), "{}", seen.out);
        assert!(seen.out.contains(":65536s:") && seen.out.contains(":gpt:"), "{}", seen.out);
        assert!(seen.out.contains("1:2048s:63487s:61440s::primary:;"), "{}", seen.out);
    }

    #[test]
    fn missing_program_is_127() {
        let o = run("no-such-program-here", &[]).unwrap();
        assert_eq!(o.status, NOT_STARTED);
        assert!(o.complaint().contains("not found"));
    }

    #[test]
    fn status_output_and_empty_input() {
        let o = run("sh", &["-c".as_ref(), "cat; echo out; echo oops >&2; exit 3".as_ref()]).unwrap();
        assert_eq!((o.status, o.out.as_str(), o.err.as_str()), (3, "out\n", "oops\n"));
        assert_eq!(o.complaint(), "status 3: oops");
        let o = run("sh", &["-c".as_ref(), "kill -9 $$".as_ref()]).unwrap();
        assert_eq!(o.status, 128 + 9);
    }

    #[test]
    fn status_can_be_told() {
        let run = |script: &str| {
            let mut shell = Command::new("/bin/sh");
            shell.args(["-c", TELL, "sh", "/bin/sh", "-c", script]).stdin(Stdio::null());
            let child = shell.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            collect(Running { child, told: true }).unwrap()
        };
        let o = run("echo out; echo oops >&2; exit 3");
        assert_eq!((o.status, o.out.as_str(), o.err.as_str()), (3, "out\n", "oops\n"));
        assert_eq!(run("kill -9 $$").status, 128 + 9);
        assert_eq!(run("exit 0").status, 0);
    }

    #[test]
    fn much_output_does_not_block() {
        let script =
            "i=0; while [ $i -lt 40000 ]; do echo 0123456789abcdef; echo 0123456789abcdef >&2; i=$((i+1)); done";
        let o = run("sh", &["-c".as_ref(), script.as_ref()]).unwrap();
        assert_eq!(o.status, 0);
        assert!(o.out.len() <= 2 * KEEP && o.err.len() <= 2 * KEEP);
    }
}

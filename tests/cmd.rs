//! Transcripts of the command: what is typed, what is answered, how it ends. None needs root or a device.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn transcripts() {
    trycmd::TestCases::new().case("tests/cmd/*.trycmd");
}

fn ploop(folder: &Path, args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ploop"));
    command.current_dir(folder).args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Sends a signal after some time; returns how the command ended and what it said.
fn signalled(child: Child, after: Duration, signal: Signal) -> (Option<i32>, String) {
    sleep(after);
    // It is not waited for yet, so the number is its own.
    let _ = kill(Pid::from_raw(child.id() as i32), signal);
    ended(child.wait_with_output().unwrap())
}

fn ended(out: Output) -> (Option<i32>, String) {
    (out.status.code(), String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr))
}

#[test]
fn a_command_that_a_signal_stopped_ends_with_128_and_its_number_and_has_made_nothing() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut stopped = 0;
    for (i, signal) in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().cycle().take(12).enumerate() {
        let name = format!("{i}/disk");
        std::fs::create_dir(dir.path().join(i.to_string())).unwrap();
        let child = ploop(dir.path(), &["init", "-t", "none", "-f", "raw", "-s", "512M", &name]);
        let (code, said) = signalled(child, Duration::from_millis(10 + 8 * i as u64), signal);
        let made = dir.path().join(&name).exists();
        match code {
            // The command had ended.
            Some(0) => assert!(made && !said.contains("Cancel"), "{said}"),
            Some(c) if c == 128 + signal as i32 => assert_eq!(made, said.contains("too late"), "{said}"),
            // Before it had its handlers.
            None => assert!(!made, "{said}"),
            other => panic!("{signal}: {other:?}: {said}"),
        }
        stopped += usize::from(code.is_some_and(|c| c != 0));
        let _ = std::fs::remove_file(dir.path().join(&name));
    }
    assert!(stopped > 0, "no signal arrived in time");
}

/// What bash offers for the last of these words.
fn completed(folder: &Path, words: &[&str]) -> Vec<String> {
    completed_by("", folder, words)
}

/// The same of ploop with another ending of its name.
fn completed_by(ending: &str, folder: &Path, words: &[&str]) -> Vec<String> {
    let script = r#"
        . <("$1" completion bash) || exit 1
        COMP_WORDS=("$1$ENDING" "${@:2}") COMP_CWORD=$(($# - 1))
        _ploop; printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let mut bash = Command::new("bash");
    bash.current_dir(folder)
        .env("ENDING", ending)
        .args(["-c", script, "bash", env!("CARGO_BIN_EXE_ploop")])
        .args(words);
    let out = bash.output().unwrap();
    assert!(out.status.success() && out.stderr.is_empty(), "{out:?}");
    String::from_utf8(out.stdout).unwrap().lines().filter(|l| !l.is_empty()).map(String::from).collect()
}

#[test]
fn bash_completes_commands_options_and_the_snapshots_of_the_disk() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let disk = dir.path().join("a disk");
    std::fs::create_dir(&disk).unwrap();
    let guid = "11111111-2222-4333-8444-555555555555";
    for args in [&["init", "-t", "none", "-s", "64M", "root.hdd"][..], &["snapshot", "-u", guid, "DiskDescriptor.xml"]]
    {
        let (code, said) = ended(ploop(&disk, args).wait_with_output().unwrap());
        assert_eq!(code, Some(0), "{said}");
    }
    assert_eq!(completed(&disk, &["snapshot-s"]), ["snapshot-switch"]);
    assert_eq!(completed(&disk, &["check", "--repair"]), ["--repair-sparse"]);
    assert_eq!(completed(&disk, &["snapshot-delete", "-u", "1"]), [guid]);
    assert_eq!(completed(dir.path(), &["snapshot-delete", "a disk", "-u", "1"]), [guid]);
    assert!(completed(dir.path(), &["snapshot-delete", "-u", ""]).is_empty());
    assert_eq!(completed_by("-balloon", dir.path(), &["ch"]), ["change", "check"].map(String::from));
    assert_eq!(completed_by("-balloon", dir.path(), &["discard", "--to"]), ["--to-free"]);
    // The shell's own words.
    assert!(completed(dir.path(), &["check", ""]).is_empty());
}

#[test]
fn a_signal_that_comes_too_late_is_no_success_and_the_command_says_what_it_did() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let init = ploop(dir.path(), &["init", "-t", "none", "-s", "64M", "disk"]);
    assert_eq!(ended(init.wait_with_output().unwrap()).0, Some(0));
    let dd = dir.path().join("DiskDescriptor.xml");
    let lock = std::fs::File::create(dir.path().join("DiskDescriptor.xml.lck")).unwrap();
    let lock = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
    let child = ploop(dir.path(), &["snapshot", "DiskDescriptor.xml"]);
    sleep(Duration::from_millis(300));
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    sleep(Duration::from_millis(50));
    drop(lock);
    let (code, said) = ended(child.wait_with_output().unwrap());
    assert_eq!(code, Some(128 + Signal::SIGTERM as i32), "{said}");
    let done = std::fs::read_to_string(&dd).unwrap().matches("<Shot>").count() == 2;
    assert_eq!(said.contains("too late: what was asked for is done"), done, "{said}");
}

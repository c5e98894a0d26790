//! `ploop umount --all`, in a world of its own: the test runs itself once more in new PID and mount namespaces with an
//! empty /run, where no other devices can be seen.

#[path = "common/mod.rs"]
mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};

static ALONE: Mutex<()> = Mutex::new(());

const INSIDE: &str = "PLOOP_TEST_OWN_WORLD";

fn ploop(args: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.args(["-k", "5", "100", env!("CARGO_BIN_EXE_ploop")]).args(args).stdin(Stdio::null());
    command.env("PLOOP_SERVER", env!("CARGO_BIN_EXE_ploop-server")).output().unwrap()
}

fn text(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

#[track_caller]
fn good(args: &[&str]) -> String {
    let out = ploop(args);
    assert!(out.status.success(), "ploop {args:?}: {}\n{}", out.status, text(&out));
    text(&out)
}

/// Runs the named test again where nothing else is; false: that is where we are.
fn elsewhere(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return false;
    }
    if !common::skip::devices() {
        return true;
    }
    // The namespaces have their own /run and share /dev: a device of one test could take the name that one of the other
    // gives up for a moment.
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::Builder::new().prefix("ploop-all-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let exe = std::env::current_exe().unwrap();
    // Whatever happens inside, devices and mounts are gone before the world ends.
    let script = "mount -t tmpfs tmpfs /run && mkdir /run/lock && \"$0\" --exact --nocapture \"$1\"; r=$?; \
                  \"$2\" umount --all --timeout 20 >/dev/null 2>&1; exit $r";
    let mut command = Command::new("timeout");
    command.args(["-k", "10", "240", "unshare", "--pid", "--fork", "--mount", "--propagation", "unchanged"]);
    command.args(["--mount-proc", "sh", "-c", script]).arg(exe).arg(test).arg(env!("CARGO_BIN_EXE_ploop"));
    command.env(INSIDE, dir.path()).env("PLOOP_SERVER", env!("CARGO_BIN_EXE_ploop-server"));
    let out = command.stdin(Stdio::null()).output().unwrap();
    assert!(out.status.success(), "{}\n{}", out.status, text(&out));
    assert!(text(&out).contains("1 passed"), "{}", text(&out));
    true
}

fn scratch() -> PathBuf {
    let dir = PathBuf::from(std::env::var_os(INSIDE).unwrap());
    // Mounts below are nobody else's.
    let status = Command::new("mount").args(["--bind"]).arg(&dir).arg(&dir).status().unwrap();
    assert!(status.success());
    let status = Command::new("mount").args(["--make-private"]).arg(&dir).status().unwrap();
    assert!(status.success());
    dir
}

/// A disk in `folder`, mounted at `at`. Answers its image.
fn disk(folder: &Path, size: &str, at: Option<&Path>) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    let image = folder.join("root.hdd");
    good(&["init", "-s", size, image.to_str().unwrap()]);
    let dd = folder.join("DiskDescriptor.xml");
    match at {
        Some(at) => {
            fs::create_dir_all(at).unwrap();
            good(&["mount", "-m", at.to_str().unwrap(), dd.to_str().unwrap()]);
        }
        None => drop(good(&["mount", dd.to_str().unwrap()])),
    }
    image
}

fn is_marked(image: &Path) -> bool {
    let mut word = [0; 4];
    fs::File::open(image).unwrap().read_exact_at(&mut word, 44).unwrap();
    word != [0; 4]
}

#[test]
fn disks_that_others_lie_on_go_last() {
    if elsewhere("disks_that_others_lie_on_go_last") {
        return;
    }
    let dir = scratch();
    let outer = disk(&dir.join("outer"), "600M", Some(&dir.join("a")));
    // Its image is in the outer disk, its mount point too, and other file systems are mounted in it and over it.
    let inner = disk(&dir.join("a/inner"), "64M", Some(&dir.join("a/mnt")));
    fs::create_dir(dir.join("a/mnt/t")).unwrap();
    for at in ["a/mnt/t", "a/mnt"] {
        let status = Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(dir.join(at)).status().unwrap();
        assert!(status.success());
    }
    let beside = disk(&dir.join("beside"), "64M", None);
    assert!([&outer, &inner, &beside].iter().all(|i| is_marked(i)));
    assert_eq!(good(&["list"]).lines().count(), 3);
    let said = good(&["umount", "--all"]);
    assert!(said.contains("3 disks are detached"), "{said}");
    assert_eq!(good(&["list"]), "");
    assert!(!is_marked(&outer) && !is_marked(&beside));
    // The inner image was closed before the outer one: it is whole in it.
    good(&["check", dir.join("outer/DiskDescriptor.xml").to_str().unwrap()]);
    good(&["mount", "-m", dir.join("a").to_str().unwrap(), dir.join("outer/DiskDescriptor.xml").to_str().unwrap()]);
    assert!(!is_marked(&inner));
    good(&["check", dir.join("a/inner/DiskDescriptor.xml").to_str().unwrap()]);
    good(&["umount", "--all", "--timeout", "20"]);
    let said = good(&["umount", "--all"]);
    assert!(said.contains("0 disks"), "{said}");
}

struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn what_stays_is_named_with_its_users() {
    if elsewhere("what_stays_is_named_with_its_users") {
        return;
    }
    let dir = scratch();
    let busy = disk(&dir.join("busy"), "64M", Some(&dir.join("b")));
    let free: Vec<PathBuf> =
        (0..4).map(|i| disk(&dir.join(format!("d{i}")), "64M", Some(&dir.join(format!("m{i}"))))).collect();
    let holder = Holder(Command::new("sleep").arg("1000").current_dir(dir.join("b")).spawn().unwrap());
    let out = ploop(&["umount", "--all", "--timeout", "9"]);
    let said = text(&out);
    assert_eq!(out.status.code(), Some(22), "{said}");
    for word in ["1 of 5 disks are still there", busy.to_str().unwrap(), "is still there", "(sleep)"] {
        assert!(said.contains(word), "{word:?} is not in {said}");
    }
    assert!(is_marked(&busy) && free.iter().all(|i| !is_marked(i)));
    fs::write(dir.join("b/file"), "still in use").unwrap();
    drop(holder);
    good(&["umount", "--all"]);
    assert!(!is_marked(&busy));
    // Nonsense is refused, and nothing is done.
    for args in [&["umount", "--all", "x.xml"][..], &["umount", "--timeout", "3"], &["umount", "--all", "-c", "x"]] {
        assert_eq!(ploop(args).status.code(), Some(38), "{args:?}");
    }
}

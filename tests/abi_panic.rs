//! A panic behind the C interface: each function of a debug build, which has a hook for it, comes back to its C caller with an
//! error, and the caller lives.

mod common;

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use common::skip::skip;

#[test]
fn a_panic_comes_back_as_an_error() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let exe = std::env::current_exe().expect("this program has a path");
    let library = exe.with_file_name("libploop.so");
    assert!(library.exists(), "{} is built with the tests", library.display());
    if Command::new("cc").arg("--version").stdout(Stdio::null()).status().is_err() {
        return skip("no C compiler (gcc libc6-dev)");
    }
    let dir = tempfile::tempdir().expect("scratch folder");
    for name in ["libploop.so.1", "libploop.so"] {
        symlink(&library, dir.path().join(name)).expect("link");
    }
    let program = dir.path().join("hostile");
    let source = root.join("capi-tests/args/hostile.c");
    let built = Command::new("cc")
        .args(["-std=gnu99", "-w", "-I"])
        .arg(root.join("include"))
        .args([Path::new("-o"), &program, &source, Path::new("-L"), dir.path()])
        .args(["-lploop", "-lpthread", "-ldl"])
        .status();
    assert!(built.expect("cc").success(), "{} does not compile", source.display());
    let disks = dir.path().join("disks");
    std::fs::create_dir(&disks).expect("folder");
    let symbols = include_str!("abi/libploop.so.1.symbols").split_whitespace();
    let ran = Command::new(&program)
        .arg(&disks)
        .args(symbols)
        .env("LD_LIBRARY_PATH", dir.path())
        .env("PLOOP_TEST_LIBRARY", &library)
        .env("HOSTILE_PANIC", "1")
        .stdin(Stdio::null())
        .output()
        .expect("hostile.c runs");
    let text = String::from_utf8_lossy(&ran.stderr);
    let lines = text.lines().filter(|l| !l.contains("panicked at") && !l.contains("injected into") && !l.is_empty());
    assert!(ran.status.success(), "hostile.c: {}\n{}", ran.status, lines.collect::<Vec<_>>().join("\n"));
}

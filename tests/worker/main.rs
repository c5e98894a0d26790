//! The worker on a real FUSE file: data, takeover after kills, closing, a supervisor's death. Needs root and /dev/fuse.
//!
//! `cargo test --test worker [SCENE...]`; `KILLS=N` sets how many workers are killed. As a tool:
//! `worker run IMAGE... -- COMMAND...` runs a command with the FUSE file in `$FILE` and a loop device in `$DEV`.

#[path = "../common/mod.rs"]
mod common;
mod load;
mod rig;
mod scenes;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ploop::server::frame;
use ploop::server::proto::{FromWorker, ToWorker};
use rig::{Options, Rig};

/// No scene takes longer.
fn scene_limit() -> Duration {
    Duration::from_secs(60) + scenes::kill_count() * Duration::from_secs(1)
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("worker") => ploop::server::worker::worker_main(),
        Some("adopt") => adopt(),
        Some("run") => run(&args[1..]),
        _ => test(&args),
    }
}

fn test(args: &[String]) {
    if !common::skip::devices() {
        return;
    }
    rig::own_mounts();
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        rig::abort_connections();
        report(info);
    }));
    let (alive, watched) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        use std::sync::mpsc::RecvTimeoutError::Timeout;
        while watched.recv_timeout(scene_limit()) != Err(Timeout) {}
        println!("no scene has ended for {:?}: I/O is ended by force", scene_limit());
        rig::abort_connections();
        std::process::exit(1);
    });
    let wanted: Vec<&String> = args.iter().filter(|a| !a.starts_with('-')).collect();
    let all = scenes::ALL.iter().map(|s| (s, false)).chain(scenes::WITH_SLOTS.iter().map(|s| (s, true)));
    for ((name, scene), slots) in all {
        rig::SLOTS.store(slots, Ordering::Relaxed);
        if wanted.is_empty() || wanted.iter().any(|w| name.contains(w.as_str())) {
            print!("scene {name} ... ");
            let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            scene(dir.path());
            alive.send(()).unwrap();
            println!("ok");
        }
    }
}

/// The part of a new supervisor: takes what the worker sends, closes the device, says so in a file.
fn adopt() {
    let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    // Like the real one: the process that the worker waits for ends at once.
    if std::env::args().nth(2).as_deref() != Some("child") {
        // Not waited for: it lives on under somebody else.
        std::mem::forget(Command::new("/proc/self/exe").args(["adopt", "child"]).stdin(socket).spawn().unwrap());
        return;
    }
    let (first, fds) = frame::recv_within::<ToWorker>(&socket, Duration::from_secs(5)).unwrap().unwrap();
    let ToWorker::Start(start) = first else { panic!("{first:?}") };
    let mut answers = Vec::new();
    for order in [ToWorker::Flush, ToWorker::Close] {
        frame::send(&socket, &order, &[]).unwrap();
        answers.push(frame::recv_within::<FromWorker>(&socket, Duration::from_secs(20)).unwrap().unwrap().0);
    }
    let text = format!("{} descriptors, takeover {}: {answers:?}", fds.len(), start.takeover);
    let path = start.attach.descriptor.unwrap();
    std::fs::write(path.with_extension("new"), text).unwrap();
    std::fs::rename(path.with_extension("new"), path).unwrap();
}

/// Runs a command on a served image, with a loop device.
fn run(args: &[String]) {
    let split = args.iter().position(|a| a == "--").expect("run IMAGE... -- COMMAND...");
    let images: Vec<PathBuf> = args[..split].iter().map(|p| std::fs::canonicalize(p).unwrap()).collect();
    rig::own_mounts();
    let dir = tempfile::tempdir().unwrap();
    rig::SLOTS.store(std::env::var("PLOOP_TAKEOVER").is_ok_and(|way| way == "slots"), Ordering::Relaxed);
    let options = Options { marked: ploop::chain::Marked::Recover, ..Options::default() };
    let mut rig = Rig::new(&dir.path().join("file"), &images, &options);
    rig.serve(false);
    let dev = Command::new("losetup").args(["-f", "--show", "--direct-io=on"]).arg(&rig.file).output().unwrap();
    let dev = String::from_utf8(dev.stdout).unwrap().trim().to_string();
    let short = dev.trim_start_matches("/dev/");
    std::fs::write(format!("/sys/block/{short}/queue/max_sectors_kb"), "1024").unwrap();
    std::fs::write(format!("/sys/block/{short}/queue/scheduler"), "none").unwrap();
    let status = Command::new(&args[split + 1])
        .args(&args[split + 2..])
        .env("FILE", &rig.file)
        .env("DEV", &dev)
        .env("WORKER", rig.pid().to_string())
        .status()
        .unwrap();
    println!("worker: {} kB resident; command: {status}", rig.resident());
    Command::new("losetup").args(["-d", &dev]).status().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    rig.close();
}

//! `ploop-server`: the processes that serve a device. The library and these processes start it, users do not.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use ploop::ops::merge_temporary;
use ploop::server::supervisor::{attach, resume};
use ploop::server::{helper, kernel_log, spawn};
use ploop::sys::process;

fn main() {
    process::show_short("ploop-server");
    let mode = std::env::args().nth(1).unwrap_or_default();
    std::process::exit(match mode.as_str() {
        "start" => spawn_detached("supervise"),
        "adopt" => spawn_detached("adopted"),
        "merge" => spawn_detached("merging"),
        "merging" => merge(),
        "supervise" => attach::supervise(),
        "adopted" => resume::adopt(),
        "resumed" => resume::resume(),
        "helper" => helper::main(),
        "worker" => worker(),
        "version" => helper::tell_version(),
        _ => {
            eprintln!(
                "ploop-server {} is started by libploop for each mounted disk; see ploop(8)",
                env!("CARGO_PKG_VERSION")
            );
            2
        }
    });
}

/// Starts the real process as a child and exits, so that the real process is no child of the caller. It inherits
/// nothing but the socket on standard input.
fn spawn_detached(mode: &str) -> i32 {
    process::close_from(3);
    let child = Command::new("/proc/self/exe")
        .arg0("ploop-server")
        .args([mode, process::ROOM_FOR_NAME])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    i32::from(child.is_err())
}

/// Has the temporary snapshots of a disk that was just mounted merged by its server.
fn merge() -> i32 {
    let merged = spawn::begin_merges().and_then(|descriptor| merge_temporary::run_merges(&descriptor));
    if let Err(e) = &merged {
        kernel_log::log("merges after a mount", &e.to_string());
    }
    i32::from(merged.is_err())
}

/// The worker expects its supervisor's socket as descriptor 3.
fn worker() -> i32 {
    match process::take_standard(0).and_then(|sock| process::move_to(sock, 3)) {
        Ok(()) => ploop::server::worker::worker_main(),
        Err(_) => 1,
    }
}

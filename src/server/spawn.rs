//! Starting a server from a library inside any program: no signal handlers, no inherited descriptors, and
//! no trust in wait statuses, which the process may have taken for itself.
#![forbid(unsafe_code)]

use std::os::fd::BorrowedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::server::proto::{AttachReply, AttachRequest, DeviceRecord};
use crate::server::{daemon, frame, helper, runtime};
use crate::sys::host;
use crate::sys::process;

/// Longest wait for a device. The server's own limits are shorter, and undo what was begun.
const ATTACH: Duration = Duration::from_secs(600);

/// A worker finds another supervisor in much less.
const RECLAIM: Duration = Duration::from_secs(30);

/// Limit for the first message to a process that was started; it is sent at once.
const FIRST: Duration = Duration::from_secs(30);

/// The disk whose snapshots are to be merged.
#[derive(Debug, Serialize, Deserialize)]
struct Merges {
    descriptor: PathBuf,
}

const PROGRAM: &str = "ploop-server";

/// Folders that packages put the server into.
const FOLDERS: [&str; 3] = ["/usr/libexec/ploop", "/usr/lib/ploop", "/usr/local/libexec/ploop"];

/// Finds the server's program: `$PLOOP_SERVER` (not when privileges were raised at exec), beside the library or under the
/// prefix where that is installed, the same for the executable, in the packages' folders.
pub fn find_server() -> Result<PathBuf> {
    #[cfg(test)]
    if let Some(root) = host::root() {
        return Ok(root.join(PROGRAM));
    }
    if let Some(path) = std::env::var_os("PLOOP_SERVER").filter(|p| !p.is_empty())
        && !process::privileges_raised()
    {
        let path = PathBuf::from(path);
        if !is_program(&path) {
            bail!(Sys, "$PLOOP_SERVER names {}, which is not a program", path.display());
        }
        return Ok(path);
    }
    let folders = folders();
    for folder in &folders {
        let path = folder.join(PROGRAM);
        if path.is_absolute() && is_program(&path) {
            return Ok(path);
        }
    }
    let looked: Vec<String> = folders.iter().map(|f| f.display().to_string()).collect();
    bail!(Sys, "{PROGRAM} was not found in {}; install it or set $PLOOP_SERVER", looked.join(", "))
}

/// Where the program is looked for: beside this program or library, then where it is installed. Each folder once.
fn folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = Vec::new();
    let mut add = |folder: PathBuf| {
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    };
    for object in [process::own_object(), std::env::current_exe().ok()].into_iter().flatten() {
        let object = object.canonicalize().unwrap_or(object);
        let Some(folder) = object.parent() else { continue };
        add(folder.to_path_buf());
        // Where cargo puts test programs and libraries.
        if let (Some("deps" | "examples"), Some(parent)) =
            (folder.file_name().and_then(|n| n.to_str()), folder.parent())
        {
            add(parent.to_path_buf());
        }
        if let Some(prefix) = prefix(folder) {
            add(prefix.join("libexec/ploop"));
        }
    }
    FOLDERS.map(PathBuf::from).into_iter().for_each(add);
    folders
}

/// The prefix under which a library or program of this folder is installed: that of `lib`, `lib64`, `lib/TRIPLE`, `bin` or
/// `sbin`.
fn prefix(folder: &Path) -> Option<&Path> {
    let named = |folder: &Path, names: &[&str]| names.iter().any(|n| folder.file_name().is_some_and(|f| f == *n));
    let above = folder.parent()?;
    match named(folder, &["lib", "lib64", "lib32", "bin", "sbin"]) {
        true => Some(above),
        false => above.parent().filter(|_| named(above, &["lib"])),
    }
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Starts a server for one device and waits until the device is there. `levels` are O_PATH descriptors of the images,
/// base first. After an error nothing is left behind.
pub fn start(request: &AttachRequest, levels: &[BorrowedFd]) -> Result<DeviceRecord> {
    let program = find_server()?;
    let (ours, theirs) = frame::pair()?;
    let started = host::start(&program, "start", theirs);
    let mut started = started.ctx(Kind::Sys, || format!("cannot start {}", program.display()))?;
    let sent = frame::send(&ours, request, levels);
    // The child only starts the server and ends; the caller's process may have reaped it before us.
    let _ = started.wait();
    sent?;
    match frame::recv_within::<AttachReply>(&ours, ATTACH)? {
        Some((AttachReply::Ready(record), _)) => Ok(record),
        Some((AttachReply::Error { code, message }, _)) => Err(helper::remote_error(code, message)),
        // Its supervisor was killed.
        None => match orphan(&request.token) {
            Some(record) => Ok(record),
            None => bail!(Sys, "{} ended without an answer", program.display()),
        },
    }
}

/// Starts a process that has the temporary snapshots of a running disk merged, apart from the caller's session, control
/// group and namespaces as a server is.
pub fn start_merges(descriptor: &Path) -> Result<()> {
    let program = find_server()?;
    let (ours, theirs) = frame::pair()?;
    let started = host::start(&program, "merge", theirs);
    let mut started = started.ctx(Kind::Sys, || format!("cannot start {}", program.display()))?;
    let sent = frame::send(&ours, &Merges { descriptor: descriptor.to_owned() }, &[]);
    // The child only starts the process and ends.
    let _ = started.wait();
    sent
}

/// The first lines of the process that [`start_merges`] starts: leaves the caller's world. Returns the disk's descriptor.
pub fn begin_merges() -> Result<PathBuf> {
    let sock = host::take_standard(0).ctx(Kind::Sys, || "no socket is the standard input")?;
    match frame::recv_within::<Merges>(&sock, FIRST)? {
        Some((Merges { descriptor }, _)) => daemon::detach_from_caller().map(|()| descriptor),
        None => bail!(Protocol, "the process that starts the merges sent no disk"),
    }
}

/// What became of a device whose supervisor exited before it answered: if it was complete, its worker has found another
/// supervisor, and the attach has succeeded. If not, it is taken back.
fn orphan(token: &str) -> Option<DeviceRecord> {
    let end = host::now() + RECLAIM;
    let mut last = None;
    while host::now() < end {
        let records = runtime::names().unwrap_or_default();
        let mut records = records.iter().filter_map(|n| runtime::read_record(&runtime::device_dir(n)).ok()?);
        let record = records.find(|r| r.token == token)?;
        if !runtime::alive(record.supervisor) && !runtime::alive(record.worker) {
            return None;
        }
        if record.state == "running" && runtime::alive(record.supervisor) {
            return Some(record);
        }
        last = Some(record).filter(|r| r.state == "running");
        host::sleep(Duration::from_millis(20));
    }
    // It serves, with or without a supervisor.
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_folder_is_looked_into_once() {
        let mut folders = folders();
        let count = folders.len();
        folders.sort();
        folders.dedup();
        assert_eq!(folders.len(), count, "{folders:?}");
    }
    #[test]
    fn the_prefix_of_an_installation() {
        for (folder, found) in [
            ("/usr/lib/x86_64-linux-gnu", Some("/usr")),
            ("/opt/ploop/lib64", Some("/opt/ploop")),
            ("/opt/ploop/sbin", Some("/opt/ploop")),
            ("/lib", Some("/")),
            ("/srv/target/release", None),
            ("/tmp", None),
            ("/", None),
        ] {
            assert_eq!(prefix(Path::new(folder)), found.map(Path::new), "{folder}");
        }
    }
}

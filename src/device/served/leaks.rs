//! What is there of devices that have no record any more: block devices of ours, nodes, processes that hold /dev/fuse.
//! And the processes of a device.
#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::device::model::{Device, Leak, ServerProcess};
use crate::device::served::record;
use crate::server::proto::{DeviceRecord, ProcessId};
use crate::server::transport::Transport;
use crate::server::{nodes, runtime};

/// The name of the server's program.
const PROGRAM: &str = "ploop-server";
/// Bounds the walk to the ancestors of a process.
const GENERATIONS: usize = 8;
/// Inode of the initial PID namespace, the same in all kernels.
const INITIAL_PIDS: u64 = 0xEFFF_FFFC;
/// Major number of the classic driver's devices.
const CLASSIC: u64 = 182;

/// What no record names. Devices that are being attached or detached at this moment can be among it.
pub(super) fn all() -> Vec<Leak> {
    let Ok(names) = runtime::names() else { return Vec::new() };
    let records: Vec<Option<DeviceRecord>> =
        names.iter().map(|name| runtime::read_record(&runtime::device_dir(name)).ok().flatten()).collect();
    let known: Vec<&DeviceRecord> = records.iter().flatten().collect();
    let unknown: Vec<i32> = servers(&known).collect();
    // The records of a server in another namespace, of a container for example, are not looked at here.
    let mut found: Vec<Leak> =
        unknown.iter().filter(|pid| is_of_own_namespaces(**pid)).map(|pid| Leak::Server { pid: *pid }).collect();
    // As long as an unknown process may be the server of a block device or node, that is no leak of its own; and only in the
    // initial namespace all processes are seen, and only by root what they are.
    if !unknown.is_empty() || namespace("self", "pid") != Some(INITIAL_PIDS) || !nix::unistd::geteuid().is_root() {
        return found;
    }
    found.extend(block_devices(&known));
    if found.is_empty() {
        found.extend(stale_nodes(&names));
    }
    found
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path())
}

fn block_devices(known: &[&DeviceRecord]) -> Vec<Leak> {
    let ours = |name: &str| {
        runtime::is_bound(name)
            && Transport::of(name).binding().may_be_ours(name)
            && !known.iter().any(|r| r.backing == name)
    };
    let names = entries(Path::new("/sys/block")).filter_map(|p| Some(p.file_name()?.to_str()?.to_owned()));
    let mut found: Vec<String> = names.filter(|name| name.starts_with("loop") && ours(name)).collect();
    found.sort();
    let shown = |name: &String| {
        let file = fs::read_to_string(Path::new("/sys/block").join(name).join("loop/backing_file")).unwrap_or_default();
        PathBuf::from(file.trim().trim_start_matches("/ploop:"))
    };
    let leak = |name: String| Leak::BlockDevice { of: shown(&name), node: Path::new("/dev").join(&name) };
    found.into_iter().map(leak).collect()
}

/// Nodes `/dev/ploopN`, and of their partitions, that no device has.
fn stale_nodes(names: &[String]) -> Vec<Leak> {
    let is_known = |disk: &str| names.iter().any(|name| name == disk);
    let stale = |path: &PathBuf| {
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { return false };
        let disk = name.rsplit_once('p').map_or(name, |(disk, _)| if disk == "ploo" { name } else { disk });
        let numbered = runtime::number(disk).is_some();
        numbered
            && !is_known(disk)
            && nodes::block_node(path).is_some_and(|rdev| nix::sys::stat::major(rdev) != CLASSIC)
    };
    let mut found: Vec<PathBuf> = entries(Path::new("/dev")).filter(stale).collect();
    found.sort();
    found.into_iter().map(|path| Leak::Node { path }).collect()
}

/// The inode of a process's namespace; none: it may not be looked at.
fn namespace(pid: &str, kind: &str) -> Option<u64> {
    fs::metadata(format!("/proc/{pid}/ns/{kind}")).ok().map(|m| m.ino())
}

/// This process and that one number processes alike, and servers write their records where this process reads them: in its own
/// mount namespace or in that of process 1, which servers enter.
fn is_of_own_namespaces(pid: i32) -> bool {
    let pid = pid.to_string();
    let same = |kind: &str, as_of: &str| namespace(&pid, kind).is_some_and(|ns| namespace(as_of, kind) == Some(ns));
    same("pid", "self") && (same("mnt", "self") || same("mnt", "1"))
}

/// Processes of the server's program that hold /dev/fuse, and are neither a device's nor of one that is being made.
fn servers<'a>(known: &'a [&DeviceRecord]) -> impl Iterator<Item = i32> + use<'a> {
    let own: Vec<i32> = known.iter().flat_map(|r| [r.supervisor.pid, r.worker.pid]).chain(new_ones()).collect();
    let pids = entries(Path::new("/proc")).filter_map(|p| p.file_name()?.to_str()?.parse::<i32>().ok());
    pids.filter(|pid| is_server(*pid) && holds_fuse(*pid)).filter(move |pid| !descends(*pid, &own))
}

/// The processes that make a device.
fn new_ones() -> Vec<i32> {
    let name = |p: PathBuf| p.file_name()?.to_str()?.strip_prefix(runtime::NEW_PREFIX)?.parse().ok();
    entries(&runtime::run_dir()).filter_map(name).collect()
}

fn is_server(pid: i32) -> bool {
    let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let name = exe.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    name.strip_suffix(" (deleted)").unwrap_or(name) == PROGRAM
}

fn holds_fuse(pid: i32) -> bool {
    let fuse = |fd: PathBuf| fs::read_link(fd).is_ok_and(|file| file == Path::new("/dev/fuse"));
    entries(Path::new(&format!("/proc/{pid}/fd"))).any(fuse)
}

fn descends(pid: i32, from: &[i32]) -> bool {
    let mut at = pid;
    for _ in 0..GENERATIONS {
        if from.contains(&at) {
            return true;
        }
        match parent(at) {
            Some(above) if above > 1 => at = above,
            _ => return false,
        }
    }
    false
}

fn parent(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|l| l.strip_prefix("PPid:"))?.trim().parse().ok()
}

/// The processes that serve a device, as far as they run.
pub(super) fn processes(device: &Device) -> Vec<ServerProcess> {
    let record = record(device);
    let process = |role, id: ProcessId| {
        runtime::alive(id).then(|| ServerProcess { role, pid: id.pid, stands_still: runtime::stands_still(id) })
    };
    [process("supervisor", record.supervisor), process("worker", record.worker)].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_and_their_ancestors() {
        let own = std::process::id() as i32;
        assert!(descends(own, &[own]));
        assert!(parent(own).is_some_and(|p| descends(own, &[p])));
        assert!(!descends(own, &[]) && !descends(i32::MAX, &[1]));
        assert!(!is_server(own) && !holds_fuse(own));
        assert!(is_of_own_namespaces(own) && !is_of_own_namespaces(i32::MAX));
    }
}

//! What is known of a device outside its server: the folder /run/ploop/NAME, its record, and whether the record still
//! is valid.
#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::server::proto::{DeviceRecord, MAX_FRAME, ProcessId};
pub use crate::server::sysfs::disk_identity;
use crate::server::transport::{self, Transport};
use crate::sys::host;

/// Layout of the record that this version writes.
pub const RECORD_VERSION: u32 = 1;

/// State of running devices.
pub const RUN: &str = "/run/ploop";
/// Names of the files in a device's folder.
pub const STATE: &str = "state";
pub const CONTROL: &str = "control";
pub const LOG: &str = "worker.log";
/// A record that is being written.
pub const NEW_STATE: &str = "state.new";
/// What users have set counters of the device to, and such a file that is being written.
pub const COUNTERS: &str = "counters";
pub const NEW_COUNTERS: &str = "counters.new";
/// What workers leave to each other: see [`unflushed`](super::unflushed).
pub const MEMORY: &str = "unflushed";

/// The files that are of no use without the device's processes.
pub const FILES_OF_PROCESSES: [&str; 6] = [transport::FILES[0], CONTROL, LOG, NEW_STATE, COUNTERS, NEW_COUNTERS];

/// Names of new folders before they are complete.
pub const NEW_PREFIX: &str = ".new-";
/// Names of folders in which changes wait that a killed device has left.
pub const LEFT_PREFIX: &str = ".left-";

/// Our mount namespace is that of process 1 (a chroot does not matter), or cannot be compared.
pub fn in_host_namespace(kind: &str) -> bool {
    let inode = |pid: &str| fs::metadata(format!("/proc/{pid}/ns/{kind}")).map(|m| m.ino());
    match (inode("self"), inode("1")) {
        (Ok(own), Ok(first)) => own == first,
        _ => true,
    }
}

/// Where process 1 sees `path`, as we can reach it.
fn as_host(path: &str) -> PathBuf {
    #[cfg(test)]
    if let Some(root) = host::root() {
        return root.join(path.trim_start_matches('/'));
    }
    match in_host_namespace("mnt") {
        true => PathBuf::from(path),
        false => PathBuf::from(format!("/proc/1/root{path}")),
    }
}

/// /run/ploop of process 1's mount namespace.
pub fn run_dir() -> PathBuf {
    as_host(RUN)
}

/// /dev of process 1's mount namespace.
pub fn dev_dir() -> PathBuf {
    as_host("/dev")
}

/// Folder of the device `name`.
pub fn device_dir(name: &str) -> PathBuf {
    run_dir().join(name)
}

/// A folder that other users could change could get a forged record or socket.
pub fn verify_dir(dir: &Path) -> Result<()> {
    let meta = fs::symlink_metadata(dir).ctx(Kind::Open, || format!("cannot look at {}", dir.display()))?;
    if !meta.is_dir() || meta.uid() != 0 || meta.mode() & 0o022 != 0 {
        bail!(
            Open,
            "{} must be a folder of root that only root can write, but has owner {} and mode {:o}; remove or repair it",
            dir.display(),
            meta.uid(),
            meta.mode() & 0o7777
        );
    }
    Ok(())
}

/// Makes /run/ploop if it is missing and verifies it.
pub fn make_run_dir() -> Result<PathBuf> {
    let dir = run_dir();
    match DirBuilder::new().mode(0o755).create(&dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::with(Kind::Mkdir, format!("cannot make {}", dir.display()), e));
        }
        _ => {}
    }
    verify_dir(&dir)?;
    Ok(dir)
}

/// Names of all devices that have a folder; none if there is no /run/ploop.
pub fn names() -> Result<Vec<String>> {
    let dir = run_dir();
    let entries = match fs::read_dir(&dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.ctx(Kind::Open, || format!("cannot list {}", dir.display()))?,
    };
    match verify_dir(&dir) {
        // The last device has gone since, and the folder with it.
        Err(e) if e.errno() == Some(libc::ENOENT) => return Ok(Vec::new()),
        other => other?,
    }
    let mut names: Vec<String> =
        entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).filter(|n| check_name(n).is_ok()).collect();
    names.sort_by_key(|n| (number(n).is_none(), number(n), n.clone()));
    Ok(names)
}

/// N of `ploopN`.
pub fn number(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("ploop")?;
    let canonical = digits == "0" || !digits.starts_with('0');
    (canonical && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// A name that can stand in /dev and in /run/ploop.
pub fn check_name(name: &str) -> Result<()> {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.bytes().all(legal) {
        bail!(Param, "device name {name:?}: want 1 to 64 letters, digits, '.', '_' or '-', not starting with '.'");
    }
    Ok(())
}

/// The name in `/dev/NAME` or `NAME`, as the user wrote it.
pub fn name_of(device: &str) -> Result<String> {
    let name = device.strip_prefix("/dev/").unwrap_or(device);
    check_name(name)?;
    Ok(name.to_string())
}

/// The name of a device that the user chose: one that begins with `ploop`, so that it cannot be that of another driver's
/// device, and is not that of a partition.
pub fn chosen_name(device: &str) -> Result<String> {
    let name = name_of(device)?;
    let digits = |n: &str| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit());
    if !name.starts_with("ploop") {
        bail!(Param, "device {device}: a disk can only be given a name that begins with ploop, as /dev/ploop5");
    }
    if name.rsplit_once('p').is_some_and(|(disk, number)| disk.starts_with("ploop") && digits(number)) {
        bail!(Param, "device {device}: this is the name of a partition; give that of a whole disk, as /dev/ploop5");
    }
    Ok(name)
}

/// Identifies this boot of the host; empty where that cannot be read, for want of /proc.
pub fn boot_id() -> String {
    #[cfg(test)]
    if host::is_simulated() {
        return host::simulated::with(|host| host.boot());
    }
    static KNOWN: OnceLock<String> = OnceLock::new();
    if let Some(id) = KNOWN.get() {
        return id.clone();
    }
    match fs::read_to_string("/proc/sys/kernel/random/boot_id") {
        Ok(id) => KNOWN.get_or_init(|| id.trim().to_string()).clone(),
        Err(_) => String::new(),
    }
}

/// Whether a record of the boot `id` is of this one. Where that cannot be read, for want of /proc, it may be.
pub fn is_this_boot(id: &str) -> bool {
    let now = boot_id();
    now.is_empty() || id == now
}

fn process_stat(pid: i32) -> io::Result<String> {
    // Room for all of it: else it would be read in small pieces.
    let mut text = String::with_capacity(1024);
    File::open(format!("/proc/{pid}/stat"))?.read_to_string(&mut text)?;
    Ok(text)
}

/// Identity of a running process; none if there is no such process or it has ended.
pub fn process(pid: i32) -> Option<ProcessId> {
    #[cfg(test)]
    if host::is_simulated() {
        return host::simulated::with(|host| host.start_time(pid)).map(|start_time| ProcessId { pid, start_time });
    }
    let stat = process_stat(pid).ok()?;
    parse_stat(&stat).map(|start_time| ProcessId { pid, start_time })
}

/// The process is stopped (by a signal or a debugger) or waits in the kernel uninterruptibly.
pub fn stands_still(id: ProcessId) -> bool {
    if host::is_simulated() {
        return false;
    }
    let stat = process_stat(id.pid).unwrap_or_default();
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
    alive(id) && matches!(state, Some('T' | 't' | 'D'))
}

/// Start time from /proc/PID/stat; none if the process has ended, with all of its threads: the first one may long be a
/// zombie while another one is still inside a system call and keeps the process's files open.
fn parse_stat(stat: &str) -> Option<u64> {
    // The name in parentheses may hold anything, also parentheses.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let threads: u32 = fields.get(17)?.parse().ok()?;
    if matches!(*fields.first()?, "Z" | "X" | "x") && threads <= 1 {
        return None;
    }
    fields.get(19)?.parse().ok()
}

/// Exactly this process runs.
pub fn alive(id: ProcessId) -> bool {
    id.pid > 0 && process(id.pid) == Some(id)
}

/// Whether this process may run: what cannot be looked at, for want of /proc, has not ended.
pub fn may_live(id: ProcessId) -> bool {
    if alive(id) {
        return true;
    }
    let blind = process(host::pid()).is_none();
    let pid = nix::unistd::Pid::from_raw(id.pid);
    blind && id.pid > 0 && nix::sys::signal::kill(pid, None) != Err(nix::Error::ESRCH)
}

/// The record in a device's folder; `None`: there is none, or no whole one.
pub fn read_record(dir: &Path) -> Result<Option<DeviceRecord>> {
    verify_dir(dir)?;
    let path = dir.join(STATE);
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.ctx(Kind::Open, || format!("cannot open {}", path.display()))?,
    };
    // Room for a record at once: else it would be read in small pieces.
    let mut text = Vec::with_capacity(4096);
    file.take(MAX_FRAME as u64).read_to_end(&mut text).ctx(Kind::Read, || format!("cannot read {}", path.display()))?;
    Ok(serde_json::from_slice(&text).ok())
}

/// Replaces the record in a device's folder.
pub fn write_record(dir: &Path, record: &DeviceRecord) -> Result<()> {
    let text = serde_json::to_vec(record).map_err(|e| Error::with(Kind::Protocol, "cannot encode the record", e))?;
    let new = dir.join(NEW_STATE);
    let write = || {
        host::step("write the record")?;
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&text)?;
        fs::rename(&new, dir.join(STATE))
    };
    write().ctx(Kind::Write, || format!("cannot write {}", dir.join(STATE).display()))
}

/// Removes a device's folder with what we put there; anything else keeps it.
pub fn remove_dir(dir: &Path) -> io::Result<()> {
    host::step("remove the folder")?;
    // The memory before the record, which names the images of what waits in it.
    remove_files(dir, &FILES_OF_PROCESSES)?;
    remove_files(dir, &[MEMORY, STATE])?;
    fs::remove_dir(dir)?;
    let all = run_dir();
    if dir.parent() == Some(&all) {
        // Only the last device's removal succeeds.
        let _ = fs::remove_dir(all);
    }
    Ok(())
}

/// Removes files of a device's folder; those that are not there are none.
pub fn remove_files(dir: &Path, files: &[&str]) -> io::Result<()> {
    files.iter().try_for_each(|file| match fs::remove_file(dir.join(file)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        // An empty folder is what a transport mounts its file system over.
        Err(e) => fs::remove_dir(dir.join(file)).map_err(|_| e),
        Ok(()) => Ok(()),
    })
}

/// Makes an empty folder that no device has yet; [`publish`] gives it its name.
pub fn new_dir() -> Result<PathBuf> {
    let dir = run_dir().join(format!("{NEW_PREFIX}{}", host::pid()));
    // Of a process that had our number before.
    let _ = remove_dir(&dir);
    let mut tries = 100;
    loop {
        match make_run_dir() {
            Err(e) if e.errno() == Some(libc::ENOENT) && tries > 0 => {
                tries -= 1;
                continue;
            }
            other => drop(other?),
        }
        match DirBuilder::new().mode(0o700).create(&dir) {
            // The last device of all has just gone, and with it the folder.
            Err(e) if e.kind() == io::ErrorKind::NotFound && tries > 0 => tries -= 1,
            other => return other.ctx(Kind::Mkdir, || format!("cannot make {}", dir.display())).map(|()| dir),
        }
    }
}

/// Gives a complete folder its device's name; false: the name is taken.
pub fn publish(dir: &Path, name: &str) -> Result<bool> {
    let target = device_dir(name);
    host::step("publish the folder").ctx(Kind::Rename, || format!("cannot rename {}", dir.display()))?;
    let flags = nix::fcntl::RenameFlags::RENAME_NOREPLACE;
    match nix::fcntl::renameat2(nix::fcntl::AT_FDCWD, dir, nix::fcntl::AT_FDCWD, &target, flags) {
        Ok(()) => Ok(true),
        Err(nix::Error::EEXIST) => Ok(false),
        Err(e) => Err(e).ctx(Kind::Rename, || format!("cannot rename {} to {}", dir.display(), target.display())),
    }
}

/// Folders left behind by servers that exited very early. Call under the global lock.
pub fn remove_unborn() {
    let Ok(entries) = fs::read_dir(run_dir()) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|n| n.strip_prefix(NEW_PREFIX)?.parse().ok());
        if pid.is_some_and(|pid| !may_live(ProcessId { pid, start_time: 0 }) && process(pid).is_none()) {
            let _ = remove_dir(&entry.path());
        }
    }
}

/// Removes what devices of earlier boots have left, where /run outlives the boot. Call under the global lock.
pub fn remove_earlier_boots() {
    let Ok(entries) = fs::read_dir(run_dir()) else { return };
    for entry in entries.flatten().filter(|e| e.file_name().to_str().is_some_and(|n| n.starts_with(LEFT_PREFIX))) {
        let record = read_record(&entry.path()).ok().flatten();
        if record.is_some_and(|r| !is_this_boot(&r.boot)) {
            let _ = remove_dir(&entry.path());
        }
    }
}

/// Something is bound to the block device of this name.
pub fn is_bound(backing: &str) -> bool {
    Transport::of(backing).binding().is_bound(backing)
}

/// The disk behind is the very one that the record was made for: same boot, number and sequence number.
pub fn backing_is_ours(record: &DeviceRecord) -> bool {
    !record.backing.is_empty()
        && check_name(&record.backing).is_ok()
        && is_this_boot(&record.boot)
        && disk_identity(&record.backing) == Some((record.rdev, record.diskseq))
        && is_bound(&record.backing)
        // Without sequence numbers it is looked at more closely.
        && (record.diskseq != 0 || Transport::of(&record.backing).binding().may_be_ours(&record.backing))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        assert_eq!(number("ploop0"), Some(0));
        assert_eq!(number("ploop12"), Some(12));
        for bad in ["ploop", "ploop01", "ploopx", "loop1", "ploop-1", "ploop99999999999"] {
            assert_eq!(number(bad), None, "{bad}");
        }
        assert_eq!(name_of("/dev/ploop3").unwrap(), "ploop3");
        for good in ["/dev/ploop3", "ploop77", "/dev/ploop-test-1-2", "ploop_up", "ploop"] {
            assert_eq!(chosen_name(good).unwrap(), good.trim_start_matches("/dev/"));
        }
        for bad in [
            "/dev/ploop0p1",
            "ploop-xp12",
            "/dev/loop10000",
            "/dev/sda",
            "sdb1",
            "/dev/nbd0",
            "/dev/null",
            "/tmp/ploop1",
        ] {
            assert_eq!(chosen_name(bad).unwrap_err().kind(), Kind::Param, "{bad}");
        }
        for bad in ["", "/dev/", "/dev/../x", "a/b", ".x", "a b", "/dev/disk/by-id"] {
            assert_eq!(name_of(bad).unwrap_err().kind(), Kind::Param, "{bad}");
        }
    }

    #[test]
    fn own_process_is_alive_and_others_of_its_number_are_not() {
        let me = process(std::process::id() as i32).unwrap();
        assert!(me.start_time > 0 && alive(me));
        assert!(!alive(ProcessId { start_time: me.start_time + 1, ..me }));
        assert!(!alive(ProcessId::default()));
        let stat = |state: &str, threads: u32| {
            format!(
                "7 (a) b) {state} 1 7 7 0 -1 4194560 1 0 0 0 1 2 3 4 20 0 {threads} 0 4711 1000 5 18446744073709551615"
            )
        };
        assert_eq!(parse_stat(&stat("S", 5)), Some(4711));
        assert_eq!(parse_stat(&stat("Z", 1)), None);
        assert_eq!(parse_stat(&stat("Z", 2)), Some(4711));
    }

    #[test]
    fn records_are_read_as_written() {
        let dir = tempfile::tempdir().unwrap();
        let record = DeviceRecord { name: "ploop7".into(), rdev: 5, ..Default::default() };
        write_record(dir.path(), &record).unwrap();
        if fs::metadata(dir.path()).unwrap().uid() == 0 {
            assert_eq!(read_record(dir.path()).unwrap(), Some(record));
            fs::write(dir.path().join(STATE), "{").unwrap();
            assert_eq!(read_record(dir.path()).unwrap(), None);
        }
        remove_dir(dir.path()).unwrap_or_default();
    }
}

//! The changes of a BAT that a device's processes had not made durable when the last of them was killed.
//!
//! The kernel has the data of every write that was answered; the entries that lead to it stand in the memory that workers
//! leave to each other ([`shm`]). That memory is a file in the device's folder. When a dead device is cleaned up and
//! changes wait in it, the folder stays, renamed after the file that they change; the next device that writes to this file
//! takes the memory into its own folder, and its first worker takes over as from a worker that was killed just now. There
//! is one such memory for a file at any time, in one place: it is renamed, never copied.
//!
//! Entries are of use only to the very content that they were made for. What proves it: the same boot of the host; the
//! same file, and below it the same files; the file carries its in-use mark; the last change of the file, as the kernel
//! notes it in its ctime, is not later than the last time that a worker noted before it changed the file, nor earlier than
//! the last change that a worker saw, by a clock that was not set meanwhile.
//! The worker looks once more when it has the file locked. What does not belong to the content any more is never applied.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs};

use crate::engine::api::{Shared, SyncState};
use crate::error::{IoContext, Kind, Result};
use crate::format::header::Header;
use crate::server::kernel_log::log;
use crate::server::runtime::{self, MEMORY};
use crate::server::shm::{self, Origin, Shm};
use crate::sys::aligned::{AlignedBuf, read_full};
use crate::sys::clock;
use crate::sys::file_id::FileId;
use crate::sys::host;

/// A killed worker's last operations take effect after the last time that it noted; nanoseconds.
const TOLERANCE: u64 = if cfg!(test) { 50_000_000 } else { 2_000_000_000 };

/// The part of an image that its header is read with.
const HEAD: usize = 4096;

/// What waits in a folder.
pub struct Left {
    pub dir: PathBuf,
    shm: Shm,
}

/// The memory for a new device that writes to the file `top`.
pub fn create(dir: &Path, name: &str, top: &OwnedFd) -> Result<OwnedFd> {
    let made = match has_the_hosts_clock(top) {
        true => shm::create_file(&dir.join(MEMORY)),
        false => Err(io::Error::other("the times of the image are those of another host, or of a program")),
    };
    made.or_else(|e| {
        let why =
            format!("if all of its processes are killed, what was not flushed is lost: no memory in {MEMORY}: {e}");
        log(name, &why);
        shm::create()
    })
}

/// Whether the times of the file come from this host's clock.
fn has_the_hosts_clock(file: &OwnedFd) -> bool {
    let known = [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, TMPFS_MAGIC];
    host::is_simulated() || fstatfs(file).is_ok_and(|s| known.contains(&s.filesystem_type()))
}

/// Where the memory waits after the device's end.
fn place_of(top: FileId) -> PathBuf {
    runtime::run_dir().join(format!("{}{:x}-{:x}", runtime::LEFT_PREFIX, top.dev, top.ino))
}

/// What a chain is known by, in this boot of the host.
pub fn origin_of(chain: &[FileId]) -> Origin {
    let ids = chain.iter().flat_map(|id| [id.dev.to_le_bytes(), id.ino.to_le_bytes()]).flatten();
    Origin { top: chain.last().copied().unwrap_or_default(), chain: hash(ids), boot: hash(runtime::boot_id().bytes()) }
}

/// FNV-1a, the same in each build.
fn hash(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// The file whose changes the memory in the folder is for, whether any wait or not.
pub fn top_in(dir: &Path) -> Option<FileId> {
    let mut words = [0; 16];
    File::open(dir.join(MEMORY)).ok()?.read_exact_at(&mut words, shm::TOP_OFFSET).ok()?;
    let word = |at: usize| words[at..at + 8].try_into().map(u64::from_le_bytes).ok();
    Some(FileId { dev: word(0)?, ino: word(8)? })
}

/// What waits in a folder of a device that has no process any more; none: nothing does. An error: there is something that
/// this version cannot use.
pub fn left_in(dir: &Path) -> Result<Option<Left>> {
    let path = dir.join(MEMORY);
    match fs::symlink_metadata(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        _ => runtime::verify_dir(dir)?,
    }
    let (_, shm) = shm::open_file(&path)?;
    let left = Left { dir: dir.to_owned(), shm };
    Ok(Some(left).filter(|l| l.shm.origin().top != FileId::default() && l.matters()))
}

/// What waits for the next device that writes to this file. An error as of [`left_in`].
pub fn left_of(top: FileId) -> Result<Option<Left>> {
    left_in(&place_of(top))
}

/// All that waits, for whichever file.
pub fn all() -> Vec<Left> {
    let entries = fs::read_dir(runtime::run_dir()).into_iter().flatten().flatten();
    let left = entries.filter(|e| e.file_name().to_str().is_some_and(|n| n.starts_with(runtime::LEFT_PREFIX)));
    left.filter_map(|e| left_in(&e.path()).ok().flatten()).collect()
}

/// Removes what waits for this file.
pub fn forget(top: FileId) {
    let _ = runtime::remove_dir(&place_of(top));
}

/// Whether the folder holds the memory and nothing else.
pub fn is_all_there_is(dir: &Path) -> bool {
    let names = |d: fs::ReadDir| d.map(|e| e.map(|e| e.file_name())).collect::<io::Result<Vec<_>>>();
    fs::read_dir(dir).and_then(names).is_ok_and(|names| names == [MEMORY])
}

/// Removes the folder of a device that has no process any more; if changes wait in it, it stays for the next device.
pub fn retire(dir: &Path) -> io::Result<()> {
    let left = match left_in(dir) {
        Ok(Some(left)) if !host::breach("changes are dropped with the device") => left,
        Ok(_) => return runtime::remove_dir(dir),
        // It is kept for a program that can use it.
        Err(e) => {
            let name = dir.file_name().unwrap_or_default().to_string_lossy();
            log(&name, &format!("what was not flushed cannot be looked at: {e}"));
            match top_in(dir).filter(|top| *top != FileId::default()) {
                Some(top) => return keep(dir, &place_of(top)),
                // No worker has used it: it is for no file.
                None => return runtime::remove_dir(dir),
            }
        }
    };
    keep(dir, &place_of(left.shm.origin().top))
}

fn keep(dir: &Path, place: &Path) -> io::Result<()> {
    host::step("keep the changes")?;
    // Only what is void: a device that wrote to the file has taken over what waited, or dropped it.
    let _ = runtime::remove_dir(place);
    runtime::remove_files(dir, &runtime::FILES_OF_PROCESSES)?;
    fs::rename(dir, place)
}

/// Takes what waits for this file into the folder of a new device.
pub fn take(top: FileId, dir: &Path) -> Result<OwnedFd> {
    let place = place_of(top);
    let shown = || format!("cannot take over {}", place.display());
    host::step("take over the changes")
        .and_then(|()| fs::rename(place.join(MEMORY), dir.join(MEMORY)))
        .ctx(Kind::Rename, shown)?;
    let _ = runtime::remove_dir(&place);
    let (fd, shm) = shm::open_file(&dir.join(MEMORY))?;
    shm.begin_device();
    Ok(fd)
}

impl Left {
    /// The next device is to be told something by it.
    fn matters(&self) -> bool {
        self.shm.failed() || self.shm.is_asking() || self.shm.sync_state() != SyncState::Idle || self.changes() > 0
    }

    /// How many entries of the BAT wait.
    pub fn changes(&self) -> usize {
        self.shm.carried().len()
    }

    pub fn is_of_chain(&self, chain: &[FileId]) -> bool {
        self.shm.origin().chain == origin_of(chain).chain
    }

    /// See [`why_stale`].
    pub fn why_stale(&self, top: &File, raw: bool) -> Result<Option<String>> {
        why_stale(&self.shm, top, raw)
    }

    /// The names of the chain's images, for messages.
    pub fn images(&self) -> Vec<PathBuf> {
        let record = runtime::read_record(&self.dir).ok().flatten().unwrap_or_default();
        record.levels.into_iter().map(|l| l.path).collect()
    }
}

/// Why the changes do not belong to what the file `top` holds now; none: they do.
pub fn why_stale(shm: &Shm, top: &File, raw: bool) -> Result<Option<String>> {
    let meta = top.metadata().ctx(Kind::Fstat, || "cannot look at the top image")?;
    let origin = shm.origin();
    if origin.boot != origin_of(&[]).boot {
        return Ok(Some("they are of an earlier boot of the host".into()));
    }
    if origin.top != FileId::from(&meta) {
        return Ok(Some("they are of another file".into()));
    }
    if !raw && !is_marked(top)? {
        return Ok(Some("another program has closed the image since".into()));
    }
    if host::is_simulated() {
        return Ok(None);
    }
    let (alive, offset) = shm.last_alive();
    let set = clock::wall_offset().abs_diff(offset);
    if set > TOLERANCE {
        return Ok(Some(format!(
            "the clock was set by {} s since, so that no time of the image proves anything",
            set / 1_000_000_000
        )));
    }
    let changed = changed_at(&meta);
    if shm.last_changed().saturating_sub(changed) > TOLERANCE {
        return Ok(Some("the image was put back to an earlier content, as by a snapshot of its file system".into()));
    }
    let later = changed.saturating_sub(alive);
    if later > TOLERANCE {
        return Ok(Some(format!(
            "another program has changed the image, {} s after its server was killed",
            later / 1_000_000_000
        )));
    }
    Ok(None)
}

/// The file's ctime in nanoseconds.
pub fn changed_at(meta: &fs::Metadata) -> u64 {
    (meta.ctime() as u64).saturating_mul(1_000_000_000).saturating_add(meta.ctime_nsec() as u64)
}

fn is_marked(top: &File) -> Result<bool> {
    let mut head = AlignedBuf::new(HEAD);
    let got = read_full(top, &mut head, 0).ctx(Kind::Read, || "cannot read the header of the top image")?;
    Ok(Header::parse(&head[..got]).is_ok_and(|h| h.is_marked()))
}

/// Whether a failed write of the file system below was seen by no process yet. With the last process its open descriptions
/// are gone, which knew of errors since they were opened; a sync of the whole file system through a new one tells what no
/// such sync has told before.
pub fn file_system_is_sound(top: &File) -> bool {
    host::is_simulated() || nix::unistd::syncfs(top.as_fd()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::skip::skip;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;
    use std::thread::sleep;
    use std::time::Duration;

    #[test]
    fn changes_belong_to_the_content_they_were_made_for() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("image");
        fs::write(&path, [0; HEAD]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let id = FileId::at(&path).unwrap();
        let fd = shm::create().unwrap();
        let shm = Shm::map(fd.as_fd()).unwrap();
        let why = |raw| why_stale(&shm, &file, raw).unwrap().unwrap_or_default();
        let own = origin_of(&[FileId { ino: 1, ..id }, id]);
        shm.set_origin(own);
        assert_eq!(why(true), "");
        assert!(why(false).contains("closed"), "{}", why(false));
        assert_ne!(own.chain, origin_of(&[id]).chain);
        shm.set_origin(Origin { top: FileId { ino: id.ino + 1, ..id }, ..own });
        assert!(why(true).contains("another file"), "{}", why(true));
        shm.set_origin(Origin { boot: own.boot + 1, ..own });
        assert!(why(true).contains("boot"), "{}", why(true));
        // Another program writes to it, and sets the time of that back.
        shm.set_origin(own);
        let modified = file.metadata().unwrap().modified().unwrap();
        sleep(Duration::from_nanos(2 * TOLERANCE));
        file.write_at(&[0], 0).unwrap();
        file.set_modified(modified).unwrap();
        assert!(why(true).contains("changed the image"), "{}", why(true));
        // The server itself does.
        shm.note_alive();
        shm.note_changed(changed_at(&file.metadata().unwrap()));
        assert_eq!(why(true), "");
        // An earlier content has the file's place.
        shm.note_changed(changed_at(&file.metadata().unwrap()) + 2 * TOLERANCE);
        assert!(why(true).contains("earlier content"), "{}", why(true));
    }

    #[test]
    fn memory_that_no_worker_has_used_goes_with_the_folder() {
        let parent = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let dir = parent.path().join("device");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join(MEMORY), [0; 100]).unwrap();
        retire(&dir).unwrap();
        assert!(!dir.exists());
    }

    #[test]
    fn only_memory_that_a_server_has_made_is_used() {
        if !nix::unistd::geteuid().is_root() {
            skip("folders of devices belong to root");
            return;
        }
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let dir = dir.path();
        let path = dir.join(MEMORY);
        let refused = || left_in(dir).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(left_in(dir).unwrap().is_none());
        fs::write(&path, [7; 100]).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        assert!(refused().contains("100 bytes"), "{}", refused());
        fs::remove_file(&path).unwrap();
        let Ok(fd) = shm::create_file(&path) else {
            skip("the file system of the project is none that keeps space");
            return;
        };
        let shm = Shm::map(fd.as_fd()).unwrap();
        assert!(left_in(dir).unwrap().is_none(), "no worker has used it");
        let top = FileId { dev: 3, ino: 4 };
        shm.set_origin(origin_of(&[top]));
        assert!(left_in(dir).unwrap().is_none(), "nothing waits");
        assert_eq!(top_in(dir), Some(top));
        shm.set_sync_state(SyncState::Running);
        assert!(left_in(dir).unwrap().is_some(), "the outcome of a sync is not known");
        shm.set_sync_state(SyncState::Idle);
        shm.store(5, 1 << 32);
        assert!(left_in(dir).unwrap().is_some());
        // A folder that another user could have filled, and a file that another user could have.
        fs::set_permissions(dir, Permissions::from_mode(0o777)).unwrap();
        assert!(refused().contains("only root can write"), "{}", refused());
        fs::set_permissions(dir, Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::chown(&path, Some(1000), None).unwrap();
        assert!(refused().contains("owner 1000"), "{}", refused());
        std::os::unix::fs::chown(&path, Some(0), None).unwrap();
        assert!(left_in(dir).unwrap().is_some());
        // Of another version of the server.
        File::from(fd).write_at(&9u64.to_le_bytes(), 8).unwrap();
        assert!(refused().contains("version 9"), "{}", refused());
    }
}

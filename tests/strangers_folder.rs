//! A disk in a folder of another user, who swaps folders, links and files beside every command that root runs there: no
//! file outside of that folder is touched.

mod common;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{MetadataExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use common::rng::Rng;
use common::{Counts, counts, seed, skip};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use ploop::descriptor::{Descriptor, ImageMode};
use ploop::format::guid::Guid;
use ploop::format::header::Version;
use ploop::image::create::{Params, create, create_delta};
use ploop::units::ClusterSize;

const STRANGER: u32 = 1000;
const CLUSTERS: u64 = 40;

/// `top/home` belongs to the stranger, and so does the disk in it; `top/root` to root, with files of the same names.
struct World {
    _top: tempfile::TempDir,
    home: PathBuf,
    root: PathBuf,
}

fn guid(n: u64) -> Guid {
    Guid::parse(&format!("{{{n:08x}-2222-4333-8444-555555555555}}")).expect("guid")
}

/// Everything about a file that a change of it changes.
type Look = BTreeMap<PathBuf, (u64, u32, u32, u64, u64, i64, i64, Vec<u8>)>;

fn look(folder: &Path, into: &mut Look) {
    for entry in fs::read_dir(folder).expect("list").flatten() {
        let (path, meta) = (entry.path(), entry.metadata().expect("look"));
        let content = if meta.is_file() { fs::read(&path).expect("read") } else { Vec::new() };
        let facts =
            (meta.ino(), meta.mode(), meta.uid(), meta.nlink(), meta.len(), meta.ctime(), meta.ctime_nsec(), content);
        if meta.is_dir() {
            look(&path, into);
        }
        into.insert(path, facts);
    }
}

impl World {
    fn new() -> World {
        let top = tempfile::tempdir().expect("folder");
        let path = top.path().canonicalize().expect("folder");
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("mode");
        let (home, root) = (path.join("home"), path.join("root"));
        for folder in [&home, &root, &root.join("sub")] {
            fs::create_dir(folder).expect("folder");
        }
        chown(&home, Some(STRANGER), Some(STRANGER)).expect("owner");
        let names = [
            "DiskDescriptor.xml",
            "DiskDescriptor.xml.tmp",
            "root.hdd",
            "one",
            "two",
            "top",
            "copy",
            "new",
            "new.ploop-merge",
            "root.hdd.idx",
            "root.hdd.ploop-raw",
            ".statfs",
            ".statfs.tmp",
            "file",
        ];
        for name in names {
            for folder in [&root, &root.join("sub")] {
                fs::write(folder.join(name), format!("root's {name}")).expect("file");
            }
        }
        World { _top: top, home, root }
    }

    fn disk(&self) -> PathBuf {
        self.home.join("disk")
    }

    /// A disk of four images, two of them in `sub`, made elsewhere and given to the stranger.
    fn make(&self) {
        let made = self.home.with_file_name("made");
        let sub = made.join("sub");
        fs::create_dir_all(&sub).expect("folder");
        let cluster = ClusterSize::from_sectors(64).expect("cluster");
        let sectors = CLUSTERS * 64;
        let base = made.join("root.hdd");
        let params = Params { version: Version::V2, cluster, sectors, mode: ImageMode::Expanded };
        create(&base, &params, &mut |_, _| Ok(())).expect("base");
        let mut disk = Descriptor::new_base(&base, sectors, cluster, ImageMode::Expanded).expect("descriptor");
        for (n, name) in ["sub/one", "sub/two", "top"].into_iter().enumerate() {
            create_delta(&made.join(name), Version::V2, cluster, sectors).expect("delta");
            disk.add_snapshot(made.join(name), guid(n as u64 + 1), false).expect("snapshot");
        }
        disk.commit_new(&made.join("DiskDescriptor.xml")).expect("commit");
        fs::copy(sub.join("one"), made.join("copy")).expect("copy");
        fs::write(made.join(".statfs"), [0; 40]).expect("cache");
        for folder in [&made, &sub] {
            chown(folder, Some(STRANGER), Some(STRANGER)).expect("owner");
            for entry in fs::read_dir(folder).expect("list").flatten() {
                lchown(entry.path(), Some(STRANGER), Some(STRANGER)).expect("owner");
            }
        }
        fs::rename(made, self.disk()).expect("rename");
    }
}

/// What the stranger does, as that user as far as the file system is concerned.
struct Stranger {
    rng: Rng,
    disk: PathBuf,
    root: PathBuf,
}

impl Stranger {
    fn act(&mut self) {
        let (disk, root) = (self.disk.clone(), self.root.clone());
        match self.rng.below(8) {
            0 => self.swap(&disk.join("sub"), &root),
            1 => self.swap(&disk.join("sub"), &root.join("sub")),
            2 => self.swap(&disk, &root),
            3 => {
                if let Some(name) = self.any() {
                    self.swap(&disk.join(&name), &root.join(&name));
                }
            }
            4 => {
                // Without its descriptor no command comes further.
                let image = |name: &OsString| name != "DiskDescriptor.xml";
                if let (Some(a), Some(b)) = (self.any().filter(image), self.any().filter(image)) {
                    let _ = renameat2(AT_FDCWD, &disk.join(a), AT_FDCWD, &disk.join(b), RenameFlags::RENAME_EXCHANGE);
                }
            }
            5 => {
                let name = [
                    "DiskDescriptor.xml.tmp",
                    ".statfs.tmp",
                    "new.ploop-merge",
                    "sub/new",
                    "root.hdd.idx",
                    "root.hdd.ploop-raw",
                ];
                let link = disk.join(name[self.rng.below(6) as usize]);
                let _ = symlink(root.join("file"), &link);
                self.pause();
                let _ = fs::remove_file(link);
            }
            6 => {
                let link = disk.join("sub/one");
                let _ = fs::remove_file(disk.join("sub/gone"));
                let _ = fs::rename(&link, disk.join("sub/gone"));
                let _ = fs::hard_link(root.join("one"), &link);
                self.pause();
                let _ = fs::rename(disk.join("sub/gone"), &link);
            }
            // The private folders in which files are removed.
            _ => {
                for folder in [&disk, &disk.join("sub")] {
                    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                        if entry.file_name().to_string_lossy().starts_with(".ploop") {
                            self.swap(&entry.path(), &root);
                        }
                    }
                }
            }
        }
    }

    /// Something in the folder, or in `sub`.
    fn any(&mut self) -> Option<OsString> {
        let mut names: Vec<OsString> =
            fs::read_dir(&self.disk).ok()?.flatten().map(|e| e.file_name()).filter(|n| n != "sub").collect();
        let sub = fs::read_dir(self.disk.join("sub")).into_iter().flatten().flatten();
        names.extend(sub.map(|e| Path::new("sub").join(e.file_name()).into_os_string()));
        let at = self.rng.below(names.len().max(1) as u64) as usize;
        names.get(at).cloned()
    }

    /// A link in the place of a thing, for a moment.
    fn swap(&mut self, thing: &Path, other: &Path) {
        let mut away = thing.as_os_str().to_owned();
        away.push(".away");
        if fs::rename(thing, &away).is_err() {
            return;
        }
        let _ = symlink(other, thing);
        self.pause();
        if fs::symlink_metadata(thing).is_ok_and(|m| m.is_symlink()) {
            let _ = fs::remove_file(thing);
        }
        let _ = renameat2(AT_FDCWD, Path::new(&away), AT_FDCWD, thing, RenameFlags::RENAME_NOREPLACE);
    }

    fn pause(&mut self) {
        let until = Instant::now() + Duration::from_micros(self.rng.below(300));
        while Instant::now() < until {
            std::hint::spin_loop();
        }
    }
}

/// Runs until dropped, except while the lock is held for writing.
struct Attack {
    end: Arc<AtomicBool>,
    quiet: Arc<RwLock<()>>,
    acts: Arc<AtomicU64>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Attack {
    fn start(world: &World, seed: u64) -> Attack {
        let (end, quiet, acts) = (Arc::new(AtomicBool::new(false)), Arc::new(RwLock::new(())), Arc::default());
        let threads = (0..2)
            .map(|n| {
                let (end, quiet, acts) = (end.clone(), quiet.clone(), Arc::<AtomicU64>::clone(&acts));
                let mut stranger =
                    Stranger { rng: Rng::new(seed ^ n << 32), disk: world.disk(), root: world.root.clone() };
                std::thread::spawn(move || {
                    // Of this thread alone; root's rights on files go with the user id.
                    setfsgid(Gid::from_raw(STRANGER));
                    setfsuid(Uid::from_raw(STRANGER));
                    while !end.load(Ordering::Relaxed) {
                        let acting = quiet.read();
                        stranger.act();
                        acts.fetch_add(1, Ordering::Relaxed);
                        drop(acting);
                        // Commands have to come further than their first step.
                        let rest = stranger.rng.below(3) * stranger.rng.below(3000);
                        std::thread::sleep(Duration::from_micros(rest));
                    }
                })
            })
            .collect();
        Attack { end, quiet, acts, threads }
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// One command of root's on the disk; it may fail. No device is made: the mount ends after it has cleaned the disk.
fn command(world: &World, rng: &mut Rng) -> Vec<String> {
    let dd = world.disk().join("DiskDescriptor.xml").display().to_string();
    let snapshot = guid(1 + rng.below(3)).to_string();
    let copy = world.disk().join("copy").display().to_string();
    let new = world.disk().join("sub/new").display().to_string();
    let arrived = world.disk().join("sub/arrived").display().to_string();
    let words: Vec<&str> = match rng.below(14) {
        0 => vec!["snapshot", &dd],
        1 => vec!["snapshot-delete", "-u", &snapshot, &dd],
        2 => vec!["snapshot-merge", "-u", &snapshot, &dd],
        3 => vec!["snapshot-merge", "-A", "-n", &new, &dd],
        4 => vec!["snapshot-merge", "-A", &dd],
        5 => vec!["replace", "-u", "{00000001-2222-4333-8444-555555555555}", "-k", "-i", &copy, &dd],
        6 => vec!["replace", "-u", "{00000001-2222-4333-8444-555555555555}", "-i", &copy, &dd],
        7 => vec!["snapshot-switch", "-u", &snapshot, &dd],
        8 => vec!["check", "--remove-orphans", &dd],
        9 => vec!["convert", "-f", "raw", &dd],
        10 => vec!["convert", "-f", "preallocated", &dd],
        11 => vec!["convert", "-v", "1", &dd],
        12 => vec!["copy", "--chain", "-s", &dd, "-d", &arrived],
        _ => vec!["mount", &dd],
    };
    words.into_iter().map(str::to_owned).collect()
}

#[test]
fn no_file_outside_is_touched_while_the_owner_swaps_what_is_in_the_folder() {
    if !nix::unistd::geteuid().is_root() {
        return skip::skip("needs root");
    }
    let time = match counts() {
        Counts::Full => Duration::from_secs(600),
        _ => Duration::from_secs(5),
    };
    let seed = seed::one(None, seed::fresh());
    let mut rng = Rng::new(seed.0);
    let world = World::new();
    let before = |world: &World| {
        let mut seen = Look::new();
        look(&world.root, &mut seen);
        seen
    };
    let untouched = before(&world);
    let program = std::env::var("PLOOP_PROGRAM").unwrap_or(env!("CARGO_BIN_EXE_ploop").to_owned());
    let attack = Attack::start(&world, rng.next());
    let (mut rounds, mut done) = (0, 0);
    let until = Instant::now() + time;
    while Instant::now() < until {
        {
            let _quiet = attack.quiet.write();
            for entry in fs::read_dir(&world.home).expect("list").flatten() {
                let path = entry.path();
                match fs::symlink_metadata(&path).expect("look").is_dir() {
                    true => fs::remove_dir_all(path).expect("remove"),
                    false => fs::remove_file(path).expect("remove"),
                }
            }
            world.make();
        }
        for _ in 0..4 {
            let words = command(&world, &mut rng);
            let out = Command::new(&program).args(&words).env("PLOOP_DRIVER", "none").output().expect("ploop");
            done += u32::from(out.status.success());
            if std::env::var_os("PLOOP_TRACE").is_some() {
                println!("{words:?}: {} {}", out.status, String::from_utf8_lossy(&out.stderr).trim());
            }
            let _quiet = attack.quiet.write();
            let after = before(&world);
            for path in untouched.keys().chain(after.keys()) {
                assert!(
                    untouched.get(path) == after.get(path),
                    "{} was {:?}, is {:?} after {words:?}: {}{}",
                    path.display(),
                    untouched.get(path),
                    after.get(path),
                    String::from_utf8_lossy(&out.stdout),
                    String::from_utf8_lossy(&out.stderr)
                );
            }
        }
        rounds += 1;
    }
    let acts = attack.acts.load(Ordering::Relaxed);
    println!("{rounds} disks, {done} commands succeeded, {acts} attacks");
    assert!(rounds > 3 && done > 0 && acts > 100, "{rounds} disks, {done} commands succeeded, {acts} attacks");
}

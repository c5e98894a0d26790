//! `ploop doctor DISK` names what is wrong with a disk that does not run, with a command; that command, run by a shell as it is
//! printed, mends it; and then doctor has nothing to say.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nix::fcntl::{Flock, FlockArg};
use serde_json::Value;

const PLOOP: &str = env!("CARGO_BIN_EXE_ploop");
const GUIDS: [&str; 2] = ["11111111-2222-4333-8444-000000000001", "11111111-2222-4333-8444-000000000002"];
const IN_USE: [u8; 4] = 0x746F_6E59u32.to_le_bytes();

/// A disk in a folder whose name a shell would take apart.
struct Disk {
    folder: PathBuf,
    _dir: tempfile::TempDir,
}

fn run(args: &[&str]) -> Output {
    Command::new(PLOOP).args(args).output().unwrap()
}

#[track_caller]
fn ploop(args: &[&str]) {
    let out = run(args);
    assert!(out.status.success(), "{args:?}: {out:?}");
}

impl Disk {
    fn new(snapshots: usize) -> Disk {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let folder = dir.path().canonicalize().unwrap().join("it's a disk");
        fs::create_dir(&folder).unwrap();
        let disk = Disk { folder, _dir: dir };
        ploop(&["init", "-t", "none", "-s", "8M", "-b", "64", disk.image().to_str().unwrap()]);
        for guid in &GUIDS[..snapshots] {
            ploop(&["snapshot", "-u", guid, &disk.dd()]);
        }
        disk
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn image(&self) -> PathBuf {
        self.at("root.hdd")
    }

    fn dd(&self) -> String {
        self.at("DiskDescriptor.xml").to_str().unwrap().to_owned()
    }

    /// The deltas, the file that was made last not known from the others.
    fn deltas(&self) -> Vec<PathBuf> {
        let all = fs::read_dir(&self.folder).unwrap().map(|e| e.unwrap().path());
        all.filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with("root.hdd.{")).collect()
    }

    fn edit(&self, from: &str, to: &str) {
        let text = fs::read_to_string(self.dd()).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(self.dd(), text.replacen(from, to, 1)).unwrap();
    }

    fn put(&self, name: &str) -> PathBuf {
        fs::write(self.at(name), "half").unwrap();
        self.at(name)
    }

    /// What is not in order.
    fn findings(&self) -> Vec<Value> {
        let out = run(&["doctor", "--json", &self.dd()]);
        let found: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {out:?}"));
        assert_eq!(found["schema"], "ploop-doctor-1");
        let all = found["disk"].as_array().unwrap();
        let bad: Vec<Value> = all.iter().filter(|f| f["grade"] != "good").cloned().collect();
        assert_eq!(out.status.code(), Some(i32::from(!bad.is_empty())), "{all:?}");
        bad
    }

    /// One finding, whose text has these words, and its command.
    #[track_caller]
    fn cure(&self, words: &[&str]) -> String {
        let found = self.findings();
        let [one] = &found[..] else { panic!("{words:?}: {found:#?}") };
        let text = one["text"].as_str().unwrap();
        assert!(words.iter().all(|w| text.contains(w)), "{words:?}: {text}");
        one["cure"].as_str().unwrap_or_else(|| panic!("no cure: {one}")).to_owned()
    }

    /// That finding goes by its command, as the text for people has it.
    #[track_caller]
    fn cured(&self, words: &[&str]) {
        let cure = self.cure(words);
        let page = String::from_utf8(run(&["doctor", &self.dd()]).stdout).unwrap();
        assert!(page.lines().any(|l| l.trim_start().strip_prefix("$ ") == Some(&cure)), "{cure}: {page}");
        let path = format!("{}:{}", Path::new(PLOOP).parent().unwrap().display(), std::env::var("PATH").unwrap());
        let out = Command::new("sh").args(["-c", &cure]).env("PATH", path).output().unwrap();
        assert!(out.status.success(), "{cure}: {out:?}");
        assert_eq!(self.findings(), [""; 0], "after {cure}: {out:?}");
    }
}

impl Disk {
    /// One finding, whose text has the first word and whose remedy has the second, without a command.
    #[track_caller]
    fn only_told(&self, text: &str, remedy: &str) {
        let found = self.findings();
        let [one] = &found[..] else { panic!("{text}: {found:#?}") };
        assert!(one["text"].as_str().unwrap().contains(text), "{text}: {one}");
        assert!(one["remedy"].as_str().unwrap().contains(remedy), "{remedy}: {one}");
        assert!(one["cure"].is_null(), "{one}");
        let page = String::from_utf8(run(&["doctor", &self.dd()]).stdout).unwrap();
        assert!(!page.lines().any(|l| l.trim_start().starts_with("$ ")), "{page}");
    }

    /// A delta that the descriptor does not name.
    fn orphan(&self) -> PathBuf {
        let before = fs::read_to_string(self.dd()).unwrap();
        let known = self.deltas();
        ploop(&["snapshot", "-u", GUIDS[0], &self.dd()]);
        fs::write(self.dd(), before).unwrap();
        self.deltas().into_iter().find(|d| !known.contains(d)).unwrap()
    }

    /// Only root sees what may use an image: others get no command that clears its mark.
    #[track_caller]
    fn unmarked(&self, image: &Path, check: &[&str]) {
        let words = ["marked in use", image.to_str().unwrap()];
        if nix::unistd::geteuid().is_root() {
            return self.cured(&words);
        }
        self.only_told(words[1], "ploop check");
        ploop(check);
        assert_eq!(self.findings(), [""; 0]);
    }
}

fn mark(image: &Path) {
    let file = OpenOptions::new().write(true).open(image).unwrap();
    file.write_all_at(&IN_USE, 44).unwrap();
}

#[test]
fn a_sound_disk_is_shown_by_level() {
    let disk = Disk::new(2);
    assert_eq!(disk.findings(), [""; 0]);
    let page = String::from_utf8(run(&["doctor", disk.folder.to_str().unwrap()]).stdout).unwrap();
    assert!(
        page.lines().count() == 3 && page.contains(&format!("level 0        {}", disk.image().display())),
        "{page}"
    );
    // An operation that is under way is no fault: what it has made so far is no leftover.
    disk.put("DiskDescriptor.xml.tmp");
    let lock = File::create(disk.dd() + ".lck").unwrap();
    let lock = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
    assert_eq!(disk.findings(), [""; 0]);
    let page = String::from_utf8(run(&["doctor", &disk.dd()]).stdout).unwrap();
    assert!(page.contains(&format!("held by {} (", std::process::id())), "{page}");
    drop(lock);
    disk.cured(&["DiskDescriptor.xml.tmp"]);
}

#[test]
fn marks_of_the_top_of_a_frozen_image_and_of_one_beside_the_chain() {
    let disk = Disk::new(1);
    for image in disk.deltas().into_iter().chain([disk.image()]) {
        mark(&image);
        // A program has it open: the mark is right.
        let lock = Flock::lock(File::open(&image).unwrap(), FlockArg::LockExclusive).unwrap();
        assert_eq!(disk.findings(), [""; 0]);
        let page = String::from_utf8(run(&["doctor", &disk.dd()]).stdout).unwrap();
        assert!(page.contains("is in use by a program of this machine"), "{page}");
        drop(lock);
        disk.unmarked(&image, &["check", &disk.dd()]);
    }
    // A branch.
    ploop(&["snapshot", "-u", GUIDS[1], &disk.dd()]);
    ploop(&["snapshot-switch", "-u", GUIDS[0], &disk.dd()]);
    let text = fs::read_to_string(disk.dd()).unwrap();
    let of = text.split("<Image>").find(|s| s.contains(GUIDS[1])).unwrap();
    let name = of.split("<File>").nth(1).unwrap().split('<').next().unwrap();
    mark(&disk.at(name));
    disk.unmarked(&disk.at(name), &["check", "-u", GUIDS[1], &disk.dd()]);
}

#[test]
fn half_converted_images() {
    let disk = Disk::new(0);
    let mut head = vec![0; 64 * 512];
    let file = OpenOptions::new().read(true).write(true).open(disk.image()).unwrap();
    file.read_exact_at(&mut head, 0).unwrap();
    fs::write(disk.at("root.hdd.idx"), &head).unwrap();
    disk.cured(&["root.hdd.idx", "conversion"]);
    // It may be all that is sound: of an image with a damaged table or header, or of another image.
    let copy = disk.at("root.hdd.idx");
    let mut bat = [0; 4];
    file.read_exact_at(&mut bat, 64).unwrap();
    fs::write(&copy, &head).unwrap();
    file.write_all_at(&u32::MAX.to_le_bytes(), 64).unwrap();
    disk.only_told("root.hdd.idx", "only sound header");
    file.write_all_at(&bat, 64).unwrap();
    file.write_all_at(b"x", 0).unwrap();
    let found = disk.findings();
    assert!(found.len() == 2 && found.iter().all(|f| f["cure"].is_null()), "{found:?}");
    file.write_all_at(&head[..1], 0).unwrap();
    fs::write(&copy, &head[..512]).unwrap();
    disk.only_told("root.hdd.idx", "only sound header");
    fs::write(disk.at("root.hdd.idx"), &head).unwrap();
    file.write_all_at(&IN_USE, 44).unwrap();
    file.write_all_at(&(u32::from(head[52]) | 2).to_le_bytes(), 52).unwrap();
    // Two findings, and one command.
    let found = disk.findings();
    let cures: Vec<Option<&str>> = found.iter().map(|f| f["cure"].as_str()).collect();
    let marks = if nix::unistd::geteuid().is_root() { cures[1] } else { None };
    assert!(cures.len() == 2 && cures[1].is_some() && cures[0] == marks, "{found:?}");
    ploop(&["check", &disk.dd()]);
    assert_eq!(disk.findings(), [""; 0]);
}

#[test]
fn leftovers_of_each_operation() {
    let disk = Disk::new(1);
    let cases = [
        ("DiskDescriptor.xml.tmp", "descriptor"),
        ("DiskDescriptor.xml.tmp.tmp", "descriptor"),
        ("root.hdd.ploop-raw", "conversion to raw"),
        ("new.hdd.ploop-merge", "merge"),
        ("root.hdd.saving", "umount"),
        (".ploop-init", "creation"),
        (".ploop-remove.11111111-2222-4333-8444-000000000001", "removal"),
    ];
    for (name, by) in cases {
        match name.starts_with(".ploop-") {
            false => drop(disk.put(name)),
            true => {
                fs::create_dir(disk.at(name)).unwrap();
                disk.put(&format!("{name}/lock"));
            }
        }
        disk.cured(&[name, by]);
        assert!(!disk.at(name).exists(), "{name}");
    }
    fs::create_dir(disk.at("root.hdd.mnt")).unwrap();
    disk.cured(&["root.hdd.mnt"]);
    // The user's file is kept.
    disk.put("root.hdd.ploop-replace");
    disk.cured(&["root.hdd.ploop-replace"]);
    assert_eq!(fs::read(disk.at("root.hdd.new")).unwrap(), b"half");
    // A creation and a copy that are under way have locks.
    fs::create_dir(disk.at(".ploop-init")).unwrap();
    for name in [".ploop-init/lock", "new.hdd.ploop-merge"] {
        let lock = Flock::lock(File::create(disk.at(name)).unwrap(), FlockArg::LockExclusive).unwrap();
        assert_eq!(disk.findings(), [""; 0], "{name}");
        drop(lock);
        disk.cured(&[name.split('/').next().unwrap()]);
    }
    // Of a whole disk a folder.
    let folder = disk.at("copy.receiving");
    fs::create_dir(&folder).unwrap();
    let lock = Flock::lock(File::open(&folder).unwrap(), FlockArg::LockExclusive).unwrap();
    assert_eq!(disk.findings(), [""; 0], "a receiver has the folder");
    drop(lock);
    disk.only_told("copy.receiving", "receive --kept");
}

/// What could be wanted is left to the user.
#[test]
fn leftovers_that_may_be_all_that_there_is() {
    let disk = Disk::new(0);
    for name in ["root.hdd.tmp", "copy.hdd.receiving"] {
        disk.put(name);
        disk.only_told(name, "rm ");
        fs::remove_file(disk.at(name)).unwrap();
    }
    // With the header of an image.
    for name in ["new.hdd.ploop-merge", "root.hdd.ploop-raw", "root.hdd.saving"] {
        fs::copy(disk.image(), disk.at(name)).unwrap();
        disk.only_told(name, "rm ");
        fs::remove_file(disk.at(name)).unwrap();
    }
    fs::create_dir(disk.at(".ploop-remove.x")).unwrap();
    disk.put(".ploop-remove.x/a disk of another program");
    disk.only_told(".ploop-remove.x", "rm -r");
    fs::remove_dir_all(disk.at(".ploop-remove.x")).unwrap();
    // The copy of a deleted image, while it is made and afterwards.
    let saving = disk.at("root.hdd.saving");
    fs::rename(disk.image(), &saving).unwrap();
    let lock = Flock::lock(File::open(&saving).unwrap(), FlockArg::LockExclusive).unwrap();
    let leftover = || disk.findings().into_iter().find(|f| f["subject"] == "leftover");
    assert_eq!(leftover(), None);
    drop(lock);
    let cure = leftover().unwrap()["cure"].as_str().unwrap().to_owned();
    assert!(cure.starts_with("mv -n "), "{cure}");
    assert!(Command::new("sh").args(["-c", &cure]).status().unwrap().success());
    assert_eq!(disk.findings(), [""; 0]);
}

/// A user's folder can have anything in it.
#[test]
fn names_and_files_that_deceive() {
    let disk = Disk::new(0);
    let name = "x\n        leftover       $ rm root.hdd\n.ploop-merge";
    disk.put(name);
    disk.only_told("x\\n ", "rm ");
    fs::remove_file(disk.at(name)).unwrap();
    nix::unistd::mkfifo(Path::new(&(disk.dd() + ".lck")), nix::sys::stat::Mode::S_IRWXU).unwrap();
    nix::unistd::mkfifo(&disk.at("y.ploop-merge"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Whether an operation is under way cannot be seen.
    disk.only_told("y.ploop-merge", "rm ");
}

#[test]
fn orphan_deltas() {
    let disk = Disk::new(0);
    let delta = disk.orphan();
    let lock = Flock::lock(File::open(&delta).unwrap(), FlockArg::LockExclusive).unwrap();
    assert_eq!(disk.findings(), [""; 0], "in use by another process");
    drop(lock);
    disk.cured(&["not in its descriptor", delta.to_str().unwrap(), "empty"]);
    let half = disk.put("root.hdd.{11111111-2222-4333-8444-000000000003}");
    disk.only_told("no readable image", "look what it is");
    fs::remove_file(half).unwrap();
    // One that is marked may be in use elsewhere.
    let delta = disk.orphan();
    mark(&delta);
    disk.only_told("empty, marked in use", "--remove-orphans");
    fs::remove_file(&delta).unwrap();
    // One of them may be the image that is missing.
    let named = disk.orphan();
    disk.orphan();
    fs::rename(disk.image(), disk.at("gone")).unwrap();
    let found = disk.findings();
    assert!(found.iter().all(|f| f["cure"].is_null()), "{found:?}");
    assert!(named.exists());
}

/// Two disks on a base in a folder of its own: the deltas of one are no orphans of the other.
#[test]
fn deltas_beside_a_shared_base() {
    let disk = Disk::new(0);
    let folder = disk.folder.parent().unwrap().join("other");
    fs::create_dir(&folder).unwrap();
    let own = folder.join("DiskDescriptor.xml");
    let text = fs::read_to_string(disk.dd()).unwrap();
    fs::write(&own, text.replace("root.hdd<", &format!("{}<", disk.image().display()))).unwrap();
    disk.orphan();
    let out = run(&["doctor", "--json", own.to_str().unwrap()]);
    let found: Value = serde_json::from_slice(&out.stdout).unwrap();
    let found: Vec<&Value> = found["disk"].as_array().unwrap().iter().filter(|f| f["grade"] != "good").collect();
    let [one] = &found[..] else { panic!("{found:?}") };
    assert!(one["cure"].is_null() && one["remedy"].as_str().unwrap().contains("another disk"), "{one}");
}

#[test]
fn temporary_and_half_merged_snapshots() {
    let disk = Disk::new(2);
    let shot = |guid: &str| format!("<ParentGUID>{{{guid}}}</ParentGUID>");
    let child = shot(GUIDS[0]);
    disk.edit(&child, &format!("{child}<Temporary/>"));
    disk.cured(&[GUIDS[1], "temporary"]);
    assert!(!fs::read_to_string(disk.dd()).unwrap().contains(GUIDS[1]));
    let disk = Disk::new(2);
    disk.edit(&child, &format!("{child}<Temporary>merging</Temporary>"));
    disk.cured(&[GUIDS[1], "half merged"]);
}

#[test]
fn descriptor_and_images_that_disagree() {
    let disk = Disk::new(1);
    for size in [16384 - 64, 16384 + 640] {
        disk.edit("<Disk_size>16384<", &format!("<Disk_size>{size}<"));
        disk.edit("<End>16384<", &format!("<End>{size}<"));
        disk.cured(&["16384", &size.to_string()]);
    }
    let disk = Disk::new(0);
    disk.edit("<Blocksize>64<", "<Blocksize>128<");
    disk.cured(&["clusters of 64 sectors"]);
    // Without its descriptor, and with one that was cut.
    fs::remove_file(disk.dd()).unwrap();
    disk.cured(&["DiskDescriptor.xml"]);
    fs::write(disk.dd(), "<?xml version=\"1.0\"?>\n<Parallels_disk").unwrap();
    disk.cured(&["DiskDescriptor.xml"]);
    // Those that were put aside stay.
    fs::write(disk.dd(), "<?xml version=\"1.0\"?>\n<Parallels").unwrap();
    disk.cured(&["DiskDescriptor.xml"]);
    let aside = fs::read_dir(&disk.folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    assert_eq!(aside.filter(|n| n.contains(".damaged")).count(), 3);
    // One that is whole and refused is not made anew.
    let sound = fs::read_to_string(disk.dd()).unwrap();
    fs::write(disk.dd(), "<?xml version=\"1.0\"?>\n<Parallels_disk_image Version=\"9\"/>").unwrap();
    disk.only_told("DiskDescriptor.xml", "not damaged");
    fs::write(disk.dd(), sound).unwrap();
    // No command brings a file back.
    fs::rename(disk.image(), disk.at("gone")).unwrap();
    let found = disk.findings();
    assert!(found.len() == 1 && found[0]["cure"].is_null() && found[0]["text"].as_str().unwrap().contains("root.hdd"));
}

#[test]
fn what_is_neither_disk_nor_device() {
    let disk = Disk::new(0);
    for operand in [disk.image().to_str().unwrap(), "/dev/null", "nonsense"] {
        let out = run(&["doctor", operand]);
        assert!(matches!(out.status.code(), Some(2 | 38)) && !out.stderr.is_empty(), "{operand}: {out:?}");
    }
}

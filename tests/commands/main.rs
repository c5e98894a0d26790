//! Every command of `ploop` with --help, with a bad option, and on files that are missing, unreadable, folders, empty,
//! random or cut off. The commands are those that the program itself names: one without a row in the table fails.
//! Where 1.15 has the command and needs no driver for it the exit status is compared.

#[path = "../common/mod.rs"]
mod common;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use table::{DIFFERENT, FORMS, Form, LEAVES, LOOKING, WITHOUT_FILES, What, words};

const CLASSIC: &str = "/usr/sbin/ploop";
const NOBODY: u32 = 65534;
const PARAM: i32 = 38;

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Runs a program, which must end in good time.
fn run(program: &Path, args: &[String], nobody: bool) -> Output {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "60"]).arg(program).args(args).stdin(Stdio::null());
    // The classic copies about 4 KiB behind its arguments, which must be there to copy.
    command.env("PADDING", "x".repeat(9000)).env("PLOOP_SERVER", env!("CARGO_BIN_EXE_ploop-server"));
    if nobody && is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command.output().expect("timeout runs")
}

fn ploop(args: &[&str]) -> Output {
    let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
    run(env!("CARGO_BIN_EXE_ploop").as_ref(), &args, false)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// All commands that the program has, those of two words (`balloon show`) among them.
fn commands() -> Vec<String> {
    let named = |words: &[&str]| -> Vec<String> {
        let out = ploop(&[&["completion", "--", "words"], words].concat());
        text(&out.stdout).lines().map(|l| l.split('\t').next().unwrap_or_default().to_owned()).collect()
    };
    let mut all = named(&[""]);
    assert!(all.len() > 25, "{all:?}");
    all.retain(|c| c != "balloon");
    all.extend(named(&["balloon", ""]).iter().map(|c| format!("balloon {c}")));
    all
}

#[test]
fn every_command_has_a_row_in_the_table() {
    let of = |line: &str| -> String {
        let words: Vec<&str> = line.split(' ').collect();
        words[..if words[0] == "balloon" { 2 } else { 1 }].join(" ")
    };
    let known: BTreeSet<String> = FORMS.iter().map(|f| f.line).chain(WITHOUT_FILES.iter().copied()).map(of).collect();
    let there: BTreeSet<String> = commands().into_iter().collect();
    assert_eq!(known, there, "tests/commands/table.rs names other commands than the program has");
}

#[test]
fn help_and_version_end_with_0_on_stdout_and_a_bad_option_with_the_usage_on_stderr() {
    for command in commands() {
        let words: Vec<&str> = command.split(' ').collect();
        let with = |option: &str| ploop(&[&words[..], &[option]].concat());
        let help = with("--help");
        let shown = text(&help.stdout);
        assert!(help.status.success() && help.stderr.is_empty(), "{command}: {help:?}");
        let usage = shown.starts_with(&format!("Usage: ploop {}", words[0])) || command == "fsck";
        assert!(usage && shown.contains("or example"), "{command} --help has no example: {shown}");
        for option in ["--no-such-option", "-Y"] {
            let bad = with(option);
            let code = if command == "snapshot-list" { 1 } else { PARAM };
            assert_eq!(bad.status.code(), Some(code), "{command} {option}: {bad:?}");
            let said = text(&bad.stderr);
            assert!(bad.stdout.is_empty() && said.contains("option") && said.contains("Usage:"), "{command}: {bad:?}");
        }
        if command == "convert" {
            // It has an option of that name.
            continue;
        }
        let version = with("--version");
        assert!(version.status.success() && version.stderr.is_empty(), "{command}: {version:?}");
        assert_eq!(text(&version.stdout), format!("ploop {}\n", env!("CARGO_PKG_VERSION")));
    }
    let summary = text(&ploop(&["--help"]).stdout);
    for command in commands().iter().filter(|c| !c.contains(' ') && *c != "fsck") {
        assert!(summary.contains(&format!("  ploop {command}")), "{command} is not in the summary");
    }
}

/// What is bad.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Bad {
    Missing,
    Unreadable,
    Folder,
    Empty,
    Random,
    Cut,
}

const BAD: [(Bad, &str); 6] = [
    (Bad::Missing, "missing"),
    (Bad::Unreadable, "unreadable"),
    (Bad::Folder, "folder"),
    (Bad::Empty, "empty"),
    (Bad::Random, "random"),
    (Bad::Cut, "cut"),
];

/// A folder that every user may enter, with a sound disk of version 1 in `sound`.
struct Workshop {
    dir: tempfile::TempDir,
    /// A copy of the program that every user may start.
    program: PathBuf,
}

impl Workshop {
    fn new() -> Workshop {
        let dir = tempfile::Builder::new().prefix("commands-").tempdir_in(std::env::temp_dir()).unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let program = dir.path().join("ploop");
        fs::copy(env!("CARGO_BIN_EXE_ploop"), &program).unwrap();
        fs::create_dir(dir.path().join("sound")).unwrap();
        let image = dir.path().join("sound/root.hds");
        let made = ploop(&["init", "-s", "1m", "-t", "none", "-v", "1", "-b", "64", &image.display().to_string()]);
        assert!(made.status.success(), "{made:?}");
        // Clusters with data, so that half of the file is not all of it.
        let raw = ploop(&[
            "convert",
            "-f",
            "preallocated",
            &dir.path().join("sound/DiskDescriptor.xml").display().to_string(),
        ]);
        assert!(raw.status.success(), "{raw:?}");
        Workshop { dir, program }
    }

    /// A new folder with the sound disk and what is bad, and the name of that.
    fn place(&self, name: &str, what: What, bad: Bad) -> (PathBuf, PathBuf) {
        let dir = self.dir.path().join(name);
        copy_disk(&self.dir.path().join("sound"), &dir.join("sound"));
        let file = match what {
            What::Image => dir.join("bad.hds"),
            What::Disk => dir.join("DiskDescriptor.xml"),
            What::Device => dir.join("bad-device"),
        };
        let mut rng = common::rng::Rng::new(7);
        let random: Vec<u8> = (0..9000).flat_map(|_| rng.next().to_le_bytes()).collect();
        match bad {
            Bad::Missing => {}
            Bad::Folder => fs::create_dir(&file).unwrap(),
            Bad::Empty => fs::write(&file, "").unwrap(),
            Bad::Random => fs::write(&file, random).unwrap(),
            Bad::Unreadable | Bad::Cut => {
                let sound = dir.join("sound");
                let of = if what == What::Disk { sound.join("DiskDescriptor.xml") } else { sound.join("root.hds") };
                fs::copy(of, &file).unwrap();
                fs::copy(sound.join("root.hds"), dir.join("root.hds")).unwrap();
                let cut = if what == What::Disk { dir.join("root.hds") } else { file.clone() };
                if bad == Bad::Cut {
                    let half = fs::metadata(&cut).unwrap().len() / 2 + 17;
                    fs::File::options().write(true).open(&cut).unwrap().set_len(half).unwrap();
                } else {
                    fs::set_permissions(&file, Permissions::from_mode(0o000)).unwrap();
                }
            }
        }
        if bad == Bad::Unreadable && is_root() {
            // The user who runs the command may write in the folder.
            for path in [&dir, &dir.join("sound"), &dir.join("sound/root.hds"), &dir.join("sound/DiskDescriptor.xml")] {
                std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
            }
        }
        (dir, file)
    }
}

fn copy_disk(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for name in ["root.hds", "DiskDescriptor.xml"] {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

/// Of each file: size, times of the last change of its content and of its attributes, bytes.
type State = BTreeMap<PathBuf, (u64, (i64, i64), (i64, i64), Vec<u8>)>;

/// What is in a folder: names, sizes, times of the last change, bytes. The empty files that operations lock do not count.
fn state(dir: &Path) -> State {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let (path, meta) = (entry.path(), entry.metadata().unwrap());
        if meta.is_dir() {
            all.extend(state(&path));
        } else if path.extension().is_none_or(|e| e != "lck") {
            let times = ((meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec()));
            all.insert(path.clone(), (meta.len(), times.0, times.1, fs::read(&path).unwrap_or_default()));
        }
    }
    all
}

/// What differs, in a few words.
fn differences(dir: &Path, before: &State) -> Option<String> {
    let now = state(dir);
    let names: BTreeSet<&PathBuf> = now.keys().chain(before.keys()).collect();
    let changed: Vec<String> = names
        .into_iter()
        .filter(|n| now.get(*n) != before.get(*n))
        .map(|n| match (before.get(n), now.get(n)) {
            (Some(a), Some(b)) if a.3 == b.3 => format!("the times of {}", n.display()),
            (Some(_), Some(_)) => format!("the bytes of {}", n.display()),
            (None, _) => format!("{} is new", n.display()),
            (_, None) => format!("{} is gone", n.display()),
        })
        .collect();
    (!changed.is_empty()).then(|| changed.join(", "))
}

fn filled(line: &str, dir: &Path, file: &Path) -> Vec<String> {
    let fill = |w: String| w.replace("{dir}", &dir.display().to_string()).replace("{}", &file.display().to_string());
    words(line).into_iter().map(fill).collect()
}

/// What is wrong with a command on something bad.
fn judge(workshop: &Workshop, number: usize, form: &Form, (bad, shown): (Bad, &str)) -> Vec<String> {
    let this = (form.what, form.line, shown);
    let listed =
        |list: &[(What, &str, &str, &str)]| list.iter().any(|(what, line, bad, _)| (*what, *line, *bad) == this);
    let (dir, file) = workshop.place(&number.to_string(), form.what, bad);
    let before = state(&dir);
    let out = run(&workshop.program, &filled(form.line, &dir, &file), bad == Bad::Unreadable);
    let said = text(&out.stderr);
    let code = out.status.code().unwrap_or(-1);
    let mut wrong = Vec::new();
    if !(0..=43).contains(&code) || said.contains("panicked") {
        wrong.push(format!("ended with {:?}", out.status));
    }
    if code != 0 && said.trim().is_empty() {
        wrong.push(format!("says nothing, and ends with {code}"));
    }
    // A command that fails has changed nothing.
    if let Some(changed) = differences(&dir, &before).filter(|_| code != 0 && !listed(LEAVES)) {
        wrong.push(format!("ends with {code}, and has changed: {changed}"));
    }
    // Devices of other tests can only be looked at by root.
    let hindered = bad == Bad::Unreadable && said.contains("/run/ploop/");
    if form.classic && !hindered && Path::new(CLASSIC).exists() {
        let (dir, file) = workshop.place(&format!("{number}-classic"), form.what, bad);
        let theirs = run(CLASSIC.as_ref(), &filled(form.line, &dir, &file), bad == Bad::Unreadable);
        let their_code = theirs.status.code().unwrap_or(-1);
        let known = listed(DIFFERENT);
        if (their_code == code) == known {
            let listed = if known { ", though another status is listed" } else { "" };
            wrong.push(format!(
                "ends with {code}, 1.15 with {their_code}{listed}; 1.15 says: {}",
                text(&theirs.stderr).trim()
            ));
        }
        let _ = fs::remove_dir_all(dir);
    }
    let _ = fs::remove_dir_all(dir);
    wrong.iter().map(|w| format!("`{}` on {shown}: {w}\n    {}", form.line, said.trim())).collect()
}

#[test]
fn every_command_refuses_what_is_bad_with_the_status_of_1_15_and_changes_nothing() {
    if !Path::new(CLASSIC).exists() {
        common::skip::skip(&format!("{CLASSIC} is not installed"));
    }
    let workshop = Workshop::new();
    let todo: Vec<(&Form, (Bad, &str))> = FORMS.iter().flat_map(|f| BAD.map(|bad| (f, bad))).collect();
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|s| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            s.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some((form, bad)) = todo.get(i) else { break };
                    let found = judge(&workshop, i, form, *bad);
                    wrong.lock().unwrap().extend(found);
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), todo.len(), wrong.join("\n"));
}

#[test]
fn commands_that_look_leave_every_byte_and_time() {
    let workshop = Workshop::new();
    let dir = workshop.dir.path().join("looked-at");
    copy_disk(&workshop.dir.path().join("sound"), &dir);
    let (disk, image) = (dir.join("DiskDescriptor.xml"), dir.join("root.hds"));
    let before = state(&dir);
    for line in LOOKING {
        let args: Vec<String> = filled(&line.replace("{image}", &image.display().to_string()), &dir, &disk);
        // Some need a file system inside, or root; they look all the same.
        let out = run(env!("CARGO_BIN_EXE_ploop").as_ref(), &args, false);
        assert!(!text(&out.stderr).contains("panicked"), "{line}: {out:?}");
        if let Some(changed) = differences(&dir, &before) {
            panic!("`{line}` has changed: {changed}");
        }
    }
}

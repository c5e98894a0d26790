//! One image mounted twice, under whatever name.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::make::{BS, base, disk, xml};
use crate::{ploop, scratch, text};

/// Ways that are tried; see below.
pub const ROWS: usize = 9;

struct Mounted(Vec<String>);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = ploop(&self.0);
    }
}

fn args(dir: &Path, of: &[&str]) -> Vec<String> {
    of.iter().map(|a| a.replace("{}", &dir.to_string_lossy())).collect()
}

#[test]
fn an_image_in_use_is_not_mounted_again() {
    if !crate::common::skip::devices() {
        return;
    }
    let folder = scratch();
    let dir = folder.path().canonicalize().expect("folder");
    disk(&dir, &[base("f")]);
    fs::hard_link(dir.join("f"), dir.join("hard")).expect("link");
    symlink("f", dir.join("soft")).expect("link");
    for (sub, file) in [("1", "../f"), ("2", "../hard"), ("3", "f")] {
        let sub = dir.join(sub);
        fs::create_dir(&sub).expect("folder");
        fs::write(sub.join("DiskDescriptor.xml"), xml(&[base(file)], BS, "Compressed", "")).expect("descriptor");
    }
    fs::hard_link(dir.join("f"), dir.join("3/f")).expect("link");
    let out = ploop(&args(&dir, &["mount", "{}/DiskDescriptor.xml"]));
    assert!(out.status.success(), "{}", text(&out));
    let _mounted = Mounted(args(&dir, &["umount", "{}/DiskDescriptor.xml"]));
    let ways: [(&[&str], i32, &str); ROWS] = [
        (&["mount", "{}/DiskDescriptor.xml"], 21, "{}/f"),
        (&["mount", "-c", "other", "{}/DiskDescriptor.xml"], 21, "{}/f"),
        (&["mount", "{}/f"], 21, "{}/f"),
        (&["mount", "{}/hard"], 21, "{}/hard"),
        (&["mount", "{}/soft"], 21, "{}/f"),
        (&["mount", "{}/1/DiskDescriptor.xml"], 21, "/f"),
        (&["mount", "{}/2/DiskDescriptor.xml"], 21, "/hard"),
        (&["mount", "{}/3/DiskDescriptor.xml"], 21, "{}/3/f"),
        (&["check", "-f", "-d", "{}/hard"], 37, "{}/hard"),
    ];
    let mut wrong = Vec::new();
    for (command, code, names) in ways {
        let out = ploop(&args(&dir, command));
        let said = text(&out);
        if std::env::var_os("BAD_INPUT_SHOW").is_some() {
            println!("{:3} {command:?}: {}", out.status.code().unwrap_or(-1), said.trim());
        }
        let named = names.replace("{}", &dir.to_string_lossy());
        if out.status.code() != Some(code) || !said.contains(&named) || !said.contains("ploop") {
            wrong.push(format!("{command:?}: {:?} (wanted {code} and {named}): {said}", out.status.code()));
        }
        if out.status.success() && command[0] == "mount" {
            let _ = ploop(&args(&dir, &["umount", command[command.len() - 1]]));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn disks_that_share_a_base_file_are_two() {
    if !crate::common::skip::devices() {
        return;
    }
    let folder = scratch();
    let dir = folder.path().canonicalize().expect("folder");
    let (a, b) = (dir.join("a"), dir.join("b"));
    for sub in [&a, &b] {
        fs::create_dir(sub).expect("folder");
    }
    disk(&a, &[base("f")]);
    let said = |command: &[&str]| {
        let out = ploop(&args(&dir, command));
        (out.status.code().unwrap_or(-1), text(&out))
    };
    let (code, words) = said(&["snapshot", "{}/a/DiskDescriptor.xml"]);
    assert_eq!(code, 0, "{words}");
    // A clone: the base by a second name, the top and the descriptor by copy.
    for entry in fs::read_dir(&a).expect("list").flatten() {
        let to = b.join(entry.file_name());
        match entry.file_name() == "f" {
            true => fs::hard_link(entry.path(), to).expect("link"),
            false => drop(fs::copy(entry.path(), to).expect("copy")),
        }
    }
    let (code, words) = said(&["mount", "{}/a/DiskDescriptor.xml"]);
    assert_eq!(code, 0, "{words}");
    let _a = Mounted(args(&dir, &["umount", "{}/a/DiskDescriptor.xml"]));
    let info = |of: &str| said(&["info", "-d", of]).1;
    let running = info("{}/a/DiskDescriptor.xml");
    assert!(running.contains("/dev/"), "{running}");
    assert!(!info("{}/b/DiskDescriptor.xml").contains("/dev/"));
    for (command, code, names) in [
        (&["umount", "{}/b/DiskDescriptor.xml"][..], 40, "is not mounted"),
        (&["mount", "{}/b/f"], 38, "delta(s) stand on it"),
        (&["snapshot-merge", "{}/b/DiskDescriptor.xml"], 17, "hard links"),
        (&["check", "{}/b/DiskDescriptor.xml"], 0, ""),
        (&["snapshot", "{}/b/DiskDescriptor.xml"], 0, ""),
        (&["mount", "{}/b/DiskDescriptor.xml"], 0, "Adding delta"),
    ] {
        let (got, words) = said(command);
        assert!(got == code && words.contains(names), "{command:?}: {got}, {words}");
    }
    let other = info("{}/b/DiskDescriptor.xml");
    assert!(other.contains("/dev/") && other != running, "{other} {running}");
    // Each ends alone.
    let (code, words) = said(&["umount", "{}/b/DiskDescriptor.xml"]);
    assert_eq!(code, 0, "{words}");
    assert_eq!(info("{}/a/DiskDescriptor.xml"), running);
    assert_eq!(said(&["umount", "{}/b/f"]).0, 38);
    assert_eq!(info("{}/a/DiskDescriptor.xml"), running);
}

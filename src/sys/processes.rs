//! Which processes use a file system.

use std::fs;
use std::path::Path;

use crate::sys::statx;

/// The numbers of the processes that have a file of a file system open, run a program on it or have their folder or root there:
/// of one of these numbers (`st_dev`). Those that /proc shows to this process.
pub fn using(devs: &[u64]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().map(String::from) else { continue };
        if !pid.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let process = entry.path();
        let files = |folder: &str| fs::read_dir(process.join(folder)).into_iter().flatten().flatten().map(|f| f.path());
        let places = ["cwd", "root", "exe"].map(|l| process.join(l)).into_iter();
        let uses = |path: std::path::PathBuf| statx::cached_dev(&path).is_some_and(|dev| devs.contains(&dev));
        if places.chain(files("fd")).chain(files("map_files")).any(uses) {
            found.push(pid);
        }
    }
    found
}

/// The name of a process, for messages: `123 (bash)`.
pub fn shown(pid: &str) -> String {
    let name = fs::read_to_string(Path::new("/proc").join(pid).join("comm")).unwrap_or_default();
    match name.trim() {
        "" => pid.to_owned(),
        name => format!("{pid} ({name})"),
    }
}

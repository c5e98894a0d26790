//! `mount.ploop` and `umount.ploop`: what mount(8) and umount(8) call for `mount -t ploop DD DIR`.

use std::ffi::{OsStr, OsString};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use ploop::error::{Error, Kind, Result};
use ploop::fs::mounts;
use ploop::ops::mount::{self, MountParams};
use ploop::ops::umount;
use ploop::report;

/// Exit status of mount(8) helpers when the mount failed.
const FAILED: u8 = 32;
const MTAB: &str = "/etc/mtab";
/// Log file for messages at boot, when no user is logged in.
const LOG: &str = "/var/log/ploop_mount.log";

/// `mount.ploop DD DIR [-o OPTIONS] [-v] [-f] [-n] [-s]`.
pub fn mount(args: &[OsString]) -> u8 {
    let mut places = Vec::new();
    let mut options = String::new();
    let (mut verbose, mut fake) = (false, false);
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        match arg.as_bytes() {
            b"-h" => {
                println!("Usage: mount.ploop DiskDescriptor.xml DIR [-o OPTIONS] [-v] [-f]");
                return 1;
            }
            b"-v" => verbose = true,
            b"-f" => fake = true,
            b"-o" => options = rest.next().map(|o| o.to_string_lossy().into_owned()).unwrap_or_default(),
            [b'-', ..] => {}
            _ => places.push(PathBuf::from(arg)),
        }
    }
    start(verbose);
    let [disk, folder] = &places[..] else {
        return failed(&wrong("mount.ploop needs a DiskDescriptor.xml and a folder"));
    };
    match try_mount(disk, folder, &options, fake) {
        Ok(()) => 0,
        Err(e) => failed(&e),
    }
}

/// `umount.ploop DIR`; other arguments of umount(8) are ignored.
pub fn umount(args: &[OsString]) -> u8 {
    if args.iter().any(|a| a == "-h") {
        println!("Usage: umount.ploop DIR");
        return 1;
    }
    start(args.iter().any(|a| a == "-v"));
    let Some(folder) = args.iter().find(|a| !a.as_bytes().starts_with(b"-")) else {
        return failed(&wrong("umount.ploop needs a folder"));
    };
    let folder = PathBuf::from(folder);
    let shown = fs::canonicalize(&folder).unwrap_or_else(|_| folder.clone());
    match umount::umount_mountpoint(&folder).and_then(|()| remove_from_mtab(&shown)) {
        Ok(()) => 0,
        Err(e) => failed(&e),
    }
}

fn start(verbose: bool) {
    report::set_verbose_level(if verbose { 3 } else { -1 });
    if std::env::var_os("USER").is_none_or(|u| u.is_empty()) {
        // At boot no user sees the messages on the console. If the log file cannot be opened the disk is mounted
        // anyway.
        let _ = report::set_log_file(Some(Path::new(LOG)));
    }
}

fn wrong(text: &str) -> Error {
    Error::new(Kind::Param, text)
}

fn failed(e: &Error) -> u8 {
    report::error(e);
    FAILED
}

fn try_mount(disk: &Path, folder: &Path, options: &str, fake: bool) -> Result<()> {
    let resolve = |p: &Path| fs::canonicalize(p).map_err(|e| Error::with(Kind::Param, p.display().to_string(), e));
    let (disk, folder) = (resolve(disk)?, resolve(folder)?);
    if !disk.is_file() {
        return Err(wrong(&format!("{} is not a file: a DiskDescriptor.xml is wanted", disk.display())));
    }
    if !folder.is_dir() {
        return Err(wrong(&format!("{} is not a folder", folder.display())));
    }
    if mounts::is_mount_point(&folder)? {
        return Err(wrong(&format!("{} is a mount point already", folder.display())));
    }
    if fake {
        return Ok(());
    }
    let read_only = options.split(',').fold(false, |ro, word| match word {
        "ro" => true,
        "rw" => false,
        _ => ro,
    });
    // Options for fstab only are dropped where the file system is mounted.
    let passed: Vec<&str> = options.split(',').filter(|w| !matches!(*w, "ro" | "rw" | "")).collect();
    let params = MountParams {
        read_only,
        target: Some(folder.clone()),
        options: (!passed.is_empty()).then(|| passed.join(",")),
        ..MountParams::default()
    };
    match disk.extension().and_then(OsStr::to_str) {
        Some("xml") => mount::mount_descriptor(&disk, "", &params)?,
        _ => mount::mount_list(std::slice::from_ref(&disk), false, &params)?,
    };
    add_to_mtab(&disk, &folder, options)
}

/// An mtab that is a link to the kernel's table needs nothing, and must not be replaced.
fn real_mtab() -> bool {
    fs::symlink_metadata(MTAB).is_ok_and(|m| m.is_file())
}

fn add_to_mtab(disk: &Path, folder: &Path, options: &str) -> Result<()> {
    if !real_mtab() {
        return Ok(());
    }
    let mut line = mounts::escape(disk);
    line.push(" ");
    line.push(mounts::escape(folder));
    line.push(format!(" ploop {} 0 0\n", if options.is_empty() { "rw" } else { options }));
    OpenOptions::new()
        .append(true)
        .open(MTAB)
        .and_then(|mut f| f.write_all(line.as_bytes()))
        .map_err(|e| Error::with(Kind::Write, format!("{MTAB} cannot be written"), e))
}

fn remove_from_mtab(folder: &Path) -> Result<()> {
    if !real_mtab() {
        return Ok(());
    }
    let target = mounts::escape(folder);
    let edit = || {
        let old = fs::read(MTAB)?;
        let ours = |line: &[u8]| {
            let mut fields = line.split(|b| *b == b' ');
            fields.nth(1) == Some(target.as_bytes()) && fields.next() == Some(b"ploop")
        };
        let kept: Vec<u8> = old.split_inclusive(|b| *b == b'\n').filter(|l| !ours(l)).flatten().copied().collect();
        if kept == old {
            return Ok(());
        }
        let new = format!("{MTAB}.ploop-{}", std::process::id());
        fs::write(&new, &kept)?;
        fs::set_permissions(&new, fs::metadata(MTAB)?.permissions())?;
        fs::rename(&new, MTAB)
    };
    edit().map_err(|e: std::io::Error| Error::with(Kind::Write, format!("{MTAB} cannot be changed"), e))
}

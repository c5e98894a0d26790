//! `mount.ploop` and `umount.ploop`: what mount(8) and umount(8) call for `mount -t ploop DD DIR`.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use ploop::error::{Error, Kind, Result};
use ploop::fs::mounts;
use ploop::ops::fstab;
use ploop::report;

/// Exit status of mount(8) helpers when the mount failed.
const FAILED: u8 = 32;
const MTAB: &str = "/etc/mtab";
/// Log file for messages at boot, when no user is logged in.
const LOG: &str = "/var/log/ploop_mount.log";

/// The letters that mount(8) and umount(8) give their helpers, as for getopt. Others are ignored, too.
pub const LETTERS: &str = "o:vflhnsrt:N:";

/// What mount(8) and umount(8) give their helpers.
#[derive(Default)]
struct Given {
    places: Vec<PathBuf>,
    options: String,
    verbose: bool,
    fake: bool,
    lazy: bool,
    help: bool,
}

impl Given {
    /// Letters can stand together; what is not known is ignored.
    fn parse(args: &[OsString]) -> Given {
        let mut given = Given::default();
        let mut rest = args.iter();
        while let Some(arg) = rest.next() {
            let [b'-', letters @ ..] = arg.as_bytes() else {
                given.places.push(PathBuf::from(arg));
                continue;
            };
            for (i, letter) in letters.iter().enumerate() {
                let known = LETTERS.find(char::from(*letter)).map(|at| &LETTERS[at + 1..]);
                match letter {
                    b'v' => given.verbose = true,
                    b'f' => given.fake = true,
                    b'l' => given.lazy = true,
                    b'h' => given.help = true,
                    // Options, a type, a namespace.
                    _ if known.is_some_and(|rest| rest.starts_with(':')) => {
                        let value = match &letters[i + 1..] {
                            [] => rest.next().map(|v| v.as_bytes()).unwrap_or_default(),
                            attached => attached,
                        };
                        if *letter == b'o' {
                            given.options = String::from_utf8_lossy(value).into_owned();
                        }
                        break;
                    }
                    _ => {}
                }
            }
        }
        given
    }
}

/// `mount.ploop DD DIR [-o OPTIONS] [-v] [-f] [-n] [-s]`.
pub fn mount(args: &[OsString]) -> u8 {
    let given = Given::parse(args);
    if given.help {
        println!("Usage: mount.ploop DiskDescriptor.xml DIR [-o OPTIONS] [-v] [-f]");
        return 1;
    }
    start(given.verbose);
    let [disk, folder] = &given.places[..] else {
        return failed(&wrong("mount.ploop needs a DiskDescriptor.xml and a folder"));
    };
    match try_mount(disk, folder, &given.options, given.fake) {
        Ok(()) => 0,
        Err(e) => failed(&e),
    }
}

/// `umount.ploop DIR [-l] [-v]`; other arguments of umount(8) are ignored.
pub fn umount(args: &[OsString]) -> u8 {
    let given = Given::parse(args);
    if given.help {
        println!("Usage: umount.ploop DIR [-l] [-v]");
        return 1;
    }
    start(given.verbose);
    let [folder, ..] = &given.places[..] else {
        return failed(&wrong("umount.ploop needs a folder"));
    };
    let shown = fs::canonicalize(folder).unwrap_or_else(|_| folder.clone());
    match fstab::umount(folder, given.lazy).and_then(|()| remove_from_mtab(&shown)) {
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
    if !fstab::mount(disk, folder, options, fake)? {
        return Ok(());
    }
    let resolve = |p: &Path| fs::canonicalize(p).map_err(|e| Error::with(Kind::Param, p.display().to_string(), e));
    add_to_mtab(&resolve(disk)?, &resolve(folder)?, options)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_as_mount_and_umount_give_them() {
        let parse = |line: &str| Given::parse(&line.split(' ').map(OsString::from).collect::<Vec<_>>());
        let places = |given: &Given| given.places.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(" ");
        let g = parse("/d/DiskDescriptor.xml /m -sfnv -o rw,noatime -N /proc/1/ns/mnt -t ploop.ext4");
        assert_eq!((places(&g).as_str(), g.options.as_str()), ("/d/DiskDescriptor.xml /m", "rw,noatime"));
        assert!(g.verbose && g.fake && !g.lazy && !g.help);
        let g = parse("/m -flnrv -t ploop");
        assert!(places(&g) == "/m" && g.lazy && !g.help);
        assert_eq!(parse("-oro /d /m").options, "ro");
        assert!(parse("-h").help && parse("-o").places.is_empty());
    }
}

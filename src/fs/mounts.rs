//! The mount table of the calling process: /proc/self/mountinfo.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::makedev;

use crate::error::{Error, IoContext, Kind, Result};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The kernel's number of the mount.
    pub id: u64,
    /// `st_dev` of what is mounted. For ext and xfs the number of the block device; btrfs has numbers of its own.
    pub dev: u64,
    /// Which folder of the file system is seen here: `/`, unless it is a bind mount.
    pub root: PathBuf,
    pub target: PathBuf,
    pub fstype: String,
    /// What was mounted, as the mounting process named it.
    pub source: PathBuf,
    pub read_only: bool,
    /// Options of the file system, not of this mount of it.
    pub options: String,
    /// Options of this mount.
    pub flags: String,
}

/// All mounts, oldest first.
pub fn read() -> Result<Vec<Mount>> {
    read_of(Path::new("/proc/self"))
}

/// All mounts that a process sees, by its folder in /proc; targets are as it sees them.
pub fn read_of(process: &Path) -> Result<Vec<Mount>> {
    let table = process.join("mountinfo");
    let table = table.display();
    let text =
        fs::read(process.join("mountinfo")).ctx(Kind::Sys, || format!("{table} cannot be read; is /proc mounted?"))?;
    text.split(|b| *b == b'\n')
        .filter(|l| !l.is_empty())
        .map(|l| {
            parse(l).ok_or_else(|| {
                Error::new(Kind::Sys, format!("{table}: line not understood: {}", String::from_utf8_lossy(l)))
            })
        })
        .collect()
}

fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let mut dev = std::str::from_utf8(fields.nth(1)?).ok()?.split(':');
    let (major, minor) = (dev.next()?.parse().ok()?, dev.next()?.parse().ok()?);
    let root = unescape(fields.next()?);
    let target = unescape(fields.next()?);
    let mount_options = fields.next()?;
    // Optional fields end with a lone dash.
    fields.by_ref().find(|f| *f == b"-")?;
    let fstype = String::from_utf8_lossy(fields.next()?).into_owned();
    let source = unescape(fields.next()?);
    let super_options = fields.next().unwrap_or_default();
    let ro = |options: &[u8]| options.split(|b| *b == b',').any(|o| o == b"ro");
    Some(Mount {
        id,
        dev: makedev(major, minor),
        root,
        target,
        fstype,
        source,
        read_only: ro(mount_options) || ro(super_options),
        options: String::from_utf8_lossy(super_options).into_owned(),
        flags: String::from_utf8_lossy(mount_options).into_owned(),
    })
}

/// The number of the mount that an open file was reached by; none: the kernel does not tell.
pub fn id_of(file: &File) -> Option<u64> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
    info.lines().find_map(|l| l.strip_prefix("mnt_id:")?.trim().parse().ok())
}

/// Blank, tab, newline and backslash are written as `\ooo`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|d| *first == b'\\' && d.iter().all(|b| (b'0'..=b'7').contains(b)));
        match digits {
            Some(d) => {
                out.push(d.iter().fold(0u32, |v, b| v * 8 + u32::from(b - b'0')) as u8);
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out).into()
}

/// The same escapes, for lines of /etc/mtab.
pub fn escape(path: &Path) -> OsString {
    let mut out = Vec::new();
    for b in path.as_os_str().as_bytes() {
        match b {
            b' ' | b'\t' | b'\n' | b'\\' => out.extend(format!("\\{b:03o}").bytes()),
            b => out.push(*b),
        }
    }
    OsString::from_vec(out)
}

/// A block device and its partitions, as mounts can name them.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// Device numbers.
    pub devs: Vec<u64>,
    /// Nodes.
    pub nodes: Vec<PathBuf>,
}

impl Names {
    /// Is it this device that is mounted here? The number decides where the file system has the device's; else the name
    /// of the source, as long as that node is the device still.
    pub fn mounted_by(&self, mount: &Mount) -> bool {
        if self.devs.contains(&mount.dev) {
            return true;
        }
        self.nodes.contains(&mount.source)
            && match fs::metadata(&mount.source) {
                Ok(m) => self.devs.contains(&m.rdev()),
                Err(_) => false,
            }
    }
}

/// Is this folder a mount point?
pub fn is_mount_point(folder: &Path) -> Result<bool> {
    let folder = fs::canonicalize(folder).ctx(Kind::Param, || format!("{}", folder.display()))?;
    Ok(read()?.iter().any(|m| m.target == folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_escapes_and_optional_fields() {
        let line = br"98 22 7:10001 / /mnt/a\040b\134c rw,noatime shared:51 master:1 - ext4 /dev/ploop0p1 ro,errors=remount-ro";
        let m = parse(line).unwrap();
        assert_eq!(m.dev, makedev(7, 10001));
        assert_eq!(m.target, Path::new(r"/mnt/a b\c"));
        assert_eq!(m.source, Path::new("/dev/ploop0p1"));
        assert_eq!(m.fstype, "ext4");
        assert!(m.read_only);
        assert_eq!(escape(&m.target), r"/mnt/a\040b\134c");
    }

    #[test]
    fn lines_that_are_not_understood_do_not_panic() {
        for l in ["", "1 2", "1 2 x:y / / rw - a b c", "1 2 7:1 / / rw no dash here", "1 2 7 / / - a"] {
            assert_eq!(parse(l.as_bytes()), None, "{l}");
        }
        assert_eq!(unescape(br"a\04"), Path::new(r"a\04"));
        assert_eq!(unescape(br"\"), Path::new(r"\"));
    }

    #[test]
    fn the_table_of_this_system_is_understood() {
        // In a plain chroot not even its root need be a mount point; /proc is one.
        let targets: Vec<_> = read().unwrap().into_iter().map(|m| m.target).collect();
        assert!(targets.iter().any(|t| t == Path::new("/") || t == Path::new("/proc")), "{targets:?}");
    }
}

//! Making a file system in a file: no device and no root needed.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use nix::unistd::geteuid;

use super::balloon;
use super::helper::{self, Outcome};
use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::folder::Folder;
use crate::sys::store;

/// What can be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FsType {
    Ext3,
    Ext4,
}

impl FsType {
    pub fn name(self) -> &'static str {
        match self {
            FsType::Ext3 => "ext3",
            FsType::Ext4 => "ext4",
        }
    }
}

/// How many inodes a new file system gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Inodes {
    /// One for each 16 KiB.
    #[default]
    Usual,
    /// One for so many bytes.
    PerBytes(u64),
    Count(u64),
}

impl Inodes {
    /// The option of mke2fs.
    fn option(self) -> String {
        match self {
            Inodes::Usual => "-i16384".into(),
            Inodes::PerBytes(bytes) => format!("-i{bytes}"),
            Inodes::Count(count) => format!("-N{count}"),
        }
    }
}

/// Parameters of a new file system.
#[derive(Clone, Copy, Debug)]
pub struct FsSpec {
    pub fstype: FsType,
    /// Bytes of a block, default 4096.
    pub block_size: u32,
    /// Inode tables are left to the kernel's first mount.
    pub lazy: bool,
    pub inodes: Inodes,
}

/// The classic's journal, in MiB, and the smallest file system for which mke2fs makes it; a smaller one gets the journal
/// that mke2fs thinks right.
const JOURNAL_MIB: u64 = 128;
const JOURNAL_NEEDS: u64 = 265 << 20;
/// Blocks of the journal that mke2fs gives to a file system of at least so many blocks, and below.
const USUAL_JOURNALS: [(u64, u64); 2] = [(32768, 4096), (0, 1024)];
/// Blocks of a transaction that the kernel needs to enlarge a mounted ext4, beside those that are reserved for descriptors.
const GROW_CREDITS: u64 = 32;
/// Bytes of a group's descriptor: 32, or this where block numbers have 64 bits.
const DESCRIPTOR: u64 = 64;
/// The inner file system can be grown to this many bytes.
const GROW_LIMIT: u64 = 16 << 40;

/// Makes a file system over the whole of `file` (whose length is the size), with an empty balloon file in its root.
/// `scratch` is an existing folder of the caller; files made there are removed. `Mkfs` when a program fails.
pub fn make(file: &Path, spec: &FsSpec, scratch: &Path) -> Result<()> {
    let bytes = file.metadata().ctx(Kind::Fstat, || file.display().to_string())?.len();
    let block = u64::from(spec.block_size);
    if !(1024..=65536).contains(&block) || !block.is_power_of_two() {
        crate::bail!(Mkfs, "file system block of {block} bytes: must be a power of two from 1024 to 65536");
    }
    let root = scratch.join("root");
    let made = make_root(&root).and_then(|()| make_with(file, bytes, spec, &root)).and_then(|()| tune(file));
    remove_root(&root).ctx(Kind::Unlink, || format!("{} cannot be removed", root.display())).and(made)
}

fn make_with(file: &Path, bytes: u64, spec: &FsSpec, root: &Path) -> Result<()> {
    let block = u64::from(spec.block_size);
    let limit = grow_limit(bytes, block);
    let lazy = u32::from(spec.lazy);
    let mut extended = format!("lazy_itable_init={lazy},root_owner=0:0");
    if limit > bytes / block {
        extended.push_str(&format!(",resize={limit}"));
    }
    let block = format!("-b{block}");
    let journal = format!("-Jsize={JOURNAL_MIB}");
    let mut args: Vec<&OsStr> =
        ["-t", spec.fstype.name(), "-q", "-F", "-j", &block, "-E", &extended].map(OsStr::new).to_vec();
    if bytes >= JOURNAL_NEEDS {
        args.push(journal.as_ref());
    }
    let inodes = spec.inodes.option();
    args.extend([OsStr::new(&inodes), OsStr::new("-d"), root.as_os_str(), file.as_os_str()]);
    // `mkfs -t` would find the same program, but through PATH.
    ended("mke2fs", &args, file)?;
    if !geteuid().is_root() {
        give_to_root(file)?;
    }
    Ok(())
}

/// The size in blocks that a file system can be enlarged to within the descriptor blocks that are reserved for it. The kernel
/// takes all of these into one transaction, a quarter of the journal at most, or a mounted ext4 cannot be enlarged: ENOSPC.
fn grow_limit(bytes: u64, block: u64) -> u64 {
    let most = (GROW_LIMIT / block).min(u64::from(u32::MAX));
    if bytes >= JOURNAL_NEEDS {
        return most;
    }
    let journal = USUAL_JOURNALS.iter().find(|(least, _)| bytes / block >= *least).map_or(0, |(_, journal)| *journal);
    let reserved = journal / 4 - GROW_CREDITS.min(journal / 4);
    let (groups, blocks) = (block / DESCRIPTOR, 8 * block);
    most.min(reserved * groups * blocks)
}

/// Defaults of a ploop disk: extended attributes and ACLs, no periodic checks, read-only after an error.
fn tune(file: &Path) -> Result<()> {
    let args = ["-ouser_xattr,acl", "-c0", "-i0", "-eremount-ro"].map(OsStr::new);
    let args: Vec<&OsStr> = args.into_iter().chain([file.as_os_str()]).collect();
    ended("tune2fs", &args, file).map(drop)
}

/// mke2fs makes the user that runs it the owner of the balloon file.
fn give_to_root(file: &Path) -> Result<()> {
    for field in ["uid", "gid"] {
        let request = format!("set_inode_field /{} {field} 0", balloon::NAME);
        let args = [OsStr::new("-w"), OsStr::new("-R"), request.as_ref(), file.as_os_str()];
        ended("debugfs", &args, file)?;
    }
    // debugfs exits with 0 also after an error.
    let request = format!("stat /{}", balloon::NAME);
    let seen = ended("debugfs", &[OsStr::new("-R"), request.as_ref(), file.as_os_str()], file)?;
    let mut words = seen.out.split_whitespace();
    let mut number = |key: &str| words.find(|w| *w == key).and_then(|_| words.next()).map(str::to_owned);
    match (number("User:").as_deref(), number("Group:").as_deref()) {
        (Some("0"), Some("0")) => Ok(()),
        (user, group) => Err(Error::new(
            Kind::Mkfs,
            format!(
                "the balloon file in {} belongs to {user:?}:{group:?} instead of root; try as root",
                file.display()
            ),
        )),
    }
}

fn ended(program: &str, args: &[&OsStr], file: &Path) -> Result<Outcome> {
    let outcome = helper::run(program, args)?;
    match outcome.status {
        0 => Ok(outcome),
        helper::NOT_STARTED => Err(Error::new(
            Kind::Mkfs,
            format!(
                "{program} cannot be run: {}; install e2fsprogs, or make a disk without file system (-t none)",
                outcome.err
            ),
        )),
        _ => Err(Error::new(Kind::Mkfs, format!("{program} on {} ended with {}", file.display(), outcome.complaint()))),
    }
}

/// The content of the new root folder: the balloon file. Readable as a root folder should be, if mke2fs copies the mode.
fn make_root(root: &Path) -> Result<()> {
    let make = || {
        DirBuilder::new().mode(0o700).create(root)?;
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(root.join(balloon::NAME))?;
        // The umask changed both modes.
        fs::set_permissions(root.join(balloon::NAME), fs::Permissions::from_mode(0o600))?;
        fs::set_permissions(root, fs::Permissions::from_mode(0o755))
    };
    make().ctx(Kind::Creat, || format!("{} cannot be made", root.display()))
}

/// Removes what [`make`] puts into the new root folder; it may be missing.
pub fn clear_root(root: &Folder) -> std::io::Result<()> {
    match store::unlink(&root.entry(balloon::NAME)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Removes what [`make`] puts into its scratch folder, also what an interrupted run left. A missing folder is no error.
fn remove_root(root: &Path) -> std::io::Result<()> {
    let missing = |e: &std::io::Error| e.kind() == std::io::ErrorKind::NotFound;
    match fs::remove_file(root.join(balloon::NAME)) {
        Err(e) if !missing(&e) => return Err(e),
        _ => {}
    }
    match fs::remove_dir(root) {
        Err(e) if !missing(&e) => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn debugfs(file: &Path, request: &str) -> String {
        helper::run("debugfs", &["-R".as_ref(), request.as_ref(), file.as_os_str()]).unwrap().out
    }

    #[test]
    fn a_file_system_with_an_empty_hidden_balloon() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("fs");
        for (fstype, mib, lazy, block_size) in
            [(FsType::Ext4, 300, true, 4096), (FsType::Ext3, 64, false, 4096), (FsType::Ext4, 40, false, 1024)]
        {
            fs::File::create(&file).unwrap().set_len(mib << 20).unwrap();
            make(&file, &FsSpec { fstype, block_size, lazy, inodes: Inodes::Usual }, dir.path()).unwrap();
            assert!(!dir.path().join("root").exists());
            let clean = helper::run("e2fsck", &["-fn".as_ref(), file.as_os_str()]).unwrap();
            assert_eq!(clean.status, 0, "{}{}", clean.out, clean.err);
            let balloon = debugfs(&file, &format!("stat /{}", balloon::NAME));
            for want in ["Inode: 12 ", "Mode:  0600", "User:     0", "Group:     0", "Size: 0"] {
                assert!(balloon.contains(want), "{want}: {balloon}");
            }
            let root = debugfs(&file, "stat /");
            assert!(root.contains("Mode:  0755") && root.contains("User:     0"), "{root}");
            let sizes = debugfs(&file, "stats");
            assert!(sizes.contains(&format!("Block size:               {block_size}")), "{sizes}");
            assert!(sizes.contains("Errors behavior:          Remount read-only"), "{sizes}");
        }
    }

    #[test]
    fn the_journal_suffices_to_enlarge_a_mounted_file_system() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("fs");
        for (mib, block_size) in
            [(16, 1024), (16, 4096), (100, 4096), (127, 4096), (200, 4096), (264, 4096), (264, 1024)]
                .into_iter()
                .chain([(266, 4096), (1024, 4096), (266, 65536)])
        {
            fs::File::create(&file).unwrap().set_len(mib << 20).unwrap();
            let spec = FsSpec { fstype: FsType::Ext4, block_size, lazy: true, inodes: Inodes::Usual };
            make(&file, &spec, dir.path()).unwrap();
            let stats = debugfs(&file, "stats");
            let line = stats.lines().find_map(|l| l.strip_prefix("Reserved GDT blocks:"));
            let reserved: u64 = line.map_or(0, |l| l.trim().parse().unwrap());
            let journal = debugfs(&file, "stat <8>");
            let size = journal.split("Size: ").nth(1).unwrap().split_whitespace().next().unwrap();
            let blocks = size.parse::<u64>().unwrap() / u64::from(block_size);
            assert!(reserved > 0 || block_size == 65536, "{mib} MiB of {block_size}");
            assert!(reserved + 16 <= blocks / 4, "{mib} MiB of {block_size}: {reserved} and a journal of {blocks}");
        }
    }

    #[test]
    fn impossible_parameters_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("fs");
        fs::write(&file, [0; 4096]).unwrap();
        let spec = FsSpec { fstype: FsType::Ext4, block_size: 4096, lazy: true, inodes: Inodes::Usual };
        assert_eq!(make(&file, &spec, dir.path()).unwrap_err().kind(), Kind::Mkfs);
        assert!(!dir.path().join("root").exists());
        let spec = FsSpec { block_size: 3000, ..spec };
        assert_eq!(make(&file, &spec, dir.path()).unwrap_err().kind(), Kind::Mkfs);
    }

    #[test]
    fn inodes_are_as_many_as_were_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let count = |inodes| {
            let file = dir.path().join("fs");
            fs::File::create(&file).unwrap().set_len(64 << 20).unwrap();
            make(&file, &FsSpec { fstype: FsType::Ext4, block_size: 4096, lazy: true, inodes }, dir.path()).unwrap();
            // s_inodes_count.
            u32::from_le_bytes(fs::read(&file).unwrap()[1024..1028].try_into().unwrap())
        };
        let wanted = [(Inodes::Usual, 4096), (Inodes::PerBytes(4096), 16384), (Inodes::Count(5000), 5008)];
        assert_eq!(wanted.map(|(inodes, _)| count(inodes)), wanted.map(|(_, count)| count));
    }
}

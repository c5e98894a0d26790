//! The tour: makes a disk in a temporary folder, uses it, and shows every command and what came of it.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::unistd::mkdtemp;

use crate::bail;
use crate::descriptor::FILE_NAME;
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::guid::Guid;
use crate::fs::helper;
use crate::fs::mounts;
use crate::fs::stat::FsInfo;
use crate::report;

/// Where the tour's lines go.
pub type Show<'a> = dyn FnMut(&str) + 'a;

/// Files written and compared: how many, and bytes of each.
const FILES: u64 = 40;
const FILE_BYTES: usize = 1 << 20;
/// Bytes of the measured file.
const MEASURED: u64 = 256 << 20;
const PIECE: usize = 1 << 20;
/// What the image can grow to, and some room.
const NEEDED: u64 = 600 << 20;

/// Takes the tour. `program` is the `ploop` command that is run; `parent` where the folder is made. What was made is
/// removed, also after an error or a cancellation.
pub fn run(program: &Path, parent: &Path, show: &mut Show<'_>) -> Result<()> {
    let _operation = report::cancel::begin();
    let free = FsInfo::of(parent)?;
    let free = free.block_size.saturating_mul(free.free_blocks);
    if free < NEEDED {
        // A disk whose image finds no space waits for it, and so would the tour.
        bail!(
            Fallocate,
            "{} has {} MiB free, the tour needs {}; name another folder: ploop tour DIR",
            parent.display(),
            free >> 20,
            NEEDED >> 20
        );
    }
    let folder = mkdtemp(&parent.join("ploop-tour.XXXXXX"))
        .ctx(Kind::Mkdir, || format!("no temporary folder can be made in {}", parent.display()))?;
    let mut tour = Tour { program, folder, show, number: 0 };
    let end = tour.steps();
    // Cleaning up is not to be cancelled.
    report::cancel::clear();
    let cleaned = tour.clean_up();
    end.and(cleaned)
}

struct Tour<'a> {
    program: &'a Path,
    folder: PathBuf,
    show: &'a mut Show<'a>,
    number: u32,
}

impl Tour<'_> {
    fn disk(&self) -> PathBuf {
        self.folder.join(FILE_NAME)
    }

    fn image(&self) -> PathBuf {
        self.folder.join("disk.hdd")
    }

    fn mount_point(&self) -> PathBuf {
        self.folder.join("mnt")
    }

    fn steps(&mut self) -> Result<()> {
        let (disk, image, mnt) = (self.disk(), self.image(), self.mount_point());
        let (disk, image, mnt_arg) = (disk.as_os_str(), image.as_os_str(), mnt.as_os_str());
        let arg = OsStr::new;

        self.step("Make a disk of 1 GiB with an ext4 file system in it; the file grows as it fills.");
        self.ploop(&[arg("init"), arg("-s"), arg("1g"), image])?;
        self.step("Mount it: a block device appears, and its file system at a folder.");
        fs::create_dir(&mnt).ctx(Kind::Mkdir, || mnt.display().to_string())?;
        self.ploop(&[arg("mount"), arg("-m"), mnt_arg, disk])?;
        self.ploop(&[arg("list"), arg("-a")])?;

        self.step("Write files into it.");
        let sum = self.write_files(1)?;
        self.say(&format!("{FILES} files of {} KiB written and synced", FILE_BYTES >> 10));
        self.ploop(&[arg("info"), disk])?;

        self.step("Unmount it: the device is gone, the image is closed.");
        self.ploop(&[arg("umount"), disk])?;
        self.ploop(&[arg("check"), arg("-f"), image])?;
        self.step("Mount it again, and compare every byte.");
        self.ploop(&[arg("mount"), arg("-m"), mnt_arg, disk])?;
        self.compare(&mnt, sum)?;

        self.snapshots(sum)?;

        self.step("Measure, for a first impression.");
        self.measure()?;
        self.step("Unmount it.");
        self.ploop(&[arg("umount"), arg("-m"), mnt_arg])
    }

    /// Takes a snapshot of the mounted disk, mounts it beside the disk, and merges it.
    fn snapshots(&mut self, sum: u32) -> Result<()> {
        let (disk, before) = (self.disk(), self.folder.join("before"));
        let (disk, before_arg) = (disk.as_os_str(), before.as_os_str());
        let arg = OsStr::new;
        let guid = Guid::generate();
        let guid = arg(guid.as_str());

        self.step("Take a snapshot while it is in use, and write all files anew.");
        self.ploop(&[arg("snapshot"), arg("-u"), guid, disk])?;
        let new = self.write_files(2)?;
        self.step("Mount the snapshot beside it, under a name of its own: there the files are as they were.");
        fs::create_dir(&before).ctx(Kind::Mkdir, || before.display().to_string())?;
        self.ploop(&[arg("mount"), arg("-r"), arg("-u"), guid, arg("-c"), arg("before"), arg("-m"), before_arg, disk])?;
        self.compare(&before, sum)?;
        self.ploop(&[arg("umount"), arg("-m"), before_arg])?;
        self.step("Merge: the snapshot is removed, the disk stays as it is now. It is in use all the time.");
        self.ploop(&[arg("snapshot-merge"), disk])?;
        self.ploop(&[arg("snapshot-list"), arg("-o"), arg("current,uuid,fname"), disk])?;
        self.compare(&self.mount_point(), new)
    }

    fn compare(&mut self, folder: &Path, sum: u32) -> Result<()> {
        let again = read_files(folder)?;
        if again != sum {
            bail!(
                Abort,
                "the files in {} differ from what was written: check sum {again:08x}, it was {sum:08x}",
                folder.display()
            );
        }
        self.say(&format!("all {FILES} files are as they were written (check sum {sum:08x})"));
        Ok(())
    }

    fn say(&mut self, text: &str) {
        for line in text.lines().filter(|l| !l.is_empty()) {
            (self.show)(&format!("    {line}"));
        }
    }

    fn step(&mut self, text: &str) {
        self.number += 1;
        (self.show)(&format!("\n{}. {text}", self.number));
    }

    /// Shows a command, runs it, shows what it printed.
    fn ploop(&mut self, args: &[&OsStr]) -> Result<()> {
        if report::cancel::requested() {
            bail!(Abort, "interrupted");
        }
        let mut line = OsString::from("ploop");
        for a in args {
            line.push(" ");
            line.push(a);
        }
        (self.show)(&format!("  $ {}", line.to_string_lossy()));
        // Level 0: what was done, without the details.
        let all: Vec<&OsStr> = [OsStr::new("-v0")].iter().chain(args).copied().collect();
        let outcome = helper::outcome(self.program, &all)
            .ctx(Kind::Sys, || format!("{} cannot be run", self.program.display()))?;
        self.say(&outcome.out);
        self.say(&outcome.err);
        if report::cancel::requested() {
            bail!(Abort, "interrupted");
        }
        match (outcome.status, Kind::from_code(outcome.status)) {
            (0, _) => Ok(()),
            (status, kind) => Err(Error::new(
                kind.unwrap_or(Kind::Sys),
                format!("{} ended with status {status}", line.to_string_lossy()),
            )),
        }
    }

    /// Writes the files; returns the check sum of what is written, which differs for every `seed`.
    fn write_files(&mut self, seed: u64) -> Result<u32> {
        let mut sum = crc32fast::Hasher::new();
        let mut noise = Noise(0x9E37_79B9_7F4A_7C15 ^ seed);
        let mut bytes = vec![0; FILE_BYTES];
        for number in 0..FILES {
            noise.fill(&mut bytes);
            sum.update(&bytes);
            let path = file(&self.mount_point(), number);
            let write = || {
                let mut file = File::create(&path)?;
                file.write_all(&bytes)?;
                file.sync_all()
            };
            write().ctx(Kind::Write, || format!("cannot write {}", path.display()))?;
        }
        Ok(sum.finalize())
    }

    /// A long file written through to the disk, and read back from there.
    fn measure(&mut self) -> Result<()> {
        let path = self.mount_point().join("measured");
        let mut bytes = vec![0; PIECE];
        Noise(1).fill(&mut bytes);
        let rate = |since: Instant| MEASURED as f64 / 1e6 / since.elapsed().as_secs_f64().max(1e-6);
        let mut work = || -> io::Result<(f64, f64)> {
            let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
            let start = Instant::now();
            for _ in 0..MEASURED / PIECE as u64 {
                if report::cancel::requested() {
                    return Err(io::Error::other("interrupted"));
                }
                file.write_all(&bytes)?;
            }
            file.sync_all()?;
            let written = rate(start);
            // What is cached would be read from memory.
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
            io::Seek::rewind(&mut file)?;
            let start = Instant::now();
            while file.read(&mut bytes)? != 0 {}
            Ok((written, rate(start)))
        };
        let (written, read) = work().ctx(Kind::Write, || format!("cannot measure with {}", path.display()))?;
        let mib = MEASURED >> 20;
        self.say(&format!("written: {mib} MiB with sync, {written:.0} MB/s"));
        self.say(&format!("read:    {mib} MiB, {read:.0} MB/s"));
        Ok(())
    }

    /// Unmounts what is mounted and removes the folder, if nothing is mounted in it any more.
    fn clean_up(&mut self) -> Result<()> {
        let disk = self.disk();
        if disk.exists() {
            // Of a disk that is not mounted this only says so.
            for component in [&["-c", "before"][..], &[]] {
                let mut args = vec![OsStr::new("-v-2"), OsStr::new("umount")];
                args.extend(component.iter().map(OsStr::new));
                args.push(disk.as_os_str());
                let _ = helper::outcome(self.program, &args);
            }
        }
        let folder = self.folder.clone();
        if let Some(m) = mounts::read()?.iter().find(|m| m.target.starts_with(&folder)) {
            bail!(Umount, "{} is still mounted; {} stays: ploop umount -m {0}", m.target.display(), folder.display());
        }
        fs::remove_dir_all(&folder).ctx(Kind::Unlink, || format!("{} cannot be removed", folder.display()))
    }
}

fn file(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("file{number:02}"))
}

fn read_files(folder: &Path) -> Result<u32> {
    let mut sum = crc32fast::Hasher::new();
    for number in 0..FILES {
        let path = file(folder, number);
        sum.update(&fs::read(&path).ctx(Kind::Read, || format!("cannot read {}", path.display()))?);
    }
    Ok(sum.finalize())
}

/// Bytes that do not compress and are the same every time.
struct Noise(u64);

impl Noise {
    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

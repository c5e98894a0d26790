//! Checking one image, and repairing it without losing data that an entry names (except with `-F`).

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sys::statfs::{EXT4_SUPER_MAGIC, fstatfs};

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::bat;
use crate::format::header::{self, CLOSED_V21, Header, Version};
use crate::sys::aligned::{read_full, write_all};
use crate::sys::folder::Folder;
use crate::sys::store;
use crate::units::{ClusterSize, SECTOR};

use super::compact;
use super::complete;
use super::open::{Access, open_level, reopen};
use super::scan::{Found, Problem, Scan, Visitor, check_reach, describe, scan};

/// Options of a check, named after the flags of `ploop check`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CheckOptions {
    /// `-f`: also if the image is clean.
    pub force: bool,
    /// `-F`: entries that point nowhere are dropped. Implies `force`.
    pub hard_force: bool,
    /// `-d`: clear the in-use mark if all is well.
    pub drop_inuse: bool,
    /// `-c`: look for clusters used twice, and for unused ones.
    pub check: bool,
    /// `-S`: fill holes.
    pub repair_sparse: bool,
    /// `-r`: write nothing.
    pub read_only: bool,
    /// `-R`: the file is raw; needs `raw_blocksize`.
    pub raw: bool,
    /// `-b`, in sectors.
    pub raw_blocksize: Option<u64>,
}

/// Result of a check of an image that is sound, or was repaired.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CheckReport {
    /// The image is clean and the check was not forced: the table was not read.
    pub skipped: bool,
    pub cluster: ClusterSize,
    /// None for a raw image.
    pub version: Option<Version>,
    /// Of the disk.
    pub sectors: u64,
    /// For the user, one line each: what is odd, and what was repaired.
    pub notes: Vec<String>,
}

/// At most so many findings are reported one by one.
const TOLD: usize = 16;

/// Checks the image at `path`; `dir` is the folder of the descriptor that names it, see [`open_level`]. The caller has
/// made sure that no program has it open for writing.
///
/// Errors carry the classic's codes: 4 cannot be opened, 6 too short, 7 would need writing and may not, 11 damaged or
/// sparse, 17 conversion interrupted, 37 marked in use, 38 wrong flags.
pub fn check_file(path: &Path, dir: Option<&Folder>, options: &CheckOptions) -> Result<CheckReport> {
    let fd = open_level(path, dir)?;
    let (file, _) =
        reopen(&fd, Access::default()).ctx(Kind::Open, || format!("cannot open image {}", path.display()))?;
    let mut check = Check { path, fd, file, options, notes: Vec::new() };
    check.run().map_err(|e| e.context(format_args!("image {}", path.display())))
}

struct Check<'a> {
    path: &'a Path,
    fd: OwnedFd,
    file: File,
    options: &'a CheckOptions,
    notes: Vec<String>,
}

/// What a scan found wrong.
#[derive(Default)]
struct Findings {
    /// Slots that repair sets to 0.
    drop: Vec<u64>,
    /// Why the image is damaged beyond what the flags allow to repair.
    fatal: Vec<String>,
    fatal_count: u64,
    notes: Vec<String>,
}

struct Collect<'a> {
    header: &'a Header,
    file_len: u64,
    options: &'a CheckOptions,
    out: Findings,
}

impl Visitor for Collect<'_> {
    fn problem(&mut self, found: Found, problem: Problem) -> Result<()> {
        let o = self.options;
        let soft = match problem {
            Problem::BeyondDisk => true,
            Problem::Misaligned | Problem::BeyondFile => o.hard_force && !o.read_only,
            Problem::InTable | Problem::Twice => {
                if !o.check {
                    return Ok(());
                }
                false
            }
        };
        let told = if soft { &mut self.out.notes } else { &mut self.out.fatal };
        if told.len() < TOLD {
            told.push(describe(self.header, self.file_len, found, problem));
        }
        if soft {
            self.out.drop.push(found.cluster);
        } else {
            self.out.fatal_count += 1;
        }
        Ok(())
    }
}

impl Check<'_> {
    fn run(&mut self) -> Result<CheckReport> {
        let len = self.len()?;
        let (report_of, cluster) = if self.options.raw {
            let Some(sectors) = self.options.raw_blocksize else {
                bail!(Param, "a raw image has no cluster size of its own: it must be given");
            };
            let cluster = ClusterSize::from_sectors(sectors)?;
            ((false, None, len / SECTOR), cluster)
        } else {
            let header = self.header()?;
            let long = len > header.reach() * header.cluster.bytes();
            let skipped = !header.is_marked() && !self.options.force && !self.options.hard_force && !long;
            let full = (header.sectors / u64::from(header.cluster.sectors())) as u32;
            if !skipped && header.size_clusters != header.clusters() && header.size_clusters != full {
                // The classic never reads it, so that it is no error; other programs compute the size of the BAT from
                // it.
                self.notes.push(format!(
                    "size in clusters is {} at offset 32 of the header: {} would fit the {} sectors at offset 36; qemu \
                     and dm-ploop may refuse the image",
                    header.size_clusters,
                    header.clusters(),
                    header.sectors
                ));
            }
            if !skipped {
                self.table(&header, len)?;
            }
            ((skipped, Some(header.version), header.sectors), header.cluster)
        };
        self.sparse(cluster)?;
        let (skipped, version, sectors) = report_of;
        Ok(CheckReport { skipped, cluster, version, sectors, notes: std::mem::take(&mut self.notes) })
    }

    fn len(&self) -> Result<u64> {
        Ok(self.file.metadata().ctx(Kind::Fstat, || "cannot look at the file")?.len())
    }

    fn header(&self) -> Result<Header> {
        let mut head = [0; header::SIZE];
        let got = read_full(&self.file, &mut head, 0).ctx(Kind::Read, || "cannot read the header")?;
        if got < head.len() {
            bail!(Read, "the file has {got} bytes: the header alone has {}", head.len());
        }
        let header = Header::parse(&head)?;
        header.check_layout()?;
        Ok(header)
    }

    fn writable(&self) -> Result<File> {
        let access = Access { write: true, direct: false };
        Ok(reopen(&self.fd, access).ctx(Kind::Open, || "cannot open for writing")?.0)
    }

    /// The BAT, the tail and the header's marks.
    fn table(&mut self, header: &Header, len: u64) -> Result<()> {
        let o = self.options;
        let size = header.cluster.bytes();
        if header.is_marked() && header.is_converting() {
            bail!(Busy, "a version conversion was interrupted (flags {:#x} at offset 52)", header.flags);
        }
        let table = u64::from(header.first_data()) * size;
        if len < table {
            bail!(Read, "the file has {len} bytes: header and BAT alone have {table}");
        }
        let mut collect = Collect { header, file_len: len, options: o, out: Findings::default() };
        let found = scan(&self.file, header, len, &mut collect)?;
        let findings = collect.out;
        self.notes.extend(findings.notes.iter().cloned());
        if o.check {
            self.note_unused(header, &found);
        }
        if !findings.fatal.is_empty() {
            bail!(Format, "{}{}", findings.fatal.join("; "), more(findings.fatal_count, findings.fatal.len()));
        }
        if header.is_marked() && !o.drop_inuse {
            bail!(
                InUse,
                "marked in use ({:#010x} at offset 44): it is open elsewhere or was not closed cleanly; `-d` clears the \
                 mark if all is well",
                header.in_use
            );
        }
        if o.read_only || !o.repair_sparse {
            check_reach(header, found.end)?;
        }
        if o.read_only && !findings.drop.is_empty() {
            bail!(Format, "{}", findings.notes.join("; "));
        }
        // Clusters of a format extension stand behind the data and have no entry.
        let keeps_tail = header.in_use == CLOSED_V21 && header.extension != 0;
        let end = u64::from(found.end) * size;
        let tail = if keeps_tail { 0 } else { len.saturating_sub(end) };
        if tail != 0 {
            self.notes.push(format!("{tail} bytes at the end, from offset {end} on, are used by nothing"));
        }
        let last = if o.read_only { len.div_ceil(size) } else { u64::from(found.end) };
        let wanted = wanted_header(header, last == u64::from(header.first_data()));
        if o.read_only {
            // An empty image with a tail: the flag is right, the tail is what is wrong.
            if tail != 0 && wanted_header(header, found.end == header.first_data()) == *header && wanted != *header {
                bail!(
                    Write,
                    "{tail} bytes at the end, from offset {end} on, are used by nothing, and nothing may be written; \
                     `ploop check -f` cuts them off"
                );
            }
            if wanted != *header {
                bail!(
                    Write,
                    "in-use mark {:#010x} and flags {:#x} should be {:#010x} and {:#x}, and nothing may be written",
                    header.in_use,
                    header.flags,
                    wanted.in_use,
                    wanted.flags
                );
            }
            return Ok(());
        }
        self.repair(header, &wanted, &findings, if tail == 0 { None } else { Some(end) })?;
        if check_reach(header, found.end).is_err() {
            let (moved, end) = compact::pull_in(&self.writable()?, self.path)?;
            self.notes.push(format!("{moved} clusters were moved to the front, the file cut to {end} bytes"));
        }
        Ok(())
    }

    fn note_unused(&mut self, header: &Header, found: &Scan) {
        let gaps = found.used.gaps(header.first_data(), found.end);
        let count: u64 = gaps.iter().map(|g| u64::from(g.end - g.start)).sum();
        if let Some(first) = gaps.first() {
            self.notes
                .push(format!("{count} clusters of the file are used by nothing, the first one is {}", first.start));
        }
    }

    /// Writes what is wrong right; each step leaves an image that is no worse.
    fn repair(&mut self, header: &Header, wanted: &Header, findings: &Findings, cut: Option<u64>) -> Result<()> {
        if findings.drop.is_empty() && cut.is_none() && wanted == header {
            return Ok(());
        }
        let file = self.writable()?;
        let sync = |file: &File| store::sync_all(file).ctx(Kind::Fsync, || "cannot sync");
        for index in &findings.drop {
            write_all(&file, &[0; 4], bat::offset_of(*index))
                .ctx(Kind::Write, || format!("cannot write the BAT entry of cluster {index}"))?;
        }
        if !findings.drop.is_empty() {
            sync(&file)?;
            self.notes.push(format!("{} BAT entries were set to 0", findings.drop.len()));
        }
        if let Some(end) = cut {
            store::set_len(&file, end).ctx(Kind::Ftruncate, || format!("cannot cut to {end} bytes"))?;
            sync(&file)?;
            self.notes.push(format!("cut to {end} bytes"));
        }
        if wanted != header {
            write_all(&file, &wanted.encode(), 0).ctx(Kind::Write, || "cannot write the header")?;
            sync(&file)?;
            self.notes.push(format!("in-use mark set to {:#010x}, flags to {:#x}", wanted.in_use, wanted.flags));
        }
        Ok(())
    }

    /// On ext4 the classic's kernel driver needs files without holes, with unwritten space on cluster borders only.
    fn sparse(&mut self, cluster: ClusterSize) -> Result<()> {
        let kind = fstatfs(&self.file).ctx(Kind::Fstat, || "cannot ask for the file system")?.filesystem_type();
        if kind != EXT4_SUPER_MAGIC {
            return Ok(());
        }
        let len = self.len()?;
        let gap =
            complete::first_gap(&self.file, cluster, len).ctx(Kind::Read, || "cannot ask for the file's extents")?;
        let Some(gap) = gap else { return Ok(()) };
        if self.options.read_only || !self.options.repair_sparse {
            bail!(Format, "sparse: {gap}; `-S` fills it");
        }
        let file = self.writable()?;
        complete::complete(&file, cluster, len).ctx(Kind::Write, || "cannot fill holes")?;
        store::sync_all(&file).ctx(Kind::Fsync, || "cannot sync")?;
        self.notes.push(format!("it was sparse ({gap}): filled with zeroes"));
        Ok(())
    }
}

/// The header of the image when all is well.
fn wanted_header(header: &Header, empty: bool) -> Header {
    let flag = if empty { header::FLAG_EMPTY } else { 0 };
    let mut wanted = Header { flags: header.flags & !header::FLAG_EMPTY | flag, ..*header };
    if header.is_marked() {
        wanted.in_use = 0;
        wanted.extension = 0;
    }
    wanted
}

fn more(count: u64, told: usize) -> String {
    match count.saturating_sub(told as u64) {
        0 => String::new(),
        n => format!("; and {n} more like these"),
    }
}

/// Reads the header of an image that must be a ploop1 image; nothing is written. `Open` if the file is too short.
pub fn read_header(path: &Path, dir: Option<&Folder>) -> Result<Header> {
    let fd = open_level(path, dir)?;
    let (file, _) =
        reopen(&fd, Access::default()).ctx(Kind::Open, || format!("cannot open image {}", path.display()))?;
    let mut head = [0; 4096];
    let got = read_full(&file, &mut head, 0).ctx(Kind::Read, || format!("cannot read image {}", path.display()))?;
    let named = |e: Error| e.context(format_args!("image {}", path.display()));
    if got < head.len() {
        bail!(Open, "image {} has {got} bytes: a ploop1 image has at least {}", path.display(), head.len());
    }
    let header = Header::parse(&head).map_err(named)?;
    header.check_layout().map_err(named)?;
    Ok(header)
}

//! Checking one image, and repairing it without losing data that an entry names (except with `-F`).

#[cfg(test)]
mod crash_tests;
mod repair;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sys::statfs::{EXT4_SUPER_MAGIC, fstatfs};

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::header::{self, CLOSED_V21, Header, Version};
use crate::sys::aligned::read_full;
use crate::sys::folder::Folder;
use crate::sys::store;
use crate::units::{ClusterSize, SECTOR};

use crate::image::compact;
use crate::image::complete;
use crate::image::open::{Access, open_level, reopen};
use crate::image::scan::{Scan, check_reach, scan};
use repair::{Collect, Findings, TOLD};

/// Options of a check, named after the flags of `ploop check`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CheckOptions {
    /// `-f`: also if the image is clean.
    pub force: bool,
    /// `-F`: entries that point nowhere are dropped, clusters that two entries name are copied. Implies `force`.
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

/// Scans after which a BAT that is still not sound is an error: repairs of each kind can show more to repair.
const ROUNDS: usize = 6;

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
            let flagged = header.is_marked() || header.is_converting();
            let skipped = !flagged && !self.options.force && !self.options.hard_force && !long;
            if !skipped && repair::contradicts_itself(&header) {
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
                self.table(&header)?;
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

    /// The BAT, the tail and the header's marks. What is repaired in the BAT is looked at once more.
    fn table(&mut self, header: &Header) -> Result<()> {
        let mut header = *header;
        for _ in 0..ROUNDS {
            match self.round(&header)? {
                None => return Ok(()),
                Some(again) => header = again,
            }
        }
        bail!(Format, "{ROUNDS} repairs did not make the BAT sound; is another program writing to the image?")
    }

    /// One scan and what follows from it; the header after a repair of the BAT, none if that was not needed.
    fn round(&mut self, header: &Header) -> Result<Option<Header>> {
        let (o, len) = (self.options, self.len()?);
        let size = header.cluster.bytes();
        if header.is_marked() && header.is_converting() {
            bail!(Busy, "a version conversion was interrupted (flags {:#x} at offset 52)", header.flags);
        }
        let table = u64::from(header.first_data()) * size;
        if len < table {
            bail!(Read, "the file has {len} bytes: header and BAT alone have {table}");
        }
        let mut collect = Collect::new(header, len, o);
        let found = scan(&self.file, header, len, &mut collect)?;
        let findings = collect.out;
        if !findings.fatal.is_empty() {
            let told = findings.fatal.join("; ");
            bail!(Format, "{told}{}", more(findings.fatal_count, findings.fatal.len()));
        }
        self.refuse_marked(header)?;
        if o.hard_force
            && !o.read_only
            && !findings.drop.is_empty()
            && let Some(other) = repair::other_version(&self.file, header, len, &found)
        {
            self.notes.push(format!(
                "no entry is sound for version {}, all are for version {}: the signature is set to that",
                header.version.number(),
                other.version.number()
            ));
            repair::write_header(&self.writable()?, &other)?;
            return Ok(Some(other));
        }
        repair::refuse_wrong_header(header, &findings)?;
        repair::refuse_smaller_disk(&self.file, header, len, &found)?;
        if o.read_only || !o.repair_sparse {
            check_reach(header, found.end)?;
        }
        if o.read_only && !findings.drop.is_empty() {
            bail!(Format, "{}", findings.notes.join("; "));
        }
        self.notes.extend(findings.notes.iter().cloned());
        if findings.any() {
            return self.repair_bat(header, &findings, found.end, len).map(Some);
        }
        if o.check {
            self.note_unused(header, &found);
        }
        self.ends(header, &found, len)?;
        Ok(None)
    }

    fn refuse_marked(&self, header: &Header) -> Result<()> {
        if header.is_marked() && !self.options.drop_inuse {
            bail!(
                InUse,
                "marked in use ({:#010x} at offset 44): it is open elsewhere or was not closed cleanly; `-d` clears the \
                 mark if all is well",
                header.in_use
            );
        }
        Ok(())
    }

    /// Repairs entries; returns the header that is there then.
    fn repair_bat(&mut self, header: &Header, findings: &Findings, end: u32, len: u64) -> Result<Header> {
        let file = self.writable()?;
        let mut now = *header;
        if findings.lost > 0 && header.in_use == CLOSED_V21 {
            // A saved bitmap of changes would not have this one.
            (now.in_use, now.extension) = (0, 0);
        }
        if findings.first_data {
            now.first_data_sector = header.table_clusters() * header.cluster.sectors();
            self.notes.push(format!(
                "first data sector set to {}: entries name clusters before {}",
                now.first_data_sector, header.first_data_sector
            ));
        }
        if now != *header {
            repair::write_header(&file, &now)?;
        }
        // Clusters of a format extension stand behind the data and have no entry.
        let behind = u64::from(end).max(len.div_ceil(header.cluster.bytes()));
        repair::copy_shared(&file, header, &findings.copy, behind, len)?;
        if !findings.copy.is_empty() {
            let shown: Vec<String> = findings.copy.iter().take(TOLD).map(|(c, _)| c.to_string()).collect();
            self.notes.push(format!(
                "{} clusters of the disk named a cluster of the file that another one names, too, and have a copy of it now \
                 ({}{}): one of each pair has the content of the other",
                findings.copy.len(),
                shown.join(", "),
                if findings.copy.len() > TOLD { ", ..." } else { "" }
            ));
        }
        repair::drop_slots(&file, &findings.drop)?;
        if !findings.drop.is_empty() {
            self.notes.push(format!("{} BAT entries were set to 0", findings.drop.len()));
        }
        Ok(now)
    }

    /// The end of the file, and the header's marks, of an image with a sound BAT.
    fn ends(&mut self, header: &Header, found: &Scan, len: u64) -> Result<()> {
        let (o, size) = (self.options, header.cluster.bytes());
        let extension = repair::check_extension(&self.file, header, len, &found.used);
        // Clusters of a format extension stand behind the data and have no entry.
        let keeps_tail = header.in_use == CLOSED_V21 && header.extension != 0 && extension.is_ok();
        let end = u64::from(found.end) * size;
        let tail = if keeps_tail { 0 } else { len.saturating_sub(end) };
        if tail != 0 {
            self.notes.push(format!("{tail} bytes at the end, from offset {end} on, are used by nothing"));
        }
        let last = if o.read_only { len.div_ceil(size) } else { u64::from(found.end) };
        let mut wanted = wanted_header(header, last == u64::from(header.first_data()));
        if let Err(why) = &extension {
            self.notes.push(why.clone());
            (wanted.in_use, wanted.extension) = (0, 0);
        }
        if o.read_only {
            return refuse_to_write(header, &wanted, (tail, end), found.end);
        }
        if o.hard_force {
            wanted.size_clusters =
                if repair::contradicts_itself(header) { header.clusters() } else { header.size_clusters };
        }
        if header.in_use == 0 && header.extension != 0 {
            self.notes
                .push(format!("sector {} of a format extension that is not valid was forgotten", header.extension));
            wanted.extension = 0;
        }
        self.finish(header, &wanted, (tail != 0).then_some(end))?;
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

    /// Cuts the file and writes the header; each step leaves an image that is no worse.
    fn finish(&mut self, header: &Header, wanted: &Header, cut: Option<u64>) -> Result<()> {
        if cut.is_none() && wanted == header {
            return Ok(());
        }
        let file = self.writable()?;
        if let Some(end) = cut {
            store::set_len(&file, end).ctx(Kind::Ftruncate, || format!("cannot cut to {end} bytes"))?;
            store::sync_all(&file).ctx(Kind::Fsync, || "cannot sync")?;
            self.notes.push(format!("cut to {end} bytes"));
        }
        if wanted != header {
            repair::write_header(&file, wanted)?;
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

/// `Write` if a check that may not write would; `(tail, end)`: bytes that nothing uses, and where they begin.
fn refuse_to_write(header: &Header, wanted: &Header, (tail, end): (u64, u64), last: u32) -> Result<()> {
    // An empty image with a tail: the flag is right, the tail is what is wrong.
    if tail != 0 && wanted_header(header, last == header.first_data()) == *header && wanted != header {
        bail!(
            Write,
            "{tail} bytes at the end, from offset {end} on, are used by nothing, and nothing may be written; `ploop check -f` \
             cuts them off"
        );
    }
    if wanted != header {
        bail!(
            Write,
            "in-use mark {:#010x} and flags {:#x} should be {:#010x} and {:#x}, and nothing may be written",
            header.in_use,
            header.flags,
            wanted.in_use,
            wanted.flags
        );
    }
    Ok(())
}

/// The header of the image when all is well.
fn wanted_header(header: &Header, empty: bool) -> Header {
    let flag = if empty { header::FLAG_EMPTY } else { 0 };
    // The BAT is sound for the version: whatever was interrupted is complete.
    let flags = header.flags & !(header::FLAG_EMPTY | header::FLAG_CONVERT) | flag;
    let mut wanted = Header { flags, ..*header };
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

//! Moving the data of upper images down into a lower one.
//!
//! At every instant the chain reads as before: the source of each cluster hides what the merge writes into the target.
//! So an interrupted merge is finished by running it again.

mod copy;
mod plan;

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::header::{self, Header};
use crate::report;
use crate::sys::aligned::read_full;
use crate::sys::store;
use crate::units::{ClusterSize, SECTOR};

use super::create::Progress;
use super::grow::grow;
use super::target::{Entries, Target, check_alike, read_table};

use copy::{Copier, Sink};
use plan::Plan;

/// An image file of a merge, open for reading, the target also for writing. The merge opens it once more in the mode
/// that it needs.
#[derive(Clone, Copy, Debug)]
pub struct MergeLevel<'a> {
    pub file: &'a File,
    pub name: &'a Path,
    pub raw: bool,
}

/// How to merge.
pub struct MergeOptions<'a> {
    /// Called now and then with the bytes done and the bytes in all. An error stops the merge at a safe point.
    pub progress: Progress<'a>,
    /// The target becomes the top of a running chain: its mark stays.
    pub stay_marked: bool,
    /// Bytes after which what was copied is made durable and published.
    pub batch: u64,
    /// Share data where the file system can.
    pub reflink: bool,
}

/// Default of [`MergeOptions::batch`].
pub const BATCH: u64 = 8 << 30;

/// What a merge has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Merged {
    /// Bytes that were copied.
    pub copied: u64,
    /// Bytes that now share space with the sources.
    pub shared: u64,
    /// Bytes of zeroes that needed not be written.
    pub skipped: u64,
    /// Size of the target's disk in sectors.
    pub sectors: u64,
}

/// A merge that failed.
#[derive(Debug)]
pub struct Failed {
    pub error: Error,
    /// The target's own content is as it was before; else it is not valid until a merge is finished.
    pub untouched: bool,
}

/// A merge that was checked: sources (topmost first) and target. Nothing was written yet.
pub struct Merge<'a> {
    sources: Vec<Source<'a>>,
    target: Under<'a>,
    target_level: MergeLevel<'a>,
    cluster: ClusterSize,
    sectors: u64,
    /// Clusters that any image below the target has; none if that is not known.
    below: Option<Entries>,
}

struct Source<'a> {
    level: MergeLevel<'a>,
    entries: Entries,
}

enum Under<'a> {
    Ploop(Box<Target<'a>>),
    Raw { bytes: u64 },
}

impl<'a> Merge<'a> {
    /// Reads headers and tables of the sources (topmost first), of the target, and of the images below it (any order;
    /// none if they are not known, so that zeroes have to be written wherever a source has them). Checks that they fit
    /// together: cluster size and version are `Format`, a target larger than a source `Param`, a source that is marked
    /// in use `Open`.
    pub fn prepare(
        sources: &[MergeLevel<'a>],
        target: MergeLevel<'a>,
        below: Option<&[MergeLevel<'a>]>,
    ) -> Result<Merge<'a>> {
        let mut tables: Vec<(Header, Source<'a>)> = Vec::with_capacity(sources.len());
        for level in sources {
            if level.raw {
                bail!(Param, "image {} is raw: only the lowest image of a merge can be", level.name.display());
            }
            let (header, table) = read_table(level.file, level.name)?;
            if header.is_marked() {
                bail!(
                    Open,
                    "image {} is marked in use ({:#010x} at offset 44): it is open elsewhere or was not closed cleanly; \
                     run `ploop check -d` on it when no program has it open",
                    level.name.display(),
                    header.in_use
                );
            }
            if let Some((upper, above)) = tables.last() {
                check_alike(&header, level.name, upper, above.level.name)?;
                check_size(level.name, header.sectors, above.level.name, upper.sectors)?;
            }
            tables.push((header, Source { level: *level, entries: table.entries }));
        }
        let (Some((top, _)), Some((lowest, last))) = (tables.first(), tables.last()) else {
            bail!(Param, "a merge needs at least two images");
        };
        let (top, lowest, last_name) = (*top, *lowest, last.level.name);
        let kind = match target.raw {
            true => Under::Raw { bytes: raw_bytes(&target)? },
            false => {
                let target = Target::open(target.file, target.name)?;
                target.check_like(&lowest, last_name)?;
                Under::Ploop(Box::new(target))
            }
        };
        let sectors = match &kind {
            Under::Ploop(t) => t.header.sectors,
            Under::Raw { bytes } => bytes / SECTOR,
        };
        check_size(target.name, sectors, last_name, lowest.sectors)?;
        let mut merge = Merge {
            sources: tables.into_iter().map(|(_, s)| s).collect(),
            target: kind,
            target_level: target,
            cluster: top.cluster,
            sectors: top.sectors,
            below: None,
        };
        if let Some(levels) = below {
            merge.look_below(levels)?;
        }
        Ok(merge)
    }

    fn look_below(&mut self, below: &[MergeLevel<'_>]) -> Result<()> {
        let mut all: Entries = Vec::new();
        for level in below {
            let found = match level.raw {
                true => (0..raw_bytes(level)?.div_ceil(self.cluster.bytes()) as u32).map(|c| (c, 0)).collect(),
                false => read_table(level.file, level.name)?.1.entries,
            };
            all.extend(found);
        }
        all.sort_unstable();
        all.dedup_by_key(|e| e.0);
        self.below = Some(all);
        Ok(())
    }

    /// Whether the target is marked in use. A caller that does not know that a crash left the mark refuses the merge.
    pub fn target_marked(&self) -> bool {
        matches!(&self.target, Under::Ploop(t) if t.header.is_marked())
    }

    /// Whether data of the target has to make room for a longer table: then no worker may be reading it.
    pub fn moves_data(&self) -> bool {
        match &self.target {
            Under::Raw { .. } => false,
            Under::Ploop(t) => Header::new(t.header.version, t.header.cluster, self.sectors)
                .map_or(true, |grown| grown.first_data() > t.header.first_data()),
        }
    }

    /// Runs the merge. The caller makes sure that no other program uses the target or writes to the sources.
    pub fn run(mut self, options: &mut MergeOptions<'_>) -> Result<Merged, Failed> {
        let mut touched = false;
        match self.work(options, &mut touched) {
            Ok(merged) => Ok(merged),
            Err(error) => {
                // The image is as sound as before: close it if that is still possible.
                if let Under::Ploop(target) = &mut self.target
                    && target.header.in_use == header::IN_USE
                    && let Err(e) = target.close_as_it_is()
                {
                    report::warn(format_args!("image {} stays marked in use: {e}", target.name.display()));
                }
                Err(Failed { error, untouched: !touched })
            }
        }
    }

    fn work(&mut self, options: &mut MergeOptions<'_>, touched: &mut bool) -> Result<Merged> {
        let plan = self.plan()?;
        (options.progress)(0, plan.bytes)?;
        let cluster = self.cluster;
        let mut sink = match &mut self.target {
            Under::Ploop(target) => {
                target.mark()?;
                grow(target, self.sectors)?;
                Sink::ploop(target)
            }
            Under::Raw { bytes } => {
                let wanted = self.sectors * SECTOR;
                if *bytes < wanted {
                    store::set_len(self.target_level.file, wanted).ctx(Kind::Ftruncate, || {
                        format!("cannot extend image {} to {wanted} bytes", self.target_level.name.display())
                    })?;
                }
                Sink::raw(self.target_level, wanted)
            }
        };
        let levels: Vec<MergeLevel<'_>> = self.sources.iter().map(|s| s.level).collect();
        let mut copier = Copier::new(&levels, self.target_level, cluster, options)?;
        copier.reserve(&plan, &mut sink)?;
        copier.all(&plan.extents, &mut sink, touched)?;
        let done = copier.done;
        match &mut self.target {
            Under::Ploop(target) => target.close(options.stay_marked)?,
            Under::Raw { .. } => store::sync_all(self.target_level.file)
                .ctx(Kind::Fsync, || format!("cannot sync image {}", self.target_level.name.display()))?,
        }
        Ok(Merged { sectors: self.sectors, ..done })
    }

    fn plan(&self) -> Result<Plan> {
        let own: Option<&Entries> = match &self.target {
            Under::Ploop(t) => Some(&t.table.entries),
            Under::Raw { .. } => None,
        };
        let sources: Vec<&Entries> = self.sources.iter().map(|s| &s.entries).collect();
        let files: Vec<&File> = self.sources.iter().map(|s| s.level.file).collect();
        Plan::new(&sources, &files, own, self.below.as_ref(), self.cluster)
    }
}

fn check_size(lower: &Path, lower_sectors: u64, upper: &Path, upper_sectors: u64) -> Result<()> {
    if lower_sectors > upper_sectors {
        bail!(
            Param,
            "image {} has {lower_sectors} sectors, {} that stands on it {upper_sectors}: a lower image must not be larger",
            lower.display(),
            upper.display()
        );
    }
    Ok(())
}

/// Size of a raw image in bytes; a ploop1 image is refused.
fn raw_bytes(level: &MergeLevel<'_>) -> Result<u64> {
    let shown = level.name.display();
    let mut head = [0; header::SIZE];
    let got = read_full(level.file, &mut head, 0).ctx(Kind::Read, || format!("cannot read image {shown}"))?;
    if header::has_signature(head.get(..got).unwrap_or_default()) {
        bail!(Param, "image {shown} has the signature of a ploop1 image: it is not merged into as a raw one");
    }
    let len = level.file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {shown}"))?.len();
    Ok(len / SECTOR * SECTOR)
}

/// The files of levels, kept open, to be lent to a merge.
#[derive(Debug)]
pub struct OpenLevel {
    pub file: File,
    pub path: PathBuf,
    pub raw: bool,
}

impl OpenLevel {
    pub fn level(&self) -> MergeLevel<'_> {
        MergeLevel { file: &self.file, name: &self.path, raw: self.raw }
    }
}

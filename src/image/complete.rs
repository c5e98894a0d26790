//! Completing an image that is closed or becomes a lower delta: no holes, no unwritten space off cluster borders.
//!
//! Content never changes: only what reads as zero is written, with zeroes. The classic's check calls an image on ext4
//! "sparse" (and refuses it) when a hole or an unwritten extent that does not begin and end on cluster borders is left.

use std::fmt;
use std::fs::File;
use std::io;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::fstatvfs;

use crate::report::progress::Progress;
use crate::sys::aligned::{AlignedBuf, write_all};
use crate::sys::fiemap::{self, Extent};
use crate::units::ClusterSize;

/// Bytes written at once.
const CHUNK: u64 = 1 << 20;

/// Rounds after which gaps that are left are an error: each round leaves fewer gaps unless the file system splits
/// extents anew.
const ROUNDS: usize = 8;

/// Completes the part `[0, len)` of a file that no other program writes. `len` is a multiple of the cluster. Does not
/// sync.
///
/// Errors leave the content as it was: without space, for example, the image only stays sparse. If the space is not
/// enough for all gaps none is filled.
pub fn complete(file: &File, cluster: ClusterSize, len: u64) -> io::Result<()> {
    fill_gaps(file, cluster, len, true)
}

/// Completes a raw file. Its holes are the user's choice and stay: only unwritten space off cluster borders, which
/// zeroing leaves, is filled. `len` may be any.
pub fn complete_raw(file: &File, cluster: ClusterSize, len: u64) -> io::Result<()> {
    fill_gaps(file, cluster, len, false)
}

fn fill_gaps(file: &File, cluster: ClusterSize, len: u64, holes: bool) -> io::Result<()> {
    let find = || {
        find_gaps(file, cluster, len).map(|mut found| {
            found.gaps.retain(|g| holes || !g.hole);
            found
        })
    };
    let mut zeroes = None;
    let mut fallocates = true;
    for _ in 0..ROUNDS {
        let found = find()?;
        if found.gaps.is_empty() {
            return Ok(());
        }
        check_space(file, found.gaps.iter().filter(|g| g.hole).map(|g| g.len).sum())?;
        let (mut shown, mut done) = (Progress::begin("filling holes"), 0);
        let all = found.gaps.iter().map(|g| g.len).sum();
        for gap in &found.gaps {
            shown.at(done, all);
            fill(file, cluster, *gap, &mut fallocates, &mut zeroes)?;
            done += gap.len;
        }
        shown.finish();
        if !found.exact {
            // Some of these file systems never store zeroes: another round would find the same gaps.
            return Ok(());
        }
    }
    match find()?.gaps.first() {
        None => Ok(()),
        Some(gap) => Err(io::Error::other(format!("{gap} stays though zeroes were written there"))),
    }
}

/// `StorageFull` if the file system has not so much space.
pub(super) fn check_space(file: &File, bytes: u64) -> io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let fs = fstatvfs(file)?;
    let free = (fs.blocks_available() as u64).saturating_mul(fs.fragment_size() as u64);
    if bytes > free {
        return Err(io::Error::new(
            io::ErrorKind::StorageFull,
            format!("{bytes} bytes are needed, the file system has {free}"),
        ));
    }
    Ok(())
}

/// A range that reads as zero and must be filled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gap {
    pub start: u64,
    pub len: u64,
    /// Nothing is allocated there; else unwritten space.
    pub hole: bool,
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.hole { "a hole" } else { "unwritten space off cluster borders" };
        write!(f, "{what} of {} bytes at offset {}", self.len, self.start)
    }
}

/// The first gap that [`complete`] would fill in `[0, len)`.
pub fn first_gap(file: &File, cluster: ClusterSize, len: u64) -> io::Result<Option<Gap>> {
    Ok(find_gaps(file, cluster, len)?.gaps.first().copied())
}

struct Gaps {
    gaps: Vec<Gap>,
    /// True: the gaps come from the file system's extent map. False: from SEEK_HOLE.
    exact: bool,
}

fn find_gaps(file: &File, cluster: ClusterSize, len: u64) -> io::Result<Gaps> {
    let mut gaps = Vec::new();
    let mut at = 0;
    let walked = fiemap::each_extent(file, 0, len, &mut |extent| {
        add_hole(&mut gaps, at, extent.start.min(len));
        at = at.max(extent.end());
        if extent.unwritten {
            add_unaligned(&mut gaps, cluster, extent, len);
        }
        Ok(())
    });
    let exact = match walked {
        Ok(()) => true,
        Err(e) if e.kind() == io::ErrorKind::Unsupported => {
            gaps.clear();
            at = 0;
            fiemap::each_data(file, 0, len, &mut |start, end| {
                add_hole(&mut gaps, at, start);
                at = end;
                Ok(())
            })?;
            false
        }
        Err(e) => return Err(e),
    };
    add_hole(&mut gaps, at, len);
    Ok(Gaps { gaps, exact })
}

fn add_hole(gaps: &mut Vec<Gap>, start: u64, end: u64) {
    if start < end {
        gaps.push(Gap { start, len: end - start, hole: true });
    }
}

/// Those parts of an unwritten extent's first and last cluster that make it unaligned.
fn add_unaligned(gaps: &mut Vec<Gap>, cluster: ClusterSize, extent: Extent, len: u64) {
    let size = cluster.bytes();
    let (start, end) = (extent.start, extent.end().min(len));
    let head_end = start.next_multiple_of(size).min(end);
    if start < head_end {
        gaps.push(Gap { start, len: head_end - start, hole: false });
    }
    let tail_start = (end / size * size).max(head_end);
    if tail_start < end {
        gaps.push(Gap { start: tail_start, len: end - tail_start, hole: false });
    }
}

fn fill(
    file: &File,
    cluster: ClusterSize,
    gap: Gap,
    fallocates: &mut bool,
    zeroes: &mut Option<AlignedBuf>,
) -> io::Result<()> {
    let size = cluster.bytes();
    let end = gap.start + gap.len;
    if gap.hole && *fallocates {
        // Whole clusters need no writing: unwritten space on cluster borders is as good, and reserved at once.
        let (from, to) = (gap.start.next_multiple_of(size), end / size * size);
        if from < to {
            match fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, from as i64, (to - from) as i64) {
                Ok(()) => {
                    write_zeroes(file, gap.start, from, zeroes)?;
                    return write_zeroes(file, to, end, zeroes);
                }
                Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENOSYS) => *fallocates = false,
                Err(e) => return Err(e.into()),
            }
        }
    }
    write_zeroes(file, gap.start, end, zeroes)
}

fn write_zeroes(file: &File, start: u64, end: u64, zeroes: &mut Option<AlignedBuf>) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let zeroes = zeroes.get_or_insert_with(|| AlignedBuf::new(CHUNK as usize));
        let len = (end - at).min(CHUNK) as usize;
        write_all(file, &zeroes[..len], at)?;
        at += len as u64;
    }
    Ok(())
}

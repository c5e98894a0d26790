//! Preallocating an image that exists: every cluster of the disk gets a place in the file.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use crate::error::{IoContext, Kind, Result};
use crate::sys::store;
use crate::units::{ImageCluster, VirtCluster};

use super::grow::zero;
use super::target::Target;

/// Bytes that get their entries at once.
const BATCH: u64 = 16 << 30;

/// Gives every cluster of the disk that has none a place in the file, reading as zero, its space taken. Returns how many
/// there were. No other program uses the image. At every instant the content is the same; an interrupted run leaves the
/// image marked in use, and another one goes on. `progress` gets what is done and all there is to do, in bytes, and ends the
/// work by an error; the image is whole then.
pub fn preallocate(file: &File, name: &Path, progress: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<u64> {
    let mut target = Target::open(file, name)?;
    let missing = missing(&target);
    let inside: u64 = target.table.free.iter().map(|g| u64::from(g.end - g.start)).sum();
    target.check_room((missing.len() as u64).saturating_sub(inside))?;
    target.mark()?;
    match fill(&mut target, &missing, progress) {
        Ok(()) => {
            target.close(false)?;
            Ok(missing.len() as u64)
        }
        // What has reached the disk is not known: the mark stays.
        Err(e) if e.kind() == Kind::Fsync => Err(e),
        Err(e) => target.close_as_it_is().and(Err(e)),
    }
}

/// Clusters of the disk without a place.
fn missing(target: &Target<'_>) -> Vec<VirtCluster> {
    let mut have = target.table.entries.iter().map(|(cluster, _)| *cluster).peekable();
    let lacks = |cluster: &VirtCluster| have.next_if_eq(cluster).is_none();
    (0..target.header.clusters()).filter(lacks).collect()
}

fn fill(
    target: &mut Target<'_>,
    missing: &[VirtCluster],
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<()> {
    let size = target.cluster().bytes();
    target.clear_beyond()?;
    let name = target.name.display().to_string();
    let end = u64::from(target.table.end) * size;
    let len = target.file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {name}"))?.len();
    if len > end {
        // What lies behind the last cluster would become data.
        store::set_len(target.file, end).ctx(Kind::Ftruncate, || format!("cannot cut image {name} to {end} bytes"))?;
    }
    let mut done = 0;
    for batch in missing.chunks((BATCH / size).max(1) as usize) {
        let mut entries = Vec::with_capacity(batch.len());
        let mut rest = batch;
        while !rest.is_empty() {
            progress(done * size, missing.len() as u64 * size)?;
            let inside = target.table.end;
            let got = target.allocate(rest.len().min(u32::MAX as usize) as u32)?;
            let (now, later) = rest.split_at((got.end - got.start) as usize);
            #[cfg(test)]
            if crate::image::breach::is("entries before clusters") {
                let entries: Vec<_> = now.iter().copied().zip(got.clone()).collect();
                target.publish(&entries)?;
            }
            take(target, &got, got.start < inside)?;
            entries.extend(now.iter().copied().zip(got));
            done += now.len() as u64;
            rest = later;
        }
        target.publish(&entries)?;
    }
    progress(done * size, missing.len() as u64 * size)
}

/// Makes these clusters of the file zero, with their space taken. `inside`: the file has them, with old data.
fn take(target: &Target<'_>, clusters: &Range<ImageCluster>, inside: bool) -> Result<()> {
    let size = target.cluster().bytes();
    let (start, end) = (u64::from(clusters.start) * size, u64::from(clusters.end) * size);
    let made = match inside {
        true => store::zero_range(target.file, start, end - start),
        false => store::fallocate(target.file, start, end - start),
    };
    match made {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)) => {
            zero(target.file, &target.name, start..end)
        }
        other => other.ctx(Kind::Fallocate, || {
            format!("cannot take {} bytes more for image {}", end - start, target.name.display())
        }),
    }
}

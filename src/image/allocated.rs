//! Which clusters an image has, of an image that a worker may be writing: entries are looked at one by one, and nothing
//! is concluded from two of them.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use crate::error::{IoContext, Kind, Result};
use crate::format::bat;
use crate::format::header::{self, Header};
use crate::sys::aligned::read_exact;
use crate::units::VirtCluster;

/// Entries are read in stretches of up to so many.
const STRETCH: u64 = 1 << 16;

/// Those of `clusters` (ascending) that a ploop1 image has an entry for.
pub fn allocated(file: &File, name: &Path, clusters: &[VirtCluster]) -> Result<Vec<VirtCluster>> {
    let shown = || format!("cannot read the BAT of image {}", name.display());
    let mut head = [0; header::SIZE];
    read_exact(file, &mut head, 0).ctx(Kind::Read, shown)?;
    let header = Header::parse(&head).map_err(|e| e.context(format_args!("image {}", name.display())))?;
    let mut found = Vec::new();
    let mut rest = clusters;
    while let Some(&first) = rest.first().filter(|first| **first < header.clusters()) {
        let end = (u64::from(first) + STRETCH).min(u64::from(header.clusters()));
        let (now, later) = rest.split_at(rest.partition_point(|c| u64::from(*c) < end));
        let last = now.last().copied().unwrap_or(first);
        let mut entries = vec![0; (bat::entry_offset(last) - bat::entry_offset(first)) as usize + bat::ENTRY_BYTES];
        read_exact(file, &mut entries, bat::entry_offset(first)).ctx(Kind::Read, shown)?;
        found.extend(now.iter().filter(|c| bat::load(&entries, (**c - first) as usize) != 0));
        rest = later;
    }
    Ok(found)
}

/// The parts of the disk, in bytes, for which a ploop1 image has entries.
pub fn allocated_ranges(file: &File, name: &Path) -> Result<Vec<Range<u64>>> {
    let shown = || format!("cannot read the BAT of image {}", name.display());
    let mut head = [0; header::SIZE];
    read_exact(file, &mut head, 0).ctx(Kind::Read, shown)?;
    let header = Header::parse(&head).map_err(|e| e.context(format_args!("image {}", name.display())))?;
    let (clusters, cluster) = (u64::from(header.clusters()), header.cluster.bytes());
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut entries = Vec::new();
    for first in (0..clusters).step_by(STRETCH as usize) {
        let count = STRETCH.min(clusters - first) as usize;
        entries.resize(count * bat::ENTRY_BYTES, 0);
        read_exact(file, &mut entries, bat::entry_offset(first as VirtCluster)).ctx(Kind::Read, shown)?;
        for at in (0..count).filter(|at| bat::load(&entries, *at) != 0) {
            let start = (first + at as u64) * cluster;
            match found.last_mut() {
                Some(last) if last.end == start => last.end += cluster,
                _ => found.push(start..start + cluster),
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::version::Version;
    use crate::image::create::create_delta;
    use crate::units::ClusterSize;
    use std::os::unix::fs::FileExt;

    #[test]
    fn clusters_with_an_entry_are_found_in_any_stretch() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let cluster = ClusterSize::from_sectors(64).unwrap();
        create_delta(&path, Version::V2, cluster, 200_000 * 64).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        for (cluster, entry) in [(0u32, 9u32), (5, 10), (70_000, 11), (199_999, 12)] {
            file.write_all_at(&entry.to_le_bytes(), bat::entry_offset(cluster)).unwrap();
        }
        let has = |clusters: &[u32]| allocated(&file, &path, clusters).unwrap();
        assert_eq!(has(&[0, 1, 4, 5, 6, 69_999, 70_000, 150_000, 199_999]), [0, 5, 70_000, 199_999]);
        assert_eq!(has(&[5, 199_998, 199_999, 200_000, u32::MAX]), [5, 199_999]);
        assert_eq!(has(&[]), [0; 0]);
        let bytes = |clusters: Range<u64>| clusters.start * cluster.bytes()..clusters.end * cluster.bytes();
        let last = bytes(199_999..200_000);
        assert_eq!(allocated_ranges(&file, &path).unwrap(), [bytes(0..1), bytes(5..6), bytes(70_000..70_001), last]);
        // An entry that no sound image has: a worker may be writing.
        file.write_all_at(&u32::MAX.to_le_bytes(), bat::entry_offset(6)).unwrap();
        assert_eq!(allocated_ranges(&file, &path).unwrap()[1], bytes(5..7));
    }
}

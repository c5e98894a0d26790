//! Where the clusters of an image, a disk or a device are, and what could be given back. Nothing is written and no lock is
//! taken; the images of a running disk are read beside their worker, as for `check -r` and `compact --estimate`, through
//! the descriptors that its processes have of them.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{compact, compact_running};
use crate::bail;
use crate::descriptor::{Descriptor, ImageMode};
use crate::device::{self, Device, State};
use crate::error::{IoContext, Kind, Result};
use crate::image::map::{self, Map, Source};
use crate::image::open::{Access, open_level, reopen};
use crate::report;
use crate::units::ClusterSize;

pub use crate::image::map::{Level, Part, Parts};

/// Attempts to open a chain whose descriptor another operation changes meanwhile.
const ATTEMPTS: usize = 3;

/// What is mapped.
#[derive(Clone, Copy, Debug)]
pub enum Of<'a> {
    Image(&'a Path),
    Disk(&'a Path),
    Device(&'a str),
}

/// What compacting would give back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Compact {
    /// Bytes, about; none: not known.
    pub bytes: Option<u64>,
    /// Why it is not known.
    pub why_not: Option<String>,
}

/// The map of a chain, and whose it is.
#[derive(Clone, Debug)]
pub struct Mapped {
    pub map: Map,
    /// Files of the images, base first.
    pub files: Vec<PathBuf>,
    /// The device that runs the chain.
    pub device: Option<PathBuf>,
    pub compact: Compact,
}

/// The chain that is mapped, with what is needed for the estimate.
struct Chain {
    sources: Vec<Source>,
    cluster: ClusterSize,
    device: Option<Device>,
    preallocated: bool,
}

/// Maps it.
pub fn map(of: Of<'_>, parts: Parts) -> Result<Mapped> {
    let _operation = report::cancel::begin();
    let chain = match of {
        Of::Image(path) => image(path)?,
        Of::Device(node) => device_chain(&named(node)?)?,
        Of::Disk(path) => disk(path)?,
    };
    let map = map::map(&chain.sources, chain.cluster, parts)?;
    let compact = estimate(of, &chain, &map);
    let files = chain.sources.into_iter().map(|s| s.name).collect();
    Ok(Mapped { map, files, device: chain.device.map(|d| d.node().to_owned()), compact })
}

fn image(path: &Path) -> Result<Chain> {
    let source = opened(path, None, false)?;
    Ok(Chain { sources: vec![source], cluster: ClusterSize::DEFAULT, device: None, preallocated: false })
}

fn opened(path: &Path, disk: Option<&Descriptor>, raw: bool) -> Result<Source> {
    let fd = open_level(path, disk.map(|d| &d.dir))?;
    let (file, _) =
        reopen(&fd, Access::default()).ctx(Kind::Open, || format!("cannot open image {}", path.display()))?;
    Ok(Source { file, name: path.to_owned(), raw })
}

/// Also of a device that has lost its server, as long as its images have their names.
fn named(node: &str) -> Result<Device> {
    match device::by_node(node)? {
        Some(device) => Ok(device),
        None => bail!(Device, "{node} is no ploop device; see ploop list"),
    }
}

fn device_chain(device: &Device) -> Result<Chain> {
    let image = |(level, image): (usize, &device::Image)| -> Result<Source> {
        let file = match device::open_image(device, level) {
            Ok(file) => file,
            // No process serves it any more.
            Err(_) if device.state == State::Dead => opened(&image.path, None, image.raw)?.file,
            Err(e) => return Err(e),
        };
        Ok(Source { file, name: image.path.clone(), raw: image.raw })
    };
    let sources = device.images.iter().enumerate().map(image).collect::<Result<Vec<_>>>()?;
    let preallocated = compact_running::is_preallocated(device);
    Ok(Chain { sources, cluster: device.cluster()?, device: Some(device.clone()), preallocated })
}

fn disk(path: &Path) -> Result<Chain> {
    if let Some(device) = compact_running::device_of(path)? {
        return device_chain(&device);
    }
    let mut disk = Descriptor::read(path)?;
    for _ in 1..ATTEMPTS {
        match by_descriptor(&disk) {
            Err(e) => {
                let now = Descriptor::read(path)?;
                if now == disk {
                    return Err(e);
                }
                disk = now;
            }
            chain => return chain,
        }
    }
    by_descriptor(&disk)
}

fn by_descriptor(disk: &Descriptor) -> Result<Chain> {
    let sources: Result<Vec<Source>> =
        disk.chain(&disk.top)?.into_iter().map(|i| opened(&i.file, Some(disk), disk.is_raw(i))).collect();
    let preallocated = disk.mode == ImageMode::Preallocated;
    Ok(Chain { sources: sources?, cluster: disk.blocksize, device: None, preallocated })
}

fn estimate(of: Of<'_>, chain: &Chain, map: &Map) -> Compact {
    let free = map.levels.last().map_or(0, |top| top.free) * map.cluster_bytes;
    let known = |bytes: u64| Compact { bytes: Some(bytes.max(free)), why_not: None };
    let unknown = |why: String| Compact { bytes: None, why_not: Some(why) };
    if chain.sources.last().is_some_and(|top| top.raw) {
        return unknown("the top is a raw image, which is not compacted".into());
    }
    if chain.preallocated {
        return unknown("the disk is preallocated: it keeps the space that its owner has chosen to take".into());
    }
    match (&chain.device, of) {
        (Some(device), _) => match compact_running::estimate(device, None) {
            Ok(estimate) => known(estimate.bytes),
            Err(e) => unknown(e.to_string()),
        },
        (None, Of::Disk(path)) => match compact::known_estimate(path) {
            Ok(Some(estimate)) => known(estimate.bytes),
            Ok(None) => unknown(format!(
                "how much its file system uses is not known; ploop compact --estimate {} finds out, and mounts it for a moment",
                path.display()
            )),
            Err(e) => unknown(e.to_string()),
        },
        _ => unknown("an image alone does not tell what its file system uses; take the disk".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::header::Version;
    use crate::fs::stat::FsInfo;
    use crate::ops::snapshot::{self, SnapshotParams};
    use crate::ops::testkit::{self, g, make_disk, small};
    use crate::sys::folder::Folder;
    use std::fs;

    const PARTS: Parts = Parts { disk: 8, file: 8 };

    #[test]
    fn a_disk_that_does_not_run_is_mapped_and_left_as_it_was() {
        let dir = testkit::folder();
        let root = dir.path().canonicalize().unwrap();
        let dd = make_disk(&root, Version::V2, ImageMode::Expanded, small(), 20);
        snapshot::create(&dd, "", &SnapshotParams { guid: g(1), snap_dir: None, temporary: false }).unwrap();
        let state = || {
            let mut all: Vec<_> = fs::read_dir(&root)
                .unwrap()
                .map(|e| {
                    let path = e.unwrap().path();
                    (path.clone(), fs::metadata(&path).unwrap().modified().unwrap(), fs::read(path).unwrap())
                })
                .collect();
            all.sort();
            all
        };
        let before = state();
        let mapped = map(Of::Disk(&dd), PARTS).unwrap();
        assert_eq!((mapped.files.len(), mapped.map.levels.len(), mapped.device), (2, 2, None));
        assert!(mapped.compact.bytes.is_none() && mapped.compact.why_not.unwrap().contains("compact --estimate"));
        assert!(state() == before);
        // What the last umount has remembered is enough.
        let info = FsInfo { block_size: 4096, blocks: 100, free_blocks: 100, inodes: 1, free_inodes: 1 };
        info.store(&Folder::open(&root).unwrap()).unwrap();
        assert!(map(Of::Disk(&dd), PARTS).unwrap().compact.bytes.is_some());
    }

    #[test]
    fn of_a_preallocated_disk_nothing_is_given_back() {
        let dir = testkit::folder();
        let dd = make_disk(&dir.path().canonicalize().unwrap(), Version::V2, ImageMode::Preallocated, small(), 20);
        let mapped = map(Of::Disk(&dd), PARTS).unwrap();
        assert_eq!((mapped.map.allocated(), mapped.map.levels[0].extents), (20, 1));
        assert!(mapped.compact.why_not.unwrap().contains("preallocated"));
    }
}

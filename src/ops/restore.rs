//! A descriptor made anew for a single image whose own one is lost.

use std::fs;
use std::path::Path;

use crate::bail;
use crate::descriptor::{Descriptor, FILE_NAME, ImageMode};
use crate::error::{IoContext, Kind, Result};
use crate::format::header;
use crate::image::check::read_header;
use crate::image::lock::{self, Sharing};
use crate::image::open::Access;
use crate::report;
use crate::sys::aligned::read_full;
use crate::sys::folder::Folder;
use crate::units::{ClusterSize, SECTOR};

const READ: Access = Access { write: false, direct: false };

/// Clusters that are tried for a raw image, the largest first, in sectors.
const RAW_CLUSTERS: [u64; 6] = [2048, 1024, 512, 256, 128, 64];

/// Stores DiskDescriptor.xml in `folder` for the base image `image`. One that is there stays: `Param`. `raw`: the image is
/// raw; its cluster is the largest of 1 MiB to 32 KiB that divides its size, unless `cluster` names one (`Param` if there
/// is none). A ploop image tells all by its header, and may be marked in use.
pub fn restore_descriptor(folder: &Path, image: &Path, raw: bool, cluster: Option<ClusterSize>) -> Result<()> {
    let _operation = report::cancel::begin();
    let folder = Folder::resolve(folder).ctx(Kind::Open, || format!("cannot open folder {}", folder.display()))?;
    let descriptor = folder.entry(FILE_NAME);
    if descriptor.id().ctx(Kind::Open, || format!("cannot look at {}", descriptor.display()))?.is_some() {
        bail!(
            Param,
            "{} is there already; move it away if it is not the descriptor of this disk",
            descriptor.display()
        );
    }
    let image = fs::canonicalize(image).ctx(Kind::Open, || format!("cannot open image {}", image.display()))?;
    let mut disk = match raw {
        true => raw_disk(&image, cluster)?,
        false => ploop_disk(&image)?,
    };
    // Names are stored as seen from the descriptor's folder.
    disk.dir = folder;
    warn_of_others(&image);
    disk.commit_new(&descriptor)
}

fn ploop_disk(image: &Path) -> Result<Descriptor> {
    let header = read_header(image, None)?;
    Descriptor::new_base(image, header.sectors, header.cluster, ImageMode::Expanded)
}

fn raw_disk(image: &Path, cluster: Option<ClusterSize>) -> Result<Descriptor> {
    let shown = image.display();
    // Shared: other programs may read the image meanwhile.
    let held = lock::lock_image(image, None, READ, Sharing::Readers)?;
    let mut head = [0; header::SIZE];
    let got = read_full(&held.file, &mut head, 0).ctx(Kind::Read, || format!("cannot read image {shown}"))?;
    if got == head.len() && header::has_signature(&head) {
        bail!(Param, "{shown} has the signature of a ploop image: it is not raw (-f ploop1)");
    }
    let len = held.file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {shown}"))?.len();
    let fits = |sectors: &u64| len > 0 && len.is_multiple_of(sectors * SECTOR);
    let cluster = match cluster {
        Some(c) if fits(&u64::from(c.sectors())) => c,
        Some(c) => bail!(
            Param,
            "image {shown} has {len} bytes, no multiple of the cluster of {} sectors that was given",
            c.sectors()
        ),
        None => match RAW_CLUSTERS.into_iter().find(fits) {
            Some(sectors) => ClusterSize::from_sectors(sectors)?,
            None => bail!(Param, "image {shown} has {len} bytes: a raw image is a multiple of 32 KiB, and not empty"),
        },
    };
    Descriptor::new_base(image, len / SECTOR, cluster, ImageMode::Raw)
}

/// Other images beside this one may be deltas that stand on it, or it may be one itself: then more is missing than a
/// descriptor of one image tells.
fn warn_of_others(image: &Path) {
    let Some(entries) = image.parent().and_then(|folder| fs::read_dir(folder).ok()) else { return };
    let others: Vec<String> = entries
        .flatten()
        .map(|e| e.path())
        .filter(|path| path != image && fs::symlink_metadata(path).is_ok_and(|m| m.is_file()))
        .filter(|path| read_header(path, None).is_ok())
        .map(|path| path.display().to_string())
        .collect();
    if !others.is_empty() {
        report::warn(format_args!(
            "beside {} there are other ploop images ({}): if it had snapshots, the new descriptor does not know them: \
             then bring the old one back from a backup, and do not mount the disk for writing",
            image.display(),
            others.join(", ")
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::guid;
    use crate::format::header::Version;
    use crate::ops::testkit::{content, make_disk, put, small};

    #[test]
    fn a_lost_descriptor_is_made_again() {
        for (mode, given) in [(ImageMode::Expanded, None), (ImageMode::Raw, None), (ImageMode::Raw, Some(small()))] {
            let dir = tempfile::tempdir().unwrap();
            let dd = make_disk(dir.path(), Version::V2, mode, small(), 32);
            put(&dd, &guid::TOP, 3, 9);
            let (before, old) = (content(&dd, &guid::TOP), Descriptor::read(&dd).unwrap());
            let raw = mode == ImageMode::Raw;
            let restore = |c| restore_descriptor(dir.path(), &dir.path().join("root.hdd"), raw, c);
            let e = restore(given).unwrap_err();
            assert_eq!(e.kind(), Kind::Param, "{e}");
            fs::remove_file(&dd).unwrap();
            restore(given).unwrap();
            let new = Descriptor::read(&dd).unwrap();
            assert_eq!((new.size_sectors, new.mode, &new.images), (old.size_sectors, mode, &old.images));
            match (raw, given) {
                // 1 MiB is 32 of these clusters.
                (true, None) => assert_eq!(new.blocksize.sectors(), 2048),
                _ => assert_eq!(new.blocksize, old.blocksize),
            }
            if given.is_some() || !raw {
                assert_eq!(content(&dd, &guid::TOP), before);
            }
        }
    }

    #[test]
    fn the_image_may_lie_in_another_folder() {
        for (descriptor, image) in [("a", "b"), ("", "b"), ("a", "")] {
            let dir = tempfile::tempdir().unwrap();
            let (descriptor, image) = (dir.path().join(descriptor), dir.path().join(image));
            fs::create_dir_all(&descriptor).unwrap();
            fs::create_dir_all(&image).unwrap();
            let made = make_disk(&image, Version::V2, ImageMode::Expanded, small(), 32);
            put(&made, &guid::TOP, 3, 9);
            let before = content(&made, &guid::TOP);
            fs::remove_file(made).unwrap();
            restore_descriptor(&descriptor, &image.join("root.hdd"), false, None).unwrap();
            assert_eq!(content(&descriptor.join(FILE_NAME), &guid::TOP), before);
        }
    }

    #[test]
    fn what_is_no_base_image_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        for (content, raw, cluster) in [
            (vec![], true, None),
            (vec![0; 40 << 10], true, None),
            (vec![0; 96 << 10], true, Some(ClusterSize::from_sectors(2048).unwrap())),
            (vec![0; 64 << 10], false, None),
        ] {
            fs::write(&image, &content).unwrap();
            restore_descriptor(dir.path(), &image, raw, cluster).unwrap_err();
            assert!(!dir.path().join(FILE_NAME).exists());
        }
        let dd = make_disk(dir.path(), Version::V1, ImageMode::Expanded, small(), 32);
        fs::remove_file(dd).unwrap();
        let e = restore_descriptor(dir.path(), &dir.path().join("root.hdd"), true, None).unwrap_err();
        assert!(e.to_string().contains("not raw"), "{e}");
    }
}

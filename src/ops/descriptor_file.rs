//! Descriptors alone, without their images.

use std::path::Path;

use super::create::{self, CreateParams};
use crate::bail;
use crate::descriptor::Descriptor;
use crate::error::{IoContext, Kind, Result};
use crate::report;
use crate::sys::folder::{Folder, Place};

/// Stores a descriptor at `path` for the image that `params` describe, which need not exist. The image's path is stored as it
/// is given: a relative one counts from the descriptor's folder. A file at `path` stays: `Param`.
pub fn create_descriptor(path: &Path, params: &CreateParams) -> Result<()> {
    let _operation = report::cancel::begin();
    let place = new_place(path, Kind::Creat)?;
    let sectors = create::size(params)?;
    let mut disk = Descriptor::new_base(&place.folder.join(&params.image), sectors, params.cluster, params.mode)?;
    disk.dir = place.folder.clone();
    for image in &mut disk.images {
        image.file.clone_from(&params.image);
    }
    disk.commit_new(&place)
}

/// Stores a descriptor at `path`, over the file that is there, if one is: through a link, and not over a folder or a device.
/// Images in the folder of `path` are stored by their names. The tree must be whole: `DiskDescr`.
pub fn store_descriptor(path: &Path, mut disk: Descriptor) -> Result<()> {
    let _operation = report::cancel::begin();
    let place = match path.symlink_metadata() {
        Ok(_) => Place::resolve(path).ctx(Kind::DiskDescr, || format!("cannot find {}", path.display()))?,
        Err(_) => new_place(path, Kind::DiskDescr)?,
    };
    let there = place.id().ctx(Kind::DiskDescr, || place.display())?.is_some();
    if there && place.regular().ctx(Kind::DiskDescr, || place.display())?.is_none() {
        bail!(DiskDescr, "{} is not a regular file: no descriptor is stored over it", place.display());
    }
    // Names are stored as seen from the descriptor's folder.
    disk.dir = place.folder.clone();
    disk.check_tree()?;
    disk.commit(&place)
}

/// The place of a file that is not there, in its resolved folder.
fn new_place(path: &Path, kind: Kind) -> Result<Place> {
    let Some(name) = path.file_name() else { bail!(Param, "{} does not name a file", path.display()) };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = Folder::resolve(folder).ctx(kind, || format!("cannot open the folder of {}", path.display()))?;
    Ok(folder.entry(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor::{FILE_NAME, ImageMode};
    use crate::format::guid;
    use crate::format::header::Version;
    use crate::ops::max_delta::set_max_delta_size;
    use crate::ops::testkit::{make_disk, small};
    use crate::units::ClusterSize;
    use std::fs;

    fn params(image: &str) -> CreateParams {
        CreateParams {
            image: image.into(),
            sectors: 65537,
            cluster: ClusterSize::DEFAULT,
            version: Version::V2,
            mode: ImageMode::Expanded,
            fs: None,
            without_partition: false,
        }
    }

    #[test]
    fn a_descriptor_is_made_for_an_image_that_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let dd = dir.path().join("dd.xml");
        create_descriptor(&dd, &params("root.hds")).unwrap();
        let xml = fs::read_to_string(&dd).unwrap();
        assert!(xml.contains("<File>root.hds</File>") && xml.contains("<Disk_size>67584</Disk_size>"), "{xml}");
        assert_eq!(create_descriptor(&dd, &params("other")).unwrap_err().kind(), Kind::Param);
        assert_eq!(fs::read_to_string(&dd).unwrap(), xml);
        fs::remove_file(&dd).unwrap();
        create_descriptor(&dd, &params("/nowhere/root.hds")).unwrap();
        assert!(fs::read_to_string(&dd).unwrap().contains("<File>/nowhere/root.hds</File>"));
        assert!(create_descriptor(&dir.path().join("missing/dd.xml"), &params("i")).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn a_descriptor_is_stored_elsewhere_and_over_another_one() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let dd = make_disk(dir.path(), Version::V2, ImageMode::Expanded, small(), 32);
        let disk = Descriptor::read(&dd).unwrap();
        let (first, link) = (other.path().join(FILE_NAME), other.path().join("link"));
        store_descriptor(&first, disk.clone()).unwrap();
        assert_eq!(Descriptor::read(&first).unwrap().images, disk.images, "the same image, by its whole path");
        // Through a link, which stays one.
        std::os::unix::fs::symlink(&first, &link).unwrap();
        let larger = Descriptor { size_sectors: disk.size_sectors * 2, ..disk.clone() };
        store_descriptor(&link, larger.clone()).unwrap();
        assert!(link.is_symlink());
        assert_eq!(Descriptor::read(&first).unwrap().size_sectors, larger.size_sectors);

        let before = fs::read(&first).unwrap();
        let mut twice = disk.clone();
        twice.images.extend(disk.images.clone());
        for (path, disk) in [(first.clone(), twice), (other.path().into(), disk.clone()), ("/dev/null".into(), disk)] {
            assert_eq!(store_descriptor(&path, disk).unwrap_err().kind(), Kind::DiskDescr, "{}", path.display());
        }
        assert_eq!(fs::read(&first).unwrap(), before);
    }

    #[test]
    fn the_limit_of_the_top_is_kept_in_the_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let dd = make_disk(dir.path(), Version::V2, ImageMode::Expanded, small(), 32);
        let before = fs::read(&dd).unwrap();
        set_max_delta_size(&dd, 4096).unwrap();
        let disk = Descriptor::read(&dd).unwrap();
        assert_eq!((disk.max_delta_size, disk.top), (4096, guid::TOP));
        set_max_delta_size(&dd, 0).unwrap();
        assert_eq!(fs::read(&dd).unwrap(), before);
    }
}

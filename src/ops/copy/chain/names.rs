//! Names of a disk's files at the other end: single components of one folder.
#![forbid(unsafe_code)]

use std::collections::HashSet;

use crate::bail;
use crate::descriptor::{self, Descriptor, Image};
use crate::error::{Error, Kind, Result};

use super::stream::MAX_NAME;

/// What this program keeps beside images, or in place of them for a time.
const TAKEN: [&str; 2] = [".lck", ".tmp"];

/// Whether an image may have this name: the receiver makes a file of it in a folder of its own. `Protocol`.
pub fn check(name: &str) -> Result<()> {
    let bad = |why: &str| Err(Error::new(Kind::Protocol, format!("{name:?} cannot be the name of an image: {why}")));
    if name.is_empty() || name.len() > MAX_NAME as usize {
        return bad("it must have 1 to 255 bytes");
    }
    if name.contains('/') || name.starts_with('.') {
        return bad("it must be one component, and not begin with a dot");
    }
    if name.chars().any(char::is_control) {
        return bad("it has control characters");
    }
    if name == descriptor::FILE_NAME || TAKEN.iter().any(|end| name.ends_with(end)) {
        return bad("such files are the descriptor and what goes with it");
    }
    Ok(())
}

/// The names that the images of a disk get, in their order: their own where these differ, else with their GUID.
pub fn of_images(disk: &Descriptor) -> Result<Vec<String>> {
    let mut taken = HashSet::new();
    let mut names = Vec::new();
    for image in &disk.images {
        let own = own_name(image)?;
        let free = check(&own).is_ok() && !taken.contains(&own);
        let name = if free { own } else { format!("image.{}", image.guid) };
        if !taken.insert(name.clone()) {
            bail!(DiskDescr, "two images of {} would both be named {name}", disk.dir.display());
        }
        names.push(name);
    }
    Ok(names)
}

fn own_name(image: &Image) -> Result<String> {
    match image.file.file_name().and_then(|name| name.to_str()) {
        Some(name) => Ok(name.to_owned()),
        None => bail!(DiskDescr, "image {} has no name that a descriptor can hold", image.file.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor::ImageMode;
    use crate::format::guid::Guid;
    use crate::units::ClusterSize;
    use std::path::Path;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["root.hds", "root.hds.{5fbaabe3-6958-40ff-92a7-860e329aab41}", "é", "a b"] {
            check(name).unwrap();
        }
        let long = "a".repeat(256);
        for name in ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "a\0b", "a\nb", "x.tmp", "x.lck", &long] {
            assert_eq!(check(name).unwrap_err().kind(), Kind::Protocol, "{name:?}");
        }
        check(descriptor::FILE_NAME).unwrap_err();
    }

    #[test]
    fn images_of_other_folders_get_names_beside_the_rest() {
        let cluster = ClusterSize::from_sectors(2048).unwrap();
        let mut disk =
            Descriptor::new_base(Path::new("/vz/1/root.hds"), 1 << 20, cluster, ImageMode::Expanded).unwrap();
        let [a, b] = [Guid::generate(), Guid::generate()];
        for (guid, file) in [(a, "/templates/base"), (b, "/other/root.hds")] {
            disk.images.push(Image { guid, file: file.into() });
        }
        assert_eq!(of_images(&disk).unwrap(), ["root.hds".into(), "base".into(), format!("image.{b}")]);
    }
}

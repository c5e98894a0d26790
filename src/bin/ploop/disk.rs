//! Which disk an operand means, where it is neither a descriptor nor an image.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use ploop::descriptor;

use crate::{Fail, mistake, values};

/// Where OpenVZ keeps the disks of containers.
const CONTAINERS: [&str; 2] = ["/vz/private", "/var/lib/vz/private"];

/// A folder with a descriptor, the empty file that a bundle of Parallels has beside its descriptor, and a container's id
/// stand for the descriptor; any other operand is returned as it is.
pub fn meant(operand: &OsStr) -> Result<OsString, Fail> {
    meant_in(operand, &CONTAINERS)
}

fn meant_in(operand: &OsStr, containers: &[&str]) -> Result<OsString, Fail> {
    let path = Path::new(operand);
    if values::is_descriptor(operand) {
        return Ok(operand.to_owned());
    }
    let inside = path.join(descriptor::FILE_NAME);
    let beside = path.with_file_name(descriptor::FILE_NAME);
    match path.metadata() {
        Ok(m) if m.is_dir() && inside.is_file() => Ok(inside.into()),
        Ok(m) if m.is_file() && m.len() == 0 && beside.is_file() => Ok(beside.into()),
        Err(_) if values::is_container_id(operand) => container(operand, containers).map(PathBuf::into_os_string),
        _ => Ok(operand.to_owned()),
    }
}

/// The disk of a container: the descriptor if there is one, else the image.
fn container(id: &OsStr, containers: &[&str]) -> Result<PathBuf, Fail> {
    let folders = || containers.iter().map(|c| Path::new(c).join(id).join("root.hdd"));
    let names = [descriptor::FILE_NAME, "root.hdd", "root.hds"];
    let found = folders().flat_map(|folder| names.map(|name| folder.join(name))).find(|p| p.exists());
    found.ok_or_else(|| {
        let tried: Vec<String> = folders().map(|f| f.display().to_string()).collect();
        let id = id.to_string_lossy();
        mistake(format!("no disk of container {id}: none of {} has one", tried.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn folders_stubs_and_containers_stand_for_their_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let containers = [root.join("vz"), root.join("lib")];
        let containers = containers.each_ref().map(|c| c.to_str().unwrap());
        let file = |name: &str, content: &str| {
            fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
            fs::write(root.join(name), content).unwrap();
        };
        let meant = |what: &str| {
            let found = meant_in(OsStr::new(what), &containers).map_err(|e| match e {
                Fail::Mistake(text) => text,
                _ => String::new(),
            })?;
            Ok::<_, String>(
                Path::new(&found).strip_prefix(root).unwrap_or(Path::new(&found)).to_str().unwrap().to_owned(),
            )
        };
        let at = |name: &str| meant(root.join(name).to_str().unwrap());
        file("disk.hdd/DiskDescriptor.xml", "x");
        file("disk.hdd/disk.hdd", "");
        file("disk.hdd/disk.hdd.0.hds", "image");
        file("vz/101/root.hdd/root.hds", "image");
        file("vz/102/root.hdd/root.hds", "image");
        file("vz/102/root.hdd/DiskDescriptor.xml", "x");
        file("lib/103/root.hdd/root.hds", "image");
        fs::create_dir(root.join("empty")).unwrap();

        assert_eq!(at("disk.hdd").unwrap(), "disk.hdd/DiskDescriptor.xml");
        assert_eq!(at("disk.hdd/").unwrap(), "disk.hdd/DiskDescriptor.xml");
        assert_eq!(at("disk.hdd/disk.hdd").unwrap(), "disk.hdd/DiskDescriptor.xml");
        assert_eq!(at("disk.hdd/disk.hdd.0.hds").unwrap(), "disk.hdd/disk.hdd.0.hds");
        assert_eq!(at("missing.xml").unwrap(), "missing.xml");
        assert_eq!(at("empty").unwrap(), "empty");
        assert_eq!(meant("101").unwrap(), "vz/101/root.hdd/root.hds");
        assert_eq!(meant("102").unwrap(), "vz/102/root.hdd/DiskDescriptor.xml");
        assert_eq!(meant("103").unwrap(), "lib/103/root.hdd/root.hds");
        assert!(meant("104").unwrap_err().contains("container 104"));
    }
}

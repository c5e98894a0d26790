//! A loop device over a FUSE file: the transport of kernels that offer nothing better.
//!
//! The file is the whole disk. Its file system is mounted over a folder in the device's folder until the loop device is bound
//! to the file; from then on the loop device alone holds it.
#![forbid(unsafe_code)]

pub mod binding;
pub mod connection;
pub mod loop_device;
pub mod protocol;
pub mod queue;

use std::path::{Component, Path, PathBuf};

/// The folder in a device's folder that is mounted over; older versions: a file.
pub const DISK: &str = "disk";

/// The first folder in the file system.
const SHOWN: &str = "ploop:";
/// Most bytes of a path in the file system, folders, and bytes of a name.
const LONGEST: usize = 1024;
const DEEPEST: usize = 100;
const NAME: usize = 200;

/// The path of the file in its file system, `ploop:/vz/web01/root.hds`, by which losetup and /sys tell whose the loop device is;
/// of a long path the end. Names may be cut.
pub fn shown(image: &str) -> PathBuf {
    let mut names: Vec<&str> = Vec::new();
    let mut length = 0;
    for part in Path::new(image).components().rev() {
        let Component::Normal(name) = part else { continue };
        let name = name.to_str().unwrap_or("?");
        let cut = (0..=NAME.min(name.len())).rev().find(|n| name.is_char_boundary(*n)).unwrap_or(0);
        let name = &name[..cut];
        length += name.len() + 1;
        if length > LONGEST || names.len() == DEEPEST {
            break;
        }
        names.push(name);
    }
    if names.is_empty() {
        names.push("disk");
    }
    [SHOWN].into_iter().chain(names.into_iter().rev()).collect()
}

/// Whether the kernel's name of a loop device's file is that of one of ours, whose mount was detached.
pub fn is_shown(file: &str) -> bool {
    file == "/" || file.starts_with("/ploop:/") && !Path::new(file).exists()
}

/// How the names of the block devices begin.
pub const BLOCK_DEVICES: &str = "loop";

/// This kernel, and this /dev, offer it.
pub fn is_offered() -> bool {
    Path::new("/dev/fuse").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loop_devices_file_tells_the_image() {
        assert_eq!(shown("/vz/web01/root.hds"), Path::new("ploop:/vz/web01/root.hds"));
        assert_eq!(shown("/"), Path::new("ploop:/disk"));
        let long = format!("/{}/{}/root.hds", "a/".repeat(3000), "\u{e4}".repeat(200));
        let path = shown(&long);
        assert!(path.starts_with(SHOWN) && path.ends_with(format!("{}/root.hds", "\u{e4}".repeat(100))), "{path:?}");
        assert!(path.as_os_str().len() < LONGEST + 10 && path.components().count() <= DEEPEST + 1, "{path:?}");
        assert!(is_shown("/") && is_shown("/ploop:/vz/web01/root.hds") && !is_shown("/vz/web01/root.hds"));
    }
}

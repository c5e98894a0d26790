//! The command that mounts the disk of a device again as it was mounted, where that is certain.

use std::fs;
use std::path::Path;

use nix::sys::stat::{major, minor};

use super::finding::word;
use crate::descriptor::Descriptor;
use crate::device::Device;
use crate::fs::mounts::Mount;
use crate::ops::find;
use crate::sys::file_id::FileId;

/// Options that a mount without `-o` has, too.
const USUAL: [&str; 4] = ["rw", "ro", "relatime", "seclabel"];

/// The commands that end a device and mount its disk again where it was: the same snapshot, with the same rights. None: a
/// command would leave something out, or may show other content.
pub fn remount(d: &Device) -> Option<String> {
    let path = d.descriptor.as_deref().filter(|_| !d.images.iter().any(|i| i.raw))?;
    let disk = Descriptor::read(path).ok()?;
    let top = d.top_id()?;
    let guid = disk.images.iter().find(|i| FileId::at(&i.file).ok() == Some(top))?.guid;
    let snapshot = match guid == disk.top {
        true => String::new(),
        false => format!("-u {} ", guid.to_string().replace(['{', '}'], "")),
    };
    let at = match &find::mounts_of(d).ok()?[..] {
        [] => String::new(),
        [mount] if is_usual(mount, d) => format!("-m {} ", word(&mount.target)),
        _ => return None,
    };
    let read_only = if d.read_only { "-r " } else { "" };
    let component = match d.component() {
        "" => String::new(),
        name => format!("-c {} ", word(Path::new(name))),
    };
    let node = word(d.node());
    Some(format!("ploop umount -d {node} && ploop mount {read_only}{snapshot}{component}{at}{}", word(path)))
}

/// `ploop mount` without further options makes such a mount.
fn is_usual(mount: &Mount, d: &Device) -> bool {
    let usual = |option: &str| USUAL.contains(&option) || option.starts_with("stripe=");
    // With -p another partition may be mounted.
    let part = format!("/sys/dev/block/{}:{}/partition", major(mount.dev), minor(mount.dev));
    let first = mount.dev == d.rdev || fs::read_to_string(part).is_ok_and(|n| n.trim() == "1");
    mount.root == Path::new("/")
        && mount.read_only == d.read_only
        && first
        && mount.flags.split(',').chain(mount.options.split(',')).all(usual)
}

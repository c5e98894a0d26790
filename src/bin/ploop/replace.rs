//! `ploop replace`: replaces an image by a copy of it.

use std::path::{Path, PathBuf};

use ploop::ops::replace::{self, Which};
use ploop::ops::{device_chain, find};
use ploop::units::Level;

use crate::getopt::Parsed;
use crate::{Command, Fail, mistake, misuse, values};

pub const COMMAND: Command = Command {
    name: "replace",
    short: "d:m:u:l:o:i:k",
    long: &[("keep-name", false, 'k')],
    usage: "\
Usage: ploop replace {-u UUID | -l LEVEL | -o FILE} [-k] -i NEW DiskDescriptor.xml
       ploop replace {-d DEVICE | -m DIR} {-l LEVEL | -o FILE} -i NEW

Replaces an image of a disk by NEW, an identical copy; with -d or -m an image of a running device, and no descriptor is
changed. Of a disk that is in use any image but the top can be replaced.

  -u UUID          the image of this snapshot
  -l LEVEL         the image at this level of the running device; 0 is the base
  -o FILE          this image
  -k, --keep-name  NEW gets the name of the image that it replaces
  -i NEW           the copy

For example:
  ploop replace -l 0 -i /vz2/root.hds /vz/1/DiskDescriptor.xml
",
    run,
};

fn run(parsed: Parsed) -> Result<(), Fail> {
    let mut selectors = Vec::new();
    let mut device = None;
    let mut folder = None;
    let mut new = None;
    let mut keep_name = false;
    for (option, value) in &parsed.options {
        match option {
            'd' => device = Some(values::text(value, "device name")?),
            'm' => folder = Some(PathBuf::from(value)),
            'u' => selectors.push(Which::Guid(values::guid(value)?)),
            'l' => selectors.push(Which::Level(level(value)?)),
            'o' => selectors.push(Which::File(PathBuf::from(value))),
            'i' => new = Some(PathBuf::from(value)),
            'k' => keep_name = true,
            _ => return misuse(),
        }
    }
    let Some(new) = new else { return wrong("the new image is missing (-i)") };
    match &parsed.operands[..] {
        [descriptor] if values::is_descriptor(descriptor) => {
            let [which] = &selectors[..] else { return wrong("name one image, by -u, -l or -o") };
            Ok(replace::replace(Path::new(descriptor), "", which, &new, keep_name)?)
        }
        [] => {
            // A device has no snapshot GUIDs: -u is ignored.
            selectors.retain(|s| !matches!(s, Which::Guid(_)));
            let [which] = &selectors[..] else { return wrong("name one image, by -l or -o") };
            let device = match (device, folder) {
                (Some(device), None) => device,
                (None, Some(folder)) => mounted_on(&folder)?,
                _ => return wrong("name a device (-d), a mount point (-m) or a DiskDescriptor.xml"),
            };
            on_device(&device, which, &new)
        }
        _ => misuse(),
    }
}

fn wrong<T>(what: &str) -> Result<T, Fail> {
    Err(Fail::Usage(Some(format!("ploop replace: {what}"))))
}

fn level(value: &std::ffi::OsStr) -> Result<Level, Fail> {
    let number = values::number(value, "level")?;
    Level::try_from(number).map_err(|_| mistake(format!("level {number}: must be 0 to {}", Level::MAX)))
}

fn mounted_on(folder: &Path) -> Result<String, Fail> {
    match find::by_mount_point(folder)? {
        Some((device, _)) => Ok(device.node().to_string_lossy().into_owned()),
        None => Err(mistake(format!("no ploop device is mounted on {}", folder.display()))),
    }
}

fn on_device(device: &str, which: &Which, new: &Path) -> Result<(), Fail> {
    let level = match which {
        Which::File(current) => device_chain::level_of(device, current)?,
        Which::Level(level) => usize::from(*level),
        Which::Guid(_) => return misuse(),
    };
    Ok(device_chain::replace(device, level, new)?)
}

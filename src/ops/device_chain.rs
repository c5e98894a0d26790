//! Operations on a running device by levels, without its descriptor: level 0 is the base, the highest level the top.

use std::fs;
use std::path::{Path, PathBuf};

use super::online;
use crate::bail;
use crate::descriptor::{self, Descriptor};
use crate::device::{self, Device};
use crate::error::{IoContext, Kind, Result};
use crate::report;
use crate::sys::file_id::FileId;

/// Levels to merge: `low` takes what those above it have, up to `high`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    pub low: usize,
    pub high: usize,
    /// Level of the device's top.
    pub top: usize,
    /// The level that is merged into is a raw base.
    pub raw: bool,
    /// The range ends with the top, and the device writes to it.
    pub writable_top: bool,
    /// Files of the range, the upper first.
    pub files: Vec<PathBuf>,
}

/// A ploop device by its node, whatever its state. `Sysfs` if there is none.
pub fn device(node: &str) -> Result<Device> {
    match device::by_node(node) {
        Ok(Some(device)) => Ok(device),
        Ok(None) => bail!(Sysfs, "{node} is no ploop device; ploop list shows those that are there"),
        Err(e) => Err(e.as_kind(Kind::Sysfs)),
    }
}

/// Puts a new image `file`, which is made, on top of a running device. `sync`: its file systems are brought to rest first.
/// No descriptor is changed.
pub fn put_on_top(node: &str, file: &Path, sync: bool) -> Result<()> {
    let device = device(node)?;
    online::on_device(&device, file, sync)?;
    warn_of_descriptor(&device);
    Ok(())
}

/// Merges levels `low` to `high` (none: the top) of a running device into the lowest of them. The files merged stay; no
/// descriptor is changed. A new file for the result is refused: the lowest image takes the result.
pub fn merge(node: &str, low: usize, high: Option<usize>, new_delta: Option<&Path>) -> Result<()> {
    let range = merge_range(node, low, high)?;
    if let Some(new) = new_delta {
        bail!(
            Param,
            "{}: levels of a running device are merged into the lowest of them; to merge into a new file unmount the disk first",
            new.display()
        );
    }
    let device = device(node)?;
    online::merge_levels(&device, range.low, range.high)?;
    warn_of_descriptor(&device);
    Ok(())
}

/// Replaces the image of a level below the top of a running device by its copy `new`; no descriptor is changed. `Open`:
/// there is no such file; `Device`: no such device.
pub fn replace(node: &str, level: usize, new: &Path) -> Result<()> {
    fs::metadata(new).ctx(Kind::Open, || format!("cannot open image {}", new.display()))?;
    let device = device(node).map_err(|e| e.as_kind(Kind::Device))?;
    online::replace_level(&device, level, new)?;
    warn_of_descriptor(&device);
    Ok(())
}

/// Warns if a descriptor names the disk that was just changed by device: the descriptor has another chain from now on.
fn warn_of_descriptor(device: &Device) {
    let beside = device.base().with_file_name(descriptor::FILE_NAME);
    for path in device.descriptor.iter().chain([&beside]) {
        let top = device.images.last().map(|i| &i.path);
        if Descriptor::read(path).is_ok_and(|d| d.image(&d.top).map(|i| &i.file) == top) {
            report::warn(format_args!(
                "{} does not name the chain that {} runs now; changes by descriptor, like ploop snapshot {0}, \
                 change both",
                path.display(),
                device.node().display()
            ));
            return;
        }
    }
}

/// The level of a device whose image is this very file, whatever its name. `Sysfs`: no such device; `Fstat`: no such
/// file; `Param`: the file is no level of the device.
pub fn level_of(node: &str, image: &Path) -> Result<usize> {
    let device = device(node)?;
    let id = FileId::at(image).ctx(Kind::Fstat, || format!("cannot look at image {}", image.display()))?;
    match device.level_of(id) {
        Some(level) => Ok(level),
        None => bail!(Param, "{} is no image of {}", image.display(), device.node().display()),
    }
}

/// What merging levels `low` to `high` (none: the top) of a device means. `Param`: nothing to merge, the device has one
/// image; `Sysfs`: no such device or level.
pub fn merge_range(node: &str, low: usize, high: Option<usize>) -> Result<Range> {
    let device = device(node)?;
    let levels = &device.images;
    let top = levels.len().saturating_sub(1);
    if top == 0 {
        bail!(Param, "{} has a single image: there is nothing to merge", device.node().display());
    }
    let high = high.unwrap_or(top);
    if low >= high || high > top {
        bail!(
            Sysfs,
            "levels {low}..{high} of {}: the lower must come first and the upper be at most {top}",
            device.node().display()
        );
    }
    Ok(Range {
        low,
        high,
        top,
        raw: levels[low].raw,
        writable_top: high == top && !device.read_only && device.state.runs(),
        files: levels[low..=high].iter().rev().map(|l| l.path.clone()).collect(),
    })
}

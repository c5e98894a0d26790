//! What is done to a disk while it runs. Its server changes the chain ([`device::switch`]); here the steps before and after
//! that are put in order.

pub(super) mod freeze;
mod grow;
mod merge;
mod replace;
mod snapshot;

use crate::bail;
use crate::descriptor::{Descriptor, LockedDescriptor};
use crate::device::{self, CommitFile, Device, NewLevel, State, SwitchSpec};
use crate::error::{Error, IoContext, Kind, Result};
use crate::image::open::open_level;
use crate::report;
use crate::sys::file_id::FileId;
use crate::sys::folder::Place;
use crate::sys::store;

pub use freeze::mounts_that;
pub use grow::{RAW_SECTORS, grow, grow_device};
pub use merge::{merge, merge_levels};
pub use replace::{REPLACING, replace, replace_level};
pub use snapshot::{on_device, snapshot};

/// The device must run the chain that the descriptor has for its top. `Param` if another operation, perhaps of another
/// program, has changed only one of the two.
pub fn check_chain(disk: &Descriptor, device: &Device) -> Result<()> {
    check_state(device)?;
    let chain = disk.chain(&disk.top)?;
    let mut ids = Vec::with_capacity(chain.len());
    for image in &chain {
        ids.push(FileId::at_nofollow(&image.file).ctx(Kind::Open, || format!("image {}", image.file.display()))?);
    }
    if ids != device.ids() {
        bail!(
            Param,
            "{} runs a chain of {} images, the descriptor has another one of {}: unmount it and mount it again",
            device.node().display(),
            device.images.len(),
            ids.len()
        );
    }
    Ok(())
}

/// The chain of a device can be changed now.
fn check_state(device: &Device) -> Result<()> {
    let node = device.node().display();
    match &device.state {
        State::Running => Ok(()),
        State::NoSpace => {
            bail!(Write, "{node}: writes wait for space on the file system of its image; make room first")
        }
        state => bail!(Device, "{node} does not run as it should (state: {}); see ploop doctor", state.as_str()),
    }
}

/// The levels of `next`'s chain, taken from the running chain where they are in it.
fn levels_of(next: &Descriptor, device: &Device) -> Result<Vec<NewLevel>> {
    let mut levels = Vec::new();
    for image in next.chain(&next.top)? {
        let id = FileId::at_nofollow(&image.file).ctx(Kind::Open, || format!("image {}", image.file.display()))?;
        levels.push(match device.level_of(id) {
            Some(level) => NewLevel::Kept(level),
            None => NewLevel::File {
                path: image.file.clone(),
                raw: next.is_raw(image),
                fd: open_level(&image.file, Some(&next.dir))?,
            },
        });
    }
    Ok(levels)
}

/// Result of a change that renames a descriptor.
enum Ended {
    /// Device and descriptor are changed; an error is one of a later step.
    Changed(Result<()>),
    /// Nothing is changed.
    Not(Error),
    /// The descriptor may be changed or not.
    Unknown(Error),
}

/// A stored descriptor that has its name only when the change is made.
type Prepared = (Place, FileId);

/// The chain of `next` for the server, and the temporary name under which `next` is stored.
fn prepare(disk: &LockedDescriptor, device: &Device, next: &mut Descriptor) -> Result<(SwitchSpec, Prepared)> {
    next.normalise_top()?;
    let levels = levels_of(next, device)?;
    let (tmp, file) = next.prepare(&disk.place)?;
    let commit = CommitFile::open(&tmp, &disk.place)?.of(file)?.under(disk.share_lock()?);
    Ok((SwitchSpec { levels, commit: Some(commit), linger: 0 }, (tmp, file)))
}

/// The result of a change that the server was asked for. The descriptor on disk decides whether it was made.
fn outcome(
    disk: &mut LockedDescriptor,
    spec: SwitchSpec,
    (tmp, file): &Prepared,
    next: Descriptor,
    result: Result<()>,
) -> Ended {
    let committed = spec.commit.as_ref().map_or(Ok(false), CommitFile::is_committed);
    match (committed, result) {
        (Ok(true), result) => {
            disk.descriptor = next;
            Ended::Changed(result)
        }
        (Ok(false), Err(e)) => {
            let _ = store::unlink_file(tmp, *file);
            Ended::Not(e)
        }
        (Ok(false), Ok(())) => Ended::Unknown(Error::new(
            Kind::Device,
            format!("{}: another program has replaced the descriptor meanwhile", disk.path.display()),
        )),
        (Err(unknown), Ok(())) => Ended::Unknown(unknown),
        (Err(unknown), Err(e)) => Ended::Unknown(e.context(unknown)),
    }
}

/// Makes the device serve the chain of `next`, which becomes the disk's descriptor in the same moment. `serving` is called
/// when I/O goes on, `prepared` before requests begin to wait; an error of `prepared` ends the change.
fn change(
    disk: &mut LockedDescriptor,
    device: &Device,
    mut next: Descriptor,
    prepared: &mut dyn FnMut() -> Result<()>,
    serving: &mut dyn FnMut(),
) -> Ended {
    let (spec, tmp) = match prepare(disk, device, &mut next) {
        Ok(prepared) => prepared,
        Err(e) => return Ended::Not(e),
    };
    let mut warning = None;
    let switched = device::switch_prepared(device, &spec, prepared, &mut |warned| {
        warning = warned.map(str::to_owned);
        serving();
    });
    if let Some(warning) = warning {
        report::warn(warning);
    }
    outcome(disk, spec, &tmp, next, switched)
}

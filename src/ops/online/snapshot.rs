//! Snapshots of running devices.

use std::cell::{Cell, RefCell};
use std::path::Path;

use nix::fcntl::OFlag;

use super::{Ended, change, check_chain, check_state, freeze};
use crate::bail;
use crate::descriptor::{Descriptor, LockedDescriptor};
use crate::device::{self, Device, Freeze, NewLevel, SwitchSpec};
use crate::error::{IoContext, Kind, Result};
use crate::format::header::Version;
use crate::image::create::create_delta;
use crate::report;
use crate::sys::file_id::FileId;
use crate::sys::folder::Place;
use crate::sys::store;

/// Takes a snapshot of a running disk: `next` is its descriptor afterwards, whose top is the new delta at `place`, complete,
/// empty and durable. The file systems mounted from the device are frozen meanwhile. When this returns, the former top is
/// closed and does not change any more.
///
/// After an error nothing is changed and the new delta is removed, unless the error says that the delta may be part of
/// the disk.
pub fn snapshot(
    disk: &mut LockedDescriptor,
    device: &Device,
    next: Descriptor,
    place: &Place,
    file: FileId,
) -> Result<()> {
    check_chain(disk, device).inspect_err(|_| undo(place, file))?;
    let rest = Rest::prepare(device, true).inspect_err(|_| undo(place, file))?;
    let mut thawed = Ok(());
    let ended = change(disk, device, next, &mut || rest.freeze(), &mut || thawed = rest.thaw());
    drop(rest);
    match ended {
        Ended::Changed(Ok(())) => {
            warn_of_early_thaw(thawed);
            Ok(())
        }
        Ended::Changed(Err(e)) => Err(e.context("the snapshot is taken, but its image could not be closed")),
        Ended::Not(e) => {
            undo(place, file);
            Err(e)
        }
        Ended::Unknown(e) => Err(e.context(format_args!("{} may be part of the disk or not", place.display()))),
    }
}

/// Makes the image `file` and puts it on top of a running device; no descriptor is changed. `sync`: the file systems
/// mounted from the device are frozen meanwhile. After an error the file is removed.
pub fn on_device(device: &Device, file: &Path, sync: bool) -> Result<()> {
    check_state(device)?;
    if device.read_only {
        bail!(Param, "{} is read-only: it gets no new top", device.node().display());
    }
    let version = device.version.unwrap_or(Version::V2);
    let place = Place::named(file).ctx(Kind::Creat, || format!("cannot open the folder of {}", file.display()))?;
    let made = create_delta(&place, version, device.cluster()?, device.sectors)?;
    put_on(device, &place, made.id, sync).inspect_err(|e| {
        // The server may have made the change although the connection to it was lost.
        let runs = device::by_node(device.name()).ok().flatten().is_some_and(|d| d.top_id() == Some(made.id));
        match runs || e.kind() == Kind::Protocol {
            true => report::warn(format_args!("{} stays: it may be in use", file.display())),
            false => undo(&place, made.id),
        }
    })
}

fn put_on(device: &Device, place: &Place, file: FileId, sync: bool) -> Result<()> {
    let mut levels: Vec<NewLevel> = (0..device.images.len()).map(NewLevel::Kept).collect();
    let shown = place.display();
    let fd = place.open(OFlag::O_PATH).ctx(Kind::Open, || format!("cannot open {shown}"))?;
    if FileId::of(&fd).ctx(Kind::Fstat, || format!("cannot look at {shown}"))? != file {
        bail!(Open, "{shown} is not the image that was made; has another process replaced it?");
    }
    let path = std::path::absolute(place.path()).unwrap_or_else(|_| place.path());
    levels.push(NewLevel::File { path, raw: false, fd });
    let rest = Rest::prepare(device, sync)?;
    let mut thawed = Ok(());
    let spec = SwitchSpec { levels, commit: None, linger: 0 };
    device::switch_prepared(device, &spec, &mut || rest.freeze(), &mut |_| thawed = rest.thaw())?;
    warn_of_early_thaw(thawed);
    Ok(())
}

fn warn_of_early_thaw(thawed: Result<()>) {
    if let Err(e) = thawed {
        report::warn(format_args!("the snapshot is taken, but perhaps not of a file system at rest: {e}"));
    }
}

/// The file systems of a device, perhaps at rest.
struct Rest {
    freeze: RefCell<Option<Box<dyn Freeze>>>,
    frozen: Cell<bool>,
}

impl Rest {
    /// `sync`: there is something to be frozen.
    fn prepare(device: &Device, sync: bool) -> Result<Rest> {
        let freeze = if sync { Some(freeze::prepare(device)?) } else { None };
        Ok(Rest { freeze: RefCell::new(freeze), frozen: Cell::new(false) })
    }

    /// Freezes once: a second supervisor asks for it a second time.
    fn freeze(&self) -> Result<()> {
        if let (false, Some(freeze)) = (self.frozen.replace(true), self.freeze.borrow_mut().as_mut()) {
            freeze.freeze().inspect_err(|_| self.frozen.set(false))?;
        }
        Ok(())
    }

    fn thaw(&self) -> Result<()> {
        self.freeze.borrow_mut().as_mut().map_or(Ok(()), |frozen| frozen.thaw())
    }
}

/// Removes the new delta, which was never part of the disk.
fn undo(place: &Place, file: FileId) {
    if let Err(e) = store::unlink_file(place, file) {
        report::warn(format_args!("{} is not needed, but cannot be removed: {e}", place.display()));
    }
}

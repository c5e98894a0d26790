//! The drivers of this version, and the choice of the driver for a device.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::bail;
use crate::device::driver::{BalloonDiscard, Driver, Freeze, Rates, Tracker, Unmerged, Watch};
use crate::device::model::{Aliases, Detail, Device, Leak, Partition, ServerProcess, Whereabouts};
use crate::device::served::Served;
use crate::device::spec::{AttachSpec, CommitFile, Level, SwitchSpec};
use crate::engine::api::GivenBack;
use crate::error::{IoContext, Kind, Result};
use crate::format::maintenance::Maintenance;
use crate::sys::file_id::FileId;

/// The environment variable that names the driver for new devices.
const VARIABLE: &str = "PLOOP_DRIVER";

/// In the order in which they are preferred.
const DRIVERS: [&dyn Driver; 1] = [&Served];

/// The driver that new devices get: the one that `$PLOOP_DRIVER` names, else the preferred one.
pub fn driver() -> Result<&'static dyn Driver> {
    named(std::env::var(VARIABLE).ok().as_deref())
}

fn named(wanted: Option<&str>) -> Result<&'static dyn Driver> {
    let [preferred, ..] = DRIVERS;
    let Some(wanted) = wanted.filter(|w| !w.is_empty()) else { return Ok(preferred) };
    match DRIVERS.into_iter().find(|d| d.name() == wanted) {
        Some(driver) => Ok(driver),
        None => {
            let known: Vec<&str> = DRIVERS.iter().map(|d| d.name()).collect();
            bail!(Device, "${VARIABLE} asks for driver {wanted:?}; this version has only {}", known.join(", "))
        }
    }
}

/// The driver that serves a device, whatever `$PLOOP_DRIVER` names.
fn of(device: &Device) -> &'static dyn Driver {
    match device.detail {
        Detail::Served(_) => &Served,
    }
}

/// The driver that has a device of this name. If none has: the preferred one, whose error then says so.
fn of_name(name: &str) -> Result<&'static dyn Driver> {
    let [preferred, ..] = DRIVERS;
    for driver in DRIVERS {
        if driver.has(name)? {
            return Ok(driver);
        }
    }
    Ok(preferred)
}

/// Makes a block device of an image chain. It outlives this process; [`detach`] ends it. After an error nothing is left
/// behind. Needs root.
pub fn attach(spec: AttachSpec) -> Result<Device> {
    driver()?.attach(spec)
}

/// All devices, by number, also those in state dead.
pub fn list() -> Result<Vec<Device>> {
    list_of(|_| true)
}

/// Those devices that `wanted` selects, by number. `wanted` gets the recorded state. Only for the selected devices the
/// driver finds out the real state, since that is slow.
pub fn list_of(wanted: impl Fn(&Device) -> bool) -> Result<Vec<Device>> {
    let mut found = Vec::new();
    for driver in DRIVERS {
        found.extend(driver.list(&wanted)?);
    }
    Ok(found)
}

/// The device with this node (`/dev/ploop0`, `ploop0`, or a partition of it); `None`: no ploop device.
///
/// A node that exists must be of the very disk that the device has, else it is refused: error 2.
pub fn by_node(node: &str) -> Result<Option<Device>> {
    for driver in DRIVERS {
        if let Some(device) = driver.find(node)? {
            return Ok(Some(device));
        }
    }
    Ok(None)
}

/// Devices whose base is this very file (device and inode number, not the name); with a component: only those that were
/// attached with it (empty: without any).
pub fn by_base(base: &Path, component: Option<&str>) -> Result<Vec<Device>> {
    let id = match FileId::at(base) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.ctx(Kind::Fstat, || format!("cannot look at {}", base.display()))?,
    };
    list_of(|d| d.base_id() == Some(id) && component.is_none_or(|c| c == d.component))
}

/// Starts a process of its own that has the temporary snapshots of a running disk merged. It outlives this process, and
/// this process waits for none of it.
pub fn start_merges(descriptor: &Path) -> Result<()> {
    driver()?.start_merges(descriptor)
}

/// Detaches the device and closes its image cleanly. Busy: error 3, nothing changed. An error of the last flush is
/// reported; the device is gone then, and the image stays marked in use.
pub fn detach(name: &str) -> Result<()> {
    of_name(name)?.detach(name)
}

/// Detaches the device and closes its images cleanly, but keeps what it takes to [`start`] it again. Busy: error 3, nothing
/// changed.
pub fn stop(device: &Device) -> Result<()> {
    of(device).stop(device)
}

/// Devices that are stopped, by number. No process serves them, and they have no node.
pub fn stopped() -> Result<Vec<Device>> {
    let mut found = Vec::new();
    for driver in DRIVERS {
        found.extend(driver.stopped()?);
    }
    Ok(found)
}

/// The device of this name or node, if it is stopped.
pub fn find_stopped(node: &str) -> Result<Option<Device>> {
    for driver in DRIVERS {
        if let Some(device) = driver.find_stopped(node)? {
            return Ok(Some(device));
        }
    }
    Ok(None)
}

/// An error, which names the file, if a file of a stopped device is another one by now, or was changed since.
pub fn changed(stopped: &Device) -> Result<()> {
    of(stopped).changed(stopped)
}

/// Attaches a stopped device again. `levels`: its files, base first, which must be unchanged.
pub fn start(stopped: &Device, levels: Vec<Level>) -> Result<Device> {
    of(stopped).start(stopped, levels)
}

/// Forgets a stopped device.
pub fn forget(stopped: &Device) -> Result<()> {
    of(stopped).forget(stopped)
}

/// Drops a level of a stopped device; how many are left. With the last one the device is forgotten.
pub fn drop_level(stopped: &Device, level: usize) -> Result<usize> {
    of(stopped).drop_level(stopped, level)
}

/// Counters of a running device, by name.
pub fn counters(device: &Device) -> Result<Vec<(String, u64)>> {
    of(device).counters(device)
}

/// Sets counters of a running device; names that are not there are passed over.
pub fn set_counters(device: &Device, values: &[(String, u64)]) -> Result<()> {
    of(device).set_counters(device, values)
}

/// The minor that the next device would get, kept from other devices as long as the descriptor is open.
pub fn reserve_minor() -> Result<(u32, OwnedFd)> {
    driver()?.reserve_minor()
}

/// Whether writes that find no space in the host's file system wait for it (the rule) or fail.
pub fn hold_for_space(name: &str, hold: bool) -> Result<()> {
    of_name(name)?.hold_for_space(name, hold)
}

/// Gives up a device that no worker can serve any more: its I/O fails from now on.
pub fn abort(name: &str) -> Result<()> {
    of_name(name)?.abort(name)
}

/// Removes what a crashed host or a killed server left of a device. Refused unless the loop device provably belongs to
/// it, its processes have exited and no mount uses it.
pub fn clean(name: &str) -> Result<()> {
    of_name(name)?.clean(name)
}

/// The first of these files for which changes wait that were answered and not flushed when its server was killed, and
/// where they wait.
pub fn unflushed(files: &[FileId]) -> Result<Option<(FileId, PathBuf)>> {
    for driver in DRIVERS {
        if let Some(found) = driver.unflushed(files)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// All folders in which changes wait that were answered and not flushed when their server was killed, each with the images
/// of its chain, base first. The device is gone; the next mount for writing takes them over.
pub fn all_unflushed() -> Vec<(PathBuf, Vec<PathBuf>)> {
    DRIVERS.into_iter().flat_map(|d| d.all_unflushed()).collect()
}

/// Replaces the processes that serve a device by those of the program that is installed now. I/O waits meanwhile. A
/// device that no worker could serve gets a new worker.
pub fn reload(name: &str) -> Result<()> {
    of_name(name)?.reload(name)
}

/// The numbers and nodes by which the mount table names a device and its partitions; none if the device has another
/// disk by now.
pub fn aliases(device: &Device) -> Aliases {
    of(device).aliases(device)
}

/// What to mount: the first partition if the disk has any, else `/dev/NAME`. The node is made if this process's /dev lacks it.
pub fn mount_source(device: &Device) -> Result<PathBuf> {
    of(device).mount_source(device)
}

/// The node of the partition of that number, made if this process's /dev lacks it; none: no such partition.
pub fn partition_node(device: &Device, number: u32) -> Result<Option<PathBuf>> {
    of(device).partition_node(device, number)
}

/// Partitions of the disk as the kernel has them now, by number.
pub fn partitions(device: &Device) -> Result<Vec<Partition>> {
    of(device).partitions(device)
}

/// A supervisor runs that starts a new worker when the device's worker exits.
pub fn is_supervised(device: &Device) -> bool {
    of(device).is_supervised(device)
}

/// What is left of devices that have no record any more. A device that is being made or ended at this moment can be among it.
pub fn leaks() -> Vec<Leak> {
    DRIVERS.into_iter().flat_map(|d| d.leaks()).collect()
}

/// The processes that serve a device.
pub fn processes(device: &Device) -> Vec<ServerProcess> {
    of(device).processes(device)
}

/// The name that the file which the device serves as base has now, perhaps not the one under which it was attached. None
/// if it has none, or if that cannot be found out.
pub fn base_name(device: &Device) -> Option<PathBuf> {
    of(device).base_name(device)
}

/// Where each image of the chain is now, base first: other programs may have renamed or deleted it.
pub fn whereabouts(device: &Device) -> Vec<Whereabouts> {
    of(device).whereabouts(device)
}

/// Opens an image of the running chain for reading, whatever became of its name.
pub fn open_image(device: &Device, level: usize) -> Result<File> {
    of(device).open_image(device, level)
}

/// Makes a running device serve another chain, whose content must be the same. Requests wait meanwhile; all writes that
/// were answered are durable in the old chain first. `serving` is called when I/O goes on, with a warning if the change
/// may not survive a power cut; this returns when the former top, if it became a lower level, is complete and unmarked
/// and does not change any more.
///
/// `serving` not called: the device serves the chain it had. After an error of kind [`Kind::Protocol`] it is not known
/// which chain the device serves.
pub fn switch(device: &Device, spec: &SwitchSpec, serving: &mut dyn FnMut(Option<&str>)) -> Result<()> {
    of(device).switch(device, spec, None, serving)
}

/// As [`switch`]; `prepared` is called when only those steps are left for which requests wait. Its error ends the
/// change before anything has changed.
pub fn switch_prepared(
    device: &Device,
    spec: &SwitchSpec,
    prepared: &mut dyn FnMut() -> Result<()>,
    serving: &mut dyn FnMut(Option<&str>),
) -> Result<()> {
    of(device).switch(device, spec, Some(prepared), serving)
}

/// Merges the top of a running device into the level below it; then the device serves the chain without the top, and
/// `commit` is made. I/O goes on. The merge goes on also if the calling process exits; until its end the chain reads as
/// before. Returns a warning if the change may not survive a power cut.
///
/// After an error the device serves the chain it had.
pub fn merge_top(
    device: &Device,
    commit: Option<&CommitFile>,
    watch: &mut dyn Watch,
) -> Result<Option<String>, Unmerged> {
    of(device).merge_top(device, commit, watch)
}

/// Merges levels `low` to `high` of a running device, none of which is a writable top, into the lowest of them; then the
/// device serves the chain `then`. I/O goes on. Returns a warning as [`merge_top`] does. An interrupted merge leaves
/// the chain as it was; the same call finishes it.
pub fn merge_levels(
    device: &Device,
    levels: (usize, usize),
    then: &SwitchSpec,
    watch: &mut dyn Watch,
) -> Result<Option<String>, Unmerged> {
    of(device).merge_frozen(device, levels, then, watch)
}

/// Gives a running device another size, in sectors, not smaller than it is. Durable in this order: the top's header, `commit`
/// (the descriptor with that size), the block device's capacity. Goes on if the calling process exits; after an error, or if
/// the device's processes are killed, the same call finishes it. Returns a warning if `commit` may not survive a power cut.
/// `grown` gets the size that it has so far, where progress is shown.
pub fn set_size(
    device: &Device,
    sectors: u64,
    commit: Option<&CommitFile>,
    grown: &mut dyn FnMut(u64),
) -> Result<Option<String>> {
    of(device).set_size(device, sectors, commit, grown)
}

/// Moves clusters of a running device's top to the front of its file and cuts the file behind the last one in use. I/O goes
/// on, and moves wait for it. The device serves the same content at any time, whichever process is killed; if the calling process
/// exits it goes on. An error of kind [`Kind::Abort`]: `watch` has cancelled it; what was moved stays moved.
pub fn give_back(device: &Device, rates: Rates, watch: &mut dyn Watch) -> Result<GivenBack> {
    of(device).give_back(device, rates, watch)
}

/// Begins to track what is written to the images of a running device.
pub fn track(device: &Device) -> Result<Box<dyn Tracker>> {
    of(device).track(device)
}

/// The file of a device's top may have so many sectors, 0: any number. A write that needs more fails.
pub fn limit_top(device: &Device, sectors: u64) -> Result<()> {
    of(device).limit_top(device, sectors)
}

/// Sets the maintenance state of a device. `Busy`: the present one is none of those in `from`.
pub fn set_maintenance(device: &Device, from: &[Maintenance], to: Maintenance) -> Result<()> {
    of(device).set_maintenance(device, from, to)
}

/// Gets ready to discard what a balloon file of a file system on the device lies on. No byte that another file has, or
/// gets meanwhile, is discarded, also if root inside removes the balloon, or this process is killed.
pub fn discard_balloon(device: &Device, balloon: File) -> Result<Box<dyn BalloonDiscard>> {
    of(device).discard_balloon(device, balloon)
}

/// Gets ready to freeze file systems of a device until the result is dropped. `files`: one open file of each file system.
pub fn freeze(device: &Device, files: Vec<File>) -> Result<Box<dyn Freeze>> {
    of(device).freeze(device, files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::driver::Capabilities;
    use crate::device::served;
    use crate::device::state::State;
    use crate::server::proto::{DeviceRecord, own_greeting};

    /// Offers nothing.
    struct Bare;

    impl Driver for Bare {
        fn name(&self) -> &'static str {
            "bare"
        }
        fn summary(&self) -> &'static str {
            "nothing"
        }
        fn probe(&self) -> Result<Capabilities> {
            Ok(Capabilities::default())
        }
        fn attach(&self, _: AttachSpec) -> Result<Device> {
            Err(self.unsupported("attaching"))
        }
        fn has(&self, _: &str) -> Result<bool> {
            Ok(false)
        }
        fn list(&self, _: &dyn Fn(&Device) -> bool) -> Result<Vec<Device>> {
            Ok(Vec::new())
        }
        fn find(&self, _: &str) -> Result<Option<Device>> {
            Ok(None)
        }
        fn detach(&self, _: &str) -> Result<()> {
            Err(self.unsupported("detaching"))
        }
        fn aliases(&self, _: &Device) -> Aliases {
            Aliases::default()
        }
        fn mount_source(&self, _: &Device) -> Result<PathBuf> {
            Err(self.unsupported("mounting"))
        }
    }

    struct NoWatch;

    impl Watch for NoWatch {
        fn progress(&mut self, _: u64, _: u64) {}
        fn cancelled(&mut self) -> bool {
            false
        }
    }

    #[test]
    fn drivers_are_chosen_by_name() {
        assert_eq!(named(None).unwrap().name(), "fuse_loop");
        assert_eq!(named(Some("")).unwrap().name(), "fuse_loop");
        assert_eq!(named(Some("fuse_loop")).unwrap().name(), "fuse_loop");
        let e = named(Some("dm")).err().unwrap();
        assert_eq!(e.kind(), Kind::Device);
        assert_eq!(e.to_string(), "$PLOOP_DRIVER asks for driver \"dm\"; this version has only fuse_loop");
    }

    #[test]
    fn what_a_driver_lacks_is_refused_by_name() {
        let device = served::device_of(DeviceRecord::default(), State::Running);
        let spec = SwitchSpec { levels: Vec::new(), commit: None, linger: 0 };
        let d: &dyn Driver = &Bare;
        let refused = [
            d.switch(&device, &spec, None, &mut |_| {}),
            d.merge_top(&device, None, &mut NoWatch).map(drop).map_err(Into::into),
            d.merge_frozen(&device, (0, 1), &spec, &mut NoWatch).map(drop).map_err(Into::into),
            d.set_size(&device, 1, None, &mut |_| {}).map(drop),
            d.give_back(&device, Rates::default(), &mut NoWatch).map(drop),
            d.track(&device).map(drop),
            d.freeze(&device, Vec::new()).map(drop),
            d.partitions(&device).map(drop),
            d.partition_node(&device, 1).map(drop),
            d.reload("x"),
            d.abort("x"),
            d.clean("x"),
            d.hold_for_space("x", true),
        ];
        for result in refused {
            let e = result.unwrap_err();
            assert_eq!(e.kind(), Kind::Param);
            assert!(e.to_string().ends_with("is not supported by driver bare"), "{e}");
        }
    }

    #[test]
    fn the_served_driver_refuses_what_its_capabilities_lack() {
        // Of a server that understands all commands.
        let record = DeviceRecord { greeting: own_greeting(), ..DeviceRecord::default() };
        let device = served::device_of(record, State::Running);
        let offered = served::CAPABILITIES;
        let refused = [
            (offered.give_back, give_back(&device, Rates::default(), &mut NoWatch).map(drop)),
            (offered.track, track(&device).map(drop)),
            (offered.partitions, partitions(&device).map(drop)),
        ];
        for (offered, result) in refused {
            let refused = matches!(&result, Err(e) if e.kind() == Kind::Param);
            assert_eq!(refused, !offered, "{result:?}");
        }
    }
}

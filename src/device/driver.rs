//! What a driver is: the trait that all operations on devices go through.

use std::fmt::Debug;
use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::device::model::{Aliases, Device, Leak, Partition, ServerProcess, Whereabouts};
use crate::device::spec::{AttachSpec, CommitFile, Level, SwitchSpec};
use crate::engine::api::GivenBack;
use crate::error::{Error, Kind, Result};
use crate::format::balloon_piece::Piece;
use crate::format::maintenance::Maintenance;
use crate::sys::file_id::FileId;

/// What a driver can do beyond attaching, finding and detaching. An operation that is not offered here fails with
/// [`Kind::Param`] before anything has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Capabilities {
    /// [`Driver::switch`]
    pub switch: bool,
    /// [`Driver::merge_top`]
    pub merge_top: bool,
    /// [`Driver::merge_frozen`]
    pub merge_frozen: bool,
    /// [`Driver::set_size`]
    pub set_size: bool,
    /// [`Driver::give_back`]
    pub give_back: bool,
    /// [`Driver::track`]
    pub track: bool,
    /// [`Driver::freeze`]
    pub freeze: bool,
    /// [`Driver::partitions`]
    pub partitions: bool,
    /// [`Driver::reload`]
    pub reload: bool,
}

/// The caller's view of long work on a device.
pub trait Watch {
    /// So many of all clusters have been looked at.
    fn progress(&mut self, seen: u64, all: u64);
    /// Called now and then. True: the driver gives the work up.
    fn cancelled(&mut self) -> bool;
}

/// How fast clusters are moved: bytes in a second, none: without limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rates {
    pub most: Option<u64>,
    /// While the device has requests.
    pub busy: Option<u64>,
}

/// A merge that failed or was given up.
#[derive(Debug)]
pub struct Unmerged {
    pub error: Error,
    /// The target image is as it was. Else its content by itself is not valid until a merge is finished.
    pub untouched: bool,
}

impl Unmerged {
    /// Nothing has been changed yet.
    pub fn before(error: Error) -> Unmerged {
        Unmerged { error, untouched: true }
    }
}

impl From<Unmerged> for Error {
    fn from(unmerged: Unmerged) -> Error {
        unmerged.error
    }
}

/// File systems of a device that can be frozen, or are; dropping it thaws them.
pub trait Freeze: Debug {
    /// Freezes them; those that cannot be frozen are synced.
    fn freeze(&mut self) -> Result<()>;

    /// Thaws. An error: they were not frozen all the time, or are still frozen. A second call does nothing.
    fn thaw(&mut self) -> Result<()>;
}

/// Discards what a balloon file lies on; see [`discard_balloon`](crate::device::discard_balloon).
pub trait BalloonDiscard {
    /// Discards those whole clusters of `piece.ranges` that the piece of the file lies on, unwritten, at one instant.
    /// How many bytes that were.
    fn discard(&mut self, piece: &Piece) -> Result<u64>;
}

/// What is written to a device's images during a copy; dropping it ends the tracking.
pub trait Tracker: Debug {
    /// Bytes of a cluster.
    fn cluster(&self) -> u64;

    /// Bytes of the top's file that were in use when the tracking began.
    fn end(&self) -> u64;

    /// Of these bytes of the top's file: those that were written since they were last asked for, in whole clusters, the
    /// first ones if there are many. They have to be read after that. None: nothing was written.
    fn take(&mut self, bytes: Range<u64>) -> Result<Vec<Range<u64>>>;
}

/// Makes block devices of image chains and serves them. All methods may be called from any thread of any process.
pub trait Driver: Sync {
    /// Its name in `$PLOOP_DRIVER` and in messages.
    fn name(&self) -> &'static str;

    /// How it makes devices, in a few words for the user.
    fn summary(&self) -> &'static str;

    /// What it can do on this machine. An error names what the machine lacks.
    fn probe(&self) -> Result<Capabilities>;

    /// The program whose processes serve the devices; none: the kernel serves them. An error: it was not found.
    fn program(&self) -> Option<Result<PathBuf>> {
        None
    }

    /// Makes a block device of an image chain; it outlives this process. After an error nothing is left behind.
    fn attach(&self, spec: AttachSpec) -> Result<Device>;

    /// Detaches the device and closes its images cleanly, but keeps what it takes to start it again. Busy: an error of kind
    /// `DevIoc`, nothing changed.
    fn stop(&self, _device: &Device) -> Result<()> {
        Err(self.unsupported("stopping a device"))
    }

    /// Devices that are stopped, by number. They are not among those of [`list`](Self::list).
    fn stopped(&self) -> Result<Vec<Device>> {
        Ok(Vec::new())
    }

    /// The device of this name or node, if it is stopped.
    fn find_stopped(&self, _node: &str) -> Result<Option<Device>> {
        Ok(None)
    }

    /// An error if a file of a stopped device is another one by now, or was changed since.
    fn changed(&self, _stopped: &Device) -> Result<()> {
        Err(self.unsupported("starting a device"))
    }

    /// Attaches a stopped device again. `levels`: its files, base first, which must be unchanged.
    fn start(&self, _stopped: &Device, _levels: Vec<Level>) -> Result<Device> {
        Err(self.unsupported("starting a device"))
    }

    /// Forgets a stopped device.
    fn forget(&self, _stopped: &Device) -> Result<()> {
        Err(self.unsupported("forgetting a stopped device"))
    }

    /// Drops a level of a stopped device; how many are left. With the last one the device is forgotten.
    fn drop_level(&self, _stopped: &Device, _level: usize) -> Result<usize> {
        Err(self.unsupported("dropping a level of a stopped device"))
    }

    /// Counters of a running device, by name.
    fn counters(&self, _device: &Device) -> Result<Vec<(String, u64)>> {
        Err(self.unsupported("counting requests"))
    }

    /// Sets counters; names that are not there are passed over.
    fn set_counters(&self, _device: &Device, _values: &[(String, u64)]) -> Result<()> {
        Err(self.unsupported("counting requests"))
    }

    /// The minor that the next device would get, kept from other devices as long as the descriptor is open.
    fn reserve_minor(&self) -> Result<(u32, OwnedFd)> {
        Err(self.unsupported("reserving a minor"))
    }

    /// Starts a process of its own that has the temporary snapshots of a running disk merged, without waiting for it.
    fn start_merges(&self, _descriptor: &Path) -> Result<()> {
        Err(self.unsupported("merging in the background"))
    }

    /// Whether a device of this name (`ploop0` or its node) is this driver's, whatever its state.
    fn has(&self, name: &str) -> Result<bool>;

    /// Devices that `wanted` selects, by number, also those in state dead. `wanted` gets the recorded state. Only for
    /// the selected devices the driver finds out the real state, since that is slow.
    fn list(&self, wanted: &dyn Fn(&Device) -> bool) -> Result<Vec<Device>>;

    /// The device with this node (`/dev/ploop0`, `ploop0`, or a partition of it); none: not a device of this driver.
    fn find(&self, node: &str) -> Result<Option<Device>>;

    /// Detaches the device and closes its image cleanly. Busy: an error of kind `DevIoc`, nothing changed.
    fn detach(&self, name: &str) -> Result<()>;

    /// The first of these files for which changes wait that were answered and not flushed when the processes of its
    /// device were killed, and the folder in which they wait: the next device that writes to it takes them over. None: a
    /// driver in the kernel leaves none.
    fn unflushed(&self, _files: &[FileId]) -> Result<Option<(FileId, PathBuf)>> {
        Ok(None)
    }

    /// All folders in which such changes wait, each with the images of its chain, base first.
    fn all_unflushed(&self) -> Vec<(PathBuf, Vec<PathBuf>)> {
        Vec::new()
    }

    /// The numbers and nodes of the disk and its partitions; none if the device has another disk by now.
    fn aliases(&self, device: &Device) -> Aliases;

    /// The node to mount: the first partition of a disk with a GPT, else the disk. It is made if it is missing.
    fn mount_source(&self, device: &Device) -> Result<PathBuf>;

    /// A supervisor runs that starts a new worker when the device's worker exits. Always true for a driver in the
    /// kernel.
    fn is_supervised(&self, _device: &Device) -> bool {
        true
    }

    /// What is left of devices that have no record any more. None: a driver in the kernel knows all of its devices.
    fn leaks(&self) -> Vec<Leak> {
        Vec::new()
    }

    /// The processes that serve a device.
    fn processes(&self, _device: &Device) -> Vec<ServerProcess> {
        Vec::new()
    }

    /// The name that the file which the device serves as base has now, perhaps not the one under which it was attached.
    fn base_name(&self, _device: &Device) -> Option<PathBuf> {
        None
    }

    /// Where each image of the chain is now, base first.
    fn whereabouts(&self, device: &Device) -> Vec<Whereabouts> {
        vec![Whereabouts::Unknown; device.images.len()]
    }

    /// Opens an image of the running chain for reading, whatever became of its name.
    fn open_image(&self, _device: &Device, _level: usize) -> Result<File> {
        Err(self.unsupported("opening the images of a device"))
    }

    /// Gives up a device that no worker can serve any more: its I/O fails from now on.
    fn abort(&self, _name: &str) -> Result<()> {
        Err(self.unsupported("giving up a device"))
    }

    /// Removes what a crashed host or a killed server left of a device.
    fn clean(&self, _name: &str) -> Result<()> {
        Err(self.unsupported("cleaning up after a device"))
    }

    /// Whether writes that find no space in the host's file system wait for it (the rule) or fail.
    fn hold_for_space(&self, _name: &str, _hold: bool) -> Result<()> {
        Err(self.unsupported("waiting for space"))
    }

    /// Replaces the processes that serve a device by those of the program that is installed now.
    fn reload(&self, _name: &str) -> Result<()> {
        Err(self.unsupported("reloading a device"))
    }

    /// Makes a running device serve a chain of the same content, perhaps with a new descriptor; see [`switch`](crate::device::switch) and
    /// [`switch_prepared`](crate::device::switch_prepared).
    fn switch(
        &self,
        _device: &Device,
        _spec: &SwitchSpec,
        _prepared: Option<&mut dyn FnMut() -> Result<()>>,
        _serving: &mut dyn FnMut(Option<&str>),
    ) -> Result<()> {
        Err(self.unsupported("changing the chain of a running device"))
    }

    /// Merges the top of a running device into the level below it; see [`merge_top`](crate::device::merge::merge_top).
    fn merge_top(
        &self,
        _device: &Device,
        _commit: Option<&CommitFile>,
        _watch: &mut dyn Watch,
    ) -> Result<Option<String>, Unmerged> {
        Err(Unmerged::before(self.unsupported("merging the top of a running device")))
    }

    /// Merges levels below a writable top; see [`merge_levels`](crate::device::merge::merge_levels).
    fn merge_frozen(
        &self,
        _device: &Device,
        _levels: (usize, usize),
        _then: &SwitchSpec,
        _watch: &mut dyn Watch,
    ) -> Result<Option<String>, Unmerged> {
        Err(Unmerged::before(self.unsupported("merging frozen levels of a running device")))
    }

    /// Gives a running device another size, in sectors, that its top and its block device get; see
    /// [`set_size`](crate::device::set_size).
    fn set_size(
        &self,
        _device: &Device,
        _sectors: u64,
        _commit: Option<&CommitFile>,
        _grown: &mut dyn FnMut(u64),
    ) -> Result<Option<String>> {
        Err(self.unsupported("changing the size of a running device"))
    }

    /// Moves clusters of a running device's top to the front of its file and cuts the file; see
    /// [`give_back`](crate::device::give_back).
    fn give_back(&self, _device: &Device, _rates: Rates, _watch: &mut dyn Watch) -> Result<GivenBack> {
        Err(self.unsupported("giving space of a running device back"))
    }

    /// Begins to track what is written to the top of a running device; until the end of that the top stays the top.
    fn track(&self, _device: &Device) -> Result<Box<dyn Tracker>> {
        Err(self.unsupported("tracking the writes of a running device"))
    }

    /// Gets ready to freeze file systems of a device. `files`: one open file of each. They are thawed when this process exits.
    fn freeze(&self, _device: &Device, _files: Vec<File>) -> Result<Box<dyn Freeze>> {
        Err(self.unsupported("freezing the file systems of a device"))
    }

    /// Sets the maintenance state. `Busy`: the present one is none of those in `from`.
    fn set_maintenance(&self, _device: &Device, _from: &[Maintenance], _to: Maintenance) -> Result<()> {
        Err(self.unsupported("maintenance of a running device"))
    }

    /// The top's file may have so many sectors, 0: any number. A write that needs more fails.
    fn limit_top(&self, _device: &Device, _sectors: u64) -> Result<()> {
        Err(self.unsupported("a limit of the top delta of a running device"))
    }

    /// Gets ready to discard what a balloon file lies on.
    fn discard_balloon(&self, _device: &Device, _balloon: File) -> Result<Box<dyn BalloonDiscard>> {
        Err(self.unsupported("giving back the space of a balloon"))
    }

    /// The node of the partition of that number, made if this process's /dev lacks it; none: no such partition.
    fn partition_node(&self, _device: &Device, _number: u32) -> Result<Option<PathBuf>> {
        Err(self.unsupported("mounting a partition of choice"))
    }

    /// Partitions of the disk as the kernel has them now, by number.
    fn partitions(&self, _device: &Device) -> Result<Vec<Partition>> {
        Err(self.unsupported("listing the partitions of a device"))
    }

    /// The error for what this driver does not offer.
    fn unsupported(&self, what: &str) -> Error {
        Error::new(Kind::Param, format!("{what} is not supported by driver {}", self.name()))
    }
}

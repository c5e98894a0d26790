//! The block device of a running device as supervisor and helpers see it, whatever the transport: made, bound to the
//! queue, found again, resized, taken away.
//!
//! Apart from the looks into /sys each of these calls may wait for the device's own server, so that only short-lived
//! processes call them.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::Result;

/// One binding of one block device: its name in /sys/block, number and disk sequence number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// Name in /sys/block (`loop10000`) of the block device that /dev/ploopN stands for.
    pub backing: String,
    pub rdev: u64,
    /// 0: the kernel has none.
    pub diskseq: u64,
}

/// The block device that is wanted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Wanted {
    /// The number of the device's name, if it has one.
    pub number: Option<u32>,
    pub read_only: bool,
    /// What programs show as its file.
    pub name: String,
}

/// How long [`BlockBinding::unbind`] tries.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Patience {
    /// Another process has it open, udev for one.
    pub busy: Duration,
    /// It is mounted.
    pub mounted: Duration,
}

/// The block devices of one transport.
pub trait BlockBinding {
    /// Makes a block device and binds it to the connection in the folder `dir`. `chosen` learns each device that is
    /// made, before it is bound; its error ends the attempt.
    fn bind(&self, dir: &Path, wanted: &Wanted, chosen: &mut dyn FnMut(&Binding) -> Result<()>) -> Result<Binding>;

    /// Something is bound to it, as /sys shows it.
    fn is_bound(&self, backing: &str) -> bool;

    /// What is bound to it can be ours; for kernels without disk sequence numbers.
    fn may_be_ours(&self, backing: &str) -> bool;

    /// Opens exactly the disk that `binding` names, for its partitions; ESTALE: the block device serves another disk by
    /// now, or none.
    fn open(&self, binding: &Binding, flags: i32) -> io::Result<File>;

    /// The queue shows another size: the block device takes it over. A worker serves that size already, and only a helper
    /// process calls this.
    fn set_capacity(&self, binding: &Binding) -> Result<()>;

    /// Takes the device out of use: opens it exclusively, calls `opened` (which removes its names) and unbinds it. Busy
    /// to the end: error 3, and all is as before, except that the names are gone. [`remove`](Self::remove) follows.
    fn unbind(&self, binding: &Binding, patience: Patience, opened: &mut dyn FnMut() -> Result<()>) -> Result<()>;

    /// Removes a block device that nothing is bound to. One that stays is harmless.
    fn remove(&self, _backing: &str, _rdev: u64) {}

    /// Settings of a bound device that it works without: made after its user was answered, since they take long.
    fn tune(&self, _binding: &Binding, _wanted: &Wanted) {}

    /// Undoes a bind of unknown fate: whatever is bound to the device of number `rdev` came from the killed attempt.
    fn undo(&self, backing: &str, rdev: u64) -> Result<()>;

    /// All requests of the connection of this number fail from now on.
    fn abort(&self, connection: u64) -> Result<()>;
}

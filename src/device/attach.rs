//! Attaching: a server is started and says when the device is there.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use crate::bail;
use crate::device::{Device, State, clean, find};
use crate::error::{IoContext, Kind, Result};
use crate::report;
use crate::server::proto::{AttachRequest, LevelName, Marked};
use crate::server::{runtime, spawn};
use crate::sys::file_id::FileId;
use crate::units::{ClusterSize, MAX_CHAIN};

/// Attempts to find a name that nobody else takes at the same time.
const NAMES: usize = 8;

/// One image of a chain.
#[derive(Debug)]
pub struct Level {
    /// As the user or the descriptor names it, absolute; for lists and messages only.
    pub path: PathBuf,
    pub raw: bool,
    /// The image itself, O_PATH: what is opened is what was checked, whatever happens to names meanwhile.
    pub fd: OwnedFd,
}

/// What to attach, and how.
#[derive(Debug)]
pub struct AttachSpec {
    /// Base first.
    pub levels: Vec<Level>,
    /// Cluster size of a raw base.
    pub raw_cluster: Option<ClusterSize>,
    pub read_only: bool,
    pub marked: Marked,
    /// Empty for the main use of an image.
    pub component: String,
    /// The DiskDescriptor.xml that the chain comes from.
    pub descriptor: Option<PathBuf>,
    /// `/dev/NAME` if the user asks for one; else the smallest free `/dev/ploopN`.
    pub device: Option<String>,
    pub trace: bool,
    /// The way of takeover for kernels before 6.9, whatever this kernel is; see `$PLOOP_TAKEOVER`.
    pub slots: bool,
}

/// Makes a block device of an image chain. It outlives this process; [`detach`](crate::device::detach) ends it.
/// After an error nothing is left behind. Needs root.
pub fn attach(spec: AttachSpec) -> Result<Device> {
    if spec.levels.is_empty() || spec.levels.len() > MAX_CHAIN {
        bail!(Param, "{} images given: 1 to {MAX_CHAIN} can be attached", spec.levels.len());
    }
    if !nix::unistd::geteuid().is_root() {
        bail!(Device, "a device can be made by root only (user id is {})", nix::unistd::geteuid());
    }
    let wanted = spec.device.as_deref().map(runtime::name_of).transpose()?;
    // What a crashed server left would keep names and images busy.
    clean::clean_dead()?;
    if let Some(name) = &wanted
        && let Some(other) = find::by_name(name)?
    {
        bail!(
            Busy,
            "{} is in use for {}; detach it or choose another name",
            other.node().display(),
            other.top().display()
        );
    }
    let mut ids = Vec::new();
    for level in &spec.levels {
        let id = FileId::of(&level.fd).ctx(Kind::Fstat, || format!("cannot look at {}", level.path.display()))?;
        ids.push(id);
    }
    let mut request = AttachRequest {
        levels: spec.levels.iter().map(|l| LevelName { path: l.path.clone(), raw: l.raw }).collect(),
        raw_cluster: spec.raw_cluster.map(ClusterSize::sectors),
        read_only: spec.read_only,
        marked: spec.marked,
        component: spec.component,
        descriptor: spec.descriptor,
        device: wanted,
        trace: spec.trace,
        no_space_timeout: no_space_timeout()?,
        slots: spec.slots,
        ids,
        token: uuid::Uuid::new_v4().to_string(),
    };
    let fds: Vec<BorrowedFd> = spec.levels.iter().map(|l| l.fd.as_fd()).collect();
    for _ in 0..NAMES {
        match spawn::start(&request, &fds) {
            // Somebody who does not share our records (another root folder over the same /dev) took the name meanwhile.
            Err(e) if e.kind() == Kind::Mknod && request.device.is_none() => {
                report::say(1, format_args!("{e}; trying another name"));
                request.token = uuid::Uuid::new_v4().to_string();
            }
            started => return Ok(Device { record: started?, state: State::Running }),
        }
    }
    bail!(Mknod, "{NAMES} names for a device in /dev were taken by others while it was being made; try again")
}

/// `$PLOOP_ENOSPC_TIMEOUT` in seconds; 0 or nothing: writes wait for ever.
fn no_space_timeout() -> Result<Option<u64>> {
    match std::env::var("PLOOP_ENOSPC_TIMEOUT") {
        Ok(text) if !text.is_empty() => match text.parse() {
            Ok(seconds) => Ok(Some(seconds).filter(|s| *s > 0)),
            Err(_) => bail!(Param, "$PLOOP_ENOSPC_TIMEOUT is {text:?}: a number of seconds wanted"),
        },
        _ => Ok(None),
    }
}

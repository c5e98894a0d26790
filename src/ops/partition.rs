//! Which partition of a disk is mounted.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::bail;
use crate::device::{self, Device, Partition};
use crate::error::Result;
use crate::fs::probe::{self, Found};
use crate::report;
use crate::sys::host;

/// What to mount of a device: the partition of that number; without one the first partition, or, if no file system of
/// Linux is recognised there, the largest partition that has one; of a disk without partitions the disk. `Param`: no such
/// partition.
pub fn source(device: &Device, number: Option<u32>) -> Result<PathBuf> {
    if let Some(number) = number {
        return match device::partition_node(device, number)? {
            Some(node) => Ok(node),
            None => bail!(Param, "{} has no partition {number}; {}", device.node().display(), listed(device)),
        };
    }
    let first = device::mount_source(device)?;
    let all = device::partitions(device)?;
    if all.len() < 2 || recognised(&first).is_some() {
        return Ok(first);
    }
    let mut best: Option<(Partition, PathBuf)> = None;
    for partition in all {
        if let Some(node) = device::partition_node(device, partition.number)?
            && recognised(&node).is_some()
            && best.as_ref().is_none_or(|(b, _)| b.length < partition.length)
        {
            best = Some((partition, node));
        }
    }
    let Some((partition, node)) = best else { return Ok(first) };
    report::say(
        0,
        format_args!(
            "{} is mounted, the largest partition with a file system of Linux; {}; -p chooses another",
            partition.number,
            listed(device)
        ),
    );
    Ok(node)
}

/// How long the node of a partition may be away while the supervisor makes it anew.
const PARTITION_BACK: Duration = Duration::from_secs(4);

/// Works on what is mounted of a device. Where its node went meanwhile, the kernel has read the partition table anew: it is
/// waited for, and the work is done then.
pub(super) fn work_on<T>(
    device: &Device,
    number: Option<u32>,
    source: &mut PathBuf,
    work: &mut dyn FnMut(&Path) -> Result<T>,
) -> Result<T> {
    let end = host::now() + PARTITION_BACK;
    loop {
        match work(source) {
            Err(e) if !source.exists() && host::now() < end => {
                report::say(1, format_args!("{} was away for a moment: {e}", source.display()));
                host::sleep(Duration::from_millis(20));
                *source = self::source(device, number)?;
            }
            other => return other,
        }
    }
}

/// What cannot be read has no file system that can be mounted.
pub(super) fn recognised(node: &std::path::Path) -> Option<Found> {
    probe::device(node).ok().flatten()
}

/// The partitions of a device, for a message.
fn listed(device: &Device) -> String {
    let all = device::partitions(device).unwrap_or_default();
    let one = |p: &Partition| {
        let node = device::partition_node(device, p.number).ok().flatten();
        let content = node.and_then(|n| recognised(&n)).map_or("no file system of Linux", Found::name);
        format!("{} ({} MiB, {content})", p.number, p.length >> 20)
    };
    match all.is_empty() {
        true => "it has no partitions".into(),
        false => format!("it has partitions {}", all.iter().map(one).collect::<Vec<_>>().join(", ")),
    }
}

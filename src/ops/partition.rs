//! Which partition of a disk is mounted.

use std::path::PathBuf;

use crate::bail;
use crate::device::{self, Device, Partition};
use crate::error::Result;
use crate::fs::probe::{self, Found};
use crate::report;

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

//! Stopping a device, and attaching it again.
#![forbid(unsafe_code)]

use crate::bail;
use crate::device::model::Device;
use crate::device::served::attach::attach_named;
use crate::device::served::stopped::{self, Locked};
use crate::device::served::{clean, record};
use crate::device::spec::{AttachSpec, Level};
use crate::error::Result;
use crate::server::proto::Command;
use crate::units::ClusterSize;

/// See [`device::stop`](crate::device::stop).
pub fn stop(device: &Device) -> Result<()> {
    if let Some(unsupported) = record(device).refuse(&Command::StopAndKeep) {
        return Err(unsupported.context(format!(
            "{0} cannot be stopped by its server; ploop reload {0} has it served by the program that is installed, \
             ploop umount -d {0} detaches it for good",
            device.node.display()
        )));
    }
    let told = clean::tell(&device.name, &Command::StopAndKeep);
    // The supervisor may have been killed before it answered, but after the last step.
    if stopped::find(&device.name)?.is_some_and(|stopped| stopped.is_same(device)) {
        return Ok(());
    }
    told?;
    bail!(
        DevIoc,
        "the server of {} was killed while it was being stopped: the device is gone; mount the disk again",
        device.node.display()
    )
}

/// See [`device::start`](crate::device::start).
pub fn start(device: &Device, levels: Vec<Level>) -> Result<Device> {
    let locked = Locked::open(device)?;
    let record = &locked.record;
    if levels.len() != record.attach.levels.len() {
        bail!(Param, "{} images given for {}, which has {}", levels.len(), device.name, record.attach.levels.len());
    }
    for (i, level) in levels.iter().enumerate() {
        stopped::check(record, i, &level.fd)?;
    }
    let attach = record.attach.clone();
    attach_named(AttachSpec {
        levels,
        raw_cluster: attach.raw_cluster.map(|c| ClusterSize::from_sectors(u64::from(c))).transpose()?,
        read_only: attach.read_only,
        marked: attach.marked,
        component: attach.component,
        descriptor: attach.descriptor,
        device: Some(device.name.clone()),
        trace: attach.trace,
        until_unmounted: attach.until_unmounted,
        auto_compact: attach.auto_compact,
        slots: attach.slots,
    })
}

//! Devices that `ploop-server` serves: a supervisor and a worker for each, behind a FUSE file and a loop device.
//!
//! A name alone does not identify a device. A device is the record in /run/ploop/NAME together with the number and the
//! sequence number of the disk behind it; both are compared with the kernel's before any operation.

mod attach;
mod balloon;
mod clean;
mod counters;
mod find;
mod freeze;
mod give_back;
mod images;
mod leaks;
mod limit;
mod lock;
mod merge;
mod minors;
mod model;
mod mount_source;
mod restart;
mod size;
mod stopped;
mod switch;
mod track;
mod unflushed;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use crate::bail;
use crate::device::driver::{BalloonDiscard, Capabilities, Driver, Freeze, Rates, Tracker, Unmerged, Watch};
use crate::device::model::{Aliases, Device, Leak, Partition, ServerProcess, Whereabouts};
use crate::device::spec::{AttachSpec, CommitFile, Level, SwitchSpec};
use crate::engine::api::GivenBack;
use crate::error::Result;
use crate::format::maintenance::Maintenance;
use crate::server::{partitions, runtime, spawn, unflushed as server_unflushed};
use crate::sys::file_id::FileId;

pub use attach::slots_wanted;
#[cfg(test)]
pub(super) use model::device_of;
#[cfg(test)]
pub use model::made_up;
pub use model::record;

pub(super) const CAPABILITIES: Capabilities = Capabilities {
    switch: true,
    merge_top: true,
    merge_frozen: true,
    set_size: true,
    give_back: true,
    track: true,
    freeze: true,
    partitions: true,
    reload: true,
};

/// Device nodes that this driver needs.
const NODES: [&str; 2] = ["/dev/fuse", "/dev/loop-control"];

/// The driver.
#[derive(Debug)]
pub(super) struct Served;

impl Driver for Served {
    fn name(&self) -> &'static str {
        "fuse_loop"
    }

    fn summary(&self) -> &'static str {
        "a FUSE file behind a loop device"
    }

    fn probe(&self) -> Result<Capabilities> {
        for node in NODES {
            if !fs::metadata(node).is_ok_and(|m| m.file_type().is_char_device()) {
                bail!(Device, "driver {} needs {node}, which is not there", self.name());
            }
        }
        spawn::find_server()?;
        Ok(CAPABILITIES)
    }

    fn program(&self) -> Option<Result<PathBuf>> {
        Some(spawn::find_server())
    }

    fn attach(&self, spec: AttachSpec) -> Result<Device> {
        attach::attach(spec)
    }

    fn stop(&self, device: &Device) -> Result<()> {
        restart::stop(device)
    }

    fn stopped(&self) -> Result<Vec<Device>> {
        stopped::list()
    }

    fn find_stopped(&self, node: &str) -> Result<Option<Device>> {
        stopped::find(&runtime::name_of(node)?)
    }

    fn changed(&self, stopped: &Device) -> Result<()> {
        stopped::changed(stopped)
    }

    fn start(&self, stopped: &Device, levels: Vec<Level>) -> Result<Device> {
        restart::start(stopped, levels)
    }

    fn forget(&self, stopped: &Device) -> Result<()> {
        stopped::forget(stopped)
    }

    fn drop_level(&self, stopped: &Device, level: usize) -> Result<usize> {
        stopped::drop_level(stopped, level)
    }

    fn counters(&self, device: &Device) -> Result<Vec<(String, u64)>> {
        counters::read(device)
    }

    fn set_counters(&self, device: &Device, values: &[(String, u64)]) -> Result<()> {
        counters::set(device, values)
    }

    fn reserve_minor(&self) -> Result<(u32, OwnedFd)> {
        minors::reserve()
    }

    fn start_merges(&self, descriptor: &Path) -> Result<()> {
        spawn::start_merges(descriptor)
    }

    fn unflushed(&self, files: &[FileId]) -> Result<Option<(FileId, PathBuf)>> {
        unflushed::waiting(files)
    }

    fn all_unflushed(&self) -> Vec<(PathBuf, Vec<PathBuf>)> {
        server_unflushed::all().into_iter().map(|left| (left.dir.clone(), left.images())).collect()
    }

    fn has(&self, name: &str) -> Result<bool> {
        Ok(fs::symlink_metadata(runtime::device_dir(&runtime::name_of(name)?)).is_ok())
    }

    fn list(&self, wanted: &dyn Fn(&Device) -> bool) -> Result<Vec<Device>> {
        find::list_of(wanted)
    }

    fn find(&self, node: &str) -> Result<Option<Device>> {
        find::by_node(node)
    }

    fn detach(&self, name: &str) -> Result<()> {
        clean::detach(name)
    }

    fn aliases(&self, device: &Device) -> Aliases {
        mount_source::aliases(record(device))
    }

    fn mount_source(&self, device: &Device) -> Result<PathBuf> {
        mount_source::mount_source(record(device))
    }

    fn partition_node(&self, device: &Device, number: u32) -> Result<Option<PathBuf>> {
        mount_source::partition_node(record(device), number)
    }

    fn is_supervised(&self, device: &Device) -> bool {
        runtime::alive(record(device).supervisor)
    }

    fn leaks(&self) -> Vec<Leak> {
        leaks::all()
    }

    fn processes(&self, device: &Device) -> Vec<ServerProcess> {
        leaks::processes(device)
    }

    fn base_name(&self, device: &Device) -> Option<PathBuf> {
        images::base_name(device)
    }

    fn whereabouts(&self, device: &Device) -> Vec<Whereabouts> {
        images::whereabouts(device)
    }

    fn open_image(&self, device: &Device, level: usize) -> Result<File> {
        images::open(device, level)
    }

    fn abort(&self, name: &str) -> Result<()> {
        clean::abort(name)
    }

    fn clean(&self, name: &str) -> Result<()> {
        clean::clean(name)
    }

    fn hold_for_space(&self, name: &str, hold: bool) -> Result<()> {
        clean::hold_for_space(name, hold)
    }

    fn reload(&self, name: &str) -> Result<()> {
        switch::reload(name)
    }

    fn switch(
        &self,
        device: &Device,
        spec: &SwitchSpec,
        prepared: Option<&mut dyn FnMut() -> Result<()>>,
        serving: &mut dyn FnMut(Option<&str>),
    ) -> Result<()> {
        switch::switch(device, spec, prepared, serving)
    }

    fn merge_top(
        &self,
        device: &Device,
        commit: Option<&CommitFile>,
        watch: &mut dyn Watch,
    ) -> Result<Option<String>, Unmerged> {
        merge::merge_top(device, commit, watch)
    }

    fn merge_frozen(
        &self,
        device: &Device,
        levels: (usize, usize),
        then: &SwitchSpec,
        watch: &mut dyn Watch,
    ) -> Result<Option<String>, Unmerged> {
        merge::merge_levels(device, levels, then, watch)
    }

    fn give_back(&self, device: &Device, rates: Rates, watch: &mut dyn Watch) -> Result<GivenBack> {
        give_back::give_back(device, rates, watch)
    }

    fn set_size(
        &self,
        device: &Device,
        sectors: u64,
        commit: Option<&CommitFile>,
        grown: &mut dyn FnMut(u64),
    ) -> Result<Option<String>> {
        size::set_size(device, sectors, commit, grown)
    }

    fn track(&self, device: &Device) -> Result<Box<dyn Tracker>> {
        track::track(device)
    }

    fn freeze(&self, device: &Device, files: Vec<File>) -> Result<Box<dyn Freeze>> {
        Ok(Box::new(freeze::FreezeHelper::prepare(device, files)))
    }

    fn set_maintenance(&self, device: &Device, from: &[Maintenance], to: Maintenance) -> Result<()> {
        balloon::set_maintenance(device, from, to)
    }

    fn limit_top(&self, device: &Device, sectors: u64) -> Result<()> {
        limit::limit_top(device, sectors)
    }

    fn discard_balloon(&self, device: &Device, balloon: File) -> Result<Box<dyn BalloonDiscard>> {
        Ok(Box::new(balloon::Discarder::new(device, balloon)?))
    }

    fn partitions(&self, device: &Device) -> Result<Vec<Partition>> {
        let known = partitions::known(&device.disk).into_iter();
        Ok(known.map(|p| Partition { number: p.number, rdev: p.rdev, start: p.start, length: p.length }).collect())
    }
}

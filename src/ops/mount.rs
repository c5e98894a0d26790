//! Mounting: a chain of images becomes a device, its file system appears at a folder. A step that fails undoes the ones
//! before it.

use std::fs;
use std::path::{Path, PathBuf};

use super::disk_lock::Disk;
use super::mount_images::{advise_cut_off, host_checks, raw_cluster, refuse_frozen, tell_cut_off};
use super::mount_levels::{level, refuse_stopped, refuse_twice, refuse_used};
use super::{disk_lock, find, image_set, max_delta, merge_temporary, partition, recovery};
use crate::bail;
use crate::chain::Marked;
use crate::descriptor::{Descriptor, ImageMode, LockedDescriptor};
use crate::device::{self, AttachSpec, Device, Level, State};
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::guid::Guid;
use crate::fs::mount::{self, MountSpec};
use crate::fs::probe::{self, Found};
use crate::fs::stat;
use crate::image::open;
use crate::report;
use crate::units::ClusterSize;

/// Logs every request of the device.
const TRACE: &str = "TRACE_REQUESTS";

/// How to mount a disk.
#[derive(Clone, Debug, Default)]
pub struct MountParams {
    pub read_only: bool,
    /// File lists alone. Read-only: look at images that are in use elsewhere. Else: write to an image on which deltas stand.
    pub force: bool,
    /// Log every request.
    pub trace: bool,
    /// The device ends with its last mount.
    pub until_unmounted: bool,
    /// Space that becomes free in the top image is given back by itself while the device is idle.
    pub auto_compact: bool,
    /// Check the file system first (ext).
    pub fsck: bool,
    pub quota: bool,
    pub noatime: bool,
    /// Name of the device wanted, `/dev/NAME`.
    pub device: Option<String>,
    /// Number of the partition to mount; none: it is chosen.
    pub partition: Option<u32>,
    /// Where to mount the file system; none: only the device is made.
    pub target: Option<PathBuf>,
    pub fstype: Option<String>,
    pub options: Option<String>,
    /// Snapshot to mount, or the word `base`; none: the top.
    pub guid: Option<String>,
    /// Cluster size for a raw base of a file list.
    pub cluster: Option<ClusterSize>,
}

/// A mounted disk.
#[derive(Debug)]
pub struct Mounted {
    pub device: Device,
    /// How fsck ended, if it was run.
    pub fsck_rc: Option<i32>,
}

/// Mounts a disk by its descriptor.
pub fn mount_descriptor(descriptor: &Path, component: &str, params: &MountParams) -> Result<Mounted> {
    let _operation = report::cancel::begin();
    let opened = if params.read_only { Disk::look(descriptor)? } else { Disk::open(descriptor)? };
    let mut disk = match opened {
        Disk::Locked(disk) => disk,
        merging => {
            if params.guid.is_none() {
                refuse_found(&merging, merging.device(component)?, component)?;
            }
            disk_lock::open(descriptor)?
        }
    };
    let guid = wanted(&disk, params.guid.as_deref())?;
    let running = find::of_disk(&disk, component)?.is_some();
    if !running {
        find::refuse_replaced(&disk)?;
        if !params.read_only {
            image_set::refuse_dead(&disk)?;
        }
        if !disk.is_unlocked() {
            recovery::before_mount(&mut disk, &guid, params.read_only)?;
        }
    }
    let mounted = mount_locked(&disk, component, params)?;
    if component.is_empty() && !params.read_only && guid == disk.top {
        // Interrupted merges are finished, and snapshots that only a backup needed removed, while the disk runs: a mount
        // takes no longer by them.
        merge_temporary::start_merges(&mut disk);
    }
    Ok(mounted)
}

/// Mounts a disk whose descriptor the caller has locked.
pub fn mount_locked(disk: &LockedDescriptor, component: &str, params: &MountParams) -> Result<Mounted> {
    find::check_component(component)?;
    check_target(params.target.as_deref())?;
    if params.force {
        bail!(Param, "--force is for image files; a disk mounted by its descriptor does not need it");
    }
    let guid = wanted(disk, params.guid.as_deref())?;
    let chain = disk.chain(&guid)?;
    disk.check_whole(&guid)?;
    if !params.read_only && disk.has_children(&guid) {
        bail!(
            Param,
            "snapshot {guid} cannot be mounted for writing: other deltas stand on it and would change with it; mount it read-only (-r)"
        );
    }
    let beside = component.is_empty() && params.read_only && params.guid.is_some() && guid != disk.top;
    let component = &match beside {
        true => beside_running(disk, &guid)?,
        false => component.to_owned(),
    };
    refuse_running(disk, component)?;

    let levels = chain
        .iter()
        .map(|image| level(&image.file, Some(&disk.dir), disk.is_raw(image)))
        .collect::<Result<Vec<Level>>>()?;
    refuse_twice(&levels).map_err(|e| e.as_kind(Kind::DiskDescr).context(disk.path.display()))?;
    refuse_used(&levels, params.read_only)?;
    refuse_stopped(&levels, params.read_only)?;
    host_checks(&levels)?;
    let device = attach(AttachSpec {
        levels,
        raw_cluster: Some(disk.blocksize),
        read_only: params.read_only,
        marked: Marked::Recover,
        component: component.to_owned(),
        descriptor: Some(disk.path.clone()),
        device: params.device.clone(),
        trace: trace(params),
        until_unmounted: params.until_unmounted,
        // The owner of a preallocated disk has chosen to keep its space.
        auto_compact: params.auto_compact && disk.mode != ImageMode::Preallocated,
        slots: device::slots_wanted()?,
    })?;
    let mounted = finish(max_delta::at_mount(disk, device)?, params)?;
    if params.target.is_some() {
        drop_cache(disk);
    }
    Ok(mounted)
}

/// Mounts a chain of files, base first. `raw`: the base is raw.
pub fn mount_list(files: &[PathBuf], raw: bool, params: &MountParams) -> Result<Mounted> {
    let _operation = report::cancel::begin();
    if files.is_empty() {
        bail!(Param, "no image to mount");
    }
    check_target(params.target.as_deref())?;
    if params.guid.is_some() {
        bail!(Param, "a snapshot's GUID (-u) is found in a descriptor; give DiskDescriptor.xml instead of image files");
    }
    let levels = files
        .iter()
        .enumerate()
        .map(|(i, file)| {
            let file = fs::canonicalize(file).ctx(Kind::Mount, || format!("image {}", file.display()))?;
            level(&file, None, raw && i == 0)
        })
        .collect::<Result<Vec<Level>>>()?;
    refuse_twice(&levels)?;
    if let Some(top) = levels.last() {
        refuse_frozen(top, params.read_only, params.force)?;
    }
    let only_look = params.force && params.read_only;
    if !only_look {
        refuse_used(&levels, params.read_only)?;
        refuse_stopped(&levels, params.read_only)?;
    }
    let raw_cluster = match raw {
        true => Some(raw_cluster(&levels[0], params.cluster)?),
        false => None,
    };
    host_checks(&levels)?;
    if only_look {
        tell_cut_off(&levels);
    }
    let top = levels.last().map(|l| l.path.clone()).unwrap_or_default();
    let device = attach(AttachSpec {
        levels,
        raw_cluster,
        read_only: params.read_only,
        marked: if only_look { Marked::Ignore } else { Marked::Refuse },
        component: String::new(),
        descriptor: None,
        device: params.device.clone(),
        trace: trace(params),
        until_unmounted: params.until_unmounted,
        auto_compact: params.auto_compact,
        slots: device::slots_wanted()?,
    })
    .map_err(|e| match e.kind() {
        Kind::InUse => in_use(e, &top),
        _ => e,
    })?;
    finish(device, params)
}

/// Adds to the error "in use" what the user can do: the mark alone does not say whether a host crashed or another host
/// runs the image.
fn in_use(e: Error, top: &Path) -> Error {
    let descriptor = top.with_file_name(crate::descriptor::FILE_NAME);
    let names_it = Descriptor::read(&descriptor).is_ok_and(|d| d.images.iter().any(|i| i.file == top));
    let by_descriptor = match names_it {
        true => format!(" (ploop mount {})", descriptor.display()),
        false => String::new(),
    };
    Error::new(
        Kind::InUse,
        format!("{e}{by_descriptor}; to look at it without writing: ploop mount -r --force {}", top.display()),
    )
}

fn trace(params: &MountParams) -> bool {
    params.trace || std::env::var_os(TRACE).is_some()
}

fn check_target(target: Option<&Path>) -> Result<()> {
    match target {
        Some(t) if !t.is_dir() => bail!(Param, "mount point {} is not an existing folder; make it first", t.display()),
        Some(t) => {
            if let Some((device, mount)) = find::by_mount_point(t)? {
                report::warn(format_args!(
                    "{} is the mount point of {} already, whose files cannot be seen there now",
                    mount.target.display(),
                    device.node().display()
                ));
            }
            Ok(())
        }
        None => Ok(()),
    }
}

/// The snapshot meant by a GUID or the word `base`. `NoSnap`.
fn wanted(disk: &Descriptor, guid: Option<&str>) -> Result<Guid> {
    let unknown = |text: &str| {
        let known: Vec<String> = disk.snapshots.iter().map(|s| s.guid.to_string()).collect();
        Error::new(
            Kind::NoSnap,
            format!("no snapshot {text} in the disk in {}; there are {}", disk.dir.display(), known.join(", ")),
        )
    };
    match guid {
        None => Ok(disk.top),
        Some("base") => match disk.snapshots.iter().find(|s| s.parent.is_none()) {
            Some(first) => Ok(first.guid),
            None => bail!(DiskDescr, "no snapshot without a parent, so no base, in this disk"),
        },
        Some(text) => match Guid::parse(text) {
            Ok(guid) => disk.snapshot(&guid).map(|s| s.guid).ok_or_else(|| unknown(text)),
            Err(_) => Err(unknown(text)),
        },
    }
}

/// The component of a snapshot that is mounted beside the running disk: any number of them can be, so it is named after
/// the snapshot. The empty one if nothing runs without a component.
fn beside_running(disk: &LockedDescriptor, guid: &Guid) -> Result<String> {
    let taken =
        |component: &str| find::of_disk(disk, component).map(|found| found.is_some_and(|d| d.state != State::Dead));
    if !taken("")? {
        return Ok(String::new());
    }
    let mut name = guid.to_string();
    let mut number = 1;
    while taken(&name)? {
        number += 1;
        name = format!("{guid}-{number}");
    }
    report::say(0, format_args!("The disk runs: its snapshot is mounted as component {name}"));
    Ok(name)
}

/// Refuses the mount if a device of the same component runs. What is left of a dead device is removed first.
fn refuse_running(disk: &LockedDescriptor, component: &str) -> Result<()> {
    refuse_found(disk, find::of_disk(disk, component)?, component)
}

fn refuse_found(disk: &Descriptor, found: Option<Device>, component: &str) -> Result<()> {
    let Some(found) = found else { return Ok(()) };
    let shown = format!("{} as {}", disk.first_image()?.file.display(), found.node().display());
    match found.state {
        State::Dead => {
            report::say(0, format_args!("Removing what is left of {shown}, whose server was killed"));
            device::clean(found.name()).map_err(|e| e.context(format!("left by a dead server: {shown}")))
        }
        State::Stopped => bail!(Sys, "{shown} is stopped; detach it first: ploop umount -d {}", found.node().display()),
        _ => {
            let how = if find::mounts_of(&found)?.is_empty() { "attached" } else { "mounted" };
            let of = if component.is_empty() { String::new() } else { format!(" of component {component}") };
            bail!(
                Mount,
                "{shown} is {how} already{of}; ploop umount it, or mount a snapshot of it under another component (-c)"
            )
        }
    }
}

fn attach(spec: AttachSpec) -> Result<Device> {
    let mode = if spec.read_only { "ro" } else { "rw" };
    // Kept for messages; the server gets the others.
    let kept = |l: &Level| Ok(Level { path: l.path.clone(), raw: l.raw, fd: l.fd.try_clone()? });
    let kept: Vec<Level> = spec.levels.iter().map(kept).collect::<std::io::Result<_>>().ctx(Kind::Open, || "images")?;
    let levels: Vec<PathBuf> = spec.levels.iter().map(|l| l.path.clone()).collect();
    let device = device::attach(spec).map_err(|e| advise_cut_off(e, &kept))?;
    for (i, path) in levels.iter().enumerate() {
        let mode = if i + 1 == levels.len() { mode } else { "ro" };
        // Scripts take the device's name from these lines.
        report::say(0, format_args!("Adding delta dev={} img={} ({mode})", device.node().display(), path.display()));
    }
    Ok(device)
}

/// The steps after the device runs. If one fails the device is detached.
fn finish(device: Device, params: &MountParams) -> Result<Mounted> {
    match mount_fs(&device, params) {
        Ok(fsck_rc) => Ok(Mounted { device, fsck_rc }),
        Err(e) => {
            if let Err(undo) = device::detach(device.name()) {
                report::warn(format_args!("{} stays: {undo}", device.node().display()));
            }
            Err(e)
        }
    }
}

fn mount_fs(device: &Device, params: &MountParams) -> Result<Option<i32>> {
    if report::cancel::requested() {
        bail!(Sys, "the mount of {} was cancelled", device.base().display());
    }
    if params.target.is_none() && !params.fsck {
        return Ok(None);
    }
    let mut source = partition::source(device, params.partition)?;
    let ext = params.fstype.as_deref().is_none_or(|t| t.starts_with("ext"));
    let fsck_rc = match params.fsck && ext {
        true => Some(partition::work_on(device, params.partition, &mut source, &mut |source| {
            mount::fsck(source, params.read_only)
        })?),
        false => None,
    };
    if let Some(target) = &params.target {
        let spec = MountSpec {
            fstype: params.fstype.clone(),
            read_only: params.read_only,
            noatime: params.noatime,
            quota: params.quota,
            options: params.options.clone(),
        };
        partition::work_on(device, params.partition, &mut source, &mut |source| {
            mount::mount_device(source, target, &spec)
        })?;
    }
    Ok(fsck_rc)
}

/// What of a device is mounted.
pub(super) fn source_of(device: &Device, params: &MountParams) -> Result<PathBuf> {
    partition::source(device, params.partition)
}

/// What to mount of a read-only device by hand, and the option that it may need.
pub fn source_and_option(device: &Device, number: Option<u32>) -> Result<(PathBuf, Option<&'static str>)> {
    let source = partition::source(device, number)?;
    let found = probe::device(&source).ctx(Kind::Read, || format!("{} cannot be read", source.display()))?;
    let option = match found {
        // Never wrong on a device that cannot be written.
        Some(Found::Ext { .. }) => Some("noload"),
        Some(Found::Xfs) => Some("norecovery,nouuid"),
        other => other.and_then(Found::without_replay),
    };
    Ok((source, option))
}

/// Removes the file system's numbers that are stored beside the image: they are not valid any more.
pub(super) fn drop_cache(disk: &LockedDescriptor) {
    let image = disk.first_image().ok().and_then(|i| open::place_beside(&i.file, &disk.dir).ok()).map(|p| p.folder);
    for folder in image.iter().chain([&disk.dir]) {
        if let Err(e) = stat::drop_cache(folder) {
            report::warn(format_args!("{}/{} cannot be removed: {e}", folder.display(), stat::FILE));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor::{Image, ImageMode, Snapshot};
    use crate::format::guid;

    #[test]
    fn snapshots_are_found_by_guid_and_the_base_by_its_word() {
        let mut disk =
            Descriptor::new_base(Path::new("/d/root.hdd"), 2048, ClusterSize::DEFAULT, ImageMode::Expanded).unwrap();
        assert_eq!(wanted(&disk, None).unwrap(), guid::TOP);
        assert_eq!(wanted(&disk, Some("base")).unwrap(), guid::TOP);
        let first = Guid::parse("{aaaaaaaa-2222-4333-8444-555555555555}").unwrap();
        disk.images[0].guid = first;
        disk.snapshots[0].guid = first;
        disk.images.push(Image { guid: guid::TOP, file: "/d/root.hdd.1".into() });
        disk.snapshots.push(Snapshot {
            guid: guid::TOP,
            parent: first,
            temporary: false,
            spoiled: false,
            reverse_merge: None,
        });
        assert_eq!(wanted(&disk, None).unwrap(), guid::TOP);
        assert_eq!(wanted(&disk, Some("base")).unwrap(), first);
        assert_eq!(wanted(&disk, Some("AAAAAAAA-2222-4333-8444-555555555555")).unwrap(), first);
        for unknown in ["{bbbbbbbb-2222-4333-8444-555555555555}", "Base", ""] {
            assert_eq!(wanted(&disk, Some(unknown)).unwrap_err().kind(), Kind::NoSnap, "{unknown}");
        }
    }

    #[test]
    fn component_names() {
        assert!(find::check_component("").is_ok());
        assert!(find::check_component(&"c".repeat(63)).is_ok());
        assert_eq!(find::check_component(&"c".repeat(64)).unwrap_err().kind(), Kind::Param);
    }
}

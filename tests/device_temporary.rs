//! Temporary snapshots of running disks: they live as long as somebody uses them.

mod device_common;

use std::path::{Path, PathBuf};

use device_common::*;
use ploop::descriptor::{Descriptor, ImageMode};
use ploop::device;
use ploop::error::Kind;
use ploop::format::guid::{self, Guid};
use ploop::format::header::Version;
use ploop::ops::create::{CreateParams, create_image};
use ploop::ops::mount::{MountParams, mount_descriptor};
use ploop::ops::snapshot::{self, SnapshotParams, TemporaryParams};
use ploop::ops::umount::umount_descriptor;
use ploop::units::ClusterSize;

struct Disk {
    _t: Bench,
    dd: PathBuf,
    node: PathBuf,
}

impl Disk {
    fn new(name: &str) -> Option<Disk> {
        let t = Bench::new(name)?;
        let image = t.dir.path().join("root.hds");
        create_image(&CreateParams {
            image,
            sectors: 64 << 11,
            cluster: ClusterSize::DEFAULT,
            version: Version::V2,
            mode: ImageMode::Expanded,
            fs: None,
            without_partition: false,
        })
        .unwrap();
        let dd = t.dir.path().join("DiskDescriptor.xml");
        let device = Some(format!("ploop-test-{}-{name}", std::process::id()));
        let mounted = mount_descriptor(&dd, "", &MountParams { device, ..Default::default() }).unwrap();
        let node = mounted.device.node().to_owned();
        Some(Disk { _t: t, dd, node })
    }

    fn there(&self, guid: &Guid) -> bool {
        Descriptor::read(&self.dd).unwrap().snapshot(guid).is_some()
    }

    fn snapshot(&self) -> Guid {
        let guid = Guid::generate();
        snapshot::create(&self.dd, "", &SnapshotParams { guid, snap_dir: None, temporary: false }).unwrap();
        guid
    }
}

fn token(node: &str) -> Option<String> {
    device::by_node(node).ok().flatten().map(|d| d.instance)
}

#[test]
fn held_snapshots_go_after_their_holder() {
    let Some(disk) = Disk::new("held") else { return };
    let old = pattern(1, 1 << 20);
    write_at(&disk.node, 5 << 20, &old);
    run(std::process::Command::new("sync").arg("-d").arg(&disk.node));
    let guid = Guid::generate();
    let params = TemporaryParams { guid, target: None, options: None, snap_dir: None, with_holder: true };
    assert_eq!(snapshot::create_temporary(&disk.dd, "", &params).unwrap_err().kind(), Kind::Param);
    let taken = snapshot::create_temporary(&disk.dd, "backup", &params).unwrap();
    assert!(taken.holder.is_some());
    let ours = token(&taken.device).unwrap();
    write_at(&disk.node, 5 << 20, &pattern(2, 1 << 20));
    assert!(read_at(Path::new(&taken.device), 5 << 20, 1 << 20) == old);
    // Others come and go, it stays.
    let other = disk.snapshot();
    assert!(disk.there(&guid) && token(&taken.device).as_ref() == Some(&ours));
    drop(taken.holder);
    let last = disk.snapshot();
    assert!(!disk.there(&guid), "nobody uses it any more");
    // Another may have its number by now.
    assert_ne!(token(&taken.device), Some(ours));
    assert!(disk.there(&other) && disk.there(&last));
    assert!(read_at(&disk.node, 5 << 20, 1 << 20) == pattern(2, 1 << 20));
    umount_descriptor(&disk.dd, "").unwrap();
    ploop::ops::check::check_disk(&disk.dd, None).unwrap();
    assert_eq!(Descriptor::read(&disk.dd).unwrap().top, guid::TOP);
}

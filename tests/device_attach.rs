//! Devices: attached, found, detached.

mod device_common;

use std::fs;
use std::os::unix::fs::MetadataExt;

use device_common::*;
use ploop::device::{self, State};

#[test]
fn attach_list_write_detach() {
    let Some(t) = Bench::new("attach") else { return };
    let image = t.image("a.hdd", "64M");
    let device = t.attach_numbered(&image).unwrap();
    assert_eq!(device.state, State::Running);
    let node = device.node().to_path_buf();
    let meta = fs::metadata(&node).unwrap();
    assert_eq!((meta.rdev(), meta.mode() & 0o777), (device.rdev, 0o660));
    assert_eq!(device.sectors, 131072);
    let found = device::by_node(node.to_str().unwrap()).unwrap().unwrap();
    assert_eq!(found.state, State::Running);
    let by_base = device::by_base(&image, Some("")).unwrap();
    assert_eq!(by_base.len(), 1);
    assert_eq!(by_base[0].name(), device.name());
    assert!(device::by_base(&image, Some("other")).unwrap().is_empty());
    assert_eq!(device::mount_source(&device).unwrap(), node);

    let data = pattern(1, 1 << 20);
    write_at(&node, 3 << 20, &data);
    assert_eq!(read_at(&node, 3 << 20, 1 << 20), data);
    // Nothing but the node and the loop device shows it.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&format!("/run/ploop/{}/", device.name())));

    device::detach(device.name()).unwrap();
    t.assert_gone(&device);
    let device = t.attach(&image).unwrap();
    assert_eq!(read_at(device.node(), 3 << 20, 1 << 20), data);
    device::detach(device.node().to_str().unwrap()).unwrap();
    t.assert_gone(&device);
    t.sound(&image);
}

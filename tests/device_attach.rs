//! Devices: attached, found, detached.

mod device_common;

use std::fs;
use std::os::unix::fs::MetadataExt;

use device_common::*;
use ploop::device::{self, State};
use ploop::server::transport::{Patience, Transport, Wanted};

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

#[test]
fn a_bound_block_device_follows_the_size_of_its_file() {
    let Some(t) = Bench::new("capacity") else { return };
    let dir = t.dir.path().join("capacity");
    fs::create_dir(&dir).unwrap();
    let disk = fs::File::create_new(dir.join(ploop::server::transport::fuse_loop::DISK)).unwrap();
    disk.set_len(4 << 20).unwrap();
    let block_device = Transport::FuseLoop.binding();
    let wanted = Wanted { number: None, read_only: false, name: "capacity".into() };
    let mut made = Vec::new();
    let binding = block_device.bind(&dir, &wanted, &mut |b| {
        made.push(b.rdev);
        Ok(())
    });
    let binding = binding.unwrap();
    assert_eq!(made.last(), Some(&binding.rdev));
    assert_eq!(Transport::of(&binding.backing), Transport::FuseLoop);
    let sectors = || fs::read_to_string(format!("/sys/block/{}/size", binding.backing)).unwrap();
    assert_eq!(sectors().trim(), "8192");
    disk.set_len(6 << 20).unwrap();
    block_device.set_capacity(&binding).unwrap();
    assert_eq!(sectors().trim(), "12288");
    let patience = Patience { busy: std::time::Duration::from_secs(5), mounted: std::time::Duration::ZERO };
    block_device.unbind(&binding, patience, &mut || Ok(())).unwrap();
    assert!(!block_device.is_bound(&binding.backing));
    assert!(block_device.set_capacity(&binding).is_err());
}

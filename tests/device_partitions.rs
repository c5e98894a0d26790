//! Partitions and their nodes.

mod device_common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use device_common::*;
use ploop::Kind;
use ploop::device;
use ploop::server::nodes::block_node;
use ploop::server::partitions;

fn part(node: &Path, n: u32) -> PathBuf {
    format!("{}p{n}", node.display()).into()
}

fn parted(node: &Path, args: &[&str]) {
    run(Command::new("parted").arg("-s").arg(node).args(args));
}

#[test]
fn nodes_follow_parted_and_come_back() {
    let Some(t) = Bench::new("nodes_follow_parted_and_come_back") else { return };
    let image = t.image("a.hdd", "256M");
    let device = t.attach(&image).unwrap();
    let node = device.node().to_path_buf();
    parted(&node, &["mklabel", "gpt", "mkpart", "a", "1MiB", "33MiB", "mkpart", "b", "33MiB", "65MiB"]);
    for n in [1, 2] {
        within(1, "a node", || block_node(&part(&node, n)));
    }
    parted(&node, &["mkpart", "c", "65MiB", "200MiB"]);
    within(1, "the third node", || block_node(&part(&node, 3)));
    parted(&node, &["rm", "2"]);
    within(1, "the end of the second node", || (!part(&node, 2).exists()).then_some(()));
    // Each node is the partition of its number.
    let known = partitions::known(&device.disk);
    assert_eq!(known.iter().map(|p| p.number).collect::<Vec<_>>(), [1, 3]);
    for p in &known {
        let meta = fs::metadata(part(&node, p.number)).unwrap();
        assert_eq!((meta.rdev(), meta.mode() & 0o777, meta.uid()), (p.rdev, 0o660, 0));
    }
    assert_eq!(device::mount_source(&device).unwrap(), part(&node, 1));
    run(Command::new("mkfs.ext4").arg("-q").arg(part(&node, 3)));
    let target = t.dir.path().join("mnt");
    fs::create_dir(&target).unwrap();
    run(Command::new("mount").arg(part(&node, 3)).arg(&target));
    fs::write(target.join("hello"), "world").unwrap();
    let e = device::detach(device.name()).unwrap_err();
    assert_eq!(e.kind(), Kind::DevIoc, "{e}");
    assert!(block_node(&part(&node, 1)).is_some());
    run(Command::new("umount").arg(&target));
    device::detach(device.name()).unwrap();
    t.assert_gone(&device);

    // A new device of the image has its partitions at once.
    let device = t.attach(&image).unwrap();
    let node = device.node();
    assert!(block_node(&part(node, 1)).is_some() && block_node(&part(node, 3)).is_some());
    assert!(!part(node, 2).exists());
    run(Command::new("mount").args(["-o", "ro"]).arg(part(node, 3)).arg(&target));
    assert_eq!(fs::read(target.join("hello")).unwrap(), b"world");
    run(Command::new("umount").arg(&target));
    // What tells the kernel to read the table again ends in the same nodes, where it cannot read it too.
    let _ = output(Command::new("blockdev").arg("--rereadpt").arg(node));
    within(3, "the partitions", || (partitions::known(&device.disk).len() == 2).then_some(()));
    within(3, "the nodes", || block_node(&part(node, 3)));
    device::detach(device.name()).unwrap();
    t.assert_gone(&device);
    t.sound(&image);
}

#[test]
fn a_busy_device_stays_as_it_was() {
    let Some(t) = Bench::new("a_busy_device_stays_as_it_was") else { return };
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    let node = device.node().to_path_buf();
    parted(&node, &["mklabel", "gpt", "mkpart", "a", "1MiB", "33MiB"]);
    within(1, "a node", || block_node(&part(&node, 1)));
    let held = fs::File::open(&node).unwrap();
    let name = device.name().to_string();
    let stop = std::thread::spawn(move || device::detach(&name));
    pause(3000);
    assert!(!stop.is_finished());
    // A reader like udev, that looks for a while, is waited for.
    drop(held);
    stop.join().unwrap().unwrap();
    t.assert_gone(&device);
}

//! Names that cannot lie: recycled loop devices, stale nodes, names given by the user, strangers' files.

mod device_common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard};

use device_common::*;
use nix::sys::stat::{Mode, SFlag, mknod};
use ploop::Kind;
use ploop::device::{self, AttachSpec, State, served};
use ploop::server::runtime;

/// A loop device over a file of noise, with a chosen number.
struct Stranger {
    device: PathBuf,
    file: PathBuf,
    content: Vec<u8>,
}

impl Stranger {
    fn take(t: &Bench, backing: &str) -> Stranger {
        let file = t.dir.path().join("stranger");
        let content = pattern(77, 1 << 20);
        fs::write(&file, &content).unwrap();
        let device = Path::new("/dev").join(backing);
        // Opening a node of that number makes the device.
        run(Command::new("losetup").arg(&device).arg(&file));
        Stranger { device, file, content }
    }

    /// Reads and writes that the kernel has counted for it.
    fn traffic(&self) -> String {
        let name = self.device.file_name().unwrap().to_str().unwrap();
        let stat = fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
        let fields: Vec<&str> = stat.split_whitespace().collect();
        format!("reads {} writes {}", fields[0], fields[4])
    }

    fn untouched(&self) {
        run(Command::new("losetup").arg(&self.device));
        assert!(fs::read(&self.file).unwrap() == self.content, "a stranger's disk was changed");
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = output(Command::new("losetup").arg("-d").arg(&self.device));
        // The number was made for the test.
        if let Some(n) = self.device.to_str().and_then(|d| d.strip_prefix("/dev/loop")?.parse().ok())
            && let Ok(control) = fs::File::options().read(true).write(true).open("/dev/loop-control")
        {
            let _ = ploop::sys::loopdev::remove(std::os::fd::AsFd::as_fd(&control), n);
        }
    }
}

/// One test at a time: an attach in one cleans what another has just killed, and takes the loop number that it gives away.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(|e| e.into_inner())
}

#[test]
fn recycled_loop_device() {
    let _alone = alone();
    let Some(t) = Bench::new("recycled_loop_device") else { return };
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    let r = served::record(&device);
    let pid = nix::unistd::Pid::from_raw(r.worker.pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    kill(r.supervisor);
    kill(r.worker);
    // The crashed device is detached by somebody, and its number given to another file.
    let loop_node = Path::new("/dev").join(&r.backing);
    run(Command::new("losetup").arg("-d").arg(&loop_node));
    within(5, "the end of the loop device", || (!runtime::is_bound(&r.backing)).then_some(()));
    let stranger = Stranger::take(&t, &r.backing);
    assert_eq!(fs::metadata(&stranger.device).unwrap().rdev(), r.rdev);
    let before = stranger.traffic();
    // Our node still names that number.
    assert!(device.node().exists());

    assert!(!runtime::backing_is_ours(r));
    assert_eq!(device::by_node(device.name()).unwrap().unwrap().state, State::Dead);
    assert_eq!(device::mount_source(&device).unwrap_err().kind(), Kind::Device);
    device::clean(device.name()).unwrap();
    assert!(!device.node().exists() && !runtime::device_dir(device.name()).exists());
    assert_eq!(stranger.traffic(), before);
    stranger.untouched();
}

#[test]
fn detached_behind_our_back() {
    let _alone = alone();
    let Some(t) = Bench::new("detached_behind_our_back") else { return };
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    let data = pattern(5, 1 << 16);
    write_at(device.node(), 4096, &data);
    run(Command::new("losetup").arg("-d").arg(Path::new("/dev").join(&device.disk)));
    // Its names go, the image is closed as after a clean stop.
    within(10, "the end of the device", || (!runtime::device_dir(device.name()).exists()).then_some(()));
    assert!(!device.node().exists());
    let end = std::time::Instant::now();
    while runtime::alive(served::record(&device).supervisor) {
        assert!(end.elapsed().as_secs() < 5);
        pause(10);
    }
    let _ = ploop::sys::loopdev::remove(
        std::os::fd::AsFd::as_fd(&fs::File::options().read(true).write(true).open("/dev/loop-control").unwrap()),
        device.disk.strip_prefix("loop").unwrap().parse().unwrap(),
    );
    t.sound(&image);
    let device = t.attach(&image).unwrap();
    assert_eq!(read_at(device.node(), 4096, data.len()), data);
    device::detach(device.name()).unwrap();
}

#[test]
fn names_given_by_the_user() {
    let _alone = alone();
    let Some(t) = Bench::new("names_given_by_the_user") else { return };
    let image = t.image("a.hdd", "64M");
    let name = format!("ploop-test-{}", std::process::id());
    let node = Path::new("/dev").join(&name);
    let named = |device: &str| {
        let mut spec = t.spec(&image);
        spec.device = Some(device.into());
        device::attach(spec)
    };
    // Somebody's file, and somebody's node.
    fs::write(&node, "mine").unwrap();
    let e = named(node.to_str().unwrap()).unwrap_err();
    assert_eq!((e.kind(), fs::read(&node).unwrap()), (Kind::Busy, b"mine".to_vec()), "{e}");
    fs::remove_file(&node).unwrap();
    mknod(&node, SFlag::S_IFBLK, Mode::from_bits_truncate(0o600), nix::sys::stat::makedev(7, 7)).unwrap();
    assert_eq!(named(&name).unwrap_err().kind(), Kind::Busy);
    assert_eq!(fs::metadata(&node).unwrap().rdev(), nix::sys::stat::makedev(7, 7));
    fs::remove_file(&node).unwrap();
    for bad in ["/dev/../etc/passwd", "/dev/a/b", "", "/tmp/x"] {
        assert_eq!(named(bad).unwrap_err().kind(), Kind::Param, "{bad}");
    }

    let device = named(node.to_str().unwrap()).unwrap();
    assert_eq!((device.node(), device.name()), (node.as_path(), name.as_str()));
    let e = named(&name).unwrap_err();
    assert_eq!(e.kind(), Kind::Busy, "{e}");
    // Nor is it given out twice, and the image that was refused it is left alone, unmarked.
    let other = t.image("b.hdd", "64M");
    let before = fs::read(&other).unwrap();
    let e = device::attach(AttachSpec { device: Some(name.clone()), ..t.spec(&other) }).unwrap_err();
    assert_eq!(e.kind(), Kind::Busy, "{e}");
    assert!(fs::read(&other).unwrap() == before, "a failed attach changed the image");
    assert_eq!(device::by_node(&name).unwrap().unwrap().state, State::Running);
    device::detach(&name).unwrap();
    t.assert_gone(&device);
}

#[test]
fn stale_nodes_are_refused() {
    let _alone = alone();
    let Some(t) = Bench::new("stale_nodes_are_refused") else { return };
    let node = Path::new("/dev/ploop77123");
    mknod(node, SFlag::S_IFBLK, Mode::from_bits_truncate(0o600), nix::sys::stat::makedev(7, 7)).unwrap();
    let e = device::by_node("/dev/ploop77123").unwrap_err();
    assert_eq!(e.kind(), Kind::Device);
    assert!(e.to_string().contains("stale"), "{e}");
    assert_eq!(device::detach("ploop77123").unwrap_err().kind(), Kind::DevNotMounted);
    fs::remove_file(node).unwrap();

    // A node of another disk under a running device's name.
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    assert_eq!(device::by_node("ploop77123").unwrap(), None);
    fs::remove_file(device.node()).unwrap();
    mknod(device.node(), SFlag::S_IFBLK, Mode::from_bits_truncate(0o600), nix::sys::stat::makedev(7, 7)).unwrap();
    assert_eq!(device::by_node(device.name()).unwrap_err().kind(), Kind::Device);
    assert_eq!(device::mount_source(&device).unwrap_err().kind(), Kind::Mknod);
    // It is not ours to remove.
    device::detach(device.name()).unwrap();
    assert!(device.node().exists());
    fs::remove_file(device.node()).unwrap();
    t.assert_gone(&device);
}

#[test]
fn earlier_boot() {
    let _alone = alone();
    let Some(t) = Bench::new("earlier_boot") else { return };
    let name = format!("ploop-boot-{}", std::process::id());
    let dir = runtime::make_run_dir().unwrap().join(&name);
    fs::create_dir(&dir).unwrap();
    let me = runtime::process(std::process::id() as i32).unwrap();
    let record = ploop::server::proto::DeviceRecord {
        version: 1,
        name: name.clone(),
        node: Path::new("/dev").join(&name),
        backing: "loop0".into(),
        rdev: nix::sys::stat::makedev(7, 0),
        supervisor: me,
        worker: me,
        state: "running".into(),
        boot: "another".into(),
        ..Default::default()
    };
    runtime::write_record(&dir, &record).unwrap();
    assert_eq!(device::by_node(&name).unwrap().unwrap().state, State::Dead);
    device::clean(&name).unwrap();
    assert!(!dir.exists());
    drop(t);
}

#[test]
fn failed_attach_leaves_nothing() {
    let _alone = alone();
    let Some(t) = Bench::new("failed_attach_leaves_nothing") else { return };
    let bad = t.dir.path().join("bad.hdd");
    fs::write(&bad, pattern(1, 1 << 20)).unwrap();
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    // Not an image, and an image that is being written.
    for file in [&bad, &image] {
        let e = t.attach(file).unwrap_err();
        println!("{e:?}");
        let ours: Vec<_> = device::list().unwrap().into_iter().filter(|d| d.top().starts_with(t.dir.path())).collect();
        assert_eq!(ours.len(), 1);
    }
    assert_eq!(fs::read(&bad).unwrap(), pattern(1, 1 << 20));
    let loops = run(Command::new("losetup").arg("-a"));
    assert!(!loops.contains("bad.hdd"), "{loops}");
    device::detach(device.name()).unwrap();
    t.assert_gone(&device);
}

/// losetup and /sys show whose a loop device is; one that losetup was told to end is shown so, and is closed cleanly.
#[test]
fn the_loop_device_tells_its_image_and_that_losetup_ends_it() {
    let _alone = alone();
    let Some(t) = Bench::new("the_loop_device_tells_its_image") else { return };
    let image = t.image("a disk.hdd", "64M");
    let device = t.attach(&image).unwrap();
    let file = fs::read_to_string(format!("/sys/block/{}/loop/backing_file", device.disk)).unwrap();
    assert_eq!(file.trim_end(), format!("/ploop:{}", image.canonicalize().unwrap().display()));
    let data = pattern(1, 8192);
    write_at(device.node(), 1 << 20, &data);
    let user = fs::File::open(device.node()).unwrap();
    run(Command::new("losetup").arg("-d").arg(Path::new("/dev").join(&device.disk)));
    let listed = |word: &str| {
        run(Command::new(env!("CARGO_BIN_EXE_ploop")).arg("list"))
            .lines()
            .any(|l| l.starts_with(device.name()) && l.ends_with(word))
    };
    assert!(listed(" ending"));
    assert_eq!(read_at(device.node(), 1 << 20, data.len()), data);
    drop(user);
    within(10, "the end of the device", || device::by_node(device.name()).unwrap().is_none().then_some(()));
    t.sound(&image);
    let again = t.attach(&image).unwrap();
    assert_eq!(read_at(again.node(), 1 << 20, data.len()), data);
    device::detach(again.name()).unwrap();
}

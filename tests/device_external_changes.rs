//! Other processes cut, replace and remove the image files of a running device.
//!
//! The worker never makes up data: reads of what is gone fail with EIO, never return zeroes. It serves the files that it
//! opened, whatever the names lead to by now, and never touches files that took their place.
//!
//! Another process may also freeze and thaw the file system on a device: it is told when it was not frozen all the time.

mod device_common;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use device_common::*;
use ploop::device::{self, Device, served};
use ploop::server::runtime;
use ploop::sys::aligned::AlignedBuf;

const MIB: u64 = 1 << 20;

fn ploop() -> Command {
    Command::new(env!("CARGO_BIN_EXE_ploop"))
}

/// Past every cache.
fn read(node: &Path, at: u64, len: usize) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(node)?;
    let mut buf = AlignedBuf::new(len);
    file.read_exact_at(&mut buf, at)?;
    Ok(buf.to_vec())
}

fn write(node: &Path, at: u64, data: &[u8]) -> io::Result<()> {
    let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(node)?;
    let mut buf = AlignedBuf::new(data.len());
    buf.copy_from_slice(data);
    file.write_all_at(&buf, at)?;
    file.sync_data()
}

fn is_eio<T: std::fmt::Debug>(result: io::Result<T>, what: &str) {
    match result {
        Err(e) => assert_eq!(e.raw_os_error(), Some(libc::EIO), "{what}: {e}"),
        Ok(_) => panic!("{what}: no error"),
    }
}

fn bytes_on_disk(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

/// Ends a device whose image is spoiled.
fn give_up(device: &Device) {
    if device::detach(device.name()).is_err() {
        let _ = device::abort(device.name());
        let _ = device::clean(device.name());
    }
}

/// The worker dies and another one takes over, or cannot.
fn another_worker(device: &Device) {
    let old = record(device.name()).worker;
    kill(old);
    within(20, "another worker, or the state failed", || {
        let now = device::by_node(device.name()).unwrap()?;
        let other = served::record(&now).worker != old && runtime::alive(served::record(&now).worker);
        (other || now.state == device::State::Failed).then_some(())
    });
}

#[test]
fn a_top_that_is_cut_reads_as_errors() {
    let Some(t) = Bench::new("a_top_that_is_cut_reads_as_errors") else { return };
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    for i in 0..16 {
        write(device.node(), i * MIB, &pattern(i, MIB as usize)).unwrap();
    }
    let len = fs::metadata(&image).unwrap().len();
    // Cluster 15 lies last; a half of it and all behind go.
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    let end = 1 + 15;
    assert!(len > end * MIB, "{len}");
    file.set_len(end * MIB + MIB / 2).unwrap();
    is_eio(read(device.node(), 15 * MIB, MIB as usize), "a cluster that is cut");
    is_eio(read(device.node(), 15 * MIB + MIB / 2, 4096), "what is behind the end");
    // The rest is what it was, and can be written.
    for i in 0..15 {
        assert_eq!(read(device.node(), i * MIB, MIB as usize).unwrap(), pattern(i, MIB as usize), "cluster {i}");
    }
    write(device.node(), 3 * MIB, &pattern(33, 8192)).unwrap();
    assert_eq!(read(device.node(), 3 * MIB, 8192).unwrap(), pattern(33, 8192));
    // Nothing was made of it: zeroes are allowed only where a process wrote past the end, and none did.
    is_eio(read(device.node(), 15 * MIB + MIB / 2, 4096), "the same again");
    // A new worker does not take it for whole: the device waits, failed, until it is given up.
    another_worker(&device);
    let state = within(20, "the state failed", || {
        device::by_node(device.name()).unwrap().map(|d| d.state).filter(|s| *s != device::State::Running)
    });
    assert_eq!(state, device::State::Failed);
    give_up(&device);
    t.assert_gone(&device);
    let checked = output(ploop().arg("check").arg("-f").arg(&image));
    assert!(!checked.status.success(), "{checked:?}");
}

#[test]
fn a_lower_image_that_is_cut_reads_as_errors() {
    let Some(t) = Bench::new("a_lower_image_that_is_cut_reads_as_errors") else { return };
    let (base, top) = (t.image("base", "64M"), t.image("top", "64M"));
    let device = t.attach(&base).unwrap();
    for i in 0..8 {
        write(device.node(), i * MIB, &pattern(i, MIB as usize)).unwrap();
    }
    device::detach(device.name()).unwrap();
    let mut spec = t.spec(&top);
    spec.levels.splice(..0, t.spec(&base).levels);
    let device = device::attach(spec).unwrap();
    write(device.node(), 2 * MIB + 4096, &pattern(99, 4096)).unwrap();
    let before = bytes_on_disk(&top);
    OpenOptions::new().write(true).open(&base).unwrap().set_len(4 * MIB).unwrap();
    is_eio(read(device.node(), 6 * MIB, 4096), "a cluster of the base that is gone");
    // A part of it cannot be copied up: the write fails, and no cluster half of zeroes comes to be.
    is_eio(write(device.node(), 6 * MIB + 8192, &pattern(5, 4096)), "a part of a cluster that is gone");
    is_eio(read(device.node(), 6 * MIB, 4096), "the same afterwards");
    // What is whole goes on.
    write(device.node(), MIB + 8192, &pattern(6, 4096)).unwrap();
    assert_eq!(read(device.node(), MIB + 8192, 4096).unwrap(), pattern(6, 4096));
    let mut mixed = pattern(2, MIB as usize);
    mixed[4096..8192].copy_from_slice(&pattern(99, 4096));
    assert_eq!(read(device.node(), 2 * MIB, MIB as usize).unwrap(), mixed);
    device::detach(device.name()).unwrap();
    t.assert_gone(&device);
    assert_ne!(bytes_on_disk(&top), before);
    t.sound_delta(&top);
}

/// Another file takes the name of the image: it is never touched, and what is written is in the old one.
#[test]
fn a_replaced_image_is_left_alone() {
    let Some(t) = Bench::new("a_replaced_image_is_left_alone") else { return };
    let dir = t.dir.path();
    let image = dir.join("root.hdd");
    run(ploop().args(["init", "-s", "64m", "-t", "none"]).arg(&image));
    let dd = dir.join("DiskDescriptor.xml");
    let node = PathBuf::from(format!("/dev/ploop-test-{}-replaced", std::process::id()));
    run(ploop().args(["mount", "-d"]).arg(&node).arg(&dd));
    let device = device::by_node(&node.to_string_lossy()).unwrap().unwrap();
    write(&node, MIB, &pattern(1, 8192)).unwrap();
    let kept = dir.join("kept");
    fs::hard_link(&image, &kept).unwrap();
    // Like an editor, or rsync: a new file, renamed over it.
    let stranger = dir.join("stranger");
    fs::copy(&image, &stranger).unwrap();
    fs::rename(&stranger, &image).unwrap();
    let (sum, ino) = (bytes_on_disk(&image), fs::metadata(&image).unwrap().ino());
    write(&node, 2 * MIB, &pattern(2, 8192)).unwrap();
    another_worker(&device);
    assert_eq!(read(&node, MIB, 8192).unwrap(), pattern(1, 8192));
    assert_eq!(read(&node, 2 * MIB, 8192).unwrap(), pattern(2, 8192));
    write(&node, 3 * MIB, &pattern(3, 8192)).unwrap();
    // What goes by the descriptor sees that it is another file, and changes nothing.
    let before = fs::read(&dd).unwrap();
    let words = [&["snapshot"][..], &["mount"], &["check"], &["snapshot-merge", "-A"], &["snapshot-switch", "-u"]];
    let unknown = "{dddddddd-0000-4000-8000-00000000dddd}";
    for args in words {
        let guid = args.last().filter(|a| **a == "-u").map(|_| unknown);
        let refused = output(ploop().args(args).args(guid).arg(&dd));
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        println!("{args:?}: {} {said}", refused.status);
        assert!(!refused.status.success(), "{args:?}: {refused:?}");
        assert!(guid.is_some() || args.len() > 1 || said.contains("has taken its place"), "{args:?}: {said}");
    }
    assert_eq!(fs::read(&dd).unwrap(), before);
    assert_eq!(bytes_on_disk(&image), sum);
    run(ploop().args(["umount", "-d"]).arg(&node));
    t.assert_gone(&device);
    assert_eq!((bytes_on_disk(&image), fs::metadata(&image).unwrap().ino()), (sum, ino));
    // All that was written is where it belongs.
    t.sound(&kept);
    let again = t.attach(&kept).unwrap();
    for i in 1..4 {
        assert_eq!(read(again.node(), i * MIB, 8192).unwrap(), pattern(i, 8192), "{i}");
    }
    device::detach(again.name()).unwrap();
}

/// A disk is moved with its folder while it runs; another one takes the old place: both work.
#[test]
fn a_moved_disk_is_not_in_the_way() {
    let Some(t) = Bench::new("a_moved_disk_is_not_in_the_way") else { return };
    let (old, new) = (t.dir.path().join("old"), t.dir.path().join("new"));
    let node = |n: u32| PathBuf::from(format!("/dev/ploop-test-{}-moved{n}", std::process::id()));
    let make = |n: u32| {
        fs::create_dir(&old).unwrap();
        run(ploop().args(["init", "-s", "64m", "-t", "none"]).arg(old.join("root.hdd")));
        run(ploop().args(["mount", "-d"]).arg(node(n)).arg(old.join("DiskDescriptor.xml")));
        write(&node(n), MIB, &pattern(u64::from(n), 8192)).unwrap();
    };
    make(1);
    fs::rename(&old, &new).unwrap();
    make(2);
    for (n, dir) in [(1, &new), (2, &old)] {
        let dd = dir.join("DiskDescriptor.xml");
        run(ploop().arg("snapshot").arg(&dd));
        run(ploop().arg("umount").arg(&dd));
        run(ploop().args(["mount", "-d"]).arg(node(n)).arg(&dd));
        assert_eq!(read(&node(n), MIB, 8192).unwrap(), pattern(u64::from(n), 8192));
        run(ploop().args(["snapshot-merge", "-A"]).arg(&dd));
        run(ploop().arg("umount").arg(&dd));
        run(ploop().arg("check").arg(&dd));
    }
}

/// The name is gone: the disk goes on, even with another worker, and closes well.
#[test]
fn a_removed_image_serves_to_the_end() {
    let Some(t) = Bench::new("a_removed_image_serves_to_the_end") else { return };
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    let open = File::open(&image).unwrap();
    write(device.node(), MIB, &pattern(1, 8192)).unwrap();
    fs::remove_file(&image).unwrap();
    write(device.node(), 2 * MIB, &pattern(2, 8192)).unwrap();
    another_worker(&device);
    assert_eq!(read(device.node(), MIB, 8192).unwrap(), pattern(1, 8192));
    write(device.node(), 3 * MIB, &pattern(3, 8192)).unwrap();
    device::detach(device.name()).unwrap();
    t.assert_gone(&device);
    // What is left of it is a closed image.
    let copy = t.dir.path().join("copy");
    io::copy(&mut &open, &mut File::create(&copy).unwrap()).unwrap();
    t.sound(&copy);
    let again = t.attach(&copy).unwrap();
    for i in 1..4 {
        assert_eq!(read(again.node(), i * MIB, 8192).unwrap(), pattern(i, 8192), "{i}");
    }
    device::detach(again.name()).unwrap();
}

/// A device that no worker could serve goes on when the image is right again: nothing of what waited is lost.
#[test]
fn tried_again_when_the_image_is_right() {
    let Some(t) = Bench::new("tried_again_when_the_image_is_right") else { return };
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    write(device.node(), MIB, &pattern(1, 8192)).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&image).unwrap();
    let mut header = vec![0; 64];
    file.read_exact_at(&mut header, 0).unwrap();
    file.write_all_at(&[0xaa; 64], 0).unwrap();
    another_worker(&device);
    let failed = || device::by_node(device.name()).unwrap().is_some_and(|d| d.state == device::State::Failed);
    within(20, "the state failed", || failed().then_some(()));
    std::thread::scope(|s| {
        let waiting = s.spawn(|| write(device.node(), 2 * MIB, &pattern(2, 8192)));
        pause(300);
        assert!(!waiting.is_finished());
        let e = device::reload(device.name()).unwrap_err();
        assert!(e.to_string().contains("no worker can serve it"), "{e}");
        assert!(failed() && !waiting.is_finished());
        file.write_all_at(&header, 0).unwrap();
        device::reload(device.name()).unwrap();
        waiting.join().unwrap().unwrap();
    });
    assert!(!failed());
    // Now it is like any other: its worker is replaced, the program as well.
    another_worker(&device);
    device::reload(device.name()).unwrap();
    for i in 1..3 {
        assert_eq!(read(device.node(), i * MIB, 8192).unwrap(), pattern(i, 8192));
    }
    let device = device::by_node(device.name()).unwrap().unwrap();
    device::detach(device.name()).unwrap();
    t.assert_gone(&device);
    t.sound(&image);
}

/// Output and error of a command, and its exit code.
fn said(args: &[&str], last: &Path) -> (i32, String) {
    let out = ploop().args(args).arg(last).output().unwrap();
    let text = [out.stdout, out.stderr].concat();
    (out.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
}

/// Renamed or deleted images do not hide the device from its descriptor, and deleted ones are not lost by umount: it copies
/// them back, or gives them up where the caller says so.
#[test]
fn deleted_and_renamed_images_are_named_and_copied_back() {
    let Some(t) = Bench::new("deleted_and_renamed_images_are_named_and_copied_back") else { return };
    let folder = t.dir.path().canonicalize().unwrap().join("disk");
    fs::create_dir(&folder).unwrap();
    let (base, dd, point) = (folder.join("root.hdd"), folder.join("DiskDescriptor.xml"), folder.join("mnt"));
    fs::create_dir(&point).unwrap();
    let node = PathBuf::from(format!("/dev/ploop-test-{}-deleted", std::process::id()));
    let mount = || run(ploop().args(["mount", "-d"]).arg(&node).arg("-m").arg(&point).arg(&dd));
    let running = || {
        let (code, text) = said(&["info", "-d"], &dd);
        assert_eq!((code, text.contains(node.to_str().unwrap())), (0, true), "{text}");
    };
    run(ploop().args(["init", "-s", "64m"]).arg(&base));
    mount();
    fs::write(point.join("one"), pattern(1, 300_000)).unwrap();
    run(ploop().arg("snapshot").arg(&dd));
    fs::write(point.join("two"), pattern(2, 300_000)).unwrap();

    // Renamed: the device is found, its file is named.
    let elsewhere = folder.join("elsewhere");
    fs::rename(&base, &elsewhere).unwrap();
    running();
    let (code, text) = said(&["umount"], &dd);
    assert!(code == 0 && text.contains(&format!("mv {} {}", elsewhere.display(), base.display())), "{code}: {text}");
    fs::rename(&elsewhere, &base).unwrap();

    // Deleted, base and top.
    mount();
    fs::write(point.join("three"), pattern(3, 300_000)).unwrap();
    let disk = ploop::descriptor::Descriptor::read(&dd).unwrap();
    let files: Vec<PathBuf> = disk.images.iter().map(|i| i.file.clone()).collect();
    for file in &files {
        fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
        std::os::unix::fs::chown(file, Some(12), Some(34)).unwrap();
        fs::remove_file(file).unwrap();
    }
    running();
    let (_, text) = said(&["list", "-a"], Path::new("--json"));
    assert!(files.iter().all(|f| text.contains(&format!("\"{}\"", f.display()))), "{text}");
    let (_, text) = said(&["doctor"], Path::new("--json"));
    assert!(text.contains("deleted while the disk runs") && text.contains("--save-deleted"), "{text}");
    for target in [&dd, &node, &point, &base] {
        let (code, text) = said(&["umount"], target);
        assert!(
            code == 22 && text.contains("--save-deleted") && text.contains("nothing was changed"),
            "{code}: {text}"
        );
    }
    assert_eq!(fs::read(point.join("three")).unwrap(), pattern(3, 300_000));
    // A name that is taken.
    fs::write(&base, "another file").unwrap();
    let (code, text) = said(&["umount", "--save-deleted"], &node);
    assert!(code == 1 && text.contains("another file has its name"), "{code}: {text}");
    assert!(fs::read(point.join("three")).is_ok() && !files[1].exists());
    fs::remove_file(&base).unwrap();
    // In use: nothing of the copies stays, and the next try makes them again.
    let user = fs::File::open(point.join("one")).unwrap();
    let (code, text) = said(&["umount", "--save-deleted"], &dd);
    let left: Vec<_> = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(code == 22 && !left.iter().any(|n| n.to_string_lossy().ends_with(".saving")), "{code}: {text}: {left:?}");
    assert!(files.iter().all(|f| !f.exists()), "{left:?}");
    drop(user);
    let before = fs::read_dir(&folder).unwrap().count();
    let (code, text) = said(&["umount", "--save-deleted"], &dd);
    assert!(code == 0 && text.contains("is there again"), "{code}: {text}");
    // Beside the images: the remembered size of the file system.
    let now = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
    assert!(now.len() <= before + 3 && !now.iter().any(|n| n.to_string_lossy().ends_with(".saving")), "{now:?}");
    for file in &files {
        let meta = fs::metadata(file).unwrap();
        assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (12, 34, 0o640));
        fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        std::os::unix::fs::chown(file, Some(0), Some(0)).unwrap();
    }
    run(ploop().arg("check").arg(&dd));
    mount();
    for (n, name) in [(1, "one"), (2, "two"), (3, "three")] {
        assert_eq!(fs::read(point.join(name)).unwrap(), pattern(n, 300_000), "{name}");
    }

    // Given up.
    fs::remove_file(&files[1]).unwrap();
    let (code, text) = said(&["umount", "--discard-deleted"], &dd);
    assert!(code == 0 && !files[1].exists() && !node.exists(), "{code}: {text}");
}

/// Thaws and unmounts, also when the test fails.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("-u").arg(self.0).output();
        let _ = Command::new("umount").arg(self.0).output();
    }
}

#[test]
fn a_freeze_that_another_process_ends_is_told() {
    let Some(t) = Bench::new("a_freeze_that_another_process_ends_is_told") else { return };
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    let point = t.dir.path().join("mnt");
    fs::create_dir(&point).unwrap();
    let run = |program: &str, args: &[&Path]| {
        let out = Command::new(program).args(args).output().unwrap();
        assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    };
    run("mkfs.ext4", &[Path::new("-q"), device.node()]);
    run("mount", &[device.node(), &point]);
    let mounted = Mounted(&point);
    let by_another = |flag: &str| run("fsfreeze", &[Path::new(flag), &point]);
    let is_frozen = || {
        let frozen = !Command::new("fsfreeze").arg("-f").arg(&point).output().unwrap().status.success();
        if !frozen {
            by_another("-u");
        }
        frozen
    };
    let frozen = || {
        let mut frozen = device::freeze(&device, vec![File::open(&point).unwrap()]).unwrap();
        frozen.freeze().unwrap();
        assert!(is_frozen());
        frozen
    };
    frozen().thaw().unwrap();
    assert!(!is_frozen());

    let mut thawed_early = frozen();
    by_another("-u");
    let e = thawed_early.thaw().unwrap_err();
    drop(thawed_early);
    assert!(e.to_string().contains("before its time"), "{e}");

    // Frozen by another process from the beginning to the end: that process thaws it.
    by_another("-f");
    frozen().thaw().unwrap();
    assert!(is_frozen());
    let mut thawed_early = frozen();
    by_another("-u");
    let e = thawed_early.thaw().unwrap_err();
    drop(thawed_early);
    assert!(e.to_string().contains("before its time"), "{e}");
    assert!(!is_frozen());

    drop(mounted);
    device::detach(device.name()).unwrap();
}

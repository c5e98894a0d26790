//! Binding a file to a loop device and letting it go. Runs in short-lived processes only: each of these calls may wait
//! for the device's own server.
#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::stat::{Mode, SFlag, major, makedev, minor, mknod};

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::server::sysfs::disk_identity;
use crate::server::transport::binding::{Binding, Patience};
use crate::server::{mounts, partitions};
use crate::sys::{loopdev, partition, processes};

/// How many numbers above the first choice are tried.
const TRIES: u32 = 1000;
/// Device number of /dev/loop-control, for a /dev that lacks it.
const CONTROL: (u64, u64) = (10, 237);
/// Between two tries at something busy.
const PAUSE: Duration = Duration::from_millis(50);
/// How long a detached device of the wanted number may take to disappear, until the next number is taken.
const REMOVAL: Duration = Duration::from_millis(300);
/// How long files of a file system that was unmounted lazily may be in use.
const LAZY: Duration = Duration::from_secs(6);
/// How long the kernel may take to unbind a device that no process holds any more.
const UNBIND: Duration = Duration::from_secs(20);

/// Opens a special file of /dev, or one made for the moment if /dev has none of that number.
fn open_special(name: &str, kind: SFlag, rdev: u64, options: &OpenOptions) -> io::Result<File> {
    let right = |meta: &fs::Metadata| {
        let same_kind = match kind {
            SFlag::S_IFBLK => meta.file_type().is_block_device(),
            _ => meta.file_type().is_char_device(),
        };
        same_kind && meta.rdev() == rdev
    };
    let path = Path::new("/dev").join(name);
    let file = if fs::symlink_metadata(&path).is_ok_and(|m| right(&m)) {
        options.open(&path)?
    } else {
        let own = PathBuf::from(format!("/dev/.ploop-{}-{name}", std::process::id()));
        mknod(&own, kind, Mode::from_bits_truncate(0o600), rdev)?;
        let file = options.open(&own);
        let _ = fs::remove_file(&own);
        file?
    };
    match right(&file.metadata()?) {
        true => Ok(file),
        false => Err(io::Error::from_raw_os_error(libc::ENODEV)),
    }
}

fn control() -> Result<File> {
    let options = OpenOptions::new().read(true).write(true).clone();
    open_special("loop-control", SFlag::S_IFCHR, makedev(CONTROL.0, CONTROL.1), &options)
        .ctx(Kind::Device, || "cannot open /dev/loop-control; the kernel needs the loop driver (modprobe loop)")
}

/// Opens exactly the disk that `binding` names; ESTALE: the loop device serves another file by now, or none.
pub fn open(binding: &Binding, flags: i32) -> io::Result<File> {
    let stale = || io::Error::from_raw_os_error(libc::ESTALE);
    if disk_identity(&binding.backing) != Some((binding.rdev, binding.diskseq)) {
        return Err(stale());
    }
    let options = OpenOptions::new().read(true).custom_flags(flags).clone();
    let file = open_special(&binding.backing, SFlag::S_IFBLK, binding.rdev, &options)?;
    // Asked of what was opened: the number may have got a new owner between the look and the opening.
    match binding.diskseq == 0 || partition::diskseq(file.as_fd())? == binding.diskseq {
        true => Ok(file),
        false => Err(stale()),
    }
}

/// A write stops the device's queue for tens of milliseconds: only where the value is another one.
fn set_queue(backing: &str, what: &str, value: &str) {
    let path = format!("/sys/block/{backing}/queue/{what}");
    let now = fs::read_to_string(&path).unwrap_or_default();
    let chosen = now.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or(now.trim(), |(name, _)| name);
    if chosen != value {
        // The device works without, only slower.
        let _ = fs::write(path, value);
    }
}

/// Makes requests as large as the queue takes them in one piece, and shows whether the disk under the image rotates: file
/// systems and databases choose by it.
pub fn tune(backing: &str, image: &Path) {
    set_queue(backing, "max_sectors_kb", "1024");
    if let Some(queue) = host_queue(image)
        && let Ok(rotates) = fs::read_to_string(queue.join("rotational"))
    {
        set_queue(backing, "rotational", rotates.trim());
    }
}

/// The queue of the disk that the file lies on, in /sys; none: it is on no disk, or not visible from here.
fn host_queue(file: &Path) -> Option<PathBuf> {
    let numbers = |dev: u64| PathBuf::from(format!("/sys/dev/block/{}:{}", major(dev), minor(dev)));
    let dev = fs::metadata(file).ok()?.dev();
    let disk = match numbers(dev) {
        disk if disk.exists() => disk,
        // btrfs numbers its subvolumes by itself: the disk is what is mounted there.
        _ => {
            let file = file.canonicalize().ok()?;
            let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
            let sources = mounts.lines().filter_map(|line| {
                let (left, right) = line.split_once(" - ")?;
                let point = Path::new(left.split(' ').nth(4)?);
                file.starts_with(point).then_some((point.as_os_str().len(), right.split(' ').nth(1)?))
            });
            let (_, source) = sources.max_by_key(|(depth, _)| *depth)?;
            numbers(fs::metadata(source).ok()?.rdev())
        }
    };
    let disk = disk.canonicalize().ok()?;
    // A partition has no queue of its own.
    [disk.join("queue"), disk.parent()?.join("queue")].into_iter().find(|queue| queue.is_dir())
}

/// Binds `disk` to a new loop device, its number `first` or above; `own`: no other name has that number. `chosen` learns
/// each device that is made, before it is bound; its error ends the attempt. `name` is what losetup shows.
pub fn attach(
    disk: &Path,
    (first, own): (u32, bool),
    read_only: bool,
    name: &str,
    chosen: &mut dyn FnMut(&Binding) -> Result<()>,
) -> Result<Binding> {
    let control = control()?;
    for n in first..first + TRIES {
        match loopdev::add(control.as_fd(), n) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
                if n > first || !own || !replaces(control.as_fd(), n) {
                    continue;
                }
            }
            Err(e) => return Err(Error::with(Kind::Loop, format!("cannot make the loop device {n}"), e)),
        }
        let backing = format!("loop{n}");
        let Some((rdev, _)) = disk_identity(&backing) else {
            bail!(Sysfs, "/sys/block/{backing}/dev cannot be read; is sysfs mounted at /sys?");
        };
        // The number is enough to find and undo it; the sequence number comes with the binding.
        let mut binding = Binding { backing, rdev, diskseq: 0 };
        if let Err(e) = chosen(&binding) {
            remove_unbound(&binding.backing, rdev);
            return Err(e);
        }
        set_queue(&binding.backing, "scheduler", "none");
        let options = OpenOptions::new().read(true).write(!read_only).clone();
        let device = open_special(&binding.backing, SFlag::S_IFBLK, rdev, &options)
            .ctx(Kind::Loop, || format!("cannot open /dev/{}", binding.backing))?;
        let file = match options.open(disk) {
            Ok(file) => file,
            Err(e) => {
                drop(device);
                remove_unbound(&binding.backing, rdev);
                return Err(Error::with(Kind::Open, format!("cannot open {}", disk.display()), e));
            }
        };
        let mut flags = loopdev::DIRECT_IO | loopdev::PARTSCAN;
        if read_only {
            flags |= loopdev::READ_ONLY;
        }
        match loopdev::configure(device.as_fd(), file.as_fd(), loopdev::Info::new(flags, name.as_bytes())) {
            Ok(()) => {}
            // Another process took the device since it was made, and keeps it.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => continue,
            Err(e) => {
                drop(device);
                remove_unbound(&binding.backing, rdev);
                let text = format!("LOOP_CONFIGURE of {} failed (Linux 5.8 or later is needed)", binding.backing);
                return Err(Error::with(Kind::Loop, text, e));
            }
        }
        binding.diskseq = disk_identity(&binding.backing).map_or(0, |(_, seq)| seq);
        return Ok(binding);
    }
    bail!(Loop, "all loop devices from {first} to {} are taken", first + TRIES - 1)
}

/// Ends an unbound loop device of the number that belongs to the wanted name, and makes it anew: a helper that was killed
/// has left it, or one is removing it just now. False: it stays.
fn replaces(control: BorrowedFd, n: u32) -> bool {
    let end = Instant::now() + REMOVAL;
    while !is_bound(&format!("loop{n}")) && Instant::now() < end {
        if loopdev::remove(control, n).is_err() {
            sleep(Duration::from_millis(5));
        }
        match loopdev::add(control, n) {
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {}
            made => return made.is_ok(),
        }
    }
    false
}

/// Takes the device out of use: opens it exclusively, calls `opened` (which removes its names) and unbinds it;
/// [`remove_unbound`] follows. Busy to the end: error 3, and all is as before, except that the names are gone.
pub fn detach(binding: &Binding, patience: Patience, opened: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    let start = Instant::now();
    let Some(device) = open_alone(binding, start, patience)? else {
        return opened();
    };
    opened()?;
    let end = start + patience.busy;
    let parts = partitions::known(&binding.backing);
    for part in &parts {
        while let Err(e) = partition::delete(device.as_fd(), part.number as i32) {
            match e.raw_os_error() {
                Some(libc::ENXIO) => break,
                Some(libc::EBUSY) if Instant::now() < end => sleep(PAUSE),
                _ => {
                    partitions::restore(&device, &parts);
                    let text = format!("partition {} of {} is in use", part.number, binding.backing);
                    return Err(Error::with(Kind::DevIoc, text, e));
                }
            }
        }
    }
    loop {
        match loopdev::clear(device.as_fd()) {
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => break,
            other => other.ctx(Kind::DevIoc, || format!("cannot unbind {}", binding.backing))?,
        }
        // With other openers the kernel only marks it, to be unbound whenever the last one goes. We want it now or not.
        let Ok(mut info) = loopdev::status(device.as_fd()) else { break };
        info.flags &= !loopdev::AUTOCLEAR;
        loopdev::set_status(device.as_fd(), &info)
            .ctx(Kind::DevIoc, || format!("cannot keep {} bound", binding.backing))?;
        if Instant::now() >= end {
            partitions::restore(&device, &parts);
            bail!(DevIoc, "{} is open in another process; close it and try again", binding.backing);
        }
        sleep(PAUSE);
    }
    drop(device);
    let end = Instant::now() + UNBIND;
    while still_bound(binding) {
        if Instant::now() >= end {
            bail!(DevIoc, "{} is still bound {} s after it was unbound", binding.backing, UNBIND.as_secs());
        }
        sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn still_bound(binding: &Binding) -> bool {
    is_bound(&binding.backing) && disk_identity(&binding.backing) == Some((binding.rdev, binding.diskseq))
}

/// Removes a loop device that nothing is bound to; the kernel refuses if that is not so. An unbound device is harmless:
/// it may stay if another process keeps it open for too long.
pub fn remove_unbound(backing: &str, rdev: u64) {
    let number = backing.strip_prefix("loop").and_then(|n| n.parse().ok());
    let (Some(number), Ok(control)) = (number, control()) else { return };
    let end = Instant::now() + Duration::from_secs(2);
    while disk_identity(backing).is_some_and(|(now, _)| now == rdev) && !is_bound(backing) {
        match loopdev::remove(control.as_fd(), number) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < end => sleep(Duration::from_millis(10)),
            _ => break,
        }
    }
}

/// The device opened exclusively; `None`: it serves us no more.
fn open_alone(binding: &Binding, start: Instant, patience: Patience) -> Result<Option<File>> {
    let mut looked = Duration::ZERO;
    loop {
        if !still_bound(binding) {
            return Ok(None);
        }
        match open(binding, libc::O_EXCL) {
            Ok(device) => return Ok(Some(device)),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ESTALE | libc::ENXIO | libc::ENODEV)) => return Ok(None),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                let numbers = mounts::numbers(&binding.backing, binding.rdev);
                let mounted = mounts::mounted_anywhere(&numbers);
                let limit = if mounted.is_some() { patience.mounted } else { patience.busy };
                let elapsed = start.elapsed();
                // A file system without a mount, in use by a process, does not go by waiting either.
                let held = mounted.is_none() && elapsed >= LAZY.min(limit) && elapsed >= looked;
                if held && let Some(text) = used_without_mount(&numbers) {
                    return Err(Error::with(Kind::DevIoc, format!("{} {text}", binding.backing), e));
                }
                if held {
                    looked = elapsed + Duration::from_secs(1);
                }
                if elapsed >= limit {
                    let where_ = mounted.map_or("in use by another process".into(), |m| format!("mounted at {m}"));
                    return Err(Error::with(Kind::DevIoc, format!("{} is {where_}", binding.backing), e));
                }
                sleep(PAUSE);
            }
            Err(e) => return Err(Error::with(Kind::DevIoc, format!("cannot open {}", binding.backing), e)),
        }
    }
}

/// Which processes use a file system on the device that is mounted nowhere any more (`umount -l`), for a message.
fn used_without_mount(numbers: &[u64]) -> Option<String> {
    let users = processes::using(numbers);
    let named: Vec<String> = users.iter().take(8).map(|pid| processes::shown(pid)).collect();
    (!named.is_empty()).then(|| {
        format!(
            "has no mount any more (umount -l), but files of it are in use by process {}; end these processes, then unmount it",
            named.join(", ")
        )
    })
}

/// Undoes an attach of unknown fate: whatever is bound to the device of number `rdev` came from the killed attach.
pub fn undo_attach(backing: &str, rdev: u64) -> Result<()> {
    let Some((now, diskseq)) = disk_identity(backing) else { return Ok(()) };
    if now != rdev {
        return Ok(());
    }
    let binding = Binding { backing: backing.into(), rdev, diskseq };
    // Bound to another program's file: the attach lost a race for the number.
    if is_bound(backing) && !names_our_file(backing) {
        return Ok(());
    }
    if is_bound(backing) {
        detach(&binding, Patience { busy: UNBIND, mounted: UNBIND }, &mut || Ok(()))?;
    }
    remove_unbound(backing, rdev);
    Ok(())
}

/// The file behind is one of our FUSE files: by name while its mount is there, too.
fn names_our_file(backing: &str) -> bool {
    let file = backing_file(backing);
    super::is_shown(&file) || Path::new(&file).starts_with("/run/ploop")
}

/// A loop device is bound to a file.
pub fn is_bound(backing: &str) -> bool {
    Path::new("/sys/block").join(backing).join("loop").exists()
}

/// What the kernel shows of a loop device's file: for one whose mount was detached its path in that.
pub fn backing_file(backing: &str) -> String {
    let file = fs::read_to_string(format!("/sys/block/{backing}/loop/backing_file")).unwrap_or_default();
    file.trim_end_matches('\n').to_string()
}

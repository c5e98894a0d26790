//! The loop device as the block device of a running device, and the end of a FUSE connection.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::error::{IoContext, Kind, Result};
use crate::server::transport::binding::{Binding, BlockBinding, Patience, Wanted};
use crate::sys::loopdev;

use super::{DISK, is_shown, loop_device, shown};

/// Loop devices are numbered from here, out of the way of programs that request the first free one.
const FIRST_LOOP: u32 = 10_000;
/// Device names with a number below this one get the loop device of that number; the others follow behind these.
const NUMBERED: u32 = 5_000;

#[derive(Debug)]
pub struct LoopBinding;

impl BlockBinding for LoopBinding {
    fn bind(&self, dir: &Path, wanted: &Wanted, chosen: &mut dyn FnMut(&Binding) -> Result<()>) -> Result<Binding> {
        let number = wanted.number.filter(|n| *n < NUMBERED);
        let first = (FIRST_LOOP + number.unwrap_or(NUMBERED), number.is_some());
        let mut disk = dir.join(DISK);
        if disk.is_dir() {
            disk.push(shown(&wanted.name));
        }
        loop_device::attach(&disk, first, wanted.read_only, &wanted.name, chosen)
    }

    fn is_bound(&self, backing: &str) -> bool {
        loop_device::is_bound(backing)
    }

    fn may_be_ours(&self, backing: &str) -> bool {
        is_shown(&loop_device::backing_file(backing))
    }

    fn open(&self, binding: &Binding, flags: i32) -> io::Result<File> {
        loop_device::open(binding, flags)
    }

    fn set_capacity(&self, binding: &Binding) -> Result<()> {
        let device =
            loop_device::open(binding, 0).ctx(Kind::Open, || format!("cannot open /dev/{}", binding.backing))?;
        // Kernels before 6.18 take over the size that they have cached: this has them ask for the file's attributes.
        loopdev::status(device.as_fd())
            .and_then(|_| loopdev::set_capacity(device.as_fd()))
            .ctx(Kind::DevIoc, || format!("{} cannot take over the size of its file", binding.backing))
    }

    fn unbind(&self, binding: &Binding, patience: Patience, opened: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        loop_device::detach(binding, patience, opened)
    }

    fn remove(&self, backing: &str, rdev: u64) {
        loop_device::remove_unbound(backing, rdev);
    }

    fn tune(&self, binding: &Binding, wanted: &Wanted) {
        loop_device::tune(&binding.backing, Path::new(&wanted.name));
    }

    fn undo(&self, backing: &str, rdev: u64) -> Result<()> {
        loop_device::undo_attach(backing, rdev)
    }

    /// By the control file system, mounted where no other process sees it.
    fn abort(&self, connection: u64) -> Result<()> {
        let none: Option<&str> = None;
        unshare(CloneFlags::CLONE_NEWNS).ctx(Kind::Sys, || "cannot make a mount namespace")?;
        match mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none) {
            // In a plain chroot the root folder is no mount point; what is mounted over /proc must still be seen by no
            // other process.
            Err(nix::errno::Errno::EINVAL) => mount(none, "/proc", none, MsFlags::MS_PRIVATE, none)
                .ctx(Kind::Mount, || "cannot make /proc private")?,
            other => other.ctx(Kind::Mount, || "cannot make / private")?,
        }
        // Any folder will do: the mount is seen by this process alone.
        mount(Some("none"), "/proc", Some("fusectl"), MsFlags::empty(), none)
            .ctx(Kind::Mount, || "cannot mount fusectl")?;
        let path = format!("/proc/{connection}/abort");
        let written =
            fs::OpenOptions::new().write(true).open(&path).and_then(|mut f| io::Write::write_all(&mut f, b"1"));
        written.ctx(Kind::Write, || format!("cannot write fusectl{path}"))
    }
}

//! `ploop send`: the sending end of a move.
//!
//! Frozen images go first; they do not change, so nothing is tracked meanwhile, and snapshots may be taken: their images are sent
//! then, too. The top of a running disk goes last, with its writes tracked, in rounds; its file systems are frozen for the
//! last one. The descriptor ends the stream, once it is certain that what was sent is still what the disk has.
#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;

use super::super::output::Output;
use super::super::reader::Reader;
use super::super::send::{self as top_of, Copying, Sent, Stop};
use super::kept::Kept;
use super::names;
use super::outgoing::{OutFile, Stream};
use super::stamp::Stamp;
use super::stream::BLOCK;
use crate::bail;
use crate::descriptor::{Descriptor, Image, LockedDescriptor};
use crate::device::Device;
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::header::Header;
use crate::image::lock::{LockedImage, Sharing};
use crate::image::open::{Access, open_level};
use crate::ops::maintenance::{self, Work};
use crate::ops::{disk_lock, image_set, online, recovery};
use crate::report;
use crate::report::progress::Progress;
use crate::sys::aligned::{ALIGN, AlignedBuf, read_full};
use crate::sys::stdio;

/// Snapshots and merges that may end while the frozen images are sent.
const TRIES: u32 = 20;
const READ: Access = Access { write: false, direct: true };

/// How a disk is sent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// For the shell: ends what writes to the disk.
    pub stop: Option<&'a OsStr>,
    pub compress: bool,
    /// A list of `ploop receive --kept`.
    pub kept: Option<&'a Path>,
}

/// Sends a disk to a descriptor that the caller named by its number: a pipe, a socket, a file. Messages would disturb a stream
/// on standard output or standard error: they are left out from then on.
pub fn send_by_number(descriptor: &Path, output: RawFd, options: &Options) -> Result<Sent> {
    let taken =
        stdio::duplicate(output).ctx(Kind::Param, || format!("descriptor {output} cannot be used for the disk"))?;
    if nix::unistd::isatty(&taken).unwrap_or(false) {
        bail!(Param, "the disk would go to a terminal: run ploop send DISK | ssh HOST ploop receive DIR");
    }
    match output {
        1 => report::set_verbose_level(report::NO_STDOUT),
        2 => report::silence(),
        _ => {}
    }
    let kept = options.kept.map(Kept::load).transpose()?.unwrap_or_default();
    let stop = Stop { command: options.stop, copied: [false, output == 1] };
    send(descriptor, taken, options.compress, kept, stop)
}

/// Errors: `Busy` (an image is in use elsewhere, clusters of the top are moved or merged, or it is copied already), `Param` (a
/// snapshot is half merged), `InUse` (an image was not closed), and those of [`crate::ops::copy::send_to_file`].
pub(super) fn send(descriptor: &Path, to: OwnedFd, compress: bool, kept: Kept, stop: Stop) -> Result<Sent> {
    let operation = report::cancel::begin();
    // What cannot be sent is refused before the stream begins.
    drop(open(descriptor)?);
    let mut sending = Sending { stream: Stream::begin(to, compress)?, kept, done: Vec::new() };
    for _ in 0..TRIES {
        let disk = open(descriptor)?;
        let left = sending.left(&disk)?;
        if left.is_empty() {
            let sent = sending.top(disk, stop)?;
            sent.tell();
            operation.end(true);
            return Ok(sent);
        }
        let (looked, place) = (disk.descriptor.clone(), disk.place.clone());
        drop(disk);
        for (image, name) in left {
            match hold(&looked, &image) {
                Ok(held) => sending.frozen(&looked, &image, &name, &held)?,
                // A merge or a deletion that has ended meanwhile has removed the image, or changed it.
                Err(_) if Descriptor::read_at(&place)? != looked => break,
                Err(e) => return Err(e),
            }
        }
    }
    bail!(Busy, "{}: its snapshots change all the time; send it when they are left alone", descriptor.display())
}

/// The sender's lock keeps merges away from the image.
fn hold(disk: &Descriptor, image: &Image) -> Result<LockedImage> {
    image_set::lock_image(disk, &image.file, READ, Sharing::Readers)
}

/// The disk as it can be sent: what interrupted operations left is finished.
fn open(descriptor: &Path) -> Result<LockedDescriptor> {
    let mut disk = disk_lock::open(descriptor)?;
    recovery::before_change(&mut disk)?;
    if let Some(why) = disk.snapshots.iter().find_map(|s| disk.half_merged(&s.guid)) {
        bail!(Param, "{why}");
    }
    names::of_images(&disk)?;
    Ok(disk)
}

/// A frozen image that was sent.
struct Done {
    name: String,
    stamp: Stamp,
}

struct Sending {
    stream: Stream,
    kept: Kept,
    done: Vec<Done>,
}

impl Sending {
    /// The frozen images that are not sent, or have changed since, with their names at the other end.
    fn left(&self, disk: &Descriptor) -> Result<Vec<(Image, String)>> {
        let mut left = Vec::new();
        for (image, name) in disk.images.iter().zip(names::of_images(disk)?) {
            if image.guid != disk.top && !self.is_done(disk, image, &name)? {
                left.push((image.clone(), name));
            }
        }
        Ok(left)
    }

    fn is_done(&self, disk: &Descriptor, image: &Image, name: &str) -> Result<bool> {
        let Some(done) = self.done.iter().find(|done| done.name == name) else { return Ok(false) };
        let now = File::from(open_level(&image.file, Some(&disk.dir))?);
        Ok(Stamp::of(&now)? == done.stamp)
    }

    fn frozen(&mut self, disk: &Descriptor, image: &Image, name: &str, held: &LockedImage) -> Result<()> {
        let stamp = Stamp::of(&held.file)?;
        self.whole(disk, image, name, held)?;
        self.done.retain(|done| done.name != name);
        self.done.push(Done { name: name.to_owned(), stamp });
        Ok(())
    }

    /// An image that no process writes to.
    fn whole(&mut self, disk: &Descriptor, image: &Image, name: &str, held: &LockedImage) -> Result<()> {
        let shown = image.file.display();
        if !disk.is_raw(image) && header_of(held)?.is_marked() {
            bail!(
                InUse,
                "image {shown} is marked in use, though no process writes to it: it was not closed; mount the disk once, or \
                 run ploop check, and send it then"
            );
        }
        report::say(0, format_args!("Sending {shown}"));
        let len = held.file.metadata().ctx(Kind::Fstat, || format!("cannot look at {shown}"))?.len();
        let file = held.file.try_clone().ctx(Kind::Open, || format!("cannot open {shown}"))?;
        let mut out = self.stream.file(name, self.kept.take(name))?;
        out.len = len;
        send_whole(file, len, &mut out).map_err(|e| e.context(shown))
    }

    /// The top, and the end.
    fn top(&mut self, disk: LockedDescriptor, stop: Stop) -> Result<Sent> {
        let Some(image) = disk.image(&disk.top).cloned() else {
            bail!(DiskDescr, "{}: the top has no image", disk.path.display())
        };
        let at = disk.images.iter().position(|i| i.guid == disk.top).unwrap_or_default();
        let name = names::of_images(&disk)?.swap_remove(at);
        let (looked, place) = (disk.descriptor.clone(), disk.place.clone());
        let mut sent = Sent::default();
        match image_set::writer(&disk)? {
            Some(device) => {
                online::check_chain(&disk, &device)?;
                maintenance::before(&device, Work::Copy)?;
                // From here on the chain stays as it is.
                let mut tracker = top_of::track(&device)?;
                drop(disk);
                let (device, file) = top_of::open_top(device.node())?;
                report::say(0, format_args!("Sending {}, which is in use", image.file.display()));
                let piece = tracker.cluster().max(BLOCK);
                let mut out = self.stream.file(&name, self.kept.take(&name))?;
                let quiesce = &mut || top_of::quiesce(&device, stop);
                sent = Copying::new(&mut *tracker, file, is_raw(&device), &mut out, piece)?.run(quiesce)?;
                self.end(&looked, &Descriptor::read_at(&place)?)?;
            }
            None => {
                let held = hold(&disk, &image)?;
                drop(disk);
                self.whole(&looked, &image, &name, &held)?;
                self.end(&looked, &Descriptor::read_at(&place)?)?;
            }
        }
        sent.bytes = self.stream.bytes;
        report::say(1, format_args!("{} bytes were there from an earlier try", self.stream.kept));
        Ok(sent)
    }

    /// The descriptor, if the disk is still what was sent.
    fn end(&mut self, sent: &Descriptor, now: &Descriptor) -> Result<()> {
        if now != sent || !self.left(now)?.is_empty() {
            bail!(
                Busy,
                "the snapshots of the disk in {} were changed while its top was sent; send it again, with what the receiver \
                 has kept (--kept)",
                sent.dir.display()
            );
        }
        let mut there = sent.clone();
        let names = names::of_images(sent)?;
        for (image, name) in there.images.iter_mut().zip(names) {
            image.file = there.dir.join(name);
        }
        there.normalise_top()?;
        self.stream.end(&there.to_xml()?)
    }
}

fn header_of(held: &LockedImage) -> Result<Header> {
    let mut head = AlignedBuf::new(ALIGN);
    let read =
        read_full(&held.file, &mut head, 0).ctx(Kind::Read, || format!("cannot read {}", held.path.display()))?;
    Header::parse(head.get(..read).unwrap_or_default()).map_err(|e| e.context(held.path.display()))
}

fn is_raw(device: &Device) -> bool {
    device.version.is_none()
}

fn send_whole(file: File, len: u64, out: &mut OutFile) -> Result<()> {
    let mut shown = Progress::begin("sending");
    let mut reader = Reader::new(file, BLOCK as usize)?;
    // In blocks of a file system.
    reader.ask(0..len, out.holes().map_or(0, |unit| unit.max(4096)));
    while let Some(piece) = reader.next()? {
        let data = piece.buf.get(..piece.len).unwrap_or_default();
        if !data.is_empty() {
            out.write(piece.at, data)?;
        }
        shown.at(piece.at, len);
        reader.sent(piece);
    }
    out.end()
}

/// An error of one end of a move on this machine, where the other end's may be the cause.
pub(super) fn cause(sender: Error, receiver: Option<Error>) -> Error {
    match receiver {
        Some(receiver) if sender.kind() == Kind::Write => receiver,
        _ => sender,
    }
}

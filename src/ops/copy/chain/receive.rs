//! `ploop receive`: the receiving end of a move.
//!
//! The disk grows in a folder of its own, `DIR.receiving`, which gets the name `DIR` when all of it is durable: what has the
//! name is whole. What an interrupted try has left there is used by the next one, block by block and only where the sender
//! names its sum, or replaced. What comes is taken for hostile: names are single components, no link is followed, nothing is
//! allocated by a number of the stream, and the images must be what the descriptor says.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::path::Path;

use super::super::receive::{Received, read_all};
use super::half::{Half, MARKER};
use super::incoming::Incoming;
use super::stream::{self, Kind as What, Record};
use super::{kept, names};
use crate::bail;
use crate::descriptor::{self, Descriptor};
use crate::error::{Error, IoContext, Kind, Result};
use crate::image::check::read_header;
use crate::report;
use crate::sys::{stdio, store};

/// What has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Arrived {
    /// Bytes of the images that the stream was about.
    pub bytes: u64,
    /// Of these, what was there from an earlier try.
    pub kept: u64,
}

/// Receives a disk from a descriptor that the caller named by its number: a pipe, a socket, a file. `DIR` must not exist.
pub fn receive_by_number(dir: &Path, input: RawFd) -> Result<Arrived> {
    let taken =
        stdio::duplicate(input).ctx(Kind::Param, || format!("descriptor {input} cannot be used for the disk"))?;
    if nix::unistd::isatty(&taken).unwrap_or(false) {
        bail!(Param, "the disk would come from a terminal: run ploop send DISK | ssh HOST ploop receive DIR");
    }
    receive(dir, taken.as_fd())
}

/// Writes the list of what an interrupted try has left: see [`kept`].
pub fn list_kept(dir: &Path, out: &mut dyn Write) -> Result<()> {
    let operation = report::cancel::begin();
    let left = Half::left(dir)?;
    writeln!(out, "{}", kept::FIRST).ctx(Kind::Write, || "cannot write the list")?;
    if let Some(half) = left {
        for name in half.names()? {
            if let Some(file) = half.open(&name)? {
                kept::write_file(out, &name, &file)?;
            }
        }
    }
    operation.end(true);
    Ok(())
}

/// See [`receive_by_number`]. Errors: `Creat` (`dir` exists), `Read` (the stream ends too early), `Protocol` (it is damaged,
/// or asks for what no disk has), `Write`. What has come is kept then.
pub fn receive(dir: &Path, input: BorrowedFd) -> Result<Arrived> {
    let operation = report::cancel::begin();
    Half::check_free(dir)?;
    // The sender begins when it has the list of what was kept: until then that list's maker has the folder.
    let mut start = [0; stream::START];
    read_all(input, &mut start, Received::default())?;
    stream::check_start(&start)?;
    let mut coming =
        Coming { half: Half::make(dir)?, files: BTreeMap::new(), numbers: Vec::new(), arrived: Arrived::default() };
    if let Err(e) = coming.all(input) {
        return Err(match coming.half.forget_if_empty() {
            true => e,
            false => e.context(format!(
                "{} keeps what has come: send the rest of it (--kept), or remove it",
                coming.half.display()
            )),
        });
    }
    report::say(
        0,
        format_args!("{} bytes received, {} of them from an earlier try", coming.arrived.bytes, coming.arrived.kept),
    );
    operation.end(true);
    Ok(coming.arrived)
}

struct Coming {
    half: Half,
    files: BTreeMap<String, Incoming>,
    /// The names, by the files' numbers.
    numbers: Vec<String>,
    arrived: Arrived,
}

impl Coming {
    /// All that comes after the start.
    fn all(&mut self, input: BorrowedFd) -> Result<()> {
        let mut buf = Vec::new();
        for number in 0.. {
            let mut head = [0; stream::HEAD];
            self.read(input, &mut head)?;
            let record = Record::parse(&head)?;
            let payload = self.read_payload(input, record.payload as usize, &mut buf)?;
            record.check(number, &head, payload)?;
            if matches!(record.kind, What::Data | What::Packed | What::Zero | What::Same) {
                self.arrived.bytes += record.bytes;
            }
            match record.kind {
                What::File => self.begin(record.file, payload)?,
                What::Same => {
                    self.file(record.file)?.keep(record.offset, record.bytes, payload)?;
                    self.arrived.kept += record.bytes;
                }
                What::Data => self.file(record.file)?.write(record.offset, payload)?,
                What::Packed => self.file(record.file)?.unpack(record.offset, record.bytes, payload)?,
                What::Zero => self.file(record.file)?.zero(record.offset, record.bytes)?,
                What::Sync => self.sync()?,
                What::Close => self.file(record.file)?.close(record.bytes)?,
                What::End => {
                    if (record.offset, record.bytes) != (number, self.arrived.bytes) {
                        bail!(
                            Protocol,
                            "the stream ends with {} records and {} bytes, {number} and {} have come",
                            record.offset,
                            record.bytes,
                            self.arrived.bytes
                        );
                    }
                    return self.finish(payload);
                }
            }
        }
        Ok(())
    }

    fn read(&self, input: BorrowedFd, buf: &mut [u8]) -> Result<()> {
        read_all(input, buf, Received { bytes: self.arrived.bytes, syncs: 0 })
    }

    /// The payload, in a buffer that only grows, a block at a time and as it is filled.
    fn read_payload<'a>(&self, input: BorrowedFd, len: usize, buf: &'a mut Vec<u8>) -> Result<&'a [u8]> {
        let mut have = 0;
        while have < len {
            let next = len.min(have + stream::BLOCK as usize);
            if buf.len() < next {
                buf.resize(next, 0);
            }
            self.read(input, buf.get_mut(have..next).unwrap_or_default())?;
            have = next;
        }
        Ok(buf.get(..len).unwrap_or_default())
    }

    fn begin(&mut self, number: u32, name: &[u8]) -> Result<()> {
        if number as usize != self.numbers.len() {
            bail!(Protocol, "file {number} of the stream begins after {} files", self.numbers.len());
        }
        let Ok(name) = std::str::from_utf8(name) else {
            bail!(
                Protocol,
                "file {number} of the stream has a name that is not text: {:?}",
                name.escape_ascii().to_string()
            )
        };
        names::check(name)?;
        report::say(1, format_args!("Receiving {name}"));
        // One that begins anew has changed at the source.
        let again = self.files.remove(name).is_some();
        let file = self.half.take(name, again)?;
        self.files.insert(name.to_owned(), file);
        self.numbers.push(name.to_owned());
        Ok(())
    }

    fn file(&mut self, number: u32) -> Result<&mut Incoming> {
        let begun = self.numbers.len();
        if let Some(name) = self.numbers.get(number as usize)
            && let Some(file) = self.files.get_mut(name)
        {
            return Ok(file);
        }
        bail!(Protocol, "the stream has bytes of file {number}, {begun} files have begun")
    }

    /// The disk gets what has come, beside what comes next: the sender does not wait, whose file systems may be frozen.
    fn sync(&mut self) -> Result<()> {
        self.files.values_mut().try_for_each(Incoming::begin_sync)
    }

    fn finish(&mut self, xml: &[u8]) -> Result<()> {
        let disk = Descriptor::parse(xml, &self.half.folder).map_err(|e| e.as_kind(Kind::Protocol))?;
        self.check(&disk)?;
        let used = |name: &str| disk.images.iter().any(|i| i.file.file_name().is_some_and(|f| f == name));
        for name in self.half.names()?.iter().filter(|name| *name != MARKER && !used(name)) {
            let place = self.half.folder.entry(name);
            store::unlink(&place)
                .ctx(Kind::Unlink, || format!("cannot remove {}, which the disk has not", place.display()))?;
        }
        Descriptor { dir: self.half.folder.clone(), ..disk }.commit(&self.half.folder.entry(descriptor::FILE_NAME))?;
        self.half.publish()
    }

    /// The tree is sound, and the images that came are its images.
    fn check(&self, disk: &Descriptor) -> Result<()> {
        let bad = |e: Error| e.as_kind(Kind::Protocol);
        disk.check_storable().map_err(bad)?;
        disk.check_tree().map_err(bad)?;
        disk.chain(&disk.top).map_err(bad)?;
        if let Some(why) = disk.snapshots.iter().find_map(|s| disk.half_merged(&s.guid)) {
            bail!(Protocol, "{why}");
        }
        for image in &disk.images {
            let name = image.file.strip_prefix(&self.half.folder).ok().and_then(Path::to_str);
            let came = name.filter(|name| names::check(name).is_ok()).and_then(|name| self.files.get(name));
            if !came.is_some_and(Incoming::is_closed) {
                bail!(Protocol, "the descriptor names image {}, which has not come", image.file.display());
            }
            if disk.is_raw(image) {
                continue;
            }
            let header = read_header(&image.file, Some(&self.half.folder)).map_err(bad)?;
            if header.is_marked() || header.cluster != disk.blocksize {
                bail!(
                    Protocol,
                    "image {} came with clusters of {} sectors and mark {:#x}, the descriptor wants {} and 0",
                    image.file.display(),
                    header.cluster.sectors(),
                    header.in_use,
                    disk.blocksize.sectors()
                );
            }
        }
        Ok(())
    }
}

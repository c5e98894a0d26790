//! The sending end of a copy: the file of a running device's top goes to a file, a pipe or a socket while the device is in
//! use.
//!
//! First all of the file, then what was written meanwhile, in rounds, until little is left. Then the caller's command stops
//! what writes, the file systems are frozen and flushed, the rest goes, and last the header, with the in-use mark cleared:
//! what has arrived before that cannot be mistaken for a closed image. The device goes on; whatever way this ends, and if
//! this process is killed, its supervisor ends the tracking and thaws.
#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::RawFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::output::Output;
use super::reader::{Piece, Reader};
use super::sink::Sink;
use crate::bail;
use crate::device::{self, Device, Freeze, Tracker};
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::header::{self, Header};
use crate::ops::maintenance::{self, Work};
use crate::ops::online::freeze;
use crate::report;
use crate::report::progress::Progress;
use crate::sys::aligned::{AlignedBuf, read_full};
use crate::sys::reopen::{Access, reopen};
use crate::sys::{host, stdio};

/// Bytes of the first pass for which what was written before is forgotten at once, as they are read then.
const WINDOW: u64 = 64 << 20;
/// Rounds while the device is in use.
const LIVE_ROUNDS: u32 = 10;
/// Rounds when it is frozen: the first has what was left, one more what a new worker cannot know.
const LAST_ROUNDS: u32 = 3;
/// Bytes from the begin of the file that are sent last.
const HEAD: usize = 512;
/// A new worker needs less to have its images open.
const OPEN_TRIES: u32 = 100;
const OPEN_PAUSE: Duration = Duration::from_millis(100);
/// How long what the server compacts by itself may take to make way.
const MAKES_WAY: Duration = Duration::from_secs(3);

/// What was sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sent {
    /// Bytes, those that went several times counted as often.
    pub bytes: u64,
    /// Of these, what was read while the file systems were frozen.
    pub frozen: u64,
    /// How long they were frozen.
    pub time: Duration,
}

impl Sent {
    /// For the user.
    pub(super) fn tell(&self) {
        report::say(
            0,
            format_args!(
                "{} bytes sent, {} of them from file systems that were frozen for {} ms",
                self.bytes,
                self.frozen,
                self.time.as_millis()
            ),
        );
    }
}

/// What ends the writing to the device.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stop<'a> {
    /// For the shell.
    pub command: Option<&'a OsStr>,
    /// Standard input and standard output of this process belong to the copy: the command does not get them.
    pub copied: [bool; 2],
}

/// [`send`] to a descriptor that the caller named by its number: a pipe, a socket, or a file, which is written in place.
/// Messages would disturb a copy on standard output or standard error: they are left out from then on.
pub fn send_by_number(node: &Path, output: RawFd, stop: Option<&OsStr>, feedback: Option<RawFd>) -> Result<Sent> {
    let taken = |number: RawFd| {
        stdio::duplicate(number).ctx(Kind::Param, || format!("descriptor {number} cannot be used for the copy"))
    };
    let sink = Sink::of(taken(output)?, feedback.map(taken).transpose()?)?;
    match (output, feedback) {
        (2, _) | (_, Some(2)) => report::silence(),
        (1, _) => report::set_verbose_level(report::NO_STDOUT),
        _ => {}
    }
    let copied = [0, 1].map(|number| output == number || feedback == Some(number));
    send(node, sink, Stop { command: stop, copied })
}

/// [`send`] into the new file `file` on this machine, which appears when all of it is durable.
pub fn send_to_file(node: &Path, file: &Path, stop: Option<&OsStr>) -> Result<Sent> {
    send(node, Sink::new_file(file)?, Stop { command: stop, copied: [false; 2] })
}

/// Sends the top of the device with this node. Errors: `Device`
/// (no device), `Busy` (clusters of it are moved or merged, or it is copied already), `Read`, `Write`, `Protocol` (no answer),
/// `Fsync` (the receiver cannot sync), `Sys` (the command fails), `Loop` (still written to when it is frozen).
fn send(node: &Path, mut sink: Sink, stop: Stop) -> Result<Sent> {
    let operation = report::cancel::begin();
    let found = find(node)?;
    maintenance::before(&found, Work::Copy)?;
    let mut tracker = track(&found)?;
    let (device, top) = open_top(node)?;
    report::say(0, format!("Sending {}", device.top().display()));
    let quiesce = &mut || quiesce(&device, stop);
    let piece = tracker.cluster();
    let sent = Copying::new(&mut *tracker, top, device.version.is_none(), &mut sink, piece)?.run(quiesce)?;
    sent.tell();
    operation.end(true);
    Ok(sent)
}

/// What the server compacts by itself it ends for a copy, a moment later.
pub(super) fn track(device: &Device) -> Result<Box<dyn Tracker>> {
    let end = host::now() + MAKES_WAY;
    loop {
        match device::track(device) {
            Err(e) if e.kind() == Kind::Busy && host::now() < end => host::sleep(Duration::from_millis(100)),
            other => return other,
        }
    }
}

fn find(node: &Path) -> Result<Device> {
    match node.to_str().map(device::by_node).transpose()?.flatten() {
        Some(device) => Ok(device),
        None => bail!(Device, "{} is no ploop device", node.display()),
    }
}

/// The device and the file of its top, which stays the top while it is tracked.
pub(super) fn open_top(node: &Path) -> Result<(Device, File)> {
    let mut tries = 0;
    loop {
        let device = find(node)?;
        match device::open_image(&device, device.images.len().saturating_sub(1)) {
            Ok(file) => {
                let direct = Access { write: false, direct: true };
                let (file, _) = reopen(&file, direct).ctx(Kind::Open, || format!("{}", device.top().display()))?;
                return Ok((device, file));
            }
            Err(_) if tries < OPEN_TRIES && !report::cancel::requested() => {
                tries += 1;
                std::thread::sleep(OPEN_PAUSE);
            }
            Err(e) => return Err(e),
        }
    }
}

/// Ends what writes: runs the command, freezes the file systems, flushes the device. Also, since when they are frozen.
pub(super) fn quiesce(device: &Device, stop: Stop) -> Result<(Box<dyn Freeze>, Instant)> {
    if let Some(command) = stop.command {
        // No file system is held open: the command may unmount them.
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(command);
        if stop.copied[0] {
            shell.stdin(Stdio::null());
        }
        if stop.copied[1] {
            shell.stdout(stdio::duplicate(2).map_or_else(|_| Stdio::null(), Stdio::from));
        }
        let status = shell.status().ctx(Kind::Sys, || "cannot start a shell for the stop command")?;
        if !status.success() {
            bail!(Sys, "the stop command {command:?} ended with {status}; the device goes on");
        }
    }
    let mut frozen = freeze::prepare(device)?;
    frozen.freeze()?;
    // Before, the helper has waited for what is written back while writers go on.
    let since = Instant::now();
    for node in device::aliases(device).nodes {
        let synced = File::open(&node).and_then(|file| file.sync_all());
        synced.ctx(Kind::DevIoc, || format!("cannot flush {}", node.display()))?;
    }
    Ok((frozen, since))
}

/// A copy under way.
pub(super) struct Copying<'a> {
    tracker: &'a mut dyn Tracker,
    /// The same file for what is not read ahead.
    top: File,
    reader: Reader,
    raw: bool,
    output: &'a mut dyn Output,
    head: AlignedBuf,
    sent: u64,
    shown: Progress,
}

impl<'a> Copying<'a> {
    /// `piece`: bytes that are written at once, of at most the largest payload.
    pub fn new(
        tracker: &'a mut dyn Tracker,
        top: File,
        raw: bool,
        output: &'a mut dyn Output,
        piece: u64,
    ) -> Result<Copying<'a>> {
        let piece = piece.clamp(4096, super::wire::MAX_PAYLOAD.into()) as usize;
        let again = top.try_clone().ctx(Kind::Open, || "cannot open the image")?;
        let shown = Progress::begin("copying");
        let reader = Reader::new(again, piece)?;
        Ok(Copying { tracker, top, reader, raw, output, head: AlignedBuf::new(4096), sent: 0, shown })
    }

    /// `quiesce` also tells since when they are frozen.
    pub fn run(mut self, quiesce: &mut dyn FnMut() -> Result<(Box<dyn Freeze>, Instant)>) -> Result<Sent> {
        self.first_pass()?;
        self.live_rounds()?;
        self.sync()?;
        let (mut frozen, since) = quiesce()?;
        let before = self.sent;
        self.last_rounds()?;
        let head = self.closed_head()?;
        // Thawed by another process, or at the end of its time: then the copy has no end.
        frozen.thaw()?;
        let time = since.elapsed();
        self.write_pending(0)?;
        if let Some(head) = head {
            self.output.write(0, &head)?;
            self.sent += HEAD as u64;
        }
        let sent = Sent { bytes: self.sent, frozen: self.sent - before, time };
        self.output.end()?;
        Ok(sent)
    }

    /// The whole file; while a window of it is sent the next one is read.
    fn first_pass(&mut self) -> Result<()> {
        let cluster = self.tracker.cluster().max(1);
        let end = self.tracker.end();
        let window = WINDOW.next_multiple_of(cluster);
        let skip = self.output.holes().map_or(0, |unit| unit.max(cluster));
        let mut at = 0;
        while at < end {
            let next = (at + window).min(end);
            let mut from = at;
            while let Some(last) = self.tracker.take(from..next)?.last() {
                from = last.end;
            }
            // With its last cluster the copy gets its length.
            let last = if next == end { (end - 1) / cluster * cluster } else { next };
            self.reader.ask(at..last.max(at), skip);
            self.reader.ask(last.max(at)..next, 0);
            self.write_pending(2)?;
            self.shown.at(at, end);
            at = next;
        }
        self.write_pending(0)?;
        self.shown.at(end, end);
        Ok(())
    }

    /// Sends what was written since the last time; so many bytes. `late`: what memory has room for is read and not yet sent.
    fn round(&mut self, late: bool) -> Result<u64> {
        let (mut from, mut bytes) = (0, 0);
        loop {
            let runs = self.tracker.take(from..u64::MAX)?;
            let Some(last) = runs.last() else { break };
            from = last.end;
            for run in runs {
                bytes += run.end - run.start;
                self.reader.ask(run, 0);
            }
        }
        if late {
            self.reader.read_ahead()?;
        }
        if !late || self.reader.pending() > 0 {
            self.write_pending(0)?;
        }
        Ok(bytes)
    }

    /// Until nothing is left, or it becomes no less.
    fn live_rounds(&mut self) -> Result<()> {
        let mut all = 0;
        for number in 1..=LIVE_ROUNDS {
            let bytes = self.round(false)?;
            all += bytes;
            if bytes == 0 || number > 1 && all > self.tracker.end() {
                break;
            }
        }
        Ok(())
    }

    fn last_rounds(&mut self) -> Result<()> {
        for _ in 0..LAST_ROUNDS {
            if self.round(true)? == 0 {
                return Ok(());
            }
        }
        bail!(
            Loop,
            "the device is still written to, though its file systems are frozen; stop what uses the block device itself, and copy again"
        )
    }

    /// Has the receiver write to its disk what it got, so that little is left for the time of the freeze.
    fn sync(&mut self) -> Result<()> {
        let mut start = [0; 4];
        let read = read_full(&self.top, &mut self.head, 0).ctx(Kind::Read, || "cannot read the image")?;
        if read >= start.len() {
            start.copy_from_slice(&self.head[..4]);
        }
        self.output.sync(&start)
    }

    /// Writes what was read until at most so many ranges are not read to their end; 0: everything.
    fn write_pending(&mut self, left: usize) -> Result<()> {
        while left == 0 || self.reader.pending() > left {
            if report::cancel::requested() {
                bail!(Abort, "the copy was cancelled after {} bytes", self.sent);
            }
            let Some(piece) = self.reader.next()? else { break };
            let Piece { at, buf, len } = &piece;
            if *len > 0 {
                self.output.write(*at, &buf[..*len])?;
                self.sent += *len as u64;
            }
            self.reader.sent(piece);
        }
        Ok(())
    }

    /// The begin of the image, as closed; none: it is raw.
    fn closed_head(&mut self) -> Result<Option<[u8; HEAD]>> {
        if self.raw {
            return Ok(None);
        }
        let read = read_full(&self.top, &mut self.head, 0).ctx(Kind::Read, || "cannot read the header of the image")?;
        if read < HEAD {
            return Err(Error::new(Kind::Read, format!("the image has {read} bytes, and no header")));
        }
        let mut head = [0; HEAD];
        head.copy_from_slice(&self.head[..HEAD]);
        let open = Header::parse(&head)?;
        let closed = Header { in_use: 0, flags: open.flags & !header::FLAG_EMPTY, extension: 0, ..open };
        head[..header::SIZE].copy_from_slice(&closed.encode());
        Ok(Some(head))
    }
}

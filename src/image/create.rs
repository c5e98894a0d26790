//! Making images, empty or with content.

use std::fs::File;
use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::bail;
use crate::descriptor::{self, ImageMode};
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::header::{self, Header, Version};
use crate::format::{bat, limits};
use crate::report;
use crate::sys::aligned::{AlignedBuf, read_exact, write_all};
use crate::sys::file_id::FileId;
use crate::sys::folder::{Named, Place};
use crate::sys::store;
use crate::units::{ClusterSize, SECTOR};

use super::complete::complete;
use super::content::{Content, Piece};

/// What to make.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Params {
    pub version: Version,
    pub cluster: ClusterSize,
    /// Rounded by [`limits::round_size`].
    pub sectors: u64,
    pub mode: ImageMode,
}

/// What was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Built {
    /// The disk's size, rounded.
    pub sectors: u64,
    /// None for a raw image.
    pub header: Option<Header>,
    /// Length of the file in bytes.
    pub bytes: u64,
    pub id: FileId,
}

/// Called now and then with the bytes done and the bytes in all. An error ends the creation and removes the file.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> Result<()>;

/// Bytes written at once, or a cluster if that is more.
const WINDOW: u64 = 4 << 20;

/// An empty delta for a chain of this version and cluster size, durable with its folder entry. `sectors` is kept: over a
/// raw base of any length the disk has the same end. A file of that name is an error (38) and stays. After any error
/// the new file is removed.
pub fn create_delta(to: &(impl Named + ?Sized), version: Version, cluster: ClusterSize, sectors: u64) -> Result<Built> {
    let place = place_of(to)?;
    let rounded = limits::round_size(version, cluster, sectors)?;
    let params = Params { version, cluster, sectors: rounded, mode: ImageMode::Expanded };
    let built = build_sized(&place, &params, rounded.min(sectors), &[], &mut |_, _| Ok(()))?;
    descriptor::sync_folder(&place.folder).inspect_err(|_| {
        let _ = store::unlink_file(&place, built.id);
    })?;
    Ok(built)
}

fn place_of(to: &(impl Named + ?Sized)) -> Result<Place> {
    to.place().ctx(Kind::Creat, || "cannot open the folder of a new image")
}

/// An image without content.
pub fn create(to: &(impl Named + ?Sized), params: &Params, progress: Progress<'_>) -> Result<Built> {
    build(to, params, &[], progress)
}

/// Makes an image with this content, exclusively, mode 0600, and syncs it; the caller makes the folder's entry durable,
/// usually after a rename. Pieces may come in any order and must not overlap; ranges without a piece read as zero.
///
/// A file of that name is an error (38) and stays. If anything fails the new file is removed.
pub fn build(
    to: &(impl Named + ?Sized),
    params: &Params,
    pieces: &[Piece<'_>],
    progress: Progress<'_>,
) -> Result<Built> {
    let place = place_of(to)?;
    let sectors = limits::round_size(params.version, params.cluster, params.sectors)?;
    build_sized(&place, params, sectors, pieces, progress)
}

/// The same; `sectors` is the disk's size, the last cluster perhaps partial.
fn build_sized(
    place: &Place,
    params: &Params,
    sectors: u64,
    pieces: &[Piece<'_>],
    progress: Progress<'_>,
) -> Result<Built> {
    let path = place.path();
    let content = Content::new(pieces, sectors * SECTOR)?;
    let plan = plan(params, sectors)?;
    let file = store::create_new(place, 0o600).map_err(|e| {
        let kind = if e.kind() == io::ErrorKind::AlreadyExists { Kind::Param } else { Kind::Creat };
        Error::with(kind, format!("cannot create image {}", path.display()), e)
    })?;
    let id = FileId::of(&file).ctx(Kind::Fstat, || format!("cannot look at image {}", path.display()))?;
    let mut work = Work { file: &file, path: &path, params, plan, content, progress, done: 0, total: 0 };
    let made = match params.mode {
        ImageMode::Expanded => work.expanded(),
        ImageMode::Preallocated => work.preallocated(),
        ImageMode::Raw => work.raw(),
    };
    let made = made.and_then(|bytes| {
        store::sync_all(&file).ctx(Kind::Fsync, || format!("cannot sync image {}", path.display()))?;
        Ok(Built { sectors, header: work.plan.header, bytes, id })
    });
    if made.is_err() {
        let _ = store::unlink_file(place, id);
    }
    made
}

struct Plan {
    /// None for raw.
    header: Option<Header>,
    sectors: u64,
}

fn plan(params: &Params, sectors: u64) -> Result<Plan> {
    if params.mode == ImageMode::Raw {
        return Ok(Plan { header: None, sectors });
    }
    let header = Header::sized(params.version, params.cluster, sectors)?;
    if params.mode == ImageMode::Preallocated {
        let end = u64::from(header.first_data()) + u64::from(header.clusters());
        if end > u64::from(bat::host_cluster_limit(params.version, params.cluster)) {
            bail!(
                Param,
                "disk size {sectors} sectors: a preallocated version {} image cannot name so many clusters",
                params.version.number()
            );
        }
    }
    Ok(Plan { header: Some(header), sectors })
}

struct Work<'a> {
    file: &'a File,
    path: &'a Path,
    params: &'a Params,
    plan: Plan,
    content: Content<'a>,
    progress: Progress<'a>,
    done: u64,
    total: u64,
}

impl Work<'_> {
    fn cluster(&self) -> u64 {
        self.params.cluster.bytes()
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        write_all(self.file, bytes, at)
            .ctx(Kind::Write, || format!("cannot write image {} at offset {at}", self.path.display()))
    }

    fn advance(&mut self, bytes: u64) -> Result<()> {
        self.done = (self.done + bytes).min(self.total);
        (self.progress)(self.done, self.total)
    }

    fn header(&self) -> Result<Header> {
        self.plan.header.ok_or_else(|| Error::new(Kind::Param, "a raw image has no header"))
    }

    /// Header and BAT, then the clusters that have data other than zeroes, in the disk's order.
    fn expanded(&mut self) -> Result<u64> {
        let mut header = self.header()?;
        let size = self.cluster();
        let (version, cluster) = (self.params.version, self.params.cluster);
        let table = u64::from(header.first_data()) * size;
        self.total = table + self.content.bytes();
        let mut host_cluster = header.first_data();
        let mut entries: Vec<(u32, u32)> = Vec::new();
        self.windows(&mut |work, at, window| {
            let clusters = window.len() as u64 / size;
            let mut i = 0;
            while i < clusters {
                let run = (i..clusters).take_while(|n| !is_zero(part(window, *n, 1, size))).count() as u64;
                if run == 0 {
                    i += 1;
                    continue;
                }
                work.write(part(window, i, run, size), u64::from(host_cluster) * size)?;
                for n in i..i + run {
                    let entry = bat::encode(version, cluster, host_cluster).filter(|_| host_cluster < u32::MAX);
                    let Some(entry) = entry else {
                        bail!(Param, "version {} cannot name image cluster {host_cluster}", version.number());
                    };
                    entries.push(((at / size + n) as u32, entry));
                    host_cluster += 1;
                }
                i += run;
            }
            Ok(())
        })?;
        if !entries.is_empty() {
            header.flags &= !header::FLAG_EMPTY;
        }
        let mut next = entries.iter().peekable();
        self.table(&header, table, &mut |put, first, last| {
            while let Some(&&(c, entry)) = next.peek() {
                if u64::from(c) >= last {
                    break;
                }
                put(u64::from(c) - first, entry);
                next.next();
            }
        })?;
        self.plan.header = Some(header);
        Ok(u64::from(host_cluster) * size)
    }

    /// Every cluster has a host cluster from the start, reserved and reading as zero where nothing is written.
    fn preallocated(&mut self) -> Result<u64> {
        let mut header = self.header()?;
        // All of them are data clusters.
        header.flags &= !header::FLAG_EMPTY;
        let size = self.cluster();
        let table = u64::from(header.first_data()) * size;
        let len = table + u64::from(header.clusters()) * size;
        self.total = table + self.content.bytes();
        let reserved = self.reserve(len)?;
        self.content_in_place(table)?;
        let (version, cluster, first_data) = (self.params.version, self.params.cluster, header.first_data());
        let clusters = u64::from(header.clusters());
        self.table(&header, table, &mut |put, first, last| {
            for c in first..last.min(clusters) {
                // Bounded by `plan`.
                put(c - first, bat::encode(version, cluster, first_data + c as u32).unwrap_or(0));
            }
        })?;
        if reserved {
            self.finish(len)?;
        }
        self.plan.header = Some(header);
        Ok(len)
    }

    fn raw(&mut self) -> Result<u64> {
        let len = self.plan.sectors * SECTOR;
        self.total = self.content.bytes();
        self.reserve(len)?;
        self.content_in_place(0)?;
        self.finish(len)?;
        Ok(len)
    }

    /// Reserves space for the whole file, reading as zero. False: the file is only as long as that.
    fn reserve(&mut self, len: u64) -> Result<bool> {
        let name = self.path.display();
        match fallocate(self.file, FallocateFlags::empty(), 0, len as i64) {
            Ok(()) => return Ok(true),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {}
            Err(e) => {
                return Err(Error::with(
                    Kind::Fallocate,
                    format!("cannot reserve {len} bytes for image {name}"),
                    io::Error::from(e),
                ));
            }
        }
        if self.params.mode == ImageMode::Preallocated {
            report::warn(format_args!("image {name}: the file system cannot reserve space, the file is made sparse"));
            self.file.set_len(len).ctx(Kind::Ftruncate, || format!("cannot extend image {name} to {len} bytes"))?;
            return Ok(false);
        }
        let zeroes = AlignedBuf::new(WINDOW as usize);
        self.total += len;
        let mut at = 0;
        while at < len {
            let n = (len - at).min(WINDOW);
            self.write(&zeroes[..n as usize], at)?;
            self.advance(n)?;
            at += n;
        }
        Ok(true)
    }

    /// Content at its position on the disk plus `shift`, whole clusters.
    fn content_in_place(&mut self, shift: u64) -> Result<()> {
        self.windows(&mut |work, at, window| {
            if is_zero(window) { Ok(()) } else { work.write(window, shift + at) }
        })
    }

    /// Completes the file: the classic's check wants reserved space on cluster borders.
    fn finish(&mut self, len: u64) -> Result<()> {
        complete(self.file, self.params.cluster, len)
            .ctx(Kind::Write, || format!("cannot complete image {}", self.path.display()))
    }

    /// Calls `each` with every stretch of whole clusters (the disk's offset and bytes) that has content.
    fn windows(&mut self, each: &mut EachWindow<'_, Self>) -> Result<()> {
        let size = self.cluster();
        let span = WINDOW.max(size);
        let mut buf = AlignedBuf::new(span as usize);
        let end = self.plan.sectors * SECTOR;
        while let Some(first) = self.content.next_offset() {
            let start = first / size * size;
            let len = span.min(end - start) as usize;
            let window = &mut buf[..len];
            window.fill(0);
            let mut read = 0;
            while let Some(chunk) = self.content.take(start + len as u64) {
                let at = (chunk.device_offset - start) as usize;
                let into = &mut window[at..at + chunk.len as usize];
                match chunk.source {
                    super::content::Source::Bytes(bytes) => {
                        into.copy_from_slice(&bytes[chunk.source_offset as usize..][..chunk.len as usize]);
                    }
                    super::content::Source::File { file, .. } => {
                        read_exact(file, into, chunk.source_offset).ctx(Kind::Read, || {
                            format!(
                                "cannot read the content of image {} at {}",
                                self.path.display(),
                                chunk.device_offset
                            )
                        })?
                    }
                }
                read += chunk.len;
            }
            each(self, start, window)?;
            self.advance(read)?;
        }
        Ok(())
    }

    /// Writes header and BAT. `fill` puts the entries of clusters `[first, last)` into slots counted from `first`.
    fn table(&mut self, header: &Header, table: u64, fill: &mut FillTable<'_>) -> Result<()> {
        let mut buf = AlignedBuf::new(table.min(WINDOW) as usize);
        let mut at = 0;
        while at < table {
            let len = (table - at).min(WINDOW) as usize;
            let bytes = &mut buf[..len];
            bytes.fill(0);
            let skip = if at == 0 { header::SIZE } else { 0 };
            let first = (at + skip as u64 - bat::HEADER_BYTES) / 4;
            let last = (at + len as u64 - bat::HEADER_BYTES) / 4;
            fill(
                &mut |slot, entry| {
                    let from = skip + slot as usize * 4;
                    bytes[from..from + 4].copy_from_slice(&entry.to_le_bytes());
                },
                first,
                last,
            );
            if at == 0 {
                bytes[..header::SIZE].copy_from_slice(&header.encode());
            }
            self.write(&buf[..len], at)?;
            self.advance(len as u64)?;
            at += len as u64;
        }
        Ok(())
    }
}

type EachWindow<'a, W> = dyn FnMut(&mut W, u64, &[u8]) -> Result<()> + 'a;

type FillTable<'a> = dyn FnMut(&mut dyn FnMut(u64, u32), u64, u64) + 'a;

fn part(window: &[u8], cluster: u64, count: u64, size: u64) -> &[u8] {
    &window[(cluster * size) as usize..((cluster + count) * size) as usize]
}

fn is_zero(bytes: &[u8]) -> bool {
    const ZEROES: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROES.len()).all(|c| c == &ZEROES[..c.len()])
}

//! Where a file has data, holes and unwritten space.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::unistd::{Whence, lseek};

/// An extent of a file, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    pub start: u64,
    pub len: u64,
    /// Allocated, reads as zero: never written.
    pub unwritten: bool,
}

impl Extent {
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }
}

/// An extent of a file with the place of its bytes on the device of its file system, which only some file systems (ext,
/// not btrfs) tell truly.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Placed {
    pub extent: Extent,
    /// Byte of the device; none: not known, not yet chosen, or shared with other data.
    pub at: Option<u64>,
}

const BATCH: usize = 256;
const FIEMAP_FLAG_SYNC: u32 = 1;
const EXTENT_LAST: u32 = 0x1;
const EXTENT_UNWRITTEN: u32 = 0x800;
/// LAST, UNWRITTEN and MERGED say nothing against the place that is told; all others do.
const EXTENT_PLACED: u32 = EXTENT_LAST | EXTENT_UNWRITTEN | 0x1000;
/// `_IOWR('f', 11, struct fiemap)`, whose fixed part has 32 bytes.
const FS_IOC_FIEMAP: libc::c_ulong = 0xC020_660B;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RawExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct RawMap {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [RawExtent; BATCH],
}

/// Calls `each` with every extent that overlaps `[start, end)`, ascending, after writing back what is cached.
/// `Unsupported` where the file system has no FIEMAP.
pub fn each_extent(
    file: &File,
    start: u64,
    end: u64,
    each: &mut dyn FnMut(Extent) -> io::Result<()>,
) -> io::Result<()> {
    each_placed(file, start, end, &mut |placed| each(placed.extent))
}

/// The same with places on the device.
pub fn each_placed(
    file: &File,
    start: u64,
    end: u64,
    each: &mut dyn FnMut(Placed) -> io::Result<()>,
) -> io::Result<()> {
    let mut pos = start;
    while pos < end {
        let mut map = RawMap {
            start: pos,
            length: end - pos,
            flags: FIEMAP_FLAG_SYNC,
            mapped: 0,
            count: BATCH as u32,
            reserved: 0,
            extents: [RawExtent::default(); BATCH],
        };
        // SAFETY: `map` is a struct fiemap with room for `count` extents, and lives through the call.
        let rc = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP as _, &mut map) };
        if rc < 0 {
            let e = io::Error::last_os_error();
            return Err(match e.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL | libc::EBADR) => {
                    io::Error::new(io::ErrorKind::Unsupported, "FIEMAP is not supported here")
                }
                Some(libc::EINTR) => continue,
                _ => e,
            });
        }
        let Some(found) = map.extents.get(..map.mapped as usize).filter(|f| !f.is_empty()) else {
            break;
        };
        let mut last = false;
        let mut next = pos;
        for e in found {
            let extent = Extent { start: e.logical, len: e.length, unwritten: e.flags & EXTENT_UNWRITTEN != 0 };
            each(Placed { extent, at: (e.flags & !EXTENT_PLACED == 0).then_some(e.physical) })?;
            next = e.logical.saturating_add(e.length);
            last |= e.flags & EXTENT_LAST != 0;
        }
        if last || next <= pos {
            break;
        }
        pos = next;
    }
    Ok(())
}

/// First byte of data at or after `from`; none if only a hole follows.
pub fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    seek(file, from, Whence::SeekData)
}

/// First byte of a hole at or after `from` (the end of the file counts); none at or beyond the end.
pub fn next_hole(file: &File, from: u64) -> io::Result<Option<u64>> {
    seek(file, from, Whence::SeekHole)
}

fn seek(file: &File, from: u64, whence: Whence) -> io::Result<Option<u64>> {
    let Ok(from) = i64::try_from(from) else { return Ok(None) };
    match lseek(file, from, whence) {
        Ok(n) => Ok(u64::try_from(n).ok()),
        Err(nix::errno::Errno::ENXIO) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Calls `each` with every range `[start, end)` of data in the given part of the file; the whole of it where holes
/// cannot be asked for.
pub fn each_data(
    file: &File,
    start: u64,
    end: u64,
    each: &mut dyn FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut pos = start;
    while pos < end {
        let data = match next_data(file, pos) {
            Ok(Some(at)) if at < end => at,
            Ok(_) => break,
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return each(pos, end),
            Err(e) => return Err(e),
        };
        let hole = next_hole(file, data)?.unwrap_or(end).min(end);
        if hole <= data {
            break;
        }
        each(data, hole)?;
        pos = hole;
    }
    Ok(())
}

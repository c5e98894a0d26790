//! Closing the top of a chain cleanly.

use std::io;

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::format::header::{self, Header};
use crate::image::complete;
use crate::report;

use super::open::{HEAD, write_header};
use super::table::scan_level;
use super::{Chain, LevelFile};
use crate::sys::aligned::{AlignedBuf, read_exact};
use crate::sys::store;
use crate::units::ClusterSize;

/// Closes a writable chain after the engine has flushed everything: completes the top, cuts it to `alloc_end` clusters,
/// syncs, and then clears the in-use mark. An error leaves the mark.
///
/// Completing only serves other programs' checks: if there is no space for it the image is closed all the same, since
/// its content is whole, and a warning is reported.
pub fn close(top: &LevelFile, chain: &Chain, alloc_end: u32) -> Result<()> {
    let name = top.name.display();
    if chain.version.is_none() {
        let len = top.file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {name}"))?.len();
        tidied(complete::complete_raw(&top.file, chain.cluster, len), top)?;
        store::sync_all(&top.file).ctx(Kind::Fsync, || format!("cannot sync image {name}"))?;
        return Ok(());
    }
    let header = Header::parse(&chain.header)?;
    let cluster = header.cluster;
    if alloc_end < header.first_data() {
        bail!(Param, "image {name} cannot be cut to {alloc_end} clusters: header and BAT fill {}", header.first_data());
    }
    let end = u64::from(alloc_end) * cluster.bytes();
    let len = top.file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {name}"))?.len();
    if len < end {
        bail!(Format, "image {name} has {len} bytes: {end} are in use, another process has cut it");
    }
    // Cut before completing, so that space allocated ahead is not completed. The cut also frees space that was
    // allocated behind the end of the file, so that it is needed even if the length is right.
    store::set_len(&top.file, end).ctx(Kind::Ftruncate, || format!("cannot cut image {name} to {end} bytes"))?;
    tidied(complete::complete(&top.file, cluster, end), top)?;
    store::sync_all(&top.file).ctx(Kind::Fsync, || format!("cannot sync image {name}"))?;
    let empty = if alloc_end == header.first_data() { header::FLAG_EMPTY } else { 0 };
    let closed = Header { in_use: 0, flags: header.flags & !header::FLAG_EMPTY | empty, extension: 0, ..header };
    write_header(top, &closed)
}

/// Whether the top of a chain is closed, durably: its in-use mark is not there.
pub fn is_closed(top: &LevelFile) -> Result<bool> {
    let name = top.name.display();
    let mut head = AlignedBuf::new(HEAD);
    read_exact(&top.file, &mut head, 0).ctx(Kind::Read, || format!("cannot read image {name}"))?;
    if Header::parse(&head).map_err(|e| e.context(&name))?.is_marked() {
        return Ok(false);
    }
    // The process that took the mark away may have been killed before it had synced that.
    store::sync_all(&top.file).ctx(Kind::Fsync, || format!("cannot sync image {name}"))?;
    Ok(true)
}

/// Finishes a former top that is a lower delta by now, while the worker reads it: cuts clusters at the end that no
/// entry names, completes, syncs, clears the in-use mark. Its content does not change. An image without the mark is
/// finished already.
pub fn finish(level: &LevelFile, cluster: ClusterSize) -> Result<()> {
    let name = level.name.display();
    let len = level.file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {name}"))?.len();
    if level.raw {
        tidied(complete::complete_raw(&level.file, cluster, len), level)?;
        return store::sync_all(&level.file).ctx(Kind::Fsync, || format!("cannot sync image {name}"));
    }
    let mut head = AlignedBuf::new(HEAD);
    read_exact(&level.file, &mut head, 0).ctx(Kind::Read, || format!("cannot read image {name}"))?;
    let header = Header::parse(&head).and_then(|h| h.check_layout().map(|()| h)).map_err(|e| e.context(&name))?;
    if !header.is_marked() {
        return Ok(());
    }
    let found = scan_level(level, &header, len)?;
    let end = u64::from(found.end) * header.cluster.bytes();
    if end < len {
        store::set_len(&level.file, end).ctx(Kind::Ftruncate, || format!("cannot cut image {name} to {end} bytes"))?;
    }
    tidied(complete::complete(&level.file, header.cluster, end.min(len)), level)?;
    store::sync_all(&level.file).ctx(Kind::Fsync, || format!("cannot sync image {name}"))?;
    let empty = if found.mapped == 0 { header::FLAG_EMPTY } else { 0 };
    let closed = Header { in_use: 0, flags: header.flags & !header::FLAG_EMPTY | empty, extension: 0, ..header };
    write_header(level, &closed)
}

fn tidied(result: io::Result<()>, top: &LevelFile) -> Result<()> {
    let name = top.name.display();
    match result {
        Err(e) if harmless(&e) => {
            report::warn(format_args!("image {name} stays sparse: {e}"));
            Ok(())
        }
        other => other.ctx(Kind::Write, || format!("cannot complete image {name}")),
    }
}

/// Whether the image is as sound as before though it was not completed.
fn harmless(e: &io::Error) -> bool {
    store::lacks_space(e) || e.kind() == io::ErrorKind::Other
}

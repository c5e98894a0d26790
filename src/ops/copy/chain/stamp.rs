//! Whether a file is what it was.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use crate::error::{IoContext, Kind, Result};
use crate::sys::file_id::FileId;

/// Differs after each write to a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp {
    pub id: FileId,
    pub len: u64,
    changed: (i64, i64),
}

impl Stamp {
    pub fn of(file: &File) -> Result<Stamp> {
        let meta = file.metadata().ctx(Kind::Fstat, || "cannot look at an image")?;
        Ok(Stamp { id: FileId::from(&meta), len: meta.len(), changed: (meta.ctime(), meta.ctime_nsec()) })
    }
}

//! Content for a new image: pieces of a disk, from memory or from sparse files.

use std::collections::VecDeque;
use std::fs::File;

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::sys::fiemap::each_data;

/// Where the bytes of a piece come from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    Bytes(&'a [u8]),
    /// A file from this byte on; its holes and the bytes behind its end are zeroes.
    File {
        file: &'a File,
        offset: u64,
    },
}

/// A piece of the disk.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// Byte of the disk where it begins.
    pub device_offset: u64,
    /// Bytes; those of `Source::Bytes` must be as many.
    pub len: u64,
    pub source: Source<'a>,
}

impl<'a> Piece<'a> {
    pub fn bytes(device_offset: u64, bytes: &'a [u8]) -> Piece<'a> {
        Piece { device_offset, len: bytes.len() as u64, source: Source::Bytes(bytes) }
    }

    /// `len` bytes of a file from its beginning.
    pub fn file(device_offset: u64, file: &'a File, len: u64) -> Piece<'a> {
        Piece { device_offset, len, source: Source::File { file, offset: 0 } }
    }
}

/// A stretch of bytes to be read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk<'a> {
    pub device_offset: u64,
    pub len: u64,
    pub source: Source<'a>,
    /// In the file or in the bytes.
    pub source_offset: u64,
}

/// All content, in the disk's order.
pub(super) struct Content<'a> {
    chunks: VecDeque<Chunk<'a>>,
    bytes: u64,
}

impl<'a> Content<'a> {
    /// `device_bytes`: the disk's size.
    pub fn new(pieces: &[Piece<'a>], device_bytes: u64) -> Result<Content<'a>> {
        let mut chunks = Vec::new();
        for piece in pieces {
            if piece.device_offset.checked_add(piece.len).is_none_or(|end| end > device_bytes) {
                bail!(
                    Param,
                    "content of {} bytes at offset {}: the disk has {device_bytes} bytes",
                    piece.len,
                    piece.device_offset
                );
            }
            match piece.source {
                Source::Bytes(bytes) => {
                    if bytes.len() as u64 != piece.len {
                        bail!(Param, "content of {} bytes is said to have {}", bytes.len(), piece.len);
                    }
                    chunks.push(Chunk {
                        device_offset: piece.device_offset,
                        len: piece.len,
                        source: piece.source,
                        source_offset: 0,
                    });
                }
                Source::File { file, offset } => {
                    let len = file.metadata().ctx(Kind::Fstat, || "cannot look at the content's file")?.len();
                    let end = offset.saturating_add(piece.len).min(len);
                    each_data(file, offset, end, &mut |from, to| {
                        chunks.push(Chunk {
                            device_offset: piece.device_offset + (from - offset),
                            len: to - from,
                            source: piece.source,
                            source_offset: from,
                        });
                        Ok(())
                    })
                    .ctx(Kind::Read, || "cannot find the data of the content's file")?;
                }
            }
        }
        chunks.retain(|c| c.len != 0);
        chunks.sort_by_key(|c| c.device_offset);
        let overlap = chunks.windows(2).find(|w| w[0].device_offset + w[0].len > w[1].device_offset);
        if let Some([_, second]) = overlap {
            bail!(Param, "two pieces of content overlap at offset {}", second.device_offset);
        }
        let bytes = chunks.iter().map(|c| c.len).sum();
        Ok(Content { chunks: chunks.into(), bytes })
    }

    /// All bytes to be read.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where the next chunk begins.
    pub fn next_offset(&self) -> Option<u64> {
        self.chunks.front().map(|c| c.device_offset)
    }

    /// The next chunk, as far as it lies before `end`.
    pub fn take(&mut self, end: u64) -> Option<Chunk<'a>> {
        let front = self.chunks.front_mut().filter(|c| c.device_offset < end)?;
        let len = front.len.min(end - front.device_offset);
        let out = Chunk { len, ..*front };
        if len == front.len {
            self.chunks.pop_front();
        } else {
            front.device_offset += len;
            front.source_offset += len;
            front.len -= len;
        }
        Some(out)
    }
}

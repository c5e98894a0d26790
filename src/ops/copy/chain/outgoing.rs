//! The stream of a move, as it is written.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use super::super::output::Output;
use super::super::{sink, wire};
use super::kept::Blocks;
use super::stream::{self, BLOCK, Kind as What, Record, block_sum};
use crate::error::{IoContext, Kind, Result};
use crate::sys::store;

/// Fast enough for any network that is worth it.
const LEVEL: i32 = 3;

static ZEROES: [u8; BLOCK as usize] = [0; BLOCK as usize];

/// See the module.
pub(super) struct Stream {
    to: OwnedFd,
    /// Records that were written.
    number: u64,
    files: u32,
    /// Bytes of files that they were about.
    pub bytes: u64,
    /// Of these, what the receiver had.
    pub kept: u64,
    packer: Option<zstd::bulk::Compressor<'static>>,
    packed: Vec<u8>,
}

impl Stream {
    pub fn begin(to: OwnedFd, compress: bool) -> Result<Stream> {
        let packer = match compress {
            true => Some(zstd::bulk::Compressor::new(LEVEL).ctx(Kind::Sys, || "cannot make a zstd compressor")?),
            false => None,
        };
        sink::send(to.as_fd(), &stream::start())?;
        Ok(Stream { to, number: 0, files: 0, bytes: 0, kept: 0, packer, packed: vec![0; BLOCK as usize] })
    }

    /// The next file.
    pub fn file(&mut self, name: &str, kept: Blocks) -> Result<OutFile<'_>> {
        let number = self.files;
        self.record(What::File, number, 0, 0, name.as_bytes())?;
        self.files += 1;
        Ok(OutFile { stream: self, number, kept, len: 0 })
    }

    pub fn end(&mut self, descriptor: &str) -> Result<()> {
        self.record(What::End, 0, self.number, self.bytes, descriptor.as_bytes())?;
        self.sync_file()
    }

    /// A file in which the stream is kept is durable when the disk counts as sent.
    fn sync_file(&self) -> Result<()> {
        let cannot = || "cannot sync the file to which the disk was sent";
        let file = File::from(self.to.try_clone().ctx(Kind::Fsync, cannot)?);
        match file.metadata().ctx(Kind::Fsync, cannot)?.is_file() {
            true => store::sync_all(&file).ctx(Kind::Fsync, cannot),
            false => Ok(()),
        }
    }

    fn record(&mut self, kind: What, file: u32, offset: u64, bytes: u64, payload: &[u8]) -> Result<()> {
        let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let head = Record { kind, file, offset, bytes, payload: len }.head(self.number, payload);
        sink::send(self.to.as_fd(), &head)?;
        sink::send(self.to.as_fd(), payload)?;
        self.number += 1;
        if matches!(kind, What::Data | What::Packed | What::Zero | What::Same) {
            self.bytes += bytes;
        }
        Ok(())
    }

    /// Bytes of one block, packed if that makes them fewer.
    fn data(&mut self, file: u32, offset: u64, data: &[u8]) -> Result<()> {
        let bytes = data.len() as u64;
        let mut packed = std::mem::take(&mut self.packed);
        // A frame that does not become shorter has no room.
        let room = packed.get_mut(..data.len() - 1).unwrap_or_default();
        let len = self.packer.as_mut().and_then(|packer| packer.compress_to_buffer(data, room).ok());
        let sent = match len.and_then(|len| packed.get(..len)) {
            Some(frame) => self.record(What::Packed, file, offset, bytes, frame),
            None => self.record(What::Data, file, offset, bytes, data),
        };
        self.packed = packed;
        sent
    }
}

/// A file that is sent.
pub(super) struct OutFile<'a> {
    stream: &'a mut Stream,
    number: u32,
    /// What the receiver says that it has.
    kept: Blocks,
    /// At least this long.
    pub len: u64,
}

impl OutFile<'_> {
    fn write_in_block(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let (number, bytes) = (self.number, data.len() as u64);
        // What is sent of a block once is not what the receiver had.
        let had = self.kept.remove(&(offset / BLOCK));
        if let Some(sum) = had
            && offset.is_multiple_of(BLOCK)
            && block_sum(data) == sum
        {
            self.stream.kept += bytes;
            return self.stream.record(What::Same, number, offset, bytes, &sum);
        }
        match ZEROES.get(..data.len()) == Some(data) {
            true => self.stream.record(What::Zero, number, offset, bytes, &[]),
            false => self.stream.data(number, offset, data),
        }
    }
}

impl Output for OutFile<'_> {
    fn holes(&self) -> Option<u64> {
        // Blocks are compared whole.
        Some(if self.kept.is_empty() { 1 } else { BLOCK })
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let (mut at, mut left) = (offset, data);
        while !left.is_empty() {
            let room = (BLOCK - at % BLOCK) as usize;
            let (piece, rest) = left.split_at(room.min(left.len()));
            self.write_in_block(at, piece)?;
            at += piece.len() as u64;
            left = rest;
        }
        self.len = self.len.max(at);
        Ok(())
    }

    fn sync(&mut self, _: &[u8; wire::SYNC as usize]) -> Result<()> {
        self.stream.record(What::Sync, 0, 0, 0, &[])
    }

    fn end(&mut self) -> Result<()> {
        self.stream.record(What::Close, self.number, 0, self.len, &[])
    }
}

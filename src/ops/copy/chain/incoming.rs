//! A file that is received, perhaps over what an earlier try has left of it.
#![forbid(unsafe_code)]

use std::fs::File;
use std::thread::JoinHandle;

use super::super::receive::WRITE_BACK;
use super::on_disk::OnDisk;
use super::stream::{self, BLOCK};
use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::report;
use crate::sys::{cache, store};

/// A longer file of an earlier try is not used: 32 TiB.
pub(super) const MAX_OLD: u64 = 1 << 45;

static ZEROES: [u8; BLOCK as usize] = [0; BLOCK as usize];

/// See the module.
pub(super) struct Incoming {
    shown: String,
    /// None: it is whole and durable.
    file: Option<File>,
    /// Bytes of an earlier try.
    old: u64,
    /// Of each block of `old`: a record was about it, and nothing of the earlier try is left unless that has said so.
    settled: Vec<bool>,
    /// Of `old`, once a block of it is compared.
    on_disk: Option<OnDisk>,
    unwritten: u64,
    syncing: Option<JoinHandle<std::io::Result<()>>>,
}

impl Incoming {
    /// `old`: bytes of an earlier try in it, at most [`MAX_OLD`].
    pub fn new(file: File, shown: String, old: u64) -> Incoming {
        let settled = vec![false; old.div_ceil(BLOCK) as usize];
        Incoming { shown, file: Some(file), old, settled, on_disk: None, unwritten: 0, syncing: None }
    }

    pub fn is_closed(&self) -> bool {
        self.file.is_none()
    }

    fn file(&self) -> Result<&File> {
        match &self.file {
            Some(file) => Ok(file),
            None => bail!(Protocol, "the stream has more of {}, which was whole", self.shown),
        }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.settle(offset, data.len() as u64)?;
        self.put(offset, data)
    }

    fn put(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let file = self.file()?;
        store::write_all(file, data, offset).ctx(Kind::Write, || format!("cannot write {} at {offset}", self.shown))?;
        self.unwritten += data.len() as u64;
        if self.unwritten >= WRITE_BACK {
            // Only a hint; the syncs tell how it went. Length 0: to the end.
            cache::start_writeback(self.file()?, 0, 0);
            self.unwritten = 0;
        }
        Ok(())
    }

    /// At most a block, as a zstd frame.
    pub fn unpack(&mut self, offset: u64, bytes: u64, frame: &[u8]) -> Result<()> {
        let unpacked = zstd::bulk::decompress(frame, bytes as usize);
        match unpacked {
            Ok(data) if data.len() as u64 == bytes => self.write(offset, &data),
            Ok(data) => bail!(Protocol, "{} at {offset}: {} bytes were packed, {bytes} said", self.shown, data.len()),
            Err(e) => Err(Error::with(Kind::Protocol, format!("{} at {offset}: cannot be unpacked", self.shown), e)),
        }
    }

    pub fn zero(&mut self, offset: u64, bytes: u64) -> Result<()> {
        self.settle(offset, bytes)?;
        self.put_zeroes(offset, bytes)
    }

    fn put_zeroes(&mut self, offset: u64, bytes: u64) -> Result<()> {
        let mut at = offset;
        while at < offset + bytes {
            if report::cancel::requested() {
                bail!(Sys, "cancelled while {} was written", self.shown);
            }
            let len = (offset + bytes - at).min(BLOCK);
            self.put(at, ZEROES.get(..len as usize).unwrap_or(&ZEROES))?;
            at += len;
        }
        Ok(())
    }

    /// The block is here: is it?
    pub fn keep(&mut self, offset: u64, bytes: u64, sum: &[u8]) -> Result<()> {
        let cannot = || format!("cannot read {}", self.shown);
        let disk = match &mut self.on_disk {
            Some(disk) => disk,
            none => {
                let Some(file) = &self.file else {
                    bail!(Protocol, "the stream has more of {}, which was whole", self.shown)
                };
                none.insert(OnDisk::of(file).ctx(Kind::Read, cannot)?)
            }
        };
        let block = disk.block(offset / BLOCK).ctx(Kind::Read, cannot)?.get(..bytes as usize);
        let same = block.is_some_and(|block| stream::block_sum(block)[..] == *sum);
        let unsettled = self.settled.get_mut((offset / BLOCK) as usize).filter(|settled| !**settled);
        match unsettled {
            Some(settled) if same => {
                *settled = true;
                // What an earlier try has of the block behind these bytes is not part of the file, or comes.
                let end = (offset / BLOCK * BLOCK).saturating_add(BLOCK).min(self.old);
                self.clear(offset + bytes, end)
            }
            _ => bail!(
                Protocol,
                "{} at {offset}: the sender has an earlier try's block here, but there is another one: the list that it \
                 got is out of date; make a new one (ploop receive --kept), and send again",
                self.shown
            ),
        }
    }

    /// Nothing of an earlier try is left in the blocks that these bytes lie in and do not cover.
    fn settle(&mut self, offset: u64, bytes: u64) -> Result<()> {
        let end = offset + bytes;
        let blocks = (offset / BLOCK) as usize..self.settled.len().min(end.div_ceil(BLOCK) as usize);
        for block in blocks {
            if std::mem::replace(&mut self.settled[block], true) {
                continue;
            }
            let start = block as u64 * BLOCK;
            if offset > start || end < start + BLOCK {
                self.clear(start, (start + BLOCK).min(self.old))?;
            }
        }
        Ok(())
    }

    /// A hole, or zeroes where the file system has none.
    fn clear(&mut self, start: u64, end: u64) -> Result<()> {
        if start >= end || store::punch(self.file()?, start, end - start).is_ok() {
            return Ok(());
        }
        self.put_zeroes(start, end - start)
    }

    /// Writes what has come to the disk, in a thread of its own.
    pub fn begin_sync(&mut self) -> Result<()> {
        self.end_sync()?;
        if let Some(file) = &self.file {
            let file = file.try_clone().ctx(Kind::Fsync, || format!("cannot sync {}", self.shown))?;
            self.syncing = Some(std::thread::spawn(move || store::sync_data(&file)));
        }
        Ok(())
    }

    fn end_sync(&mut self) -> Result<()> {
        match self.syncing.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(synced)) => synced.or_else(|e| self.empty(e)),
            Some(Err(_)) => bail!(Sys, "the thread that syncs {} has failed", self.shown),
        }
    }

    /// The file could not be synced: nothing of it counts as kept, for the next sync would report success about pages that never
    /// reached the disk.
    fn empty(&self, failed: std::io::Error) -> Result<()> {
        let emptied = store::set_len(self.file()?, 0);
        let failed = Error::with(Kind::Fsync, format!("cannot sync {}", self.shown), failed);
        Err(match emptied {
            Ok(()) => failed.context("what came of this file is dropped"),
            Err(e) => failed.context(format!("remove {}, it cannot be emptied ({e})", self.shown)),
        })
    }

    /// The file is whole, with this length.
    pub fn close(&mut self, len: u64) -> Result<()> {
        self.end_sync()?;
        for block in 0..self.settled.len() {
            if !self.settled[block] {
                let start = block as u64 * BLOCK;
                self.clear(start, (start + BLOCK).min(self.old))?;
            }
        }
        let file = self.file()?;
        store::set_len(file, len).ctx(Kind::Ftruncate, || format!("cannot give {} its length {len}", self.shown))?;
        store::sync_all(file).or_else(|e| self.empty(e))?;
        (self.file, self.on_disk) = (None, None);
        Ok(())
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        let _ = self.end_sync();
    }
}

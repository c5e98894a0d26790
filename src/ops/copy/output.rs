//! What a sender writes to.
#![forbid(unsafe_code)]

use super::wire;
use crate::error::Result;

/// The copy of one file, wherever it is made.
pub(super) trait Output {
    /// Whole parts of the file, of this many bytes or a multiple, that have no space may be left out: what is not written
    /// reads as zero in the copy. None: everything has to be written.
    fn holes(&self) -> Option<u64>;

    /// Bytes of the file.
    fn write(&mut self, offset: u64, data: &[u8]) -> Result<()>;

    /// What has come is to be written to the disk. `payload` is the begin of the file, for protocols that carry it.
    fn sync(&mut self, payload: &[u8; wire::SYNC as usize]) -> Result<()>;

    /// All has been written.
    fn end(&mut self) -> Result<()>;
}

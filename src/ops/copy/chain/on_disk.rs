//! What of a file is on its disk.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;

use super::stream::BLOCK;
use crate::sys::aligned::{AlignedBuf, read_full};
use crate::sys::cache;
use crate::sys::reopen::{Access, reopen};

/// Reads blocks of a file from its disk. The page cache may hold what never reached it: pages whose writeback has failed count as
/// clean, and a later sync succeeds.
pub(super) struct OnDisk {
    file: File,
    direct: bool,
    buf: AlignedBuf,
}

impl OnDisk {
    pub fn of(file: &File) -> io::Result<OnDisk> {
        // All of the file: a large page goes only as a whole.
        cache::drop_clean(file, 0, 0);
        let (file, direct) = reopen(file, Access { write: false, direct: true })?;
        Ok(OnDisk { file, direct, buf: AlignedBuf::new(BLOCK as usize) })
    }

    /// What the file has of this block, which may end before it.
    pub fn block(&mut self, number: u64) -> io::Result<&[u8]> {
        let offset = number.saturating_mul(BLOCK);
        if !self.direct {
            cache::drop_clean(&self.file, offset, BLOCK);
        }
        let read = read_full(&self.file, &mut self.buf, offset)?;
        Ok(self.buf.get(..read).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_block_is_as_it_was_written() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let file = File::options().read(true).write(true).create_new(true).open(dir.path().join("f")).unwrap();
        file.write_all_at(&[1; 100], BLOCK - 50).unwrap();
        file.write_all_at(&[2; 10], 3 * BLOCK + 700).unwrap();
        let mut disk = OnDisk::of(&file).unwrap();
        let first = disk.block(0).unwrap();
        assert!(first.len() as u64 == BLOCK && first.ends_with(&[1; 50]) && first.starts_with(&[0; 50]));
        // What is written later counts, too.
        file.write_all_at(&[3; 4096], 0).unwrap();
        assert!(disk.block(0).unwrap().starts_with(&[3; 4096]));
        let last = disk.block(3).unwrap();
        assert!(last.len() == 710 && last.ends_with(&[2; 10]), "{}", last.len());
        assert!(disk.block(4).unwrap().is_empty());
    }
}

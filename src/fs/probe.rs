//! Which file system is on a device, and whether its journal has to be replayed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// A file system recognised by its superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// ext2, ext3 or ext4; `ext4` drives all of them.
    Ext {
        needs_recovery: bool,
    },
    Xfs,
    Btrfs,
}

impl Found {
    /// The type to mount it as.
    pub fn name(self) -> &'static str {
        match self {
            Found::Ext { .. } => "ext4",
            Found::Xfs => "xfs",
            Found::Btrfs => "btrfs",
        }
    }

    /// Options without which a read-only device with a journal to replay cannot be mounted.
    pub fn without_replay(self) -> Option<&'static str> {
        match self {
            Found::Ext { needs_recovery: true } => Some("noload"),
            Found::Ext { needs_recovery: false } => None,
            Found::Xfs => Some("norecovery"),
            Found::Btrfs => Some("rescue=nologreplay"),
        }
    }
}

/// Reads bytes of a disk at a byte offset, all or nothing.
pub type ReadAt<'a> = dyn FnMut(u64, &mut [u8]) -> io::Result<()> + 'a;

/// Looks at the superblocks of a device or file.
pub fn device(path: &Path) -> io::Result<Option<Found>> {
    let file: File = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
    find(&mut |offset, buf| file.read_exact_at(buf, offset))
}

/// Looks at the superblocks through any reader. A superblock beyond the end counts as missing.
pub fn find(read_at: &mut ReadAt<'_>) -> io::Result<Option<Found>> {
    let mut block = [0; 1024];
    if read(read_at, 1024, &mut block)? && block[56..58] == [0x53, 0xEF] {
        // s_feature_incompat, bit RECOVER.
        return Ok(Some(Found::Ext { needs_recovery: block[0x60] & 4 != 0 }));
    }
    if read(read_at, 0, &mut block[..512])? && &block[..4] == b"XFSB" {
        return Ok(Some(Found::Xfs));
    }
    if read(read_at, 65536, &mut block[..512])? && &block[64..72] == b"_BHRfS_M" {
        return Ok(Some(Found::Btrfs));
    }
    Ok(None)
}

fn read(read_at: &mut ReadAt<'_>, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
    match read_at(offset, buf) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        other => other.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(bytes: &[u8]) -> Option<Found> {
        find(&mut |o, buf| {
            let o = o as usize;
            buf.copy_from_slice(bytes.get(o..o + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        })
        .unwrap()
    }

    #[test]
    fn superblocks() {
        let mut d = vec![0; 128 * 1024];
        assert_eq!(look(&d), None);
        assert_eq!(look(&[]), None);
        d[65536 + 64..65536 + 72].copy_from_slice(b"_BHRfS_M");
        assert_eq!(look(&d), Some(Found::Btrfs));
        d[..4].copy_from_slice(b"XFSB");
        assert_eq!(look(&d), Some(Found::Xfs));
        d[1080..1082].copy_from_slice(&[0x53, 0xEF]);
        assert_eq!(look(&d), Some(Found::Ext { needs_recovery: false }));
        d[1024 + 0x60] = 4;
        assert_eq!(look(&d).and_then(Found::without_replay), Some("noload"));
    }
}

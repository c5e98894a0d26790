//! Syncs of the top, and what it means that one found no space.
//!
//! ENOSPC or EDQUOT from fdatasync(2) has two causes. The call itself found no space for what it had to do (btrfs needs
//! space to commit): then nothing is lost, and a later call covers what this one was to cover. Or write-back had failed
//! before: then the bytes are gone, the next call succeeds and says nothing of them. The kernel records a failed
//! write-back in the file and reports it once to each open file description, whichever process caused it. The witness,
//! a description of the same file that the supervisor has opened and that is not synced otherwise, tells the two apart:
//! the sync is repeated until it succeeds, and counts only if one of the witness succeeds after it. Until then the
//! engine answers no flush, and keeps the changed entries in the shared table. If the witness reports an error, whatever
//! it is, the sync has failed for good.
//!
//! That holds where the file system is known to record such errors: ext4, XFS, btrfs. Elsewhere (FUSE, NFS and all
//! others) a sync without space is final, as any other error is. A worker that is killed while a sync waits for space
//! leaves its outcome to the next one, which asks the witness too: if that finds no space either, it counts as failed.
#![forbid(unsafe_code)]

use std::fs::File;

use nix::errno::Errno;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, fstatfs};
use nix::unistd::fdatasync;

/// Whether the file's file system reports each failed write-back once to every open description of it.
fn records_write_back_errors(file: &File) -> bool {
    let known = [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC];
    fstatfs(file).is_ok_and(|s| known.contains(&s.filesystem_type()))
}

fn lacks_space(e: Errno) -> bool {
    matches!(e, Errno::ENOSPC | Errno::EDQUOT)
}

/// The syncs of one file; see the module.
pub struct TopSync {
    /// A description that is not synced otherwise; none where it would tell nothing.
    witness: Option<File>,
    /// A sync has found no space, and none of the witness has succeeded since.
    in_doubt: bool,
}

impl TopSync {
    /// `witness`: another open description of the file.
    pub fn new(witness: Option<File>) -> TopSync {
        TopSync { witness: witness.filter(records_write_back_errors), in_doubt: false }
    }

    /// Syncs the file. ENOSPC and EDQUOT say that nothing is lost, as far as is known by now; any other error is final.
    pub fn sync(&mut self, file: &File) -> Result<(), Errno> {
        self.judge(|| fdatasync(file), |witness| fdatasync(witness))
    }

    fn judge(
        &mut self,
        sync: impl Fn() -> nix::Result<()>,
        sync_witness: impl Fn(&File) -> nix::Result<()>,
    ) -> Result<(), Errno> {
        match (retried(sync), &self.witness) {
            (Err(e), Some(_)) if lacks_space(e) => {
                self.in_doubt = true;
                Err(e)
            }
            (Err(e), None) if lacks_space(e) => Err(Errno::EIO),
            (Ok(()), Some(witness)) if self.in_doubt => {
                retried(|| sync_witness(witness)).map_err(|_| Errno::EIO)?;
                self.in_doubt = false;
                Ok(())
            }
            (other, _) => other,
        }
    }
}

fn retried(call: impl Fn() -> nix::Result<()>) -> nix::Result<()> {
    loop {
        match call() {
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn with_witness() -> TopSync {
        TopSync { witness: Some(tempfile::tempfile().unwrap()), in_doubt: false }
    }

    #[test]
    fn a_sync_without_space_counts_when_the_witness_has_seen_no_error() {
        for full in [Errno::ENOSPC, Errno::EDQUOT] {
            let mut top = with_witness();
            let asked = Cell::new(0);
            let witness = |_: &File| {
                asked.set(asked.get() + 1);
                Ok(())
            };
            assert_eq!(top.judge(|| Ok(()), witness), Ok(()));
            assert_eq!(asked.get(), 0, "not without need");
            assert_eq!(top.judge(|| Err(full), witness), Err(full));
            assert_eq!(top.judge(|| Err(full), witness), Err(full));
            assert_eq!(asked.get(), 0, "its report is kept for the sync that succeeds");
            assert_eq!(top.judge(|| Ok(()), witness), Ok(()));
            assert_eq!(asked.get(), 1);
        }
    }

    #[test]
    fn write_back_that_failed_for_want_of_space_is_final() {
        for reported in [Errno::ENOSPC, Errno::EIO] {
            let mut top = with_witness();
            assert_eq!(top.judge(|| Err(Errno::ENOSPC), |_| Ok(())), Err(Errno::ENOSPC));
            assert_eq!(top.judge(|| Ok(()), |_| Err(reported)), Err(Errno::EIO));
        }
    }

    #[test]
    fn where_the_witness_tells_nothing_a_sync_without_space_is_final() {
        let mut top = TopSync::new(None);
        assert_eq!(top.judge(|| Err(Errno::EDQUOT), |_| Ok(())), Err(Errno::EIO));
        assert_eq!(top.judge(|| Err(Errno::EIO), |_| Ok(())), Err(Errno::EIO));
    }
}

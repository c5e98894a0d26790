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
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, fstatfs};
use nix::unistd::fdatasync;

use crate::server::shm::Shm;

/// Whether the file's file system reports each failed write-back once to every open description of it.
fn records_write_back_errors(file: &OwnedFd) -> bool {
    let known = [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC];
    fstatfs(file).is_ok_and(|s| known.contains(&s.filesystem_type()))
}

fn lacks_space(e: Errno) -> bool {
    matches!(e, Errno::ENOSPC | Errno::EDQUOT)
}

/// The syncs of one file; see the module.
pub struct TopSync<'a> {
    /// Descriptions that are not synced otherwise; none where they would tell nothing.
    witnesses: &'a [OwnedFd],
    shm: &'a Shm,
    /// A sync has found no space, and none of the witness has succeeded since.
    in_doubt: bool,
}

impl<'a> TopSync<'a> {
    /// `witnesses`: other open descriptions of the file.
    pub fn new(witnesses: &'a [OwnedFd], shm: &'a Shm) -> TopSync<'a> {
        let tells = witnesses.first().is_some_and(records_write_back_errors);
        TopSync { witnesses: if tells { witnesses } else { &[] }, shm, in_doubt: false }
    }

    /// Syncs the file. ENOSPC and EDQUOT say that nothing is lost, as far as is known by now; any other error is final.
    pub fn sync(&mut self, file: &File) -> Result<(), Errno> {
        self.judge(|| fdatasync(file), |witness| fdatasync(witness))
    }

    fn judge(
        &mut self,
        sync: impl Fn() -> nix::Result<()>,
        sync_witness: impl Fn(&OwnedFd) -> nix::Result<()>,
    ) -> Result<(), Errno> {
        match (retried(sync), self.witnesses) {
            (Err(e), []) if lacks_space(e) => Err(Errno::EIO),
            (Err(e), _) if lacks_space(e) => {
                self.in_doubt = true;
                Err(e)
            }
            (Ok(()), [_, ..]) if self.in_doubt => {
                ask(self.shm, self.witnesses, sync_witness)?;
                self.in_doubt = false;
                Ok(())
            }
            (other, _) => other,
        }
    }
}

/// Asks a witness whether all that was written to its file is on stable storage: the kernel tells each open description
/// once of an error of write-back since it was opened, whichever process caused it. An error: it is not, or that is not
/// known, since workers were killed while they asked.
pub fn ask(shm: &Shm, witnesses: &[OwnedFd], sync: impl Fn(&OwnedFd) -> nix::Result<()>) -> Result<(), Errno> {
    let next = shm.begin_asking(witnesses.len()).and_then(|next| witnesses.get(next)).ok_or(Errno::EIO)?;
    retried(|| sync(next)).map_err(|_| Errno::EIO)?;
    shm.end_asking();
    Ok(())
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
    use std::os::fd::{AsFd, AsRawFd};

    use super::*;
    use crate::server::shm;

    fn witnesses(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| tempfile::tempfile().unwrap().into()).collect()
    }

    fn memory() -> Shm {
        Shm::map(shm::create().unwrap().as_fd()).unwrap()
    }

    fn with<'a>(witnesses: &'a [OwnedFd], shm: &'a Shm) -> TopSync<'a> {
        TopSync { witnesses, shm, in_doubt: false }
    }

    #[test]
    fn a_sync_without_space_counts_when_the_witness_has_seen_no_error() {
        let (shm, all) = (memory(), witnesses(1));
        for full in [Errno::ENOSPC, Errno::EDQUOT] {
            let mut top = with(&all, &shm);
            let asked = Cell::new(0);
            let witness = |_: &OwnedFd| {
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
        let (shm, all) = (memory(), witnesses(2));
        for reported in [Errno::ENOSPC, Errno::EIO] {
            let mut top = with(&all, &shm);
            assert_eq!(top.judge(|| Err(Errno::ENOSPC), |_| Ok(())), Err(Errno::ENOSPC));
            assert_eq!(top.judge(|| Ok(()), |_| Err(reported)), Err(Errno::EIO));
        }
    }

    #[test]
    fn where_the_witness_tells_nothing_a_sync_without_space_is_final() {
        let shm = memory();
        let mut top = TopSync::new(&[], &shm);
        assert_eq!(top.judge(|| Err(Errno::EDQUOT), |_| Ok(())), Err(Errno::EIO));
        assert_eq!(top.judge(|| Err(Errno::EIO), |_| Ok(())), Err(Errno::EIO));
    }

    /// As the kernel does it: each description is told of an error once.
    #[test]
    fn a_report_that_a_killed_worker_took_with_it_is_had_from_another_witness() {
        let (shm, all) = (memory(), witnesses(3));
        let told = Cell::new(Vec::new());
        let sync = |w: &OwnedFd| {
            let mut seen = told.take();
            let first = !seen.contains(&w.as_raw_fd());
            seen.push(w.as_raw_fd());
            told.set(seen);
            if first { Err(Errno::EIO) } else { Ok(()) }
        };
        // Killed behind the system call, twice.
        for _ in 0..2 {
            let next = shm.begin_asking(all.len()).unwrap();
            assert_eq!(sync(&all[next]), Err(Errno::EIO));
        }
        assert!(shm.is_asking());
        assert_eq!(ask(&shm, &all, sync), Err(Errno::EIO));
        // Once more: no witness is left that could tell.
        assert_eq!(ask(&shm, &all, sync), Err(Errno::EIO));
        assert_eq!(ask(&shm, &all, |_| Ok(())), Err(Errno::EIO));
    }

    #[test]
    fn kills_without_an_error_use_up_no_witness() {
        let (shm, all) = (memory(), witnesses(3));
        for _ in 0..5 {
            shm.begin_asking(all.len()).unwrap();
            shm.begin_asking(all.len()).unwrap();
            assert_eq!(ask(&shm, &all, |_| Ok(())), Ok(()));
            assert!(!shm.is_asking());
        }
        // The server of an earlier version has opened one.
        shm.begin_asking(1);
        assert_eq!(ask(&shm, &all[..1], |_| Ok(())), Ok(()));
    }
}

//! Descriptors beside a message, each with its role. The message lists the roles in the order in which the descriptors
//! travel; a receiver takes each one by its role and passes over roles that it does not know.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use crate::bail;
use crate::descriptor::commit_by_fd::CommitFds;
use crate::error::{IoContext, Kind, Result};

/// What a descriptor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Requests come by it: see `transport::Queue`.
    Queue,
    SharedMemory,
    /// A description of the top, opened at attach and used only to find out, after a worker's exit, whether write-back
    /// failed; for a read-only device /dev/null.
    Witness,
    /// More of them, opened at the same time: see [`shm::Shm::begin_asking`](super::shm::Shm::begin_asking).
    SpareWitness,
    /// O_PATH, the server's program.
    Program,
    /// The listening control socket.
    Listener,
    /// An image of the running chain, base first; its locks keep other programs away. Of an earlier version O_PATH.
    Level,
    /// O_PATH, an image that the running chain does not have; base first.
    NewLevel,
    /// O_PATH, of a change's commit: the folder, and the new descriptor in it.
    CommitFolder,
    CommitFile,
    /// The lock on the disk: held as long as a process has it open.
    DiskLock,
    /// The same of the change that follows a merge.
    MergeFolder,
    MergeFile,
    MergeDiskLock,
    /// The request journal of the worker before: a table and the data.
    Journal,
    /// The connection to the worker.
    Worker,
    /// A client that waits for an answer.
    Client,
    /// A later version's.
    #[serde(other)]
    Unknown,
}

/// Descriptors to be sent, with their roles.
#[derive(Default)]
pub struct Outgoing<'a> {
    pub roles: Vec<Role>,
    pub fds: Vec<BorrowedFd<'a>>,
}

impl<'a> Outgoing<'a> {
    pub fn add(&mut self, role: Role, fds: impl IntoIterator<Item = &'a OwnedFd>) -> &mut Self {
        for fd in fds {
            self.add_borrowed(role, fd.as_fd());
        }
        self
    }

    pub fn add_borrowed(&mut self, role: Role, fd: BorrowedFd<'a>) -> &mut Self {
        self.roles.push(role);
        self.fds.push(fd);
        self
    }

    /// What a commit needs.
    pub fn add_commit(&mut self, commit: Option<&'a CommitFds>) -> &mut Self {
        if let Some(c) = commit {
            self.add(Role::CommitFolder, [&c.folder]).add(Role::CommitFile, [&c.file]).add(Role::DiskLock, &c.lock);
        }
        self
    }

    /// What the commit of the change that follows a merge needs.
    pub fn add_merge(&mut self, commit: Option<&'a CommitFds>) -> &mut Self {
        if let Some(c) = commit {
            self.add(Role::MergeFolder, [&c.folder]).add(Role::MergeFile, [&c.file]).add(Role::MergeDiskLock, &c.lock);
        }
        self
    }
}

/// Descriptors as they came.
#[derive(Debug)]
pub struct ByRole(Vec<(Role, OwnedFd)>);

impl ByRole {
    pub fn new(roles: &[Role], fds: Vec<OwnedFd>) -> Result<ByRole> {
        if roles.len() != fds.len() {
            bail!(Protocol, "{} descriptors came with a message that has roles for {}", fds.len(), roles.len());
        }
        Ok(ByRole(roles.iter().copied().zip(fds).collect()))
    }

    /// All of a role, in the order in which they were sent.
    pub fn all(&mut self, role: Role) -> Vec<OwnedFd> {
        let (taken, rest) = std::mem::take(&mut self.0).into_iter().partition(|(r, _)| *r == role);
        self.0 = rest;
        let taken: Vec<(Role, OwnedFd)> = taken;
        taken.into_iter().map(|(_, fd)| fd).collect()
    }

    /// The one of this role, if there is one.
    pub fn optional(&mut self, role: Role) -> Result<Option<OwnedFd>> {
        let mut found = self.all(role);
        if found.len() > 1 {
            bail!(Protocol, "{} descriptors of the role {role:?} came: at most one wanted", found.len());
        }
        Ok(found.pop())
    }

    /// The one of this role.
    pub fn one(&mut self, role: Role) -> Result<OwnedFd> {
        match self.optional(role)? {
            Some(fd) => Ok(fd),
            None => bail!(Protocol, "no descriptor of the role {role:?} came: one wanted"),
        }
    }

    /// So many of this role.
    pub fn some(&mut self, role: Role, wanted: usize) -> Result<Vec<OwnedFd>> {
        let found = self.all(role);
        if found.len() != wanted {
            bail!(Protocol, "{} descriptors of the role {role:?} came: {wanted} wanted", found.len());
        }
        Ok(found)
    }

    /// What a commit needs, if the message has one.
    pub fn commit(&mut self) -> Result<Option<CommitFds>> {
        self.commit_of(Role::CommitFolder, Role::CommitFile, Role::DiskLock)
    }

    /// What the commit of the change that follows a merge needs, if there is one.
    pub fn merge(&mut self) -> Result<Option<CommitFds>> {
        self.commit_of(Role::MergeFolder, Role::MergeFile, Role::MergeDiskLock)
    }

    fn commit_of(&mut self, folder: Role, file: Role, lock: Role) -> Result<Option<CommitFds>> {
        let lock = self.optional(lock)?;
        match (self.optional(folder)?, self.optional(file)?) {
            (Some(folder), Some(file)) => Ok(Some(CommitFds { folder, file, lock })),
            (None, None) if lock.is_none() => Ok(None),
            _ => bail!(Protocol, "of {folder:?} and {file:?} only one descriptor came: both wanted"),
        }
    }
}

/// Another descriptor of the same open file.
pub fn duplicate(fd: &OwnedFd) -> Result<OwnedFd> {
    fd.try_clone().ctx(Kind::Sys, || "cannot duplicate a descriptor")
}

/// The same for what a commit needs.
pub fn duplicate_commit(commit: Option<&CommitFds>) -> Result<Option<CommitFds>> {
    let Some(c) = commit else { return Ok(None) };
    let lock = c.lock.as_ref().map(duplicate).transpose()?;
    Ok(Some(CommitFds { folder: duplicate(&c.folder)?, file: duplicate(&c.file)?, lock }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    fn open(n: usize) -> Vec<OwnedFd> {
        (0..n).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect()
    }

    #[test]
    fn taken_by_role_in_any_order() {
        use Role::*;
        let fds = open(7);
        let numbers: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let roles = [Level, CommitFile, Unknown, Level, DiskLock, Queue, CommitFolder];
        let mut by = ByRole::new(&roles, fds).unwrap();
        assert_eq!(by.one(Queue).unwrap().as_raw_fd(), numbers[5]);
        let commit = by.commit().unwrap().unwrap();
        let lock = commit.lock.as_ref().map(AsRawFd::as_raw_fd);
        assert_eq!(
            (commit.folder.as_raw_fd(), commit.file.as_raw_fd(), lock),
            (numbers[6], numbers[1], Some(numbers[4]))
        );
        let levels: Vec<i32> = by.some(Level, 2).unwrap().iter().map(AsRawFd::as_raw_fd).collect();
        assert_eq!(levels, [numbers[0], numbers[3]]);
        assert!(by.commit().unwrap().is_none());
        assert_eq!(by.one(Queue).unwrap_err().kind(), Kind::Protocol);
    }

    #[test]
    fn too_few_too_many_and_unknown() {
        use Role::*;
        assert!(ByRole::new(&[Queue], open(2)).is_err());
        assert!(ByRole::new(&[Queue, Queue], open(2)).unwrap().one(Queue).is_err());
        assert!(ByRole::new(&[Level, Level], open(2)).unwrap().some(Level, 3).is_err());
        for half in [CommitFolder, CommitFile, DiskLock] {
            assert!(ByRole::new(&[half], open(1)).unwrap().commit().is_err(), "{half:?}");
        }
        // A role of a later version is read, and its descriptor closed.
        let roles: Vec<Role> = serde_json::from_str(r#"["Level","Keyring"]"#).unwrap();
        assert_eq!(roles, [Level, Unknown]);
    }
}

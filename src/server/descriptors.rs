//! The descriptors that make a device: the supervisor holds them, each worker gets them with its first message, and a
//! worker that loses its supervisor gives them to the next one.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use crate::bail;
use crate::descriptor::commit_by_fd::CommitFds;
use crate::error::{IoContext, Kind, Result};
use crate::server::proto::{ChainSwitch, WorkerStart};
use crate::server::roles::{ByRole, Outgoing, Role};

/// See the module.
#[derive(Debug)]
pub struct Descriptors {
    pub queue: OwnedFd,
    pub shm: OwnedFd,
    /// Descriptions of the top that were opened at the same time; at least one.
    pub witnesses: Vec<OwnedFd>,
    pub binary: OwnedFd,
    pub listener: OwnedFd,
    /// Base first; each has the locks that keep other programs away, or is O_PATH: see [`exclusion`](crate::server::exclusion).
    pub levels: Vec<OwnedFd>,
    /// Of a change of the chain that a worker is to make.
    pub commit: Option<CommitFds>,
    /// Of the change that follows a merge.
    pub merge: Option<CommitFds>,
}

/// What comes with a [`WorkerStart`].
#[derive(Debug)]
pub struct Received {
    pub fds: Descriptors,
    /// The request journal of the worker that serves, or served last; empty: it has answered all, or the kernel keeps its
    /// requests. To a new worker: what it is to replay. To a new supervisor: what it must keep for the next worker, since
    /// it is not sent again.
    pub journal: Vec<OwnedFd>,
    /// Those of the change in whose favour the sender has retired.
    pub retired: SwitchFds,
}

/// The descriptors of a change of the chain.
#[derive(Debug, Default)]
pub struct SwitchFds {
    /// O_PATH, for each level that the running chain does not have, base first.
    pub new: Vec<OwnedFd>,
    pub commit: Option<CommitFds>,
}

/// A worker that is killed can take the report of one with it.
const WITNESSES: usize = 6;

impl Descriptors {
    /// Descriptions of a top that nothing is read from or written to: each of them is told of errors of write-back from
    /// now on. None: of a read-only device.
    pub fn witnesses_of(top: Option<&OwnedFd>) -> Result<Vec<OwnedFd>> {
        let path = top.map_or("/dev/null".into(), |top| format!("/proc/self/fd/{}", top.as_raw_fd()));
        let open = || File::open(&path).map(OwnedFd::from).ctx(Kind::Open, || "cannot open the top image");
        (0..if top.is_some() { WITNESSES } else { 1 }).map(|_| open()).collect()
    }

    /// All of them, in the order in which versions without roles expect them.
    pub fn outgoing(&self) -> Outgoing<'_> {
        let mut out = self.without_merge();
        out.add_commit(self.commit.as_ref()).add_merge(self.merge.as_ref());
        out
    }

    /// Those of the device and its chain.
    pub fn without_merge(&self) -> Outgoing<'_> {
        let mut out = Outgoing::default();
        out.add(Role::Queue, [&self.queue])
            .add(Role::SharedMemory, [&self.shm])
            .add(Role::Witness, self.witnesses.iter().take(1))
            .add(Role::Program, [&self.binary])
            .add(Role::Listener, [&self.listener])
            .add(Role::Level, &self.levels)
            .add(Role::SpareWitness, self.witnesses.iter().skip(1));
        out
    }

    /// What came with `start`.
    pub fn received(start: &WorkerStart, fds: Vec<OwnedFd>) -> Result<Received> {
        let by = match start.roles.is_empty() {
            false => ByRole::new(&start.roles, fds)?,
            true => ByRole::new(&positions(start, fds.len())?, fds)?,
        };
        Descriptors::from_roles(start, by)
    }

    /// The same, where what came had descriptors of other roles besides.
    pub fn from_roles(start: &WorkerStart, mut by: ByRole) -> Result<Received> {
        let levels = start.attach.levels.len();
        if levels == 0 {
            bail!(Protocol, "a start for a chain without images was received");
        }
        let (commit, retired) = match &start.retired {
            None => (by.commit()?, SwitchFds::default()),
            Some(switch) => (None, SwitchFds::take(switch, &mut by)?),
        };
        let wanted = start.succeed.as_ref().is_some_and(|s| s.commit.is_some());
        if commit.is_some() != wanted {
            bail!(Protocol, "a start was received whose commit and descriptors do not belong together");
        }
        let fds = Descriptors {
            queue: by.one(Role::Queue)?,
            shm: by.one(Role::SharedMemory)?,
            witnesses: std::iter::once(by.one(Role::Witness)?).chain(by.all(Role::SpareWitness)).collect(),
            binary: by.one(Role::Program)?,
            listener: by.one(Role::Listener)?,
            levels: by.some(Role::Level, levels)?,
            commit,
            merge: by.merge()?,
        };
        Ok(Received { fds, journal: by.all(Role::Journal), retired })
    }

    /// The server's program, whatever became of its file's name.
    pub fn program(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.binary.as_raw_fd()).into()
    }
}

impl SwitchFds {
    /// What came with `switch`.
    pub fn received(switch: &ChainSwitch, fds: Vec<OwnedFd>) -> Result<SwitchFds> {
        let mut by = match switch.roles.is_empty() {
            false => ByRole::new(&switch.roles, fds)?,
            true => ByRole::new(&switch_positions(switch, fds.len())?, fds)?,
        };
        SwitchFds::take(switch, &mut by)
    }

    fn take(switch: &ChainSwitch, by: &mut ByRole) -> Result<SwitchFds> {
        let new = by.some(Role::NewLevel, switch.new_levels())?;
        let commit = by.commit()?;
        if commit.is_some() != switch.commit.is_some() {
            bail!(Protocol, "a change was received whose commit and descriptors do not belong together");
        }
        Ok(SwitchFds { new, commit })
    }

    pub fn outgoing(&self) -> Outgoing<'_> {
        let mut out = Outgoing::default();
        self.add_to(&mut out);
        out
    }

    pub fn add_to<'a>(&'a self, out: &mut Outgoing<'a>) {
        out.add(Role::NewLevel, &self.new).add_commit(self.commit.as_ref());
    }
}

/// The roles in a start of versions 1 and 2, by position.
fn positions(start: &WorkerStart, count: usize) -> Result<Vec<Role>> {
    let mut roles = vec![Role::Queue, Role::SharedMemory, Role::Witness, Role::Program, Role::Listener];
    roles.extend(start.attach.levels.iter().map(|_| Role::Level));
    let fixed = roles.len() + start.merge_fds + start.slot_fds;
    let Some(change) = count.checked_sub(fixed) else {
        bail!(Protocol, "{count} descriptors came for {} images: {fixed} wanted", start.attach.levels.len());
    };
    match &start.retired {
        Some(switch) => roles.extend(switch_positions(switch, change)?),
        None => roles.extend(commit_positions(change)?),
    }
    let merge = [Role::MergeFolder, Role::MergeFile, Role::MergeDiskLock];
    roles.extend(merge.into_iter().take(start.merge_fds));
    roles.extend((0..start.slot_fds).map(|_| Role::Journal));
    Ok(roles)
}

/// The same for a change of the chain.
fn switch_positions(switch: &ChainSwitch, count: usize) -> Result<Vec<Role>> {
    let new = switch.new_levels();
    let Some(commit) = count.checked_sub(new) else {
        bail!(Protocol, "{count} descriptors came for a change with {new} new images");
    };
    let mut roles = vec![Role::NewLevel; new];
    roles.extend(commit_positions(commit)?);
    Ok(roles)
}

fn commit_positions(count: usize) -> Result<Vec<Role>> {
    let all = [Role::CommitFolder, Role::CommitFile, Role::DiskLock];
    match count {
        0 | 2 | 3 => Ok(all[..count].to_vec()),
        _ => bail!(Protocol, "{count} descriptors came for a commit: 2 or 3 wanted"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::proto::{CommitNames, LevelName, Succession, SwitchLevel};

    fn open(n: usize) -> Vec<OwnedFd> {
        (0..n).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect()
    }

    fn number(fd: &OwnedFd) -> i32 {
        fd.as_raw_fd()
    }

    fn start(levels: usize) -> WorkerStart {
        let attach = serde_json::json!({
            "levels": vec![LevelName { path: "x".into(), raw: false }; levels],
            "read_only": false, "marked": "Refuse", "component": "", "trace": false, "ids": [],
        });
        let session = serde_json::json!({ "minor": 45, "max_write": 1 << 20, "flags": 0 });
        let start =
            serde_json::json!({ "attach": attach, "takeover": false, "fuse": session, "device_name": "ploop0" });
        serde_json::from_value(start).unwrap()
    }

    fn commit() -> Option<CommitNames> {
        Some(CommitNames { tmp: "a".into(), name: "b".into() })
    }

    fn switch(new: usize) -> ChainSwitch {
        let level =
            SwitchLevel { name: LevelName { path: "y".into(), raw: false }, id: Default::default(), from: None };
        ChainSwitch { levels: vec![level; new], commit: commit(), ..ChainSwitch::default() }
    }

    #[test]
    fn what_is_sent_arrives_in_its_place() {
        let mut start = start(2);
        start.succeed = Some(Succession { wait: false, new_top: false, commit: commit(), grow: None, linger: 0 });
        let made = Received {
            fds: Descriptors::received(&WorkerStart { slot_fds: 2, merge_fds: 3, ..start.clone() }, open(14))
                .unwrap()
                .fds,
            journal: open(2),
            retired: SwitchFds::default(),
        };
        let mut out = made.fds.outgoing();
        out.add(Role::Journal, &made.journal);
        start.roles = out.roles.clone();
        // Whatever the order, and with a role in between that is not known.
        start.roles.reverse();
        start.roles.insert(3, Role::Unknown);
        let mut fds: Vec<OwnedFd> = out.fds.iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
        fds.reverse();
        fds.insert(3, open(1).remove(0));
        let numbers: Vec<i32> = fds.iter().map(number).collect();
        let got = Descriptors::received(&start, fds).unwrap();
        let last = numbers.len() - 1;
        assert_eq!([number(&got.fds.queue), number(&got.fds.shm)], [numbers[last], numbers[last - 1]]);
        assert_eq!((got.fds.levels.len(), got.journal.len()), (2, 2));
        assert!(got.fds.merge.is_some_and(|m| m.lock.is_some()) && got.fds.commit.is_some());
    }

    #[test]
    fn positions_of_versions_without_roles() {
        let plain = start(2);
        for too_few in [0, 4, 6] {
            assert!(Descriptors::received(&plain, open(too_few)).is_err(), "{too_few}");
        }
        assert!(Descriptors::received(&plain, open(8)).is_err(), "one more than wanted");
        assert!(Descriptors::received(&plain, open(9)).is_err(), "a commit that the message does not have");
        assert!(Descriptors::received(&start(0), open(5)).is_err());
        let fds = open(7);
        let numbers: Vec<i32> = fds.iter().map(number).collect();
        let got = Descriptors::received(&plain, fds).unwrap();
        assert_eq!(got.fds.levels.iter().map(number).collect::<Vec<_>>(), numbers[5..]);
        // A worker that has retired sends the change, too.
        let retired = WorkerStart { retired: Some(switch(1)), merge_fds: 2, ..start(1) };
        let got = Descriptors::received(&retired, open(11)).unwrap();
        assert_eq!(got.retired.new.len(), 1);
        assert!(got.retired.commit.is_some_and(|c| c.lock.is_none()) && got.fds.merge.is_some());
    }

    #[test]
    fn a_change_has_what_it_names() {
        let switch = switch(2);
        assert_eq!(SwitchFds::received(&switch, open(5)).unwrap().new.len(), 2);
        for wrong in [0, 1, 2, 3, 6] {
            assert!(SwitchFds::received(&switch, open(wrong)).is_err(), "{wrong}");
        }
        let none = ChainSwitch { commit: None, ..switch };
        assert!(SwitchFds::received(&none, open(2)).is_ok());
        assert!(SwitchFds::received(&none, open(4)).is_err());
    }
}

//! Records the steps of one folder, and makes up the folders that a crash after any of them can leave.
//!
//! A kill leaves all steps. After a power cut a write is there if a sync of its file began after it, and so are names
//! with a sync of the folder; of all else any part can be: writes in pieces of a page, names in any order.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Step;

type Id = usize;

#[derive(Clone, Debug)]
enum Op {
    Create(PathBuf, Id),
    Write(Id, u64, Vec<u8>),
    SetLen(Id, u64),
    Extend(Id, u64),
    /// Of what was recorded before this index.
    Sync(Id, usize),
    Rename(PathBuf, PathBuf, Id),
    /// Of a folder, with all that is in it.
    RenameDir(PathBuf, PathBuf),
    Link(PathBuf, Id),
    Unlink(PathBuf),
    SyncDir(PathBuf, usize),
}

/// Names and contents.
type Files = BTreeMap<Id, Vec<u8>>;
type Names = BTreeMap<PathBuf, Id>;

#[derive(Default)]
struct State {
    first: (Names, Files),
    names: Names,
    next: Id,
    ops: Vec<Op>,
    begun: usize,
    /// The step that fails, counted from 0, and its error number.
    fail: Option<(usize, i32)>,
    /// That step was to make the entries of a folder durable.
    failed_folder: bool,
    /// That step was to make this file durable.
    failed_sync: Option<PathBuf>,
    /// Syncs of this are taken for not made.
    ignored: Option<Thing>,
}

/// The recorder of a folder, until it is dropped.
pub struct Recorder {
    root: PathBuf,
    state: Mutex<State>,
}

static ALL: Mutex<Vec<Arc<Recorder>>> = Mutex::new(Vec::new());

fn all() -> MutexGuard<'static, Vec<Arc<Recorder>>> {
    ALL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Stops the recording when dropped.
pub struct Guard(pub Arc<Recorder>);

impl Drop for Guard {
    fn drop(&mut self) {
        all().retain(|r| !Arc::ptr_eq(r, &self.0));
    }
}

/// Starts recording: everything in the folder is taken for durable. With `fail` that step fails with that error number.
pub fn start(root: &Path, fail: Option<(usize, i32)>) -> Guard {
    let root = root.canonicalize().unwrap();
    let mut state = State { fail, ..State::default() };
    for entry in std::fs::read_dir(&root).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            state.first.1.insert(state.next, std::fs::read(&path).unwrap());
            state.first.0.insert(path, state.next);
            state.next += 1;
        }
    }
    state.names = state.first.0.clone();
    let recorder = Arc::new(Recorder { root, state: Mutex::new(state) });
    all().push(recorder.clone());
    Guard(recorder)
}

pub(super) fn path_of(file: &impl AsRawFd) -> PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_default()
}

pub(super) fn watched<T>(step: Step<'_>, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    crate::sys::host::step(step.name())?;
    let path = match step {
        Step::Create(p) | Step::Rename(p, _) | Step::Link(p, _) | Step::Unlink(p) => p.to_owned(),
        Step::SyncDir(p) => p.to_owned(),
        Step::Write(f, ..)
        | Step::Zero(f, ..)
        | Step::Share(f, ..)
        | Step::SetLen(f, _)
        | Step::Extend(f, _)
        | Step::Sync(f) => path_of(f),
    };
    let found = all().iter().find(|r| path.starts_with(&r.root)).cloned();
    let Some(recorder) = found else { return act() };
    let covers = recorder.begin(&step, &path)?;
    let done = act()?;
    recorder.log(step, path, covers);
    Ok(done)
}

impl Recorder {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, step: &Step<'_>, path: &Path) -> io::Result<usize> {
        let mut state = self.lock();
        let now = state.begun;
        state.begun += 1;
        match state.fail {
            Some((at, errno)) if at == now => {
                state.failed_folder = matches!(step, Step::SyncDir(_));
                state.failed_sync = matches!(step, Step::Sync(_)).then(|| path.to_owned());
                Err(io::Error::from_raw_os_error(errno))
            }
            _ => Ok(state.ops.len()),
        }
    }

    /// The step that failed was to make the entries of a folder durable.
    pub fn failed_folder(&self) -> bool {
        self.lock().failed_folder
    }

    /// The file whose sync was the step that failed.
    pub fn failed_sync(&self) -> Option<PathBuf> {
        self.lock().failed_sync.clone()
    }

    fn log(&self, step: Step<'_>, path: PathBuf, covers: usize) {
        let mut state = self.lock();
        let id = state.names.get(&path).copied();
        let op = match (step, id) {
            (Step::Create(_), _) => {
                let id = state.next;
                state.next += 1;
                state.names.insert(path.clone(), id);
                Op::Create(path, id)
            }
            (Step::Write(_, bytes, offset), Some(id)) => Op::Write(id, offset, bytes.to_vec()),
            (Step::Zero(_, offset, len), Some(id)) => Op::Write(id, offset, vec![0; len as usize]),
            (Step::Share(file, offset, len), Some(id)) => {
                let mut bytes = vec![0; len as usize];
                file.read_exact_at(&mut bytes, offset).unwrap();
                Op::Write(id, offset, bytes)
            }
            (Step::SetLen(_, len), Some(id)) => Op::SetLen(id, len),
            (Step::Extend(_, len), Some(id)) => Op::Extend(id, len),
            (Step::Sync(_), Some(id)) => Op::Sync(id, covers),
            (Step::Rename(_, to), _) => match state.names.remove(&path) {
                Some(id) => {
                    state.names.insert(to.to_owned(), id);
                    Op::Rename(path, to.to_owned(), id)
                }
                None => {
                    move_all(&mut state.names, &path, to);
                    Op::RenameDir(path, to.to_owned())
                }
            },
            (Step::Link(_, to), Some(id)) => {
                state.names.insert(to.to_owned(), id);
                Op::Link(to.to_owned(), id)
            }
            (Step::Unlink(_), _) => {
                state.names.remove(&path);
                Op::Unlink(path)
            }
            (Step::SyncDir(_), _) => Op::SyncDir(path, covers),
            // A file that was made by other means, or is removed.
            (_, None) => return,
        };
        state.ops.push(op);
    }

    /// From now on crashes are made up as if files, or folders, had never been synced: a test that does not find out is
    /// worth nothing.
    pub fn ignore_syncs(&self, of: Thing) {
        self.lock().ignored = Some(of);
    }

    /// Steps begun so far.
    pub fn begun(&self) -> usize {
        self.lock().begun
    }

    /// Steps that took effect: a crash is possible before each and after the last.
    pub fn steps(&self) -> usize {
        self.lock().ops.len()
    }

    /// Writes into `into` (empty) what a crash after `at` steps leaves. `choose` says of each thing that need not be
    /// durable yet, and of which step it is, whether it is.
    pub fn crash(&self, at: usize, into: &Path, choose: &mut dyn FnMut(Thing, usize) -> bool) {
        let state = self.lock();
        let ops = &state.ops[..at];
        let (mut names, mut files) = state.first.clone();
        let synced = |i: usize, id: Id| {
            state.ignored != Some(Thing::Data)
                && ops.iter().any(|op| matches!(op, Op::Sync(other, covers) if *other == id && *covers > i))
        };
        let named = |i: usize, path: &Path| {
            let dir = path.parent().unwrap();
            state.ignored != Some(Thing::Name)
                && ops.iter().any(|op| matches!(op, Op::SyncDir(other, covers) if other == dir && *covers > i))
        };
        for (i, op) in ops.iter().enumerate() {
            match op {
                Op::Create(path, _) | Op::Link(path, _) | Op::Rename(path, _, _) | Op::Unlink(path) => {
                    if let Op::Create(_, id) = op {
                        files.insert(*id, Vec::new());
                    }
                    if !named(i, path) && !choose(Thing::Name, i) {
                        continue;
                    }
                    match op {
                        Op::Create(path, id) | Op::Link(path, id) => drop(names.insert(path.clone(), *id)),
                        Op::Rename(from, to, id) => {
                            names.remove(from);
                            names.insert(to.clone(), *id);
                        }
                        _ => drop(names.remove(path)),
                    }
                }
                Op::RenameDir(from, to) if named(i, to) || choose(Thing::Name, i) => {
                    move_all(&mut names, from, to);
                }
                Op::Write(id, offset, bytes) => {
                    let file = files.entry(*id).or_default();
                    let durable = synced(i, *id);
                    for (n, page) in bytes.chunks(4096).enumerate() {
                        if durable || choose(Thing::Data, i) {
                            let at = *offset as usize + n * 4096;
                            file.resize(file.len().max(at + page.len()), 0);
                            file[at..at + page.len()].copy_from_slice(page);
                        }
                    }
                }
                Op::SetLen(id, len) if synced(i, *id) || choose(Thing::Data, i) => {
                    files.entry(*id).or_default().resize(*len as usize, 0);
                }
                Op::Extend(id, len) if synced(i, *id) || choose(Thing::Data, i) => {
                    let file = files.entry(*id).or_default();
                    file.resize(file.len().max(*len as usize), 0);
                }
                _ => {}
            }
        }
        let mut written: BTreeMap<Id, PathBuf> = BTreeMap::new();
        for (path, id) in names {
            let to = into.join(path.strip_prefix(&self.root).unwrap());
            std::fs::create_dir_all(to.parent().unwrap()).unwrap();
            match written.get(&id) {
                Some(other) => std::fs::hard_link(other, &to).unwrap(),
                None => std::fs::write(&to, &files[&id]).unwrap(),
            }
            written.insert(id, to);
        }
    }
}

/// What is in a folder is in one of another name.
fn move_all(names: &mut Names, from: &Path, to: &Path) {
    let inside: Vec<PathBuf> = names.keys().filter(|path| path.starts_with(from)).cloned().collect();
    for path in inside {
        if let (Some(id), Ok(name)) = (names.remove(&path), path.strip_prefix(from)) {
            names.insert(to.join(name), id);
        }
    }
}

/// What a crash may or may not leave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Thing {
    Name,
    Data,
}

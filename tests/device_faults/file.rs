//! A file that fails when it is told to, over a real one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;

use crate::device_common::served_file::{self, Content, ServedFile};
use crate::disk;
use nix::fcntl::{FallocateFlags, fallocate};

const REAL: &str = "PLOOP_TEST_REAL_FILE";

/// How an operation goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    Eio,
    NoSpace,
    /// Half of it is done, and no error.
    Short,
}

#[derive(Default)]
struct Plan {
    /// Operations so far, by kind.
    log: Vec<char>,
    /// The operation of this number fails.
    at: Option<(usize, Fault)>,
    hit: bool,
    /// Nothing that takes space succeeds.
    full: bool,
}

impl Plan {
    /// Counts an operation; its fault, if it has one.
    fn next(&mut self, kind: char) -> Option<Fault> {
        self.log.push(kind);
        let due = self.at.filter(|(at, _)| *at + 1 == self.log.len()).map(|(_, fault)| fault);
        self.hit |= due.is_some();
        due.or((self.full && matches!(kind, 'w' | 'a')).then_some(Fault::NoSpace))
    }
}

/// The file, as the test sees it.
pub struct FaultyFile(pub ServedFile);

impl FaultyFile {
    /// Mounts the file at `path` (made if it is not there) over the content of `real`.
    pub fn mount(path: &Path, real: &Path) -> FaultyFile {
        FaultyFile(ServedFile::mount(path, &[(REAL, real)]))
    }

    fn ask(&mut self, text: &str) -> String {
        self.0.ask(text)
    }

    /// Counts anew; from now on the operation of this number fails.
    pub fn arm(&mut self, at: usize, fault: Fault) {
        self.ask(&format!("arm {at} {fault:?}"));
    }

    pub fn full(&mut self, full: bool) {
        self.ask(if full { "full" } else { "room" });
    }

    /// Kinds of the operations since it was armed: r(ead), w(rite), b (a write of header or BAT), s(ync), a(llocate),
    /// t(runcate), z(ero).
    pub fn log(&mut self) -> String {
        self.ask("log")
    }

    /// Whether the fault has happened.
    pub fn was_hit(&mut self) -> bool {
        self.ask("hit") == "true"
    }
}

struct Faulty {
    real: File,
    plan: Mutex<Plan>,
}

impl Faulty {
    fn next(&self, kind: char) -> Option<Fault> {
        self.plan.lock().unwrap_or_else(|e| e.into_inner()).next(kind)
    }
}

/// The error of a fault; a short transfer is none.
fn failed(fault: Option<Fault>) -> io::Result<()> {
    let errno = match fault {
        Some(Fault::Eio) => libc::EIO,
        Some(Fault::NoSpace) => libc::ENOSPC,
        _ => return Ok(()),
    };
    Err(io::Error::from_raw_os_error(errno))
}

/// How much of a transfer is done.
fn part(fault: Option<Fault>, len: usize) -> usize {
    if fault.is_some() && len > 512 { len / 1024 * 512 } else { len }
}

impl Content for Faulty {
    fn len(&self) -> u64 {
        self.real.metadata().map_or(0, |m| m.len())
    }

    fn read(&self, at: u64, len: usize) -> io::Result<Vec<u8>> {
        let fault = self.next('r');
        failed(fault)?;
        let mut data = vec![0; part(fault, len)];
        let n = self.real.read_at(&mut data, at)?;
        data.truncate(n);
        Ok(data)
    }

    fn write(&self, at: u64, data: &[u8]) -> io::Result<usize> {
        // Header and BAT lie in the first cluster: rewriting them takes no space.
        let fault = self.next(if at < disk::CLUSTER { 'b' } else { 'w' });
        // What fails may have been written in part.
        let part = part(fault, data.len());
        if fault.is_none_or(|f| f != Fault::NoSpace) {
            self.real.write_all_at(&data[..part], at)?;
        }
        failed(fault).map(|()| part)
    }

    fn sync(&self) -> io::Result<()> {
        failed(self.next('s')).and_then(|()| self.real.sync_data())
    }

    fn allocate(&self, flags: FallocateFlags, at: u64, len: u64) -> io::Result<()> {
        failed(self.next(if flags.contains(FallocateFlags::FALLOC_FL_ZERO_RANGE) { 'z' } else { 'a' }))?;
        Ok(fallocate(&self.real, flags, at as i64, len as i64)?)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        failed(self.next('t')).and_then(|()| self.real.set_len(len))
    }

    fn told(&self, line: &str) -> String {
        let mut plan = self.plan.lock().unwrap_or_else(|e| e.into_inner());
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["arm", at, fault] => {
                let fault = match fault {
                    "Eio" => Fault::Eio,
                    "NoSpace" => Fault::NoSpace,
                    _ => Fault::Short,
                };
                *plan = Plan { at: at.parse().ok().map(|at| (at, fault)), ..Plan::default() };
            }
            ["full"] => plan.full = true,
            ["room"] => plan.full = false,
            ["hit"] => return plan.hit.to_string(),
            _ => return plan.log.iter().collect(),
        }
        String::new()
    }
}

/// See [`served_file::serve_if_asked`].
pub fn serve_if_asked() {
    served_file::serve_if_asked(|| {
        let real = std::env::var_os(REAL).expect("a variable of the test's");
        let real = OpenOptions::new().read(true).write(true).open(real).expect("real file");
        Faulty { real, plan: Mutex::new(Plan::default()) }
    });
}

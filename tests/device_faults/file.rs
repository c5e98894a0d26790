//! A file that fails when it is told to: a FUSE file over a real one, served by a process of its own (this test program,
//! started again), so that whoever waits for the file is never who serves it.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::disk;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ploop::server::fuse::{self, HEAD, Head, Op, Reply};

/// Set in the process that serves: path of the mount point and of the real file.
const SERVE: &str = "PLOOP_TEST_FAULTY_FILE";

const SETATTR: u32 = 4;
const FATTR_SIZE: u32 = 1 << 3;

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
pub struct FaultyFile {
    pub path: PathBuf,
    child: Child,
    say: ChildStdin,
    hear: BufReader<ChildStdout>,
}

impl FaultyFile {
    /// Mounts the file at `path` (made if it is not there) over the content of `real`.
    pub fn mount(path: &Path, real: &Path) -> FaultyFile {
        File::create(path).expect("mount point");
        let exe = std::env::current_exe().expect("this program");
        let mut command = Command::new(exe);
        command.args(["--exact", "--nocapture", "served"]).env(SERVE, path).env("PLOOP_TEST_REAL_FILE", real);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("server of the file");
        let say = child.stdin.take().expect("pipe");
        let hear = BufReader::new(child.stdout.take().expect("pipe"));
        let mut file = FaultyFile { path: path.to_owned(), child, say, hear };
        file.answer("ready");
        file
    }

    fn answer(&mut self, word: &str) -> String {
        loop {
            let mut line = String::new();
            let n = self.hear.read_line(&mut line).expect("an answer of the file's server");
            assert!(n > 0, "the server of the file ended");
            if let Some(at) = line.find(&format!("@{word}")) {
                return line[at + word.len() + 1..].trim().to_owned();
            }
        }
    }

    fn ask(&mut self, text: &str) -> String {
        writeln!(self.say, "{text}").expect("the server of the file listens");
        self.answer("done")
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

impl Drop for FaultyFile {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The serving process: never returns there, and does nothing elsewhere.
pub fn serve_if_asked() {
    let (Some(path), Some(real)) = (std::env::var_os(SERVE), std::env::var_os("PLOOP_TEST_REAL_FILE")) else { return };
    let real = OpenOptions::new().read(true).write(true).open(real).expect("real file");
    let dev = fuse::open_and_mount(Path::new(&path)).expect("mount");
    fuse::handshake(dev.as_fd(), Duration::from_secs(10)).expect("handshake");
    let plan = Arc::new(Mutex::new(Plan::default()));
    let control = plan.clone();
    std::thread::spawn(move || listen(&control, Path::new(&path)));
    println!("\n@ready");
    let _ = io::stdout().flush();
    let mut buf = vec![0; fuse::MAX_IO + 8192];
    loop {
        let mut ready = [PollFd::new(dev.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut ready, PollTimeout::NONE);
        let len = match nix::unistd::read(&dev, &mut buf) {
            Ok(len) => len,
            Err(nix::Error::EAGAIN | nix::Error::EINTR | nix::Error::ENOENT) => continue,
            Err(_) => std::process::exit(0),
        };
        let mut head = [0; HEAD];
        let n = len.min(HEAD);
        head[..n].copy_from_slice(&buf[..n]);
        let Some(request) = fuse::parse(&head, len) else { std::process::exit(1) };
        if let Some(answer) = act(&request, &head, &buf[..len], &real, &plan) {
            let _ = nix::unistd::write(&dev, &answer);
        }
    }
}

fn listen(plan: &Mutex<Plan>, path: &Path) {
    for line in io::stdin().lines() {
        let Ok(line) = line else { break };
        let mut plan = plan.lock().unwrap_or_else(|e| e.into_inner());
        let words: Vec<&str> = line.split(' ').collect();
        let answer = match words[..] {
            ["arm", at, fault] => {
                let fault = match fault {
                    "Eio" => Fault::Eio,
                    "NoSpace" => Fault::NoSpace,
                    _ => Fault::Short,
                };
                *plan = Plan { at: at.parse().ok().map(|at| (at, fault)), ..Plan::default() };
                String::new()
            }
            ["full"] => {
                plan.full = true;
                String::new()
            }
            ["room"] => {
                plan.full = false;
                String::new()
            }
            ["hit"] => plan.hit.to_string(),
            _ => plan.log.iter().collect(),
        };
        println!("@done {answer}");
        let _ = io::stdout().flush();
    }
    // The test is over, whatever its end was.
    let _ = umount2(path, MntFlags::MNT_DETACH);
    std::process::exit(0);
}

/// Does what a request asks for, or not; its answer.
fn act(request: &Head, head: &[u8], all: &[u8], real: &File, plan: &Mutex<Plan>) -> Option<Vec<u8>> {
    let id = request.unique;
    let status = |r: Result<(), i32>| Some(Reply::status(id, r.err().unwrap_or(0)).bytes().to_vec());
    let errno = |e: io::Error| e.raw_os_error().unwrap_or(libc::EIO);
    let len = || real.metadata().map(|m| m.len()).unwrap_or(0);
    let next = |kind| plan.lock().unwrap_or_else(|e| e.into_inner()).next(kind);
    let failed = |fault| match fault {
        Some(Fault::Eio) => Err(libc::EIO),
        Some(Fault::NoSpace) => Err(libc::ENOSPC),
        _ => Ok(()),
    };
    match request.op {
        Op::Read { offset, len: wanted } => {
            let fault = next('r');
            if let Err(e) = failed(fault) {
                return status(Err(e));
            }
            let wanted = if fault.is_some() && wanted > 512 { wanted / 1024 * 512 } else { wanted };
            let mut out = vec![0; 16 + wanted as usize];
            let n = match real.read_at(&mut out[16..], offset) {
                Ok(n) => n,
                Err(e) => return status(Err(errno(e))),
            };
            out.truncate(16 + n);
            out[..16].copy_from_slice(&fuse::reply_head(id, 0, n));
            Some(out)
        }
        Op::Write { offset, len } => {
            // Header and BAT lie in the first cluster: rewriting them takes no space.
            let fault = next(if offset < disk::CLUSTER { 'b' } else { 'w' });
            let data = &all[HEAD..];
            // What fails may have been written in part.
            let part = if fault.is_some() && len > 512 { len as usize / 1024 * 512 } else { len as usize };
            if fault.is_none_or(|f| f != Fault::NoSpace)
                && let Err(e) = real.write_all_at(&data[..part], offset)
            {
                return status(Err(errno(e)));
            }
            match failed(fault) {
                Err(e) => status(Err(e)),
                Ok(()) => Some(Reply::written(id, part as u32).bytes().to_vec()),
            }
        }
        Op::Fsync => status(failed(next('s')).and_then(|()| real.sync_data().map_err(errno))),
        Op::Fallocate { offset, len, mode } => {
            let flags = FallocateFlags::from_bits_truncate(mode as i32);
            let kind = if flags.contains(FallocateFlags::FALLOC_FL_ZERO_RANGE) { 'z' } else { 'a' };
            let result = failed(next(kind))
                .and_then(|()| fallocate(real, flags, offset as i64, len as i64).map_err(|e| e as i32));
            status(result)
        }
        Op::GetAttr => Some(Reply::attr(id, len()).bytes().to_vec()),
        Op::Open => Some(Reply::open(id).bytes().to_vec()),
        Op::StatFs => Some(Reply::statfs(id, 1 << 40, 4096).bytes().to_vec()),
        Op::Nothing => status(Ok(())),
        Op::NoReply => None,
        Op::Unknown if request.opcode == SETATTR => {
            let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
            if word(40) & FATTR_SIZE != 0 {
                let size = u64::from(word(56)) | u64::from(word(60)) << 32;
                let result = failed(next('t')).and_then(|()| real.set_len(size).map_err(errno));
                if result.is_err() {
                    return status(result);
                }
            }
            Some(Reply::attr(id, len()).bytes().to_vec())
        }
        Op::Unknown => status(Err(libc::ENOSYS)),
    }
}

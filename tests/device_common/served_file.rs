//! A FUSE file whose content a test makes up, served by a process of its own (the test program, started again), so that
//! whoever waits for the file is never who serves it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::FallocateFlags;
use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ploop::server::transport::fuse_loop::connection;
use ploop::server::transport::fuse_loop::protocol::{self, HEAD, Head, Op, Reply};

/// Set in the process that serves: path of the mount point.
const SERVE: &str = "PLOOP_TEST_SERVED_FILE";
const SETATTR: u32 = 4;
const FATTR_SIZE: u32 = 1 << 3;

/// What the file does. Operations come one after another.
pub trait Content: Send + Sync + 'static {
    fn len(&self) -> u64;
    /// May be short.
    fn read(&self, at: u64, len: usize) -> io::Result<Vec<u8>>;
    /// How much was written.
    fn write(&self, at: u64, data: &[u8]) -> io::Result<usize>;
    fn sync(&self) -> io::Result<()>;
    fn allocate(&self, flags: FallocateFlags, at: u64, len: u64) -> io::Result<()>;
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// A line that the test says; its answer.
    fn told(&self, line: &str) -> String;
}

/// The file, as the test sees it.
pub struct ServedFile {
    pub path: PathBuf,
    child: Child,
    say: ChildStdin,
    hear: BufReader<ChildStdout>,
}

impl ServedFile {
    /// Mounts the file at `path` (made if it is not there). The program is started again with these variables, and must
    /// come to [`serve_if_asked`] in its test `served`.
    pub fn mount(path: &Path, variables: &[(&str, &Path)]) -> ServedFile {
        File::create(path).expect("mount point");
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["--exact", "--nocapture", "served"]).env(SERVE, path).envs(variables.iter().copied());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("server of the file");
        let say = child.stdin.take().expect("pipe");
        let hear = BufReader::new(child.stdout.take().expect("pipe"));
        let mut file = ServedFile { path: path.to_owned(), child, say, hear };
        file.answer();
        file
    }

    fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            let n = self.hear.read_line(&mut line).expect("an answer of the file's server");
            assert!(n > 0, "the server of the file ended");
            if let Some((_, answer)) = line.split_once("@done") {
                return answer.trim().to_owned();
            }
        }
    }

    /// Says a line to the server; its answer.
    pub fn ask(&mut self, line: &str) -> String {
        writeln!(self.say, "{line}").expect("the server of the file listens");
        self.answer()
    }
}

impl Drop for ServedFile {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The serving process: never returns there, and does nothing elsewhere.
pub fn serve_if_asked<C: Content>(content: impl FnOnce() -> C) {
    let Some(path) = std::env::var_os(SERVE).map(PathBuf::from) else { return };
    let content = Arc::new(content());
    let dev = connection::open_and_mount(&path, "ploop".as_ref()).expect("mount");
    connection::handshake(dev.as_fd(), Duration::from_secs(10), false).expect("handshake");
    let told = content.clone();
    std::thread::spawn(move || listen(&*told, &path));
    println!("\n@done");
    let _ = io::stdout().flush();
    let mut buf = vec![0; protocol::MAX_IO + 8192];
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
        let Some(request) = protocol::parse(&head, len) else { std::process::exit(1) };
        if let Some(answer) = act(&request, &head, &buf[..len], &*content) {
            let _ = nix::unistd::write(&dev, &answer);
        }
    }
}

fn listen(content: &impl Content, path: &Path) {
    for line in io::stdin().lines() {
        let Ok(line) = line else { break };
        println!("@done {}", content.told(&line));
        let _ = io::stdout().flush();
    }
    // The test is over, whatever its end was.
    let _ = umount2(path, MntFlags::MNT_DETACH);
    std::process::exit(0);
}

/// Does what a request asks for; its answer.
fn act(request: &Head, head: &[u8], all: &[u8], content: &impl Content) -> Option<Vec<u8>> {
    let id = request.unique;
    let status = |r: io::Result<()>| {
        let errno = r.err().map_or(0, |e| e.raw_os_error().unwrap_or(libc::EIO));
        Some(Reply::status(id, errno).bytes().to_vec())
    };
    match request.op {
        Op::Read { offset, len } => match content.read(offset, len as usize) {
            Ok(data) => {
                let mut out = protocol::reply_head(id, 0, data.len()).to_vec();
                out.extend(data);
                Some(out)
            }
            Err(e) => status(Err(e)),
        },
        Op::Write { offset, len } => match content.write(offset, &all[HEAD..HEAD + len as usize]) {
            Ok(n) => Some(Reply::written(id, n as u32).bytes().to_vec()),
            Err(e) => status(Err(e)),
        },
        Op::Fsync => status(content.sync()),
        Op::Fallocate { offset, len, mode } => {
            status(content.allocate(FallocateFlags::from_bits_truncate(mode as i32), offset, len))
        }
        Op::GetAttr => Some(Reply::attr(id, content.len()).bytes().to_vec()),
        Op::Open => Some(Reply::open(id).bytes().to_vec()),
        Op::StatFs => Some(Reply::statfs(id, 1 << 40, 4096).bytes().to_vec()),
        Op::Nothing => status(Ok(())),
        Op::NoReply => None,
        Op::Unknown if request.opcode == SETATTR => {
            let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
            if word(40) & FATTR_SIZE != 0
                && let Err(e) = content.set_len(u64::from(word(56)) | u64::from(word(60)) << 32)
            {
                return status(Err(e));
            }
            Some(Reply::attr(id, content.len()).bytes().to_vec())
        }
        Op::Lookup | Op::Unknown => status(Err(io::Error::from_raw_os_error(libc::ENOSYS))),
    }
}

//! A file that remembers: a FUSE file over a real one, which writes down every change and every sync in their order. It is
//! served by a process of its own (this test program, started again), so that whoever waits for the file is never who
//! serves it.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ploop::server::fuse::{self, HEAD, Head, Op, Reply};

/// Set in the process that serves: path of the mount point.
const SERVE: &str = "PLOOP_TEST_TAPED_FILE";
const SETATTR: u32 = 4;
const FATTR_SIZE: u32 = 1 << 3;

/// What happened to the file.
#[derive(Clone, Debug)]
pub enum Event {
    Write {
        at: u64,
        data: Vec<u8>,
    },
    /// The range reads as zero; the file is at least as long.
    Zero {
        at: u64,
        len: u64,
    },
    Length(u64),
    Sync,
    /// The test has been told that something is durable.
    Mark(u64),
}

type Tape = Arc<Mutex<BufWriter<File>>>;

fn note(tape: &Tape, kind: u8, a: u64, b: u64, data: &[u8]) -> io::Result<()> {
    let mut tape = tape.lock().unwrap_or_else(|e| e.into_inner());
    tape.write_all(&[kind])?;
    tape.write_all(&a.to_le_bytes())?;
    tape.write_all(&b.to_le_bytes())?;
    tape.write_all(data)
}

/// What a tape holds.
pub fn play(path: &Path) -> Vec<Event> {
    let mut tape = BufReader::new(File::open(path).expect("tape"));
    let mut events = Vec::new();
    let mut head = [0; 17];
    while tape.read_exact(&mut head).is_ok() {
        let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
        let (a, b) = (word(1), word(9));
        events.push(match head[0] {
            b'w' => {
                let mut data = vec![0; b as usize];
                tape.read_exact(&mut data).expect("data of a write");
                Event::Write { at: a, data }
            }
            b'z' => Event::Zero { at: a, len: b },
            b't' => Event::Length(a),
            b's' => Event::Sync,
            _ => Event::Mark(a),
        });
    }
    events
}

/// The file, as the test sees it.
pub struct Taped {
    pub path: PathBuf,
    child: Child,
    say: ChildStdin,
    hear: BufReader<ChildStdout>,
}

impl Taped {
    /// Mounts the file at `path` over the content of `real`.
    pub fn mount(path: &Path, real: &Path, tape: &Path) -> Taped {
        File::create(path).expect("mount point");
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["--exact", "--nocapture", "served"]).env(SERVE, path);
        command.env("PLOOP_TEST_REAL_FILE", real).env("PLOOP_TEST_TAPE", tape);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("server of the file");
        let say = child.stdin.take().expect("pipe");
        let hear = BufReader::new(child.stdout.take().expect("pipe"));
        let mut file = Taped { path: path.to_owned(), child, say, hear };
        file.answer();
        file
    }

    fn answer(&mut self) {
        loop {
            let mut line = String::new();
            let n = self.hear.read_line(&mut line).expect("an answer of the file's server");
            assert!(n > 0, "the server of the file ended");
            if line.contains("@done") {
                return;
            }
        }
    }

    /// What was called durable until now is so on the tape from here on.
    pub fn mark(&mut self, number: u64) {
        writeln!(self.say, "{number}").expect("the server of the file listens");
        self.answer();
    }
}

impl Drop for Taped {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The serving process: never returns there, and does nothing elsewhere.
pub fn serve_if_asked() {
    let var = std::env::var_os;
    let (Some(path), Some(real), Some(tape)) = (var(SERVE), var("PLOOP_TEST_REAL_FILE"), var("PLOOP_TEST_TAPE")) else {
        return;
    };
    let real = OpenOptions::new().read(true).write(true).open(real).expect("real file");
    let tape = Arc::new(Mutex::new(BufWriter::new(File::create(tape).expect("tape"))));
    let dev = fuse::open_and_mount(Path::new(&path)).expect("mount");
    fuse::handshake(dev.as_fd(), Duration::from_secs(10)).expect("handshake");
    let marks = tape.clone();
    std::thread::spawn(move || listen(&marks, Path::new(&path)));
    println!("\n@done");
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
        if let Some(answer) = act(&request, &head, &buf[..len], &real, &tape) {
            let _ = nix::unistd::write(&dev, &answer);
        }
    }
}

fn listen(tape: &Tape, path: &Path) {
    for line in io::stdin().lines() {
        let Ok(line) = line else { break };
        if let Ok(number) = line.trim().parse() {
            let _ = note(tape, b'm', number, 0, &[]);
        }
        let _ = tape.lock().unwrap_or_else(|e| e.into_inner()).flush();
        println!("@done");
        let _ = io::stdout().flush();
    }
    // The test is over, whatever its end was.
    let _ = umount2(path, MntFlags::MNT_DETACH);
    std::process::exit(0);
}

/// Does what a request asks for and writes it down; its answer.
fn act(request: &Head, head: &[u8], all: &[u8], real: &File, tape: &Tape) -> Option<Vec<u8>> {
    let id = request.unique;
    let errno = |e: io::Error| e.raw_os_error().unwrap_or(libc::EIO);
    let status = |r: io::Result<()>| Some(Reply::status(id, r.err().map_or(0, errno)).bytes().to_vec());
    let len = || real.metadata().map(|m| m.len()).unwrap_or(0);
    match request.op {
        Op::Read { offset, len: wanted } => {
            let mut out = vec![0; 16 + wanted as usize];
            let n = match real.read_at(&mut out[16..], offset) {
                Ok(n) => n,
                Err(e) => return status(Err(e)),
            };
            out.truncate(16 + n);
            out[..16].copy_from_slice(&fuse::reply_head(id, 0, n));
            Some(out)
        }
        Op::Write { offset, len } => {
            let data = &all[HEAD..HEAD + len as usize];
            match real.write_all_at(data, offset).and_then(|()| note(tape, b'w', offset, u64::from(len), data)) {
                Ok(()) => Some(Reply::written(id, len).bytes().to_vec()),
                Err(e) => status(Err(e)),
            }
        }
        Op::Fsync => status(note(tape, b's', 0, 0, &[])),
        Op::Fallocate { offset, len: count, mode } => {
            let flags = FallocateFlags::from_bits_truncate(mode as i32);
            let zero = flags.intersects(FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_PUNCH_HOLE);
            // Only what is new comes in as zero.
            let from = if zero { offset } else { offset.max(len()) };
            let end = offset + count;
            let done = fallocate(real, flags, offset as i64, count as i64).map_err(io::Error::from);
            status(done.and_then(|()| if from < end { note(tape, b'z', from, end - from, &[]) } else { Ok(()) }))
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
                if let Err(e) = real.set_len(size).and_then(|()| note(tape, b't', size, 0, &[])) {
                    return status(Err(e));
                }
            }
            Some(Reply::attr(id, len()).bytes().to_vec())
        }
        Op::Unknown => status(Err(io::Error::from_raw_os_error(libc::ENOSYS))),
    }
}

//! A file that remembers: over a real one, with every change and every sync written down in their order.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use nix::fcntl::{FallocateFlags, fallocate};

use crate::device_common::served_file::{self, Content, ServedFile};

const REAL: &str = "PLOOP_TEST_REAL_FILE";
const TAPE: &str = "PLOOP_TEST_TAPE";

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
pub struct Taped(pub ServedFile);

impl Taped {
    /// Mounts the file at `path` over the content of `real`.
    pub fn mount(path: &Path, real: &Path, tape: &Path) -> Taped {
        Taped(ServedFile::mount(path, &[(REAL, real), (TAPE, tape)]))
    }

    /// What was called durable until now is so on the tape from here on, and the tape is written out.
    pub fn mark(&mut self, number: u64) {
        self.0.ask(&number.to_string());
    }
}

struct Recorder {
    real: File,
    tape: Mutex<BufWriter<File>>,
}

impl Recorder {
    fn tape(&self) -> MutexGuard<'_, BufWriter<File>> {
        self.tape.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn note(&self, kind: u8, a: u64, b: u64, data: &[u8]) -> io::Result<()> {
        let mut tape = self.tape();
        tape.write_all(&[kind])?;
        tape.write_all(&a.to_le_bytes())?;
        tape.write_all(&b.to_le_bytes())?;
        tape.write_all(data)
    }
}

impl Content for Recorder {
    fn len(&self) -> u64 {
        self.real.metadata().map_or(0, |m| m.len())
    }

    fn read(&self, at: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut data = vec![0; len];
        let n = self.real.read_at(&mut data, at)?;
        data.truncate(n);
        Ok(data)
    }

    fn write(&self, at: u64, data: &[u8]) -> io::Result<usize> {
        self.real.write_all_at(data, at)?;
        self.note(b'w', at, data.len() as u64, data)?;
        Ok(data.len())
    }

    fn sync(&self) -> io::Result<()> {
        self.note(b's', 0, 0, &[])
    }

    fn allocate(&self, flags: FallocateFlags, at: u64, len: u64) -> io::Result<()> {
        let zero = flags.intersects(FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_PUNCH_HOLE);
        // Only what is new comes in as zero.
        let (from, end) = (if zero { at } else { at.max(self.len()) }, at + len);
        fallocate(&self.real, flags, at as i64, len as i64)?;
        if from < end { self.note(b'z', from, end - from, &[]) } else { Ok(()) }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.real.set_len(len)?;
        self.note(b't', len, 0, &[])
    }

    fn told(&self, line: &str) -> String {
        if let Ok(number) = line.trim().parse() {
            self.note(b'm', number, 0, &[]).expect("tape");
        }
        self.tape().flush().expect("tape");
        String::new()
    }
}

/// See [`served_file::serve_if_asked`].
pub fn serve_if_asked() {
    served_file::serve_if_asked(|| {
        let var = |name| std::env::var_os(name).expect("a variable of the test's");
        let real = OpenOptions::new().read(true).write(true).open(var(REAL)).expect("real file");
        Recorder { real, tape: Mutex::new(BufWriter::new(File::create(var(TAPE)).expect("tape"))) }
    });
}

//! The sender with a file that changes while it is copied, and the receiver at the other end.

use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use super::output::Output;
use super::receive;
use super::send::{Copying, Sent};
use super::sink::Sink;
use super::wire;
use crate::device::{Freeze, Tracker};
use crate::error::{Error, Kind, Result};
use crate::format::header::{CLOSED_V21, Header, IN_USE, Version};
use crate::units::ClusterSize;

const CLUSTER: u64 = 32 << 10;

/// Writes to the file each time it is asked, as a device in use would.
#[derive(Debug)]
struct Busy {
    file: File,
    clusters: u64,
    /// Writes that follow, each told at the next question.
    left: u32,
    written: Vec<u64>,
}

impl Tracker for Busy {
    fn cluster(&self) -> u64 {
        CLUSTER
    }

    fn end(&self) -> u64 {
        self.clusters * CLUSTER
    }

    fn take(&mut self, bytes: Range<u64>) -> Result<Vec<Range<u64>>> {
        let found = self.written.iter().position(|c| bytes.contains(&(c * CLUSTER)));
        let taken = found.map(|i| self.written.swap_remove(i));
        if self.left > 0 {
            self.left -= 1;
            let cluster = 1 + u64::from(self.left) * 7 % (self.clusters + 3);
            self.file.write_all_at(&[self.left as u8 | 1; 700], cluster * CLUSTER + 100).unwrap();
            self.written.push(cluster);
        }
        Ok(taken.map(|c| c * CLUSTER..(c + 1) * CLUSTER).into_iter().collect())
    }
}

#[derive(Debug)]
struct Frozen(Result<(), Kind>);

impl Freeze for Frozen {
    fn freeze(&mut self) -> Result<()> {
        Ok(())
    }

    fn thaw(&mut self) -> Result<()> {
        self.0.map_err(|kind| Error::new(kind, "thawed too early"))
    }
}

struct Source {
    dir: tempfile::TempDir,
    file: File,
}

impl Source {
    fn new() -> Source {
        let dir = tempfile::tempdir().unwrap();
        let file = File::options().read(true).write(true).create_new(true).open(dir.path().join("top")).unwrap();
        let cluster = ClusterSize::from_sectors(CLUSTER / 512).unwrap();
        let header = Header::new(Version::V2, cluster, 1 << 12).unwrap();
        file.write_all_at(&Header { in_use: IN_USE, flags: 0, ..header }.encode(), 0).unwrap();
        for c in 1..40 {
            file.write_all_at(&[c as u8; CLUSTER as usize], c * CLUSTER).unwrap();
        }
        Source { dir, file }
    }

    fn send(&self, writes: u32, mut sink: Sink, thawed: Result<(), Kind>) -> Result<Sent> {
        let file = self.file.try_clone().unwrap();
        let mut tracker = Busy { file, clusters: 40, left: writes, written: Vec::new() };
        let top = self.file.try_clone().unwrap();
        let quiesce: &mut dyn FnMut() -> Result<(Box<dyn Freeze>, Instant)> =
            &mut || Ok((Box::new(Frozen(thawed)), Instant::now()));
        Copying::new(&mut tracker, top, false, &mut sink, CLUSTER)?.run(quiesce)
    }

    /// The file, but for the mark.
    fn check(&self, copy: &Path) {
        let mut want = std::fs::read(self.dir.path().join("top")).unwrap();
        let got = std::fs::read(copy).unwrap();
        let header = Header::parse(&got).unwrap();
        assert!(!header.is_marked() && header.in_use != CLOSED_V21);
        want[44..48].fill(0);
        assert!(got == want, "{} bytes copied, {} wanted", got.len(), want.len());
    }
}

fn pair() -> (OwnedFd, OwnedFd) {
    let (a, b) = UnixStream::pair().unwrap();
    (a.into(), b.into())
}

#[test]
fn a_file_that_changes_arrives_as_it_is_in_the_end() {
    for writes in [0, 1, 5, 9] {
        let source = Source::new();
        let target = source.dir.path().canonicalize().unwrap().join("copy");
        let (ours, theirs) = pair();
        let received = std::thread::scope(|scope| {
            let receiver = scope.spawn(|| receive(&target, theirs.as_fd(), Some(theirs.as_fd())));
            let answers = ours.try_clone().unwrap();
            source.send(writes, Sink::of(ours, Some(answers)).unwrap(), Ok(())).unwrap();
            receiver.join().unwrap().unwrap()
        });
        assert_eq!(received.syncs, 1);
        source.check(&target);
        let local = target.with_file_name("local");
        let sent = source.send(writes, Sink::new_file(&local).unwrap(), Ok(())).unwrap();
        assert!(sent.bytes >= 40 * CLUSTER + 512 && sent.frozen >= 512, "{sent:?}");
        source.check(&local);
        let open = File::create_new(target.with_file_name("open")).unwrap();
        source.send(writes, Sink::of(open.into(), None).unwrap(), Ok(())).unwrap();
        source.check(&target.with_file_name("open"));
    }
}

#[test]
fn a_copy_that_does_not_end_well_leaves_nothing() {
    let source = Source::new();
    let target = source.dir.path().canonicalize().unwrap().join("copy");
    for (writes, thawed, kind) in [(1000, Ok(()), Kind::Loop), (3, Err(Kind::DevIoc), Kind::DevIoc)] {
        let e = source.send(writes, Sink::new_file(&target).unwrap(), thawed).unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert_eq!(std::fs::read_dir(source.dir.path()).unwrap().count(), 1);
    }
    std::fs::write(&target, "mine").unwrap();
    assert_eq!(Sink::new_file(&target).err().map(|e| e.kind()), Some(Kind::Creat));
}

#[test]
fn the_answer_to_a_sync_is_read_in_pieces_and_believed() {
    let answers: [(&[&[u8]], Option<Kind>); 5] = [
        (&[b"SUC", b"CESS\n"], None),
        (&[wire::FAILURE], Some(Kind::Fsync)),
        (&[b"SUCCEED\n"], Some(Kind::Protocol)),
        (&[b"SUCCESS"], Some(Kind::Protocol)),
        (&[], Some(Kind::Protocol)),
    ];
    for (pieces, kind) in answers {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut far, near) = UnixStream::pair().unwrap();
        let result = std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut packet = [0; wire::HEAD + 4];
                (&theirs).read_exact(&mut packet).unwrap();
                for piece in pieces {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                    far.write_all(piece).unwrap();
                }
            });
            Sink::of(ours.into(), Some(near.into())).unwrap().sync(b"With")
        });
        assert_eq!(result.err().map(|e| e.kind()), kind, "{pieces:?}");
    }
}

#[test]
fn a_copy_goes_to_a_pipe_a_socket_or_a_file() {
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    assert_eq!(Sink::of(null(), None).err().map(|e| e.kind()), Some(Kind::Param));
    let file = tempfile::tempfile().unwrap();
    assert_eq!(Sink::of(pair().0, Some(file.into())).err().map(|e| e.kind()), Some(Kind::Param));
    let (ours, theirs) = pair();
    drop(theirs);
    let e = Sink::of(ours, None).unwrap().write(0, &[0; 512]).unwrap_err();
    assert_eq!(e.kind(), Kind::Write);
}

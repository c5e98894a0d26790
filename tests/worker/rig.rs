//! A supervisor for tests: mounts the FUSE file in a mount namespace of its own, starts workers, replaces killed ones.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ploop::chain::Marked;
use ploop::format::header::{Header, Version};
use ploop::server::proto::{AttachRequest, FromWorker, LevelName, ToWorker, WorkerReady, WorkerStart};
use ploop::server::transport::fuse_loop::connection;
use ploop::server::transport::{Recovery, Session};
use ploop::server::{frame, shm};
use ploop::units::ClusterSize;

/// Makes an empty image of `sectors`.
pub fn make_image(path: &Path, cluster_sectors: u64, sectors: u64) {
    let header = Header::new(Version::V2, ClusterSize::from_sectors(cluster_sectors).unwrap(), sectors).unwrap();
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).unwrap();
    file.set_len(u64::from(header.first_data()) * header.cluster().bytes()).unwrap();
    file.write_all_at(&header.encode(), 0).unwrap();
    file.sync_all().unwrap();
}

/// From here on mounts are seen by this process and its children only, and end with them.
pub fn own_mounts() {
    use nix::mount::{MsFlags, mount};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    match mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>) {
        // In a plain chroot the root folder is no mount point.
        Ok(()) | Err(nix::errno::Errno::EINVAL) => {}
        Err(e) => panic!("cannot make / private: {e}"),
    }
}

/// Requests are kept in slots, whatever the kernel can do.
pub static SLOTS: AtomicBool = AtomicBool::new(false);

/// FUSE connections of this process.
static CONNECTIONS: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// Ends all I/O on our files with errors: a process that holds /dev/fuse and waits for its own file can never end.
pub fn abort_connections() {
    let dir = std::env::temp_dir().join(format!("fusectl-{}", std::process::id()));
    let _ = fs::create_dir(&dir);
    let none = None::<&str>;
    if nix::mount::mount(none, &dir, Some("fusectl"), nix::mount::MsFlags::empty(), none).is_ok() {
        for minor in CONNECTIONS.lock().unwrap().iter() {
            let _ = fs::write(dir.join(minor.to_string()).join("abort"), "1");
        }
        let _ = nix::mount::umount(&dir);
    }
    let _ = fs::remove_dir(&dir);
}

fn connection_of(file: &Path) -> u32 {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = mounts.lines().rfind(|l| l.split(' ').nth(4) == file.to_str()).unwrap();
    line.split(' ').nth(2).unwrap().trim_start_matches("0:").parse().unwrap()
}

pub struct Rig {
    pub file: PathBuf,
    attach: AttachRequest,
    fds: Vec<OwnedFd>,
    session: Session,
    /// Those of the worker that said so last.
    slots: Vec<OwnedFd>,
    worker: Option<(Child, OwnedFd)>,
    pub ready: Option<WorkerReady>,
}

pub struct Options {
    pub read_only: bool,
    pub marked: Marked,
    pub raw_base: bool,
    pub trace: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { read_only: false, marked: Marked::Refuse, raw_base: false, trace: false }
    }
}

impl Rig {
    /// Mounts a FUSE file at `file` (made here) for the images, base first. No worker runs yet.
    pub fn new(file: &Path, images: &[PathBuf], options: &Options) -> Rig {
        File::create(file).unwrap();
        let dev = connection::open_and_mount(file, "ploop".as_ref()).unwrap();
        let session =
            connection::handshake(dev.as_fd(), Duration::from_secs(5), SLOTS.load(Ordering::Relaxed)).unwrap();
        let session = Session::FuseLoop(session);
        let top = images.last().unwrap();
        let witness = if options.read_only { Path::new("/dev/null") } else { top };
        CONNECTIONS.lock().unwrap().push(connection_of(file));
        let (_, listener) = frame::pair().unwrap();
        let mut fds = vec![
            dev,
            shm::create().unwrap(),
            OpenOptions::new().read(true).write(true).open(witness).unwrap().into(),
            File::open("/proc/self/exe").unwrap().into(),
            listener,
        ];
        for image in images {
            fds.push(OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(image).unwrap().into());
        }
        let levels: Vec<_> = images
            .iter()
            .enumerate()
            .map(|(i, p)| LevelName { path: p.clone(), raw: options.raw_base && i == 0 })
            .collect();
        let attach = AttachRequest {
            ids: vec![Default::default(); levels.len()],
            levels,
            raw_cluster: options.raw_base.then_some(2048),
            read_only: options.read_only,
            marked: options.marked,
            component: String::new(),
            descriptor: None,
            device: None,
            trace: options.trace,
            until_unmounted: false,
            auto_compact: false,
            no_space_timeout: None,
            slots: false,
            token: String::new(),
            unflushed: false,
        };
        Rig { file: file.into(), attach, fds, session, slots: Vec::new(), worker: None, ready: None }
    }

    /// Requests are kept in slots: the test wants it so, or the kernel cannot give them out again.
    pub fn keeps_slots(&self) -> bool {
        self.session.recovery() == Recovery::Journal
    }

    /// Where a new supervisor of the test's leaves its report.
    pub fn report_to(&mut self, path: &Path) {
        self.attach.descriptor = Some(path.into());
    }

    /// Starts a worker; what it answers first.
    pub fn start(&mut self, takeover: bool) -> FromWorker {
        self.launch(takeover);
        let answer = self.hear(Duration::from_secs(60)).expect("the worker died at start");
        if let FromWorker::Ready(ready) = &answer {
            self.ready = Some(ready.clone());
        }
        answer
    }

    fn launch(&mut self, takeover: bool) {
        let (mine, theirs) = frame::pair().unwrap();
        let child = start_with_socket(theirs);
        let name = format!("rig-{}", std::process::id());
        let start = WorkerStart {
            takeover,
            slot_fds: self.slots.len(),
            ..WorkerStart::new(self.attach.clone(), self.session, name)
        };
        let fds: Vec<BorrowedFd> = self.fds.iter().chain(&self.slots).map(|f| f.as_fd()).collect();
        frame::send(&mine, &ToWorker::Start(start), &fds).unwrap();
        self.worker = Some((child, mine));
    }

    /// What the worker says next, its slots aside; `None`: it has died.
    fn hear(&mut self, limit: Duration) -> Option<FromWorker> {
        let socket = &self.worker.as_ref().unwrap().1;
        loop {
            match frame::recv_within(socket, limit).unwrap()? {
                (FromWorker::Journal, fds) => {
                    assert_eq!(fds.len(), 2);
                    self.slots = fds;
                }
                (answer, _) => return Some(answer),
            }
        }
    }

    /// Starts a worker that must become ready.
    pub fn serve(&mut self, takeover: bool) -> &mut Rig {
        match self.start(takeover) {
            FromWorker::Ready(_) => self,
            other => panic!("the worker is not ready: {other:?}"),
        }
    }

    pub fn pid(&self) -> i32 {
        self.worker.as_ref().unwrap().0.id() as i32
    }

    /// Kills the worker and starts another one; how long the device was without.
    pub fn replace(&mut self) -> Duration {
        let start = Instant::now();
        let (child, _) = self.worker.as_mut().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        while self.hear(Duration::ZERO).is_some() {}
        self.serve(true);
        start.elapsed()
    }

    /// Kills the worker, and then so many successors, each after a pause in which it may have come to anything.
    pub fn replace_after(&mut self, pauses: &[Duration]) -> Duration {
        for pause in pauses {
            let (child, _) = self.worker.as_mut().unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
            // Its last words.
            while self.hear(Duration::ZERO).is_some() {}
            self.launch(true);
            std::thread::sleep(*pause);
        }
        self.replace()
    }

    /// Leaves the worker without a supervisor; it goes on by itself.
    pub fn abandon(&mut self) -> Child {
        self.worker.take().unwrap().0
    }

    pub fn ask(&mut self, what: &ToWorker) -> FromWorker {
        let socket = &self.worker.as_ref().unwrap().1;
        frame::send(socket, what, &[]).unwrap();
        self.hear(Duration::from_secs(60)).expect("the worker died")
    }

    /// Closes the image cleanly; the worker ends.
    pub fn close(&mut self) {
        match self.ask(&ToWorker::Close) {
            FromWorker::Closed { error: None } => {}
            other => panic!("not closed: {other:?}"),
        }
        let status = self.worker.take().unwrap().0.wait().unwrap();
        assert!(status.success(), "the worker ended with {status}");
    }

    pub fn shm(&self) -> shm::Shm {
        shm::Shm::map(self.fds[1].as_fd()).unwrap()
    }

    pub fn open(&self) -> File {
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&self.file).unwrap()
    }

    /// kB of memory that the worker holds.
    pub fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some((mut child, _)) = self.worker.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = nix::mount::umount2(&self.file, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Starts this program as a worker with its socket as descriptor 3.
fn start_with_socket(socket: OwnedFd) -> Child {
    // The shell moves its standard input, the only descriptor that can be given without unsafe code.
    Command::new("/bin/sh")
        .args(["-c", "exec 3<&0 </dev/null; exec \"$0\" worker"])
        // Not by name: in a mount namespace of its own below a plain chroot a program is not told its own.
        .arg(format!("/proc/{}/exe", std::process::id()))
        .stdin(Stdio::from(socket))
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

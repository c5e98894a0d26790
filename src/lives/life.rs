//! One life of a disk: mounted, written to, snapshotted, merged, reloaded, unmounted, by programs that are killed on the
//! way, on a host whose power is cut.

use std::fs;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::checks::app;
use super::model::{BLOCK, Model};
use super::plan::{Focus, Plan};
use super::world::{Kill, World};
use crate::descriptor::{Descriptor, ImageMode, LockedDescriptor};
use crate::device::{self, Device, State};
use crate::error::Result;
use crate::format::header::Version;
use crate::image::target::read_table;
use crate::ops::check::check_disk;
use crate::ops::mount::{MountParams, mount_descriptor, mount_list};
use crate::ops::testkit::{make_disk, small};
use crate::ops::umount::{umount_descriptor, umount_device};
use crate::sys::file_id::FileId;
use crate::sys::host;
use crate::sys::store::record;
use crate::testing::rng::Rng;

/// Clusters of the disk, of 32 KiB each.
pub(super) const CLUSTERS: u64 = 12;
/// Longest operation, on the simulated clock.
const PATIENCE: Duration = Duration::from_secs(1800);
/// A device finds its processes again in this time.
const RECOVERY: Duration = Duration::from_secs(120);

/// Steps of all lives.
pub static STEPS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

/// Runs the life of a seed; why it failed, if it did.
pub fn live(seed: u64, breach: Option<&'static str>) -> std::result::Result<(), String> {
    let dir = tempfile::tempdir_in(if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" }).expect("a folder");
    let root = dir.path().canonicalize().expect("a folder");
    for name in ["run", "dev", "disk-0"] {
        fs::create_dir(root.join(name)).expect("a folder");
    }
    fs::write(root.join("ploop-server"), "").expect("a file");
    let world = World::begin(root.clone(), seed, breach);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut life = Life::new(&world, &root, seed);
        life.run();
    }));
    let failure = world.failure();
    STEPS.fetch_add(world.steps(), Ordering::Relaxed);
    let trace = world.trace();
    if std::env::var("LIVES").is_ok_and(|n| n == "1") {
        println!("{trace}");
    }
    world.power_off();
    World::end();
    match (outcome, failure) {
        (Ok(()), None) => Ok(()),
        (_, Some(why)) => Err(format!("seed {seed}: {why}\n{trace}")),
        (Err(what), None) => match what.downcast::<String>() {
            Ok(why) => Err(format!("seed {seed}: {why}\n{trace}")),
            Err(what) => resume_unwind(what),
        },
    }
}

/// Ends the life with a failure.
macro_rules! wrong {
    ($($what:tt)*) => { resume_unwind(Box::new(format!($($what)*))) };
}

pub(super) struct Life<'a> {
    pub(super) world: &'a Arc<World>,
    pub(super) root: PathBuf,
    pub(super) recorder: Option<record::Guard>,
    pub(super) disks: usize,
    pub(super) dd: PathBuf,
    pub(super) rng: Rng,
    pub(super) plan: Plan,
    pub(super) model: Arc<Mutex<Model>>,
    /// Mounted by its files, not by the descriptor.
    pub(super) by_list: bool,
    pub(super) app: Option<App>,
    pub(super) focus: Option<Focus>,
    /// The operation has ended by a power cut, which is still to be made.
    pub(super) power_due: bool,
    pub(super) guids: u32,
    /// How often each thing has happened, for messages.
    pub(super) did: Vec<String>,
}

/// The program that uses the device.
pub(super) struct App {
    pid: i32,
    stop: Arc<AtomicBool>,
    backing: String,
}

type Shared<T> = Arc<Mutex<Option<T>>>;

impl<'a> Life<'a> {
    pub(super) fn new(world: &'a Arc<World>, root: &Path, seed: u64) -> Life<'a> {
        let mut rng = Rng::new(seed);
        let version = if rng.coin() { Version::V2 } else { Version::V1 };
        let mode = if rng.below(5) == 0 { ImageMode::Raw } else { ImageMode::Expanded };
        let folder = root.join("disk-0");
        let dd = make_disk(&folder, version, mode, small(), CLUSTERS);
        let kills = if seed % 2 == 1 { 900 } else { rng.pick(&[0, 900, 900]) };
        let power = rng.pick(&[0, 0, 250]);
        let plan = Plan { operations: rng.between(2, 8) as usize, kills, power };
        let recorder = Some(record::start(&folder, None));
        let blocks = CLUSTERS as usize * small().bytes() as usize / BLOCK;
        Life {
            world,
            root: root.into(),
            recorder,
            disks: 0,
            dd,
            rng,
            plan,
            model: Arc::new(Mutex::new(Model::new(blocks))),
            by_list: false,
            app: None,
            focus: (seed % 2 == 1).then(|| Focus::new(seed / 2)),
            power_due: false,
            guids: 0,
            did: Vec::new(),
        }
    }

    pub(super) fn run(&mut self) {
        for _ in 0..self.plan.operations {
            if self.device().is_none() {
                self.mount();
                continue;
            }
            let focused = |operation| if self.focus.is_some_and(|f| f.operation == operation) { 6 } else { 0 };
            let (grow, give, stop) = (focused("grow"), focused("give back"), focused("stop and start"));
            let weights = [6, 6 + focused("merge"), 2 + focused("reload"), 3, 1, 2, grow, give, stop];
            match self.rng.weighted(&weights) {
                0 => self.snapshot(),
                1 => self.merge(),
                2 => self.reload(),
                3 => self.umount(),
                5 => self.merge_and_umount(),
                6 => self.grow(),
                7 => self.give_back(),
                8 => self.stop_and_start(),
                _ => self.pause(),
            }
        }
        self.end();
    }

    pub(super) fn say(&mut self, what: String) {
        self.world.say(what.clone());
        self.did.push(what);
    }

    pub(super) fn fail(&self, why: String) -> ! {
        wrong!(
            "{why}\n  plan {:?}, journal {}; did: {}; runs: {}",
            self.plan,
            self.world.journal,
            self.did.join("; "),
            self.world.all_running().join(", ")
        )
    }

    /// Runs an operation as a process of its own, with kills if the plan has some. None: it was killed.
    pub(super) fn operate(
        &mut self,
        what: String,
        calm: bool,
        act: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> (Option<Result<()>>, Vec<String>) {
        let mut kills = Vec::new();
        if let Some(focus) = self.focus.filter(|_| self.plan.kills > 0) {
            if what.starts_with(focus.operation) {
                kills.push(Kill { steps: focus.steps, modes: focus.modes.to_vec() });
            }
        } else if !calm && self.rng.permille(self.plan.kills) {
            for _ in 0..self.rng.pick(&[1, 1, 1, 2]) {
                let modes = match self.rng.weighted(&[4, 4, 1, 1, 1]) {
                    0 => &["worker"][..],
                    1 => &["supervise", "adopted", "resumed"],
                    2 => &["caller"],
                    3 => &["helper"],
                    _ => &[],
                };
                let steps = self.rng.pick(&[6, 15, 40]);
                kills.push(Kill { steps: self.rng.between(1, steps), modes: modes.to_vec() });
            }
        }
        self.say(format!("{what} {kills:?}"));
        self.world.plan(kills);
        let result: Shared<Result<()>> = Arc::default();
        let told = result.clone();
        let pid = self.world.run("caller", move || {
            let done = act();
            *told.lock().expect("a lock") = Some(done);
        });
        if !calm && self.rng.permille(self.plan.power) {
            // In the middle of it, or soon after.
            let time = Duration::from_micros(self.rng.pick(&[300, 3_000, 30_000]));
            let time = time.mul_f64(self.rng.below(1000) as f64 / 1000.0);
            self.rest(time);
            self.power_due = true;
            self.world.take_killed();
            return (None, vec!["power".into(), "power".into()]);
        }
        self.wait_for(pid, &what);
        let result = result.lock().expect("a lock").take();
        // What was to be killed later is killed in the time after the operation.
        let rest = self.rng.pick(&[0, 5, 2000]);
        self.rest(Duration::from_millis(rest));
        let killed = self.world.take_killed();
        self.check();
        self.say(match &result {
            None => format!("-> killed, {killed:?}"),
            Some(Ok(())) => format!("-> ok, {killed:?}"),
            Some(Err(e)) => format!("-> {e}, {killed:?}"),
        });
        (result, killed)
    }

    pub(super) fn wait_for(&mut self, pid: i32, what: &str) {
        let Ok(watched) = host::watch(pid) else { return };
        let mut fds = [PollFd::new(watched.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(PATIENCE).expect("a time");
        if host::poll(&mut fds, limit) != Ok(1) {
            self.check();
            let unanswered = self.world.devices.unanswered();
            self.fail(format!("no end of: {what}; unanswered requests: {unanswered:?}"));
        }
        self.check();
    }

    pub(super) fn rest(&mut self, time: Duration) {
        host::sleep(time);
        self.check();
    }

    /// Something went wrong in another process.
    pub(super) fn check(&self) {
        if let Some(why) = self.world.failure() {
            self.fail(why);
        }
    }

    pub(super) fn descriptor(&self) -> Descriptor {
        Descriptor::read(&self.dd).unwrap_or_else(|e| self.fail(format!("the descriptor cannot be read: {e}")))
    }

    pub(super) fn device(&self) -> Option<Device> {
        let base = self.descriptor().first_image().ok().map(|i| i.file.clone())?;
        let id = FileId::at(&base).ok()?;
        let all = device::list_of(|d: &Device| d.base_id() == Some(id)).unwrap_or_default();
        all.into_iter().next()
    }

    pub(super) fn mount(&mut self) {
        let calm = self.rng.coin();
        self.by_list = self.rng.below(4) == 0;
        let dd = self.dd.clone();
        let files: Vec<PathBuf> = {
            let d = self.descriptor();
            d.chain(&d.top).unwrap_or_default().iter().map(|i| i.file.clone()).collect()
        };
        let raw = {
            let d = self.descriptor();
            d.images.first().is_some_and(|i| d.is_raw(i))
        };
        // A list refuses an image that a crash has left marked, but not one for which changes wait.
        self.by_list &= self.waits() || !self.model.lock().expect("a lock").marked;
        let by_list = self.by_list;
        let (result, killed) = self.operate(format!("mount, by list {by_list}"), calm, move || {
            let params = MountParams { cluster: raw.then(small), ..MountParams::default() };
            if by_list {
                mount_list(&files, raw, &params).map(drop)
            } else {
                mount_descriptor(&dd, "", &params).map(drop)
            }
        });
        self.model.lock().expect("a lock").marked = true;
        match result {
            Some(Ok(())) => {}
            Some(Err(e)) if killed.is_empty() => self.fail(format!("mount failed: {e}")),
            _ if self.power_due => {}
            // The supervisor takes a device back whose caller was killed.
            _ => self.rest(Duration::from_secs(100)),
        }
        self.settle(&killed);
        if self.device().is_some() {
            self.start_app();
        }
    }

    /// Changes wait for the next mount.
    pub(super) fn waits(&self) -> bool {
        let d = self.descriptor();
        let top = d.image(&d.top).and_then(|i| FileId::at(&i.file).ok());
        device::unflushed(top.as_slice()).is_ok_and(|left| left.is_some())
    }

    /// Waits until the device runs again, if it can after these kills.
    pub(super) fn settle(&mut self, killed: &[String]) {
        if self.cut_if_due() {
            return;
        }
        let end = host::now() + RECOVERY;
        loop {
            self.check();
            match self.device() {
                None => return,
                Some(d) => match d.state {
                    State::Running if self.answers(&d) => return,
                    State::Dead if killed.len() > 1 || self.app.is_none() => {
                        self.dead();
                        return;
                    }
                    ref state if host::now() > end => {
                        let state = format!("{state:?}");
                        self.fail(format!("the device is {state} {} s after {killed:?}", RECOVERY.as_secs()))
                    }
                    _ => {}
                },
            }
            self.rest(Duration::from_millis(100));
        }
    }

    /// A supervisor serves it.
    pub(super) fn answers(&self, device: &Device) -> bool {
        let dir = crate::server::runtime::device_dir(device.name());
        let info = crate::server::control::ask(&dir, &crate::server::proto::Command::Info, Duration::from_secs(2));
        matches!(info, Ok((crate::server::proto::Answer::Info { failed: false, .. }, _)))
    }

    /// The device has lost its processes: the next mount shows all that was answered.
    pub(super) fn dead(&mut self) {
        self.say("the device is dead".into());
        self.follow_list();
        self.stop_app();
        let Some(device) = self.device() else { return };
        let name = device.name().to_owned();
        let (result, _) = self.operate("umount the dead device".into(), true, move || umount_device(&name, None));
        if let Some(Err(e)) = result {
            self.fail(format!("a dead device cannot be removed: {e}"));
        }
    }

    pub(super) fn start_app(&mut self) {
        let Some(device) = self.device() else { return };
        let record = crate::server::runtime::read_record(&crate::server::runtime::device_dir(device.name()));
        let Ok(Some(record)) = record else { return };
        let backing = record.backing;
        if self.app.is_some() || !self.world.devices.open(&backing, true) {
            return;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (world, model, stopped, disk) = (self.world.clone(), self.model.clone(), stop.clone(), backing.clone());
        let seed = self.rng.next();
        let pid = self.world.run("app", move || app(&world, &model, &stopped, &disk, seed));
        self.app = Some(App { pid, stop, backing });
    }

    pub(super) fn stop_app(&mut self) {
        let Some(app) = self.app.take() else { return };
        app.stop.store(true, Ordering::Release);
        self.say("stop the program".into());
        self.wait_for(app.pid, "the program that uses the device");
        self.world.devices.open(&app.backing, false);
    }

    /// The program that uses the device must have had no error as long as the device lives.
    pub(super) fn check_app(&mut self, killed: &[String]) {
        let error = self.model.lock().expect("a lock").error.take();
        if let Some(error) = error {
            if killed.len() > 1 && self.device().is_none_or(|d| d.state != State::Running) {
                return;
            }
            self.fail(format!("the program that uses the device got an error: {error}; killed: {killed:?}"));
        }
    }

    /// After a disturbed umount the device is gone or serves.
    pub(super) fn settle_unmounted(&mut self, killed: &[String]) {
        if self.cut_if_due() {
            return;
        }
        let end = host::now() + RECOVERY;
        loop {
            self.check();
            match self.device() {
                None => return,
                Some(d) if d.state == State::Running && self.answers(&d) => return,
                Some(d) if d.state == State::Dead => {
                    self.dead();
                    return;
                }
                Some(d) if host::now() > end => {
                    if !matches!(d.state, State::Dead | State::Stopped | State::Running) {
                        self.fail(format!("the device is {:?} after a disturbed umount, {killed:?}", d.state));
                    }
                    let name = d.name().to_owned();
                    let (result, _) = self.operate("umount again".into(), true, move || umount_device(&name, None));
                    if let Some(Err(e)) = result {
                        self.fail(format!("umount again, {:?}: {e}; {killed:?}", d.state));
                    }
                }
                Some(_) => {}
            }
            self.rest(Duration::from_millis(100));
        }
    }

    /// The image is closed: nothing is marked, the content is that of the model.
    pub(super) fn closed(&mut self, certain: bool) {
        let d = self.descriptor();
        let mut model = self.model.lock().expect("a lock");
        model.marked = !certain;
        if certain {
            for image in d.chain(&d.top).unwrap_or_default().iter().filter(|i| !d.is_raw(i)) {
                let marked = fs::File::open(&image.file)
                    .ok()
                    .and_then(|f| read_table(&f, &image.file).ok())
                    .map(|(h, _)| h.is_marked());
                if marked != Some(false) {
                    drop(model);
                    self.fail(format!("{} is marked after umount", image.file.display()));
                }
            }
        }
        drop(model);
        self.verify("after umount");
    }

    pub(super) fn end(&mut self) {
        self.plan.kills = 0;
        if self.device().is_none() {
            self.mount();
        }
        if self.device().is_some() {
            self.settle(&[]);
            self.umount();
        }
        // As every mount does it: what an interrupted operation has left is finished or undone.
        let dd = self.dd.clone();
        let (result, _) = self.operate("mount and umount".into(), true, move || {
            mount_descriptor(&dd, "", &MountParams::default())?;
            umount_descriptor(&dd, "")
        });
        if !matches!(result, Some(Ok(()))) {
            self.fail(format!("the last mount: {result:?}"));
        }
        self.verify("at the end");
        let dd = self.dd.clone();
        let checked = LockedDescriptor::open(&dd).and_then(|disk| {
            drop(disk);
            check_disk(&dd, None)
        });
        if let Err(e) = checked {
            self.fail(format!("check: {e}"));
        }
        let left: Vec<_> = fs::read_dir(self.root.join("run/ploop"))
            .map(|d| d.flatten().map(|e| e.file_name()).collect())
            .unwrap_or_default();
        if !left.is_empty() {
            self.fail(format!("left in /run/ploop: {left:?}"));
        }
        let running: Vec<String> = self.world.all_running().into_iter().filter(|r| !r.starts_with("driver")).collect();
        if !running.is_empty() {
            self.rest(Duration::from_secs(10));
            let running: Vec<String> =
                self.world.all_running().into_iter().filter(|r| !r.starts_with("driver")).collect();
            if !running.is_empty() {
                self.fail(format!("still running: {}", running.join(", ")));
            }
        }
    }
}

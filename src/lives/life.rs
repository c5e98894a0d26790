//! One life of a disk: mounted, written to, snapshotted, merged, reloaded, unmounted, by programs that are killed on the
//! way, on a host whose power is cut.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::model::{BLOCK, Model};
use super::world::{Kill, World};
use crate::descriptor::{Descriptor, FILE_NAME, ImageMode, LockedDescriptor};
use crate::device::{self, Device, State};
use crate::error::Result;
use crate::format::guid::Guid;
use crate::format::header::Version;
use crate::image::target::read_table;
use crate::ops::check::check_disk;
use crate::ops::merge::{MergeParams, merge_snapshot};
use crate::ops::mount::{MountParams, mount_descriptor, mount_list};
use crate::ops::online;
use crate::ops::reload;
use crate::ops::snapshot::{self, SnapshotParams};
use crate::ops::testkit::{g, make_disk, small};
use crate::ops::umount::{umount_descriptor, umount_device};
use crate::server::transport::Op;
use crate::sys::file_id::FileId;
use crate::sys::host;
use crate::sys::store::record;
use crate::testing::rng::Rng;

/// Clusters of the disk, of 32 KiB each.
const CLUSTERS: u64 = 12;
/// Longest operation, on the simulated clock.
const PATIENCE: Duration = Duration::from_secs(1800);
/// A device finds its processes again in this time.
const RECOVERY: Duration = Duration::from_secs(120);

/// Steps of all lives.
pub static STEPS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

/// What a life is made of.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub operations: usize,
    /// Of 1000 operations, so many have a process killed.
    pub kills: u32,
    /// Of 1000 operations, so many are ended by a power cut.
    pub power: u32,
}

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

struct Life<'a> {
    world: &'a Arc<World>,
    root: PathBuf,
    recorder: Option<record::Guard>,
    disks: usize,
    dd: PathBuf,
    rng: Rng,
    plan: Plan,
    model: Arc<Mutex<Model>>,
    /// Mounted by its files, not by the descriptor.
    by_list: bool,
    app: Option<App>,
    focus: Option<Focus>,
    /// The operation has ended by a power cut, which is still to be made.
    power_due: bool,
    guids: u32,
    /// How often each thing has happened, for messages.
    did: Vec<String>,
}

/// Every second life has one kind of process killed at one step of one kind of operation: every step has its turn.
#[derive(Clone, Copy)]
struct Focus {
    operation: &'static str,
    modes: &'static [&'static str],
    steps: u64,
}

impl Focus {
    fn new(n: u64) -> Focus {
        let operations = ["umount", "snapshot", "merge", "snapshot"];
        let modes: [&[&str]; 2] = [&["worker"], &["supervise", "adopted", "resumed"]];
        let (operation, rest) = (operations[n as usize % operations.len()], n / operations.len() as u64);
        Focus { operation, modes: modes[rest as usize % 2], steps: 1 + rest / 2 % 20 }
    }
}

/// The program that uses the device.
struct App {
    pid: i32,
    stop: Arc<AtomicBool>,
    backing: String,
}

type Shared<T> = Arc<Mutex<Option<T>>>;

impl<'a> Life<'a> {
    fn new(world: &'a Arc<World>, root: &Path, seed: u64) -> Life<'a> {
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

    fn run(&mut self) {
        for _ in 0..self.plan.operations {
            if self.device().is_none() {
                self.mount();
                continue;
            }
            match self.rng.weighted(&[6, 6, 2, 3, 1, 2]) {
                0 => self.snapshot(),
                1 => self.merge(),
                2 => self.reload(),
                3 => self.umount(),
                5 => self.merge_and_umount(),
                _ => self.pause(),
            }
        }
        self.end();
    }

    fn say(&mut self, what: String) {
        self.world.say(what.clone());
        self.did.push(what);
    }

    fn fail(&self, why: String) -> ! {
        wrong!(
            "{why}\n  plan {:?}; did: {}; runs: {}",
            self.plan,
            self.did.join("; "),
            self.world.all_running().join(", ")
        )
    }

    /// Runs an operation as a process of its own, with kills if the plan has some. None: it was killed.
    fn operate(
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

    fn wait_for(&mut self, pid: i32, what: &str) {
        let Ok(watched) = host::watch(pid) else { return };
        let mut fds = [PollFd::new(watched.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(PATIENCE).expect("a time");
        if host::poll(&mut fds, limit) != Ok(1) {
            self.check();
            self.fail(format!("no end of: {what}"));
        }
        self.check();
    }

    fn rest(&mut self, time: Duration) {
        host::sleep(time);
        self.check();
    }

    /// Something went wrong in another process.
    fn check(&self) {
        if let Some(why) = self.world.failure() {
            self.fail(why);
        }
    }

    fn descriptor(&self) -> Descriptor {
        Descriptor::read(&self.dd).unwrap_or_else(|e| self.fail(format!("the descriptor cannot be read: {e}")))
    }

    fn device(&self) -> Option<Device> {
        let base = self.descriptor().first_image().ok().map(|i| i.file.clone())?;
        let id = FileId::at(&base).ok()?;
        let all = device::list_of(|d: &Device| d.base_id() == Some(id)).unwrap_or_default();
        all.into_iter().next()
    }

    fn mount(&mut self) {
        let calm = self.rng.coin();
        self.by_list = self.rng.below(4) == 0;
        let (dd, by_list, slots) = (self.dd.clone(), self.by_list, self.rng.coin());
        let _ = slots;
        let files: Vec<PathBuf> = {
            let d = self.descriptor();
            d.chain(&d.top).unwrap_or_default().iter().map(|i| i.file.clone()).collect()
        };
        let raw = {
            let d = self.descriptor();
            d.images.first().is_some_and(|i| d.is_raw(i))
        };
        let was_marked = self.model.lock().expect("a lock").marked;
        if was_marked && by_list {
            // A list refuses an image that a crash has left marked.
            self.by_list = false;
        }
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

    /// Waits until the device runs again, if it can after these kills.
    fn settle(&mut self, killed: &[String]) {
        if std::mem::take(&mut self.power_due) {
            return self.cut_power();
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
    fn answers(&self, device: &Device) -> bool {
        let dir = crate::server::runtime::device_dir(device.name());
        let info = crate::server::control::ask(&dir, &crate::server::proto::Command::Info, Duration::from_secs(2));
        matches!(info, Ok((crate::server::proto::Answer::Info { failed: false, .. }, _)))
    }

    /// The device has lost its processes: what was not flushed may be lost.
    fn dead(&mut self) {
        self.say("the device is dead".into());
        self.follow_list();
        self.stop_app();
        self.model.lock().expect("a lock").crash();
        let Some(device) = self.device() else { return };
        let name = device.name().to_owned();
        let (result, _) = self.operate("umount the dead device".into(), true, move || umount_device(&name, None));
        if let Some(Err(e)) = result {
            self.fail(format!("a dead device cannot be removed: {e}"));
        }
    }

    fn start_app(&mut self) {
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

    fn stop_app(&mut self) {
        let Some(app) = self.app.take() else { return };
        app.stop.store(true, Ordering::Release);
        self.wait_for(app.pid, "the program that uses the device");
        self.world.devices.open(&app.backing, false);
    }

    /// The program that uses the device must have had no error as long as the device lives.
    fn check_app(&mut self, killed: &[String]) {
        let error = self.model.lock().expect("a lock").error.take();
        if let Some(error) = error {
            if killed.len() > 1 && self.device().is_none_or(|d| d.state != State::Running) {
                return;
            }
            self.fail(format!("the program that uses the device got an error: {error}; killed: {killed:?}"));
        }
    }

    fn snapshot(&mut self) {
        if self.by_list {
            return self.pause();
        }
        self.guids += 1;
        let guid = g(self.guids);
        let dd = self.dd.clone();
        self.model.lock().expect("a lock").begin_snapshot(guid);
        let (result, killed) = self.operate(format!("snapshot {}", self.guids), false, move || {
            snapshot::create(&dd, "", &SnapshotParams { guid, snap_dir: None, temporary: false })
        });
        self.after(&result, &killed, "snapshot");
        let there = self.descriptor().snapshot(&guid).is_some();
        if matches!(result, Some(Ok(()))) && !there {
            self.fail("the snapshot that was made is not in the descriptor".into());
        }
        let certain = matches!(result, Some(Ok(())));
        self.model.lock().expect("a lock").end_snapshot(&guid, there, certain);
    }

    fn merge(&mut self) {
        let d = self.descriptor();
        let chain: Vec<Guid> = match d.chain(&d.top) {
            Ok(chain) => chain.iter().map(|i| i.guid).collect(),
            Err(e) => self.fail(format!("no chain: {e}")),
        };
        if self.by_list {
            return self.merge_list();
        }
        if chain.len() < 2 {
            return self.snapshot();
        }
        // A range of it, the top included or not.
        let high = self.rng.between(1, chain.len() as u64 - 1) as usize;
        let low = self.rng.between(0, high as u64 - 1) as usize;
        let (descendant, ancestor) = (chain[high], chain[low]);
        self.model.lock().expect("a lock").begin_merge(&chain[low..=high]);
        let dd = self.dd.clone();
        let (result, killed) = self.operate(format!("merge {high} into {low} of {}", chain.len()), false, move || {
            let params = MergeParams { guid: Some(descendant), guid2: Some(ancestor), ..MergeParams::default() };
            merge_snapshot(&dd, "", &params)
        });
        self.after(&result, &killed, "merge");
        let d = self.descriptor();
        let mut model = self.model.lock().expect("a lock");
        for gone in &chain[low..high] {
            match d.snapshot(gone) {
                Some(s) if !s.temporary => {}
                _ => model.spoil(gone),
            }
        }
        drop(model);
        if matches!(result, Some(Ok(()))) && d.snapshot(&descendant).is_some() && d.snapshot(&ancestor).is_some() {
            self.fail("both snapshots of a merge are still there".into());
        }
    }

    /// A merge, and an umount that does not wait for its end.
    fn merge_and_umount(&mut self) {
        let d = self.descriptor();
        let chain: Vec<Guid> = d.chain(&d.top).map(|c| c.iter().map(|i| i.guid).collect()).unwrap_or_default();
        let Some(name) = self.device().map(|d| d.name().to_owned()).filter(|_| chain.len() > 1 && !self.by_list) else {
            return self.snapshot();
        };
        let high = self.rng.between(1, chain.len() as u64 - 1) as usize;
        let (descendant, ancestor) = (chain[high], chain[high - 1]);
        self.model.lock().expect("a lock").begin_merge(&chain[high - 1..=high]);
        let dd = self.dd.clone();
        self.say(format!("merge {high} into {} of {}, and umount", high - 1, chain.len()));
        self.stop_app();
        let merging = self.world.run("caller", move || {
            let params = MergeParams { guid: Some(descendant), guid2: Some(ancestor), ..MergeParams::default() };
            let _ = merge_snapshot(&dd, "", &params);
        });
        let time = Duration::from_micros(self.rng.pick(&[2_000, 10_000, 30_000]));
        let time = time.mul_f64(self.rng.below(1000) as f64 / 1000.0);
        self.rest(time);
        let (result, killed) = self.operate("umount by name".into(), true, move || umount_device(&name, None));
        self.wait_for(merging, "the merge");
        let d = self.descriptor();
        if d.snapshot(&ancestor).is_none_or(|s| s.temporary) {
            self.model.lock().expect("a lock").spoil(&ancestor);
        }
        if d.snapshot(&descendant).is_none_or(|s| s.temporary) {
            self.model.lock().expect("a lock").spoil(&descendant);
        }
        match result {
            Some(Ok(())) => self.closed(true),
            // The merge's process may have unmounted nothing, and the device changed its chain just now.
            _ => {
                self.settle(&killed);
                self.start_app();
            }
        }
    }

    fn merge_list(&mut self) {
        let Some(device) = self.device().filter(|d| d.images.len() > 1) else { return self.pause() };
        let high = self.rng.between(1, device.images.len() as u64 - 1) as usize;
        let low = self.rng.between(0, high as u64 - 1) as usize;
        let (result, killed) = self
            .operate(format!("merge levels {low} to {high}"), false, move || online::merge_levels(&device, low, high));
        self.after(&result, &killed, "merge of levels");
        self.follow_list();
    }

    /// A merge by levels leaves the descriptor as it was: what a user has to do then.
    fn follow_list(&mut self) {
        let Some(device) = self.device().filter(|_| self.by_list) else { return };
        self.model.lock().expect("a lock").relevel();
        let mut d = self.descriptor();
        let chain: Vec<(Guid, PathBuf)> =
            d.chain(&d.top).unwrap_or_default().iter().map(|i| (i.guid, i.file.clone())).collect();
        let ids = device.ids();
        let gone = chain.len().saturating_sub(ids.len());
        if gone == 0 {
            return;
        }
        let same = |at: usize| chain.get(at).and_then(|c| FileId::at(&c.1).ok()) == ids.get(at).copied();
        let low = (0..ids.len()).take_while(|at| same(*at)).count() - 1;
        let files = d.collapse(&chain[low + gone].0, &chain[low].0, None);
        let files = files.unwrap_or_else(|e| self.fail(format!("collapse: {e}")));
        let normal = d.normalise_top().and_then(|()| d.commit(&self.dd));
        if let Err(e) = normal {
            self.fail(format!("commit: {e}"));
        }
        for file in files {
            let _ = crate::sys::store::unlink(&file);
        }
    }

    fn reload(&mut self) {
        let Some(device) = self.device() else { return };
        let name = device.name().to_owned();
        let (result, killed) = self.operate("reload".into(), false, move || reload::reload(&name));
        self.after(&result, &killed, "reload");
    }

    fn pause(&mut self) {
        let (_, killed) = self.operate("pause".into(), false, move || {
            host::sleep(Duration::from_secs(2));
            Ok(())
        });
        self.settle(&killed);
        self.check_app(&killed);
    }

    fn after(&mut self, result: &Option<Result<()>>, killed: &[String], what: &str) {
        // One worker or supervisor killed makes no difference to the caller.
        let harmless = |k: &String| matches!(k.as_str(), "worker" | "supervise" | "adopted" | "resumed");
        if let Some(Err(e)) = result
            && (killed.is_empty() || killed.len() == 1 && killed.iter().all(harmless))
        {
            self.fail(format!("{what} failed: {e}; killed: {killed:?}"));
        }
        if result.is_none() && !self.power_due {
            // The server goes on with what a killed caller has begun.
            self.rest(Duration::from_secs(20));
        }
        self.settle(killed);
        self.check_app(killed);
    }

    fn umount(&mut self) {
        self.stop_app();
        let calm = self.rng.below(4) == 0;
        let name = self.device().map(|d| d.name().to_owned()).unwrap_or_default();
        let (dd, by_list) = (self.dd.clone(), self.by_list);
        let act = move || if by_list { umount_device(&name, None) } else { umount_descriptor(&dd, "") };
        let (result, killed) = self.operate("umount".into(), calm, act);
        match result {
            Some(Ok(())) => {
                if let Some(d) = self.device() {
                    self.fail(format!("unmounted, and the device is {:?}", d.state));
                }
                // With supervisor and worker killed, umount removes what is left; the image is not closed.
                let certain = killed.len() < 2;
                if !certain {
                    self.model.lock().expect("a lock").crash();
                }
                self.closed(certain);
            }
            Some(Err(e)) if killed.is_empty() => self.fail(format!("umount failed: {e}")),
            _ => {
                if !self.power_due {
                    // The supervisor goes on with what a killed caller has begun.
                    self.rest(Duration::from_secs(100));
                }
                self.settle_unmounted(&killed);
                if self.device().is_some() {
                    self.start_app();
                }
            }
        }
    }

    /// After a disturbed umount the device is gone or serves.
    fn settle_unmounted(&mut self, killed: &[String]) {
        if std::mem::take(&mut self.power_due) {
            return self.cut_power();
        }
        let end = host::now() + RECOVERY;
        loop {
            self.check();
            match self.device() {
                None => {
                    self.model.lock().expect("a lock").crash();
                    return;
                }
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
    fn closed(&mut self, certain: bool) {
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

    /// What the images hold is what the model has.
    fn verify(&mut self, when: &str) {
        let d = self.descriptor();
        if let Err(e) = d.check_tree() {
            self.fail(format!("{when}: {e}"));
        }
        let top = read_disk(&d, &d.top);
        let mut model = self.model.lock().expect("a lock");
        let wrong = model.check_now(&top).or_else(|| {
            model.snapshots().into_iter().find_map(|(guid, content)| match d.snapshot(&guid) {
                Some(s) if s.temporary => None,
                Some(_) => content.differs(&read_disk(&d, &guid)).map(|w| format!("snapshot {guid}: {w}")),
                None => Some(format!("snapshot {guid} is gone")),
            })
        });
        drop(model);
        if let Some(wrong) = wrong {
            self.fail(format!("{when}: {wrong}"));
        }
    }

    fn cut_power(&mut self) {
        self.say("power cut".into());
        self.app = None;
        self.world.power_off();
        self.world.devices.clear();
        let Some(guard) = self.recorder.take() else { return };
        self.disks += 1;
        let folder = self.root.join(format!("disk-{}", self.disks));
        fs::create_dir(&folder).expect("a folder");
        let rng = &mut self.rng;
        let share = rng.pick(&[100, 500, 900]);
        guard.0.crash(guard.0.steps(), &folder, &mut |_, _| rng.permille(share));
        drop(guard);
        for name in ["run", "dev"] {
            let _ = fs::remove_dir_all(self.root.join(name));
            fs::create_dir(self.root.join(name)).expect("a folder");
        }
        self.dd = folder.join(FILE_NAME);
        self.recorder = Some(record::start(&folder, None));
        self.by_list = false;
        let d = self.descriptor();
        let there: Vec<Guid> = d.snapshots.iter().filter(|s| !s.temporary).map(|s| s.guid).collect();
        let mut model = self.model.lock().expect("a lock");
        model.crash();
        model.error = None;
        let lost = model.keep_snapshots(&there);
        drop(model);
        if let Some(guid) = lost {
            self.fail(format!("after a power cut: snapshot {guid}, which had been made, is gone"));
        }
    }

    fn end(&mut self) {
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

/// Writes, reads and flushes until it is to stop.
fn app(world: &Arc<World>, model: &Arc<Mutex<Model>>, stop: &AtomicBool, backing: &str, seed: u64) {
    let mut rng = Rng::new(seed);
    // Mostly there is something in every cluster, so that merges have work.
    let mut filled = if rng.below(3) == 0 { usize::MAX } else { 0 };
    while !stop.load(Ordering::Acquire) {
        let blocks = model.lock().expect("a lock").blocks();
        let filling = filled < blocks;
        let block = if filling { filled } else { rng.index(blocks) };
        filled = filled.saturating_add(small().bytes() as usize / BLOCK);
        let offset = (block * BLOCK) as u64;
        let error = match if filling { 0 } else { rng.weighted(&[5, 4, 1]) } {
            0 => {
                let value = model.lock().expect("a lock").begin_write(block);
                let bytes = vec![value; BLOCK];
                let done = world.devices.submit(backing, Op::Write { offset, len: BLOCK as u32 }, bytes);
                model.lock().expect("a lock").end_write(block, value, done.is_ok());
                done.err().map(|e| format!("write of block {block}: {e}"))
            }
            1 => match world.devices.submit(backing, Op::Read { offset, len: BLOCK as u32 }, Vec::new()) {
                Ok(bytes) => {
                    let wrong = model.lock().expect("a lock").check_block(block, &bytes);
                    if let Some(wrong) = wrong {
                        world.fail(format!("read: {wrong}"));
                        return;
                    }
                    None
                }
                Err(e) => Some(format!("read of block {block}: {e}")),
            },
            _ => {
                let mark = model.lock().expect("a lock").begin_flush();
                let done = world.devices.submit(backing, Op::Flush, Vec::new());
                model.lock().expect("a lock").end_flush(mark, done.is_ok());
                done.err().map(|e| format!("flush: {e}"))
            }
        };
        if let Some(error) = error {
            model.lock().expect("a lock").error.get_or_insert(error);
            return;
        }
        if filling {
            continue;
        }
        host::sleep(Duration::from_micros(rng.pick(&[0, 200, 5_000, 50_000, 200_000])));
    }
}

/// The content of a snapshot, block by block, read from the images alone.
fn read_disk(d: &Descriptor, guid: &Guid) -> Vec<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let size = d.blocksize.bytes();
    let per = size as usize / BLOCK;
    let mut blocks = vec![vec![0; BLOCK]; CLUSTERS as usize * per];
    let mut seen = BTreeMap::new();
    for image in d.chain(guid).unwrap_or_default().into_iter().rev() {
        let Ok(file) = fs::File::open(&image.file) else { continue };
        let places: Vec<(u32, u64)> = match d.is_raw(image) {
            true => (0..CLUSTERS as u32).map(|c| (c, u64::from(c) * size)).collect(),
            false => match read_table(&file, &image.file) {
                Ok((_, table)) => table.entries.iter().map(|(c, p)| (*c, u64::from(*p) * size)).collect(),
                Err(_) => continue,
            },
        };
        for (cluster, at) in places {
            if seen.insert(cluster, ()).is_some() {
                continue;
            }
            for i in 0..per {
                let block = &mut blocks[cluster as usize * per + i];
                let _ = file.read_exact_at(block, at + (i * BLOCK) as u64);
            }
        }
    }
    blocks
}

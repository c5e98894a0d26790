//! The operations of a life.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::life::Life;
use crate::descriptor::FILE_NAME;
use crate::error::{Kind, Result};
use crate::format::guid::Guid;
use crate::ops::grow::grow_disk;
use crate::ops::merge::{MergeParams, merge_snapshot};
use crate::ops::snapshot::{self, SnapshotParams};
use crate::ops::testkit::{g, sizes, small};
use crate::ops::umount::{umount_descriptor, umount_device};
use crate::ops::{give_back, online, reload};
use crate::sys::file_id::FileId;
use crate::sys::host;
use crate::sys::store::record;
use crate::units::SECTOR;

impl Life<'_> {
    pub(super) fn snapshot(&mut self) {
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

    pub(super) fn merge(&mut self) {
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
    pub(super) fn merge_and_umount(&mut self) {
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

    pub(super) fn merge_list(&mut self) {
        let Some(device) = self.device().filter(|d| d.images.len() > 1) else { return self.pause() };
        let high = self.rng.between(1, device.images.len() as u64 - 1) as usize;
        let low = self.rng.between(0, high as u64 - 1) as usize;
        let (result, killed) = self
            .operate(format!("merge levels {low} to {high}"), false, move || online::merge_levels(&device, low, high));
        self.after(&result, &killed, "merge of levels");
        self.follow_list();
    }

    /// A merge by levels leaves the descriptor as it was: what a user has to do then.
    pub(super) fn follow_list(&mut self) {
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
            let _ = crate::sys::folder::Place::named(&file).and_then(|place| crate::sys::store::unlink(&place));
        }
    }

    /// The disk gets larger; now and then its table needs the clusters that have its data.
    pub(super) fn grow(&mut self) {
        let Some(device) = self.device().filter(|_| !self.by_list) else { return self.snapshot() };
        let cluster = u64::from(small().sectors());
        let sectors = device.sectors + cluster * self.rng.pick(&[1, 7, 8190, 20_000]);
        let dd = self.dd.clone();
        let (result, killed) = self.operate(format!("grow to {sectors}"), false, move || grow_disk(&dd, sectors));
        self.after(&result, &killed, "grow");
        if !matches!(result, Some(Ok(()))) {
            return;
        }
        let (image, descriptor) = sizes(&self.dd);
        if (image, descriptor) != (sectors / cluster, sectors / cluster) {
            self.fail(format!(
                "grown to {} clusters: the image has {image}, the descriptor {descriptor}",
                sectors / cluster
            ));
        }
        // A killed device has another one by now, or none.
        let Some(now) = self.device().filter(|d| d.instance == device.instance) else { return };
        let capacity = self.world.devices.capacity(&now.disk);
        if now.sectors != sectors || capacity != sectors * SECTOR {
            self.fail(format!("grown to {sectors} sectors: {} are served, {} shown", now.sectors, capacity / SECTOR));
        }
    }

    pub(super) fn reload(&mut self) {
        let Some(device) = self.device() else { return };
        let name = device.name().to_owned();
        let (result, killed) = self.operate("reload".into(), false, move || reload::reload(&name));
        self.after(&result, &killed, "reload");
    }

    pub(super) fn give_back(&mut self) {
        let Some(device) = self.device().filter(|d| !d.read_only && d.version.is_some()) else { return self.pause() };
        let (result, killed) = self.operate("give back".into(), false, move || {
            match give_back::give_back(&device, &give_back::Options::default(), &mut |_, _| {}) {
                // A merge that a mount has begun is still under way.
                Err(e) if e.kind() == Kind::Busy => Ok(()),
                other => other.map(drop),
            }
        });
        self.after(&result, &killed, "giving space back");
    }

    /// Supervisor and worker are killed at once.
    fn kill_both(&mut self) {
        let Some(device) = self.device().filter(|d| d.state == crate::device::State::Running) else { return };
        let record = crate::device::served::record(&device);
        self.say("supervisor and worker are killed".into());
        self.world.kill(record.worker.pid);
        self.world.kill(record.supervisor.pid);
        self.settle(&["worker".into(), "supervise".into()]);
        // The program has seen the end of its device.
        self.model.lock().expect("a lock").error = None;
    }

    pub(super) fn pause(&mut self) {
        if self.plan.kills > 0 && self.rng.coin() {
            return self.kill_both();
        }
        let (_, killed) = self.operate("pause".into(), false, move || {
            host::sleep(Duration::from_secs(2));
            Ok(())
        });
        self.settle(&killed);
        self.check_app(&killed);
    }

    pub(super) fn after(&mut self, result: &Option<Result<()>>, killed: &[String], what: &str) {
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

    pub(super) fn umount(&mut self) {
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
                // With supervisor and worker killed, umount removes what is left; the image is not closed, and lacks what
                // waits for the next mount.
                let certain = killed.len() < 2;
                match !certain && self.waits() {
                    true => self.model.lock().expect("a lock").marked = true,
                    false => self.closed(certain),
                }
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

    /// Cuts the power if the last operation was to be ended so.
    pub(super) fn cut_if_due(&mut self) -> bool {
        let due = std::mem::take(&mut self.power_due);
        if due {
            self.cut_power();
        }
        due
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
}

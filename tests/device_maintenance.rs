//! Every operation on a running disk in every maintenance state: carried out, carried out after what was begun is
//! finished, or refused with 17. The table is the one of the classic library, but for what stands beside its rows.

mod device_common;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use device_common::*;
use ploop::device::{self, Device, Maintenance};

use Maintenance::{Balloon, Discard, FreeBlocksLoaded, Grow, Merge, Off, Relocation, Track};

const STATES: [Maintenance; 8] = [Off, Balloon, FreeBlocksLoaded, Relocation, Merge, Grow, Track, Discard];
const BUSY: i32 = 17;

/// What happens to the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// It stays as it was.
    Stays,
    /// OFF: what was begun is finished, or this is what the operation is for.
    Ends,
    Refused,
}
use Then::{Ends, Refused, Stays};

/// A row: the operation, and what happens in the states OFF, BALLOON, FBLOADED, RELOC, MERGE, GROW, TRACK, DISCARD.
struct Row {
    name: &'static str,
    then: [Then; 8],
    run: fn(&Disk) -> Command,
}

#[rustfmt::skip]
const ROWS: &[Row] = &[
    // The classic library ends a copy, and repeats a grow; a copy goes on here, and a grow has no state of its own.
    Row { name: "snapshot", then: [Stays, Stays, Ends, Ends, Stays, Refused, Refused, Ends], run: |d| d.on_disk(&["snapshot"]) },
    Row { name: "merge", then: [Stays, Stays, Ends, Ends, Stays, Refused, Refused, Ends], run: |d| d.on_disk(&["snapshot-merge"]) },
    // A range is not finished first.
    Row { name: "merge of a range", then: [Stays, Stays, Refused, Refused, Stays, Refused, Refused, Refused], run: |d| d.on_disk(&["snapshot-merge", "-A"]) },
    Row { name: "grow", then: [Stays, Stays, Refused, Refused, Stays, Refused, Refused, Refused], run: |d| d.on_disk(&["grow", "-s", d.next_size()]) },
    Row { name: "resize", then: [Stays, Stays, Ends, Ends, Stays, Refused, Refused, Ends], run: |d| d.on_disk(&["resize", "-s", d.next_size()]) },
    Row { name: "a larger balloon", then: [Ends, Ends, Refused, Refused, Refused, Refused, Refused, Refused], run: |d| d.on_disk(&["balloon", "change", "-s", d.next_balloon()]) },
    Row { name: "a smaller balloon", then: [Stays, Stays, Refused, Refused, Stays, Stays, Stays, Refused], run: |d| d.on_disk(&["balloon", "change", "-s", "0"]) },
    Row { name: "balloon check", then: [Ends, Ends, Refused, Refused, Refused, Refused, Refused, Refused], run: |d| d.on_disk(&["balloon", "check"]) },
    Row { name: "balloon repair", then: [Ends, Ends, Refused, Refused, Refused, Refused, Refused, Refused], run: |d| d.on_disk(&["balloon", "repair"]) },
    Row { name: "balloon clear", then: [Ends, Ends, Refused, Refused, Refused, Refused, Refused, Refused], run: |d| d.on_disk(&["balloon", "clear"]) },
    Row { name: "balloon complete", then: [Stays, Stays, Ends, Ends, Stays, Stays, Stays, Ends], run: |d| d.on_disk(&["balloon", "complete"]) },
    // One that was interrupted goes on.
    Row { name: "discard", then: [Stays, Refused, Refused, Refused, Refused, Refused, Refused, Ends], run: |d| d.on_disk(&["balloon", "discard"]) },
    Row { name: "copy", then: [Stays, Stays, Ends, Ends, Refused, Refused, Refused, Ends], run: |d| {
        let _ = fs::remove_file(d.path("copied"));
        let mut command = ploop();
        command.args(["copy", "-s", &d.node, "-d"]).arg(d.path("copied"));
        command
    } },
    // Neither of these asks for the state to be finished.
    Row { name: "replace", then: [Stays, Stays, Refused, Refused, Stays, Refused, Refused, Refused], run: |d| {
        fs::copy(d.path("root.hds"), d.path("same")).unwrap();
        d.on_disk(&["replace", "-l", "0", "-k", "-i", d.path("same").to_str().unwrap()])
    } },
    // A running disk is not switched in any state.
    Row { name: "switch", then: [Stays; 8], run: |d| d.on_disk(&["snapshot-switch", "-u", d.first_snapshot().as_str()]) },
    Row { name: "umount", then: [Ends, Ends, Ends, Ends, Ends, Refused, Ends, Ends], run: |d| d.on_disk(&["umount"]) },
];

fn ploop() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ploop"));
    command.stdin(Stdio::null());
    command
}

struct Disk {
    t: Bench,
    node: String,
    /// Each enlargement is one cluster.
    clusters: std::cell::Cell<u32>,
}

impl Disk {
    fn new(name: &str) -> Option<Disk> {
        let t = Bench::new(name)?;
        if !common::skip::program("mkfs.ext4") {
            return None;
        }
        let node = format!("/dev/ploop-test-{}-{name}", std::process::id());
        let disk = Disk { t, node, clusters: std::cell::Cell::new(64) };
        run(ploop().args(["init", "-s", "64m"]).arg(disk.path("root.hds")));
        fs::create_dir(disk.path("mnt")).unwrap();
        disk.mount();
        run(&mut disk.on_disk(&["snapshot"]));
        Some(disk)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.t.dir.path().join(name)
    }

    fn on_disk(&self, args: &[&str]) -> Command {
        let mut command = ploop();
        command.args(args).arg(self.path("DiskDescriptor.xml"));
        command
    }

    fn mount(&self) {
        run(ploop().args(["mount", "-d", &self.node, "-m"]).arg(self.path("mnt")).arg(self.path("DiskDescriptor.xml")));
    }

    fn device(&self) -> Option<Device> {
        device::by_node(&self.node).unwrap()
    }

    fn next_size(&self) -> &'static str {
        self.clusters.set(self.clusters.get() + 1);
        format!("{}m", self.clusters.get()).leak()
    }

    /// Larger than any before.
    fn next_balloon(&self) -> &'static str {
        let disk = self.next_size().trim_end_matches('m').parse::<u32>().unwrap();
        format!("{}k", (disk - 64) * 128).leak()
    }

    fn snapshots(&self) -> Vec<String> {
        let listed = output(&mut self.on_disk(&["snapshot-list", "-H", "-s", "-o", "uuid"]));
        String::from_utf8(listed.stdout).unwrap().lines().map(|l| l.trim().to_owned()).collect()
    }

    fn first_snapshot(&self) -> String {
        self.snapshots()[0].clone()
    }

    /// Mounted, with two snapshots, in the state.
    fn prepare(&self, state: Maintenance) -> Device {
        let device = self.device().unwrap_or_else(|| {
            self.mount();
            self.device().unwrap()
        });
        device::set_maintenance(&device, &STATES, Off).unwrap();
        while self.snapshots().len() > 4 {
            run(&mut self.on_disk(&["snapshot-merge", "-A"]));
        }
        while self.snapshots().len() < 2 {
            run(&mut self.on_disk(&["snapshot"]));
        }
        device::set_maintenance(&device, &STATES, state).unwrap();
        device
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = output(Command::new("umount").arg("-l").arg(self.path("mnt")));
    }
}

#[test]
fn each_operation_in_each_state() {
    let Some(disk) = Disk::new("each_operation_in_each_state") else { return };
    let (mut ran, mut refused) = (0, 0);
    for (number, row) in ROWS.iter().enumerate() {
        for (column, state) in STATES.iter().enumerate() {
            let then = row.then[column];
            // What is carried out takes time: a part of it is enough for a quick run, and a different one in each row.
            if then == Stays && count((number + column) % 3 != 0, false, false) {
                continue;
            }
            disk.prepare(*state);
            let out = output(&mut (row.run)(&disk));
            let said = format!("{} in {state}: {out:?}", row.name);
            match then {
                Refused => assert_eq!(out.status.code(), Some(BUSY), "{said}"),
                _ if row.name == "switch" => assert_eq!(out.status.code(), Some(38), "{said}"),
                // Not each machine lets a process enlarge a mounted ext4.
                _ => assert!(out.status.success() || said.contains("CAP_SYS_RESOURCE"), "{said}"),
            }
            refused += u32::from(then == Refused);
            ran += 1;
            let now = disk.device().map_or(Off, |d| d.maintenance());
            assert_eq!(now, if then == Ends { Off } else { *state }, "{said}");
        }
    }
    if let Some(device) = disk.device() {
        device::set_maintenance(&device, &STATES, Off).unwrap();
        run(&mut disk.on_disk(&["umount"]));
    }
    run(Command::new(env!("CARGO_BIN_EXE_ploop")).arg("check").arg(disk.path("DiskDescriptor.xml")));
    println!("{ran} of {} met, {refused} of them refused", ROWS.len() * STATES.len());
}

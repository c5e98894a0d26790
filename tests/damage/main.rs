//! Damaged images: what a check says of each kind of damage, and what a repair does. Images and damage are made by the
//! format's rules alone. Whatever the flags: no panic, no cluster that the damage does not concern loses a byte, and a second
//! repair finds nothing.

mod faults;
mod image;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use faults::{FAULTS, Fault};
use image::{Image, pattern, read};
use ploop::image::check::{CheckOptions, check_file};

fn options(flags: &str) -> CheckOptions {
    let has = |c| flags.contains(c);
    CheckOptions {
        force: has('f'),
        hard_force: has('F'),
        drop_inuse: has('d'),
        check: has('c'),
        repair_sparse: has('S'),
        read_only: has('r'),
        raw: false,
        raw_blocksize: None,
    }
}

/// The exit code, and what the file holds then.
fn run(path: &Path, flags: &str) -> (i32, Vec<u8>) {
    let code = match check_file(path, None, &options(flags)) {
        Ok(_) => 0,
        Err(e) => e.code(),
    };
    (code, fs::read(path).unwrap())
}

fn expected(fault: &Fault, flags: &str) -> Option<i32> {
    let c = &fault.codes;
    match flags {
        "" => Some(c.plain),
        "fcr" => Some(c.look),
        "fc" => Some(c.check),
        "fcd" => Some(c.drop),
        "Fcd" => Some(c.hard),
        _ => None,
    }
}

struct Kind<'a> {
    fault: &'a Fault,
    sound: Image,
    damaged: Image,
    /// Clusters whose bytes may change.
    victims: Vec<u32>,
}

impl Kind<'_> {
    fn new(fault: &Fault, version: u32, bs: u32, clusters: u32) -> Option<Kind<'_>> {
        let map: &[u32] = if fault.empty { &[] } else { &[5, 0, 1, clusters - 1, 7, clusters - 3] };
        let sound = Image::new(version, bs, clusters, map);
        let mut damaged = sound.clone();
        let victims = (fault.apply)(&mut damaged)?;
        Some(Kind { fault, sound, damaged, victims })
    }

    /// What the disk must show: every cluster that is no victim has its bytes; a victim has some cluster's bytes or none.
    fn verify(&self, bytes: &[u8], code: i32, what: &str) {
        if bytes == self.damaged.bytes {
            return;
        }
        let Some(disk) = read(bytes) else { panic!("{what}: no header can be read, and yet it was written to") };
        let shown = read(&self.damaged.bytes).unwrap_or_default();
        let size = self.sound.size();
        let named: BTreeSet<u32> = [&disk, &shown].into_iter().flatten().map(|(c, _)| *c).collect();
        for cluster in named.into_iter().chain(self.sound.map.keys().copied()) {
            let want = self.sound.map.contains_key(&cluster).then(|| pattern(cluster, size));
            let got = disk.get(&cluster);
            if self.victims.contains(&cluster) {
                let known = |bytes: &Vec<u8>| {
                    self.sound.map.keys().any(|c| *bytes == pattern(*c, size)) || shown.get(&cluster) == Some(bytes)
                };
                assert!(got.is_none_or(known), "{what}: cluster {cluster} shows what was nowhere");
                continue;
            }
            // An image that stays damaged shows what it showed before.
            let before = shown.get(&cluster);
            let stays = code != 0 && got == before;
            assert!(got == want.as_ref() || stays, "{what}: cluster {cluster} has changed");
        }
    }

    fn check(&self, path: &Path, flags: &str, seen: &mut BTreeMap<(&'static str, String), i32>) {
        let what = format!(
            "{}, version {}, clusters of {} sectors, check -{flags}",
            self.fault.name, self.sound.version, self.sound.bs
        );
        fs::write(path, &self.damaged.bytes).unwrap();
        let (code, after) = run(path, flags);
        if let Some(want) = expected(self.fault, flags) {
            assert_eq!(code, want, "{what}");
        }
        let before = seen.insert((self.fault.name, flags.into()), code);
        assert!(before.is_none_or(|b| b == code), "{what}: {before:?}, {code}");
        let writes = !flags.contains('r');
        if !writes || (code != 0 && !flags.contains('F')) {
            assert!(after == self.damaged.bytes, "{what}: {code}, and yet it was written to");
        }
        self.verify(&after, code, &what);
        if !writes || code != 0 {
            return;
        }
        let (again, then) = run(path, flags);
        assert!(again == 0 && then == after, "{what}: a second time, {again}");
        if flags.contains(['f', 'F']) {
            // Without -c and -F neither clusters that are used twice nor such in the BAT are looked for.
            let (look, _) = run(path, &format!("{flags}r"));
            assert_eq!(look, 0, "{what}: a look at what was repaired");
        }
        if self.fault.name.starts_with("extension, and") && flags.contains('F') {
            // A repair behind the data overwrites no format extension; a lost cluster makes a saved bitmap void.
            let lost = self.fault.name.ends_with("end");
            let state = u32::from_le_bytes(after[44..48].try_into().unwrap());
            assert_eq!(state == 0, lost, "{what}: {state:#x}");
        }
    }
}

#[test]
fn every_kind_of_damage_is_found_and_no_repair_makes_it_worse() {
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let path = dir.path().join("image");
    assert!(FAULTS.len() > 45);
    let (mut runs, mut failed) = (0, 0);
    // A BAT of two clusters; one of one; clusters that are large.
    for (bs, clusters) in [(64, 9000), (128, 40), (512, 12)] {
        let all =
            ["", "r", "f", "fr", "fc", "fcr", "F", "Fr", "Fc", "d", "dr", "fcd", "Fd", "Fcd", "FcdS", "FcdSr", "S"];
        let few = ["", "fcr", "fc", "fcd", "Fcd"];
        let flag_sets: &[&str] = match bs {
            128 => &all,
            64 => &few,
            _ => &["fcr", "Fcd"],
        };
        for version in [1, 2] {
            let mut seen = BTreeMap::new();
            for fault in FAULTS {
                let Some(kind) = Kind::new(fault, version, bs, clusters) else { continue };
                for flags in flag_sets {
                    let tried = AssertUnwindSafe(|| kind.check(&path, flags, &mut seen));
                    failed += usize::from(catch_unwind(tried).is_err());
                    runs += 1;
                }
            }
        }
    }
    println!("{} kinds of damage, {runs} checks", FAULTS.len());
    assert_eq!(failed, 0, "of {runs} checks");
}

#[test]
fn the_second_user_of_a_cluster_gets_a_copy_and_both_stay_what_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    for version in [1, 2] {
        let mut image = Image::new(version, 64, 40, &[5, 0, 1, 39]);
        let place = image.map[&0];
        image.set(1, place);
        image.set(20, place);
        fs::write(&path, &image.bytes).unwrap();
        let report = check_file(&path, None, &options("F")).unwrap();
        let disk = read(&fs::read(&path).unwrap()).unwrap();
        for cluster in [0, 1, 20] {
            assert!(disk[&cluster] == pattern(0, image.size()), "cluster {cluster}");
        }
        assert!(disk[&39] == pattern(39, image.size()) && disk[&5] == pattern(5, image.size()));
        assert!(report.notes.iter().any(|n| n.contains("1, 20")), "{:?}", report.notes);
        // From here on they are different clusters.
        let bytes = fs::read(&path).unwrap();
        let entries: Vec<&[u8]> = [0, 1, 20].iter().map(|c| &bytes[Image::slot(*c)..][..4]).collect();
        assert!(entries[0] != entries[1] && entries[1] != entries[2] && entries[0] != entries[2]);
    }
}

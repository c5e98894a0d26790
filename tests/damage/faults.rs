//! Every way in which an image is damaged here, and what a check is to answer.

use crate::image::{CLOSED_21, IN_USE, Image, MAGIC, SIGNATURES};

/// Exit codes of a check.
#[derive(Clone, Copy)]
pub struct Codes {
    /// Without a flag, as before a mount.
    pub plain: i32,
    /// `-f -c -r`
    pub look: i32,
    /// `-f -c`
    pub check: i32,
    /// `-f -c -d`
    pub drop: i32,
    /// `-F -c -d`
    pub hard: i32,
}

const fn codes(plain: i32, look: i32, check: i32, drop: i32, hard: i32) -> Codes {
    Codes { plain, look, check, drop, hard }
}

/// No option helps.
const fn never(code: i32) -> Codes {
    codes(code, code, code, code, code)
}

/// Found by force alone, repaired by hard force alone.
const HARD: Codes = codes(0, 11, 11, 11, 0);
/// Found by force, repaired by it.
const SOFT: Codes = codes(0, 11, 0, 0, 0);
/// A field of the header that force corrects.
const FIELD: Codes = codes(0, 7, 0, 0, 0);
const MARKED: Codes = codes(37, 37, 37, 0, 0);
const FINE: Codes = never(0);

pub struct Fault {
    pub name: &'static str,
    pub codes: Codes,
    /// Damages the image. Returns the clusters of the disk whose bytes the damage itself, or its repair, may change; none:
    /// such an image cannot have this damage.
    pub apply: fn(&mut Image) -> Option<Vec<u32>>,
    /// The image is an empty one.
    pub empty: bool,
}

const fn fault(name: &'static str, codes: Codes, apply: fn(&mut Image) -> Option<Vec<u32>>) -> Fault {
    Fault { name, codes, apply, empty: false }
}

const fn of_empty(name: &'static str, codes: Codes, apply: fn(&mut Image) -> Option<Vec<u32>>) -> Fault {
    Fault { name, codes, apply, empty: true }
}

fn word(i: &mut Image, at: usize, value: u32) -> Option<Vec<u32>> {
    i.put(at, value);
    Some(vec![])
}

/// Adds a cluster with a format extension, and says that it is valid.
fn extend(i: &mut Image) -> usize {
    let at = i.bytes.len();
    i.bytes.resize(at + i.size(), 0);
    i.bytes[at..at + 8].copy_from_slice(&MAGIC.to_le_bytes());
    i.put(44, CLOSED_21);
    i.put(56, (at / 512) as u32);
    at
}

/// Rewrites entries of every `step`-th mapped cluster for the other version.
fn convert(i: &mut Image, step: usize) {
    let places: Vec<(u32, u32)> = i.map.iter().map(|(c, p)| (*c, *p)).collect();
    let own = i.version;
    i.version = 3 - own;
    for (cluster, place) in places.into_iter().step_by(step) {
        i.set(cluster, place);
    }
    i.version = own;
}

fn entry(i: &mut Image, n: usize, value: u32) -> Option<Vec<u32>> {
    let cluster = i.mapped(n);
    i.put(Image::slot(cluster), value);
    Some(vec![cluster])
}

/// Slots of the BAT's clusters.
fn slots(i: &Image) -> u32 {
    (i.l1 as usize * i.size() / 4 - 16) as u32
}

pub const FAULTS: &[Fault] = &[
    fault("none", FINE, |_| Some(vec![])),
    of_empty("none, empty", FINE, |_| Some(vec![])),
    // The header.
    fault("signature zeroed", never(11), |i| word(i, 0, 0)),
    fault("signature cut", never(11), |i| word(i, 12, 0x2020_2020)),
    fault("signature of the other version", HARD, |i| {
        let other = SIGNATURES[2 - i.version as usize];
        i.bytes[..16].copy_from_slice(other);
        Some(vec![])
    }),
    fault("type 3", never(11), |i| word(i, 16, 3)),
    fault("type 0", never(11), |i| word(i, 16, 0)),
    fault("cluster size 0", never(11), |i| word(i, 28, 0)),
    fault("cluster size 63", never(11), |i| word(i, 28, 63)),
    fault("cluster size 32", never(11), |i| word(i, 28, 32)),
    fault("cluster size 128 MiB", never(11), |i| word(i, 28, 1 << 18)),
    fault("first data 0", never(11), |i| word(i, 48, 0)),
    fault("first data off a border", never(11), |i| word(i, 48, i.l1 * i.bs + 1)),
    fault("first data inside the BAT", never(11), |i| {
        (i.l1 > 1).then(|| i.put(48, (i.l1 - 1) * i.bs)).map(|()| vec![])
    }),
    fault("first data one cluster too late", HARD, |i| word(i, 48, (i.l1 + 1) * i.bs)),
    fault("first data two clusters too late", HARD, |i| word(i, 48, (i.l1 + 2) * i.bs)),
    fault("first data behind the end", codes(0, 6, 6, 6, 6), |i| word(i, 48, (i.places() + 1) * i.bs)),
    fault("disk size 0", never(11), |i| word(i, 36, 0)),
    fault("disk size larger than the BAT", never(11), |i| word(i, 36, u32::MAX - i.bs)),
    fault("disk size of 2^60 sectors", never(11), |i| (i.version == 2).then(|| i.put(40, 1 << 28)).map(|()| vec![])),
    fault("upper half of the size, unused", FINE, |i| (i.version == 1).then(|| i.put(40, 77)).map(|()| vec![])),
    // Half of the disk is not to be forgotten because one field is wrong.
    fault("disk size halved", codes(0, 11, 11, 11, 11), |i| word(i, 36, i.clusters / 2 * i.bs)),
    fault("disk size one cluster short", codes(0, 11, 11, 11, 11), |i| word(i, 36, (i.clusters - 1) * i.bs)),
    of_empty("disk size halved, empty", FINE, |i| word(i, 36, i.clusters / 2 * i.bs)),
    fault("number of clusters wrong", FINE, |i| word(i, 32, i.clusters + 5)),
    fault("number of clusters 0, and an entry behind the end", codes(0, 11, 11, 11, 11), |i| {
        i.put(32, 0);
        entry(i, 1, i.entry(i.places() + 7))
    }),
    fault("geometry", FINE, |i| {
        i.put(20, 0);
        word(i, 24, u32::MAX)
    }),
    fault("unknown flags", FINE, |i| word(i, 52, 0x80)),
    fault("flag: empty, with data", FIELD, |i| word(i, 52, 1)),
    of_empty("flag: not empty, without data", FIELD, |i| word(i, 52, 0)),
    fault("marked in use", MARKED, |i| word(i, 44, IN_USE)),
    fault("marked by an unknown value", MARKED, |i| word(i, 44, 1)),
    fault("marked, and the flag is wrong", MARKED, |i| {
        i.put(52, 1);
        word(i, 44, IN_USE)
    }),
    fault("marked, and an entry is behind the end", codes(11, 11, 11, 11, 0), |i| {
        i.put(44, IN_USE);
        entry(i, 1, i.entry(i.places() + 1))
    }),
    fault("half converted, marked", never(17), |i| {
        i.put(44, IN_USE);
        convert(i, 2);
        word(i, 52, 2)
    }),
    fault("half converted, not marked", codes(11, 11, 11, 11, 17), |i| {
        convert(i, 2);
        word(i, 52, 2)
    }),
    fault("converted, not the signature", codes(11, 11, 11, 11, 0), |i| {
        convert(i, 1);
        word(i, 52, 2)
    }),
    fault("flag: conversion, nothing converted", codes(0, 7, 0, 0, 0), |i| word(i, 52, 2)),
    // The format extension.
    fault("closed by 2.1 without extension", FINE, |i| word(i, 44, CLOSED_21)),
    fault("extension", FINE, |i| {
        extend(i);
        Some(vec![])
    }),
    fault("extension behind the end", FIELD, |i| {
        extend(i);
        i.put(60, 1);
        Some(vec![])
    }),
    fault("extension in a cluster of the disk", FIELD, |i| {
        i.put(44, CLOSED_21);
        word(i, 56, (i.l1 + 1) * i.bs)
    }),
    fault("extension in the BAT", FIELD, |i| {
        i.put(44, CLOSED_21);
        word(i, 56, 1)
    }),
    fault("extension without its magic", FIELD, |i| {
        let at = extend(i);
        i.bytes[at] ^= 1;
        Some(vec![])
    }),
    fault("extension that is void", FINE, |i| {
        extend(i);
        word(i, 44, 0)
    }),
    fault("extension, and an entry behind the end", HARD, |i| {
        extend(i);
        entry(i, 1, i.entry(i.places() + 9))
    }),
    fault("extension, and a cluster used twice", HARD, |i| {
        extend(i);
        let place = i.map[&i.mapped(0)];
        entry(i, 2, i.entry(place))
    }),
    // The file.
    of_empty("no byte", never(6), |i| {
        i.bytes.clear();
        Some(vec![])
    }),
    of_empty("40 bytes", never(6), |i| {
        i.bytes.truncate(40);
        Some(vec![])
    }),
    fault("cut in the BAT", codes(0, 6, 6, 6, 6), |i| {
        let all = i.map.keys().copied().collect();
        i.bytes.truncate(i.l1 as usize * i.size() - 512);
        Some(all)
    }),
    fault("cut in the last cluster", HARD, |i| {
        let lost = i.last_placed();
        i.bytes.truncate(i.bytes.len() - 512);
        Some(vec![lost])
    }),
    fault("last cluster missing", HARD, |i| {
        let lost = i.last_placed();
        i.bytes.truncate(i.bytes.len() - i.size());
        Some(vec![lost])
    }),
    fault("all data missing", HARD, |i| {
        i.bytes.truncate(i.l1 as usize * i.size());
        Some(i.map.keys().copied().collect())
    }),
    fault("a piece of a cluster at the end", FINE, |i| {
        i.bytes.extend([0xEE; 1000]);
        Some(vec![])
    }),
    fault("clusters at the end that nothing uses", FINE, |i| {
        i.bytes.resize(i.bytes.len() + 2 * i.size() + 5, 0xEE);
        Some(vec![])
    }),
    of_empty("clusters at the end of an empty image", codes(0, 7, 0, 0, 0), |i| {
        i.bytes.resize(i.bytes.len() + 2 * i.size(), 0xEE);
        Some(vec![])
    }),
    // Entries.
    fault("entry behind the end", HARD, |i| entry(i, 0, i.entry(i.places()))),
    fault("entry far behind the end", HARD, |i| entry(i, 2, i.entry(1 << 20))),
    fault("entry of all ones", HARD, |i| entry(i, 1, u32::MAX)),
    fault("entry off a border", HARD, |i| (i.version == 1).then(|| entry(i, 1, i.entry(i.l1) + 1)).flatten()),
    fault("entry in the BAT", HARD, |i| (i.l1 > 1).then(|| entry(i, 1, i.entry(1))).flatten()),
    fault("entry zeroed", FINE, |i| entry(i, 1, 0)),
    fault("two clusters in one place", HARD, |i| {
        let place = i.map[&i.mapped(0)];
        entry(i, 2, i.entry(place))
    }),
    fault("three clusters in one place", HARD, |i| {
        let place = i.map[&i.mapped(1)];
        entry(i, 2, i.entry(place));
        entry(i, 3, i.entry(place));
        Some(vec![i.mapped(2), i.mapped(3)])
    }),
    fault("all clusters in one place", HARD, |i| {
        let place = i.map[&i.mapped(0)];
        for n in 1..i.map.len() {
            entry(i, n, i.entry(place));
        }
        Some(i.map.keys().copied().collect())
    }),
    fault("an unmapped cluster in the place of another one", HARD, |i| {
        let place = i.map[&i.mapped(3)];
        i.set(3, place);
        Some(vec![3, i.mapped(3)])
    }),
    fault("slot behind the disk, place of a cluster", SOFT, |i| {
        (slots(i) > i.clusters).then(|| i.set(i.clusters, i.l1)).map(|()| vec![])
    }),
    fault("slot behind the disk, behind the end", SOFT, |i| {
        (slots(i) > i.clusters).then(|| i.set(i.clusters + 1, 1 << 20)).map(|()| vec![])
    }),
    fault("slot behind the disk, a cluster of its own", SOFT, |i| {
        i.bytes.resize(i.bytes.len() + i.size(), 0xEE);
        (slots(i) > i.clusters).then(|| i.set(i.clusters, i.places() - 1)).map(|()| vec![])
    }),
    fault("last slot of the BAT", SOFT, |i| word(i, Image::slot(slots(i) - 1), 5)),
    fault("all slots behind the disk", SOFT, |i| {
        for slot in i.clusters..slots(i) {
            i.put(Image::slot(slot), slot | 1);
        }
        Some(vec![])
    }),
    fault("a page of the BAT is noise", HARD, |i| {
        let mut x = 12345u32;
        for slot in 0..i.clusters.min(1000) {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            i.put(Image::slot(slot), x | 0x8000_0001);
        }
        Some((0..i.clusters).collect())
    }),
    fault("an entry of each kind", HARD, |i| {
        let place = i.map[&i.mapped(0)];
        entry(i, 1, i.entry(place));
        entry(i, 2, i.entry(i.places() + 3));
        entry(i, 3, u32::MAX);
        if slots(i) > i.clusters {
            i.put(Image::slot(i.clusters), 1);
        }
        Some(vec![i.mapped(1), i.mapped(2), i.mapped(3)])
    }),
];

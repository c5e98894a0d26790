//! A repair of any image by any options: no cluster that an entry names soundly loses its bytes, and a second one finds nothing.

use std::collections::HashSet;
use std::path::Path;

use ploop::image::check::{CheckOptions, check_file};

use crate::mutate::Rng;

/// Copies of clusters that a repair may make; more of them only take long.
const COPIES: u64 = 16 << 20;

/// Bytes of a cluster; clusters of the disk and where the file has them; bytes that copies of clusters which are used twice would
/// take.
type Places = (usize, Vec<(u32, usize)>, u64);

/// By the format's rules alone.
fn places(bytes: &[u8]) -> Option<Places> {
    let word = |at: usize| bytes.get(at..at + 4).map(|b| u32::from_le_bytes(b.try_into().unwrap_or_default()));
    let v1 = bytes.starts_with(b"WithoutFreeSpace");
    if !v1 && !bytes.starts_with(b"WithouFreSpacExt") {
        return None;
    }
    let bs = word(28).filter(|bs| bs.is_power_of_two() && (64..=131_072).contains(bs))?;
    let size = bs as usize * 512;
    let sectors = u64::from(word(36)?) | if v1 { 0 } else { u64::from(word(40)?) << 32 };
    let first = word(48)? / bs;
    let (mut found, mut seen, mut copies) = (Vec::new(), HashSet::new(), 0);
    for cluster in 0..sectors.div_ceil(u64::from(bs)) {
        let Some(entry) = word(64 + 4 * cluster as usize) else { break };
        let place = match v1 {
            true if !entry.is_multiple_of(bs) => continue,
            true => entry / bs,
            false => entry,
        };
        let at = (place as usize).checked_mul(size).filter(|at| at.checked_add(size).is_some_and(|e| e <= bytes.len()));
        if let Some(at) = at.filter(|_| place >= first.max(1)) {
            copies += if seen.insert(place) { 0 } else { size as u64 };
            found.push((cluster as u32, at));
        }
    }
    Some((size, found, copies))
}

/// Repairs a copy of an image; says how that ended.
pub fn try_one(path: &Path, before: &[u8], rng: &mut Rng) -> String {
    let known = places(before);
    if known.as_ref().is_some_and(|(_, _, copies)| *copies > COPIES) {
        return String::new();
    }
    std::fs::write(path, before).expect("copy");
    let mut coin = |n: u64| rng.below(n) == 0;
    let options = CheckOptions {
        force: !coin(4),
        hard_force: coin(2),
        drop_inuse: !coin(3),
        check: coin(2),
        // Filling is a matter of other tests; here it would only fill the host's memory.
        repair_sparse: false,
        read_only: coin(8),
        ..CheckOptions::default()
    };
    let result = check_file(path, None, &options);
    let after = std::fs::read(path).expect("read");
    let unchanged = after == *before;
    assert!(unchanged || !options.read_only, "a look has changed the image");
    assert!(unchanged || options.hard_force || result.is_ok(), "refused, and yet it has changed");
    if let (Some((size, found, _)), false) = (known, unchanged) {
        let (_, now, _) = places(&after).expect("what could be read can be read");
        let now: std::collections::HashMap<u32, usize> = now.into_iter().collect();
        for (cluster, at) in found {
            let new = now.get(&cluster).map(|at| &after[*at..*at + size]);
            assert!(new == Some(&before[at..at + size]), "cluster {cluster} has lost its bytes: {result:?}");
        }
    }
    if result.is_ok() && !options.read_only {
        check_file(path, None, &options).expect("a second time");
        assert!(std::fs::read(path).expect("read") == after, "the second repair changes something");
    }
    result.map_or_else(
        |e| e.to_string().replace(&*path.to_string_lossy(), ""),
        |r| if unchanged { "sound".into() } else { format!("repaired {}", r.notes.len().min(4)) },
    )
}

//! `ploop snapshot-merge` and `ploop merge`: deltas are merged into the images below them.

use std::ffi::OsStr;
use std::path::PathBuf;

use ploop::descriptor::ImageMode;
use ploop::ops::device_chain;
use ploop::ops::merge::{self, MergeParams};

use crate::getopt::Parsed;
use crate::{Command, Fail, mistake, misuse, values};

pub const SNAPSHOTS: Command = Command {
    name: "snapshot-merge",
    short: "u:U:An:",
    long: &[],
    usage: "\
Usage: ploop snapshot-merge [-u UUID [-U UUID2] | -A] [-n FILE] DiskDescriptor.xml

Merges a snapshot into the one that it stands on, whose name goes; the top if none is named. The disk may be in use. A
merge that has begun is not undone: if it is interrupted, the same command finishes it.

  -u UUID   this snapshot
  -U UUID2  with all that it stands on, down to this one
  -A        everything, from the top down to the base
  -n FILE   into a new file; the old ones are removed

For example:
  ploop snapshot-merge -A /vz/1/DiskDescriptor.xml
",
    run: snapshots,
};

pub const IMAGES: Command = Command {
    name: "merge",
    short: "f:d:l:n:u:A",
    long: &[],
    usage: "\
Usage: ploop merge [-f raw] [-n FILE] TOP [...] BASE
       ploop merge -d DEVICE [-l LOW[..HIGH]]

The first form merges image files, the topmost first, into the last one. The second one merges levels of a running device
into the lowest of them (the base is level 0; HIGH is LOW + 1 if it is not given; without -l all levels). Merged files
stay where they are; no descriptor is changed. For a disk with a descriptor there is ploop snapshot-merge.

  -f raw   the last file is a raw image
  -n FILE  into a new file

For example:
  ploop merge -d /dev/ploop0 -l 0..2
",
    run: images,
};

fn snapshots(parsed: Parsed) -> Result<(), Fail> {
    let mut params = MergeParams::default();
    for (option, value) in &parsed.options {
        match option {
            'u' => params.guid = Some(values::guid(value)?),
            'U' => params.guid2 = Some(values::guid(value)?),
            'A' => params.all = true,
            'n' => params.new_delta = Some(PathBuf::from(value)),
            _ => return misuse(),
        }
    }
    if params.guid.is_some() && params.all {
        return Err(Fail::Usage(Some("ploop snapshot-merge: -u and -A exclude each other".into())));
    }
    let [descriptor] = &parsed.operands[..] else { return misuse() };
    if !values::is_descriptor(descriptor) {
        return misuse();
    }
    Ok(merge::merge_snapshot(descriptor.as_ref(), "", &params)?)
}

fn images(parsed: Parsed) -> Result<(), Fail> {
    let mut raw = false;
    let mut device = None;
    let mut range = None;
    let mut new_delta = None;
    for (option, value) in &parsed.options {
        match option {
            'f' => raw = values::format(value)? == ImageMode::Raw,
            'd' => device = Some(values::text(value, "device name")?),
            'l' => range = Some(levels_of(value)?),
            'n' => new_delta = Some(PathBuf::from(value)),
            // As in the classic these options are accepted and ignored.
            'u' | 'A' => {}
            _ => return misuse(),
        }
    }
    if let Some(device) = device {
        if raw || !parsed.operands.is_empty() {
            return misuse();
        }
        return on_device(&device, range, new_delta);
    }
    if parsed.operands.iter().any(|f| values::is_descriptor(f)) {
        return Err(mistake("ploop merge takes image files; for a DiskDescriptor.xml there is ploop snapshot-merge"));
    }
    if parsed.operands.len() < 2 {
        return misuse();
    }
    let files: Vec<PathBuf> = parsed.operands.iter().map(PathBuf::from).collect();
    Ok(merge::merge_files(&files, raw, new_delta.as_deref())?)
}

/// `LOW` or `LOW..HIGH`.
fn levels_of(value: &OsStr) -> Result<(usize, usize), Fail> {
    let text = value.to_string_lossy();
    let level = |t: &str| t.parse::<usize>().ok();
    let range = match text.split_once("..") {
        Some((low, high)) => level(low).zip(level(high)),
        None => level(&text).map(|low| (low, low + 1)),
    };
    match range {
        Some((low, high)) if low < high => Ok((low, high)),
        _ => Err(Fail::Usage(Some(format!(
            "ploop merge: levels '{text}': must be LOW or LOW..HIGH, numbers from 0, the lower one first"
        )))),
    }
}

fn on_device(device: &str, range: Option<(usize, usize)>, new_delta: Option<PathBuf>) -> Result<(), Fail> {
    let (low, high) = range.map_or((0, None), |(low, high)| (low, Some(high)));
    Ok(device_chain::merge(device, low, high, new_delta.as_deref())?)
}

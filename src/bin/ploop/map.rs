//! `ploop map`: where the clusters of a disk are.

mod svg;
mod text;

use std::ffi::OsString;
use std::path::Path;

use ploop::ops::map::{self, Mapped, Of, Parts};
use ploop::ops::map_page;
use ploop::{report, sys::terminal};
use serde::Serialize;

use crate::getopt::Parsed;
use crate::{Command, Fail, json, misuse, result, values};

const SVG: char = '\u{11}';

pub const COMMAND: Command = Command {
    name: "map",
    short: "",
    long: &[("svg", true, SVG), json::OPTION],
    usage: "\
Usage: ploop map [--svg FILE | --json] { DiskDescriptor.xml | DEVICE | IMAGE }

Draws where the clusters of a disk are: which of them have a place, in which level, how they lie in the files, which
clusters of a file are free, and what ploop compact would give back. Nothing is changed; a disk that runs is looked at
while it is used. Exit status 11: the table of an image is damaged; what is whole is drawn all the same.

  --svg FILE  as a page with pictures; an existing FILE is replaced only if it is such a page
  --json      the same for programs

For example:
  ploop map /vz/1/DiskDescriptor.xml
",
    run,
};

/// The status of a disk with a damaged table.
const DAMAGED: u8 = ploop::error::Kind::Format as u8;

fn run(parsed: Parsed) -> Result<(), Fail> {
    let page = parsed.options.iter().find(|(o, _)| *o == SVG).map(|(_, file)| file);
    let [operand] = &parsed.operands[..] else { return misuse() };
    if json::wanted(&parsed) && page.is_some() {
        return misuse();
    }
    if report::verbose_level() <= crate::CONSOLE || json::wanted(&parsed) {
        report::set_verbose_level(report::verbose_level().min(report::NO_STDOUT));
    }
    let paper = text::Paper::of(terminal::columns(), std::env::var_os);
    let parts = match (page, json::wanted(&parsed)) {
        (Some(_), _) => svg::PARTS,
        (None, true) => Parts { disk: 256, file: 64 },
        (None, false) => paper.parts(),
    };
    let mapped = mapped(operand, parts)?;
    let shown = operand.to_string_lossy();
    match page {
        Some(file) => {
            map_page::write(Path::new(file), &svg::page(&shown, &mapped))?;
            result(format_args!("the map of {shown} is in {}", Path::new(file).display()))?;
        }
        None if json::wanted(&parsed) => for_programs(operand, &mapped)?,
        None => text::show(&shown, &mapped, &paper)?,
    }
    for level in mapped.map.levels.iter().filter(|l| !l.damage.is_empty()) {
        eprintln!("damaged: {}; look with ploop check -f -r, repair with ploop check -f", level.damage);
    }
    if mapped.map.damaged() > 0 { Err(Fail::Status(DAMAGED)) } else { Ok(()) }
}

fn mapped(operand: &OsString, parts: Parts) -> Result<Mapped, Fail> {
    let path = Path::new(operand);
    Ok(match () {
        () if path.starts_with("/dev") => map::map(Of::Device(&values::text(operand, "device name")?), parts)?,
        () if values::is_descriptor(operand) => map::map(Of::Disk(path), parts)?,
        () => map::map(Of::Image(path), parts)?,
    })
}

/// A map, for programs.
#[derive(Serialize)]
struct Shown<'a> {
    file: String,
    device: Option<String>,
    cluster_bytes: u64,
    clusters: u64,
    allocated: u64,
    shadowed: u64,
    free: u64,
    compact: &'a map::Compact,
    levels: Vec<ShownLevel<'a>>,
    parts: &'a [map::Part],
}

#[derive(Serialize)]
struct ShownLevel<'a> {
    image: String,
    #[serde(flatten)]
    level: &'a map::Level,
}

fn for_programs(operand: &OsString, mapped: &Mapped) -> Result<(), Fail> {
    let map = &mapped.map;
    let levels = map.levels.iter().zip(&mapped.files);
    json::show(
        "map",
        Shown {
            file: json::path(Path::new(operand)),
            device: mapped.device.as_deref().map(json::path),
            cluster_bytes: map.cluster_bytes,
            clusters: map.clusters,
            allocated: map.allocated(),
            shadowed: map.shadowed(),
            free: map.free(),
            compact: &mapped.compact,
            levels: levels.map(|(level, file)| ShownLevel { image: json::path(file), level }).collect(),
            parts: &map.parts,
        },
    )
}

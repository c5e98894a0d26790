//! `ploop info`: how full a disk is, its size, its device; what is in an image file.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ploop::ops::info::{self, ImageInfo};
use ploop::report;
use serde_json::json;

use crate::getopt::Parsed;
use crate::list::percent;
use crate::{Command, Fail, json, misuse, result, write_out};

pub const COMMAND: Command = Command {
    name: "info",
    short: "sd",
    long: &[("image", true, IMAGE), json::OPTION],
    usage: "\
Usage: ploop info [-s] [-d] [--json] DiskDescriptor.xml
       ploop info --image FILE [--json]

Without options: size and use of the file system. It is mounted for a moment if that is not known.

  -s             size of the disk, cluster size (both in sectors), format version
  -d             the device that runs the disk
  --image FILE   what is in an image file: header, table, partition table, file system
  --json         the same for programs

For example:
  ploop info -s /vz/1/DiskDescriptor.xml
",
    run,
};

const IMAGE: char = '\u{11}';

fn run(parsed: Parsed) -> Result<(), Fail> {
    // Only results are printed unless -v asks for more.
    if report::verbose_level() <= crate::CONSOLE {
        report::set_verbose_level(report::verbose_level().min(report::NO_STDOUT));
    }
    let has = |letter| parsed.options.iter().any(|(o, _)| *o == letter);
    let image = parsed.options.iter().find(|(o, _)| *o == IMAGE).map(|(_, file)| file);
    if let Some(file) = image {
        if !parsed.operands.is_empty() || has('s') || has('d') {
            return misuse();
        }
        let found = info::image_info(Path::new(file))?;
        return match json::wanted(&parsed) {
            true => json::show("image", &found),
            false => text(&found),
        };
    }
    let [descriptor] = &parsed.operands[..] else { return misuse() };
    let descriptor = Path::new(descriptor);
    if json::wanted(&parsed) {
        return for_programs(descriptor, has('s'), has('d'));
    }
    if !has('s') && !has('d') {
        return usage_of(descriptor);
    }
    if has('s') {
        let spec = info::spec(descriptor)?;
        result(format_args!("size:\t\t{}", spec.sectors))?;
        result(format_args!("blocksize:\t{}", spec.cluster))?;
        result(format_args!("fmt_version:\t{}", spec.version))?;
    }
    if has('d') {
        let device = info::device(descriptor)?;
        let mut line = b"device:\t\t".to_vec();
        line.extend(device.iter().flat_map(|d| d.as_os_str().as_bytes()));
        line.push(b'\n');
        write_out(&line)?;
        if let Some((done, all)) = info::merging(descriptor)? {
            result(format_args!("merging:\t{} %", percent(done, all)))?;
        }
    }
    Ok(())
}

fn usage_of(descriptor: &Path) -> Result<(), Fail> {
    let fs = info::fs_info(descriptor)?;
    let kib = |blocks: u64| (u128::from(blocks) * u128::from(fs.block_size)) >> 10;
    let (size, used) = (kib(fs.blocks), kib(fs.blocks.saturating_sub(fs.free_blocks)));
    result(format_args!("{:>11} {:>14} {:>14}", "resource", "Size", "Used"))?;
    result(format_args!("{:>11} {size:>14} {used:>14}", "1k-blocks"))?;
    result(format_args!("{:>11} {:>14} {:>14}", "inodes", fs.inodes, fs.inodes.saturating_sub(fs.free_inodes)))
}

/// Without `-s` and `-d` the file system; what they ask for, else.
fn for_programs(descriptor: &Path, spec: bool, device: bool) -> Result<(), Fail> {
    let mut found = serde_json::Map::new();
    found.insert("descriptor".into(), json::path(descriptor).into());
    if !spec && !device {
        let fs = info::fs_info(descriptor)?;
        found.insert("block_size".into(), fs.block_size.into());
        found.insert("blocks".into(), fs.blocks.into());
        found.insert("free_blocks".into(), fs.free_blocks.into());
        found.insert("inodes".into(), fs.inodes.into());
        found.insert("free_inodes".into(), fs.free_inodes.into());
    }
    if spec {
        let spec = info::spec(descriptor)?;
        found.insert("size_sectors".into(), spec.sectors.into());
        found.insert("cluster_sectors".into(), spec.cluster.into());
        found.insert("format_version".into(), spec.version.into());
    }
    if device {
        found.insert("device".into(), info::device(descriptor)?.map(|d| json::path(&d)).into());
        let merging = info::merging(descriptor)?;
        found.insert("merging".into(), merging.map(|(done, all)| json!({ "done": done, "all": all })).into());
    }
    json::show("info", found)
}

fn text(i: &ImageInfo) -> Result<(), Fail> {
    let in_use = if i.in_use { "   (written now, or not closed cleanly)" } else { "" };
    let yes = |b: bool| if b { "yes" } else { "no" };
    let ext = i.ext_at_sector.map_or("not found".into(), |s| format!("at sector {s}"));
    let rows: [(&str, String); 20] = [
        ("image", i.path.display().to_string()),
        ("file size", format!("{} bytes", i.file_bytes)),
        ("version", i.version.to_string()),
        ("type", i.kind.to_string()),
        ("heads", i.heads.to_string()),
        ("cylinders", i.cylinders.to_string()),
        ("cluster size", format!("{} sectors", i.cluster_sectors)),
        ("size", format!("{} clusters", i.size_clusters)),
        ("size in sectors", i.size_sectors.to_string()),
        ("in use", format!("{:#010x}{in_use}", i.in_use_value)),
        ("first data", format!("sector {}", i.first_data_sector)),
        ("flags", format!("{:#x}", i.flags)),
        ("BAT clusters", i.bat_clusters.to_string()),
        ("slots in each", i.bat_slots.to_string()),
        ("entries used", i.bat_used.to_string()),
        ("stored", format!("{} bytes", i.stored_bytes)),
        ("bad entries", i.bad_entries.to_string()),
        ("GPT", yes(i.gpt).into()),
        ("ext4", ext),
        ("file system", i.file_system.clone().unwrap_or_else(|| "not recognised".into())),
    ];
    for (key, value) in rows {
        result(format_args!("{:<17}{value}", format!("{key}:")))?;
    }
    Ok(())
}

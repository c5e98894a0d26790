//! `ploop list`: devices.

use std::os::unix::ffi::OsStrExt;

use ploop::ops::list;
use serde_json::json;

use crate::getopt::Parsed;
use crate::{Command, Fail, json, misuse, write_out};

pub const COMMAND: Command = Command {
    name: "list",
    short: "a",
    long: &[json::OPTION],
    usage: "\
Usage: ploop list [-a] [--json]

One line for each device: its name, the base image, the mount point (with -a), the component name.
A device that is not in order says so in one more column (`deleted`: an image of it; `ending`: by losetup -d; see ploop
doctor), one whose snapshots are being merged how far that is.

  -a      with mount points
  --json  the same for programs, with mount points

For example:
  ploop list -a
",
    run,
};

/// How much of a merge is done.
pub fn percent(done: u64, all: u64) -> u64 {
    done.saturating_mul(100) / all.max(1)
}

fn run(parsed: Parsed) -> Result<(), Fail> {
    if !parsed.operands.is_empty() {
        return misuse();
    }
    if json::wanted(&parsed) {
        let devices = list::devices(true)?;
        let one = |d: &list::Line| {
            json!({
                "name": d.name,
                "node": format!("/dev/{}", d.name),
                "base": json::path(&d.base),
                "mount_points": d.mount_points.iter().map(|m| json::path(m)).collect::<Vec<_>>(),
                "component": d.component,
                "state": d.state,
                "merging": d.merging.map(|(done, all)| json!({ "done": done, "all": all })),
                "deleted": d.deleted.iter().map(|f| json::path(f)).collect::<Vec<_>>(),
            })
        };
        return json::show("list", json!({ "devices": devices.iter().map(one).collect::<Vec<_>>() }));
    }
    let all = parsed.options.iter().any(|(o, _)| *o == 'a');
    for device in list::devices(all)? {
        // The name in twelve columns, the rest separated by single blanks, an empty field too: scripts count on it.
        let mut line = format!("{:<12} ", device.name).into_bytes();
        line.extend(device.base.as_os_str().as_bytes());
        line.push(b' ');
        line.extend(device.mount_points.first().iter().flat_map(|m| m.as_os_str().as_bytes()));
        line.push(b' ');
        line.extend(device.component.as_bytes());
        if let Some(state) = device.trouble {
            line.extend(format!(" {state}").bytes());
        }
        if let Some((done, all)) = device.merging {
            line.extend(format!(" merging:{}%", percent(done, all)).bytes());
        }
        line.push(b'\n');
        write_out(&line)?;
    }
    Ok(())
}

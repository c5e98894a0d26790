//! `ploop mount`: a disk or image files become a device, and a mounted file system.

use std::ffi::OsStr;
use std::path::PathBuf;

use ploop::descriptor::ImageMode;
use ploop::ops::mount::{self, MountParams, Mounted};
use ploop::report;

use crate::getopt::Parsed;
use crate::{Command, Fail, mistake, misuse, result, values};

pub const COMMAND: Command = Command {
    name: "mount",
    short: "rFf:b:d:m:p:t:o:u:c:",
    long: &[("force", false, FORCE), ("trace", false, TRACE), ("auto-compact", false, AUTO_COMPACT), ("partition", true, 'p')],
    usage: "\
Usage: ploop mount [-rF] [-d DEVICE] [-m DIR] [-p NUMBER] [-t FSTYPE] [-o OPTIONS] [-u UUID] [-c NAME] DiskDescriptor.xml
       ploop mount [-rF] [-f FORMAT] [-b CLUSTER] [-d DEVICE] [-m DIR] [-p NUMBER] [-t FSTYPE] [-o OPTIONS] BASE [... TOP]
       ploop mount [-r] [...] CONTAINER_ID

Makes a block device of a disk, or of image files, base first, and mounts its file system.

  -r            read-only; nothing is written, also not to the images
  -m DIR        mount the file system here; without it only the device is made
  -p, --partition NUMBER
                with -m: this partition; else the first one, or, if that has no file system of Linux, the largest that has
  -d DEVICE     name of the device, like /dev/ploop5; else the first free one
  -t FSTYPE     type of the file system; else it is found out
  -o OPTIONS    mount options
  -F            check the file system first (fsck -p)
  -u UUID       mount this snapshot; the word base means the first one
  -c NAME       component: a name for an additional mount of the same disk
  -f FORMAT     raw: the base is a raw image
  -b CLUSTER    its cluster size in sectors
  --force       with -r and image files: look at an image that is in use elsewhere, or cut off
                without -r: write to an image on which deltas stand, which changes what they show
  --trace       log every request of the device
  --auto-compact
                give space of the image back by itself, when more than a tenth of it, and 1 GiB, is free and the disk is idle;
                the file system inside has to discard (-o discard, or fstrim)

For example:
  ploop mount -m /mnt /vz/1/DiskDescriptor.xml
",
    run,
};

const FORCE: char = '\u{11}';
const TRACE: char = '\u{12}';
const AUTO_COMPACT: char = '\u{13}';

fn run(parsed: Parsed) -> Result<(), Fail> {
    let mut params = MountParams::default();
    let mut component = String::new();
    let mut raw = false;
    for (option, value) in parsed.options {
        match option {
            'r' => params.read_only = true,
            'F' => params.fsck = true,
            'f' => raw = values::format(&value)? == ImageMode::Raw,
            'b' => params.cluster = Some(values::cluster(&value)?),
            'd' => params.device = Some(values::text(&value, "device name")?),
            'm' => params.target = Some(PathBuf::from(value)),
            'p' => params.partition = Some(partition(&value)?),
            't' => params.fstype = Some(values::text(&value, "file system type")?),
            'o' => params.options = Some(values::text(&value, "mount options")?),
            'u' if value == "base" => params.guid = Some("base".into()),
            'u' => params.guid = Some(values::guid(&value)?.to_string()),
            'c' => component = values::text(&value, "component name")?,
            FORCE => params.force = true,
            TRACE => params.trace = true,
            AUTO_COMPACT => params.auto_compact = true,
            _ => return misuse(),
        }
    }
    let files: Vec<PathBuf> = parsed.operands.iter().map(PathBuf::from).collect();
    if files.is_empty() {
        return misuse();
    }
    let mounted = match &files[..] {
        [one] if values::is_descriptor(one.as_os_str()) => mount::mount_descriptor(one, &component, &params)?,
        _ if files.iter().any(|f| values::is_descriptor(f.as_os_str())) => {
            return Err(mistake("a DiskDescriptor.xml stands alone: it names its images itself"));
        }
        _ => {
            // As with the classic, -u and -c are accepted with image files and ignored.
            params.guid = None;
            mount::mount_list(&files, raw, &params)?
        }
    };
    if params.read_only && params.target.is_none() {
        show_command(&mounted, params.partition)?;
    }
    Ok(())
}

/// Prints the command that mounts the device, which is there whatever can be read of it.
fn show_command(mounted: &Mounted, partition: Option<u32>) -> Result<(), Fail> {
    let (source, option) = match mount::source_and_option(&mounted.device, partition) {
        Ok(found) => found,
        Err(e) => {
            report::warn(format_args!(
                "{} is there, but what it holds is not known: {e}",
                mounted.device.node().display()
            ));
            return Ok(());
        }
    };
    let option = option.map(|o| format!("-o {o} ")).unwrap_or_default();
    result(format_args!("mount -r {option}{} /mnt", source.display()))
}

fn partition(value: &OsStr) -> Result<u32, Fail> {
    let number = values::number(value, "partition")?;
    u32::try_from(number)
        .ok()
        .filter(|n| *n > 0)
        .ok_or_else(|| mistake(format!("partition {number}: must be 1 or more")))
}

//! `ploop init`: make a disk.

use std::ffi::OsStr;
use std::path::PathBuf;

use ploop::descriptor::ImageMode;
use ploop::format::header::Version;
use ploop::fs::mkfs::{FsType, Inodes};
use ploop::ops::create::{self, CreateParams, FsParams};
use ploop::units::ClusterSize;

use crate::getopt::Parsed;
use crate::{Command, Fail, mistake, misuse, values};

pub const COMMAND: Command = Command {
    name: "init",
    short: "s:f:v:t:b:B:i:n",
    long: &[("nolazy", false, 'n'), ("inodes", true, 'N')],
    usage: "\
Usage: ploop init -s SIZE [-f FORMAT] [-v VERSION] [-t FSTYPE] [-b CLUSTER] [-B FSBLOCK]
                  [-i BYTES | --inodes N] [-n] FILE

Makes the image FILE and DiskDescriptor.xml beside it; neither may exist.

  -s SIZE      size of the disk: NUMBER[K|M|G|T], without a suffix in sectors of 512 bytes
  -f FORMAT    expanded (or ploop1; grows as it fills; default), preallocated, raw
  -v VERSION   format version, 1 (below 2 TiB) or 2 (default)
  -t FSTYPE    ext4 (default), ext3, or none: no partition and no file system
  -b CLUSTER   cluster size in sectors, a power of two from 64 to 131072 (default 2048)
  -B FSBLOCK   block size of the file system in bytes (default 4096)
  -i BYTES     one inode of the file system for so many bytes (default 16384; fewer bytes for many small files)
  --inodes N   so many inodes; a file system that grows gets more of them in proportion
  -n, --nolazy write the inode tables now, not at the first mount

For example:
  ploop init -s 10g /vz/1/root.hds
",
    run,
};

fn run(parsed: Parsed) -> Result<(), Fail> {
    let mut sectors = None;
    let mut mode = ImageMode::Expanded;
    let mut version = Version::V2;
    let mut fstype = Some(FsType::Ext4);
    let mut cluster = ClusterSize::DEFAULT;
    let mut block_size = 0;
    let mut lazy = true;
    let mut inodes = Inodes::Usual;
    for (option, value) in parsed.options {
        match option {
            's' => {
                sectors = Some(values::size(&value)?);
                if sectors == Some(0) {
                    return Err(mistake("Incorrect size '0': a disk has at least one sector"));
                }
            }
            'f' => mode = values::format(&value)?,
            'v' => {
                let number = u32::try_from(values::number(&value, "version")?).unwrap_or(u32::MAX);
                version = Version::from_number(number).map_err(|e| mistake(e.to_string()))?;
            }
            't' => {
                fstype = match value.to_str() {
                    Some("none") => None,
                    Some("ext3") => Some(FsType::Ext3),
                    Some("ext4") => Some(FsType::Ext4),
                    _ => {
                        let shown = value.to_string_lossy();
                        return Err(mistake(format!(
                            "Incorrect file system type '{shown}': must be ext4, ext3 or none"
                        )));
                    }
                }
            }
            'b' => cluster = values::cluster(&value)?,
            'B' => {
                block_size = u32::try_from(values::number(&value, "file system block size")?)
                    .map_err(|_| mistake("Incorrect file system block size: too large"))?;
            }
            'i' => inodes = Inodes::PerBytes(inode_number(&value, "number of bytes for each inode", 1024)?),
            'N' => inodes = Inodes::Count(inode_number(&value, "number of inodes", 16)?),
            'n' => lazy = false,
            _ => return misuse(),
        }
    }
    let [file] = &parsed.operands[..] else { return misuse() };
    let Some(sectors) = sectors else { return misuse() };
    create::create_image(&CreateParams {
        image: PathBuf::from(file),
        sectors,
        cluster,
        version,
        mode,
        fs: fstype.map(|fstype| FsParams { fstype, block_size, lazy, inodes }),
        without_partition: false,
    })?;
    Ok(())
}

fn inode_number(value: &OsStr, what: &str, least: u64) -> Result<u64, Fail> {
    let number = values::number(value, what)?;
    match (least..=u64::from(u32::MAX)).contains(&number) {
        true => Ok(number),
        false => Err(mistake(format!("Incorrect {what} {number}: must be from {least} to {}", u32::MAX))),
    }
}

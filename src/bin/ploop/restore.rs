//! `ploop restore-descriptor`: a lost DiskDescriptor.xml made anew.

use std::path::{Path, PathBuf};

use ploop::descriptor::ImageMode;
use ploop::ops::{restore, restore_folder};

use crate::getopt::Parsed;
use crate::{Command, Fail, mistake, misuse, values};

pub const COMMAND: Command = Command {
    name: "restore-descriptor",
    short: "f:b:",
    long: &[("format", true, 'f'), ("blocksize", true, 'b')],
    usage: "\
Usage: ploop restore-descriptor [-f raw|ploop1] [-b CLUSTER] DIR FILE
       ploop restore-descriptor [-f raw -b CLUSTER] DIR BASE DELTA... TOP
       ploop restore-descriptor DIR

Stores DIR/DiskDescriptor.xml: for the image FILE, as for a disk without snapshots; or for images that stand on each other,
the base first. With DIR alone it is made from the device that runs the disk, from DIR/DiskDescriptor.xml.Backup if that
fits all images, or from the images if their order is certain; else they are listed. A descriptor that can be read stays.

  -f, --format FORMAT      ploop1 (or expanded; default), raw
  -b, --blocksize CLUSTER  cluster of a raw image in sectors; default: the largest of 2048 to 64 that divides its size

For example:
  ploop restore-descriptor /vz/private/1/root.hdd /vz/private/1/root.hdd/root.hds
",
    run,
};

fn run(parsed: Parsed) -> Result<(), Fail> {
    let (mut raw, mut cluster) = (false, None);
    for (option, value) in &parsed.options {
        match option {
            'f' => raw = values::format(value)? == ImageMode::Raw,
            'b' => cluster = Some(values::cluster(value)?),
            _ => return misuse(),
        }
    }
    let cluster = cluster.filter(|_| raw);
    match &parsed.operands[..] {
        [folder] if !raw => Ok(restore_folder::restore_folder(Path::new(folder))?),
        [folder, image] => Ok(restore::restore_descriptor(Path::new(folder), Path::new(image), raw, cluster)?),
        [folder, images @ ..] if images.len() > 1 => {
            if raw && cluster.is_none() {
                return Err(mistake(
                    "ploop restore-descriptor: the cluster of deltas on a raw image must be given (-b)",
                ));
            }
            let images: Vec<PathBuf> = images.iter().map(PathBuf::from).collect();
            Ok(restore_folder::restore_chain(Path::new(folder), &images, cluster)?)
        }
        _ => misuse(),
    }
}

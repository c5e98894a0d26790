//! Images and descriptors, right but for what a row spoils; made from the format's description alone.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

pub const TOP: &str = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
pub const NONE: &str = "{00000000-0000-0000-0000-000000000000}";
pub const A: &str = "{aaaaaaaa-1111-4222-8333-444444444444}";
pub const B: &str = "{bbbbbbbb-1111-4222-8333-444444444444}";

/// Sectors of a cluster, and its bytes.
pub const BS: u32 = 64;
pub const CLUSTER: u64 = 32 * 1024;

/// Shape of an image.
#[derive(Clone, Copy)]
pub struct Image {
    pub v1: bool,
    pub clusters: u32,
    /// How many of the first clusters are in the file, in their order.
    pub mapped: u32,
}

pub const PLAIN: Image = Image { v1: false, clusters: 2000, mapped: 3 };

impl Image {
    pub fn l1(&self) -> u32 {
        (64 + 4 * u64::from(self.clusters)).next_multiple_of(512).div_ceil(CLUSTER) as u32
    }

    pub fn write(&self, path: &Path) {
        let mut bytes = vec![0u8; (self.l1() as usize + self.mapped as usize) * CLUSTER as usize];
        bytes[..16].copy_from_slice(if self.v1 { b"WithoutFreeSpace" } else { b"WithouFreSpacExt" });
        let sectors = self.clusters * BS;
        let words = [
            (16, 2),
            (20, 16),
            (24, sectors / 1008),
            (28, BS),
            (32, self.clusters),
            (36, sectors),
            (48, self.l1() * BS),
            (52, u32::from(self.mapped == 0)),
        ];
        for (at, word) in words {
            bytes[at..at + 4].copy_from_slice(&u32::to_le_bytes(word));
        }
        for i in 0..self.mapped {
            let place = (self.l1() + i) * if self.v1 { BS } else { 1 };
            let at = 64 + 4 * i as usize;
            bytes[at..at + 4].copy_from_slice(&place.to_le_bytes());
            let data = (self.l1() + i) as usize * CLUSTER as usize;
            bytes[data..data + CLUSTER as usize].fill(0x40 + i as u8);
        }
        fs::write(path, bytes).expect("image");
    }
}

/// The usual image, `f` in the folder.
pub fn good(dir: &Path) {
    PLAIN.write(&dir.join("f"));
}

/// The same with some bytes replaced.
pub fn patched(dir: &Path, at: u64, bytes: &[u8]) {
    good(dir);
    patch(&dir.join("f"), at, bytes);
}

pub fn patch(path: &Path, at: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(path).expect("image");
    file.write_all_at(bytes, at).expect("patch");
}

/// With one word replaced.
pub fn word(dir: &Path, at: u64, value: u32) {
    patched(dir, at, &value.to_le_bytes());
}

/// Offset of the entry of a cluster.
pub fn slot(cluster: u64) -> u64 {
    64 + 4 * cluster
}

pub fn cut(path: &Path, len: u64) {
    File::options().write(true).open(path).expect("image").set_len(len).expect("cut");
}

/// One element Image and one Shot.
pub struct Delta<'a> {
    pub guid: &'a str,
    pub parent: &'a str,
    pub file: &'a str,
}

/// The only image of a disk.
pub fn base(file: &str) -> Delta<'_> {
    Delta { guid: TOP, parent: NONE, file }
}

/// A descriptor; `extra` stands behind the parameters' other elements.
pub fn xml(deltas: &[Delta<'_>], bs: u32, kind: &str, extra: &str) -> String {
    let mut text = format!(
        "<?xml version=\"1.0\"?>\n<Parallels_disk_image>\n  <Disk_Parameters>\n    <Disk_size>128000</Disk_size>\n    \
         <Cylinders>126</Cylinders>\n    <Heads>16</Heads>\n    <Sectors>63</Sectors>\n    <Padding>0</Padding>{extra}\n  \
         </Disk_Parameters>\n  <StorageData>\n    <Storage>\n      <Start>0</Start>\n      <End>128000</End>\n      \
         <Blocksize>{bs}</Blocksize>\n"
    );
    for d in deltas {
        let (guid, file) = (d.guid, d.file);
        text += &format!(
            "      <Image>\n        <GUID>{guid}</GUID>\n        <Type>{kind}</Type>\n        <File>{file}</File>\n      \
             </Image>\n"
        );
    }
    text += "    </Storage>\n  </StorageData>\n  <Snapshots>\n";
    text += &format!("    <TopGUID>{TOP}</TopGUID>\n");
    for d in deltas {
        let (guid, parent) = (d.guid, d.parent);
        text +=
            &format!("    <Shot>\n      <GUID>{guid}</GUID>\n      <ParentGUID>{parent}</ParentGUID>\n    </Shot>\n");
    }
    text + "  </Snapshots>\n</Parallels_disk_image>\n"
}

/// A descriptor of these deltas in the folder; the files are made as usual images where none are.
pub fn disk(dir: &Path, deltas: &[Delta<'_>]) {
    for d in deltas {
        let path = dir.join(d.file);
        if path.symlink_metadata().is_err() && path.parent().is_some_and(Path::is_dir) {
            PLAIN.write(&path);
        }
    }
    text(dir, &xml(deltas, BS, "Compressed", ""));
}

/// A descriptor of this text.
pub fn text(dir: &Path, text: &str) {
    fs::write(dir.join("DiskDescriptor.xml"), text).expect("descriptor");
}

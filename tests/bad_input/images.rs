//! Image files.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::Row;
use crate::make::{BS, CLUSTER, Image, PLAIN, cut, good, patch, patched, slot, word};

const CHECK: &[&str] = &["check", "-f", "-c", "-r", "{}/f"];
const MOUNT: &[&str] = &["mount", "{}/f"];
const INFO: &[&str] = &["info", "--image", "{}/f"];

const fn row(
    name: &'static str,
    make: fn(&Path),
    args: &'static [&'static str],
    code: i32,
    says: &'static [&'static str],
) -> Row {
    Row { name, make, args, code, says }
}

fn of_len(dir: &Path, len: u64) {
    good(dir);
    cut(&dir.join("f"), len);
}

fn v1(dir: &Path) {
    Image { v1: true, ..PLAIN }.write(&dir.join("f"));
}

/// An image whose table takes three clusters.
fn long_table(dir: &Path) {
    Image { clusters: 20_000, ..PLAIN }.write(&dir.join("f"));
}

fn sectors(dir: &Path, sectors: u64) {
    patched(dir, 36, &sectors.to_le_bytes());
}

/// A size of 2^32-1 clusters, with a header that fits it: the table alone would have 16 GiB.
fn huge_table(dir: &Path) {
    let clusters = u64::from(u32::MAX);
    sectors(dir, clusters * u64::from(BS));
    let l1 = (64 + 4 * clusters).next_multiple_of(512).div_ceil(CLUSTER) as u32;
    patch(&dir.join("f"), 48, &(l1 * BS).to_le_bytes());
    patch(&dir.join("f"), 32, &u32::MAX.to_le_bytes());
}

fn random(dir: &Path) {
    let mut state = 1u64;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 56) as u8
    })
    .take(1 << 20)
    .collect();
    fs::write(dir.join("f"), bytes).expect("file");
}

fn begins_with(dir: &Path, bytes: &[u8]) {
    let file = File::create(dir.join("f")).expect("file");
    file.set_len(1 << 20).expect("length");
    file.write_all_at(bytes, 0).expect("write");
}

fn chain_of(dir: &Path, lower: Image, upper: Image) {
    lower.write(&dir.join("low"));
    upper.write(&dir.join("f"));
}

pub const ROWS: &[Row] = &[
    row("no file, check", |_| {}, CHECK, 4, &["{}/f", "No such file"]),
    row("no file, mount", |_| {}, MOUNT, 21, &["{}/f", "No such file"]),
    row("no file, info", |_| {}, INFO, 4, &["{}/f", "No such file"]),
    row(
        "a folder, check",
        |d| fs::create_dir(d.join("f")).expect("folder"),
        CHECK,
        4,
        &["{}/f", "a folder", "regular file"],
    ),
    row(
        "a folder, mount",
        |d| fs::create_dir(d.join("f")).expect("folder"),
        MOUNT,
        4,
        &["{}/f", "a folder", "regular file"],
    ),
    row("a pipe, check", |d| fifo(&d.join("f")), CHECK, 4, &["{}/f", "regular file"]),
    row("a pipe, mount", |d| fifo(&d.join("f")), MOUNT, 4, &["{}/f", "regular file"]),
    row("a device, check", |_| {}, &["check", "-f", "-r", "/dev/zero"], 4, &["/dev/zero", "a device", "regular file"]),
    row("a device, mount", |_| {}, &["mount", "/dev/zero"], 4, &["/dev/zero", "a device", "regular file"]),
    row("empty, check", |d| of_len(d, 0), CHECK, 6, &["{}/f", "0 bytes", "64"]),
    row("empty, mount", |d| of_len(d, 0), MOUNT, 4, &["{}/f", "0 bytes", "4096"]),
    row("half a header, check", |d| of_len(d, 40), CHECK, 6, &["{}/f", "40 bytes", "64"]),
    row("half a header, info", |d| of_len(d, 40), INFO, 6, &["{}/f", "40 bytes", "64"]),
    row("less than a page, mount", |d| of_len(d, 4095), MOUNT, 4, &["{}/f", "4095 bytes", "4096"]),
    row("less than its table, check", |d| of_len(d, 8192), CHECK, 6, &["{}/f", "8192 bytes", "32768"]),
    row("less than its table, mount", |d| of_len(d, 8192), MOUNT, 11, &["{}/f", "8192 bytes", "32768"]),
    row("cut in its data, check", |d| of_len(d, CLUSTER * 3), CHECK, 11, &["{}/f", "cluster 2", "3"]),
    row("cut in its data, mount", |d| of_len(d, CLUSTER * 3), MOUNT, 11, &["{}/f", "cluster 2", "3"]),
    row("random bytes, check", random, CHECK, 11, &["{}/f", "signature", "WithouFreSpacExt"]),
    row("random bytes, mount", random, MOUNT, 11, &["{}/f", "signature", "WithouFreSpacExt"]),
    row("qcow2, mount", |d| begins_with(d, b"QFI\xfb\0\0\0\x03"), MOUNT, 11, &["{}/f", "qcow2", "qemu-img convert"]),
    row("qcow2, check", |d| begins_with(d, b"QFI\xfb\0\0\0\x03"), CHECK, 11, &["{}/f", "qcow2", "qemu-img convert"]),
    row("LUKS, mount", |d| begins_with(d, b"LUKS\xba\xbe\0\x01"), MOUNT, 11, &["{}/f", "LUKS", "encrypted"]),
    row("signature of neither version", |d| patched(d, 15, b"x"), CHECK, 11, &["{}/f", "'WithouFreSpacExx'"]),
    row("image type 3, check", |d| word(d, 16, 3), CHECK, 11, &["{}/f", "type 3", "must be 2"]),
    row("image type 3, mount", |d| word(d, 16, 3), MOUNT, 11, &["{}/f", "type 3", "must be 2"]),
    row("cluster of 0 sectors", |d| word(d, 28, 0), CHECK, 11, &["{}/f", "offset 28", " 0 "]),
    row("cluster of 96 sectors", |d| word(d, 28, 96), MOUNT, 11, &["{}/f", "offset 28", "96", "power of two"]),
    row("cluster of 2^31 sectors", |d| word(d, 28, 1 << 31), MOUNT, 11, &["{}/f", "offset 28", "2147483648", "131072"]),
    row("size 0", |d| sectors(d, 0), MOUNT, 11, &["{}/f", "size 0", "at least one sector"]),
    row("size that wraps, check", |d| sectors(d, u64::MAX), CHECK, 11, &["{}/f", "18446744073709551615", "at most"]),
    row("size that wraps, mount", |d| sectors(d, u64::MAX), MOUNT, 11, &["{}/f", "18446744073709551615", "at most"]),
    row("size 2^63", |d| sectors(d, 1 << 63), INFO, 11, &["{}/f", "9223372036854775808", "at most"]),
    row("size beyond its table", |d| sectors(d, 1 << 30), MOUNT, 11, &["{}/f", "offset 48", "must be"]),
    row("table of 16 GiB, mount", huge_table, MOUNT, 11, &["{}/f", "131072 bytes", "17179901952"]),
    row("table of 16 GiB, check", huge_table, CHECK, 6, &["{}/f", "131072 bytes", "17179901952"]),
    row("data begins at 0", |d| word(d, 48, 0), MOUNT, 11, &["{}/f", "offset 48", " 0 "]),
    row("data begins within a cluster", |d| word(d, 48, 65), CHECK, 11, &["{}/f", "offset 48", "65", "64 sectors"]),
    row(
        "data begins behind an entry, check",
        |d| word(d, 48, 128),
        CHECK,
        11,
        &["{}/f", "is 1", "begins at cluster 2"],
    ),
    row(
        "data begins behind an entry, mount",
        |d| word(d, 48, 128),
        MOUNT,
        11,
        &["{}/f", "is 1", "begins at cluster 2"],
    ),
    row(
        "number of clusters beside the size",
        |d| word(d, 32, u32::MAX),
        CHECK,
        0,
        &["4294967295", "offset 32", "2000"],
    ),
    row("half converted, mount", |d| word(d, 52, 3), MOUNT, 17, &["{}/f", "conversion", "0x3"]),
    row("half converted and marked, check", half_converted, CHECK, 17, &["{}/f", "conversion"]),
    row("marked in use, mount", |d| word(d, 44, 0x746F_6E59), MOUNT, 37, &["{}/f", "0x746f6e59", "ploop check -d"]),
    row("marked in use, check", |d| word(d, 44, 0x746F_6E59), &["check", "{}/f"], 37, &["{}/f", "in use", "-d"]),
    row("marked with a word of nobody", |d| word(d, 44, 77), MOUNT, 37, &["{}/f", "0x0000004d"]),
    row("entry beyond the file, check", |d| word(d, slot(1), 40), CHECK, 11, &["{}/f", "cluster 1", "40"]),
    row("entry beyond the file, mount", |d| word(d, slot(1), 40), MOUNT, 11, &["{}/f", "cluster 1", "40"]),
    row("entry of all ones, check", |d| word(d, slot(1), u32::MAX), CHECK, 11, &["{}/f", "cluster 1", "4294967295"]),
    row("entry of all ones, mount", |d| word(d, slot(1), u32::MAX), MOUNT, 11, &["{}/f", "cluster 1", "4294967295"]),
    row("two clusters in one place, check", |d| word(d, slot(900), 2), CHECK, 11, &["{}/f", "cluster 900", "2"]),
    row("two clusters in one place, mount", |d| word(d, slot(900), 2), MOUNT, 11, &["{}/f", "cluster 900", "2"]),
    row("entry into the table, check", into_table, CHECK, 11, &["{}/f", "cluster 7", "2"]),
    row("entry into the table, mount", into_table, MOUNT, 11, &["{}/f", "cluster 7", "2"]),
    row("entry behind the disk's end", |d| word(d, slot(2000), 2), CHECK, 11, &["{}/f", "2000"]),
    row("entry within a cluster, check", misaligned, CHECK, 11, &["{}/f", "cluster 1", "129", "64"]),
    row("entry within a cluster, mount", misaligned, MOUNT, 11, &["{}/f", "cluster 1", "129", "64"]),
    row(
        "raw, and it is a ploop image",
        good,
        &["mount", "-f", "raw", "-b", "64", "{}/f"],
        38,
        &["{}/f", "signature", "-f raw"],
    ),
    row("raw without a cluster", |d| of_raw(d, 1000), &["mount", "-f", "raw", "{}/f"], 38, &["-b"]),
    row(
        "chain of two cluster sizes",
        |d| {
            PLAIN.write(&d.join("low"));
            good(d);
            patch(&d.join("f"), 28, &128u32.to_le_bytes());
            patch(&d.join("f"), 48, &128u32.to_le_bytes());
        },
        &["mount", "{}/low", "{}/f"],
        38,
        &["{}/f", "128 sectors", "{}/low", "64"],
    ),
    row(
        "chain of two versions",
        |d| chain_of(d, Image { v1: true, ..PLAIN }, PLAIN),
        &["mount", "{}/low", "{}/f"],
        11,
        &["{}/f", "version 2", "{}/low", "1"],
    ),
    row(
        "chain with a larger image below",
        |d| chain_of(d, Image { clusters: 3000, ..PLAIN }, PLAIN),
        &["mount", "{}/low", "{}/f"],
        38,
        &["{}/f", "128000", "{}/low", "192000"],
    ),
    row("chain of one image twice", good, &["mount", "{}/f", "{}/f"], 38, &["{}/f", "twice"]),
    row("chain of one image under two names", link, &["mount", "{}/f", "{}/other"], 38, &["{}/other", "twice"]),
];

fn fifo(path: &Path) {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).expect("pipe");
}

fn half_converted(dir: &Path) {
    word(dir, 52, 3);
    patch(&dir.join("f"), 44, &0x746F_6E59u32.to_le_bytes());
}

fn into_table(dir: &Path) {
    long_table(dir);
    patch(&dir.join("f"), slot(7), &2u32.to_le_bytes());
}

fn misaligned(dir: &Path) {
    v1(dir);
    patch(&dir.join("f"), slot(1), &129u32.to_le_bytes());
}

fn of_raw(dir: &Path, len: u64) {
    File::create(dir.join("f")).expect("file").set_len(len).expect("length");
}

fn link(dir: &Path) {
    good(dir);
    fs::hard_link(dir.join("f"), dir.join("other")).expect("link");
}

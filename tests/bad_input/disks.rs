//! Descriptors, and what they name.

use std::fs::{self, File};
use std::os::unix::fs::{chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use crate::Row;
use crate::make::{A, B, BS, Delta, Image, NONE, PLAIN, TOP, base, cut, disk, good, patch, text, xml};

const CHECK: &[&str] = &["check", "{}/DiskDescriptor.xml"];
const MOUNT: &[&str] = &["mount", "{}/DiskDescriptor.xml"];
const SEND: &[&str] = &["send", "{}/DiskDescriptor.xml"];
const LIST: &[&str] = &["snapshot-list", "{}/DiskDescriptor.xml"];
const DD: &str = "{}/DiskDescriptor.xml";

const fn row(
    name: &'static str,
    make: fn(&Path),
    args: &'static [&'static str],
    code: i32,
    says: &'static [&'static str],
) -> Row {
    Row { name, make, args, code, says }
}

fn usual(dir: &Path) {
    disk(dir, &[base("f")]);
}

/// The usual descriptor with a part of its text replaced.
fn replaced(dir: &Path, what: &str, with: &str) {
    usual(dir);
    let old = xml(&[base("f")], BS, "Compressed", "");
    assert!(old.contains(what), "{what}");
    text(dir, &old.replacen(what, with, 1));
}

fn dd(dir: &Path) -> std::path::PathBuf {
    dir.join("DiskDescriptor.xml")
}

/// Elements within each other, so many.
fn deep(dir: &Path, depth: usize) {
    let (open, close) = ("<a>".repeat(depth), "</a>".repeat(depth));
    replaced(dir, "<Padding>0</Padding>", &format!("{open}{close}"));
}

fn laughs(dir: &Path) {
    let mut dtd = String::from("<!DOCTYPE x [<!ENTITY a \"haha\">");
    for (entity, of) in ["b", "c", "d", "e"].iter().zip(["a", "b", "c", "d"]) {
        dtd += &format!("<!ENTITY {entity} \"{}\">", format!("&{of};").repeat(100));
    }
    replaced(dir, "<Parallels_disk_image>", &format!("{dtd}]><Parallels_disk_image>"));
}

/// A chain of these shots; all files are the usual image.
fn shots(dir: &Path, of: &[(&str, &str, &str)]) {
    let deltas: Vec<Delta> = of.iter().map(|(guid, parent, file)| Delta { guid, parent, file }).collect();
    disk(dir, &deltas);
}

fn long_chain(dir: &Path) {
    let guid = |i: usize| if i == 199 { TOP.to_owned() } else { format!("{{00000000-1111-4222-8333-{:012x}}}", i + 1) };
    let names: Vec<(String, String, String)> =
        (0..200).map(|i| (guid(i), if i == 0 { NONE.to_owned() } else { guid(i - 1) }, format!("f{i}"))).collect();
    let of: Vec<(&str, &str, &str)> = names.iter().map(|(a, b, c)| (&**a, &**b, &**c)).collect();
    for (i, (_, _, file)) in names.iter().enumerate() {
        // One file is enough: it is refused before any is opened.
        if i == 0 { PLAIN.write(&dir.join(file)) } else { fs::write(dir.join(file), "").expect("file") }
    }
    shots(dir, &of);
}

/// A disk in a folder of its own whose image is `name`, made by `make` in the folder above.
fn below(dir: &Path, name: &str, make: impl Fn(&Path)) {
    let folder = dir.join("disk");
    fs::create_dir(&folder).expect("folder");
    make(dir);
    let file = name.replace("{}", &dir.to_string_lossy());
    fs::write(folder.join("DiskDescriptor.xml"), xml(&[base(&file)], BS, "Compressed", "")).expect("descriptor");
}

/// A stranger's folder and descriptor that name a file of root's.
fn of_a_stranger(dir: &Path) {
    below(dir, "{}/f", good);
    for path in [dir.join("disk"), dir.join("disk/DiskDescriptor.xml")] {
        chown(path, Some(12345), Some(12345)).expect("chown");
    }
}

/// A stranger's descriptor in a folder of root's, as in /tmp.
fn in_a_shared_folder(dir: &Path) {
    below(dir, "{}/f", good);
    chown(dir.join("disk/DiskDescriptor.xml"), Some(12345), Some(12345)).expect("chown");
}

/// Root's descriptor that names a file of a stranger's.
fn of_another(dir: &Path) {
    below(dir, "{}/f", good);
    chown(dir.join("f"), Some(12345), Some(12345)).expect("chown");
}

fn raw_disk(dir: &Path) {
    good(dir);
    text(dir, &xml(&[base("f")], BS, "Plain", ""));
}

fn begins_with(dir: &Path, bytes: &[u8]) {
    usual(dir);
    patch(&dir.join("f"), 0, &[0; 64]);
    patch(&dir.join("f"), 0, bytes);
}

const BELOW: &[&str] = &["mount", "{}/disk/DiskDescriptor.xml"];

pub const ROWS: &[Row] = &[
    row("no descriptor, mount", |_| {}, MOUNT, 39, &[DD, "No such file"]),
    row("no descriptor, send", |_| {}, SEND, 39, &[DD, "No such file"]),
    row("no folder to receive in", usual, &["receive", "--kept", "{}/none/at"], 1, &["none", "No such file"]),
    row("no descriptor, check", |_| {}, CHECK, 39, &[DD, "No such file"]),
    row("descriptor is a folder", |d| fs::create_dir(dd(d)).expect("folder"), MOUNT, 23, &[DD, "not a regular file"]),
    row(
        "descriptor is a pipe",
        |d| nix::unistd::mkfifo(&dd(d), nix::sys::stat::Mode::S_IRWXU).expect("pipe"),
        MOUNT,
        23,
        &[DD, "not a regular file"],
    ),
    row(
        "descriptor is a pipe, list",
        |d| nix::unistd::mkfifo(&dd(d), nix::sys::stat::Mode::S_IRWXU).expect("pipe"),
        LIST,
        1,
        &[DD, "not a regular file"],
    ),
    row(
        "descriptor is a socket",
        |d| drop(UnixListener::bind(dd(d)).expect("socket")),
        CHECK,
        23,
        &[DD, "not a regular file"],
    ),
    row(
        "descriptor is a device",
        |d| symlink("/dev/zero", dd(d)).expect("link"),
        LIST,
        1,
        &["/dev/zero", "not a regular file"],
    ),
    row("descriptor leads nowhere", |d| symlink("nothing", dd(d)).expect("link"), MOUNT, 39, &[DD, "No such file"]),
    row("descriptor leads in a circle", |d| symlink(dd(d), dd(d)).expect("link"), MOUNT, 39, &[DD]),
    row("empty descriptor", |d| text(d, ""), MOUNT, 23, &[DD, "byte 0"]),
    row("no XML", |d| text(d, "disk of mine\n"), MOUNT, 23, &[DD, "XML"]),
    row("an image instead", |d| PLAIN.write(&dd(d)), MOUNT, 23, &[DD, "XML"]),
    row(
        "100 MB",
        |d| {
            usual(d);
            let file = File::options().write(true).open(dd(d)).expect("descriptor");
            file.set_len(100 << 20).expect("length");
        },
        MOUNT,
        23,
        &[DD, "104857600", "16777216"],
    ),
    row(
        "cut off",
        |d| {
            usual(d);
            cut(&dd(d), 700)
        },
        MOUNT,
        23,
        &[DD, "XML"],
    ),
    row(
        "not UTF-8",
        |d| {
            usual(d);
            patch(&dd(d), 100, b"\xff\xfe")
        },
        MOUNT,
        23,
        &[DD, "UTF-8"],
    ),
    row(
        "a document type",
        |d| replaced(d, "<Parallels", "<!DOCTYPE a SYSTEM \"/etc/passwd\"><Parallels"),
        MOUNT,
        23,
        &[DD, "document type"],
    ),
    row("entities of entities", laughs, MOUNT, 23, &[DD, "document type"]),
    row("an entity of nobody", |d| replaced(d, ">f<", ">&xxe;<"), MOUNT, 23, &[DD, "entity 'xxe'"]),
    row("a zero byte in a name", |d| replaced(d, ">f<", ">f&#0;g<"), MOUNT, 23, &[DD]),
    row(
        "a name of 200,000 bytes",
        |d| replaced(d, ">f<", &format!(">{}<", "f".repeat(200_000))),
        MOUNT,
        23,
        &[DD, "200000 bytes", "4096"],
    ),
    row(
        "an element's name of 200,000 bytes",
        |d| replaced(d, "<Padding>", &format!("<{}>", "p".repeat(200_000))),
        MOUNT,
        23,
        &[DD, "XML is broken at byte"],
    ),
    row("elements 1,000 deep", |d| deep(d, 1000), MOUNT, 23, &[DD, "16 levels"]),
    row(
        "200,000 elements",
        |d| replaced(d, "<Padding>0</Padding>", &"<a/>".repeat(200_000)),
        MOUNT,
        23,
        &[DD, "100000 elements"],
    ),
    row(
        "two roots",
        |d| replaced(d, "</Parallels_disk_image>", "</Parallels_disk_image><b/>"),
        MOUNT,
        23,
        &[DD, "second root"],
    ),
    row(
        "encrypted",
        |d| replaced(d, "<Padding>0</Padding>", "<Encryption><KeyId>k</KeyId></Encryption>"),
        MOUNT,
        23,
        &[DD, "Encryption", "not supported"],
    ),
    row(
        "encrypted, check",
        |d| replaced(d, "<Padding>0</Padding>", "<Encryption><KeyId>k</KeyId></Encryption>"),
        CHECK,
        23,
        &[DD, "Encryption", "not supported"],
    ),
    row(
        "a volume",
        |d| replaced(d, "<Storage>", "<Volume><Parent>/</Parent></Volume><Storage>"),
        MOUNT,
        23,
        &[DD, "Volume", "not supported"],
    ),
    row(
        "split",
        |d| replaced(d, "</Storage>", "</Storage><Storage></Storage>"),
        MOUNT,
        23,
        &[DD, "split", "not supported"],
    ),
    row("no parameters", |d| replaced(d, "Disk_Parameters", "Other"), MOUNT, 23, &[DD]),
    row("no images", |d| replaced(d, "<Image>", "<Other>"), MOUNT, 23, &[DD]),
    row("no cluster size", |d| replaced(d, "<Blocksize>64</Blocksize>", ""), MOUNT, 23, &[DD, "Blocksize", "missing"]),
    row(
        "a word for a cluster size",
        |d| replaced(d, "<Blocksize>64<", "<Blocksize>many<"),
        MOUNT,
        23,
        &[DD, "Blocksize", "'many'", "number"],
    ),
    row(
        "cluster size 2^64",
        |d| replaced(d, "<Blocksize>64<", "<Blocksize>18446744073709551616<"),
        MOUNT,
        23,
        &[DD, "Blocksize", "18446744073709551616"],
    ),
    row("cluster size 0", |d| replaced(d, "<Blocksize>64<", "<Blocksize>0<"), MOUNT, 23, &[DD, "Blocksize", "0"]),
    row(
        "another cluster size than the image's",
        |d| replaced(d, "<Blocksize>64<", "<Blocksize>128<"),
        CHECK,
        38,
        &["{}/f", "64 sectors", "128"],
    ),
    row("a GUID that is none", |d| replaced(d, TOP, "{5fbaabe3}"), MOUNT, 23, &[DD, "{5fbaabe3}", "GUID"]),
    row(
        "a top that is none of its shots",
        |d| replaced(d, &format!("<TopGUID>{TOP}"), &format!("<TopGUID>{A}")),
        MOUNT,
        23,
        &[DD, "TopGUID", A],
    ),
    row(
        "a temporary top",
        |d| replaced(d, "</ParentGUID>", "</ParentGUID><Temporary/>"),
        MOUNT,
        23,
        &[DD, "temporary"],
    ),
    row(
        "preallocated and raw",
        |d| {
            raw_disk(d);
            let x = xml(&[base("f")], BS, "Plain", "");
            text(d, &x.replace("<Blocksize>", "<Preallocated>1</Preallocated><Blocksize>"))
        },
        MOUNT,
        23,
        &[DD, "Preallocated", "Plain"],
    ),
    row(
        "preallocated 7",
        |d| replaced(d, "<Blocksize>", "<Preallocated>7</Preallocated><Blocksize>"),
        MOUNT,
        23,
        &[DD, "Preallocated", "'7'", "0 or 1"],
    ),
    row("a name that is empty", |d| replaced(d, ">f<", "><"), MOUNT, 23, &[DD, "File", "empty"]),
    row("a circle of parents", |d| shots(d, &[(A, B, "a"), (B, A, "b"), (TOP, B, "f")]), MOUNT, 39, &["{}", "circle"]),
    row("a circle of parents, check", |d| shots(d, &[(A, B, "a"), (B, A, "b"), (TOP, B, "f")]), CHECK, 39, &["{}"]),
    row("its own parent", |d| shots(d, &[(TOP, TOP, "f")]), MOUNT, 39, &["{}", "circle"]),
    row("a parent of nobody", |d| shots(d, &[(A, NONE, "a"), (TOP, B, "f")]), MOUNT, 39, &["{}", B, "missing"]),
    row(
        "a snapshot twice",
        |d| shots(d, &[(A, NONE, "a"), (A, NONE, "b"), (TOP, A, "f")]),
        MOUNT,
        39,
        &["{}", A, "twice"],
    ),
    row("a file twice", |d| shots(d, &[(A, NONE, "f"), (TOP, A, "f")]), CHECK, 39, &["{}/f", "twice"]),
    row("a file twice, mount", |d| shots(d, &[(A, NONE, "f"), (TOP, A, "f")]), MOUNT, 39, &["{}/f", "twice"]),
    row(
        "two bases",
        |d| shots(d, &[(A, NONE, "a"), (B, NONE, "b"), (TOP, A, "f")]),
        CHECK,
        39,
        &["{}", "2 snapshots", "exactly one"],
    ),
    row("200 images", long_chain, MOUNT, 39, &["{}", "200 images", "127"]),
    row(
        "half merged by another program",
        |d| {
            shots(d, &[(A, NONE, "a"), (TOP, A, "f")]);
            let t = fs::read_to_string(dd(d)).expect("read");
            text(d, &t.replacen("</ParentGUID>", "</ParentGUID><TemporaryZero/>", 1))
        },
        MOUNT,
        39,
        &["{}", A, "TemporaryZero", "must finish it"],
    ),
    row(
        "image is not there",
        |d| {
            usual(d);
            fs::remove_file(d.join("f")).expect("remove")
        },
        MOUNT,
        21,
        &["{}/f", "No such file"],
    ),
    row(
        "image is not there, check",
        |d| {
            usual(d);
            fs::remove_file(d.join("f")).expect("remove")
        },
        CHECK,
        4,
        &["{}/f", "No such file"],
    ),
    row(
        "image is a link",
        |d| {
            PLAIN.write(&d.join("g"));
            symlink("g", d.join("f")).expect("link");
            usual(d)
        },
        MOUNT,
        4,
        &["{}/f", "links are not followed"],
    ),
    row(
        "image behind a link",
        |d| {
            fs::create_dir(d.join("to")).expect("folder");
            symlink("to", d.join("way")).expect("link");
            PLAIN.write(&d.join("to/f"));
            text(d, &xml(&[base("way/f")], BS, "Compressed", ""))
        },
        MOUNT,
        4,
        &["{}/way/f", "links are not followed"],
    ),
    row(
        "image is a folder",
        |d| {
            fs::create_dir(d.join("f")).expect("folder");
            usual(d)
        },
        MOUNT,
        4,
        &["{}/f", "a folder", "regular file"],
    ),
    row(
        "image is a pipe",
        |d| {
            nix::unistd::mkfifo(&d.join("f"), nix::sys::stat::Mode::S_IRWXU).expect("pipe");
            usual(d)
        },
        MOUNT,
        4,
        &["{}/f", "regular file"],
    ),
    row(
        "image is a device",
        |d| text(d, &xml(&[base("/dev/zero")], BS, "Plain", "")),
        MOUNT,
        4,
        &["/dev/zero", "a device", "regular file"],
    ),
    row(
        "image is a device, check",
        |d| text(d, &xml(&[base("/dev/zero")], BS, "Plain", "")),
        CHECK,
        4,
        &["/dev/zero", "regular file"],
    ),
    row("image of root's in a stranger's disk", of_a_stranger, BELOW, 4, &["{}/f", "user 0", "12345"]),
    row(
        "image of root's in a stranger's disk, check",
        of_a_stranger,
        &["check", "{}/disk/DiskDescriptor.xml"],
        4,
        &["{}/f", "user 0", "12345"],
    ),
    row(
        "image of root's in a stranger's disk of a shared folder",
        in_a_shared_folder,
        BELOW,
        23,
        &["{}/f", "12345", "folder"],
    ),
    row("image of a stranger's", of_another, BELOW, 4, &["{}/f", "12345", "user 0"]),
    row(
        "image of a stranger's, by dots",
        |d| {
            below(d, "../f", good);
            chown(d.join("f"), Some(12345), None).expect("chown")
        },
        BELOW,
        4,
        &["/f", "12345"],
    ),
    row(
        "image of the system's",
        |d| text(d, &xml(&[base("/etc/passwd")], BS, "Compressed", "")),
        MOUNT,
        4,
        &["/etc/passwd"],
    ),
    row("a raw disk of a ploop image", raw_disk, MOUNT, 38, &["{}/f", "signature"]),
    row("a disk of a qcow2 image", |d| begins_with(d, b"QFI\xfb\0\0\0\x03"), MOUNT, 11, &["{}/f", "qcow2"]),
    row(
        "a disk of a LUKS container",
        |d| begins_with(d, b"LUKS\xba\xbe\0\x01"),
        MOUNT,
        11,
        &["{}/f", "LUKS", "encrypted"],
    ),
    row(
        "a lower image of another version",
        |d| {
            Image { v1: true, ..PLAIN }.write(&d.join("a"));
            shots(d, &[(A, NONE, "a"), (TOP, A, "f")])
        },
        MOUNT,
        11,
        &["{}/f", "version 2", "{}/a"],
    ),
    row(
        "a lower image that is larger",
        |d| {
            Image { clusters: 3000, ..PLAIN }.write(&d.join("a"));
            shots(d, &[(A, NONE, "a"), (TOP, A, "f")])
        },
        MOUNT,
        38,
        &["{}/f", "{}/a", "must not be larger"],
    ),
    row("a snapshot of nobody", usual, &["mount", "-r", "-u", B, "{}/DiskDescriptor.xml"], 43, &["{}", B, TOP]),
    row("a snapshot of nobody, delete", usual, &["snapshot-delete", "-u", B, "{}/DiskDescriptor.xml"], 43, &["{}", B]),
    row("a snapshot of nobody, switch", usual, &["snapshot-switch", "-u", B, "{}/DiskDescriptor.xml"], 43, &["{}", B]),
    row("a GUID that is none, snapshot", usual, &["snapshot", "-u", "{x}", "{}/DiskDescriptor.xml"], 38, &["{x}"]),
    row("the GUID of nothing, snapshot", usual, &["snapshot", "-u", NONE, "{}/DiskDescriptor.xml"], 38, &[NONE]),
];

//! How every command is called on something bad: `{}` stands for it, `{dir}` for the folder with a sound disk beside it.

/// What a command is given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// An image file.
    Image,
    /// A descriptor.
    Disk,
    /// A device.
    Device,
}

pub struct Form {
    pub what: What,
    /// The first word is the command; `balloon show` is one of two words.
    pub line: &'static str,
    /// The classic has it, and it runs without a driver.
    pub classic: bool,
}

const fn classic(what: What, line: &'static str) -> Form {
    Form { what, line, classic: true }
}

const fn ours(what: What, line: &'static str) -> Form {
    Form { what, line, classic: false }
}

use What::{Device, Disk, Image};

/// `UUID` stands for that of a snapshot that no disk has, `TOP` for the one that each has.
pub fn words(line: &str) -> Vec<String> {
    let word = |w| match w {
        "UUID" => "{11111111-2222-4333-8444-555555555555}",
        "TOP" => "{5fbaabe3-6958-40ff-92a7-860e329aab41}",
        other => other,
    };
    line.split(' ').map(|w| word(w).to_owned()).collect()
}

pub const FORMS: &[Form] = &[
    classic(Image, "init -s 64m -t none {}"),
    ours(Image, "mount -r {}"),
    ours(Image, "mount {}"),
    ours(Disk, "mount {}"),
    ours(Disk, "mount -r {}"),
    ours(Image, "umount {}"),
    ours(Disk, "umount {}"),
    ours(Device, "umount -d {}"),
    ours(Disk, "info {}"),
    classic(Disk, "info -s {}"),
    classic(Disk, "info -d {}"),
    ours(Image, "info --image {}"),
    classic(Image, "check {}"),
    classic(Image, "check -r {}"),
    classic(Image, "check -f -d {}"),
    classic(Disk, "check {}"),
    ours(Disk, "check -r {}"),
    classic(Image, "fsck {}"),
    classic(Disk, "snapshot -u UUID {}"),
    ours(Device, "snapshot -d {} {dir}/new.hds"),
    ours(Disk, "tsnapshot -u UUID -c name {}"),
    classic(Disk, "snapshot-switch -u UUID {}"),
    classic(Disk, "snapshot-delete -u UUID {}"),
    classic(Disk, "snapshot-list {}"),
    classic(Disk, "snapshot-list -H -o uuid {}"),
    classic(Disk, "snapshot-merge {}"),
    classic(Disk, "snapshot-merge -u UUID {}"),
    classic(Image, "merge {} {dir}/sound/root.hds"),
    classic(Image, "merge {dir}/sound/root.hds {}"),
    ours(Device, "merge -d {} -l 0..1"),
    classic(Disk, "replace -u TOP -i {dir}/sound/root.hds {}"),
    classic(Image, "replace -u TOP -i {} {dir}/sound/DiskDescriptor.xml"),
    ours(Device, "replace -d {} -l 0 -i {dir}/sound/root.hds"),
    ours(Disk, "resize -s 128m {}"),
    classic(Disk, "grow -s 128m {}"),
    classic(Image, "grow -s 128m {}"),
    classic(Image, "grow -f raw -s 128m {}"),
    ours(Device, "grow -s 128m -d {}"),
    ours(Disk, "compact {}"),
    ours(Disk, "map {}"),
    ours(Image, "map {}"),
    ours(Disk, "send {}"),
    classic(Disk, "convert -f raw {}"),
    classic(Disk, "convert -v 1 {}"),
    ours(Device, "copy -s {} -d {dir}/copy.hds"),
    // The existing one, and a folder, are no destinations; nothing is read from what is no pipe.
    classic(Image, "copy -d {}"),
    classic(Image, "restore-descriptor {dir} {}"),
    classic(Device, "stop -d {}"),
    classic(Device, "start -d {}"),
    classic(Device, "clear -d {}"),
    classic(Device, "delete -d {} -l 0"),
    classic(Device, "rm -d {} -l 0"),
    classic(Device, "stat -d {}"),
    ours(Device, "stat -c -d {}"),
    ours(Device, "reload {}"),
    ours(Disk, "balloon show {}"),
    ours(Disk, "balloon status {}"),
    ours(Disk, "balloon clear {}"),
    ours(Disk, "balloon change -s 0 {}"),
    ours(Disk, "balloon complete {}"),
    ours(Disk, "balloon check {}"),
    ours(Disk, "balloon repair {}"),
    ours(Disk, "balloon discard {}"),
];

/// Commands that are given no file or device, or a new folder.
pub const WITHOUT_FILES: &[&str] = &["list", "doctor", "tour", "getdev", "completion", "receive"];

/// Commands that change nothing of a sound disk `{}`, or image `{image}`, that is not mounted.
pub const LOOKING: &[&str] = &[
    "info -s {}",
    "info -d {}",
    "info --json {}",
    "info --image {image}",
    "check -r {}",
    "check -r {image}",
    "check -f -r {image}",
    "snapshot-list {}",
    "snapshot-list -o uuid,fname,size,used,date {}",
    "list -a",
    "doctor",
    "doctor {}",
    "map {}",
    "map --json {image}",
    "send {}",
    "getdev",
    "completion bash",
    "completion words check {}",
    "compact --estimate {}",
];

const MALFORMED: &str = "a descriptor that cannot be read is 23; 1.15 says that the disk is not mounted";
const NO_FILE: &str = "what is no regular file is not opened (4); 1.15 opens a folder, and cannot read it (6)";
const CUT: &str =
    "an image that was cut off is damaged (11); 1.15 goes on without what is missing, or fails in the middle";
const HEADER: &str = "what is no ploop image is 11 in every command, as in check; 1.15 says 4 here";
const NO_SNAPSHOT: &str = "a snapshot that the disk does not have is 43 in every command";
const SIGNED: &str = "a ploop image is never taken for a raw one";

/// Where the status is not that of 1.15: the command, what it is given, why.
pub const DIFFERENT: &[(What, &str, &str, &str)] = &[
    (Disk, "info -d {}", "folder", MALFORMED),
    (Disk, "info -d {}", "unreadable", MALFORMED),
    (Disk, "info -d {}", "empty", MALFORMED),
    (Disk, "info -d {}", "random", MALFORMED),
    (Image, "check {}", "folder", NO_FILE),
    (Image, "check -r {}", "folder", NO_FILE),
    (Image, "check -f -d {}", "folder", NO_FILE),
    (Image, "fsck {}", "folder", NO_FILE),
    (Disk, "check {}", "cut", CUT),
    (Disk, "snapshot-switch -u UUID {}", "cut", NO_SNAPSHOT),
    (Disk, "snapshot-merge -u UUID {}", "cut", NO_SNAPSHOT),
    (Image, "merge {} {dir}/sound/root.hds", "cut", CUT),
    (Image, "merge {dir}/sound/root.hds {}", "cut", CUT),
    (Disk, "grow -s 128m {}", "cut", CUT),
    (Image, "grow -s 128m {}", "cut", CUT),
    (Image, "grow -s 128m {}", "random", HEADER),
    (Image, "grow -f raw -s 128m {}", "cut", SIGNED),
    (Disk, "convert -f raw {}", "cut", CUT),
    (Disk, "convert -v 1 {}", "cut", CUT),
    (Image, "restore-descriptor {dir} {}", "random", HEADER),
    (Image, "replace -u TOP -i {} {dir}/sound/DiskDescriptor.xml", "folder", NO_FILE),
];

/// What a command leaves though it fails, and says so: what it is given, why.
pub const LEAVES: &[(What, &str, &str, &str)] = &[(
    Disk,
    "tsnapshot -u UUID -c name {}",
    "cut",
    "the snapshot is taken, and its mount finds that the image was cut off; to remove it the image would be needed",
)];

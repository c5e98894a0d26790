//! Descriptors: whatever is read is answered in good time; what is sound can be stored and reads the same.

use std::path::Path;

use ploop::descriptor::Descriptor;

use crate::Target;
use crate::mutate::Rng;

pub struct Descriptors {
    dir: tempfile::TempDir,
}

impl Descriptors {
    pub fn new() -> Descriptors {
        Descriptors { dir: tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("folder") }
    }
}

const BRANCHED: &[u8] = include_bytes!("../../src/descriptor/testdata/branched.xml");
const BASE: &[u8] = include_bytes!("../../src/descriptor/testdata/base-only.xml");

impl Target for Descriptors {
    const NAME: &'static str = "descriptor";
    const WORDS: usize = 6;

    fn seeds(&self) -> Vec<Vec<u8>> {
        vec![BRANCHED.to_vec(), BASE.to_vec()]
    }

    fn words(&self) -> &'static [&'static [u8]] {
        &[
            b"<!DOCTYPE a [<!ENTITY b \"c\">]>",
            b"<![CDATA[",
            b"]]>",
            b"<!--",
            b"-->",
            b"&#x41;",
            b"&#0;",
            b"&amp;",
            b"&b;",
            b"<Image>",
            b"</Image>",
            b"<Shot>",
            b"</Shot>",
            b"<Temporary/>",
            b"<TemporaryZero/>",
            b"<Encryption/>",
            b"<Volume/>",
            b"<Preallocated>1</Preallocated>",
            b"<TopGUID>",
            b"Plain",
            b"../../../../etc/passwd",
            b"{00000000-0000-0000-0000-000000000000}",
            b"{5fbaabe3-6958-40ff-92a7-860e329aab41}",
            b"18446744073709551616",
            b"-1",
            b"0x",
            b"<?xml version=\"1.0\" encoding=\"UTF-16\"?>",
            b"<a:b xmlns:a=\"c\">",
            b"\xff",
            b"\xef\xbb\xbf",
        ]
    }

    fn run(&mut self, input: &[u8], rng: &mut Rng) -> String {
        let dir = self.dir.path();
        let disk = match Descriptor::parse(input, dir) {
            Ok(disk) => disk,
            Err(e) => return e.to_string(),
        };
        assert!(disk.images.iter().all(|i| i.file.is_absolute() || !dir.is_absolute()), "a path that leads anywhere");
        let _ = disk.first_image();
        for snapshot in &disk.snapshots {
            let _ = disk.chain(&snapshot.guid);
            let _ = disk.has_children(&snapshot.guid);
        }
        let tree = disk.check_tree();
        if tree.is_ok() {
            let chain = disk.chain(&disk.top).expect("a sound tree has a chain");
            assert!(!chain.is_empty() && chain.len() <= 127);
        }
        let file = dir.join("DiskDescriptor.xml");
        // Storing syncs: not every time.
        if rng.below(8) == 0 {
            match disk.commit(&file) {
                Err(e) => return format!("{:?} / not stored: {e}", tree.is_ok()),
                Ok(()) => self.same(&disk, &file),
            }
        }
        match tree {
            Ok(()) => "sound".into(),
            Err(e) => e.to_string(),
        }
    }
}

impl Descriptors {
    fn same(&self, disk: &Descriptor, file: &Path) {
        let mut want = disk.clone();
        want.normalise_top().expect("it has been stored");
        let got = match Descriptor::read(file) {
            Ok(got) => got,
            Err(e) => panic!("stored, and cannot be read: {e}"),
        };
        assert_eq!(got.images, want.images);
        assert_eq!(got.snapshots, want.snapshots);
        assert_eq!((got.top, got.mode, got.blocksize), (want.top, want.mode, want.blocksize));
    }
}

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;

use super::parse::parse_number;
use super::*;
use crate::error::{Error, Kind};
use crate::format::guid::{self, Guid};
use crate::units::ClusterSize;

const BASE_ONLY: &str = include_str!("testdata/base-only.xml");
const BRANCHED: &str = include_str!("testdata/branched.xml");

fn parse(xml: &str) -> crate::Result<Descriptor> {
    Descriptor::parse(xml.as_bytes(), Path::new("/vz/disk"))
}

#[test]
fn examples_come_back_byte_for_byte() {
    for xml in [BASE_ONLY, BRANCHED] {
        let d = parse(xml).unwrap();
        d.check_tree().unwrap();
        assert_eq!(d.to_xml().unwrap(), xml);
    }
}

#[test]
fn a_new_disk_is_the_first_example() {
    let d = Descriptor::new_base(
        Path::new("/vz/disk/web01.hds"),
        20_971_520,
        ClusterSize::from_sectors(2048).unwrap(),
        ImageMode::Expanded,
    )
    .unwrap();
    assert_eq!(d.to_xml().unwrap(), BASE_ONLY);
    assert_eq!(parse(BASE_ONLY).unwrap(), d);
}

#[test]
fn chains_and_children() {
    let d = parse(BRANCHED).unwrap();
    let names = |g: &Guid| -> Vec<String> {
        d.chain(g).unwrap().iter().map(|i| i.file.to_string_lossy().into_owned()).collect()
    };
    assert_eq!(
        names(&guid::TOP),
        [
            "/vz/disk/db.hds",
            "/vz/disk/db.hds.{2b7f6a90-8c14-4e2d-9f61-0102030405c0}",
            "/vol2/fast/db.hds.{e5d4c3b2-a190-4f8e-8d7c-0102030405d0}",
        ]
    );
    let b = Guid::parse("4E19D7C2-30BB-4F08-8C55-B2B2B2B2B2B2").unwrap();
    assert_eq!(names(&b).len(), 2);
    assert!(!d.has_children(&b));
    assert!(d.has_children(&d.images[0].guid));
    assert!(d.snapshot(&d.images[2].guid).unwrap().temporary);
    let unknown = Guid::generate();
    assert_eq!(d.chain(&unknown).unwrap_err().kind(), Kind::NoSnap);
    assert_eq!(d.chain(&guid::NONE).unwrap_err().kind(), Kind::NoSnap);
}

#[test]
fn broken_trees() {
    let with = |change: &dyn Fn(&mut Descriptor)| {
        let mut d = parse(BRANCHED).unwrap();
        change(&mut d);
        let tree = d.check_tree().unwrap_err();
        assert_eq!(tree.kind(), Kind::DiskDescr, "{tree}");
        d.chain(&guid::TOP).map(|c| c.len())
    };
    // A circle, a parent that is not there, a snapshot twice, an image that is not there.
    assert_eq!(with(&|d| d.snapshots[0].parent = d.snapshots[2].guid).unwrap_err().kind(), Kind::DiskDescr);
    assert_eq!(with(&|d| d.snapshots[2].parent = Guid::generate()).unwrap_err().kind(), Kind::DiskDescr);
    assert_eq!(with(&|d| d.snapshots.push(d.snapshots[2].clone())).unwrap_err().kind(), Kind::DiskDescr);
    assert_eq!(with(&|d| d.images.truncate(2)).unwrap_err().kind(), Kind::DiskDescr);
    // Damage elsewhere does not keep the top from being mounted.
    assert!(with(&|d| d.snapshots[1].parent = Guid::generate()).is_ok());
    assert!(with(&|d| d.images[1].file = d.images[0].file.clone()).is_ok());
}

/// The first example with one piece replaced.
fn variant(from: &str, to: &str) -> crate::Result<Descriptor> {
    assert!(BASE_ONLY.contains(from), "{from}");
    parse(&BASE_ONLY.replacen(from, to, 1))
}

fn refused(from: &str, to: &str) -> String {
    let e = variant(from, to).unwrap_err();
    assert_eq!(e.kind(), Kind::DiskDescr, "{e}");
    e.to_string()
}

#[test]
fn tolerated_variants() {
    let same = |from: &str, to: &str| assert_eq!(variant(from, to).unwrap(), parse(BASE_ONLY).unwrap(), "{to}");
    same("<Blocksize>2048<", "<Blocksize>0x800<");
    same("<Blocksize>2048<", "<Blocksize>04000<");
    same("<Blocksize>2048<", "<Blocksize>  2048\n<");
    same("<Blocksize>2048<", "<Blocksize><![CDATA[2048]]><");
    same("<Blocksize>2048<", "<Blocksize>20<!-- a comment -->48<");
    same("<Parallels_disk_image>", "<Parallels_disk_image Version=\"1.0\" xmlns=\"urn:x\">");
    same("<Start>0</Start>", "<Start>0</Start><Unknown><Deep/></Unknown>");
    same("<Start>0</Start>", "");
    same("<End>20971520</End>", "<End>oops</End>");
    same("<Padding>0</Padding>", "<Preallocated>7</Preallocated>");
    same("<Cylinders>40960</Cylinders>", "");
    same("<Cylinders>40960</Cylinders>", "<Cylinders>0</Cylinders>");
    same("<File>web01.hds<", "<File>/vz/disk/web01.hds<");
    same("<File>web01.hds<", "<File>\n  web01.hds\n<");
    same("<File>web01.hds<", "<File>web&#x30;1.h&#100;s<");
    same("<TopGUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</TopGUID>", "");
    same("<GUID>{5fbaabe3", "<GUID>{5FBAABE3");
    same("<Type>Compressed<", "<Type>Whatever<");
    same("<Blocksize>2048</Blocksize>", "<Blocksize>2048</Blocksize><Preallocated>0</Preallocated>");
    // Without snapshots at all: descriptors older than them.
    let shot = BASE_ONLY.find("<Shot>").unwrap()..BASE_ONLY.find("</Shot>").unwrap() + 7;
    same(&BASE_ONLY[shot.clone()], "");
    let top = BASE_ONLY.find("<TopGUID>").unwrap();
    same(&BASE_ONLY[top..shot.end], "");
    // A bad or missing size is no error.
    assert_eq!(variant("<Disk_size>20971520<", "<Disk_size>20971520x<").unwrap().size_sectors, 0);
    assert_eq!(variant("<Disk_size>20971520</Disk_size>", "").unwrap().size_sectors, 0);
    let limited = "<Disk_size>20971520</Disk_size>\n    <Max_delta_size>4096</Max_delta_size>";
    let d = variant("<Disk_size>20971520</Disk_size>", limited).unwrap();
    assert_eq!(d.max_delta_size, 4096);
    assert!(d.to_xml().unwrap().contains(limited));
    // The newer line's root stays.
    let xml = BASE_ONLY.replace("Parallels_disk_image", "Virtuozzo_disk_image");
    assert_eq!(parse(&xml).unwrap().to_xml().unwrap(), xml);
    // A byte order mark and a declared encoding.
    let marked = format!("\u{feff}{}", BASE_ONLY.replace("\"1.0\"?", "\"1.0\" encoding=\"utf-8\"?"));
    assert_eq!(parse(&marked).unwrap(), parse(BASE_ONLY).unwrap());
}

#[test]
fn modes() {
    let d = variant("<Blocksize>2048</Blocksize>", "<Blocksize>2048</Blocksize>\n      <Preallocated>1</Preallocated>");
    let d = d.unwrap();
    assert_eq!(d.mode, ImageMode::Preallocated);
    assert!(d.to_xml().unwrap().contains("<Blocksize>2048</Blocksize>\n      <Preallocated>1</Preallocated>\n"));
    let d = variant("<Type>Compressed<", "<Type>Plain<").unwrap();
    assert_eq!(d.mode, ImageMode::Raw);
    assert!(d.is_raw(&d.images[0]));
    assert!(d.to_xml().unwrap().contains("<Type>Plain</Type>"));
    // One plain image makes the disk raw, and only its base.
    let d = parse(&BRANCHED.replacen("Compressed", "Plain", 1)).unwrap();
    assert_eq!(d.images.iter().filter(|i| d.is_raw(i)).count(), 1);
    assert_eq!(d.to_xml().unwrap().matches("<Type>Plain</Type>").count(), 4);
}

/// As Parallels Desktop writes it into each bundle.
#[test]
fn an_encryption_element_without_engine_and_data_means_none() {
    let with = |element: &str| parse(&BASE_ONLY.replace("<Padding>0</Padding>", element));
    let null = "<Engine>{00000000-0000-0000-0000-000000000000}</Engine>";
    for inside in ["", null, "<Data/>", &format!("\n{null}\n<Data>\n</Data>\n"), "<KeyId></KeyId>", "<Engine/>"] {
        let disk = with(&format!("<Encryption>{inside}</Encryption>")).unwrap_or_else(|e| panic!("{inside}: {e}"));
        assert!(!disk.to_xml().unwrap().contains("Encryption"));
    }
    let engine = "<Engine>{00000000-0000-0000-0000-000000000001}</Engine>";
    for inside in [engine, &format!("{null}<Data>AAAA</Data>"), "<Engine>AES</Engine>", "<Data><K/></Data>", "k"] {
        let error = with(&format!("<Encryption>{inside}</Encryption>")).unwrap_err().to_string();
        assert!(error.contains("element Encryption"), "{inside}: {error}");
    }
}

#[test]
fn no_lock_file_is_made_beside_what_is_no_descriptor() {
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in [("root.hds", "WithoutFreeSpace"), ("notes.txt", "hello"), ("other.xml", "<a/>")] {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        assert_eq!(LockedDescriptor::open(&path).unwrap_err().kind(), Kind::Lock);
        assert!(!lock_path(&path).exists(), "{name}");
    }
}

#[test]
fn refused_variants() {
    refused("<Blocksize>2048</Blocksize>", "");
    refused("<Blocksize>2048<", "<Blocksize>2047<");
    refused("<Blocksize>2048<", "<Blocksize>2048k<");
    refused("<Blocksize>2048<", "<Blocksize>-2048<");
    refused("<Blocksize>2048<", "<Blocksize><");
    refused("<Blocksize>2048</Blocksize>", "<Blocksize>2048</Blocksize><Preallocated>2</Preallocated>");
    refused("<Type>Compressed<", "<Type>Plain</Type></Image><X/><Image><Type>Plain<");
    refused("<File>web01.hds</File>", "");
    refused("<File>web01.hds<", "<File><");
    refused("<File>web01.hds</File>", "<File/>");
    refused("<GUID>{5fbaabe3", "<GUID>{5fbaabez");
    refused("<TopGUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}", "<TopGUID>");
    refused("<TopGUID>{5fbaabe3", "<TopGUID>{6fbaabe3");
    refused("</ParentGUID>", "</ParentGUID><Temporary/>");
    // Unknown elements are tolerated before the first image, not behind it.
    refused("</Image>", "</Image><Comment/>");
    refused("</Shot>", "</Shot><Comment/>");
    assert!(refused("</Storage>", "</Storage><Storage/>").contains("split"));
    assert!(refused("<Padding>0</Padding>", "<Encryption><KeyId>k</KeyId></Encryption>").contains("Encryption"));
    assert!(refused("<StorageData>", "<StorageData><Volume/>").contains("Volume"));
    let both = "<Type>Plain</Type>";
    let e = parse(
        &BASE_ONLY
            .replace("<Type>Compressed</Type>", both)
            .replace("<Blocksize>", "<Preallocated>1</Preallocated><Blocksize>"),
    );
    assert_eq!(e.unwrap_err().kind(), Kind::DiskDescr);
    for element in ["Disk_Parameters", "StorageData", "Storage", "Image", "Snapshots"] {
        let xml = BASE_ONLY.replace(&format!("<{element}>"), "<Else>").replace(&format!("</{element}>"), "</Else>");
        assert_eq!(parse(&xml).unwrap_err().kind(), Kind::DiskDescr, "{element}");
    }
}

#[test]
fn hostile_xml() {
    let bombs = [
        "",
        "<",
        "<a>",
        "</a>",
        "<a></b>",
        "<a/><b/>",
        "text",
        "<a/>text",
        "<!DOCTYPE a [<!ENTITY x \"y\">]><a>&x;</a>",
        "<!DOCTYPE a SYSTEM \"file:///etc/passwd\"><a/>",
        "<a>&xxe;</a>",
        "<a>&#0;</a>",
        "<a>&#xD800;</a>",
        "<a>&#99999999999;</a>",
    ];
    for xml in bombs {
        assert_eq!(parse(xml).unwrap_err().kind(), Kind::DiskDescr, "{xml}");
    }
    assert!(parse(&"<a>".repeat(100_000)).is_err());
    assert!(parse(&format!("<a>{}</a>", "<b/>".repeat(200_000))).is_err());
    assert!(Descriptor::parse(b"<a>\xff\xfe</a>", Path::new("/")).is_err());
}

#[test]
fn reverse_merge_is_recognised() {
    let xml = BRANCHED.replace("<Temporary/>", "<Temporary/><TemporaryZero/>");
    let d = parse(&xml).unwrap();
    assert_eq!(d.snapshots[2].reverse_merge, Some(ReverseMerge::Zeroing));
    assert!(d.chain(&guid::TOP).unwrap_err().to_string().contains("TemporaryZero"));
    let b = d.images[1].guid;
    assert_eq!(d.chain(&b).unwrap().len(), 2);
    let dir = tempfile::tempdir().unwrap();
    let e = d.commit(&dir.path().join("d.xml")).unwrap_err();
    assert_eq!(e.kind(), Kind::DiskDescr);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    // Only the text of the element is ours: other programs look whether it is there.
    let mut spoiled = parse(BRANCHED).unwrap();
    let temporary = spoiled.snapshots.iter().find(|s| s.temporary).unwrap().guid;
    assert!(spoiled.half_merged(&temporary).is_none());
    spoiled.mark_spoiled(&[temporary]);
    let xml = spoiled.to_xml().unwrap();
    assert_eq!(xml, BRANCHED.replace("<Temporary/>", "<Temporary>merging</Temporary>"));
    assert_eq!(parse(&xml).unwrap(), spoiled);
    assert!(spoiled.half_merged(&temporary).unwrap().contains("ploop snapshot-merge -u"));
    spoiled.mark_temporary(&[temporary], false);
    assert!(!spoiled.snapshot(&temporary).unwrap().spoiled);
    let swapped = parse(&BRANCHED.replace("<Temporary/>", "<TemporaryZeroSwap/>")).unwrap();
    assert_eq!(swapped.snapshots[2].reverse_merge, Some(ReverseMerge::Swapped));
    assert!(swapped.to_xml().unwrap().contains("      <TemporaryZeroSwap/>\n"));
}

#[test]
fn an_old_top_gets_the_constant_when_stored() {
    let old = "{11111111-2222-4333-8444-555555555555}";
    let xml = BRANCHED.replace("{5fbaabe3-6958-40ff-92a7-860e329aab41}", old);
    let d = parse(&xml).unwrap();
    assert_eq!(d.top, Guid::parse(old).unwrap());
    assert_eq!(d.chain(&d.top).unwrap().len(), 3);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.xml");
    d.commit(&path).unwrap();
    let stored = Descriptor::read(&path).unwrap();
    assert_eq!(stored.top, guid::TOP);
    assert!(stored.image(&Guid::parse(old).unwrap()).is_none());
    // The constant is another snapshot's: not to be stored.
    let clash = BRANCHED.replace("{5fbaabe3-6958-40ff-92a7-860e329aab41}", old);
    let clash = clash.replace("{4e19d7c2-30bb-4f08-8c55-b2b2b2b2b2b2}", guid::TOP.as_str());
    assert_eq!(parse(&clash).unwrap().commit(&path).unwrap_err().kind(), Kind::DiskDescr);
}

#[test]
fn names_are_escaped_and_come_back() {
    let mut d = parse(BASE_ONLY).unwrap();
    for (name, text) in [
        ("/vz/disk/\u{e9} <&>.hds", "<File>&#xE9; &lt;&amp;&gt;.hds</File>"),
        ("/vz/disk/ blank ", "<File> blank </File>"),
        ("/vz/disk/a/b.hds", "<File>a/b.hds</File>"),
        ("/vz/disk2/b.hds", "<File>/vz/disk2/b.hds</File>"),
        ("/vz/disk/\u{1F600}", "<File>&#x1F600;</File>"),
        ("/vz/disk/a\"b'c", "<File>a\"b'c</File>"),
    ] {
        d.images[0].file = PathBuf::from(name);
        let xml = d.to_xml().unwrap();
        assert!(xml.contains(text), "{xml}");
        assert_eq!(parse(&xml).unwrap().images, d.images);
    }
    for bad in ["/vz/disk/a\nb", "/vz/disk/a\u{1}b"] {
        d.images[0].file = PathBuf::from(bad);
        assert_eq!(d.to_xml().unwrap_err().kind(), Kind::Param);
    }
    // In the root folder.
    let mut root = Descriptor::parse(BASE_ONLY.as_bytes(), Path::new("/")).unwrap();
    assert_eq!(root.images[0].file, Path::new("/web01.hds"));
    assert!(root.to_xml().unwrap().contains("<File>web01.hds<"));
    root.dir = crate::sys::folder::Folder::new("/x");
    assert!(root.to_xml().unwrap().contains("<File>/web01.hds<"));
}

#[test]
fn numbers_as_in_c() {
    for (text, n) in [
        ("0", Some(0)),
        ("10", Some(10)),
        ("010", Some(8)),
        ("0x10", Some(16)),
        ("0XfF", Some(255)),
        (" \t7", Some(7)),
        ("+7", Some(7)),
        ("18446744073709551615", Some(u64::MAX)),
        ("18446744073709551616", None),
        ("08", None),
        ("", None),
        ("-1", None),
        ("+-1", None),
        ("0x", None),
        ("0x+1", None),
        ("0+1", None),
        ("7k", None),
        ("7 7", None),
    ] {
        assert_eq!(parse_number(text), n, "{text}");
    }
}

#[test]
fn storing_replaces_leftovers_and_keeps_owner_and_mode() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("DiskDescriptor.xml");
    let d = parse(BRANCHED).unwrap();
    d.commit_new(&path).unwrap();
    assert_eq!(d.commit_new(&path).unwrap_err().kind(), Kind::Param);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    // Left by an interrupted store, or put there by another user: neither is written through.
    let victim = dir.path().join("victim");
    std::fs::write(&victim, "precious").unwrap();
    std::os::unix::fs::symlink(&victim, dir.path().join("DiskDescriptor.xml.tmp")).unwrap();
    d.commit(&path).unwrap();
    assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious");
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    let read = Descriptor::read(&path).unwrap();
    assert_eq!(read.snapshots, d.snapshots);
    assert_eq!(read.dir.path(), dir.path().canonicalize().unwrap());
}

#[test]
fn locks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("DiskDescriptor.xml");
    parse(BASE_ONLY).unwrap().commit(&path).unwrap();
    let patience = Duration::from_millis(80);
    let first = LockedDescriptor::open(&path).unwrap();
    assert_eq!(std::fs::metadata(lock_path(&path)).unwrap().mode() & 0o777, 0o600);
    // Not recursive; the link leads to the same lock.
    let link = dir.path().join("link.xml");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let e = LockedDescriptor::open_within(&link, patience).unwrap_err();
    assert_eq!(e.kind(), Kind::Lock);
    assert!(e.to_string().contains(".lck"), "{e}");
    drop(first);
    let mut second = LockedDescriptor::open_within(&link, patience).unwrap();
    second.descriptor.size_sectors = 77;
    second.commit().unwrap();
    drop(second);
    assert_eq!(LockedDescriptor::open(&path).unwrap().descriptor.size_sectors, 77);
    assert!(lock_path(&path).exists());
    // What cannot be read is the lock's error too; what cannot be found is not.
    std::fs::write(&path, "<oops>").unwrap();
    assert_eq!(LockedDescriptor::open(&path).unwrap_err().kind(), Kind::Lock);
    assert_eq!(LockedDescriptor::open(&dir.path().join("none.xml")).unwrap_err().kind(), Kind::DiskDescr);
    assert_eq!(Descriptor::read(dir.path()).unwrap_err().kind(), Kind::DiskDescr);
}

/// A process with a record lock on one byte until it exits.
fn locking_process(file: &Path, byte: i64) -> Option<std::process::Child> {
    use std::io::Read;
    let program = r#"use Fcntl; $| = 1; open(F, "+<", $ARGV[0]) or die;
        fcntl(F, F_SETLK, pack("s s x4 q q i x4", F_WRLCK, 0, $ARGV[1], 1, 0)) or die; print "ok"; sleep 60"#;
    let mut child = std::process::Command::new("perl")
        .args(["-e", program])
        .arg(file)
        .arg(byte.to_string())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .ok()?;
    let mut said = [0; 2];
    child.stdout.as_mut()?.read_exact(&mut said).ok()?;
    Some(child)
}

#[test]
fn locks_of_other_programs_on_the_base() {
    use nix::fcntl::{FcntlArg, fcntl};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("DiskDescriptor.xml");
    parse(BASE_ONLY).unwrap().commit(&path).unwrap();
    let image = dir.path().join("web01.hds");
    let base = std::fs::File::create(&image).unwrap();
    let open = || LockedDescriptor::open_within(&path, Duration::from_millis(50)).map(|_| ());
    for (byte, wanted) in [(202, false), (300, false), (304, false), (199, true), (205, true), (299, true), (305, true)]
    {
        let Some(mut child) = locking_process(&image, byte) else {
            crate::testing::skip::skip("needs perl for a process that holds a record lock");
            return;
        };
        let got = open();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(got.as_ref().map_err(Error::kind).err(), (!wanted).then_some(Kind::Lock), "byte {byte}: {got:?}");
    }
    // Workers and qemu hold open file description locks; these are no operation under way.
    for byte in [101, 103, 201, 203] {
        let (l_type, l_whence) = (libc::F_WRLCK as i16, libc::SEEK_SET as i16);
        let range = libc::flock { l_type, l_whence, l_start: byte, l_len: 1, l_pid: 0 };
        fcntl(&base, FcntlArg::F_OFD_SETLK(&range)).unwrap();
    }
    open().unwrap();
}

#[test]
fn a_pipe_does_not_hang() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("DiskDescriptor.xml");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(Descriptor::read(&path).unwrap_err().kind(), Kind::DiskDescr);
}

proptest! {
    #[test]
    fn any_bytes_parse_or_fail(b in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = Descriptor::parse(&b, Path::new("/d"));
    }

    #[test]
    fn damaged_files_parse_or_fail(at in 0usize..1500, with in any::<u8>(), cut in 0usize..3000) {
        let mut b = BRANCHED.as_bytes().to_vec();
        let n = b.len();
        b[at % n] = with;
        b.truncate(cut.min(n));
        if let Ok(d) = Descriptor::parse(&b, Path::new("/d")) {
            let _ = d.check_tree();
            if let Ok(xml) = d.to_xml() {
                let again = Descriptor::parse(xml.as_bytes(), Path::new("/d")).unwrap();
                prop_assert_eq!(again.images, d.images);
                prop_assert_eq!(again.snapshots, d.snapshots);
            }
        }
    }

    #[test]
    fn names_come_back(name in "[^\u{0}-\u{1f}\u{fffe}\u{ffff}/][^\u{0}-\u{1f}\u{fffe}\u{ffff}]{0,30}") {
        let mut d = parse(BASE_ONLY).unwrap();
        d.images[0].file = Path::new("/vz/disk").join(&name);
        let again = parse(&d.to_xml().unwrap()).unwrap();
        prop_assert_eq!(again.images, d.images);
    }
}

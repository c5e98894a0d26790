//! Conversions: what they make, what they refuse, what a crash at each step leaves, and what the classic's crashes left.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::check::check_disk;
use super::convert::{change_version, convert_disk};
use super::crash_tests::{base, chain, crashes, crashes_without, full, take, told};
use super::testkit::{content, files, g, put};
use crate::descriptor::{Descriptor, ImageMode, LockedDescriptor};
use crate::error::{Kind, Result};
use crate::format::guid;
use crate::format::header::{self, Header, Version};
use crate::image::breach;
use crate::image::check::read_header;
use crate::sys::store::record::Thing;

fn versions(dd: &Path) -> Vec<u32> {
    let disk = Descriptor::read(dd).unwrap();
    disk.images.iter().map(|i| read_header(&i.file, None).unwrap().version.number()).collect()
}

fn all(dd: &Path) -> Vec<std::collections::BTreeMap<u32, u8>> {
    let disk = Descriptor::read(dd).unwrap();
    disk.snapshots.iter().map(|s| content(dd, &s.guid)).collect()
}

#[test]
fn versions_of_all_images_change_and_the_content_stays() {
    let (_dir, dd) = chain(Version::V2, ImageMode::Expanded);
    let before = all(&dd);
    let bytes = |dd: &Path| -> Vec<Vec<u8>> {
        Descriptor::read(dd).unwrap().images.iter().map(|i| fs::read(&i.file).unwrap()).collect()
    };
    let old = bytes(&dd);
    for to in [Version::V1, Version::V1, Version::V2] {
        change_version(&dd, to).unwrap();
        assert_eq!(versions(&dd), [to.number(); 4]);
        assert_eq!(all(&dd), before);
        assert_eq!(files(&dd).len(), 4, "{:?}", files(&dd));
        check_disk(&dd, None).unwrap();
    }
    assert!(bytes(&dd) == old, "there and back: every byte is as it was");
}

#[test]
fn formats_change_and_the_content_stays() {
    for version in [Version::V1, Version::V2] {
        let (_dir, dd) = chain(version, ImageMode::Expanded);
        let before = all(&dd);
        for mode in [ImageMode::Preallocated, ImageMode::Expanded, ImageMode::Preallocated, ImageMode::Raw] {
            convert_disk(&dd, mode).unwrap();
            let disk = Descriptor::read(&dd).unwrap();
            assert_eq!((disk.mode, all(&dd)), (mode, before.clone()));
            assert_eq!(files(&dd).len(), 4, "{:?}", files(&dd));
            let base = &disk.chain(&guid::TOP).unwrap()[0].file;
            assert!(base.ends_with("root.hdd"), "{}", base.display());
            let clusters = if mode == ImageMode::Raw { 12 } else { 13 };
            assert_eq!(base.metadata().unwrap().len(), clusters * 32768);
            check_disk(&dd, None).unwrap();
        }
        for mode in [ImageMode::Raw, ImageMode::Expanded, ImageMode::Preallocated] {
            assert_eq!(convert_disk(&dd, mode).unwrap_err().kind(), Kind::Param);
        }
        assert_eq!(change_version(&dd, Version::V1).unwrap_err().kind(), Kind::Param);
        assert_eq!(all(&dd), before);
    }
}

#[test]
fn preallocation_reuses_free_clusters_and_shows_none_of_their_old_data() {
    let (_dir, dd) = base(Version::V2, ImageMode::Expanded);
    for cluster in [1, 5, 7] {
        put(&dd, &guid::TOP, cluster, cluster as u8);
    }
    let image = dd.with_file_name("root.hdd");
    let file = File::options().read(true).write(true).open(&image).unwrap();
    // Cluster 5 is forgotten; its data lie in the middle of the file, and a piece of a cluster at the end.
    file.write_all_at(&[0; 4], 64 + 4 * 5).unwrap();
    let len = file.metadata().unwrap().len();
    file.write_all_at(&[0xee; 1000], len).unwrap();
    convert_disk(&dd, ImageMode::Preallocated).unwrap();
    assert_eq!(content(&dd, &guid::TOP), super::testkit::map(&[(1, 1), (7, 7)]));
    assert_eq!(file.metadata().unwrap().len(), 13 * 32768);
    assert_eq!(read_header(&image, None).unwrap().flags, 0);
}

#[test]
fn what_version_1_cannot_express_is_refused_before_anything_is_written() {
    let (_dir, dd) = base(Version::V2, ImageMode::Expanded);
    put(&dd, &guid::TOP, 1, 1);
    let image = dd.with_file_name("root.hdd");
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let before = fs::read(&image).unwrap();
    let header = Header::parse(&before).unwrap();
    file.write_all_at(&Header { sectors: 1 << 32, ..header }.encode(), 0).unwrap();
    file.set_len(3 << 30).unwrap();
    let e = change_version(&dd, Version::V1).unwrap_err();
    assert!(matches!(e.kind(), Kind::Param | Kind::Format), "{e}");
    file.set_len(before.len() as u64).unwrap();
    file.write_all_at(&before, 0).unwrap();
    assert_eq!(versions(&dd), [2]);
    // Damaged: nothing is written either.
    file.write_all_at(&77u32.to_le_bytes(), 64 + 4 * 3).unwrap();
    let damaged = fs::read(&image).unwrap();
    assert_eq!(change_version(&dd, Version::V1).unwrap_err().kind(), Kind::Format);
    assert_eq!(convert_disk(&dd, ImageMode::Raw).unwrap_err().kind(), Kind::Format);
    assert_eq!(convert_disk(&dd, ImageMode::Preallocated).unwrap_err().kind(), Kind::Format);
    assert!(fs::read(&image).unwrap() == damaged);
    assert_eq!(files(&dd), ["root.hdd"]);
}

type Act<'a> = &'a dyn Fn(&Path) -> Result<()>;

fn to(version: Version) -> impl Fn(&Path) -> Result<()> {
    move |dd| change_version(dd, version)
}

/// Once more from raw is refused: the disk is as it is to be.
fn raw(dd: &Path) -> Result<()> {
    match Descriptor::read(dd)?.mode {
        ImageMode::Raw => Ok(()),
        _ => convert_disk(dd, ImageMode::Raw),
    }
}

fn preallocated(dd: &Path) -> Result<()> {
    convert_disk(dd, ImageMode::Preallocated)
}

/// Two images, of which the base has unused space.
fn short() -> (tempfile::TempDir, std::path::PathBuf) {
    let (dir, dd) = base(Version::V2, ImageMode::Expanded);
    for cluster in [1, 5, 7] {
        put(&dd, &guid::TOP, cluster, cluster as u8);
    }
    let file = File::options().write(true).open(dd.with_file_name("root.hdd")).unwrap();
    file.write_all_at(&[0; 4], 64 + 4 * 5).unwrap();
    take(&dd, 1).unwrap();
    put(&dd, &guid::TOP, 1, 9);
    (dir, dd)
}

#[test]
fn crashes_of_conversions() {
    let (dir, dd) = short();
    told("raw", crashes("raw", dir.path(), &raw));
    told("preallocated", crashes("preallocated", dir.path(), &preallocated));
    told("version 1", crashes("version 1", dir.path(), &to(Version::V1)));
    change_version(&dd, Version::V1).unwrap();
    told("version 2", crashes("version 2", dir.path(), &to(Version::V2)));
    if full() {
        let (dir, _dd) = chain(Version::V2, ImageMode::Expanded);
        told("version 1, four images", crashes("version 1", dir.path(), &to(Version::V1)));
    }
}

#[test]
fn crash_tests_find_wrong_orders_and_missing_syncs_of_conversions() {
    let (dir, _dd) = short();
    let faults: [(&str, &str, Act); 4] = [
        ("entries before clusters", "preallocated", &preallocated),
        ("old image removed before the commit", "raw", &raw),
        ("backup after the flag", "version 1", &to(Version::V1)),
        ("backups removed before the flags", "version 1", &to(Version::V1)),
    ];
    for (fault, name, act) in faults {
        breach::set(Some(fault));
        let tried = || crashes_without(None, name, dir.path(), act);
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(tried));
        breach::set(None);
        assert!(found.is_err(), "{fault}: no crash finds it");
    }
    for (thing, name, act) in [
        (Thing::Name, "version 1", &to(Version::V1) as Act),
        (Thing::Data, "version 1", &to(Version::V1)),
        (Thing::Data, "raw", &raw),
    ] {
        let tried = || crashes_without(Some(thing), name, dir.path(), act);
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(tried));
        assert!(found.is_err(), "{name}: {thing:?} is never synced, and no crash loses anything");
    }
}

/// Header fields of an image file, changed.
fn change(path: &Path, act: impl Fn(Header) -> Header) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let header = read_header(path, None).unwrap();
    file.write_all_at(&act(header).encode(), 0).unwrap();
}

fn flagged(h: Header) -> Header {
    Header { in_use: header::IN_USE, flags: h.flags | header::FLAG_CONVERT, ..h }
}

/// Opens the disk as a mount does.
fn open_again(dd: &Path) {
    let mut disk = LockedDescriptor::open(dd).unwrap();
    let top = disk.top;
    super::recovery::before_mount(&mut disk, &top, false).unwrap();
}

#[test]
fn versions_that_the_classic_left_half_changed_are_mended() {
    // (Flagged before the rewriting; rewritten but flagged; base cleared first, which no mount of 1.15 mends.)
    for case in ["none rewritten", "some rewritten", "base cleared first"] {
        let (_dir, dd) = chain(Version::V2, ImageMode::Expanded);
        let before = all(&dd);
        let images: Vec<_> = Descriptor::read(&dd).unwrap().images.iter().map(|i| i.file.clone()).collect();
        let backup = |p: &Path| {
            let mut name = p.as_os_str().to_owned();
            name.push(".idx");
            std::path::PathBuf::from(name)
        };
        for image in &images {
            let bytes = fs::read(image).unwrap();
            fs::write(backup(image), &bytes[..32768]).unwrap();
        }
        let v1: Vec<Vec<u8>> = {
            let (other, dd) = chain(Version::V2, ImageMode::Expanded);
            change_version(&dd, Version::V1).unwrap();
            let images = Descriptor::read(&dd).unwrap().images;
            let heads = images.iter().map(|i| fs::read(&i.file).unwrap()[..32768].to_vec()).collect();
            drop(other);
            heads
        };
        let rewritten = match case {
            "none rewritten" => 0,
            "some rewritten" => 2,
            _ => 4,
        };
        for (image, head) in images.iter().zip(&v1).take(rewritten) {
            File::options().write(true).open(image).unwrap().write_all_at(head, 0).unwrap();
        }
        for (n, image) in images.iter().enumerate() {
            if case != "base cleared first" || n > 0 {
                change(image, flagged);
            }
        }
        open_again(&dd);
        let want = if case == "base cleared first" { 1 } else { 2 };
        assert_eq!(versions(&dd), [want; 4], "{case}");
        assert_eq!(all(&dd), before, "{case}");
        assert_eq!(files(&dd).len(), 4, "{case}: {:?}", files(&dd));
        check_disk(&dd, None).unwrap();
    }
}

#[test]
fn a_flagged_image_without_its_copy_is_refused_and_stays() {
    let (_dir, dd) = chain(Version::V2, ImageMode::Expanded);
    let image = dd.with_file_name("root.hdd");
    change(&image, flagged);
    let before = fs::read(&image).unwrap();
    let mut disk = LockedDescriptor::open(&dd).unwrap();
    let e = super::recovery::before_change(&mut disk).unwrap_err();
    assert!(e.kind() == Kind::Busy && e.to_string().contains(".idx"), "{e}");
    drop(disk);
    assert_eq!(check_disk(&dd, Some(&g(3))).unwrap_err().kind(), Kind::Busy);
    assert!(fs::read(&image).unwrap() == before);
}

#[test]
fn raw_conversions_that_the_classic_left_are_finished_or_forgotten() {
    for renamed in [false, true] {
        let (_dir, dd) = chain(Version::V2, ImageMode::Expanded);
        let before = all(&dd);
        let old = fs::read(dd.with_file_name("root.hdd")).unwrap();
        let stored = fs::read(&dd).unwrap();
        convert_disk(&dd, ImageMode::Raw).unwrap();
        // As between its two renames; or before the first, with half of the copy.
        fs::rename(&dd, dd.with_extension("xml.tmp")).unwrap();
        fs::write(&dd, stored).unwrap();
        if !renamed {
            fs::rename(dd.with_file_name("root.hdd"), dd.with_file_name("root.hdd.tmp")).unwrap();
            fs::write(dd.with_file_name("root.hdd"), old).unwrap();
        }
        open_again(&dd);
        assert_eq!(all(&dd), before);
        let mode = if renamed { ImageMode::Raw } else { ImageMode::Expanded };
        assert_eq!(Descriptor::read(&dd).unwrap().mode, mode);
        assert_eq!(files(&dd).len(), 4, "{:?}", files(&dd));
        check_disk(&dd, None).unwrap();
    }
}

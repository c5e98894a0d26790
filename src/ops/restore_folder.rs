//! A lost or damaged descriptor made anew from what is in its folder: from the running device, from a backup of it, or from the
//! images. What is not certain is listed and left to the user.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::bail;
use crate::descriptor::{Descriptor, FILE_NAME, ImageMode};
use crate::device;
use crate::error::{IoContext, Kind, Result};
use crate::format::guid::Guid;
use crate::format::header::{self, Header};
use crate::image::check::read_header;
use crate::image::lock::{self, Sharing};
use crate::image::open::Access;
use crate::image::target::read_table;
use crate::report;
use crate::sys::aligned::read_full;
use crate::sys::file_id::FileId;
use crate::sys::folder::{Folder, Place};
use crate::sys::store;
use crate::units::{ClusterSize, SECTOR};

/// Suffix of a descriptor's backup, as other programs make it.
const BACKUP: &str = ".Backup";
/// Suffix of what a damaged descriptor is called afterwards.
const DAMAGED: &str = ".damaged";

const READ: Access = Access { write: false, direct: false };

/// Makes DiskDescriptor.xml in `folder` anew, if it is certain what it has to say; else `Param`, with a list of the images. One
/// that can be read stays: `Param`; a damaged one is kept under another name.
pub fn restore_folder(folder: &Path) -> Result<()> {
    let _operation = report::cancel::begin();
    let folder = open(folder)?;
    let to = wanted(&folder)?;
    let disk = match running(&to)? {
        Some(disk) => disk,
        None => match from_backup(&folder, &to) {
            Ok(Some(disk)) => disk,
            Ok(None) => from_images(&folder)?,
            Err(e) => {
                report::warn(e.context(format_args!("{}{BACKUP} is not used", to.display())));
                from_images(&folder)?
            }
        },
    };
    store(&disk, &to)
}

/// Makes DiskDescriptor.xml in `folder` for a chain that the caller knows, base first; `raw`: the base is, with this cluster. The
/// snapshots get new GUIDs. Images that do not fit on each other are `Format`.
pub fn restore_chain(folder: &Path, images: &[PathBuf], raw: Option<ClusterSize>) -> Result<()> {
    let _operation = report::cancel::begin();
    let folder = open(folder)?;
    let to = wanted(&folder)?;
    let mut files = Vec::new();
    for image in images {
        files.push(fs::canonicalize(image).ctx(Kind::Open, || format!("cannot open image {}", image.display()))?);
    }
    let disk = chain(&files, raw)?;
    store(&disk, &to)
}

fn open(folder: &Path) -> Result<Folder> {
    Folder::resolve(folder).ctx(Kind::Open, || format!("cannot open folder {}", folder.display()))
}

/// The descriptor's place. One that is there and is whole XML stays, whatever is in it: it may be one that this version
/// refuses by name, of an encrypted disk for example.
fn wanted(folder: &Folder) -> Result<Place> {
    let to = folder.entry(FILE_NAME);
    match Descriptor::read_at(&to) {
        Ok(_) => bail!(
            Param,
            "{} is there already, and can be read; move it away if it is not the descriptor of this disk",
            to.display()
        ),
        Err(e) if e.errno() == Some(libc::ENOENT) => Ok(to),
        Err(e) if Descriptor::is_cut(&to)? => {
            report::say(1, e);
            Ok(to)
        }
        Err(e) => Err(e.context(format_args!(
            "{} is there, and not damaged; move it away if it is not the descriptor of this disk",
            to.display()
        ))),
    }
}

fn store(disk: &Descriptor, to: &Place) -> Result<()> {
    // Names are stored as seen from the descriptor's folder.
    let disk = &Descriptor { dir: to.folder.clone(), ..disk.clone() };
    disk.check_tree()?;
    if to.regular().is_ok_and(|found| found.is_some()) {
        let aside = to.suffixed(DAMAGED);
        match store::link(to, &aside) {
            // An earlier try was interrupted after it.
            Err(_) if aside.id().is_ok_and(|kept| kept.is_some() && to.id().ok() == Some(kept)) => {}
            other => other.ctx(Kind::Rename, || {
                format!("the damaged descriptor cannot be kept as {}; move that away", aside.display())
            })?,
        }
        report::say(0, format_args!("The damaged descriptor is kept as {}", aside.display()));
        disk.commit(to)?;
    } else {
        disk.commit_new(to)?;
    }
    let names: Vec<String> = disk.images.iter().map(|i| i.file.display().to_string()).collect();
    report::say(0, format_args!("{} names, base first: {}", to.display(), names.join(", ")));
    Ok(())
}

/// What runs under this descriptor's name, and writes to its top.
fn running(to: &Place) -> Result<Option<Descriptor>> {
    if !nix::unistd::geteuid().is_root() {
        // Only root can make devices.
        return Ok(None);
    }
    let path = to.path();
    let found = device::list_of(|d| {
        d.component.is_empty() && !d.read_only && d.descriptor.as_deref() == Some(&*path) && !d.images.is_empty()
    })?;
    let Some(device) = found.first() else { return Ok(None) };
    for image in &device.images {
        if FileId::at(&image.path).ok() != Some(image.id) {
            bail!(
                Param,
                "{} runs the disk, but {} is not the image that it uses any more; `ploop list` shows where that is",
                device.node().display(),
                image.path.display()
            );
        }
    }
    let files: Vec<PathBuf> = device.images.iter().map(|i| i.path.clone()).collect();
    let raw = device.images.first().is_some_and(|i| i.raw);
    let cluster = ClusterSize::from_sectors(u64::from(device.cluster_sectors))?;
    report::say(0, format_args!("{} runs the disk: the chain is that of the device", device.node().display()));
    linear(&files, device.sectors, cluster, raw).map(Some)
}

/// A linear chain, base first, with GUIDs made up for all but the top.
fn linear(files: &[PathBuf], sectors: u64, cluster: ClusterSize, raw: bool) -> Result<Descriptor> {
    let Some((base, above)) = files.split_first() else { bail!(Param, "a disk has at least one image") };
    let mode = if raw { ImageMode::Raw } else { ImageMode::Expanded };
    let mut disk = Descriptor::new_base(base, sectors, cluster, mode)?;
    for file in above {
        disk.add_snapshot(file.clone(), Guid::generate(), false)?;
    }
    Ok(disk)
}

/// The chain of these files, each checked to fit on the one before it.
fn chain(files: &[PathBuf], raw: Option<ClusterSize>) -> Result<Descriptor> {
    let mut below: Option<(Header, &PathBuf)> = None;
    let mut size = None;
    for (n, file) in files.iter().enumerate() {
        if let (0, Some(cluster)) = (n, raw) {
            size = Some((raw_sectors(file)?, cluster));
            continue;
        }
        let header = read_header(file, None)?;
        if let Some((lower, name)) = &below {
            fits(lower, name, &header, file)?;
        } else if let Some((sectors, cluster)) = size
            && (cluster != header.cluster || sectors > header.sectors)
        {
            bail!(
                Format,
                "{} has clusters of {} sectors and {} sectors: it does not stand on a raw image of {sectors} sectors with \
                 clusters of {}",
                file.display(),
                header.cluster.sectors(),
                header.sectors,
                cluster.sectors()
            );
        }
        size = Some((header.sectors, header.cluster));
        below = Some((header, file));
    }
    let Some((sectors, cluster)) = size else { bail!(Param, "a disk has at least one image") };
    linear(files, sectors, cluster, raw.is_some())
}

fn raw_sectors(file: &Path) -> Result<u64> {
    let shown = file.display();
    let held = lock::lock_image(file, None, READ, Sharing::Readers)?;
    let mut head = [0; header::SIZE];
    let got = read_full(&held.file, &mut head, 0).ctx(Kind::Read, || format!("cannot read image {shown}"))?;
    if header::has_signature(head.get(..got).unwrap_or_default()) {
        bail!(Param, "{shown} has the signature of a ploop image: it is not raw");
    }
    let len = held.file.metadata().ctx(Kind::Fstat, || format!("cannot look at image {shown}"))?.len();
    Ok(len / SECTOR)
}

fn fits(lower: &Header, lower_name: &Path, upper: &Header, upper_name: &Path) -> Result<()> {
    let (l, u) = (lower_name.display(), upper_name.display());
    if (lower.cluster, lower.version) != (upper.cluster, upper.version) {
        bail!(
            Format,
            "{u} (version {}, clusters of {} sectors) does not stand on {l} (version {}, {} sectors)",
            upper.version.number(),
            upper.cluster.sectors(),
            lower.version.number(),
            lower.cluster.sectors()
        );
    }
    if lower.sectors > upper.sectors {
        bail!(Format, "{u} has {} sectors, {l} has {}: a lower image is not larger", upper.sectors, lower.sectors);
    }
    Ok(())
}

/// The descriptor's backup, if it fits everything that is there.
fn from_backup(folder: &Folder, to: &Place) -> Result<Option<Descriptor>> {
    let place = to.suffixed(BACKUP);
    if !place.regular().is_ok_and(|found| found.is_some()) {
        return Ok(None);
    }
    let mut disk = Descriptor::read_at(&place)?;
    disk.normalise_top()?;
    disk.check_tree()?;
    for snapshot in &disk.snapshots {
        let mut below: Option<(Header, &Path)> = None;
        for image in disk.chain(&snapshot.guid)? {
            if disk.is_raw(image) {
                raw_sectors(&image.file)?;
                continue;
            }
            let header = read_header(&image.file, Some(folder))?;
            if header.cluster != disk.blocksize {
                bail!(
                    Format,
                    "{} has clusters of {} sectors, not {}",
                    image.file.display(),
                    header.cluster.sectors(),
                    disk.blocksize.sectors()
                );
            }
            if let Some((lower, name)) = &below {
                fits(lower, name, &header, &image.file)?;
            }
            below = Some((header, &image.file));
        }
    }
    let unnamed: Vec<String> = images(folder)
        .into_iter()
        .filter(|found| !disk.images.iter().any(|i| i.file == found.path))
        .map(|found| found.path.display().to_string())
        .collect();
    if !unnamed.is_empty() {
        bail!(Param, "it does not name {}: it may be older than the last snapshot", unnamed.join(", "));
    }
    report::say(0, format_args!("{} names all images of the folder", place.display()));
    Ok(Some(disk))
}

/// A ploop1 image of the folder.
struct Found {
    path: PathBuf,
    header: Header,
    /// Clusters of the disk that it has; none: its BAT is damaged.
    mapped: Option<usize>,
    /// It has the beginning of the disk, without which a base that holds anything is none.
    begins: bool,
    modified: (i64, i64),
}

fn images(folder: &Folder) -> Vec<Found> {
    let one = |path: PathBuf| {
        let meta = fs::symlink_metadata(&path).ok().filter(|m| m.is_file())?;
        let header = read_header(&path, Some(folder)).ok()?;
        let fd = crate::image::open::open_level(&path, Some(folder)).ok()?;
        let (file, _) = crate::image::open::reopen(&fd, READ).ok()?;
        let table = read_table(&file, &path).ok().map(|(_, table)| table.entries);
        Some(Found {
            path,
            header,
            mapped: table.as_ref().map(Vec::len),
            begins: table.is_some_and(|t| t.first().is_some_and(|(cluster, _)| *cluster == 0)),
            modified: (meta.mtime(), meta.mtime_nsec()),
        })
    };
    let mut names = folder.names().unwrap_or_default();
    names.sort();
    names.into_iter().filter_map(|name| one(folder.join(name))).collect()
}

impl Found {
    /// Its own content shows that it stands on another image, or its name does.
    fn is_delta(&self) -> bool {
        self.stem().is_some() || (!self.begins && self.mapped.is_some_and(|n| n > 0))
    }

    /// The name of the base, if this one has the form of a delta's name.
    fn stem(&self) -> Option<&str> {
        let name = self.path.file_name()?.to_str()?;
        let (stem, guid) = name.rsplit_once('.')?;
        (guid.starts_with('{') && Guid::parse(guid).is_ok()).then_some(stem)
    }
}

/// One image that can be a base, or a base and one delta that is newer: their order is certain.
fn from_images(folder: &Folder) -> Result<Descriptor> {
    let found = images(folder);
    let certain: Option<Vec<&Found>> = match &found[..] {
        [one] if !one.is_delta() => Some(vec![one]),
        [a, b] => [(a, b), (b, a)]
            .into_iter()
            .find(|(base, delta)| stands(delta, base))
            .map(|(base, delta)| vec![base, delta]),
        _ => None,
    };
    if let Some(order) = certain {
        let files: Vec<PathBuf> = order.iter().map(|f| f.path.clone()).collect();
        return chain(&files, None);
    }
    if found.is_empty() {
        bail!(
            Param,
            "folder {} has no ploop image; for a raw one name it: ploop restore-descriptor -f raw {} FILE",
            folder.display(),
            folder.display()
        );
    }
    let lines: Vec<String> = found.iter().map(Found::line).collect();
    bail!(
        Param,
        "which of these images stands on which is not certain; name them, the base first and the top last (ploop \
         restore-descriptor {} BASE DELTA ... TOP):\n{}",
        folder.display(),
        lines.join("\n")
    )
}

fn stands(delta: &Found, base: &Found) -> bool {
    delta.stem().is_some_and(|stem| base.path.file_name().is_some_and(|name| name == stem))
        && !base.is_delta()
        && !base.header.is_marked()
        && base.modified <= delta.modified
        && fits(&base.header, &base.path, &delta.header, &delta.path).is_ok()
}

impl Found {
    fn line(&self) -> String {
        let part = match (self.mapped, self.begins) {
            (None, _) => "its BAT is damaged".to_owned(),
            (Some(0), _) => "empty".to_owned(),
            (Some(n), true) => format!("{n} clusters, the first of the disk among them"),
            (Some(n), false) => format!("{n} clusters, not the first of the disk: it stands on another image"),
        };
        format!(
            "  {}: version {}, {} sectors, {part}{}, last written {}",
            self.path.display(),
            self.header.version.number(),
            self.header.sectors,
            if self.header.is_marked() { ", marked in use: it was the top" } else { "" },
            self.modified.0
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::guid;
    use crate::format::header::Version;
    use crate::ops::snapshot::{self, SnapshotParams};
    use crate::ops::testkit::{content, g, make_disk, put, small};

    fn take(dd: &Path, n: u32) {
        snapshot::create(dd, "", &SnapshotParams { guid: g(n), snap_dir: None, temporary: false }).unwrap();
    }

    /// A disk with so many snapshots, each with content of its own.
    fn disk(snapshots: u32) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let dd = make_disk(dir.path(), Version::V2, ImageMode::Expanded, small(), 32);
        put(&dd, &guid::TOP, 0, 9);
        for n in 1..=snapshots {
            take(&dd, n);
            put(&dd, &guid::TOP, n, n as u8);
        }
        (dir, dd)
    }

    #[test]
    fn what_is_certain_is_made() {
        for snapshots in [0, 1] {
            for damaged in [false, true] {
                let (dir, dd) = disk(snapshots);
                let before = content(&dd, &guid::TOP);
                let e = restore_folder(dir.path()).unwrap_err();
                assert!(e.kind() == Kind::Param && e.to_string().contains("there already"), "{e}");
                let text = fs::read(&dd).unwrap();
                match damaged {
                    true => fs::write(&dd, &text[..text.len() / 2]).unwrap(),
                    false => fs::remove_file(&dd).unwrap(),
                }
                restore_folder(dir.path()).unwrap();
                assert_eq!(content(&dd, &guid::TOP), before);
                let kept = dd.with_extension("xml.damaged");
                assert_eq!(fs::read(kept).ok(), damaged.then(|| text[..text.len() / 2].to_vec()));
            }
        }
    }

    #[test]
    fn what_is_not_certain_is_listed_and_made_as_the_user_says() {
        let (dir, dd) = disk(3);
        let before = content(&dd, &guid::TOP);
        let images: Vec<PathBuf> = Descriptor::read(&dd).unwrap().images.iter().map(|i| i.file.clone()).collect();
        fs::remove_file(&dd).unwrap();
        let e = restore_folder(dir.path()).unwrap_err().to_string();
        assert!(images.iter().all(|i| e.contains(&i.display().to_string())) && e.contains("stands on another"), "{e}");
        assert!(!dd.exists());
        restore_chain(dir.path(), &images, None).unwrap();
        assert_eq!(content(&dd, &guid::TOP), before);
        assert_eq!(Descriptor::read(&dd).unwrap().images.len(), 4);
        // A delta whose base is gone is no disk.
        fs::remove_file(&dd).unwrap();
        for image in &images[..3] {
            fs::remove_file(image).unwrap();
        }
        assert_eq!(restore_folder(dir.path()).unwrap_err().kind(), Kind::Param);
        assert_eq!(restore_chain(dir.path(), &images, None).unwrap_err().kind(), Kind::Open);
    }

    #[test]
    fn the_order_of_two_images_that_contradicts_what_they_are_is_not_made() {
        let (dir, dd) = disk(1);
        let images: Vec<PathBuf> = Descriptor::read(&dd).unwrap().images.iter().map(|i| i.file.clone()).collect();
        fs::remove_file(&dd).unwrap();
        // The base was written to after the delta.
        let old = fs::File::options().write(true).open(&images[1]).unwrap();
        old.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(restore_folder(dir.path()).unwrap_err().kind(), Kind::Param);
        // Images of different kinds.
        let other = dir.path().join("other");
        crate::image::create::create_delta(&other, Version::V1, small(), 64 * 32).unwrap();
        let wrong = [images[0].clone(), other];
        assert_eq!(restore_chain(dir.path(), &wrong, None).unwrap_err().kind(), Kind::Format);
        assert!(!dd.exists());
    }

    #[test]
    fn a_backup_that_fits_is_taken_with_its_snapshots() {
        let (dir, dd) = disk(2);
        let backup = dd.with_extension("xml.Backup");
        fs::copy(&dd, &backup).unwrap();
        let stored = Descriptor::read(&dd).unwrap();
        fs::write(&dd, "<?xml").unwrap();
        restore_folder(dir.path()).unwrap();
        let made = Descriptor::read(&dd).unwrap();
        assert_eq!(
            (&made.images, &made.snapshots, made.size_sectors),
            (&stored.images, &stored.snapshots, stored.size_sectors)
        );
        // One that is older than the last snapshot is not.
        take(&dd, 3);
        fs::remove_file(&dd).unwrap();
        assert_eq!(restore_folder(dir.path()).unwrap_err().kind(), Kind::Param);
        assert!(!dd.exists());
    }
}

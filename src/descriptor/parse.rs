//! From XML to the model. The parser tolerates what earlier programs accepted.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::OFlag;

use crate::bail;
use crate::error::{Error, IoContext, Kind, Result};
use crate::format::geometry;
use crate::format::guid::{self, Guid};
use crate::sys::folder::{Folder, Place};
use crate::units::ClusterSize;

use super::model::{Descriptor, Image, ImageMode, Layout, ReverseMerge, Snapshot};
use super::write::SPOILED;
use super::xml::{self, Element, cut};

/// Largest file that is read.
const MAX_BYTES: u64 = 16 << 20;

impl Descriptor {
    /// Reads a descriptor file. Links in its path are followed; its images are relative to the folder of the resolved
    /// path.
    pub fn read(path: &Path) -> Result<Descriptor> {
        Descriptor::read_at(&Descriptor::find(path)?)
    }

    /// Resolves the path of a descriptor, once: everything else is done from its open folder.
    pub fn find(path: &Path) -> Result<Place> {
        Place::resolve(path).ctx(Kind::DiskDescr, || format!("cannot find descriptor {}", path.display()))
    }

    /// Reads the descriptor at this place.
    pub fn read_at(place: &Place) -> Result<Descriptor> {
        let mut bytes = Vec::new();
        // An open of a pipe must not wait.
        let file = place
            .open(OFlag::O_RDONLY | OFlag::O_NONBLOCK)
            .ctx(Kind::DiskDescr, || format!("cannot open descriptor {}", place.display()))?;
        let owner = read_limited(file.into(), &place.path(), &mut bytes)?;
        let check = |d: Descriptor| check_outside(&d, owner).map(|()| d);
        let parsed = Descriptor::parse_in(&bytes, &place.folder).and_then(check);
        parsed.map_err(|e| e.context(format_args!("descriptor {}", place.display())))
    }

    /// Whether the file at this place is no whole XML: an interrupted write, or a damage, has cut it.
    pub fn is_cut(place: &Place) -> Result<bool> {
        let mut bytes = Vec::new();
        let file = place
            .open(OFlag::O_RDONLY | OFlag::O_NONBLOCK)
            .ctx(Kind::DiskDescr, || format!("cannot open descriptor {}", place.display()))?;
        read_limited(file.into(), &place.path(), &mut bytes)?;
        Ok(xml::parse(&bytes).is_err())
    }

    /// Parses a descriptor whose file lies in the folder `dir` (resolved).
    pub fn parse(bytes: &[u8], dir: &Path) -> Result<Descriptor> {
        Descriptor::parse_in(bytes, &Folder::new(dir))
    }

    fn parse_in(bytes: &[u8], dir: &Folder) -> Result<Descriptor> {
        let root = xml::parse(bytes)?;
        let layout = match root.name.as_str() {
            "Virtuozzo_disk_image" => Layout::Virtuozzo,
            _ => Layout::Parallels,
        };
        let parameters = required(&root, "Disk_Parameters", "the root element")?;
        if parameters.child("Encryption").is_some_and(is_encrypted) {
            bail!(DiskDescr, "element Encryption: encrypted disks are not supported");
        }
        let number = |name| parameters.child(name).and_then(|e| parse_number(&e.text)).unwrap_or(0);
        let size_sectors = number("Disk_size");
        let mut cylinders = u32::try_from(number("Cylinders")).unwrap_or(0);
        let mut heads = u32::try_from(number("Heads")).unwrap_or(0);
        if cylinders == 0 || heads == 0 {
            let g = geometry::chs(size_sectors);
            (cylinders, heads) = (g.cylinders, g.heads);
        }
        let storage = storage(&root)?;
        let blocksize = blocksize(storage)?;
        let (images, plain) = images(storage, dir)?;
        let preallocated = preallocated(storage)?;
        let mode = match (plain, preallocated) {
            (true, true) => bail!(DiskDescr, "element Preallocated is 1 with images of type Plain: only one can be"),
            (true, false) => ImageMode::Raw,
            (false, true) => ImageMode::Preallocated,
            (false, false) => ImageMode::Expanded,
        };
        let (snapshots, top) = parse_snapshots(required(&root, "Snapshots", "the root element")?, images.len())?;
        Ok(Descriptor {
            dir: dir.clone(),
            layout,
            size_sectors,
            cylinders,
            heads,
            blocksize,
            mode,
            max_delta_size: number("Max_delta_size"),
            images,
            snapshots,
            top,
        })
    }
}

/// Images outside the folder are opened with the rights of the folder's owner (see `image::open`). So the descriptor
/// must belong to that owner: in a folder like /tmp other users can write one.
fn check_outside(disk: &Descriptor, owner: u32) -> Result<()> {
    let inside = |file: &Path| file.starts_with(&disk.dir) && !file.components().any(|c| c == Component::ParentDir);
    let Some(outside) = disk.images.iter().find(|i| !inside(&i.file)) else { return Ok(()) };
    let dir = disk.dir.display();
    let folder = disk.dir.stat().ctx(Kind::DiskDescr, || format!("cannot look at folder {dir}"))?.st_uid;
    if owner != 0 && owner != folder {
        bail!(
            DiskDescr,
            "it belongs to user {owner}, its folder {dir} to user {folder}, and it names image {} outside: must belong \
             to the folder's owner; move it into a folder of its owner's",
            outside.file.display()
        );
    }
    Ok(())
}

/// Reads the file; returns its owner.
fn read_limited(file: File, path: &Path, bytes: &mut Vec<u8>) -> Result<u32> {
    let name = path.display();
    let meta = file.metadata().ctx(Kind::DiskDescr, || format!("cannot look at descriptor {name}"))?;
    if !meta.is_file() {
        bail!(DiskDescr, "descriptor {name} is not a regular file");
    }
    let got = file.take(MAX_BYTES + 1).read_to_end(bytes);
    let got = got.ctx(Kind::DiskDescr, || format!("cannot read descriptor {name}"))?;
    if got as u64 > MAX_BYTES {
        bail!(DiskDescr, "descriptor {name} has {} bytes: at most {MAX_BYTES} are read", meta.len());
    }
    Ok(meta.uid())
}

fn required<'a>(parent: &'a Element, name: &str, place: &str) -> Result<&'a Element> {
    parent.child(name).ok_or_else(|| Error::new(Kind::DiskDescr, format!("element {name} is missing in {place}")))
}

/// Bundles of Parallels Desktop have the element in each descriptor: a null Engine and no Data mean no encryption.
fn is_encrypted(encryption: &Element) -> bool {
    let null = |e: &Element| {
        let text = e.text.trim();
        let nothing = text.is_empty() || e.name == "Engine" && Guid::parse(text).is_ok_and(|g| g == guid::NONE);
        nothing && e.children.is_empty()
    };
    !encryption.text.trim().is_empty() || !encryption.children.iter().all(null)
}

fn storage(root: &Element) -> Result<&Element> {
    let data = required(root, "StorageData", "the root element")?;
    if data.child("Volume").is_some() {
        bail!(DiskDescr, "element Volume: disks in the volume layout are not supported");
    }
    let at = data.children.iter().position(|c| c.name == "Storage");
    let Some((storage, rest)) = at.and_then(|at| data.children.get(at..)).and_then(<[_]>::split_first) else {
        bail!(DiskDescr, "element Storage is missing in StorageData");
    };
    if let Some(more) = rest.first() {
        bail!(DiskDescr, "element {} follows Storage: split disks are not supported", cut(&more.name));
    }
    Ok(storage)
}

fn blocksize(storage: &Element) -> Result<ClusterSize> {
    let element = required(storage, "Blocksize", "Storage")?;
    let Some(sectors) = parse_number(&element.text) else {
        bail!(DiskDescr, "element Blocksize is '{}': must be a number of sectors", cut(&element.text));
    };
    ClusterSize::from_sectors(sectors).map_err(|e| e.as_kind(Kind::DiskDescr).context("element Blocksize"))
}

fn preallocated(storage: &Element) -> Result<bool> {
    match storage.child("Preallocated").map(|e| (parse_number(&e.text), &e.text)) {
        None | Some((Some(0), _)) => Ok(false),
        Some((Some(1), _)) => Ok(true),
        Some((_, text)) => bail!(DiskDescr, "element Preallocated is '{}': must be 0 or 1", cut(text)),
    }
}

/// All elements from the first one of that name on are read as such.
fn from_first<'a>(parent: &'a Element, name: &str) -> &'a [Element] {
    let first = parent.children.iter().position(|c| c.name == name);
    first.and_then(|at| parent.children.get(at..)).unwrap_or_default()
}

fn images(storage: &Element, dir: &Path) -> Result<(Vec<Image>, bool)> {
    let mut images = Vec::new();
    let mut plain = false;
    for element in from_first(storage, "Image") {
        let guid = parse_guid(required(element, "GUID", "Image")?)?;
        let kind = required(element, "Type", "Image")?;
        plain |= kind.text.trim() == "Plain";
        let file = file_name(&required(element, "File", "Image")?.text);
        if file.is_empty() {
            bail!(DiskDescr, "element File of image {guid} is empty");
        }
        if file.contains('\0') {
            bail!(DiskDescr, "element File of image {guid} has a zero byte");
        }
        if file.len() >= libc::PATH_MAX as usize {
            bail!(
                DiskDescr,
                "element File of image {guid} has {} bytes: less than {} can be a path",
                file.len(),
                libc::PATH_MAX
            );
        }
        // An absolute path replaces the folder.
        images.push(Image { guid, file: join(dir, file) });
    }
    if images.is_empty() {
        bail!(DiskDescr, "no element Image in Storage: at least one is needed");
    }
    Ok((images, plain))
}

fn join(dir: &Path, file: &str) -> PathBuf {
    dir.join(file)
}

/// Verbatim, since names may begin or end with a blank, unless the element was laid out over several lines.
fn file_name(text: &str) -> &str {
    if text.contains('\n') { text.trim() } else { text }
}

fn parse_snapshots(parent: &Element, images: usize) -> Result<(Vec<Snapshot>, Guid)> {
    let mut snapshots = Vec::new();
    for element in from_first(parent, "Shot") {
        let temporary = |name| element.children.iter().rposition(|c| c.name == name);
        // The last of these elements counts.
        let stages = [
            (temporary("Temporary"), None),
            (temporary("TemporaryZero"), Some(ReverseMerge::Zeroing)),
            (temporary("TemporaryZeroSwap"), Some(ReverseMerge::Swapped)),
        ];
        let stage = stages.into_iter().filter(|s| s.0.is_some()).max_by_key(|s| s.0);
        snapshots.push(Snapshot {
            guid: parse_guid(required(element, "GUID", "Shot")?)?,
            parent: parse_guid(required(element, "ParentGUID", "Shot")?)?,
            temporary: stage.is_some(),
            spoiled: element.children.iter().any(|c| c.name == "Temporary" && c.text.trim() == SPOILED),
            reverse_merge: stage.and_then(|s| s.1),
        });
    }
    let mut top = match parent.child("TopGUID") {
        Some(element) => Some(parse_guid(element)?),
        None => None,
    };
    let has_top = |snapshots: &[Snapshot]| snapshots.iter().any(|s| s.guid == guid::TOP);
    if snapshots.len() != images {
        // Descriptors older than snapshots.
        snapshots.push(Snapshot {
            guid: guid::TOP,
            parent: guid::NONE,
            temporary: false,
            spoiled: false,
            reverse_merge: None,
        });
        top = top.or(Some(guid::TOP));
    }
    if top.is_none() && has_top(&snapshots) {
        top = Some(guid::TOP);
    }
    let Some(top) = top else {
        bail!(DiskDescr, "element TopGUID is missing in Snapshots, and no Shot has {}", guid::TOP);
    };
    let Some(snapshot) = snapshots.iter().find(|s| s.guid == top) else {
        bail!(DiskDescr, "element TopGUID is {top}: no Shot has that GUID");
    };
    if snapshot.temporary {
        bail!(DiskDescr, "element TopGUID is {top}, a temporary snapshot: the top must not be one");
    }
    if snapshots.len() != images {
        bail!(DiskDescr, "{images} elements Image and {} elements Shot: must be as many", snapshots.len());
    }
    Ok((snapshots, top))
}

fn parse_guid(element: &Element) -> Result<Guid> {
    Guid::parse(element.text.trim())
        .map_err(|e| e.as_kind(Kind::DiskDescr).context(format_args!("element {}", cut(&element.name))))
}

/// A C number: decimal, 0x hexadecimal or 0 octal, blanks around it allowed.
pub fn parse_number(text: &str) -> Option<u64> {
    let text = text.trim();
    let text = text.strip_prefix('+').unwrap_or(text);
    if text.starts_with(['+', '-']) {
        return None;
    }
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return if hex.starts_with('+') { None } else { u64::from_str_radix(hex, 16).ok() };
    }
    match text.strip_prefix('0') {
        Some("") => Some(0),
        Some(octal) if !octal.starts_with('+') => u64::from_str_radix(octal, 8).ok(),
        Some(_) => None,
        None => text.parse().ok(),
    }
}

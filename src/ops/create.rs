//! Making a disk: the image, with partition, file system and balloon file in it, and its descriptor. No device and no
//! root are needed. All files have temporary names at first; the image gets its name when it is whole, the descriptor
//! comes last.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::scratch::Scratch;
use crate::bail;
use crate::descriptor::{self, Descriptor, ImageMode};
use crate::error::{IoContext, Kind, Result};
use crate::format::gpt::Gpt;
use crate::format::header::{self, Header, Version};
use crate::format::limits;
use crate::fs::mkfs::{self, FsSpec, FsType, Inodes};
use crate::image::content::Piece;
use crate::image::create::{self as build, Params};
use crate::image::open;
use crate::report;
use crate::report::progress::Progress;
use crate::sys::folder::{Folder, Place};
use crate::sys::store;
use crate::units::{ClusterSize, SECTOR};

/// Block size of a file system when none is asked for.
const FS_BLOCK: u32 = 4096;

/// A file system wanted in the new disk.
#[derive(Clone, Copy, Debug)]
pub struct FsParams {
    pub fstype: FsType,
    /// Bytes; 0: 4096.
    pub block_size: u32,
    /// Leave the inode tables to the first mount.
    pub lazy: bool,
    pub inodes: Inodes,
}

/// What to make.
#[derive(Clone, Debug)]
pub struct CreateParams {
    pub image: PathBuf,
    /// Size of the disk; rounded to whole clusters.
    pub sectors: u64,
    pub cluster: ClusterSize,
    /// Without meaning for raw images.
    pub version: Version,
    pub mode: ImageMode,
    /// None: an empty disk.
    pub fs: Option<FsParams>,
    /// The file system fills the disk, there is no partition table.
    pub without_partition: bool,
}

/// Makes image and descriptor. An image or descriptor that is there already is `Param`, and nothing is touched; what
/// an interrupted creation left in the folder is replaced or completed.
pub fn create_image(params: &CreateParams) -> Result<()> {
    let _operation = report::cancel::begin();
    let target = Target::find(&params.image)?;
    let params = CreateParams { image: target.image.path(), sectors: size(params)?, ..params.clone() };
    let table = match params.fs.is_some() && !params.without_partition {
        true => Some(Gpt::single(params.sectors, params.cluster)?),
        false => None,
    };
    if exists(&target.descriptor)? {
        bail!(
            Param,
            "{} exists already: a folder has one disk; use another folder, or remove the old disk first",
            target.descriptor.display()
        );
    }
    let there = exists(&target.image)?;
    if there && !exists(&target.folder.entry(super::scratch::NAME))? {
        return target.image_exists();
    }

    let scratch = Scratch::take(&target.folder)?;
    if there {
        // An interrupted creation keeps its own name of the image until the descriptor is stored: the image is its own
        // and whole, only the descriptor is missing.
        if !same_file(&scratch.image(), &target.image)? {
            return target.image_exists();
        }
        if let Err(e) = target.same_parameters(&params) {
            scratch.keep();
            return Err(e);
        }
        report::say(0, format_args!("{} was left by an interrupted creation, completing it", target.image.display()));
        return target.commit(&params);
    }
    scratch.clear()?;
    report::say(
        0,
        format_args!(
            "Creating delta {} bs={} size={} sectors {}",
            target.image.display(),
            params.cluster.sectors(),
            params.sectors,
            kind_of_image(&params)
        ),
    );
    fill(&scratch, &params, table.as_ref())?;
    target.place(&scratch)?;
    target.commit(&params).inspect_err(|_| {
        // It is the file that got this name in the step before.
        if let Ok(Some(made)) = scratch.image().id() {
            let _ = store::unlink_file(&target.image, made);
        }
    })?;
    report::say(0, format_args!("Created {} and {}", target.image.display(), target.descriptor.display()));
    Ok(())
}

fn kind_of_image(params: &CreateParams) -> String {
    match params.mode {
        ImageMode::Raw => "raw".into(),
        ImageMode::Expanded => format!("v{}", params.version.number()),
        ImageMode::Preallocated => format!("v{} preallocated", params.version.number()),
    }
}

/// The size that the disk will have, in sectors.
pub(super) fn size(params: &CreateParams) -> Result<u64> {
    let version = match params.mode {
        ImageMode::Raw => Version::V2,
        _ => params.version,
    };
    let sectors = limits::round_size(version, params.cluster, params.sectors)?;
    if params.fs.is_some() && sectors > limits::MAX_FS_SECTORS {
        bail!(
            Param,
            "disk size {} sectors: with a file system at most {} (16 TiB)",
            params.sectors,
            limits::MAX_FS_SECTORS
        );
    }
    if sectors == 0 {
        bail!(
            Param,
            "disk size {} sectors cannot be rounded to a cluster of {} sectors in a version {} image; use a smaller cluster (-b)",
            params.sectors,
            params.cluster.sectors(),
            version.number()
        );
    }
    Ok(sectors)
}

fn image_params(params: &CreateParams) -> Params {
    Params { version: params.version, cluster: params.cluster, sectors: params.sectors, mode: params.mode }
}

/// Builds the whole image under its temporary name, durable.
fn fill(scratch: &Scratch, params: &CreateParams, table: Option<&Gpt>) -> Result<()> {
    let mut shown = Progress::begin("making the image");
    let mut progress = |done, total| match report::cancel::requested() {
        true => bail!(Creat, "making {} was cancelled", params.image.display()),
        false => {
            shown.at(done, total);
            Ok(())
        }
    };
    let Some(fs) = params.fs else {
        return build::create(&scratch.image(), &image_params(params), &mut progress).map(drop);
    };
    let (start, length) = match table.and_then(|t| t.partitions().next()) {
        Some(only) => (only.start, only.length),
        None => (0, params.sectors * SECTOR),
    };
    let place = scratch.content();
    let content =
        store::create_new(&place, 0o600).ctx(Kind::Creat, || format!("{} cannot be made", place.display()))?;
    content.set_len(length).ctx(Kind::Ftruncate, || format!("{} cannot have {length} bytes", place.display()))?;
    let block_size = if fs.block_size == 0 { FS_BLOCK } else { fs.block_size };
    let spec = FsSpec { fstype: fs.fstype, block_size, lazy: fs.lazy, inodes: fs.inodes };
    report::say(0, format_args!("Making file system {}", fs.fstype.name()));
    let folder = scratch.path_for_programs()?;
    mkfs::make(&folder.join(&place.name), &spec, &folder)?;
    let table = table.map(Gpt::encode).transpose()?;
    let mut pieces = vec![Piece::file(start, &content, length)];
    pieces.extend(table.iter().flatten().map(|p| Piece::bytes(p.offset, &p.bytes)));
    build::build(&scratch.image(), &image_params(params), &pieces, &mut progress)?;
    store::unlink(&place).ctx(Kind::Unlink, || place.display())
}

/// The names that the new disk will have.
struct Target {
    folder: Folder,
    image: Place,
    descriptor: Place,
}

impl Target {
    fn find(image: &Path) -> Result<Target> {
        let Some(name) = image.file_name() else {
            bail!(Param, "{} does not name a file", image.display());
        };
        let folder = match image.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        let opened = Folder::resolve(folder);
        let folder = opened.ctx(Kind::Creat, || format!("folder {}", folder.display()))?;
        let target = Target { image: folder.entry(name), descriptor: folder.entry(descriptor::FILE_NAME), folder };
        if target.image == target.descriptor {
            bail!(Param, "{} is the descriptor's name; give the image another one", image.display());
        }
        Ok(target)
    }

    fn image_exists<T>(&self) -> Result<T> {
        bail!(
            Param,
            "{} exists already and is left as it is; give another name, or remove it yourself",
            self.image.display()
        )
    }

    /// Gives the image its name; no file may have that name. A second (hard) link is preferred: while the first name
    /// stays, the next creation sees that the image was left by an interrupted creation and is no image of the user's.
    fn place(&self, scratch: &Scratch) -> Result<()> {
        let from = scratch.image();
        match store::link(&from, &self.image) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return self.image_exists(),
            // The file system has no hard links.
            Err(_) => descriptor::rename_new(&from, &self.image)?,
            Ok(()) => {}
        }
        descriptor::sync_folder(&self.folder)
    }

    fn commit(&self, params: &CreateParams) -> Result<()> {
        report::say(0, format_args!("Storing {}", self.descriptor.display()));
        let disk = Descriptor::new_base(&self.image.path(), params.sectors, params.cluster, params.mode)?;
        disk.commit_new(&self.descriptor)
    }

    /// Is the whole image that is there the one now asked for?
    fn same_parameters(&self, params: &CreateParams) -> Result<()> {
        let shown = || self.image.display();
        let fd = open::open_level(&self.image.path(), Some(&self.folder))?;
        let (file, _) = open::reopen(&fd, open::Access::default()).ctx(Kind::Open, shown)?;
        let seen = match params.mode {
            ImageMode::Raw => file.metadata().ctx(Kind::Fstat, shown)?.len() == params.sectors * SECTOR,
            _ => {
                let mut head = [0; header::SIZE];
                file.read_exact_at(&mut head, 0).ctx(Kind::Read, shown)?;
                let header = Header::parse(&head)?;
                (header.version, header.cluster, header.sectors) == (params.version, params.cluster, params.sectors)
            }
        };
        if !seen {
            bail!(
                Param,
                "{} was left by an interrupted creation with other parameters; remove it, or repeat with the same ones",
                self.image.display()
            );
        }
        Ok(())
    }
}

/// Is there anything of this name? A link to nothing counts.
fn exists(place: &Place) -> Result<bool> {
    Ok(place.id().ctx(Kind::Creat, || place.display())?.is_some())
}

fn same_file(a: &Place, b: &Place) -> Result<bool> {
    let id = |p: &Place| p.id().ctx(Kind::Fstat, || p.display());
    Ok(id(a)?.is_some_and(|a| id(b).is_ok_and(|b| b == Some(a))))
}

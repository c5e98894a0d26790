//! Open folders, and names in them.
//!
//! A folder that belongs to another user can change between any two steps of an operation. So it is opened once; each
//! later step names one component below the open folder, or looks a path up from it again without following a link.

use std::ffi::{OsStr, OsString};
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::sys::stat::{FileStat, Mode, fstat};

use super::file_id::FileId;

mod resolve;

const PATH: OFlag = OFlag::O_PATH.union(OFlag::O_CLOEXEC);
const FOLDER: OFlag = PATH.union(OFlag::O_DIRECTORY);

/// A folder, open from its first use on. Its path serves messages, and tells which other paths lie in it.
#[derive(Clone)]
pub struct Folder(Arc<Inner>);

struct Inner {
    path: PathBuf,
    fd: OnceLock<OwnedFd>,
}

impl Folder {
    /// The folder of this path, which has no links in it; opened at its first use.
    pub fn new(path: impl Into<PathBuf>) -> Folder {
        Folder(Arc::new(Inner { path: path.into(), fd: OnceLock::new() }))
    }

    /// As [`new`](Self::new), opened now.
    pub fn open(path: impl Into<PathBuf>) -> io::Result<Folder> {
        let folder = Folder::new(path);
        folder.fd()?;
        Ok(folder)
    }

    /// The folder to which a path leads that the user of this program named: links are followed, once. An empty path is
    /// the current folder.
    pub fn follow(path: &Path) -> io::Result<Folder> {
        let shown = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        Ok(Folder::with(shown, open(shown, FOLDER, Mode::empty())?))
    }

    /// The folder to which a path leads that the user of this program named, under its real path. A link on the way that
    /// belongs to a third user leads only to folders of that user.
    pub fn resolve(path: &Path) -> io::Result<Folder> {
        resolve::folder(path)
    }

    fn with(path: impl Into<PathBuf>, fd: OwnedFd) -> Folder {
        Folder(Arc::new(Inner { path: path.into(), fd: OnceLock::from(fd) }))
    }

    /// The open folder (O_PATH).
    pub fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        if let Some(fd) = self.0.fd.get() {
            return Ok(fd.as_fd());
        }
        let opened = look_up(None, &self.0.path, FOLDER)?;
        Ok(self.0.fd.get_or_init(|| opened).as_fd())
    }

    /// A duplicate of the descriptor, for another process.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.fd()?.try_clone_to_owned()
    }

    pub fn path(&self) -> &Path {
        &self.0.path
    }

    pub fn stat(&self) -> io::Result<FileStat> {
        Ok(fstat(self.fd()?)?)
    }

    /// A folder below this one; no link is followed.
    pub fn below(&self, inside: &Path) -> io::Result<Folder> {
        if inside.as_os_str().is_empty() {
            return Ok(self.clone());
        }
        Ok(Folder::with(self.0.path.join(inside), look_up(Some(self.fd()?), inside, FOLDER)?))
    }

    /// What has this name, one component, in the folder.
    pub fn entry(&self, name: impl Into<OsString>) -> Place {
        Place { folder: self.clone(), name: name.into() }
    }

    /// The place that a path names. A path in this folder is looked up from it without following links; of another one
    /// the folder is opened.
    pub fn place(&self, path: &Path) -> io::Result<Place> {
        let path = lexical(path);
        let Some(name) = path.file_name() else { return Err(no_name(&path)) };
        let parent = path.parent().unwrap_or(Path::new("/"));
        let folder = match parent.strip_prefix(lexical(&self.0.path)) {
            Ok(inside) => self.below(inside)?,
            Err(_) => Folder::follow(parent)?,
        };
        Ok(folder.entry(name))
    }

    /// Whether a path lies in this folder.
    pub fn has(&self, path: &Path) -> bool {
        lexical(path).starts_with(lexical(&self.0.path))
    }

    /// Names of all entries.
    pub fn names(&self) -> io::Result<Vec<OsString>> {
        use std::os::unix::ffi::OsStringExt;
        let readable = openat(self.fd()?, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        let mut names = Vec::new();
        for entry in nix::dir::Dir::from_fd(readable)?.iter() {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(OsString::from_vec(name));
            }
        }
        Ok(names)
    }
}

impl Deref for Folder {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0.path
    }
}

impl AsRef<Path> for Folder {
    fn as_ref(&self) -> &Path {
        &self.0.path
    }
}

impl PartialEq for Folder {
    fn eq(&self, other: &Folder) -> bool {
        self.0.path == other.0.path
    }
}

impl Eq for Folder {}

impl std::fmt::Debug for Folder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.path.fmt(f)
    }
}

/// A name in an open folder; there need be nothing of that name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub folder: Folder,
    pub name: OsString,
}

impl Place {
    /// The place that the user of this program named: links on the way to its folder are followed, once.
    pub fn named(path: &Path) -> io::Result<Place> {
        let Some(name) = path.file_name() else { return Err(no_name(path)) };
        Ok(Folder::follow(path.parent().unwrap_or(Path::new("/")))?.entry(name))
    }

    /// As [`Folder::resolve`], for a file, which is there.
    pub fn resolve(path: &Path) -> io::Result<Place> {
        resolve::place(path)
    }

    /// For messages.
    pub fn path(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    /// For messages.
    pub fn display(&self) -> String {
        self.path().display().to_string()
    }

    /// The place beside this one whose name has this suffix.
    pub fn suffixed(&self, suffix: impl AsRef<OsStr>) -> Place {
        let mut name = self.name.clone();
        name.push(suffix);
        self.folder.entry(name)
    }

    /// Opens what has this name; a link is not followed.
    pub fn open(&self, flags: OFlag) -> io::Result<OwnedFd> {
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        Ok(openat(self.folder.fd()?, self.name.as_os_str(), flags, Mode::from_bits_truncate(0o600))?)
    }

    /// The identity of what has this name, also of a link; none: nothing has.
    pub fn id(&self) -> io::Result<Option<FileId>> {
        FileId::in_folder(self.folder.fd()?, Path::new(&self.name))
    }

    /// What has this name; none: nothing has, or no regular file.
    pub fn regular(&self) -> io::Result<Option<FileStat>> {
        use nix::sys::stat::{SFlag, fstatat};
        match fstatat(self.folder.fd()?, self.name.as_os_str(), nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(s) => Ok(Some(s).filter(|s| s.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits())),
            Err(Errno::ENOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

/// What names a place: a place itself, or a path that the user of this program gave.
pub trait Named {
    fn place(&self) -> io::Result<Place>;
}

impl Named for Place {
    fn place(&self) -> io::Result<Place> {
        Ok(self.clone())
    }
}

impl Named for Path {
    fn place(&self) -> io::Result<Place> {
        Place::named(self)
    }
}

impl Named for PathBuf {
    fn place(&self) -> io::Result<Place> {
        Place::named(self)
    }
}

fn no_name(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{} does not name a file", path.display()))
}

/// `.` and `..` and doubled slashes resolved by text, as the newer line reads its paths.
pub fn lexical(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                out.pop();
            }
            other => out.push(other),
        }
    }
    out
}

/// Opens what a path leads to: below a folder, which it does not leave, or from where it begins. No link is followed.
pub fn look_up(folder: Option<BorrowedFd<'_>>, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let mut resolve = ResolveFlag::RESOLVE_NO_SYMLINKS;
    if folder.is_some() {
        resolve |= ResolveFlag::RESOLVE_BENEATH;
    }
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let at = folder.unwrap_or(AT_FDCWD);
    match openat2(at, path, OpenHow::new().flags(flags).resolve(resolve)) {
        // Kernels before 5.6 and sandboxes that do not know the call: step by step.
        Err(Errno::ENOSYS | Errno::EPERM) => {}
        other => return Ok(other?),
    }
    let mut reached: Option<OwnedFd> = None;
    let parts: Vec<Component<'_>> = path.components().collect();
    for (i, part) in parts.iter().enumerate() {
        if folder.is_some() && !matches!(part, Component::Normal(_) | Component::CurDir) {
            return Err(Errno::EXDEV.into());
        }
        let step = if i + 1 == parts.len() { flags } else { FOLDER | OFlag::O_NOFOLLOW };
        let from = reached.as_ref().map_or(at, |fd| fd.as_fd());
        reached = Some(openat(from, part.as_os_str(), step, Mode::empty())?);
    }
    reached.ok_or_else(|| Errno::EISDIR.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_folder_stays_what_was_opened_and_no_link_below_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        for sub in ["own/sub", "other/sub"] {
            fs::create_dir_all(root.join(sub)).unwrap();
            fs::write(root.join(sub).join("f"), sub).unwrap();
        }
        let own = Folder::open(root.join("own")).unwrap();
        let place = own.place(&root.join("own/./sub/../sub/f")).unwrap();
        let id = FileId::at(&root.join("own/sub/f")).unwrap();
        assert_eq!(place.id().unwrap(), Some(id));
        fs::rename(root.join("own"), root.join("moved")).unwrap();
        symlink("other", root.join("own")).unwrap();
        // The folder that was opened, whatever has its name.
        assert_eq!(own.entry("sub").folder.below(Path::new("sub")).unwrap().entry("f").id().unwrap(), Some(id));
        assert_eq!(place.id().unwrap(), Some(id));
        let e = Folder::open(root.join("own")).unwrap_err();
        assert!([libc::ELOOP, libc::ENOTDIR].contains(&e.raw_os_error().unwrap()), "{e}");
        symlink("../other/sub", root.join("moved/link")).unwrap();
        own.place(&root.join("own/link/f")).unwrap_err();
        own.below(Path::new("../other")).unwrap_err();
        own.entry("link").open(PATH | OFlag::O_DIRECTORY).unwrap_err();
        // A path that the user named.
        assert_eq!(
            Place::named(&root.join("own/sub/f")).unwrap().id().unwrap().unwrap(),
            FileId::at(&root.join("other/sub/f")).unwrap()
        );
        let mut names = own.names().unwrap();
        names.sort();
        assert_eq!(names, ["link", "sub"]);
    }
}

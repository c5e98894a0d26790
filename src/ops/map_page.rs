//! The page that `ploop map --svg` writes: made beside its name, durable, and only then put there. A file is replaced only
//! if it is such a page.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use nix::fcntl::OFlag;

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::format::guid::Guid;
use crate::sys::file_id::FileId;
use crate::sys::folder::Place;
use crate::sys::store;

/// Every page begins so; a file that does not is not replaced.
pub const MARK: &str = "<!-- made by ploop map -->\n";

/// Writes a page, which begins with [`MARK`]. `Param` if the name is taken by anything else.
pub fn write(path: &Path, page: &str) -> Result<()> {
    let absolute = std::path::absolute(path).ctx(Kind::Param, || path.display().to_string())?;
    let place = Place::named(&absolute).ctx(Kind::Creat, || format!("cannot open the folder of {}", path.display()))?;
    let there = place.id().ctx(Kind::Fstat, || format!("cannot look at {}", path.display()))?;
    if there.is_some() && !is_page(&place) {
        bail!(
            Param,
            "{} exists and was not written by ploop map: it is not replaced; take another name, or remove it",
            path.display()
        );
    }
    let tmp = place.suffixed(format!(".{}", Guid::generate()));
    let file = store::create_new(&tmp, 0o644).ctx(Kind::Creat, || format!("cannot create {}", tmp.display()))?;
    let id = FileId::of(&file).ctx(Kind::Fstat, || tmp.display())?;
    let put = || -> std::io::Result<()> {
        store::write_all(&file, page.as_bytes(), 0)?;
        store::sync_all(&file)?;
        match there {
            Some(_) => store::rename(&tmp, &place)?,
            None => store::rename_new(&tmp, &place)?,
        }
        store::sync_dir(&place.folder)
    };
    put().ctx(Kind::Write, || format!("cannot write {}", path.display())).inspect_err(|_| {
        let _ = store::unlink_file(&tmp, id);
    })
}

fn is_page(place: &Place) -> bool {
    if !place.regular().is_ok_and(|file| file.is_some()) {
        return false;
    }
    let Ok(fd) = place.open(OFlag::O_RDONLY | OFlag::O_NONBLOCK) else { return false };
    let mut head = Vec::new();
    File::from(fd).take(MARK.len() as u64).read_to_end(&mut head).is_ok() && head == MARK.as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn only_a_page_is_replaced_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let page = |text: &str| format!("{MARK}{text}");
        write(&at("new.svg"), &page("one")).unwrap();
        write(&at("new.svg"), &page("two")).unwrap();
        assert_eq!(fs::read_to_string(at("new.svg")).unwrap(), page("two"));
        fs::write(at("mine.svg"), "<svg/>").unwrap();
        fs::create_dir(at("folder")).unwrap();
        std::os::unix::fs::symlink(at("new.svg"), at("link")).unwrap();
        for name in ["mine.svg", "folder", "link"] {
            assert_eq!(write(&at(name), &page("x")).unwrap_err().kind(), Kind::Param, "{name}");
        }
        assert_eq!(fs::read_to_string(at("mine.svg")).unwrap(), "<svg/>");
        assert_eq!(write(&at("no/such/folder.svg"), &page("x")).unwrap_err().kind(), Kind::Creat);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);
    }
}

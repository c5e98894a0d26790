//! Whether one image file can replace another.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::format::header::{self, Header};
use crate::image::open::{Access, open_level, reopen};
use crate::image::target::{Table, read_table};
use crate::report;
use crate::report::progress::Progress;
use crate::sys::aligned::{AlignedBuf, read_exact};

/// Bytes compared at once.
const CHUNK: u64 = 4 << 20;

/// Compares sizes and headers of two ploop1 images; in-use marks are left out, contents are not looked at. `Format` if
/// they differ, `Open` if one cannot be opened or has no sound header.
pub fn same_shape(one: &Path, other: &Path) -> Result<()> {
    same_shape_of((&opened(one)?, one), (&opened(other)?, other))
}

fn opened(path: &Path) -> Result<File> {
    let (file, _) = reopen(open_level(path, None)?, Access::default())
        .ctx(Kind::Open, || format!("cannot open image {}", path.display()))?;
    Ok(file)
}

/// As [`same_shape`], for open files and their names.
pub fn same_shape_of((a, one): (&File, &Path), (b, other): (&File, &Path)) -> Result<()> {
    let (a, b) = (shape(a, one)?, shape(b, other)?);
    if a.0 != b.0 {
        bail!(
            Format,
            "{} has {} bytes, {} has {}: they are not copies of each other",
            one.display(),
            a.0,
            other.display(),
            b.0
        );
    }
    if a.1 != b.1 {
        bail!(
            Format,
            "{} and {} are not copies of each other: their headers are {:?} and {:?}",
            one.display(),
            other.display(),
            a.1,
            b.1
        );
    }
    Ok(())
}

/// Bytes of the file, and its header without the mark.
fn shape(file: &File, path: &Path) -> Result<(u64, Header)> {
    let len = file.metadata().ctx(Kind::Fstat, || path.display().to_string())?.len();
    let mut bytes = [0; header::SIZE];
    let got = file.read_at(&mut bytes, 0).ctx(Kind::Read, || format!("cannot read {}", path.display()))?;
    let header = Header::parse(&bytes[..got]).map_err(|e| e.as_kind(Kind::Open).context(path.display()))?;
    Ok((len, Header { in_use: 0, extension: 0, ..header }))
}

/// Compares the content of two ploop1 images, cluster by cluster of the disk; positions in the files may differ.
/// `Format` if they differ.
pub fn same_content(a: &File, a_name: &Path, b: &File, b_name: &Path) -> Result<()> {
    let (header, ours) = read_table(a, a_name)?;
    let (_, theirs) = read_table(b, b_name)?;
    let differ = |cluster: u32| -> Result<()> {
        bail!(
            Format,
            "{} and {} are not copies of each other: they differ in cluster {cluster} of the disk",
            a_name.display(),
            b_name.display()
        )
    };
    let clusters = |t: &Table| t.entries.iter().map(|e| e.0).collect::<Vec<_>>();
    if clusters(&ours) != clusters(&theirs) {
        let only = |x: &Table, y: &Table| {
            x.entries.iter().map(|e| e.0).find(|c| y.entries.binary_search_by_key(c, |e| e.0).is_err())
        };
        return differ(only(&ours, &theirs).or(only(&theirs, &ours)).unwrap_or(0));
    }
    let size = header.cluster.bytes();
    let chunk = size.min(CHUNK);
    let (mut one, mut other) = (AlignedBuf::new(chunk as usize), AlignedBuf::new(chunk as usize));
    let read = |file: &File, name: &Path, buf: &mut [u8], at: u64| {
        read_exact(file, buf, at).ctx(Kind::Read, || format!("cannot read {} at offset {at}", name.display()))
    };
    let mut shown = Progress::in_units("comparing", size);
    let total = ours.entries.len() as u64;
    for (done, ((cluster, mine), (_, yours))) in ours.entries.iter().zip(&theirs.entries).enumerate() {
        shown.at(done as u64, total);
        for at in (0..size).step_by(chunk as usize) {
            read(a, a_name, &mut one, u64::from(*mine) * size + at)?;
            read(b, b_name, &mut other, u64::from(*yours) * size + at)?;
            if one[..] != other[..] {
                return differ(*cluster);
            }
        }
        if report::cancel::requested() {
            bail!(Sys, "comparing {} with {} was cancelled", a_name.display(), b_name.display());
        }
    }
    shown.finish();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor::ImageMode;
    use crate::format::header::Version;
    use crate::image::create::{Params, create};
    use crate::units::ClusterSize;
    use std::fs::OpenOptions;

    #[test]
    fn marks_do_not_count_and_sizes_do() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, sectors| {
            let path = dir.path().join(name);
            let cluster = ClusterSize::from_sectors(64).unwrap();
            let params = Params { version: Version::V2, cluster, sectors, mode: ImageMode::Expanded };
            create(&path, &params, &mut |_, _| Ok(())).unwrap();
            path
        };
        let (a, b, c) = (make("a", 6400), make("b", 6400), make("c", 6464));
        let f = OpenOptions::new().write(true).open(&b).unwrap();
        f.write_all_at(&header::IN_USE.to_le_bytes(), 44).unwrap();
        same_shape(&a, &b).unwrap();
        assert_eq!(same_shape(&a, &c).unwrap_err().code(), 11);
        assert_eq!(same_shape(&a, &dir.path().join("d")).unwrap_err().code(), 4);
        f.set_len(f.metadata().unwrap().len() + 1).unwrap();
        assert_eq!(same_shape(&a, &b).unwrap_err().code(), 11);
        std::fs::write(&b, "x").unwrap();
        assert_eq!(same_shape(&a, &b).unwrap_err().code(), 4);
    }
}

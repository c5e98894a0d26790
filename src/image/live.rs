//! A look at an image that a worker writes to meanwhile. Nothing is written, and no lock is taken.
//!
//! What a worker may leave on disk at any moment is no finding: the in-use mark, clusters at the end or in the middle that
//! no entry names yet, a flag that says "empty". An entry that does not fit is read again: only one that stays as it is, and
//! does not fit, is damage.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use crate::bail;
use crate::error::{IoContext, Kind, Result};
use crate::format::header::{self, Header};
use crate::sys::aligned::read_full;
use crate::sys::folder::Folder;
use crate::sys::host;

use super::open::{Access, open_level, reopen};
use super::scan::{Found, Problem, Visitor, describe, scan};

/// Looks before an entry counts as damaged, and the time between them: a worker has published what it moves by then.
const LOOKS: usize = 4;
const BETWEEN: Duration = Duration::from_millis(50);

/// At most so many findings are reported one by one.
const TOLD: usize = 16;

/// What a sound image has, while it runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Live {
    pub header: Header,
    /// Clusters of the disk that have a place in the file.
    pub mapped: u64,
}

type Problems = Vec<(Found, Problem)>;

/// Problems that are looked at again, of those that an image has: a large one that was cut off has millions.
const KEPT: usize = 4096;

#[derive(Default)]
struct Collect {
    found: Problems,
}

impl Visitor for Collect {
    fn problem(&mut self, found: Found, problem: Problem) -> Result<()> {
        if self.found.len() < KEPT {
            self.found.push((found, problem));
        }
        Ok(())
    }
}

/// Checks header and BAT of an image that may be written to meanwhile; `dir` as for [`open_level`]. Damage is `Format`.
pub fn look(path: &Path, dir: Option<&Folder>) -> Result<Live> {
    let fd = open_level(path, dir)?;
    let shown = path.display();
    let (file, _) = reopen(&fd, Access::default()).ctx(Kind::Open, || format!("cannot open image {shown}"))?;
    look_at(&file, path)
}

/// The same of an image that is open; `name` is for messages.
pub fn look_at(file: &File, name: &Path) -> Result<Live> {
    let shown = name.display();
    let at_image = |e: crate::error::Error| e.context(format_args!("image {shown}"));
    let mut stays: Option<Problems> = None;
    let mut last = None;
    for n in 0..LOOKS {
        if n > 0 {
            host::sleep(BETWEEN);
        }
        let (live, len, found) = once(file).map_err(at_image)?;
        let seen = match stays.take() {
            None => found,
            Some(before) => before.into_iter().filter(|p| found.contains(p)).collect(),
        };
        if seen.is_empty() {
            return Ok(live);
        }
        last = Some((live.header, len));
        stays = Some(seen);
    }
    match (last, stays) {
        (Some((header, len)), Some(found)) => {
            let told: Vec<String> =
                found.iter().take(TOLD).map(|(found, problem)| describe(&header, len, *found, *problem)).collect();
            bail!(
                Format,
                "image {shown}: {}{}",
                told.join("; "),
                if found.len() > TOLD {
                    let more = if found.len() == KEPT { "at least " } else { "" };
                    format!("; and {more}{} more like these", found.len() - TOLD)
                } else {
                    String::new()
                }
            )
        }
        _ => bail!(Abort, "image {shown} was not looked at"),
    }
}

fn once(file: &File) -> Result<(Live, u64, Problems)> {
    let mut head = [0; header::SIZE];
    let got = read_full(file, &mut head, 0).ctx(Kind::Read, || "cannot read the header")?;
    let header = Header::parse(head.get(..got).unwrap_or_default())?;
    header.check_layout()?;
    // The file gets longer before an entry names its end; so the length of a moment after the entries were read counts.
    let length = || file.metadata().map(|m| m.len()).ctx(Kind::Fstat, || "cannot look at the file");
    let mut collect = Collect::default();
    let scanned = scan(file, &header, length()?, &mut collect)?;
    let len = length()?;
    let size = header.cluster.bytes();
    collect.found.retain(|(found, problem)| {
        let place = crate::format::bat::decode(header.version, header.cluster, found.entry);
        let inside = matches!(place, crate::format::bat::Entry::At(at) if (u64::from(at) + 1) * size <= len);
        *problem != Problem::BeyondFile || !inside
    });
    Ok((Live { header, mapped: scanned.mapped }, len, collect.found))
}
